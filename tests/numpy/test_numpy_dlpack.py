"""Tensors of DLPack as the kernels read them: capsules, what producers leave out, and what is no tensor."""

import ctypes
import sys

import numpy as np
import pytest
import rgd
from rgd import _rgd
from rgd.weightings._call import kernel_of

DTYPES = [np.float64, np.float32, np.float16]
FUNCTIONS = {
    "sample_weights": rgd.sample_weights,
    "reweighted_mean": rgd.reweighted_mean,
    "KLBall": lambda losses: rgd.sample_weights(losses, rgd.KLBall(0.1)),
    "weight_stats": lambda losses: rgd.weight_stats(losses, np.ones((4, 6))),
    "the kernel itself": lambda losses: through_the_kernel(losses, (4, 6), np.float64),
}
LOSSES = np.linspace(0, 3, 24).reshape(4, 6)


def weight_dtype(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def weigh(losses, weighting):
    """The kernel's weights of a NumPy array."""
    weights = np.empty(losses.shape, weight_dtype(losses.dtype))
    _rgd.sample_weights(losses, weights, *kernel_of(weighting), 1)
    return weights


class Lender:
    """An array of a library that knows nothing but DLPack, of one version of the protocol or the other."""

    def __init__(self, array, version):
        self.array, self.version = array, version

    def __dlpack__(self, **options):
        if self.version == "legacy":
            if options:
                raise TypeError("__dlpack__() got an unexpected keyword argument")
            return self.array.__dlpack__()
        return self.array.__dlpack__(max_version=(1, 0))

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


needs_versioned = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy before 2.1 lends legacy DLPack only"
)
VERSIONS = pytest.mark.parametrize("version", ["legacy", pytest.param("versioned", marks=needs_versioned)])


@VERSIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_an_array_that_only_speaks_dlpack_gives_numpy(version, dtype):
    losses = np.linspace(0, 3, 24, dtype=dtype).reshape(4, 6)[::2, ::-1]
    expected = rgd.sample_weights(losses)
    weights = rgd.sample_weights(Lender(losses, version))
    assert type(weights) is np.ndarray
    assert_same_bits(weights, expected)
    assert rgd.reweighted_mean(Lender(losses, version)) == rgd.reweighted_mean(losses)


@VERSIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_a_capsule_gives_numpy(version, dtype):
    losses = np.linspace(0, 3, 24, dtype=dtype).reshape(4, 6)[::2, ::-1]
    weights = rgd.sample_weights(Lender(losses, version).__dlpack__())
    assert type(weights) is np.ndarray
    assert_same_bits(weights, rgd.sample_weights(losses))


@needs_versioned
def test_a_read_only_array_is_read_through_dlpack():
    losses = np.linspace(0, 3, 24)
    losses.flags.writeable = False
    assert_same_bits(rgd.sample_weights(Lender(losses, "versioned")), rgd.sample_weights(losses))


@VERSIONS
@pytest.mark.parametrize(
    "losses", [np.empty(0), np.empty((3, 0)), np.ones((1, 1, 5))[..., ::2]], ids=["0", "3x0", "1x1x3"]
)
def test_the_kernels_read_dlpack_themselves(version, losses):
    weights = np.empty(losses.shape)
    _rgd.sample_weights(Lender(losses, version), weights, *kernel_of(rgd.KL()), 1)
    assert_same_bits(weights, weigh(losses, rgd.KL()))


class DLTensor(ctypes.Structure):
    """`DLTensor` of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DLManagedTensor(ctypes.Structure):
    """`DLManagedTensor` of dlpack.h."""

    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER))


class DLManagedTensorVersioned(ctypes.Structure):
    """`DLManagedTensorVersioned` of dlpack.h."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


