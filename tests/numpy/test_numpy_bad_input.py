"""What the NumPy front refuses, and that each refusal names the argument, what was wrong and the fix."""

import datetime

import numpy as np
import pytest
import rgd

LOSSES = np.array([0.5, 1.0, 3.0])

FUNCTIONS = pytest.mark.parametrize(
    "function",
    [
        rgd.sample_weights,
        rgd.reweighted_mean,
        lambda losses: rgd.weight_stats(losses, LOSSES),
    ],
    ids=["sample_weights", "reweighted_mean", "weight_stats"],
)


class OnDevice:
    """An array of a library whose memory is not the CPU's."""

    def __init__(self, device):
        self.device = device

    def __dlpack__(self, **_):
        raise AssertionError("memory of another device was asked for")

    def __dlpack_device__(self):
        return self.device


@FUNCTIONS
@pytest.mark.parametrize(
    "scalar", [np.array(0.7), np.float32(0.7), 0.7, 1, np.array(0.7, np.float16)], ids=repr
)
def test_scalar_loss_is_refused_with_a_hint(function, scalar):
    with pytest.raises(ValueError, match=r'losses is a scalar.* re-weights nothing; reduction="none"'):
        function(scalar)


@FUNCTIONS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scalar_loss_of_torch_is_refused_with_a_hint(function, dtype):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r'losses is a scalar.*reduction="none"'):
        function(torch.tensor(0.7, dtype=getattr(torch, dtype)))


@FUNCTIONS
@pytest.mark.parametrize(
    "dtype", [np.int64, np.uint8, np.bool_, np.complex64, np.longdouble, object, "S3", "M8[s]"]
)
def test_losses_that_are_not_floating_are_refused_with_the_conversion(function, dtype):
    with pytest.raises(TypeError, match=r"losses must be float64, float32, float16 or bfloat16 .*: pass "):
        function(np.zeros(3, dtype=dtype))


@FUNCTIONS
@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "float8_e5m2"])
def test_tensors_that_are_not_floating_are_refused(function, dtype):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="losses"):
        function(torch.zeros(3, dtype=getattr(torch, dtype)))


@FUNCTIONS
def test_losses_in_foreign_byte_order_are_refused(function):
    with pytest.raises(TypeError, match=r"losses must be .* in native byte order, got >f4"):
        function(LOSSES.astype(">f4"))


@FUNCTIONS
@pytest.mark.parametrize(
    "losses",
    [[0.5, 1.0, 3.0], (0.5,), None, "losses", {}, memoryview(LOSSES)],
    ids=["list", "tuple", "None", "str", "dict", "memoryview"],
)
def test_what_is_no_array_is_refused_with_asarray(function, losses):
    with pytest.raises(TypeError, match=r"losses must be an array .*: pass np\.asarray\(losses\)"):
        function(losses)


@FUNCTIONS
def test_a_masked_array_is_refused_because_its_mask_would_be_lost(function):
    with pytest.raises(TypeError, match=r"losses is a masked array.*losses\.compressed\(\)"):
        function(np.ma.masked_greater(LOSSES, 2.0))


@FUNCTIONS
def test_losses_that_are_not_aligned_are_refused_with_the_copy(function):
    packed = np.zeros(3, dtype=np.dtype([("flag", "u1"), ("loss", "f4")]))
    with pytest.raises(ValueError, match=r"losses is not aligned .*: pass losses\.copy\(\)"):
        function(packed["loss"])


@FUNCTIONS
def test_losses_whose_strides_are_no_multiple_of_their_size_are_refused(function):
    aligned = np.zeros(3, dtype=np.dtype([("loss", "f8"), ("count", "i4")], align=False))
    with pytest.raises(ValueError, match="losses is not aligned"):
        function(aligned["loss"])


@FUNCTIONS
@pytest.mark.parametrize(
    ("device", "name"),
    [((2, 1), "cuda:1"), ((8, 0), "metal:0"), ((10, 3), "rocm:3"), ((77, 0), "DLPack device type 77:0")],
)
def test_a_tensor_on_another_device_is_refused_by_the_devices_name(function, device, name):
    with pytest.raises(
        ValueError, match=rf"losses must be on the CPU, got a tensor on {name}: .*losses\.cpu\(\)"
    ):
        function(OnDevice(device))


@FUNCTIONS
def test_a_meta_tensor_is_refused_by_its_device(function):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="losses must be on the CPU, got a tensor on meta"):
        function(torch.zeros(3, device="meta"))


@FUNCTIONS
def test_a_tensor_that_requires_grad_is_refused_rather_than_cut_from_its_graph(function):
    torch = pytest.importorskip("torch")
    losses = torch.ones(3, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"losses requires grad.*rgd\.torch\.sample_weights.*losses\.detach\(\)"
    ):
        function(losses * 2)
    function(losses.detach())


