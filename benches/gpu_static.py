"""What the Triton programs cost on GPUs that are not there: registers, occupancy, bytes a logit, time.

    python benches/gpu_static.py                # print the tables
    python benches/gpu_static.py --json FILE    # and write them

Registers and instructions are the compiler's, for five targets. Reads and writes are counted in Triton's
interpreter, in a process of its own. The time is the least that the memory of a GPU allows for them: nothing
here is measured.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

COUNTED = {
    "training, 1,000 classes": (1000, "kl"),
    "training, 16,384 classes": (16384, "kl"),
    "training, 32,000 classes": (32000, "kl"),
    "training, 151,936 classes": (151936, "kl"),
    "weights over the batch, 32,000 classes": (32000, "kl_ball"),
    "losses alone, 32,000 classes": (32000, None),
}
BANDWIDTH = {"A100": 2.0, "H100": 3.35, "H200": 4.8, "B200": 8.0}
"""Of the memory, in TB/s, as NVIDIA gives it for the 80 GB A100 and the SXM modules."""
ROWS, CLASSES = 8192, 32000
PUBLISHED = {
    "Liger, its cross-entropy": 0.80,
    "Liger, its newer kernels": 0.72,
}
"""Forward and backward, milliseconds, of (8192, 32000) in bfloat16 on an H100, as their authors publish."""


def count():
    """Reads and writes a logit of each call, counted in the interpreter."""
    import rgd  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from _gpu_watch import Watch  # noqa: PLC0415
    from rgd.torch import backend, cross_entropy  # noqa: PLC0415

    found = {}
    for name, (classes, kind) in COUNTED.items():
        logits = torch.randn(2, classes, dtype=torch.bfloat16).requires_grad_(kind is not None)
        weighting = rgd.KLBall(0.1) if kind == "kl_ball" else rgd.KL()
        with backend("triton"), Watch() as watch:
            loss = cross_entropy(logits, torch.tensor([0, classes - 1]), weighting=weighting)
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
    """What the compilers say of each program, by its name and target."""
    import _gpu_ahead  # noqa: PLC0415

    return {
        name: {target: _gpu_ahead.compile_for(launch, target)._asdict() for target in targets}
        for name, launch, _ in _gpu_ahead.variants()
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

    print(f"\nThe least time of ({ROWS}, {CLASSES}) in bfloat16 by bandwidth, ms; published: H100\n")
    print(f"{'':42}" + "".join(f"{gpu:>8}" for gpu in BANDWIDTH))
    times = {}
    for name, moved in {
        "rgd": sum(traffic["training, 32,000 classes"]),
        "rgd, its second read from the cache": sum(traffic["training, 32,000 classes"]) - 1,
        "one read and one write": 2.0,
    }.items():
        times[name] = {gpu: moved * ROWS * CLASSES * 2 / speed / 1e9 for gpu, speed in BANDWIDTH.items()}
        print(f"{name:42}" + "".join(f"{time:8.2f}" for time in times[name].values()))
    for name, time in PUBLISHED.items():
        print(f"{name:42}{'':8}{time:8.2f}")
    if options.json is not None:
        figures = {"programs": programs, "traffic": traffic, "least_ms": times}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
