"""`rgd.plot`: what is drawn is what the weights are."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import rgd
import torch
from rgd import sample_weights

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402
from rgd import plot  # noqa: E402


@pytest.fixture(autouse=True)
def figures_are_closed():
    yield
    plt.close("all")


@dataclasses.dataclass(frozen=True)
class Softer(rgd.Weighting):
    """A user's own, pointwise."""

    power: float = 0.5
    pointwise = True

    def weights(self, batch):
        return (1 + batch.losses) ** self.power


@dataclasses.dataclass(frozen=True)
class Momentum(rgd.Weighting):
    """A user's own that remembers the mean loss."""

    decay: float = 0.5

    def init(self):
        return {"mean": 1.0}

    def step(self, batch, state):
        mean = self.decay * state["mean"] + (1 - self.decay) * batch.mean(batch.losses)
        return batch.losses / mean, {"mean": mean}


@dataclasses.dataclass(frozen=True)
class Heedless(rgd.Weighting):
    """A user's own that forgets the base measure."""

    def weights(self, batch):
        return batch.losses / batch.xp.mean(batch.losses)


POINTWISE = [rgd.ERM(), rgd.KL(), rgd.KL(scale=-0.7), rgd.Focal(2.0), rgd.Pointwise(np.cosh), Softer()]
BATCH = [
    rgd.KL(normalize=True),
    rgd.KLBall(0.2),
    rgd.MidrangeKL(1.0),
    rgd.ChiSquare(1.0),
    rgd.ChiSquareBall(0.3),
    rgd.CVaR(0.3),
    rgd.CVaR(0.3, smoothing=0.2),
    rgd.Trimmed(rgd.KL(), 0.2),
    Heedless(),
]
STATEFUL = [rgd.MovingAverage(rgd.KL(), 0.9), Momentum()]


def weights_of(losses, weighting, **options):
    if not weighting.stateful:
        return sample_weights(losses, weighting, **options)
    return sample_weights(losses, weighting, **{"state": weighting.init(), **options})[0]


def marks_of(ax):
    return next(line for line in ax.get_lines() if line.get_marker() == "o")


def drawn(ax, tmp_path):
    """Draws the figure; a text outside of it or a warning would show."""
    path = tmp_path / "picture.png"
    ax.figure.savefig(path, dpi=60)
    return path.stat().st_size > 2000


def batch(count=40):
    generator = torch.Generator().manual_seed(0)
    return torch.empty(count).exponential_(generator=generator)


def test_the_curve_is_the_weight_of_each_loss(tmp_path):
    ax = plot.weight_curve(tau=2.0)
    line = ax.get_lines()[0]
    expected = sample_weights(np.array(line.get_xdata()), tau=2.0)
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-15)
    assert 2.0 in line.get_xdata()
    assert any(text.get_text() == "clipped above 2" for text in ax.texts)
    assert drawn(ax, tmp_path)


@pytest.mark.parametrize("weighting", [*POINTWISE, *BATCH, *STATEFUL], ids=str)
def test_the_losses_of_a_batch_are_marked_with_their_weights(weighting, tmp_path):
    losses = batch().requires_grad_()
    ax = plot.weight_curve(weighting, losses=losses)
    marks = marks_of(ax)
    weights = weights_of(losses.detach().double().numpy(), weighting)
    np.testing.assert_allclose(marks.get_xdata(), losses.detach().numpy(), rtol=1e-7)
    np.testing.assert_allclose(marks.get_ydata(), weights, rtol=1e-12)
    assert drawn(ax, tmp_path)


@pytest.mark.parametrize("weighting", [*POINTWISE, *BATCH, *STATEFUL], ids=str)
def test_the_curve_runs_through_every_sample_of_the_batch(weighting):
    losses = batch(12).double().numpy()
    line = plot.weight_curve(weighting, losses=losses).get_lines()[0]
    between = np.interp(losses, line.get_xdata(), line.get_ydata())
    # The curve of a pointwise member is linear between the points of its grid: off by spacing^2 / 8 times the
    # second derivative, of which cosh has the largest. Others have a point at each sample.
    spacing = np.diff(line.get_xdata()).max()
    curvature = np.cosh(losses.max()) if weighting.pointwise else 0.0
    atol = spacing**2 / 8 * curvature + 1e-12
    np.testing.assert_allclose(between, weights_of(losses, weighting), rtol=0, atol=atol)


