"""The cost of the Triton programs, computed without a GPU: registers, occupancy, bytes a logit, least time.

    python benches/gpu_static.py                # print the tables
    python benches/gpu_static.py --json FILE    # and write them

Registers and instructions come from the compiler, for five targets. Reads and writes are counted in Triton's
interpreter, in a process of its own. The time is the least time that the memory of a GPU allows for them.
Nothing here is measured.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

COUNTED = {
    "training, 1,000 classes": (1000, "kl", False),
    "training, 16,384 classes": (16384, "kl", False),
    "the same with returns=": (16384, "kl", True),
    "training, 32,000 classes": (32000, "kl", False),
    "training, 151,936 classes": (151936, "kl", False),
    "weights over the batch, 32,000 classes": (32000, "kl_ball", False),
    "the same with returns=, too": (32000, "kl_ball", True),
    "losses alone, 32,000 classes": (32000, None, False),
}
BANDWIDTH = {"A100": 2.0, "H100": 3.35, "H200": 4.8, "B200": 8.0}
"""Of the memory, in TB/s, as NVIDIA gives it for the 80 GB A100 and the SXM modules."""
PEAK = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}
"""Of dense products in bfloat16, in TFLOP/s, from the same pages."""
ROWS, CLASSES = 8192, 32000
PUBLISHED = {
    "published: Liger, its cross-entropy": 0.80,
    "published: Liger, its newer kernels": 0.72,
    "published: quack's softmax, 89.7% of peak": 2 * ROWS * CLASSES * 2 / (0.897 * 3.35e9),
}
"""Milliseconds of (8192, 32000) in bfloat16 on an H100, as published: a softmax, and training steps."""
HEAD = 8192, 4096, 151936
PUBLISHED_HEAD = {
    "published: the products alone": (42,),
    "published: all logits at once": (59,),
    "published: in chunks": (167, 192),
}
"""Milliseconds of a training step of the linear head in bfloat16 on an H100, as TRL publishes."""


def count():
    """Reads and writes a logit of each call, counted in the interpreter."""
    import rgd  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from _gpu_watch import Watch  # noqa: PLC0415
    from rgd._extras import EXTRAS  # noqa: PLC0415
    from rgd.torch import backend, cross_entropy  # noqa: PLC0415

    found = {}
    for name, (classes, kind, beside) in COUNTED.items():
        logits = torch.randn(2, classes, dtype=torch.bfloat16).requires_grad_(kind is not None)
        weighting = rgd.KLBall(0.1) if kind == "kl_ball" else rgd.KL()
        with backend("triton"), Watch() as watch:
            target, returns = torch.tensor([0, classes - 1]), EXTRAS if beside else ()
            loss = cross_entropy(logits, target, weighting=weighting, returns=returns)
            loss = loss[0] if beside else loss
            if kind is not None:
                loss.backward()
        writes = watch.total("gradient")[1] if kind is not None else 0.0
        found[name] = round(watch.total("logits")[0], 2), round(writes, 2)
    return found


def counted():
    """The same from a process in which Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, "--count"]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def compiled(targets):
    """The compilers' output for each program, by its name and target."""
    import _gpu_ahead  # noqa: PLC0415

    return {
        name: {target: _gpu_ahead.compile_for(launch, target)._asdict() for target in targets}
        for name, launch, _ in _gpu_ahead.variants()
    }


def least_times(traffic):
    """The least times that the bandwidth of each GPU allows for dense logits, in ms."""
    moved = sum(traffic["training, 32,000 classes"])
    ways = {
        "rgd": moved,
        "rgd, its second read from the cache": moved - 1,
        "one read and one write": 2,
    }
    return {
        name: {gpu: moves * ROWS * CLASSES * 2 / speed / 1e9 for gpu, speed in BANDWIDTH.items()}
        for name, moves in ways.items()
    }


def least_times_of_head(traffic):
    """The least times, by each GPU's peak rate and bandwidth, of the parts of a linear head's step, in ms."""
    from rgd._chunk_rows import chunk_rows  # noqa: PLC0415

    rows, width, classes = HEAD
    gradient = classes * width * 4
    chunks = -(-rows // chunk_rows(None, row_bytes=classes * 2, gradient_bytes=gradient))
    programs = sum(traffic["training, 151,936 classes"]) * rows * classes * 2
    return {
        "the three products, at the peak": {
            gpu: 3 * 2 * rows * width * classes / peak / 1e9 for gpu, peak in PEAK.items()
        },
        "the programs between them": {gpu: programs / speed / 1e9 for gpu, speed in BANDWIDTH.items()},
        f"the head's gradient, moved by {chunks} chunks": {
            gpu: 2 * chunks * gradient / speed / 1e9 for gpu, speed in BANDWIDTH.items()
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    parser.add_argument("--targets", default="sm_80,sm_90a,sm_100,sm_120,gfx942", help="GPUs to compile for")
    parser.add_argument("--count", action="store_true", help="only count, in the interpreter")
    options = parser.parse_args()
    if options.count:
        print(json.dumps(count()))
        return
    traffic, targets = counted(), options.targets.split(",")
    programs = compiled(targets)

    print("Registers a thread / part of the threads that run at once; a stack or a spill is marked with !\n")
    print(f"{'':34}" + "".join(f"{target:>14}" for target in targets))
    for name, by_target in programs.items():
        cells = (
            f"{one['registers']}/{one['occupancy']:.2f}{'!' if one['stack'] or one['spills'] else ''}"
            for one in by_target.values()
        )
        print(f"{name:34}" + "".join(f"{cell:>14}" for cell in cells))

    print("\nReads and writes a logit, counted in the interpreter\n")
    for name, (reads, writes) in traffic.items():
        print(f"{name:42}{reads:6.2f}{writes:6.2f}")

    dense, head = least_times(traffic), least_times_of_head(traffic)
    for size, times, published in (
        (f"({ROWS}, {CLASSES})", dense, {name: (time,) for name, time in PUBLISHED.items()}),
        (f"the linear head {HEAD}", head, PUBLISHED_HEAD),
    ):
        print(f"\nThe least time of {size} in bfloat16, ms\n")
        print(f"{'':46}" + "".join(f"{gpu:>8}" for gpu in BANDWIDTH))
        for name, by_gpu in times.items():
            print(f"{name:46}" + "".join(f"{time:8.2f}" for time in by_gpu.values()))
        for name, of in published.items():
            print(f"{name:46}{'':8}" + ",".join(f"{time:8.2f}" for time in of))
    if options.json is not None:
        figures = {"programs": programs, "traffic": traffic, "least_ms": dense | head}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
