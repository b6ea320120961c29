"""Random calls of every front of the package, compared with the equations in float64.

Each input follows from its seed: shapes, dtypes, memory layouts, weightings with random numbers, options,
and sometimes infinite or equal losses. The oracle is `rgd.reference`, which shares no code with the fronts.
For linear heads and boosted trees the chain rule is written out here.

Run `make fuzz-python`, or `python fuzz/calls.py --seconds 60 --only dense`. A fault prints its kind and seed,
and `--replay dense:17` repeats it. `--plant` breaks a front on purpose, to show that the fault is found.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import rgd
import rgd.boosting
import torch
from rgd import reference
from rgd.torch import RGDLoss, backend, cross_entropy, linear_cross_entropy
from rgd.torch import sample_weights as torch_weights
from rgd.torch import weight_stats as torch_stats
from tqdm import tqdm

EPS = {name: torch.finfo(getattr(torch, name)).eps for name in ("float64", "float32", "float16", "bfloat16")}
# Of the options that a call may have, those that the oracle takes by the same name.
TENSORS = ("weight", "logit_adjustment", "where", "sample_weight", "groups")
BACKENDS = ("rust", "composite")


class FaultError(AssertionError):
    """A result that differs from the oracle's by more than rounding explains."""


@dataclasses.dataclass
class Draw:
    """What is drawn from a seed."""

    seed: int

    def __post_init__(self) -> None:
        self.choose = random.Random(self.seed)
        self.numbers = np.random.default_rng(self.seed)

    def chance(self, share: float) -> bool:
        return self.choose.random() < share

    def between(self, low: float, high: float) -> float:
        """A number, equally likely in every factor of two."""
        return math.exp(self.choose.uniform(math.log(low), math.log(high)))

    def weighting(self, pointwise: bool = False) -> rgd.Weighting:
        """A member of the family with random numbers; those that remember are not among them."""
        choose = self.choose
        tau = choose.choice([1.0, math.inf, self.between(0.1, 10)])
        inner: list[Callable[[], rgd.Weighting]] = [
            rgd.ERM,
            lambda: rgd.KL(self.between(0.1, 10)),
            lambda: rgd.KL(tau, scale=choose.uniform(-2, 2)),
            lambda: rgd.Focal(choose.choice([0.0, 1.0, 2.0, choose.uniform(0, 5)])),
            lambda: rgd.Threshold(self.between(0.1, 5)),
        ]
        if pointwise:
            return choose.choice(inner)()
        over_batch: list[Callable[[], rgd.Weighting]] = [
            lambda: rgd.KL(tau, scale=choose.uniform(-2, 2), normalize=True),
            lambda: rgd.MidrangeKL(choose.uniform(-1, 1), relative=self.chance(0.5)),
            lambda: rgd.KLBall(self.between(0.01, 2)),
            lambda: rgd.ChiSquare(self.between(0.1, 10)),
            lambda: rgd.ChiSquareBall(self.between(0.01, 1)),
            lambda: rgd.CVaR(choose.uniform(0.05, 1)),
            lambda: rgd.CVaR(choose.uniform(0.05, 1), smoothing=self.between(0.1, 3)),
            lambda: rgd.Trimmed(choose.choice(inner)(), choose.uniform(0, 0.5)),
        ]
        return choose.choice([*inner, *over_batch])()

    def losses(self, size: int) -> np.ndarray:
        """Losses of usual sizes, sometimes all equal, and rarely with an infinite one or a NaN among them."""
        losses = self.numbers.exponential(2.0, size)
        if self.chance(0.1):
            losses[:] = losses[0]
        elif self.chance(0.2):
            losses = losses.round(1)
        if self.chance(0.05):
            losses[self.choose.randrange(size)] = self.choose.choice([math.inf, math.nan])
        return losses

    def layout(self, array: np.ndarray) -> np.ndarray:
        """The same numbers in memory of another layout: strided, transposed, reversed or as they are."""
        kind = self.choose.choice(["as it is", "strided", "transposed", "reversed"])
        if kind == "strided":
            wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
            wide[..., ::2] = array
            return wide[..., ::2]
        if kind == "transposed":
            return np.asfortranarray(array)
        if kind == "reversed":
            return np.ascontiguousarray(array[::-1])[::-1]
        return array

    def units(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """A mask or a measure of units, or neither."""
        found: dict[str, np.ndarray] = {}
        if self.chance(0.3):
            found["sample_weight"] = self.numbers.integers(0, 4, shape) / 2
        if self.chance(0.3):
            found["where"] = self.numbers.random(shape) < 0.8
        return found


def in_torch(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor; it keeps the strides that torch can have."""
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.to(dtype)


def same(what: str, found: Any, expected: Any, relative: float, terms: float = 0.0) -> None:
    """Refuse a result whose distance from the oracle's is more than `relative` of the norm.

    Args:
        what: Is compared.
        found: By a front.
        expected: By the oracle.
        relative: The rounding that is allowed.
        terms: The size of the terms whose differences the numbers are, where these are much smaller.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise FaultError(f"{what}: shape {found.shape}, expected {expected.shape}")
    finite = np.isfinite(expected)
    alike = np.array_equal(found[~finite], expected[~finite], equal_nan=True)
    if not alike or not np.isfinite(found[finite]).all():
        raise FaultError(f"{what}: {found}, expected {expected}")
    size = max(float(np.linalg.norm(expected[finite])), terms, 1e-30)
    off = float(np.linalg.norm(found[finite] - expected[finite]))
    if off > relative * size:
        raise FaultError(f"{what}: off by {off / size:.3g} of the size, allowed {relative:.3g}")


def rounding(size: int, eps: float) -> float:
    """A rounding of each number, of each step of a sum, and of exponents up to 32."""
    return (2 * size + 64) * eps


# --- the kinds of calls ---


def weights(draw: Draw) -> None:
    """Weights and statistics of losses, in NumPy and in torch by both backends."""
    dtype = draw.choose.choice(["float64", "float32"])
    shape = draw.choose.choice([(1,), (7,), (64,), (3, 5), (2, 3, 4), (300,)])
    weighting = draw.weighting()
    losses = draw.layout(draw.losses(math.prod(shape)).reshape(shape).astype(dtype))
    options = draw.units(shape)
    expected = reference.sample_weights(losses, weighting, **options)
    close = rounding(losses.size, EPS[dtype])
    same("numpy", rgd.sample_weights(losses, weighting, **options), expected, close)
    given = {name: in_torch(value) for name, value in options.items()}
    for name in BACKENDS:
        with backend(name):
            found = torch_weights(in_torch(losses), weighting, **given)
        same(f"torch, {name}", found, expected, close)
    if not np.isfinite(losses).all():
        return
    told = reference.weight_stats(losses, expected.astype(dtype), weighting, **options)
    fronts = {
        "numpy": rgd.weight_stats(losses, expected.astype(dtype), weighting, **options),
        "torch": torch_stats(in_torch(losses), torch.tensor(expected.astype(dtype)), weighting, **given),
    }
    for front, stats in fronts.items():
        for field in ("mean_loss", "worst_tenth", "objective", "effective_sample_size", "max_weight"):
            same(f"stats of {front}: {field}", getattr(stats, field), getattr(told, field), close)


@dataclasses.dataclass
class Call:
    """A cross-entropy: its arrays, and its options."""

    logits: np.ndarray
    target: np.ndarray
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]

    @classmethod
    def drawn(cls, draw: Draw, shape: tuple[int, ...], pointwise: bool = False) -> Call:
        choose, numbers = draw.choose, draw.numbers
        places, classes = (*shape[:1], *shape[2:]), shape[1]
        logits = numbers.normal(size=shape) * choose.choice([0.1, 3.0]) + choose.choice([0.0, 0.0, 40.0])
        if draw.chance(0.25):
            target = numbers.dirichlet(np.ones(classes), places)
            target = np.moveaxis(target, -1, 1) if len(shape) > 2 else target
        else:
            target = numbers.integers(0, classes, places)
            target[numbers.random(places) < 0.1] = -100
        options = {
            "weighting": draw.weighting(pointwise),
            "reduction": choose.choice(["mean", "sum", "none"]),
            "label_smoothing": choose.choice([0.0, 0.0, 0.1, 1.0]),
            "per": choose.choice(["element", "element", "sample"]),
            "z_loss": choose.choice([0.0, 0.0, 1e-3]),
        }
        arrays = draw.units(places[:1] if options["per"] == "sample" else places)
        if draw.chance(0.3):
            arrays["weight"] = numbers.random(classes) + 0.5
        if draw.chance(0.3):
            arrays["logit_adjustment"] = -3 * numbers.random(classes)
        if options["reduction"] == "mean" and draw.chance(0.2):
            options["normalizer"] = 7.5
        return cls(logits, target, arrays, options)

    def expected(self, logits: np.ndarray) -> tuple[Any, np.ndarray]:
        """The objective and its gradient by the oracle."""
        given = {**self.oracle_arrays(), **self.options}
        return (
            reference.cross_entropy(logits, self.target, **given),
            reference.cross_entropy_grad(logits, self.target, **given),
        )

    def oracle_arrays(self) -> dict[str, np.ndarray]:
        """The arrays as the oracle takes them: a mask must broadcast to the losses' shape."""
        found = dict(self.arrays)
        if "where" in found and self.options["per"] == "sample":
            places = self.logits.ndim - 1
            found["where"] = found["where"].reshape(-1, *[1] * (places - 1))
        return found

    def terms(self, logits: np.ndarray) -> float:
        """The size of what a gradient's entries are differences of: the factors of the targets."""
        by_class = {k: v for k, v in self.arrays.items() if k in {"weight", "logit_adjustment"}}
        losses = reference.cross_entropy_losses(
            logits, self.target, **by_class, label_smoothing=self.options["label_smoothing"]
        )
        kept = {**self.options, "reduction": "none", "z_loss": 0.0, "normalizer": None}
        objective = reference.cross_entropy(logits, self.target, **self.oracle_arrays(), **kept)
        ratio = np.divide(objective, losses, out=np.ones_like(losses), where=losses > 0)
        factors = np.linalg.norm(ratio) * self.arrays.get("weight", np.ones(1)).max()
        if self.options["reduction"] != "mean":
            return float(factors)
        return float(factors) / self.options.get("normalizer", max(1.0, losses.size / 4))

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Target and arrays for torch: floats in the dtype that losses have."""

        def cast(array: np.ndarray, to: torch.dtype) -> torch.Tensor:
            tensor = in_torch(array)
            return tensor.to(to) if tensor.is_floating_point() else tensor

        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return cast(self.target, dtype), {name: cast(array, wide) for name, array in self.arrays.items()}


SHAPES = [(1, 5), (6, 1), (12, 4), (40, 10), (9, 33), (5, 130), (2, 300), (3, 4, 5), (2, 3, 4, 2), (2, 70, 3)]


def dense(draw: Draw) -> None:
    """A cross-entropy of logits in torch: by both backends, and by a module that is called twice."""
    dtype = getattr(torch, draw.choose.choice(["float64", "float32", "float32", "bfloat16", "float16"]))
    shape = draw.choose.choice(SHAPES)
    call = Call.drawn(draw, shape)
    logits = in_torch(draw.layout(call.logits)).to(dtype)
    target, arrays = call.tensors(dtype)
    if target.is_floating_point():
        call.target = target.double().numpy()
    call.arrays = {n: a.double().numpy() if a.is_floating_point() else a.numpy() for n, a in arrays.items()}
    value, gradient = call.expected(logits.double().numpy())
    terms = call.terms(logits.double().numpy())
    wide = "float64" if dtype is torch.float64 else "float32"
    close = rounding(logits.numel(), EPS[wide]) + (0 if dtype.itemsize >= 4 else 2 * EPS[str(dtype)[6:]])
    units = {name: arrays.pop(name) for name in ("where", "sample_weight") if name in arrays}
    normalizer = call.options.pop("normalizer", None)
    criterion = RGDLoss(
        weighting=call.options["weighting"], **{k: v for k, v in call.options.items() if k != "weighting"},
        **arrays, evaluate="weighted",
    )  # fmt: skip

    def by_function(x: torch.Tensor) -> torch.Tensor:
        return cross_entropy(x, target, **arrays, **units, **call.options, normalizer=normalizer)

    def by_module(x: torch.Tensor) -> torch.Tensor:
        return criterion(x, target, **units, normalizer=normalizer)

    ways = [("rust", by_function), ("composite", by_function), (None, by_module), (None, by_module)]
    for name, way in ways:
        x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        with backend(name) if name else warnings.catch_warnings():
            objective = way(x)
            (found,) = torch.autograd.grad(objective.sum(), x)
        label = name or "module"
        same(f"{label}: objective", objective.detach().double().numpy(), value, close)
        same(f"{label}: gradient", found.double().numpy(), gradient, close, terms)


def linear(draw: Draw) -> None:
    """A linear head in torch, by both backends, in float64."""
    shape = draw.choose.choice([(12, 4), (9, 33), (5, 130), (2, 3, 70), (40, 10)])
    places, classes = shape[:-1], shape[-1]
    width = draw.choose.choice([1, 3, 8])
    hidden, head = draw.numbers.normal(size=(*places, width)), draw.numbers.normal(size=(classes, width))
    bias = draw.numbers.normal(size=classes) if draw.chance(0.4) else None
    call = Call.drawn(draw, (math.prod(places), classes), pointwise=draw.chance(0.5))
    call.options["per"] = "element"
    if call.target.ndim > 1:
        call.target = call.target.argmax(-1)
    logits = hidden.reshape(-1, width) @ head.T + (0 if bias is None else bias)
    call.arrays = {
        name: array for name, array in call.arrays.items() if array.shape in {(classes,), call.target.shape}
    }
    (value, gradient), terms = call.expected(logits), call.terms(logits) * np.linalg.norm(head)
    expected = [gradient @ head, gradient.T @ hidden.reshape(-1, width), gradient.sum(0)]
    target, arrays = call.tensors(torch.float64)
    close = rounding(width * logits.size, EPS["float64"])
    for name in BACKENDS:
        inputs = [torch.tensor(one, requires_grad=True) for one in (hidden.reshape(-1, width), head)]
        given = None if bias is None else torch.tensor(bias, requires_grad=True)
        with backend(name):
            objective = linear_cross_entropy(*inputs, target, linear_bias=given, **arrays, **call.options)
            wanted = inputs if given is None else [*inputs, given]
            found = torch.autograd.grad(objective.sum(), wanted)
        same(f"{name}: objective", objective.detach().numpy(), value, close)
        for what, mine, other in zip(("hidden", "head", "bias"), found, expected, strict=False):
            same(f"{name}: gradient of {what}", mine.numpy(), other, close, terms)


def trees(draw: Draw) -> None:
    """Objectives of boosted trees."""
    size, classes = draw.choose.choice([1, 9, 64]), draw.choose.choice([2, 3, 7])
    weighting, numbers = draw.weighting(), draw.numbers
    measure = numbers.integers(0, 4, size) / 2 if draw.chance(0.4) else None
    kind = draw.choose.choice(["logistic", "softmax", "squared_error"])
    if kind == "logistic":
        labels, margins = numbers.integers(0, 2, size).astype(float), 3 * numbers.normal(size=size)
        q = 1 / (1 + np.exp(-margins))
        losses = np.logaddexp(0, margins) - labels * margins
        slope, curvature, objective = q - labels, q * (1 - q), rgd.boosting.logistic(weighting)
    elif kind == "softmax":
        labels, margins = numbers.integers(0, classes, size), 3 * numbers.normal(size=(size, classes))
        log_q = margins - np.logaddexp.reduce(margins, 1, keepdims=True)
        q, losses = np.exp(log_q), -log_q[np.arange(size), labels]
        slope = q - (np.arange(classes) == labels[:, None])
        curvature = q * (1 - q) * classes / (classes - 1)
        objective = rgd.boosting.softmax(classes, weighting)
    else:
        labels, margins = numbers.normal(size=size), numbers.normal(size=size)
        losses, slope, curvature = (margins - labels) ** 2 / 2, margins - labels, np.ones(size)
        objective = rgd.boosting.squared_error(weighting)

    def factors(losses: np.ndarray) -> np.ndarray:
        found = reference.sample_weights(losses, weighting, sample_weight=measure)
        found = found if measure is None else found * measure
        return found[:, None] if slope.ndim == 2 else found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where nothing is left to train on
        found = objective(labels, draw.layout(margins), measure)
    # A derivative is a difference of numbers up to 1. To it comes what the rounding of the losses, which are
    # differences of margins, changes in the weights.
    noise = numbers.choice([-4.0, 4.0], size) * EPS["float64"] * (1 + np.abs(losses) + np.abs(margins).max())
    weighed, moved = factors(losses), factors(losses + noise)
    close = rounding(size, EPS["float64"])
    for what, mine, by in (("gradient", found[0], slope), ("Hessian", found[1], curvature)):
        most = max(1.0, float(np.abs(by).max()))
        terms = most * (float(np.linalg.norm(weighed)) + float(np.linalg.norm(moved - weighed)) / close)
        same(f"{kind}: {what}", mine, weighed * by, close, terms)


def in_jax(draw: Draw) -> None:
    """Weights and a cross-entropy in JAX, by the kernel and by `jax.numpy`."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    import rgd.jax  # noqa: PLC0415

    call = Call.drawn(draw, draw.choose.choice([(12, 4), (5, 33)]))
    call.logits = call.logits.astype(np.float32)
    call.arrays = {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in call.arrays.items()}
    if call.target.dtype == np.float64:
        call.target = call.target.astype(np.float32)
    (value, gradient), terms = call.expected(call.logits), call.terms(call.logits)
    arrays = {name: jnp.asarray(array) for name, array in call.arrays.items()}
    close = rounding(call.logits.size, EPS["float32"])
    for name in ("rust", "jnp"):

        def objective(logits: Any, name: Any = name) -> Any:
            found = rgd.jax.cross_entropy(
                logits, jnp.asarray(call.target), **arrays, **call.options, backend=name
            )
            return found.sum(), found

        try:
            (_, found), mine = jax.value_and_grad(objective, has_aux=True)(jnp.asarray(call.logits))
        except ValueError as error:
            if name == "rust" and "cannot serve" in str(error):
                continue
            raise
        same(f"backend={name}: objective", found, value, close)
        same(f"backend={name}: gradient", mine, gradient, close, terms)


KINDS: dict[str, Callable[[Draw], None]] = {
    "weights": weights,
    "dense": dense,
    "linear": linear,
    "trees": trees,
    "jax": in_jax,
}


# --- the program ---


def plant() -> None:
    """Break a front on purpose: the short way of a module adds one to the class weights."""
    from rgd.torch import loss  # noqa: PLC0415

    again = loss.again

    def wrong(known: Any, *given: Any, **options: Any) -> Any:
        if known.class_weight is not None:
            weight = known.class_weight + 1
            known = known._replace(class_weight=weight, versions=(weight._version, known.versions[1]))
            options["by_class"] = (weight, options["by_class"][1])
        return again(known, *given, **options)

    loss.again = wrong


def try_one(kind: str, seed: int) -> str | None:
    """What is wrong with the call of a seed; None if nothing is."""
    try:
        KINDS[kind](Draw(seed))
    except Exception as error:  # an exception is a fault, too
        return f"{type(error).__name__}: {error}"
    return None


def rounds(kinds: list[str], begin: int) -> Iterator[tuple[str, int]]:
    """A call of each kind for one seed after the other."""
    seed = begin
    while True:
        yield from ((kind, seed) for kind in kinds)
        seed += 1


def main(arguments: list[str] | None = None) -> int:
    """Try calls until the time is over; returns the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="how long to try (default: 300)")
    parser.add_argument("--seed", type=int, default=None, help="the first seed (default: another every time)")
    parser.add_argument("--only", choices=list(KINDS), help="one kind of call")
    parser.add_argument("--replay", metavar="KIND:SEED", help="repeat one call, and show its error in full")
    parser.add_argument("--plant", action="store_true", help="change a front, to see the fault found")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.plant:
        plant()
    if options.replay:
        kind, _, seed = options.replay.partition(":")
        KINDS[kind](Draw(int(seed)))
        print(f"{options.replay}: nothing is wrong")
        return 0
    begin = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    kinds = [options.only] if options.only else list(KINDS)
    tried, faults = dict.fromkeys(kinds, 0), []
    end = time.monotonic() + options.seconds
    with tqdm(desc="calls", unit="", smoothing=0.05) as progress:
        for kind, seed in rounds(kinds, begin):
            wrong = try_one(kind, seed)
            tried[kind] += 1
            progress.update()
            if wrong is not None:
                faults.append((kind, seed))
                tqdm.write(f"{kind}:{seed}: {wrong}")
            if time.monotonic() > end or len(faults) >= 20:
                break
    print(f"first seed {begin}: " + ", ".join(f"{n} {kind}" for kind, n in tried.items()))
    print(f"faults: {len(faults)}")
    for kind, seed in faults:
        print(f"  python fuzz/calls.py --replay {kind}:{seed}")
    return len(faults)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
