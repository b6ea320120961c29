"""`rgd.torch.plot`: what is drawn is what the weights are."""

import subprocess
import sys

import numpy as np
import pytest
import rgd
import torch
from rgd.torch import sample_weights

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402
from rgd.torch import plot  # noqa: E402


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


def drawn(ax, tmp_path):
    """Draws the figure; a text outside of it or a warning would show."""
    path = tmp_path / "picture.png"
    ax.figure.savefig(path)
    return path.stat().st_size > 4000


def batch(count=40):
    generator = torch.Generator().manual_seed(0)
    return torch.empty(count).exponential_(generator=generator)


def test_the_curve_is_the_weight_of_each_loss(tmp_path):
    ax = plot.weight_curve(tau=2.0)
    line = ax.get_lines()[0]
    expected = sample_weights(torch.tensor(line.get_xdata()), tau=2.0)
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-15)
    assert 2.0 in line.get_xdata()
    assert any("tau = 2" in text.get_text() for text in ax.texts)
    assert drawn(ax, tmp_path)


@pytest.mark.parametrize("weighting", [rgd.KL(), rgd.KL(normalize=True), rgd.KLBall(0.2)], ids=str)
def test_the_losses_of_a_batch_are_marked_with_their_weights(weighting, tmp_path):
    losses = batch().requires_grad_()
    ax = plot.weight_curve(weighting, losses=losses)
    marks = next(line for line in ax.get_lines() if line.get_marker() == "o")
    weights = sample_weights(losses.detach().double(), weighting)
    np.testing.assert_allclose(marks.get_xdata(), losses.detach().numpy(), rtol=1e-7)
    np.testing.assert_allclose(marks.get_ydata(), weights, rtol=1e-12)
    assert drawn(ax, tmp_path)


def test_a_curve_without_a_clip_marks_none():
    ax = plot.weight_curve(rgd.KL(float("inf"), scale=0.5))
    assert not any("tau" in text.get_text() for text in ax.texts if "clipped" in text.get_text())


@pytest.mark.parametrize("weighting", [rgd.KL(normalize=True), rgd.KLBall(0.2)], ids=str)
def test_a_curve_of_weights_that_depend_on_the_batch_needs_losses(weighting):
    with pytest.raises(ValueError, match="depend on the batch: give its losses"):
        plot.weight_curve(weighting)


@pytest.mark.parametrize(
    "losses", [torch.zeros(3), torch.full((3,), torch.nan), torch.tensor([1.0, torch.inf])]
)
def test_equal_and_broken_losses_are_drawn_without_failing(losses, tmp_path):
    assert drawn(plot.weight_curve(losses=losses), tmp_path)


def test_the_history_shows_the_share_of_samples_in_each_bin(tmp_path):
    weights = [torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([2.0, 2.0])]
    ax = plot.weight_history(weights, steps=[10, 30], bins=2)
    shares = ax.collections[0].get_array().reshape(2, 2)  # bins, steps
    np.testing.assert_array_equal(shares, [[0.75, 0.0], [0.25, 1.0]])
    mean = ax.get_lines()[0]
    np.testing.assert_array_equal(mean.get_xdata(), [10, 30])
    np.testing.assert_array_equal(mean.get_ydata(), [1.25, 2.0])
    assert drawn(ax, tmp_path)


def test_a_history_of_one_step_is_drawn(tmp_path):
    assert drawn(plot.weight_history([torch.ones(4)]), tmp_path)


@pytest.mark.parametrize("steps", [[0], [0, 0], [1, 0]])
def test_steps_that_do_not_fit_are_refused(steps):
    with pytest.raises(ValueError, match="steps must hold 2 increasing numbers"):
        plot.weight_history([torch.ones(3), torch.ones(3)], steps=steps)


@pytest.mark.parametrize("weights", [[], [torch.empty(0)], [torch.tensor([torch.nan])]])
def test_a_history_without_weights_is_refused(weights):
    with pytest.raises(ValueError, match="no finite weight"):
        plot.weight_history(weights)


def test_the_heaviest_samples_come_first_and_larger_losses_before_smaller(tmp_path):
    losses = torch.tensor([0.1, 5.0, 0.7, 9.0, 0.2])
    ax = plot.heaviest_samples(losses, tau=1.0, count=3)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sample 3", "sample 1", "sample 2"]
    widths = [patch.get_width() for patch in ax.patches]
    np.testing.assert_allclose(widths, sample_weights(losses.double(), tau=1.0)[[3, 1, 2]], rtol=1e-6)
    notes = [text.get_text() for text in ax.texts]
    assert notes[:3] == ["loss 9, clipped", "loss 5, clipped", "loss 0.7"]
    assert drawn(ax, tmp_path)


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 3, 8, 8)])
def test_pictures_stand_beside_the_heaviest_samples(shape, tmp_path):
    ax = plot.heaviest_samples(batch(6), images=torch.rand(shape), names=list("abcdef"), count=4)
    boxes = [artist for artist in ax.artists if type(artist).__name__ == "AnnotationBbox"]
    assert len(boxes) == 4
    assert drawn(ax, tmp_path)


def test_fewer_samples_than_asked_for_are_all_shown():
    assert len(plot.heaviest_samples(batch(3), count=10).patches) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": torch.zeros(2, 2)}, r"losses must have shape \(N,\)"),
        ({"losses": torch.zeros(0)}, r"losses must have shape \(N,\)"),
        ({"losses": torch.tensor(1.0)}, "already reduced"),
        ({"count": 0}, "count must be a positive integer"),
        ({"names": ["a"]}, "names must hold one string for each of 4"),
        ({"images": torch.zeros(3, 8, 8)}, r"images must have shape .* N = 4"),
        ({"images": torch.zeros(4, 8)}, r"images must have shape"),
        ({"tau": 1.0, "weighting": rgd.KL()}, "not both"),
    ],
    ids=str,
)
def test_bad_input_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plot.heaviest_samples(**{"losses": batch(4), **settings})


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: plot.weight_curve(ax=ax),
        lambda ax: plot.weight_history([torch.ones(3)], ax=ax),
        lambda ax: plot.heaviest_samples(batch(5), ax=ax),
    ],
    ids=["curve", "history", "samples"],
)
def test_pictures_are_drawn_on_the_axes_given(draw):
    figure, ax = plt.subplots()
    assert draw(ax) is ax
    assert plt.get_fignums() == [figure.number]


def test_global_settings_of_matplotlib_stay_as_they_are():
    before = dict(matplotlib.rcParams)
    plot.weight_curve()
    plot.heaviest_samples(batch(5))
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, rgd.torch.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
