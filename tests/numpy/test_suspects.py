"""Which samples are named as mislabelled: how many, in which order, and which ones are left out."""

import numpy as np
import pytest
import rgd

LOSSES = np.array([0.5, 3.0, 0.1, 3.0, np.nan, np.inf, 1.0])


def indices(**given):
    return rgd.suspects(LOSSES, **given).indices.tolist()


def test_the_largest_losses_come_first_equal_ones_in_their_order_and_unknown_ones_never():
    found = rgd.suspects(LOSSES, k=7)
    assert found.indices.tolist() == [5, 1, 3, 6, 0, 2]
    np.testing.assert_array_equal(found.losses, LOSSES[found.indices])
    assert found.indices.dtype == np.int64
    assert found.losses.dtype == np.float64
    assert found.proposed is None


def test_number_share_and_threshold_say_how_many():
    assert indices(k=0) == indices(share=0.0) == []
    assert indices(k=2) == indices(share=0.3) == [5, 1]
    assert indices(share=1.0) == indices(k=np.int32(7)) == [5, 1, 3, 6, 0, 2]
    assert indices(threshold=1.0) == [5, 1, 3]
    assert indices(threshold=np.inf) == []


def test_samples_that_the_model_labels_alike_or_that_have_no_label_are_left_out():
    target = np.array([0, 1, 2, 2, 0, -100, 1])
    assert indices(k=7, target=target) == [1, 3, 6, 0, 2]
    logits = np.eye(3)[[0, 1, 0, 0, 1, 0, 2]]
    found = rgd.suspects(LOSSES, k=2, target=target, logits=logits)
    assert found.indices.tolist() == [3, 6]
    assert found.proposed.tolist() == [0, 2]
    assert rgd.suspects(LOSSES, k=2, logits=logits).proposed.tolist() == [0, 1]


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "list"])
def test_arrays_of_every_library_are_read(library):
    if library == "list":
        losses, target, logits = [0.5, 2.0], [0, 1], [[1.0, 0.0], [1.0, 0.0]]
    elif library == "torch":
        torch = pytest.importorskip("torch")
        losses = torch.tensor([0.5, 2.0], dtype=torch.bfloat16, requires_grad=True)
        target, logits = torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    else:
        jnp = pytest.importorskip("jax.numpy")
        losses, target, logits = map(jnp.asarray, ([0.5, 2.0], [0, 1], [[1.0, 0.0], [1.0, 0.0]]))
    found = rgd.suspects(losses, k=2, target=target, logits=logits)
    assert found.indices.tolist() == [1]
    assert found.proposed.tolist() == [0]


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({}, ValueError, "exactly one of k, share and threshold, got none"),
        ({"k": 1, "share": 0.5}, ValueError, "got k and share"),
        ({"k": 8}, ValueError, "from 0 to 7"),
        ({"k": -1}, ValueError, "from 0 to 7"),
        ({"k": 1.5}, TypeError, "integer"),
        ({"share": 1.5}, ValueError, r"in \[0, 1\]"),
        ({"share": np.nan}, ValueError, r"in \[0, 1\]"),
        ({"threshold": np.nan}, ValueError, "a number"),
        ({"k": 1, "target": np.zeros(7)}, TypeError, "integers"),
        ({"k": 1, "target": np.zeros(6, int)}, ValueError, "shape of losses"),
        ({"k": 1, "logits": np.zeros((6, 2))}, ValueError, r"\(N, C\) with N = 7"),
        ({"k": 1, "logits": np.zeros(7)}, ValueError, r"\(N, C\)"),
        ({"k": 1, "logits": np.zeros((7, 2), int)}, TypeError, "logits must hold floating"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(given, error, match):
    with pytest.raises(error, match=match):
        rgd.suspects(LOSSES, **given)


def test_losses_that_are_no_vector_of_numbers_are_refused():
    with pytest.raises(ValueError, match=r"shape \(N,\)"):
        rgd.suspects(np.zeros((2, 3)), k=1)
    with pytest.raises(ValueError, match="scalar"):
        rgd.suspects(np.float64(1.0), k=1)
    with pytest.raises(TypeError, match="floating"):
        rgd.suspects(np.array([1, 2]), k=1)
    assert rgd.suspects([], k=0).indices.shape == (0,)


def test_a_picture_shows_given_and_proposed_labels():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415
    from rgd import plot  # noqa: PLC0415

    logits = np.eye(3)[[0, 1, 0, 0, 1, 0, 2]]
    target = np.array([0, 2, 2, 2, 0, 1, 1])
    found = rgd.suspects(LOSSES, k=7, target=target, logits=logits)
    axes = plot.suspects(found, target=target, images=np.zeros((7, 4, 4)), count=3)
    notes = [text.get_text() for text in axes.texts]
    assert notes == ["∞, given 1, model 0", "given 2, model 1", "given 2, model 0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sample 5", "sample 1", "sample 3"]
    axes.figure.canvas.draw()
    axes = plot.suspects(rgd.suspects(LOSSES, k=2), names=list("abcdefg"), classes=list("xyz"), target=target)
    assert [text.get_text() for text in axes.texts] == ["∞, given y", "given z"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["f", "b"]
    for given, match in [
        ({"count": 0}, "positive"),
        ({"names": ["a"]}, "at least 7"),
        ({"target": [1]}, "at least 7"),
    ]:
        with pytest.raises(ValueError, match=match):
            plot.suspects(found, **given)
    with pytest.raises(TypeError, match="integers"):
        plot.suspects(found, target=np.zeros(7))
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.suspects(rgd.suspects(LOSSES, k=0))
    pyplot.close("all")