@pytest.mark.parametrize(
    "weighting", [rgd.KLBall(0.2), rgd.KL(float("inf"), scale=1.0, normalize=True)], ids=str
)
def test_exponential_weights_are_drawn_as_exponentials_between_the_samples_too(weighting):
    losses = [0.0, 1.0, 4.0]
    line = plot.weight_curve(weighting, losses=losses).get_lines()[0]
    at, logarithms = line.get_xdata(), np.log(line.get_ydata())
    assert np.count_nonzero((at > 1) & (at < 4)) > 100
    slopes = np.polyfit(at, logarithms, 1)
    np.testing.assert_allclose(np.polyval(slopes, at), logarithms, atol=1e-9)


def test_a_member_that_forgets_the_base_measure_is_drawn_with_straight_lines():
    line = plot.weight_curve(Heedless(), losses=[0.0, 3.0, 1.0]).get_lines()[0]
    np.testing.assert_array_equal(line.get_xdata(), [0.0, 1.0, 3.0])
    np.testing.assert_allclose(line.get_ydata(), [0.0, 0.75, 2.25])


def test_weights_by_group_are_marked_without_a_curve(tmp_path):
    weighting, groups = rgd.GroupDRO(2, 0.5), torch.tensor([0, 0, 1])
    ax = plot.weight_curve(weighting, losses=[0.0, 1.0, 2.0], groups=groups)
    weights = weights_of(np.array([0.0, 1.0, 2.0]), weighting, groups=groups.numpy())
    np.testing.assert_array_equal(marks_of(ax).get_ydata(), weights)
    assert [line for line in ax.get_lines() if len(line.get_xdata()) > 3] == []
    assert drawn(ax, tmp_path)


def test_a_weighting_that_remembers_is_drawn_with_the_state_given():
    losses, state = np.array([0.0, 1.0, 2.0]), {"mean": 7.0}
    ax = plot.weight_curve(Momentum(), losses=losses, state=state)
    expected = weights_of(losses, Momentum(), state=state)
    np.testing.assert_array_equal(marks_of(ax).get_ydata(), expected)
    bars = plot.heaviest_samples(losses, Momentum(), state=state)
    np.testing.assert_array_equal([patch.get_width() for patch in bars.patches], expected[::-1])


def test_a_state_for_a_weighting_that_keeps_none_is_refused():
    with pytest.raises(ValueError, match="keeps no state"):
        plot.weight_curve(rgd.KL(), state={"mean": 1.0})


@pytest.mark.parametrize("kind", ["list", "numpy", "float16", "torch", "bfloat16", "jax", "list of torch"])
def test_arrays_of_every_library_are_drawn_alike(kind):
    numbers = [0.25, 1.0, 3.0]
    if kind == "jax":
        losses = pytest.importorskip("jax").numpy.asarray(numbers, dtype="bfloat16")
    else:
        losses = {
            "list": numbers,
            "numpy": np.array(numbers),
            "float16": np.array(numbers, np.float16),
            "torch": torch.tensor(numbers, requires_grad=True),
            "bfloat16": torch.tensor(numbers, dtype=torch.bfloat16),
            "list of torch": [torch.tensor(number) for number in numbers],
        }[kind]
    marks = marks_of(plot.weight_curve(rgd.KLBall(0.2), losses=losses))
    np.testing.assert_array_equal(marks.get_xdata(), numbers)
    np.testing.assert_allclose(marks.get_ydata(), sample_weights(np.array(numbers), rgd.KLBall(0.2)))
    plot.heaviest_samples(losses)
    plot.weight_history([losses, losses])


