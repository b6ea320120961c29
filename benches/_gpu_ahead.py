"""Compiles the Triton programs of a call ahead of time, for GPUs that this machine does not have.

A call runs on CPU tensors up to its launches. Triton specialises a program on the arguments of its launch:
dtypes, integers that are 1 or divisible by 16, and arguments that are None.
"""

import os
import pathlib
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import rgd
import torch
import triton
from rgd._extras import EXTRAS
from rgd.torch import backend, cross_entropy
from rgd.torch.backends import triton as backend_of_triton
from rgd.torch.backends.triton import _launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90a": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
REGISTERS = {"cuda": 65536, "hip": 4 * 512 * 64}
"""Of a multiprocessor, 32 bits each."""
THREADS = {"sm_80": 2048, "sm_90a": 2048, "sm_100": 2048, "sm_120": 1536, "gfx942": 2048}
NVIDIA = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Launch(NamedTuple):
    """One launch of a call: the program, its arguments, and its number of warps."""

    kernel: Any
    grid: tuple[int, ...]
    warps: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Compiled(NamedTuple):
    """A program for a GPU.

    Attributes:
        registers: Of each thread.
        stack: Bytes of memory that each thread has for what does not fit its registers.
        spills: Registers that went to memory.
        loads: How many instructions load 128 bits, and how many load less.
        stores: The same of stores.
        narrow_offsets: Places where an offset of 32 bits is added to a pointer.
        occupancy: The part of a multiprocessor's threads that run at once.
    """

    registers: int
    stack: int
    spills: int
    loads: tuple[int, int]
    stores: tuple[int, int]
    narrow_offsets: int
    occupancy: float


def launches(classes, dtype, *, soft=False, rows=64, grad=True, shape=None, **options):
    """The launches of a call on logits (rows, classes), as a GPU would get them.

    Args:
        classes: How many classes.
        dtype: Of the logits.
        soft: Whether targets are class probabilities.
        rows: How many rows.
        grad: Whether the gradient is wanted.
        shape: The shape of the logits, if they are no matrix.
        options: Of `rgd.torch.cross_entropy`.
    """
    found = []
    logits = torch.zeros(shape or (rows, classes), dtype=dtype).requires_grad_(grad)
    target = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.long)
    target = torch.zeros_like(logits, requires_grad=False) if soft else target

    def catch(kernel, grid, like, warps, *arguments, **constants):
        found.append(Launch(kernel, grid, warps, arguments, constants))

    launch, device = _launch._launch, backend_of_triton._DEVICE
    _launch._launch, backend_of_triton._DEVICE = catch, "cpu"
    try:
        with backend("triton"):
            loss = cross_entropy(logits, target, **options)
            loss = loss[0] if isinstance(loss, tuple) else loss
            if grad:
                loss.backward()
    finally:
        _launch._launch, backend_of_triton._DEVICE = launch, device
    return found


def source_of(launch):
    """A launch as Triton's JIT specialises it."""
    signature, constants, attributes = {}, {}, {}
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    for index, (name, value) in enumerate(given.items()):
        if value is None or name in launch.constants or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(launch, name):
    """A launch compiled for a target of `TARGETS`."""
    target = TARGETS[name]
    warps = launch.warps * 32 // target.warp_size
    options = {"num_warps": warps, "enable_fp_fusion": True}
    made = triton.compile(source_of(launch), target=target, options=options)
    narrow = len(re.findall(r"tt\.addptr [^:]*: tensor<[^,]*ptr[^,]*>, tensor<[^>]*xi32>", made.asm["ttir"]))
    read = _amd if target.backend == "hip" else _nvidia
    registers, stack, spills, loads, stores = read(made)
    threads = warps * target.warp_size
    room = REGISTERS[target.backend] // (-(-registers // 8) * 8 * threads)
    programs = min(room, THREADS[name] // threads)
    return Compiled(
        registers, stack, spills, loads, stores, narrow, min(1.0, programs * threads / THREADS[name])
    )


def _nvidia(made):
    ptx = made.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [NVIDIA / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL")
    )

    def width(kind):
        every = re.findall(rf"\b{kind}\.global[^;\s]*", ptx)
        wide = [one for one in every if re.search(r"v4\.b32|v2\.b64|v4\.f32|v8\.b32|v4\.b64", one)]
        return len(wide), len(every) - len(wide)

    return registers, stack, local, width("ld"), width("st")


def _amd(made):
    text = made.asm["amdgcn"]

    def number(key):
        return int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])

    def width(kind):
        every = re.findall(rf"\bglobal_{kind}_\w+", text)
        return sum("dwordx4" in one for one in every), sum("dwordx4" not in one for one in every)

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return number("vgpr_count"), number("private_segment_fixed_size"), spills, width("load"), width("store")


def options_of(soft, classes):
    """Options that cost a program the most registers, or none."""
    if not soft:
        return {}
    vectors = {name: torch.ones(classes) for name in ("weight", "logit_adjustment")}
    return {**vectors, "label_smoothing": 0.1, "z_loss": 1e-4}


def variants():
    """The programs of the table, by name: for each, the launch and whether its rows are aligned."""
    for dtype in (torch.float32, torch.bfloat16):
        short = TYPES[dtype]
        for classes in (1000, 4096, 16384, 32000, 151936):
            yield f"training {short} {classes}", launches(classes, dtype)[0], classes % 16 == 0
        for classes in (4096, 16384, 32000):
            yield (
                f"all options {short} {classes}",
                launches(classes, dtype, **options_of(True, classes))[0],
                True,
            )
        for classes in (4096, 16384, 32000):
            yield f"with returns {short} {classes}", launches(classes, dtype, returns=EXTRAS)[0], True
        for classes in (4096, 32000):
            every = options_of(True, classes)
            yield (
                f"all with returns {short} {classes}",
                launches(classes, dtype, soft=True, returns=EXTRAS, **every)[0],
                True,
            )
        yield f"probabilities {short} 32000", launches(32000, dtype, soft=True)[0], True
        yield f"losses {short} 32000", launches(32000, dtype, grad=False)[0], True
        passes = launches(32000, dtype, weighting=rgd.KLBall(0.1))
        yield f"second pass {short} 32000", passes[1], True
        yield f"scale {short} 32000", passes[2], True
        yield f"training {short} 50257", launches(50257, dtype)[0], False
        yield f"image {short} 21", launches(21, dtype, shape=(2, 21, 64, 64))[0], True
