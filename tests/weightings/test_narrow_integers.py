"""Labels and groups of narrow integer dtypes: every one gives what the same numbers in 64 bits give.

A number that a dtype cannot hold, such as 256 classes for uint8, must not be wrapped into one that it can.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rgd
import rgd.jax
import rgd.optax
import rgd.torch
import torch
from rgd.torch import RGDLoss, backend, cross_entropy, linear_cross_entropy

# The number of classes is one that the dtype cannot hold, the labels are some that it can.
CASES = [("int8", 128), ("int8", 200), ("uint8", 256), ("uint8", 300), ("int16", 32768), ("uint16", 65536)]
GROUPS = ["int8", "uint8", "int16", "int32", "int64"]
MANY = 200


def some(classes, dtype):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, min(classes, np.iinfo(dtype).max + 1), 6)
    labels[0], labels[1] = min(classes, np.iinfo(dtype).max + 1) - 1, 0
    return rng.standard_normal((6, classes)).astype(np.float32), labels.astype(dtype)


def heads(classes):
    rng = np.random.default_rng(1)
    return rng.standard_normal((6, 3)).astype(np.float32), rng.standard_normal((3, classes)).astype(
        np.float32
    )


def by_jit(function):
    return jax.jit(function)


def by_vmap(function):
    return lambda logits, labels: jnp.mean(jax.vmap(function)(logits[:, None], labels[:, None]))


def by_shard_map(function):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    rows = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(
        lambda x, y: jax.lax.pmean(function(x, y), "data"),
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=jax.sharding.PartitionSpec(),
    )
    return jax.jit(mapped)


def plainly(function):
    return function


@pytest.fixture(autouse=True, scope="module")
def compiled_in_a_hurry():
    """Most time goes into compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def transformed(*others):
    """Each case with each backend, under `jit` where jnp would compile a dozen programs for a shape."""
    for transform in (plainly, by_jit, *others):
        yield from [(CASES[2], transform, "jnp"), (CASES[2], transform, "rust")]
    for case in CASES[:2] + CASES[3:]:
        yield from [(case, by_jit, "jnp"), (case, plainly, "rust")]


@pytest.mark.parametrize(("case", "transform", "name"), transformed(by_vmap, by_shard_map))
def test_jax_takes_labels_of_a_dtype_that_cannot_hold_the_number_of_classes(case, transform, name):
    logits, labels = some(case[1], case[0])

    def loss(logits, labels):
        return rgd.jax.cross_entropy(logits, labels, backend=name)

    step = jax.value_and_grad(transform(loss))
    if transform is not plainly:
        step = jax.jit(step)  # one program in place of many
    expected = step(logits, labels.astype(np.int32))
    assert np.isfinite(expected[0])
    for given in (labels, jnp.asarray(labels)):
        actual = step(logits, given)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(("case", "transform", "name"), transformed())
def test_the_linear_layer_of_jax_takes_them_too(case, transform, name):
    inputs, kernel = heads(case[1])
    _, labels = some(case[1], case[0])

    def loss(inputs, labels):
        return rgd.jax.linear_cross_entropy(inputs, kernel, labels, backend=name)

    function = transform(loss)
    expected = function(inputs, labels.astype(np.int32))
    assert np.isfinite(expected)
    np.testing.assert_array_equal(function(inputs, jnp.asarray(labels)), expected)


# In two's complement 156 and -100 are one pattern of eight bits, and so are 255 and -1, 356 and 100.
IGNORING = [("uint8", [156, 3, 255], -100), ("uint8", [255, 3, 7], -1), ("uint8", [255, 3, 255], 255)]
IGNORING += [("int8", [100, 3, 5], 356), ("int8", [-1, 3, 5], -1), ("int16", [3, 100, 9], 2**16 + 100)]
IGNORING += [("int32", [3, 100, 9], 2**32 + 100), ("int64", [3, 100, 2**40], 2**40)]


