"""The Triton backend on a GPU: parity first, then time, memory and bandwidth beside what else there is.

    python benches/gpu.py --json FILE           # all of it, under 8 minutes
    python benches/gpu.py --parity-only         # the parity alone
    TRITON_INTERPRET=1 python benches/gpu.py --parity-only --cases 5     # where there is no GPU

Parity: random calls of every option, dense and with a linear head, in float32 and bfloat16 against float64.
If one is off, nothing is timed. Time: a training step, forward and backward from logits, the median of
repeated steps on the device's clock, all peers in turn. Share: the time that a copy of the logits takes, as a
part of the step's.
"""

import argparse
import functools
import json
import pathlib
import sys
import time

import rgd
import torch
import torch.nn.functional as F
from _gpu_cases import case_of, cast, distance, linear_value_and_grads, value_and_grad
from rgd.torch import backend, cross_entropy, linear_cross_entropy
from rgd.torch.backends import triton as backend_of_triton

SIZES = [(8192, 32000), (4096, 128256), (2048, 151936), (8192, 16384), (16384, 1000), (65536, 10)]
DTYPES = [torch.bfloat16, torch.float32]
HEADS = [(8192, 4096, 32000), (8192, 4096, 151936)]
MATRICES = [(12, 4), (9, 33), (1, 5), (5, 130)]


def parity(device, cases):
    """The cases that are off, and by how much the others are at most."""
    failed, worst = [], {"float32": 0.0, "bfloat16": 0.0}
    for seed in range(cases):
        linear = seed % 4 == 3
        case = case_of(seed, MATRICES) if linear else case_of(seed)
        run = linear_value_and_grads if linear else value_and_grad
        options = {"chunk_bytes": 500} if linear else {}
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-6)):
            given = cast(case, dtype, device)
            expected = run(cast(given, torch.float64, device), "composite", **options)
            off = max(map(distance, run(given, "triton", **options), expected))
            name = str(dtype).removeprefix("torch.")
            worst[name] = max(worst[name], off)
            if off > tolerance:
                failed.append(f"case {seed} in {name} is off by {off:.1e}: {case}")
    return failed, worst


def liger():
    """Liger's cross-entropy, if it is installed."""
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy  # noqa: PLC0415
    except ImportError:
        return None
    return liger_cross_entropy


def quack():
    """quack's cross-entropy, if it is installed."""
    try:
        from quack import cross_entropy as function  # noqa: PLC0415
    except ImportError:
        return None
    return lambda x, y: function(x, y, reduction="mean")


def plain_rgd(x, y):
    """What a user would write in torch."""
    losses = F.cross_entropy(x.float(), y, reduction="none")
    return (torch.exp(losses.detach().clamp(max=1.0) / 2) * losses).mean()


def by(name, **options):
    """RGD's loss by a backend."""

    def loss(x, y):
        with backend(name):
            return cross_entropy(x, y, **options)

    return loss


def peers():
    """The losses to time, by name."""
    found = {
        "rgd, triton": by("triton"),
        "rgd, triton, KLBall": by("triton", weighting=rgd.KLBall(0.1)),
        "rgd, composite": by("composite"),
        "nn.CrossEntropyLoss": F.cross_entropy,
        "RGD in plain torch": plain_rgd,
        "RGD in plain torch, compiled": torch.compile(plain_rgd),
        "Liger": liger(),
        "quack": quack(),
    }
    return {name: loss for name, loss in found.items() if loss is not None}


def median_ms(step, budget=0.4):
    """The median time of a step on the device's clock, in ms."""
    step()
    torch.cuda.synchronize()
    times, started = [], time.perf_counter()
    while time.perf_counter() - started < budget or len(times) < 5:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def dense_figures():
    for rows, classes in SIZES:
        for dtype in DTYPES:
            logits = torch.randn(rows, classes, device="cuda", dtype=dtype).requires_grad_()
            target = torch.randint(0, classes, (rows,), device="cuda")
            copy, size = torch.empty_like(logits), logits.numel() * logits.element_size()
            copying = median_ms(lambda logits=logits, copy=copy: copy.copy_(logits.detach()))
            del copy
            for name, loss in peers().items():
                torch.compiler.reset()

                def step(loss=loss, logits=logits, target=target):
                    logits.grad = None
                    loss(logits, target).backward()

                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                try:
                    took = median_ms(step)
                except (RuntimeError, ValueError, AssertionError) as error:
                    print(f"{name}: {error}", file=sys.stderr)
                    continue
                yield {
                    "size": [rows, classes], "dtype": str(dtype), "what": name, "ms": took,
                    "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
                    "share_of_a_copy": copying / took, "gb_per_s": 2 * size / took / 1e6,
                }  # fmt: skip
            logits.grad = None


def linear_figures():
    for rows, width, classes in HEADS:
        hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
        head = (torch.randn(classes, width, device="cuda", dtype=torch.bfloat16) / 64).requires_grad_()
        target = torch.randint(0, classes, (rows,), device="cuda")

        def products(hidden=hidden, head=head):
            logits = hidden.detach() @ head.detach().T
            return logits @ head.detach(), logits.T @ hidden.detach()

        def chunked(name, hidden=hidden, head=head, target=target):
            hidden.grad = head.grad = None
            with backend(name):
                linear_cross_entropy(hidden, head, target).backward()

        def plain(hidden=hidden, head=head, target=target):
            hidden.grad = head.grad = None
            F.cross_entropy(hidden @ head.T, target).backward()

        steps = {
            "the three products alone": products,
            "rgd, triton": functools.partial(chunked, "triton"),
            "rgd, composite": functools.partial(chunked, "composite"),
            "F.linear and nn.CrossEntropyLoss": plain,
        }
        for name, step in steps.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield {
                "size": [rows, width, classes], "dtype": "torch.bfloat16", "what": name,
                "ms": median_ms(step, 1.0),
                "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
            }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cases", type=int, default=200, help="how many random calls")
    parser.add_argument("--parity-only", action="store_true", help="time nothing")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    device = backend_of_triton._DEVICE
    if device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU: TRITON_INTERPRET=1 python benches/gpu.py --parity-only --cases 5")
        return
    failed, worst = parity(device, options.cases)
    print(f"parity of {options.cases} calls: off by at most {worst}, {len(failed)} failed")
    if failed:
        raise SystemExit("\n".join(failed))
    if options.parity_only or device == "cpu":
        return
    figures = []
    for figure in (one for part in (dense_figures(), linear_figures()) for one in part):
        figures.append(figure)
        size, share = "x".join(map(str, figure["size"])), figure.get("share_of_a_copy")
        print(
            f"{size:18}{figure['dtype'][6:]:10}{figure['what']:34}{figure['ms']:10.3f} ms"
            f"{figure['peak_mib']:10.0f} MiB" + ("" if share is None else f"{share:8.0%} of a copy"),
            flush=True,
        )
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "parity": worst}
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