class Crafted:
    """A DLPack tensor over NumPy's memory, with what NumPy and torch never write into one.

    `fields` replaces fields of its `DLTensor`. The tensor is legacy, or of the given major and minor version.
    """

    def __init__(self, array, *, byte_offset=0, strides=None, compact=False, version=None, **fields):
        self.array = array
        self.deleted = 0
        shape = fields.pop("shape", array.shape)
        strides = strides or [stride // array.itemsize for stride in array.strides]
        self.shape = None if shape is None else (ctypes.c_int64 * len(shape))(*shape)
        self.strides = (ctypes.c_int64 * len(strides))(*strides)
        tensor = DLTensor(
            array.ctypes.data - byte_offset,
            1,
            0,
            array.ndim,
            2,
            8 * array.itemsize,
            1,
            self.shape,
            None if compact else self.strides,
            byte_offset,
        )
        for field, value in fields.items():
            setattr(tensor, field, value)
        self.deleter = DELETER(self.delete)
        self.name = b"dltensor" if version is None else b"dltensor_versioned"
        if version is None:
            self.managed = DLManagedTensor(tensor, None, self.deleter)
        else:
            self.managed = DLManagedTensorVersioned(*version, None, self.deleter, 0, tensor)

    def delete(self, _):
        self.deleted += 1

    def __dlpack__(self, **_):
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(ctypes.addressof(self.managed), self.name, None)

    def __dlpack_device__(self):
        return (1, 0)


def through_the_front(losses):
    return rgd.sample_weights(losses)


def through_the_kernel(losses, shape, dtype):
    weights = np.empty(shape, weight_dtype(dtype))
    _rgd.sample_weights(losses, weights, *kernel_of(rgd.KL()), 1)
    return weights


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "options",
    [{"byte_offset": 64}, {"byte_offset": 8}, {"compact": True}, {"byte_offset": 16, "compact": True}],
    ids=str,
)
def test_byte_offsets_and_missing_strides_of_dlpack_are_honoured(dtype, options):
    base = np.linspace(0, 3, 120, dtype=dtype)
    losses = base[64:88].reshape(4, 6)
    expected = weigh(losses, rgd.KL())
    assert_same_bits(through_the_front(Crafted(losses, **options)), expected)
    assert_same_bits(through_the_kernel(Crafted(losses, **options), losses.shape, dtype), expected)


def test_strides_of_axes_of_length_one_are_noise():
    losses = np.linspace(0, 3, 6).reshape(1, 6, 1)
    strange = Crafted(losses, strides=[-(2**40), 1, 12345])
    assert_same_bits(through_the_kernel(strange, losses.shape, np.float64), weigh(losses, rgd.KL()))


# Capsules.

FRONTS = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))
LAYOUTS = pytest.mark.parametrize("version", [None, (1, 0), (1, 1)], ids=["legacy", "1.0", "1.1"])


@FRONTS
@LAYOUTS
def test_a_capsule_is_consumed_once_and_its_deleter_called_once(function, version):
    crafted = Crafted(LOSSES, version=version)
    capsule = crafted.__dlpack__()
    result = function(capsule)
    assert str(result) == str(function(LOSSES))
    assert crafted.deleted == 1
    assert f'"used_{crafted.name.decode()}"' in repr(capsule)
    with pytest.raises(
        ValueError, match=r"losses is a DLPack capsule already consumed.*pass the array itself"
    ):
        function(capsule)
    del capsule
    assert crafted.deleted == 1


@FRONTS
def test_a_deleter_may_be_missing(function):
    crafted = Crafted(LOSSES)
    crafted.managed.deleter = DELETER()
    assert str(function(crafted.__dlpack__())) == str(function(LOSSES))


def test_a_capsule_of_bfloat16_is_read():
    torch = pytest.importorskip("torch")
    losses = torch.linspace(0, 3, 24).bfloat16()
    expected = rgd.sample_weights(losses)
    assert_same_bits(rgd.sample_weights(losses.__dlpack__()), np.asarray(expected))


