"""The re-weighted cross-entropy of an output layer in JAX, value and gradients: time and memory.

    python benches/jax_linear_cross_entropy.py [--json result.json] [--sizes 2048x256x32000] [--chunk-mib 64]

Each contender is one jitted `value_and_grad` with respect to the inputs (N, D) and the kernel (D, C).
Contenders take turns; a figure is the median over the rounds of (time of rgd.jax / time of the contender in
the same round), with the smallest and largest, of the wall clock and of the processor time of all threads.

There are two figures for memory: the memory that XLA plans besides arguments and results ("temp"), and the
growth of the peak (VmHWM) of a new process in which the contender runs once. The growth includes results, but
not arguments.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import rgd.jax

SIZES = "2048x256x32000,4096x768x50257"


def formula(inputs, kernel, labels):
    """RGD as a user writes it."""
    logits = (inputs @ kernel).astype(jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    weights = jax.lax.stop_gradient(jnp.exp(jnp.minimum(losses, 1.0) / 2.0))
    return jnp.mean(weights * losses)


def weights_outside(inputs, kernel, labels, chunk_bytes):
    """Losses first, then their weighted mean, as with a loss that cannot weight."""
    losses = functools.partial(
        rgd.jax.linear_cross_entropy, weighting=rgd.ERM(), reduction="none", chunk_bytes=chunk_bytes
    )
    return rgd.jax.reweighted_mean(losses(inputs, kernel, labels))


@jax.custom_vjp
def three_products(inputs, kernel, labels):
    """The matrix products alone, of whole matrices, without a loss."""
    del labels
    return jnp.sum((inputs @ kernel)[0])


def _products_forward(inputs, kernel, labels):
    del labels
    logits = inputs @ kernel
    return jnp.sum(logits[0]), (logits @ kernel.T, inputs.T @ logits)


three_products.defvjp(_products_forward, lambda gradients, _: (*gradients, None))


def contenders(chunk_bytes):
    ours = functools.partial(rgd.jax.linear_cross_entropy, chunk_bytes=chunk_bytes)
    return {
        "rgd.jax": ours,
        "jnp formula": formula,
        "rgd.jax.cross_entropy": lambda x, kernel, y: rgd.jax.cross_entropy(x @ kernel, y),
        "rgd.jax, jnp": functools.partial(ours, backend="jnp"),
        "weights outside": functools.partial(weights_outside, chunk_bytes=chunk_bytes),
        "three products": three_products,
    }


def problem(size, dtype):
    rows, width, classes = (int(part) for part in size.split("x"))
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (rows, width)).astype(dtype)
    kernel = (2 * jax.random.normal(keys[1], (width, classes)) / width**0.5).astype(dtype)
    return jax.block_until_ready((inputs, kernel, jax.random.randint(keys[2], (rows,), 0, classes)))


def compiled(function, arguments):
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*arguments).compile()


def peak_bytes(*, reset=False):
    """The largest resident size of this process since the last reset; None if /proc does not give it."""
    try:
        if reset:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")
        with open("/proc/self/status", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:
        return None


def print_growth(name, size, dtype, chunk_bytes):
    """Run a contender once, in a new process, and print the growth of the peak."""
    arguments = problem(size, dtype)
    step = compiled(contenders(chunk_bytes)[name], arguments)
    before = peak_bytes(reset=True)
    jax.block_until_ready(step(*arguments))
    print(None if before is None else peak_bytes() - before)


def growth(name, size, dtype, chunk_bytes):
    command = [sys.executable, __file__, "--growth", name, "--sizes", size, "--dtype", dtype]
    command += ["--chunk-mib", str(chunk_bytes / 2**20)]
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    return None if last == "None" else int(last)


def measure(size, dtype, chunk_bytes, rounds, names):
    arguments = problem(size, dtype)
    chosen = {name: f for name, f in contenders(chunk_bytes).items() if name in names}
    steps = {name: compiled(function, arguments) for name, function in chosen.items()}
    wall, processor = {name: [] for name in steps}, {name: [] for name in steps}
    for step in steps.values():
        jax.block_until_ready(step(*arguments))
    for _ in range(rounds):
        for name, step in steps.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(step(*arguments))
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - start_cpu)
    results = {}
    for name, step in steps.items():
        ratios = {
            kind: sorted(ours / other for ours, other in zip(times["rgd.jax"], times[name], strict=True))
            for kind, times in (("wall", wall), ("processor", processor))
        }
        results[name] = {
            "seconds": statistics.median(wall[name]),
            "ratio": {
                kind: {"median": statistics.median(r), "range": [r[0], r[-1]]} for kind, r in ratios.items()
            },
            "temp_bytes": step.memory_analysis().temp_size_in_bytes,
            "growth_bytes": growth(name, size, dtype, chunk_bytes),
        }
    return results


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=SIZES, help=f"N x D x C, by commas (default: {SIZES})")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7, help="how often each contender runs (default: 7)")
    parser.add_argument(
        "--chunk-mib", type=float, default=32.0, help="MiB of logits in a chunk (default: 32)"
    )
    parser.add_argument("--contenders", help="names, by commas (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--growth", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chunk_bytes = round(arguments.chunk_mib * 2**20)
    if arguments.growth:
        print_growth(arguments.growth, arguments.sizes, arguments.dtype, chunk_bytes)
        return

    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
        "threads": "XLA's pool for jnp and products; one for the kernel",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "chunk": f"{arguments.chunk_mib:g} MiB",
    }
    print("  ".join(f"{key}: {value}" for key, value in machine.items()))
    names = arguments.contenders.split(",") if arguments.contenders else list(contenders(chunk_bytes))
    results = {}
    for size in arguments.sizes.split(","):
        results[size] = measure(size, arguments.dtype, chunk_bytes, arguments.rounds, {"rgd.jax", *names})
        print(f"\n{size} {arguments.dtype}: rgd.jax over each contender, median [smallest, largest]")
        print(f"{'':>22} {'seconds':>8} {'wall':>20} {'processor':>20} {'temp':>9} {'VmHWM':>9}")
        for name, result in results[size].items():
            cells = [
                f"{r['median']:.2f} [{r['range'][0]:.2f}, {r['range'][1]:.2f}]"
                for r in result["ratio"].values()
            ]
            memory = [
                "?" if result[key] is None else f"{result[key] / 1e6:.0f} MB"
                for key in ("temp_bytes", "growth_bytes")
            ]
            print(
                f"{name:>22} {result['seconds']:>8.2f} {cells[0]:>20} {cells[1]:>20} "
                f"{memory[0]:>9} {memory[1]:>9}",
                flush=True,
            )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
