"""The Triton backend on a GPU: first parity, then time, memory and bandwidth, compared with other losses.

    python benches/gpu.py --json FILE           # all of it, in less than 8 minutes
    python benches/gpu.py --parity-only         # the parity alone
    TRITON_INTERPRET=1 python benches/gpu.py --dry-run       # the whole program where there is no GPU

Parity: random calls of every option, dense and with a linear head, in float32 and bfloat16 against float64.
If one fails, nothing is timed. Checks: whether a step waits for the device, and whether it gives the same
bits again, on another stream and in a CUDA graph. Time: a training step, forward and backward from logits,
the median of repeated steps on the device's clock, all peers in turn. Share: the time of a copy of the logits
as a part of the step's time. The program leaves out steps for which there is no time, and names them.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import sys
import time

import rgd
import torch
import torch.nn.functional as F
from _gpu_cases import case_of, cast, distance, linear_value_and_grads, value_and_grad
from rgd._chunk_rows import chunk_rows
from rgd.torch import backend, cross_entropy, linear_cross_entropy
from rgd.torch.backends import triton as backend_of_triton

SIZES = [(8192, 32000), (4096, 128256), (2048, 151936), (8192, 16384), (16384, 1000), (65536, 10)]
DRY_SIZES = [(4, 33)]
DTYPES = [torch.bfloat16, torch.float32]
HEADS = [(8192, 4096, 32000), (8192, 4096, 151936)]
DRY_HEADS = [(6, 8, 33)]
OURS = "rgd, triton"
GOALS = {
    "RGD in plain torch, over rgd's time: at least 3": lambda of: (
        of["RGD in plain torch"]["ms"] / of[OURS]["ms"]
    ),
    "Liger, over rgd's time: at least 1.1": lambda of: of["Liger"]["ms"] / of[OURS]["ms"],
    "a copy of the logits, over rgd's time: at least 0.75": lambda of: of[OURS]["share_of_a_copy"],
    "rgd's time over the products': at most 1.4": lambda of: (
        of[OURS]["ms"] / of["the three products alone"]["ms"]
    ),
    "rgd's memory over gradients and a chunk: at most 1.3": lambda of: (
        of[OURS]["peak_mib"] / of[OURS]["gradients_and_chunk_mib"]
    ),
}
"""Each with what it is of the figures of one size, by their names."""
MATRICES = [(12, 4), (9, 33), (1, 5), (5, 130)]


def parity_of(seeds, device):
    """As `parity`, for some of the cases."""
    failed, worst = [], {"float32": 0.0, "bfloat16": 0.0}
    for seed in seeds:
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


def parity(device, cases, jobs):
    """The cases that fail, and the largest distance of the others.

    Each case is a program of its own for Triton to compile, so several processes share them.
    """
    parts = [range(first, cases, jobs) for first in range(jobs)]
    if jobs == 1:
        return parity_of(parts[0], device)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        results = list(pool.map(parity_of, parts, [device] * jobs))
    failed = [one for result in results for one in result[0]]
    return failed, {name: max(result[1][name] for result in results) for name in results[0][1]}


def steps_of(device):
    """Small training steps, by name: each gives its value and its gradients."""
    classes = 1000 if device == "cuda" else 33
    logits = torch.randn(64, classes, device=device).requires_grad_()
    hidden, head = (torch.randn(size, 16, device=device).requires_grad_() for size in (64, classes))
    target = torch.arange(64, device=device) % classes
    target[:9] = -100

    def dense(weighting):
        with backend("triton"):
            loss = cross_entropy(logits, target, weighting=weighting)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    def linear(weighting):
        with backend("triton"):
            loss = linear_cross_entropy(hidden, head, target, weighting=weighting, chunk_bytes=80 * classes)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, head))

    kinds = {"dense": dense, "linear": linear}
    return {
        f"{kind}, {type(weighting).__name__}": functools.partial(step, weighting)
        for kind, step in kinds.items()
        for weighting in (rgd.KL(), rgd.KLBall(0.1))
    }


def runs_again(step):
    """A step that is repeated has the same bits."""
    assert all(map(torch.equal, step(), step())), "two runs differ"


def waits_for_nothing(step):
    """A step reads nothing from the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def runs_on_a_stream(step):
    """A step on a stream of its own has the same bits."""
    expected, stream = step(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, found, expected)), "the results differ"


