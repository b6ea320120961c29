"""The re-weighted cross-entropy in JAX on the CPU, value and gradient, against what a user would write.

    python benches/jax_cross_entropy.py [--json result.json] [--sizes 128x10,1024x32000] [--dtype bfloat16]

Each contender is one jitted `value_and_grad` with respect to the logits. Contenders take turns; a figure is
the median over the rounds of (time of the contender / time of rgd.jax in the same round), with the quartiles.
Where the logits are donated, a fresh copy of them is made outside the measured time.
"""

import argparse
import json
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import rgd.jax

SIZES = "128x10,128x100,128x1000,1024x1000,1024x32000"


def formula(logits, labels):
    """RGD as a user writes it."""
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, None], axis=-1)[
        :, 0
    ]
    weights = jax.lax.stop_gradient(jnp.exp(jnp.minimum(losses, 1.0) / 2.0))
    return jnp.mean(weights * losses)


def plain_optax(logits, labels):
    """What the user has today: no re-weighting."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


CONTENDERS = {
    "rgd.jax": rgd.jax.cross_entropy,
    "rgd.jax, rust": lambda logits, labels: rgd.jax.cross_entropy(logits, labels, backend="rust"),
    "rgd.jax, jnp": lambda logits, labels: rgd.jax.cross_entropy(logits, labels, backend="jnp"),
    "jnp formula": formula,
    "optax (ERM)": plain_optax,
}


def seconds(step, logits, labels, donate):
    fresh = jax.block_until_ready(logits + 0) if donate else logits
    start = time.perf_counter()
    jax.block_until_ready(step(fresh, labels))
    return time.perf_counter() - start


def measure(rows, classes, dtype, donate, budget):
    logits = (2 * jax.random.normal(jax.random.key(0), (rows, classes))).astype(dtype)
    labels = jax.random.randint(jax.random.key(1), (rows,), 0, classes)
    donated = (0,) if donate else ()
    steps = {name: jax.jit(jax.value_and_grad(f), donate_argnums=donated) for name, f in CONTENDERS.items()}
    for step in steps.values():  # compile, and touch the memory
        seconds(step, logits, labels, donate)
        seconds(step, logits, labels, donate)
    times = {name: [] for name in steps}
    stop = time.perf_counter() + budget
    while time.perf_counter() < stop or len(times["rgd.jax"]) < 7:
        for name, step in steps.items():
            times[name].append(seconds(step, logits, labels, donate))
    result = {
        "rows": rows,
        "classes": classes,
        "dtype": dtype,
        "donated": donate,
        "rounds": len(times["rgd.jax"]),
    }
    result["milliseconds"] = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    result["ratio"] = {}
    for name, t in times.items():
        pairs = [a / b for a, b in zip(t, times["rgd.jax"], strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4)
        result["ratio"][name] = {"median": middle, "quartiles": [low, high]}
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=SIZES, help=f"rows x classes, by commas (default: {SIZES})")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each table row (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()

    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
        "threads": "XLA's pool",
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
    }
    print("  ".join(f"{key}: {value}" for key, value in machine.items()))
    print("value and gradient; ms of rgd.jax, then time of each contender over that of rgd.jax [quartiles]\n")
    names = [name for name in CONTENDERS if name != "rgd.jax"]
    print(
        f"{'size':>14} {'dtype':>9} {'donated':>8} {'rgd.jax':>10} "
        + " ".join(f"{name:>24}" for name in names)
    )
    results = []
    for size in arguments.sizes.split(","):
        rows, classes = (int(part) for part in size.split("x"))
        for donate in (False, True):
            result = measure(rows, classes, arguments.dtype, donate, arguments.seconds)
            results.append(result)
            cells = []
            for name in names:
                ratio = result["ratio"][name]
                low, high = ratio["quartiles"]
                cells.append(f"{ratio['median']:>9.2f} [{low:5.2f}, {high:5.2f}]")
            print(
                f"{size:>14} {arguments.dtype:>9} {'yes' if donate else 'no':>8} "
                f"{result['milliseconds']['rgd.jax']:>7.3f} ms " + " ".join(f"{cell:>24}" for cell in cells),
                flush=True,
            )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