BIG = 2**62
WRONG = {
    "no data": ({"data": None}, ValueError, "losses has elements and no data"),
    "no data and an offset": (
        {"data": None, "byte_offset": 64},
        ValueError,
        "losses has elements and no data",
    ),
    "no shape": ({"shape": None}, BufferError, "losses .*shape pointer is null but ndim is 2"),
    "a negative rank": ({"ndim": -1}, BufferError, "losses .*ndim is negative: -1"),
    "a negative length": ({"shape": (4, -6)}, BufferError, "losses .*dimension 1 is negative: -6"),
    "more elements than can be counted": ({"shape": (BIG, BIG)}, BufferError, "losses .*overflows"),
    "more bytes than can be counted": (
        {"shape": (BIG, 1)},
        BufferError,
        "losses .*(overflows|have no address)",
    ),
    "a far stride": ({"strides": [BIG, 1]}, BufferError, "losses .*elements have no address"),
    "a far negative stride": ({"strides": [-BIG, 1]}, BufferError, "losses .*elements have no address"),
    "strides past the end": ({"strides": [2**60 - 1, 1]}, BufferError, "losses .*elements have no address"),
    "strides before the start": (
        {"strides": [-(2**59), 1]},
        BufferError,
        "losses .*elements have no address",
    ),
    "one element repeated too often": (
        {"shape": (2**40, 2**40), "strides": [0, 0]},
        BufferError,
        "losses .*(overflows|have no address)",
    ),
    "no elements along axes that cannot be counted": (
        {"shape": (0, 2**40, 2**40), "ndim": 3, "strides": [0, 0, 0]},
        BufferError,
        "losses .*(overflows|the product of its other axes is too large)",
    ),
    "an absurd offset": ({"byte_offset": 2**64 - 8}, BufferError, f"losses .*its byte offset is {2**64 - 8}"),
    "an odd offset": ({"byte_offset": 3}, ValueError, "losses is not aligned"),
    "lanes": ({"lanes": 4}, TypeError, "losses .*float64 in 4 lanes"),
    "no lanes": ({"lanes": 0}, BufferError, "losses .*lane count must be greater than zero"),
    "no bits": ({"bits": 0}, BufferError, "losses .*bit width must be greater than zero"),
    "integers": ({"code": 0}, TypeError, "losses .*int64"),
    "float8": ({"code": 12, "bits": 8}, TypeError, "losses .*float8_e5m2"),
    "an unknown dtype": ({"code": 99, "bits": 8}, TypeError, "losses .*DLPack type 99 of 8 bits"),
    "a GPU": (
        {"device_type": 2},
        ValueError,
        r"losses must be on the CPU, got a tensor on cuda:0.*\.cpu\(\)",
    ),
    "an unknown device": ({"device_type": 77}, ValueError, "losses must be on the CPU.*device type 77"),
}


def contradictory(kind, version=None):
    """A tensor of `WRONG`, its error and the message."""
    fields, error, message = WRONG[kind]
    crafted = Crafted(LOSSES, version=version, **{k: v for k, v in fields.items() if k != "byte_offset"})
    crafted.managed.tensor.byte_offset = fields.get("byte_offset", 0)
    return crafted, error, message


@FRONTS
@LAYOUTS
@pytest.mark.parametrize("kind", WRONG)
def test_a_capsule_that_contradicts_itself_is_refused_by_name_and_given_back(function, version, kind):
    crafted, error, message = contradictory(kind, version)
    with pytest.raises(error, match=message):
        function(crafted.__dlpack__())
    assert crafted.deleted == 1


@pytest.mark.parametrize("kind", WRONG)
def test_a_producer_that_contradicts_itself_is_refused_by_name(kind):
    crafted, _, _ = contradictory(kind)
    with pytest.raises((TypeError, ValueError, BufferError), match="losses"):
        rgd.sample_weights(crafted)
    assert crafted.deleted == 1


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("strides", [[0, 0, 0], [-(2**62), 2**62, 7]], ids=str)
def test_the_strides_of_a_tensor_without_elements_may_be_anything(shape, strides):
    losses = Crafted(np.empty(shape), shape=shape, strides=strides[: len(shape)])
    weights = np.lib.stride_tricks.as_strided(np.empty(1), shape, [0] * len(shape))
    _rgd.sample_weights(losses, weights, *kernel_of(rgd.KL()), 1)
    assert losses.deleted == 1


@pytest.mark.parametrize("function", [rgd.sample_weights, rgd.reweighted_mean])
def test_the_data_of_a_capsule_without_elements_may_be_missing(function):
    crafted = Crafted(np.empty((4, 0)), data=None)
    function(crafted.__dlpack__())
    assert crafted.deleted == 1


@pytest.mark.parametrize(
    "lend", [lambda crafted: crafted.__dlpack__(), lambda crafted: crafted], ids=["capsule", "object"]
)
@FRONTS
def test_a_tensor_of_a_later_major_version_is_refused_with_the_version_to_ask_for(function, lend):
    crafted = Crafted(LOSSES, version=(2, 0))
    with pytest.raises(
        TypeError, match=r"losses is a DLPack tensor of a version .*got 2.*max_version=\(1, 0\)"
    ):
        function(lend(crafted))
    assert crafted.deleted == 1


@pytest.mark.parametrize("function", [rgd.sample_weights, rgd.reweighted_mean])
@pytest.mark.parametrize("version", ["legacy", pytest.param("versioned", marks=needs_versioned)])
def test_a_call_keeps_no_reference_to_a_producer(function, version):
    losses = np.linspace(0, 3, 24)
    before = sys.getrefcount(losses)
    function(Lender(losses, version))
    function(Lender(losses, version).__dlpack__())
    assert sys.getrefcount(losses) == before