def runs_in_a_graph(step):
    """A step that a CUDA graph replays has the same bits."""
    expected, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(map(torch.equal, found, expected)), "the results differ"


def checks(device):
    """Further checks that need a device: for each check and step None, or the error."""
    found, only_a_gpu = {}, (waits_for_nothing, runs_on_a_stream, runs_in_a_graph)
    for name, step in steps_of(device).items():
        step()  # compiles
        for check in (runs_again, *(only_a_gpu if device == "cuda" else ())):
            try:
                check(step)
                error = None
            except Exception as caught:  # The figures are worth having in any case.
                error = f"{type(caught).__name__}: {caught}"[:500]
            found[f"{check.__name__}: {name}"] = error
    return found


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


def peers(device):
    """The losses to time, by name."""
    compiler = "inductor" if device.name == "cuda" else "eager"
    found = {
        "rgd, triton": by("triton"),
        "rgd, triton, KLBall": by("triton", weighting=rgd.KLBall(0.1)),
        "rgd, composite": by("composite"),
        "nn.CrossEntropyLoss": F.cross_entropy,
        "RGD in plain torch": plain_rgd,
        "RGD in plain torch, compiled": torch.compile(plain_rgd, backend=compiler),
        "Liger": liger(),
        "quack": quack(),
    }
    return {name: loss for name, loss in found.items() if loss is not None}


class Device:
    """The device of the steps, with its clock and its memory; the CPU is only for trying the program.

    Args:
        name: "cuda" or "cpu".
    """

    def __init__(self, name):
        self.name = name

    def median_ms(self, step, budget=0.4):
        """The median time of a step, in ms, and the most memory that it took, in MiB."""
        if self.name != "cuda":
            started = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - started), 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
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
        return sorted(times)[len(times) // 2], (torch.cuda.max_memory_allocated() - before) / 2**20

    def figure(self, step, budget=0.4, **given):
        """The figure of a step; without a time where the step fails."""
        try:
            took, peak = self.median_ms(step, budget)
        except Exception as error:  # A peer that fails must not end the program.
            return {**given, "failed": f"{type(error).__name__}: {error}"[:500]}
        return {**given, "ms": took, "peak_mib": peak}


def dense_figures(device, rows, classes, dtype):
    logits = torch.randn(rows, classes, device=device.name, dtype=dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,), device=device.name)
    size = logits.numel() * logits.element_size()
    copying, _ = device.median_ms(functools.partial(torch.empty_like(logits).copy_, logits.detach()))
    for name, loss in peers(device).items():

        def step(loss=loss):
            logits.grad = None
            loss(logits, target).backward()

        figure = device.figure(step, size=[rows, classes], dtype=str(dtype), what=name)
        logits.grad = None
        if "ms" in figure:
            figure["share_of_a_copy"] = copying / figure["ms"]
            figure["gb_per_s"] = 2 * size / figure["ms"] / 1e6
        yield figure


def linear_figures(device, rows, width, classes):
    hidden = torch.randn(rows, width, device=device.name, dtype=torch.bfloat16).requires_grad_()
    head = torch.randn(classes, width, device=device.name, dtype=torch.bfloat16).div(64).requires_grad_()
    target = torch.randint(0, classes, (rows,), device=device.name)
    chunk = chunk_rows(None, row_bytes=classes * 2, gradient_bytes=classes * width * 4)
    floor = hidden.numel() * 2 + classes * width * 4 + min(rows, chunk) * classes * 2

    def products():
        logits = hidden.detach() @ head.detach().T
        return logits @ head.detach(), logits.T @ hidden.detach()

    def chunked(name):
        hidden.grad = head.grad = None
        with backend(name):
            linear_cross_entropy(hidden, head, target).backward()

    def plain():
        hidden.grad = head.grad = None
        F.cross_entropy(hidden @ head.T, target).backward()

    steps = {
        "the three products alone": products,
        "rgd, triton": functools.partial(chunked, "triton"),
        "rgd, composite": functools.partial(chunked, "composite"),
        "F.linear and nn.CrossEntropyLoss": plain,
    }
    for name, step in steps.items():
        given = {"size": [rows, width, classes], "dtype": "torch.bfloat16", "what": name}
        yield device.figure(step, 1.0, **given, gradients_and_chunk_mib=floor / 2**20)
        hidden.grad = head.grad = None


