"""Watches the reads and writes of Triton's interpreter: only elements of tensors are allowed, and no races.

The interpreter runs programs one after the other, in memory of the Python process. So it notices neither a
read outside of a tensor nor two programs that write to the same address. This module notices both.
"""

import collections

import numpy as np
import torch
from rgd.torch.backends.triton import _launch
from triton.runtime import interpreter

GUARD = 256
"""Poisoned bytes before and behind every buffer: all bits set, NaN in every float dtype."""
Count = collections.namedtuple("Count", "elements reads writes")


class Watch:
    """Within the block, launches run on copies of their tensors between poisoned borders.

    Attributes:
        launches: The name of each program that ran, and for each of its tensors a `Count`.
    """

    def __enter__(self):
        self.launches = []
        self._builder, self._launch = interpreter.interpreter_builder, _launch._launch
        self._load, self._store = self._builder.create_masked_load, self._builder.create_masked_store
        self._builder.create_masked_load = self._watched_load
        self._builder.create_masked_store = self._watched_store
        _launch._launch = self._watched_launch
        return self

    def __exit__(self, *_):
        del self._builder.create_masked_load, self._builder.create_masked_store
        _launch._launch = self._launch

    def total(self, name):
        """Reads and writes of all launches, by element, of the tensor with this name."""
        found = [counts[name] for _, counts in self.launches if name in counts]
        size = max(count.elements for count in found)
        return sum(count.reads for count in found) / size, sum(count.writes for count in found) / size

    def _watched_launch(self, kernel, grid, like, warps, *arguments, **constants):
        houses, moved, self._buffers = {}, [], {}
        for name, value in zip(kernel.arg_names, arguments, strict=False):
            if isinstance(value, torch.Tensor):
                house = houses.setdefault(value.untyped_storage().data_ptr(), _House(value))
                value = house.tensor(value)  # noqa: PLW2901
                self._buffers.setdefault(value.data_ptr(), _Buffer(name, value))
            moved.append(value)
        self._stores, self._loads = [], []
        self._launch(kernel, grid, like, warps, *moved, **constants)
        self._check_races()
        counts = {one.name: Count(one.places.size, one.reads, one.writes) for one in self._buffers.values()}
        self.launches.append((kernel.__name__, counts))
        for house in houses.values():
            house.move_back()

    def _watched_load(self, pointers, mask, *others):
        at, program = self._active(pointers, mask), self._builder.grid_idx
        self._loads.append((program, at))
        self._buffer_of(at).reads += at.size
        return self._load(pointers, mask, *others)

    def _watched_store(self, pointers, value, mask, *others):
        at, program = self._active(pointers, mask), self._builder.grid_idx
        assert np.unique(at).size == at.size, "a program writes twice to one place at once"
        self._stores.append((program, at))
        self._buffer_of(at).writes += at.size
        return self._store(pointers, value, mask, *others)

    @staticmethod
    def _active(pointers, mask):
        return np.broadcast_to(pointers.data, np.shape(mask.data))[np.asarray(mask.data, bool)].reshape(-1)

    def _buffer_of(self, at):
        for buffer in self._buffers.values():
            if at.size and buffer.has(at[:1]).all():
                assert buffer.has(at).all(), f"{buffer.name}: an address that is no element of it"
                return buffer
        assert not at.size, "an address that is no element of any tensor"
        return _Buffer("nothing", torch.empty(0))

    def _check_races(self):
        by_program = collections.defaultdict(list)
        for program, at in self._stores:
            by_program[program].append(at)
        programs = list(by_program)
        sets = [np.unique(np.concatenate(by_program[program])) for program in programs]
        places = np.concatenate([*sets, np.zeros(0, np.uint64)])
        if not places.size:
            return
        owners = np.repeat(np.arange(len(sets)), [one.size for one in sets])
        order = places.argsort()
        places, owners = places[order], owners[order]
        assert (np.diff(places.astype(np.int64)) > 0).all(), "two programs write to one place"
        for program, at in self._loads:
            index = np.minimum(np.searchsorted(places, at), places.size - 1)
            shared = places[index] == at
            own = programs.index(program) if program in by_program else -1
            assert (owners[index][shared] == own).all(), "a program reads what another one writes"


class _House:
    """A copy of a tensor's memory between poisoned borders."""

    def __init__(self, tensor):
        self.given = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self.memory = torch.full((self.given.numel() + 2 * GUARD,), 255, dtype=torch.uint8)
        self.inside = self.memory[GUARD : GUARD + self.given.numel()]
        self.inside.copy_(self.given)

    def tensor(self, given):
        offset = GUARD // given.element_size() + given.storage_offset()
        storage = self.memory.untyped_storage()
        return given.new_empty(0).set_(storage, offset, given.size(), given.stride())

    def move_back(self):
        assert (self.memory[:GUARD] == 255).all(), "a write before a tensor"
        assert (self.memory[GUARD + self.given.numel() :] == 255).all(), "a write behind a tensor"
        self.given.copy_(self.inside)


class _Buffer:
    """The addresses of a tensor's elements, and how many of them were read and written."""

    def __init__(self, name, tensor):
        self.name, self.reads, self.writes = name, 0, 0
        places = np.zeros((1,) * tensor.dim(), np.uint64)
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            steps = np.arange(size, dtype=np.uint64) * np.uint64(stride * tensor.element_size())
            places = places + steps.reshape([-1 if other == axis else 1 for other in range(tensor.dim())])
        self.places = np.unique(places) + np.uint64(tensor.data_ptr())

    def has(self, at):
        at = at.astype(np.uint64)
        if not self.places.size:
            return np.zeros(at.shape, bool)
        return self.places[np.minimum(np.searchsorted(self.places, at), self.places.size - 1)] == at