def test_a_curve_without_a_clip_marks_none():
    ax = plot.weight_curve(rgd.KL(float("inf"), scale=0.5))
    assert not any("clipped" in text.get_text() for text in ax.texts)


@pytest.mark.parametrize("weighting", [*BATCH, *STATEFUL, rgd.GroupDRO(2, 0.1)], ids=str)
def test_a_curve_of_weights_that_depend_on_the_batch_needs_losses(weighting):
    with pytest.raises(ValueError, match="depend on the batch: give its losses"):
        plot.weight_curve(weighting)


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda values: plot.weight_curve(losses=values), "losses"),
        (plot.heaviest_samples, "losses"),
        (lambda values: plot.weight_history([np.ones(2), values]), r"weights\[1\]"),
    ],
    ids=["curve", "samples", "history"],
)
def test_a_refusal_calls_the_array_by_its_own_name(draw, name):
    with pytest.raises(ValueError, match=f"^{name} is a scalar: it is already reduced"):
        draw(torch.tensor(1.0))
    for wrong in (np.array([1, 2]), torch.tensor([True]), ["a"]):
        with pytest.raises(TypeError, match=f"^{name} must hold floating numbers"):
            draw(wrong)


@pytest.mark.parametrize(
    "losses", [torch.zeros(3), torch.full((3,), torch.nan), torch.tensor([1.0, torch.inf])]
)
@pytest.mark.parametrize("weighting", [rgd.KL(), *BATCH, rgd.KL(scale=-1.0), rgd.Focal(1.0)], ids=str)
def test_equal_and_broken_losses_are_drawn_without_failing(weighting, losses, tmp_path):
    assert drawn(plot.weight_curve(weighting, losses=losses), tmp_path)
    assert drawn(plot.heaviest_samples(losses, weighting), tmp_path)


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
    np.testing.assert_allclose(widths, sample_weights(losses.double().numpy(), tau=1.0)[[3, 1, 2]], rtol=1e-6)
    notes = [text.get_text() for text in ax.texts]
    assert notes[:3] == ["loss 9, clipped", "loss 5, clipped", "loss 0.7"]
    assert drawn(ax, tmp_path)


@pytest.mark.parametrize("weighting", [rgd.KL(scale=-0.7), rgd.KL(), rgd.CVaR(0.4)], ids=str)
def test_the_largest_losses_come_first_whatever_the_weighting(weighting, tmp_path):
    losses = np.array([0.1, 5.0, 0.7, 9.0, 0.2])
    ax = plot.largest_losses(losses, weighting, count=3)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sample 3", "sample 1", "sample 2"]
    assert [patch.get_width() for patch in ax.patches] == [9.0, 5.0, 0.7]
    weights = sample_weights(losses, weighting)
    assert [text.get_text() for text in ax.texts][:3] == [f"weight {weights[i]:.3g}" for i in (3, 1, 2)]
    assert drawn(ax, tmp_path)


def test_advice_names_the_picture_that_shows_suspects():
    losses = np.array([8.0] + [0.0] * 39)
    stats = rgd.weight_stats(losses, sample_weights(losses, rgd.CVaR(0.025)))
    (sentence,) = stats.advice()
    assert "rgd.plot.largest_losses" in sentence
    assert hasattr(plot, "largest_losses")


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 3, 8, 8)])
def test_pictures_stand_beside_the_heaviest_samples(shape, library, tmp_path):
    images = library(np.random.default_rng(0).random(shape))
    ax = plot.heaviest_samples(batch(6), images=images, names=list("abcdef"), count=4)
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
    with pytest.raises(ValueError, match=message):
        plot.largest_losses(**{"losses": batch(4), **settings})


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


def test_matplotlib_is_imported_only_to_draw_and_torch_not_at_all():
    code = """
        import sys, numpy as np, rgd.plot
        assert "matplotlib" not in sys.modules
        import matplotlib
        matplotlib.use("agg")
        rgd.plot.weight_curve(losses=np.ones(3))
        assert not {"torch", "jax"} & set(sys.modules)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
