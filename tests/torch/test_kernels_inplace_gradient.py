"""The gradient in the place of the logits: the same bits as in memory of its own, and no other overlap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rgd import _rgd

torch = pytest.importorskip("torch")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KERNELS = [("kl", (1.0, 0.5, 0.0)), ("kl", (1.0, 0.5, 1.0)), ("kl_ball", (0.1,))]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "classes last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "padded": lambda x: torch.nn.functional.pad(x, (1, 2)).narrow(-1, 1, x.shape[-1]),
}


def run(  # noqa: PLR0917
    logits: Any, grad: Any, target: Any, passes: int, kernel: Any, options: dict[str, Any]
) -> list[Any]:
    """Losses, weights, objective, gradient and totals of one or two passes."""
    dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
    shape = logits.shape[:1] + logits.shape[2:]
    losses, weights = torch.empty(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    objective = torch.empty(shape if options["reduction"] == "none" else (), dtype=dtype)
    reduction, smoothing, c = options["reduction"], options["smoothing"], options["class_weight"]
    if passes == 1:
        totals = _rgd.cross_entropy(
            logits, target, c, None, *kernel, -100, smoothing, False, reduction,
            losses, weights, objective, grad, 2,
        )  # fmt: skip
    else:
        _rgd.cross_entropy_losses(logits, target, c, -100, smoothing, losses, 2)
        weights = losses.exp() * 1e-3
        totals = _rgd.cross_entropy_gradient(
            logits, target, c, None, -100, smoothing, False, reduction, losses, weights, objective, grad, 2
        )
    return [losses, weights, objective, grad, torch.tensor(totals)]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(7, 3), (5, 40), (3, 130), (4, 3, 5), (2, 33, 6), (1, 700, 2), (3, 1, 2), (0, 5)]),
    st.sampled_from(list(LAYOUTS)),
    st.booleans(),
    st.sampled_from([1, 2]),
    st.sampled_from(KERNELS),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from(["none", "mean", "sum"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_gradient_over_the_logits_is_the_separate_one_to_the_last_bit(  # noqa: PLR0917
    dtype: Any, shape: tuple[int, ...], layout: str, soft: bool, passes: int, kernel: Any, smoothing: float,
    reduction: str, weighted: bool, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits = LAYOUTS[layout]((4 * torch.randn(shape, generator=generator)).to(dtype))
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    target[:1] = -100
    if soft:
        target = torch.rand(shape, generator=generator).to(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    class_weight = torch.rand(shape[1], generator=generator).to(wide) if weighted else None
    options = {"smoothing": smoothing, "reduction": reduction, "class_weight": class_weight}
    separate = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype)
    expected = run(logits, separate, target, passes, kernel, options)
    result = run(logits, logits, target, passes, kernel, options)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(*(x.reshape(-1).contiguous().view(torch.uint8) for x in (a, b)))


def call(logits: Any, grad: Any, target: Any = None, passes: int = 1, **given: Any) -> None:
    target = np.zeros(len(logits), np.int64) if target is None else target
    losses = given.get("losses", np.ones(len(logits), np.float32))
    weights, objective = np.ones(len(logits), np.float32), np.empty((), np.float32)
    if passes == 1:
        _rgd.cross_entropy(
            logits, target, None, None, "kl", (1.0, 0.5, 0.0), -100, 0.0, False, "mean",
            losses, weights, objective, grad, 1,
        )  # fmt: skip
    else:
        _rgd.cross_entropy_gradient(
            logits, target, None, None, -100, 0.0, False, "mean", losses, weights, objective, grad, 1
        )


@pytest.mark.parametrize("passes", [1, 2])
def test_a_gradient_that_overlaps_the_logits_in_any_other_way_is_refused(passes: int) -> None:
    memory = np.zeros((9, 6), np.float32)
    logits = memory[:6]
    for grad in (memory[1:7], memory[5:], memory[:6, ::-1], memory.reshape(-1)[:36].reshape(6, 6, order="F")):
        with pytest.raises(ValueError, match="grad and logits must not share memory"):
            call(logits, grad, passes=passes)
    with pytest.raises(ValueError, match="grad and logits must not share memory"):
        call(logits, memory[:6].view(np.float16)[:, ::2], passes=passes)


@pytest.mark.parametrize("passes", [1, 2])
def test_in_place_no_other_argument_may_share_the_logits(passes: int) -> None:
    logits = np.zeros((6, 6), np.float32)
    with pytest.raises(ValueError, match="grad and target must not share memory"):
        call(logits, logits, logits, passes)
    with pytest.raises(ValueError, match="losses"):
        call(logits, logits, None, passes, losses=logits[0])


def test_logits_that_cannot_be_written_are_not_overwritten() -> None:
    logits = np.zeros((6, 6), np.float32)
    logits.flags.writeable = False
    with pytest.raises(ValueError, match="grad is read-only"):
        call(logits, logits)
    spread = np.lib.stride_tricks.as_strided(np.zeros(6, np.float32), (6, 6), (0, 4), writeable=True)
    with pytest.raises(ValueError, match="grad must not overlap itself"):
        call(spread, spread)


def test_a_label_out_of_range_leaves_the_logits_as_they_were() -> None:
    logits = np.ones((6, 6), np.float32)
    with pytest.raises(IndexError, match="out of range"):
        call(logits, logits, np.array([0, 1, 2, 3, 4, 6]))
    np.testing.assert_array_equal(logits, 1)
