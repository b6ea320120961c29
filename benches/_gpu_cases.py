"""Random calls of the cross-entropy with all combinations of options, to test the parity of a backend."""

import dataclasses
import math
import random
from typing import Any, NamedTuple

import rgd
import torch
from rgd.torch import backend, cross_entropy, linear_cross_entropy

EXTRAS = ("entropy", "logsumexp", "correct")


@dataclasses.dataclass(frozen=True)
class Unsure(rgd.Weighting):
    """A weighting of one's own that reads the entropy: its share of the largest possible one."""

    pointwise = True
    needs = ("entropy",)

    def weights(self, batch):
        return batch.entropy / math.log(max(2, batch.classes))


SHAPES = [(6,), (12, 4), (9, 33), (1, 5), (5, 130), (3, 4, 5), (2, 3, 4, 2), (2, 70, 3)]
WEIGHTINGS = [
    rgd.KL(),
    rgd.KL(0.5, scale=2.0),
    rgd.KL(math.inf, scale=-0.7),
    rgd.ERM(),
    rgd.Focal(2.0),
    rgd.Focal(0.0),
    rgd.Threshold(2.0),
    rgd.KL(normalize=True),
    rgd.KLBall(0.1),
    rgd.CVaR(0.5),
    rgd.ChiSquare(2.0),
    rgd.Pointwise(lambda losses: 1 / (1 + losses)),
    Unsure(),
    rgd.Excess(rgd.CVaR(0.5)),
    rgd.Excess(rgd.Threshold(0.5)),
    rgd.GroupDRO(2, 0.5),
    rgd.MovingAverage(rgd.KL(), 0.5),
]


class Case(NamedTuple):
    """A call: its tensors in float64, and its options."""

    logits: torch.Tensor
    target: torch.Tensor
    tensors: dict[str, Any]
    options: dict[str, Any]
    above: torch.Tensor

    def __str__(self):
        kind = "probabilities" if self.target.is_floating_point() else "labels"
        return f"{tuple(self.logits.shape)} {kind} {sorted(self.tensors)} {self.options}"

    def used(self):
        """The names of the options and tensors that are not left at what they are by default."""
        target, weighting = self.target, self.options["weighting"]
        adjustment = self.tensors.get("logit_adjustment")
        index = self.options.get("ignore_index", -100)
        ignored = not target.is_floating_point() and bool((target == index).any())
        return {
            *self.tensors, type(weighting).__name__, self.options["reduction"], self.options["per"],
            *(name for name in ("label_smoothing", "z_loss", "normalizer", "returns")
              if self.options.get(name, 0) != 0),
            *(["ignore_index"] if index != -100 else []),
            *(["probabilities"] if target.is_floating_point() else [str(target.dtype)[6:]]),
            *(["ignored"] if ignored else []),
            *(["-inf"] if adjustment is not None and bool(adjustment.isneginf().any()) else []),
        }  # fmt: skip


