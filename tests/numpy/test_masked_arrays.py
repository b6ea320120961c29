"""A masked array of NumPy is refused in every argument of every front: its mask would be lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import rgd
from rgd import boosting, plot, reference

LOSSES = np.array([0.5, 1.0, 3.0])
MASK = [False, False, True]
WHERE = np.ma.array([True, True, True], mask=MASK)
MASSES = np.ma.array([1.0, 2.0, 3.0], mask=MASK)
GROUPS = np.ma.array([0, 1, 1], mask=MASK)
ARGUMENTS = {"where": WHERE, "sample_weight": MASSES, "groups": GROUPS}
REFUSAL = r"{} is a masked array, and its mask would be lost: "


def refused(name: str) -> Any:
    return pytest.raises(TypeError, match=REFUSAL.format(name))


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("front", [rgd, reference], ids=["numpy", "reference"])
def test_what_goes_with_the_losses(front: Any, name: str) -> None:
    given = ARGUMENTS[name]
    calls = [
        lambda **options: front.sample_weights(LOSSES, rgd.KL(), **options),
        lambda **options: front.reweighted_mean(LOSSES, rgd.KL(), **options),
        lambda **options: front.weight_stats(LOSSES, LOSSES, **options),
    ]
    for call in calls:
        with refused(name):
            call(**{name: given})
        # Even where nothing is masked: the next batch's mask would be lost.
        with refused(name):
            call(**{name: np.ma.array(given.data)})


@pytest.mark.parametrize("front", [rgd, reference], ids=["numpy", "reference"])
def test_losses_and_weights(front: Any) -> None:
    with refused("losses"):
        front.sample_weights(MASSES, rgd.KL())
    with refused("weights"):
        front.weight_stats(LOSSES, MASSES)


def test_a_list_of_masked_arrays() -> None:
    with refused("sample_weight"):
        rgd.sample_weights(LOSSES[None], sample_weight=[MASSES])
    with refused("sample_weight"):
        rgd.sample_weights(LOSSES, sample_weight=[1.0, 2.0, np.ma.masked])


def test_the_references_cross_entropy() -> None:
    logits, masked = np.ones((3, 3)), np.ma.array(np.ones((3, 3)), mask=True)
    with refused("logits"):
        reference.cross_entropy(masked, [0, 1, 2], rgd.KL())
    for name, given in (("target", GROUPS), ("weight", MASSES), ("logit_adjustment", MASSES)):
        arguments: dict[str, Any] = {"target": [0, 1, 2], name: given}
        with refused(name):
            reference.cross_entropy(logits, weighting=rgd.KL(), **arguments)


@pytest.mark.parametrize("function", [rgd.log_prior, rgd.class_balanced])
def test_class_counts(function: Any) -> None:
    with refused("counts"):
        function(np.ma.array([90, 10, 5], mask=MASK))


def test_boosting() -> None:
    labels, margins = np.array([1.0, 0.0, 1.0]), np.zeros(3)
    for objective in (boosting.logistic(), boosting.squared_error()):
        with refused("y_true"):
            objective(np.ma.array(labels, mask=MASK), margins)
        with refused("y_pred"):
            objective(labels, np.ma.array(margins, mask=MASK))
        with refused("sample_weight"):
            objective(labels, margins, MASSES)


def test_pictures() -> None:
    pytest.importorskip("matplotlib")
    with refused("losses"):
        plot.heaviest_samples(MASSES, rgd.KL(), count=1)
    with refused("groups"):
        plot.heaviest_samples(LOSSES, rgd.GroupDRO(2, 0.1), groups=GROUPS)
    with refused("steps"):
        plot.weight_history([LOSSES] * 3, steps=GROUPS)


def test_scikit_learn() -> None:
    pytest.importorskip("sklearn", minversion="1.6")
    from rgd.sklearn import Reweighted  # noqa: PLC0415
    from sklearn.linear_model import Ridge  # noqa: PLC0415

    features, values = np.arange(3.0)[:, None], np.array([0.0, 1.0, 2.0])
    estimator = Reweighted(Ridge(), rgd.KLBall(0.1))
    with refused("sample_weight"):
        estimator.fit(features, values, sample_weight=MASSES)
    with refused("y"):
        estimator.fit(features, np.ma.array(values, mask=MASK))
    fitted = estimator.fit(features, values)
    with refused("sample_weight"):
        fitted.score(features, values, sample_weight=MASSES)
    with refused("y"):
        fitted.score(features, np.ma.array(values, mask=MASK))


def test_jax() -> None:
    jnp = pytest.importorskip("jax.numpy")
    import rgd.jax  # noqa: PLC0415

    losses, logits, labels = jnp.asarray(LOSSES), jnp.ones((3, 3)), np.array([0, 1, 2])
    for name, given in ARGUMENTS.items():
        options: dict[str, Any] = {"num_groups": 2} if name == "groups" else {}
        # JAX refuses most of them itself.
        with pytest.raises((TypeError, ValueError), match=r"masked array"):
            rgd.jax.sample_weights(losses, **{name: given})
        with pytest.raises((TypeError, ValueError), match=r"masked array"):
            rgd.jax.weight_stats(losses, losses, **{name: given}, **options)
        with pytest.raises((TypeError, ValueError), match=r"masked array"):
            rgd.jax.cross_entropy(logits, labels, **{name: given})
        with pytest.raises((TypeError, ValueError), match=r"masked array"):
            rgd.jax.linear_cross_entropy(logits, logits, labels, **{name: given})
    for given in (GROUPS, np.ma.array(np.ones((3, 3)), mask=True)):
        with pytest.raises((TypeError, ValueError), match=r"masked array"):
            rgd.jax.cross_entropy(logits, given)
    with pytest.raises((TypeError, ValueError), match=r"masked array"):
        rgd.jax.cross_entropy(logits, labels, MASSES)
    with pytest.raises((TypeError, ValueError), match=r"masked array"):
        rgd.jax.linear_cross_entropy(logits, logits, GROUPS)
    with pytest.raises((TypeError, ValueError), match=r"masked array"):
        rgd.jax.weight_stats(losses, MASSES)


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    import rgd.torch  # noqa: PLC0415

    for name, given in ARGUMENTS.items():
        with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor"):
            rgd.torch.sample_weights(torch.tensor(LOSSES), **{name: given})