@FUNCTIONS
def test_a_tensor_whose_negation_is_pending_is_refused_rather_than_read_with_the_wrong_sign(function):
    torch = pytest.importorskip("torch")
    losses = torch.ones(3, dtype=torch.complex64).conj().imag
    assert losses.is_neg()
    with pytest.raises(ValueError, match=r"losses is a view whose negation is pending: .*resolve_neg\(\)"):
        function(losses)


@FUNCTIONS
def test_a_fake_tensor_is_refused_rather_than_read_as_garbage(function):
    pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC0415

    torch = pytest.importorskip("torch")
    with FakeTensorMode():
        losses = torch.zeros(3)
    with pytest.raises(TypeError, match="losses is a FakeTensor"):
        function(losses)


@FUNCTIONS
def test_a_sparse_tensor_is_refused_with_to_dense(function):
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"losses has layout torch\.sparse_coo.*losses\.to_dense\(\)"):
        function(torch.eye(3).to_sparse())


def test_a_tensor_under_vmap_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="losses, a Tensor, cannot be read through DLPack"):
        torch.vmap(rgd.sample_weights)(torch.ones(2, 3))


def test_losses_traced_by_jax_are_refused_with_its_own_front():
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"losses is traced by JAX .*: under jit, grad or vmap use rgd\.jax"):
        jax.jit(rgd.sample_weights)(jax.numpy.ones(3))


@FUNCTIONS
@pytest.mark.parametrize(
    "version",
    [
        pytest.param(None, id="legacy"),
        pytest.param(
            (1, 0),
            id="versioned",
            marks=pytest.mark.skipif(
                np.lib.NumpyVersion(np.__version__) < "2.1.0",
                reason="NumPy before 2.1 lends legacy DLPack only",
            ),
        ),
    ],
)
def test_a_capsule_already_consumed_is_refused(function, version):
    capsule = LOSSES.__dlpack__() if version is None else LOSSES.__dlpack__(max_version=version)
    function(capsule)
    with pytest.raises(
        ValueError, match=r"losses is a DLPack capsule already consumed.*pass the array itself"
    ):
        function(capsule)


@FUNCTIONS
def test_a_capsule_of_something_else_is_refused(function):
    with pytest.raises(TypeError, match="losses must be an array or a DLPack capsule, got"):
        function(datetime.datetime_CAPI)


@pytest.mark.parametrize("function", [rgd.sample_weights, rgd.reweighted_mean])
@pytest.mark.parametrize("name", ["tau", "scale"])
def test_weighting_beside_its_short_form_is_refused(function, name):
    with pytest.raises(ValueError, match=f"{name} or weighting, not both"):
        function(LOSSES, rgd.KL(), **{name: 1.0})


@pytest.mark.parametrize("function", [rgd.sample_weights, rgd.reweighted_mean])
@pytest.mark.parametrize(
    ("tau", "error"), [(0.0, ValueError), (-1, ValueError), (np.nan, ValueError), ("1", TypeError)]
)
def test_a_tau_that_is_no_positive_number_is_refused(function, tau, error):
    with pytest.raises(error, match="tau must be a"):
        function(LOSSES, tau=tau)


@pytest.mark.parametrize("function", [rgd.sample_weights, rgd.reweighted_mean])
def test_a_number_given_as_weighting_is_refused_with_tau(function):
    with pytest.raises(TypeError, match=r"weighting must be .*did you mean tau=0\.5"):
        function(LOSSES, 0.5)


OPTIONED = pytest.mark.parametrize(
    "function",
    [
        rgd.sample_weights,
        rgd.reweighted_mean,
        lambda losses, **options: rgd.weight_stats(losses, np.ones(losses.shape), **options),
    ],
    ids=["sample_weights", "reweighted_mean", "weight_stats"],
)


@OPTIONED
@pytest.mark.parametrize("where", [np.ones(3), [1, 0, 1], np.ones(3, np.int8), "yes"], ids=repr)
def test_a_mask_that_is_not_bool_is_refused_with_the_comparison(function, where):
    with pytest.raises(
        TypeError, match=r"where must be an array of bool, got .*: compare it, as in where=mask > 0"
    ):
        function(LOSSES, where=where)


@OPTIONED
@pytest.mark.parametrize("shape", [(), (2,), (1, 3), (3, 1)], ids=str)
def test_a_mask_of_another_shape_is_refused_with_both_shapes(function, shape):
    with pytest.raises(ValueError, match=r"where must have the shape of the losses, \(3,\), got"):
        function(LOSSES, where=np.ones(shape, bool))


