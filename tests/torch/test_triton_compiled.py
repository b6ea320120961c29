"""The Triton programs compiled for GPUs that are not there: what a compiler says about them.

`make test-gpu-static` compiles every program for every target. Without it, one stands for all.
"""

import importlib.util
import os
import pathlib
import re
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("compiles programs: not in Triton's interpreter", allow_module_level=True)
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benches"))

import _gpu_ahead as ahead
import gpu_static
from rgd.torch.backends.triton import _kernels, _launch

ALL = os.environ.get("RGD_GPU_STATIC") == "1"
# Half of a multiprocessor's threads at 64 registers; more options cost more. Images read a tile of 64 rows.
BUDGETS = {
    "all options": 128,
    "with returns": 80,
    "all with returns": 128,
    "probabilities": 80,
    "losses": 48,
    "second pass": 48,
    "scale": 48,
    "image": 168,
}
NAMES = {
    f"{name} {dtype} {classes}"
    for dtype in ("fp32", "bf16")
    for name, classes in (
        *(("training", classes) for classes in (1000, 4096, 16384, 32000, 151936, 50257)),
        *((name, classes) for name in ("all options", "with returns") for classes in (4096, 16384, 32000)),
        *(("all with returns", classes) for classes in (4096, 32000)),
        ("probabilities", 32000), ("losses", 32000), ("second pass", 32000), ("scale", 32000), ("image", 21),
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def variants():
    return {name: (launch, aligned) for name, launch, aligned in ahead.variants()}


def test_the_table_has_every_program(variants):
    assert set(variants) == NAMES
    kernels = {launch.kernel.__name__ for launch, _ in variants.values()}
    assert kernels == {"cross_entropy_rows", "gradient_blocks", "scale_blocks"}


@pytest.mark.parametrize("target", ahead.TARGETS if ALL else ["sm_90a"])
@pytest.mark.parametrize("name", sorted(NAMES) if ALL else ["training bf16 32000"])
def test_a_program_fits_its_registers_and_moves_128_bits_at_64_bit_addresses(name, target, variants):
    launch, aligned = variants[name]
    found = ahead.compile_for(launch, target)
    assert (found.stack, found.spills, found.narrow_offsets) == (0, 0, 0)
    # A multiprocessor of a gfx942 has twice the registers for as many threads.
    more = 1.25 if target == "gfx942" else 1
    assert found.registers <= more * BUDGETS.get(name.rsplit(" ", 2)[0], 72)
    if aligned:
        assert found.loads[0] > 0
        assert (found.stores[0] > 0) == (not name.startswith("losses"))


def test_offsets_of_32_bits_and_spills_and_narrow_loads_are_noticed(variants, monkeypatch, tmp_path):
    narrow = tmp_path / "narrow.py"
    narrow.write_text(pathlib.Path(_kernels.__file__).read_text().replace(".to(tl.int64)", ""))
    spec = importlib.util.spec_from_file_location("narrow", narrow)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch, _ = variants["training bf16 32000"]
    assert ahead.compile_for(launch._replace(kernel=module.cross_entropy_rows), "sm_90a").narrow_offsets > 0
    many = launch._replace(constants={**launch.constants, "BLOCK": 32768, "ONCE": True}, warps=4)
    crowded = ahead.compile_for(many, "sm_90a")
    assert crowded.stack > 0 or crowded.spills > 0
    odd = ahead.launches(50257, torch.bfloat16)[0]
    assert ahead.compile_for(odd, "sm_90a").loads[0] == 0


def test_the_page_gives_the_least_times_of_the_program():
    traffic = dict.fromkeys(("training, 32,000 classes", "training, 151,936 classes"), (2.0, 1.0))
    dense, head = gpu_static.least_times(traffic), gpu_static.least_times_of_head(traffic)
    assert dense["one read and one write"]["H100"] == pytest.approx(2 * 8192 * 32000 * 2 / 3.35e9, rel=1e-12)
    page = (pathlib.Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    for times, digits in ((dense, 2), (head, 1)):
        for name, by_gpu in times.items():
            assert f"| {by_gpu['H100']:.{digits}f} |" in page, name


def test_programs_share_no_memory_that_they_could_race_for():
    text = pathlib.Path(_kernels.__file__).read_text()
    assert not re.findall(r"atomic|debug_barrier|inline_asm|num_stages|program_id\([2-9]\)", text)


def test_a_grid_of_more_rows_than_65535_is_one_of_the_first_axis():
    launch = ahead.launches(3, torch.float32, rows=70000 * _launch.tile_of(3).rows)[0]
    assert launch.grid == (70000,)


def test_a_number_of_a_weighting_is_no_part_of_what_is_compiled():
    first, second = (ahead.source_of(ahead.launches(100, torch.float32, tau=tau)[0]) for tau in (1.0, 2.0))
    assert first.hash() == second.hash()
