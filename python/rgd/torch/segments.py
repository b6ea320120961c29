"""Sequences that share a row: `segments=` says which one a target belongs to, and each is a unit."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rgd._segments import are_given, count
from rgd.torch._checks import check_dense, no_tensor
from rgd.torch._dtypes import INTEGERS, wide
from rgd.torch._measure import check_groups
from rgd.torch._modes import values_can_be_read


def segments_of(
    *, position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None, length: int | None = None
) -> Tensor:
    """The `segments=` of packed rows, from the arguments that attention functions take.

    Args:
        position_ids: Positions of the tokens, integers (T,), (B, T) or, with several positions a token,
            (3, B, T). A sequence begins at the start of a row, where the position is 0, and where it falls.
        cu_seqlens: The first token of each sequence and the end of the last one, rising integers (K + 1,),
            with the rows one after the other. Give this or `position_ids`.
        length: With `cu_seqlens`, how many tokens there are. None for the last number of `cu_seqlens`, which
            waits for the device.

    Returns:
        The number of each token's sequence in its row, int64: of the shape (T,) or (B, T) of the positions,
        or (length,). Tokens after the last sequence of `cu_seqlens` have -1.

    Raises:
        TypeError: If both or neither are given, or the argument holds no integers.
        ValueError: If a shape does not fit.

    Example:
        >>> import torch
        >>> from rgd.torch import segments_of
        >>> segments_of(position_ids=torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]]))
        tensor([[0, 0, 0, 1, 1],
                [0, 0, 1, 2, 2]])
        >>> segments_of(cu_seqlens=torch.tensor([0, 3, 5]), length=6)
        tensor([ 0,  0,  0,  1,  1, -1])
    """
    if (position_ids is None) == (cu_seqlens is None):
        raise TypeError("segments_of takes position_ids or cu_seqlens, one of them")
    if position_ids is not None:
        _check_integers("position_ids", position_ids)
        if length is not None:
            raise TypeError("length goes with cu_seqlens: leave it out with position_ids")
        if position_ids.dim() not in (1, 2, 3):
            raise ValueError(
                f"position_ids must have shape (T,), (B, T) or (3, B, T), got {tuple(position_ids.shape)}"
            )
        positions = (position_ids[0] if position_ids.dim() == 3 else position_ids).to(torch.int64)
        begins = begins_after_the_first(positions)
        first = torch.zeros_like(positions[..., :1])
        return torch.cat([first, begins.to(torch.int64)], -1).cumsum(-1)
    ends = cast("Tensor", cu_seqlens)
    _check_integers("cu_seqlens", ends)
    if ends.dim() != 1 or ends.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (K + 1,), got {tuple(ends.shape)}")
    ends = ends.to(torch.int64)
    tokens = int(ends[-1]) if length is None else length
    places = torch.arange(tokens, device=ends.device)
    numbers = torch.bucketize(places, ends, right=True) - 1
    return numbers.masked_fill(places >= ends[-1], -1)


def begins_after_the_first(positions: Tensor) -> Tensor:
    """Where a sequence begins after the start of a row: at a position of 0, and where positions fall."""
    return (positions[..., 1:] == 0) | (positions[..., 1:] < positions[..., :-1])


class Segments(NamedTuple):
    """Which unit each target belongs to.

    Attributes:
        unit: The number of its unit among all, int64, of the losses' shape; `rows * number` for a target
            that belongs to none.
        rows: How many rows there are: 1 for losses (N,).
        number: How many units a row has.
    """

    unit: Tensor
    rows: int
    number: int

    def shape(self) -> torch.Size:
        """The shape of the units."""
        return torch.Size((self.rows, self.number))

    def inside(self) -> Tensor:
        """Which targets have a segment other than -1; also one that is not allowed, such as -2."""
        return self.unit != self.rows * self.number

    def units(self, losses: Tensor, counted: Tensor, measure: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean loss of each unit over its targets that count, and its base measure, 0 for an empty one.

        Args:
            losses: One a target.
            counted: Which targets count.
            measure: The base measure of each target, the same within a unit; None for ones.
        """
        total, number = self.totals(losses.detach(), counted)
        p = self.measure(counted, measure, total.dtype).masked_fill(number == 0, 0)
        return total / number.clamp(min=1), p

    def totals(self, losses: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of each unit's losses that count, and their number."""
        plain = losses.to(wide(losses)).masked_fill(~counted, 0)
        return self._sum(plain), self._sum(counted.to(plain.dtype))

    def measure(self, counted: Tensor, measure: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The base measure of each unit, 0 if none of its targets count; None stands for ones."""
        p = counted.to(dtype) if measure is None else measure.to(dtype).masked_fill(~counted, 0)
        return self._largest(p, 0)

    def spread(self, weights: Tensor, counted: Tensor) -> Tensor:
        """The weight of each target, from the weights of the units; 0 for a target that does not count."""
        return self._of_units(weights, float("nan")).masked_fill(~counted, 0)

    def given(self, name: str, values: Any) -> Any:
        """An argument for units or targets, as one entry for each target."""
        return self.to_targets(name, values) if isinstance(values, Tensor) else values

    def groups(self, groups: Any, device: torch.device) -> Tensor | None:
        """The group of each unit, int64, from groups of the targets' or the units' shape; None stays None."""
        if groups is None:
            return None
        groups = check_groups(self.given("groups", groups), self.unit.shape, device, "element")
        return self._largest(cast("Tensor", groups).masked_fill(~self.inside(), 0), 0)

    def to_targets(self, name: str, values: Tensor) -> Tensor:
        """Values of the targets' shape, from values of that or of the units' shape.

        Raises:
            ValueError: If they have another shape; or, if they can be read, differ within a unit.
        """
        if values.shape == self.unit.shape:
            self._check_constant(name, values)
            return values
        if values.shape != self.shape():
            raise ValueError(
                f"{name} must have the shape of the targets, {tuple(self.unit.shape)}, or that of the "
                f"units, {tuple(self.shape())}, with segments, got {tuple(values.shape)}"
            )
        return self._of_units(values, 0)

    def _check_constant(self, name: str, values: Tensor) -> None:
        if not values_can_be_read(values) or values.dtype is torch.bool:
            return
        low = torch.iinfo(values.dtype).min if not values.is_floating_point() else -float("inf")
        same = self._of_units(self._largest(values, low), 0) == values
        different = ~same & self.inside()
        if values.is_floating_point():
            different = different & ~values.isnan()  # NaN is refused elsewhere
        if bool(different.any()):
            place = cast("list[int]", different.nonzero()[0].tolist())  # pyright: ignore[reportUnknownMemberType]
            raise ValueError(
                f"{name} must be constant within a segment, which is weighted as one unit, and is not at "
                f"{tuple(place)}: leave single targets out by where or ignore_index"
            )

    def _sum(self, values: Tensor) -> Tensor:
        return self._scattered(
            values.new_zeros(self._slots()).scatter_add(0, self._flat(), values.reshape(-1))
        )

    def _largest(self, values: Tensor, least: float) -> Tensor:
        start = values.new_full((self._slots(),), least)
        return self._scattered(start.scatter_reduce(0, self._flat(), values.reshape(-1), "amax"))

    def _of_units(self, values: Tensor, otherwise: float) -> Tensor:
        """The value of each target's unit, `otherwise` for a target that belongs to none."""
        flat = torch.cat([values.reshape(-1), values.new_full((1,), otherwise)])
        return flat[self._flat()].view(self.unit.shape)

    def _flat(self) -> Tensor:
        return self.unit.reshape(-1)

    def _slots(self) -> int:
        """One slot for each unit, and one for targets that belong to no unit."""
        return self.rows * self.number + 1

    def _scattered(self, slots: Tensor) -> Tensor:
        return slots[:-1].view(self.rows, self.number)


def check_segments(
    segments: Any, number: Any, per: str, shape: torch.Size, device: torch.device, *, shift: bool = False
) -> tuple[Segments, Tensor] | None:
    """The units of a caller's segments, and which targets have a segment other than -1.

    Args:
        segments: The caller's argument: integers of the targets' shape, -1 for a target that takes no part.
        number: `num_segments`, or None.
        per: The argument of the call.
        shape: The targets' shape before they are shifted.
        device: Where the targets are.
        shift: Whether position t predicts target t + 1, which must be of the same segment.

    Returns:
        The units, and a mask of the targets' shape. A number that is not allowed, and cannot be read now,
        belongs to no unit and is in the mask: its weight is NaN.

    Raises:
        TypeError: If they are no integers.
        ValueError: If a shape, a device or a number does not fit, or `per` is not "sample".
    """
    if not are_given(segments, number, per):
        return None
    _check_integers("segments", segments)
    if segments.shape != shape or not shape:
        raise ValueError(
            f"segments must have the shape of the targets, {tuple(shape)}, got {tuple(segments.shape)}"
        )
    if segments.device != device:
        raise ValueError(f"target is on {device} and segments on {segments.device}: move both to one device")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise ValueError(f"num_segments must be a positive integer, got {number!r}")
    segments = segments.detach().to(torch.int64)
    if values_can_be_read(segments):
        largest, least = (int(segments.max()), int(segments.min())) if segments.numel() else (0, 0)
        number = count(least, largest, number)
    rows = shape[0] if len(shape) > 1 else 1
    if number is None:
        number = max(segments.numel() // max(rows, 1), 1)
    inside = segments != -1
    if shift:
        inside = inside[:, 1:] & (segments[:, 1:] == segments[:, :-1])
        segments = segments[:, 1:]
    allowed = inside & (segments >= 0) & (segments < number)
    first = torch.arange(rows, device=device) * number
    index = segments + (first.view(-1, *[1] * (len(shape) - 1)) if len(shape) > 1 else 0)
    return Segments(index.masked_fill(~allowed, rows * number), rows, number), inside


def _check_integers(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(no_tensor(name, tensor, "a torch.Tensor of integers"))
    check_dense(name, tensor)
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{name} must be a torch.Tensor of integers, got {tensor.dtype}: call {name}.long()")