@pytest.mark.parametrize(("dtype", "labels", "ignored"), IGNORING)
def test_only_the_ignored_index_itself_is_ignored(dtype, labels, ignored):
    labels = np.array(labels, dtype)
    counted = np.array([int(label) != ignored for label in labels])
    logits = np.random.default_rng(2).standard_normal((3, 300)).astype(np.float32)
    clean = np.where(counted, labels, 0).astype(np.int64)
    options = {"weighting": rgd.ERM(), "reduction": "none", "ignore_index": ignored}
    one_by_one = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(clean), reduction="none"
    ).numpy()
    expected = np.where(counted, one_by_one, 0)
    results = [rgd.jax.cross_entropy(logits, labels, **options)]
    identity = np.eye(300, dtype=np.float32)
    results.append(rgd.jax.linear_cross_entropy(logits, identity, labels, **options))
    for name in ("rust", "composite"):
        tensors = torch.from_numpy(logits), torch.from_numpy(labels)
        with backend(name):
            results.append(cross_entropy(*tensors, **options))
            results.append(
                linear_cross_entropy(tensors[0], torch.from_numpy(identity), tensors[1], **options)
            )
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=316 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(("dtype", "classes"), [case for case in CASES if case[0] != "uint16"])
def test_torch_takes_labels_of_a_dtype_that_cannot_hold_the_number_of_classes(dtype, classes):
    logits, labels = (torch.from_numpy(array) for array in some(classes, dtype))
    inputs, kernel = (torch.from_numpy(array) for array in heads(classes))
    for name in ("rust", "composite"):
        with backend(name):
            dense = cross_entropy(logits, labels), cross_entropy(logits, labels.long())
            linear = (
                linear_cross_entropy(inputs, kernel.t(), labels),
                linear_cross_entropy(inputs, kernel.t(), labels.long()),
            )
        assert dense[0] == dense[1]
        assert linear[0] == linear[1]
        assert dense[0].isfinite()
    one_by_one = torch.vmap(lambda x, y: cross_entropy(x, y, weighting=rgd.ERM()))(logits, labels)
    torch.testing.assert_close(one_by_one.mean(), cross_entropy(logits, labels.long(), weighting=rgd.ERM()))


def test_a_compiled_graph_takes_them():
    logits, labels = (torch.from_numpy(array) for array in some(300, "uint8"))
    torch._dynamo.reset()
    for ignored in (-100, 255):
        criterion = RGDLoss(ignore_index=ignored)
        compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(logits, labels), criterion(logits, labels.long()))


# Groups.


def losses_and_groups(dtype):
    losses = np.array([0.5, 1.0, 2.0, 3.0], np.float32)
    return losses, np.array([0, 5, 100, 127], dtype)


def numpy_front(weighting, losses, groups):
    return rgd.sample_weights(losses, weighting, groups=groups, state=weighting.init())


def torch_front(weighting, losses, groups):
    losses, groups = torch.from_numpy(losses), torch.from_numpy(groups)
    return rgd.torch.sample_weights(losses, weighting, groups=groups, state=weighting.init())


def composite_front(weighting, losses, groups):
    with backend("composite"):
        return torch_front(weighting, losses, groups)


def jax_front(weighting, losses, groups):
    return rgd.jax.sample_weights(losses, weighting, groups=groups, state=weighting.init())


def jax_traced(weighting, losses, groups):
    return jax.jit(jax_front, static_argnums=0)(weighting, losses, groups)


def optax_front(weighting, losses, groups):
    # The update for one gradient of 1 a sample, and 0 for the others, is a quarter of its weight.
    transformation = rgd.optax.reweight(weighting)
    updates, state = transformation.update(
        jnp.eye(4), transformation.init(jnp.zeros(4)), losses=losses, groups=groups
    )
    return 4 * updates, state.weighting_state


def own_batch(namespace):
    def weigh(weighting, losses, groups):
        batch = rgd.Batch(namespace(losses), groups=namespace(groups))
        return weighting.step(batch, {"shares": namespace(weighting.init()["shares"].astype(np.float32))})

    return weigh