def case_of(seed, shapes=SHAPES):
    """The case of a seed."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = choose.choice(shapes)
    axis = min(1, len(shape) - 1)
    classes, places = shape[axis], shape[:axis] + shape[axis + 1 :]

    def uniform(*size):
        return torch.rand(size, dtype=torch.float64, generator=generator)

    logits = torch.randn(shape, dtype=torch.float64, generator=generator) * 3 + choose.choice([0, 0, 50])
    if choose.random() < 0.3:
        target = torch.randn(shape, dtype=torch.float64, generator=generator).softmax(axis)
    else:
        target = torch.randint(0, classes, places, generator=generator)
        target = target.masked_fill(uniform(*places) < 0.2, -100)
        target = target.int() if choose.random() < 0.3 else target
    options = {
        "weighting": choose.choice(WEIGHTINGS),
        "reduction": choose.choice(["mean", "sum", "none"]),
        "label_smoothing": choose.choice([0.0, 0.0, 0.1, 1.0]),
        "per": choose.choice(["element", "element", "sample"]),
        "z_loss": choose.choice([0.0, 0.0, 1e-3]),
    }
    tensors = {}
    if choose.random() < 0.4:
        tensors["weight"] = uniform(classes) + 0.5
    if choose.random() < 0.3:
        tensors["logit_adjustment"] = -3 * uniform(classes)
    units = places[:1] if options["per"] == "sample" else places
    if choose.random() < 0.3 and places:
        tensors["sample_weight"] = uniform(*units).round(decimals=1)
    if choose.random() < 0.3 and places:
        tensors["where"] = uniform(*units) < 0.8
    above = uniform(*places) + 0.5 if options["reduction"] == "none" else uniform().squeeze() + 0.5
    above = above if choose.random() < 0.5 else above * 0 + 1
    if options["reduction"] == "mean" and choose.random() < 0.3:
        options["normalizer"] = choose.choice([7.5, torch.tensor(7.5, dtype=torch.float64)])
    if "logit_adjustment" in tensors and choose.random() < 0.5:
        _rule_out(classes - 1, target, tensors, options)
    if choose.random() < 0.4:
        options["returns"] = EXTRAS
    labels = not target.is_floating_point()
    if places and labels and options["per"] == "sample" and choose.random() < 0.5:
        # Units of a row: `where` and `sample_weight` are then one a target.
        tensors["segments"] = torch.randint(-1, 2, places, generator=generator)
        options["num_segments"] = 2
        units = (places[0], 2) if len(places) > 1 else (1, 2)
        tensors |= {name: torch.rand(units, generator=generator) < 0.8 for name in {"where"} & set(tensors)}
        if "sample_weight" in tensors:
            tensors["sample_weight"] = uniform(*units).round(decimals=1)
    if labels and choose.random() < 0.2:
        options["ignore_index"] = 0
        target = target.masked_fill(target == -100, 0)
    weighting = options["weighting"]
    if not places and (isinstance(weighting, rgd.GroupDRO) or weighting.stateful):
        options["weighting"] = rgd.KL()
    elif isinstance(weighting, rgd.GroupDRO):
        tensors["groups"] = torch.randint(0, 2, units, generator=generator)
    if isinstance(weighting, rgd.Excess):
        tensors["reference"] = uniform(*places) * 3
    return Case(logits, target, tensors, options, above)


def _rule_out(k, target, tensors, options):
    """Rule class `k` out by an adjustment of -inf, if its mass is 0 or can be made so."""
    if target.is_floating_point() or options["label_smoothing"] > 0 or bool((target == k).any()):
        if "weight" not in tensors or k == 0:
            return
        tensors["weight"][k] = 0.0
    tensors["logit_adjustment"][k] = -math.inf


def cast(case, dtype, device="cpu"):
    """The case with floats of a dtype; masks, labels, and tensors in the losses' dtype do not change."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def moved(one, to=wide):
        return one.to(device, to if one.is_floating_point() else one.dtype)

    tensors = {name: moved(one) for name, one in case.tensors.items()}
    normalizer = case.options.get("normalizer")
    options = case.options
    if isinstance(normalizer, torch.Tensor):
        options = {**options, "normalizer": normalizer.to(device)}
    return Case(moved(case.logits, dtype), moved(case.target, dtype), tensors, options, moved(case.above))


def value_and_grad(case, name, **options):
    """The value and the gradient of a case by a backend, and what else it returns, all in float64."""
    logits = case.logits.clone().requires_grad_()
    with backend(name):
        given = logits * 1 if options.get("inplace") else logits
        value, beside = _called(cross_entropy, (given, case.target), case, options)
        (grad,) = torch.autograd.grad(value, logits, case.above.to(value.dtype))
    assert grad.dtype == logits.dtype
    return value.detach().double().cpu(), grad.double().cpu(), beside


def _called(function, tensors, case, options):
    """The loss of a call, and extras and state as one vector."""
    weighting = case.options["weighting"]
    state = weighting.init() if weighting.stateful else None
    found = function(*tensors, **case.tensors, **case.options, **options, state=state)
    value, beside = found if isinstance(found, tuple) else (found, ())
    parts = torch.utils._pytree.tree_leaves(beside)
    flat = [torch.as_tensor(part).double().cpu().flatten() for part in parts]
    return value, torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64)


def linear_value_and_grads(case, name, **options):
    """The value and the gradients of a linear head with the case's targets, and what else it returns."""
    generator = torch.Generator().manual_seed(1)
    classes = case.logits.shape[1]
    hidden = torch.randn(case.logits.shape[0], 8, generator=generator).to(case.logits)
    head = (torch.randn(classes, 8, generator=generator) / 2).to(case.logits)
    parameters = hidden.requires_grad_(), head.requires_grad_()
    with backend(name):
        value, beside = _called(linear_cross_entropy, (hidden, head, case.target), case, options)
        grads = torch.autograd.grad(value, parameters, case.above.to(value.dtype))
    return value.detach().double().cpu(), torch.cat([one.flatten() for one in grads]).double().cpu(), beside


def distance(found, expected):
    """The distance from the expected tensor over its norm; infinite if other entries are finite."""
    finite = expected.isfinite()
    same = torch.equal(finite, found.isfinite()) and torch.equal(expected.isnan(), found.isnan())
    if not same:
        return math.inf
    norm = float(expected[finite].norm())
    off = float((found[finite] - expected[finite]).norm())
    return off / norm if norm else off