@OPTIONED
@pytest.mark.parametrize("wrong", [-1.0, -1e-300, np.nan, np.inf, -np.inf], ids=str)
def test_a_base_measure_that_is_negative_or_not_finite_is_refused_with_the_number(function, wrong):
    with pytest.raises(ValueError, match=rf"sample_weight must hold finite numbers >= 0, got {wrong}"):
        function(LOSSES, sample_weight=np.array([1.0, wrong, 1.0]))


@OPTIONED
def test_a_negative_integer_in_a_base_measure_is_refused(function):
    with pytest.raises(ValueError, match="sample_weight must hold finite numbers >= 0, got -2"):
        function(LOSSES, sample_weight=[1, -2, 1])


@OPTIONED
@pytest.mark.parametrize("dtype", ["bool", "complex64", "object", "U1"])
def test_a_base_measure_that_is_no_numbers_is_refused(function, dtype):
    with pytest.raises(TypeError, match="sample_weight must be an array of numbers, got"):
        function(LOSSES, sample_weight=np.ones(3, dtype))


@OPTIONED
@pytest.mark.parametrize("name", ["sample_weight", "groups"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (3, 2), (1, 2, 3)], ids=str)
def test_one_number_a_loss_or_a_sample_is_asked_for(function, name, shape):
    message = rf"{name} must have the shape of the losses, \(2, 3\), or one entry a sample, \(2,\), got"
    with pytest.raises(ValueError, match=message):
        function(np.ones((2, 3)), **{name: np.ones(shape, int)})


@OPTIONED
@pytest.mark.parametrize("dtype", ["float64", "bool", "object", "U1"])
def test_groups_that_are_no_integers_are_refused(function, dtype):
    with pytest.raises(TypeError, match="groups must be an array of integers, got"):
        function(LOSSES, groups=np.ones(3, dtype))


def test_statistics_of_a_negative_group_are_refused():
    with pytest.raises(ValueError, match="groups must be integers >= 0, got -1"):
        rgd.weight_stats(LOSSES, np.ones(3), groups=[0, -1, 1])


@pytest.mark.parametrize("function", [rgd.sample_weights, rgd.reweighted_mean])
@pytest.mark.parametrize("groups", [[0, 1, 2], [0, -1, 1]], ids=str)
def test_a_group_outside_the_weightings_range_is_refused(function, groups):
    weighting = rgd.GroupDRO(2, 0.1)
    with pytest.raises(ValueError, match=r"groups must lie in 0\.\.1 for GroupDRO\(groups=2\), got"):
        function(LOSSES, weighting, groups=groups, state=weighting.init())


@pytest.mark.parametrize("function", [rgd.sample_weights, rgd.reweighted_mean])
def test_missing_groups_are_asked_for(function):
    weighting = rgd.GroupDRO(2, 0.1)
    with pytest.raises(ValueError, match="GroupDRO needs the group of each sample: give groups="):
        function(LOSSES, weighting, state=weighting.init())


@pytest.mark.parametrize("function", [rgd.sample_weights, rgd.reweighted_mean])
@pytest.mark.parametrize("weighting", [rgd.GroupDRO(2, 0.1), rgd.MovingAverage(rgd.KL(), 0.9)], ids=str)
def test_a_weighting_that_remembers_is_refused_without_its_state(function, weighting):
    name = type(weighting).__name__
    with pytest.raises(ValueError, match=rf"{name} remembers earlier batches: .*state = weighting\.init\(\)"):
        function(LOSSES, weighting, groups=[0, 1, 1])


@pytest.mark.parametrize("function", [rgd.sample_weights, rgd.reweighted_mean])
def test_a_state_is_refused_by_a_weighting_that_keeps_none(function):
    with pytest.raises(ValueError, match="KL keeps no state: leave state out"):
        function(LOSSES, rgd.KL(), state={"shares": 1.0})


@pytest.mark.parametrize("shape", [(), (2,), (1, 3), (3, 1), (0,)], ids=str)
def test_weights_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="weights"):
        rgd.weight_stats(LOSSES, np.ones(shape))


def test_a_shape_mismatch_names_both_shapes():
    with pytest.raises(ValueError, match=r"weights must have the shape of losses, \(3,\), got \(2, 3\)"):
        rgd.weight_stats(LOSSES, np.ones((2, 3)))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], np.ones(3, int), None], ids=repr)
def test_weights_that_are_no_floating_array_are_refused_by_name(weights):
    with pytest.raises(TypeError, match="weights must be"):
        rgd.weight_stats(LOSSES, weights)


def test_weight_stats_refuses_what_is_no_weighting():
    with pytest.raises(TypeError, match="weighting must be"):
        rgd.weight_stats(LOSSES, LOSSES, 1.0)


def test_a_missing_attribute_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'rgd' has no attribute 'sample_weight'"):
        rgd.sample_weight  # noqa: B018