def parts_of(device, dry_run):
    """The measurements, the most important first: a name, and an iterator of figures."""
    sizes, heads = (DRY_SIZES, DRY_HEADS) if dry_run else (SIZES, HEADS)
    dense = [
        (f"{rows} x {classes}, {str(dtype)[6:]}", dense_figures(device, rows, classes, dtype))
        for rows, classes in sizes
        for dtype in DTYPES
    ]
    linear = [(f"head {' x '.join(map(str, head))}", linear_figures(device, *head)) for head in heads]
    return [*dense[:1], *linear, *dense[1:]]


def printed(figure):
    """A figure as a line."""
    line = f"{'x'.join(map(str, figure['size'])):18}{figure['dtype'][6:]:10}{figure['what']:34}"
    if "failed" in figure:
        return line + figure["failed"].splitlines()[0]
    share = figure.get("share_of_a_copy")
    line += f"{figure['ms']:10.3f} ms{figure['peak_mib']:10.0f} MiB"
    return line if share is None else line + f"{share:8.0%} of a copy"


def reached(figures):
    """What `GOALS` came to at each size in bfloat16: goal, size, number."""
    sizes = {}
    for figure in figures:
        if figure["dtype"] == "torch.bfloat16":
            sizes.setdefault(tuple(figure["size"]), {})[figure["what"]] = figure
    for size, by_name in sizes.items():
        for goal, value in GOALS.items():
            with contextlib.suppress(KeyError):  # Another kind of step, or a peer that is not there.
                yield goal, size, value(by_name)


def main():
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cases", type=int, help="how many random calls: 200, or 4 of a dry run")
    parser.add_argument("--parity-only", action="store_true", help="time nothing")
    parser.add_argument("--dry-run", action="store_true", help="try the whole program, on tiny sizes")
    parser.add_argument("--minutes", type=float, default=7.5, help="begin no figures after so many minutes")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    device = Device(backend_of_triton._DEVICE)
    if device.name == "cuda" and not torch.cuda.is_available():
        print("there is no GPU: TRITON_INTERPRET=1 python benches/gpu.py --dry-run")
        return
    if device.name == "cpu" and not options.dry_run and not options.parity_only:
        parser.error("the interpreter's times say nothing: --dry-run or --parity-only")
    cases = options.cases or (4 if options.dry_run else 200)
    jobs = min(8, os.cpu_count() or 1) if device.name == "cuda" else 1
    failed, worst = parity(device.name, cases, jobs)
    print(f"parity of {cases} calls: off by at most {worst}, {len(failed)} failed", flush=True)
    machine = {
        "device": torch.cuda.get_device_name() if device.name == "cuda" else "interpreter",
        "torch": torch.__version__,
    }
    found = {"machine": machine, "parity": {"cases": cases, "worst": worst, "failed": failed}}
    found |= {"figures": [], "left_out": [], "goals": []}

    def write():
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    write()
    if failed:
        raise SystemExit("\n".join(failed))
    found["checks"] = checks(device.name)
    for name, error in found["checks"].items():
        print(f"{name}: {error or 'yes'}", flush=True)
    for name, figures in [] if options.parity_only else parts_of(device, options.dry_run):
        if time.perf_counter() - started > 60 * options.minutes:
            found["left_out"].append(name)
            print(f"left out, for the time is over: {name}", file=sys.stderr)
            continue
        for figure in figures:
            found["figures"].append(figure)
            print(printed(figure), flush=True)
            write()
    found["goals"] = list(reached(found["figures"]))
    for goal, size, value in found["goals"]:
        print(f"{'x'.join(map(str, size)):18}{value:8.2f}  {goal}")
    write()


if __name__ == "__main__":
    main()