FRONTS = [numpy_front, torch_front, composite_front, jax_front, jax_traced, optax_front]
FRONTS += [own_batch(np.asarray), own_batch(torch.from_numpy), own_batch(jnp.asarray)]


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("dtype", GROUPS)
def test_group_dro_takes_more_groups_than_the_dtype_of_groups_can_count(dtype, front):
    weighting = rgd.GroupDRO(MANY, 0.5)
    weights, state = front(weighting, *losses_and_groups(dtype))
    expected, after = numpy_front(weighting, *losses_and_groups("int64"))
    # Sums over 200 groups in float32.
    tolerance = (MANY + 16) * np.finfo(np.float32).eps
    np.testing.assert_allclose(weights, expected, rtol=tolerance)
    np.testing.assert_allclose(state["shares"], after["shares"], rtol=tolerance)


@pytest.mark.parametrize("dtype", GROUPS)
def test_losses_of_logits_take_narrow_groups(dtype):
    weighting = rgd.GroupDRO(MANY, 0.5)
    _, groups = losses_and_groups(dtype)
    logits, labels = (array[:4] for array in some(300, "uint8"))
    inputs, kernel = (torch.from_numpy(array) for array in heads(300))
    criterion = RGDLoss(weighting=weighting)
    tensors = torch.from_numpy(logits), torch.from_numpy(labels)
    given = {"groups": torch.from_numpy(groups)}
    wide = {"groups": torch.from_numpy(groups.astype(np.int64))}
    assert criterion(*tensors, **given) == RGDLoss(weighting=weighting)(*tensors, **wide)
    options = {"weighting": weighting, "state": weighting.init()}
    results = [
        linear_cross_entropy(inputs[:4], kernel.t(), tensors[1], **options, **one)[0] for one in (given, wide)
    ]
    assert results[0] == results[1]
    results = [
        rgd.jax.linear_cross_entropy(heads(300)[0][:4], heads(300)[1], labels, groups=g, **options)[0]
        for g in (groups, groups.astype(np.int32))
    ]
    assert results[0] == results[1]
    results = [
        rgd.jax.cross_entropy(logits, labels, groups=g, **options)[0]
        for g in (groups, groups.astype(np.int32))
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", GROUPS)
def test_statistics_take_narrow_groups(dtype):
    losses, groups = losses_and_groups(dtype)
    weights = np.ones_like(losses)
    expected = rgd.weight_stats(losses, weights, groups=groups.astype(np.int64)).groups.mean_loss
    assert len(expected) == 128
    for found in (
        rgd.weight_stats(losses, weights, groups=groups),
        rgd.torch.weight_stats(*map(torch.from_numpy, (losses, weights)), groups=torch.from_numpy(groups)),
        rgd.jax.weight_stats(losses, weights, groups=groups, num_groups=128),
        jax.jit(lambda g: rgd.jax.weight_stats(losses, weights, groups=g, num_groups=128))(groups),
    ):
        np.testing.assert_allclose(found.groups.mean_loss, expected)


def test_a_chunk_that_is_filled_up_keeps_narrow_groups():
    class ByGroup(rgd.Weighting):
        pointwise = True

        def weights(self, batch):
            return 1.0 + batch.groups + 0 * batch.losses

    inputs, kernel = heads(300)
    labels, groups = some(300, "uint8")[1], np.array([0, 255, 7, 128, 9, 1], np.uint8)
    options = {"weighting": ByGroup(), "chunk_bytes": 4 * 4 * 300}
    results = [
        jax.value_and_grad(rgd.jax.linear_cross_entropy)(inputs, kernel, labels, groups=g, **options)
        for g in (groups, groups.astype(np.int32))
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_jax_refuses_a_group_that_its_integers_cannot_hold():
    losses, _ = losses_and_groups("int64")
    groups = np.array([0, 1, 2, 2**32 + 3])
    weighting = rgd.GroupDRO(MANY, 0.5)
    with pytest.raises(ValueError, match=r"groups holds 4294967299, more than int32 can: number the groups"):
        jax_front(weighting, losses, groups)
