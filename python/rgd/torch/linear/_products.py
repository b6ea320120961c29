"""The matrix products of a chunk of rows: its logits, and the gradients of input and head."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rgd.torch._dtypes import product_dtype

_PRODUCT_BYTES = 1 << 20
_WIDENED_BYTES = 1 << 22


class Products:
    """Products in the dtype of the head.

    Args:
        weight: The head's weight, (C, D), detached.
        bias: The head's bias, (C,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.dtype = weight.dtype
        """The dtype of logits and of the gradient with respect to them."""

    def write_logits(self, rows: Tensor, logits: Tensor) -> None:
        """Fill `logits`, (n, C), with `rows @ weight.T + bias`, of rows (n, D)."""
        if self.bias is None:
            torch.mm(rows, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, rows, self.weight.t(), out=logits)

    def write_input_gradient(self, gradient: Tensor, out: Tensor) -> None:
        """Fill `out`, (n, D), with `gradient @ weight`, of a gradient with respect to logits, (n, C)."""
        torch.mm(gradient, self.weight, out=out)

    def add_weight_gradient(self, total: Tensor, gradient: Tensor, rows: Tensor) -> None:
        """Add `gradient.T @ rows` to `total`, (C, D)."""
        if total.dtype is gradient.dtype:
            total.addmm_(gradient.t(), rows)
            return
        if widens(gradient.device, gradient.dtype, total.dtype):
            _addmm(total, gradient.t(), rows, out_dtype=total.dtype, out=total)
            return
        # A product has the dtype of its factors. Some classes at a time keep it small.
        for some in blocks(self.weight, _PRODUCT_BYTES):
            total[some] += torch.mm(gradient[:, some].t(), rows)


@functools.cache
def widens(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether a device adds products of a dtype to a sum in a wider one, without rounding each of them.

    Only a trial can tell. It does not wait for the device.
    """
    if device.type != "cuda":
        return False
    some = torch.ones((16, 16), dtype=dtype, device=device)
    total = torch.zeros((16, 16), dtype=wide, device=device)
    try:
        _addmm(total, some.t(), some, out_dtype=wide, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError.
        return False
    return True


# Its `out_dtype` is in no stub.
_addmm: Any = torch.addmm


class WidenedProducts(Products):
    """Products in float32 of a narrower head, which is widened some classes at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.dtype = torch.float32
        self._blocks = list(blocks(weight, _WIDENED_BYTES * weight.element_size() // 4))
        self._wide = weight.new_empty((self._blocks[0].stop, weight.shape[1]), dtype=self.dtype)

    def _widened(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of classes, each with its weight in the one float32 buffer."""
        for some in self._blocks:
            yield some, self._wide[: some.stop - some.start].copy_(self.weight[some])

    def write_logits(self, rows: Tensor, logits: Tensor) -> None:
        rows = rows.to(self.dtype)
        for some, weight in self._widened():
            torch.mm(rows, weight.t(), out=logits[:, some])
        if self.bias is not None:
            logits += self.bias

    def write_input_gradient(self, gradient: Tensor, out: Tensor) -> None:
        total = gradient.new_zeros(out.shape)
        for some, weight in self._widened():
            total.addmm_(gradient[:, some], weight)
        out.copy_(total)

    def add_weight_gradient(self, total: Tensor, gradient: Tensor, rows: Tensor) -> None:
        super().add_weight_gradient(total, gradient, rows.to(self.dtype))


def products_of(weight: Tensor, bias: Tensor | None) -> Products:
    """The products with a head on its device and processor."""
    kind = Products if product_dtype(weight) is weight.dtype else WidenedProducts
    return kind(weight, bias)


def blocks(weight: Tensor, size: int) -> Iterator[slice]:
    """Slices of the classes, at least one, so that the weight of each has at most `size` bytes if it can."""
    classes = weight.shape[0]
    step = max(1, size // max(1, weight.shape[1] * weight.element_size()))
    for first in range(0, max(1, classes), step):
        yield slice(first, min(first + step, classes))
