"""The processes that share a batch, and their communication.

A pointwise weight depends on its own loss and needs no other process. Other weights depend on every loss of
the batch: the losses of all processes are gathered in the order of their ranks, every process computes all
weights and keeps its own. Weights are constants to autograd, so the backward pass communicates nothing.

Each process still averages over its own samples, and DistributedDataParallel averages the gradients of the
processes. If all local batches have the same size, that is the gradient of the global batch. If not, it is
the average of local means, as for `nn.CrossEntropyLoss`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

# `_gather` outside of compiled graphs, made at the first call: `torch.compiler.disable` imports the compiler,
# which takes seconds. A global, because torch 2.8 traces a test of one and no cache.
_gather_outside_of_graphs: Any = None


@dataclasses.dataclass(frozen=True)
class Sync:
    """The settings that say which processes share a batch.

    Args:
        process_group: The group; None for the default one, once it is initialised.
        sync: Whether the batch is shared at all.

    Raises:
        TypeError: If `sync` is no bool, or `process_group` no group.
        ValueError: If a group is given and `sync` is False, or this process does not belong to the group.
    """

    process_group: Any = None
    sync: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.sync, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"sync must be True or False, got {self.sync!r}")
        if self.process_group is None:
            return
        if dist.is_available() and self.process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "process_group is one that this process does not belong to: build the loss in its members "
                "only"
            )
        if not (dist.is_available() and isinstance(self.process_group, dist.ProcessGroup)):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup, such as "
                "torch.distributed.new_group() returns, or None for the default one, got "
                f"{type(self.process_group).__name__}"
            )
        if not self.sync:
            raise ValueError("give process_group or sync=False, not both: without sync no group is asked")

    def group(self) -> Any:
        """The group of more than one process that shares the batch, or None."""
        if not self.sync or not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def __deepcopy__(self, memo: Any) -> Sync:
        """The same object: a group is a connection, and a copied loss uses the same one."""
        return self


_DEFAULT = Sync()


def sync_of(process_group: Any, sync: bool) -> Sync:
    """The `Sync` of a function's arguments."""
    return _DEFAULT if process_group is None and sync is True else Sync(process_group, sync)


def reduce_sums(values: list[float], device: torch.device, group: Any) -> list[float]:
    """The sum over all processes of each value."""
    return _reduce(values, dist.ReduceOp.SUM, device, group)


def reduce_max(value: float, device: torch.device, group: Any) -> float:
    """The maximum over all processes."""
    return _reduce([value], dist.ReduceOp.MAX, device, group)[0]


def all_of(value: Any, group: Any) -> list[Any]:
    """A value of each process, in the order of their ranks; it must be picklable."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _reduce(values: list[float], operation: Any, device: torch.device, group: Any) -> list[float]:
    _check_backend(group, device)
    tensor = torch.tensor(
        values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
    )
    dist.all_reduce(tensor, operation, group=group)
    return [float(value) for value in tensor.cpu()]


def gather(own: list[Tensor], group: Any) -> tuple[list[Tensor], int]:
    """Vectors of all processes, concatenated in the order of ranks, and the start of this process's part.

    Every process of the group has to call this, also one without losses.

    Args:
        own: This process's vectors, all of the same length, which may differ between processes.
        group: The process group.

    Raises:
        ValueError: If the group cannot communicate from the vectors' device.
    """
    # The collectives interrupt a compiled graph, since their sizes are known only when it runs.
    global _gather_outside_of_graphs  # noqa: PLW0603
    if _gather_outside_of_graphs is None:
        _gather_outside_of_graphs = cast("Any", torch.compiler).disable(_gather)
    return _gather_outside_of_graphs(own, group)


@torch.no_grad()
def _gather(own: list[Tensor], group: Any) -> tuple[list[Tensor], int]:
    first = own[0]
    _check_backend(group, first.device)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    number = torch.tensor([first.numel()], device=first.device)
    numbers = [torch.empty_like(number) for _ in range(size)]
    dist.all_gather(numbers, number, group=group)
    counts = [int(n) for n in torch.cat(numbers).cpu()]
    gathered: list[Tensor] = []
    for vector in own:
        padded = vector.new_zeros(max(counts))
        padded[: vector.numel()] = vector
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded, group=group)
        gathered.append(torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]))
    return gathered, sum(counts[:rank])


def _check_backend(group: Any, device: torch.device) -> None:
    try:
        group._get_backend(device)
    except RuntimeError as error:
        raise ValueError(
            f"process_group has the backend {dist.get_backend(group)!r}, which cannot send from "
            f"{device.type}, where the losses are: give a group made for it, as "
            f"torch.distributed.new_group(backend={'nccl' if device.type == 'cuda' else 'gloo'!r}), or "
            "sync=False"
        ) from error
