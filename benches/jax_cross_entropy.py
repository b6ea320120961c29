"""The re-weighted cross-entropy in JAX on the CPU, value and gradient, against what a user would write.

    python benches/jax_cross_entropy.py [--json result.json] [--sizes 128x10,1024x32000] [--dtype bfloat16]

`--write` writes the table of docs/speed.md.

Each contender is one jitted `value_and_grad` with respect to the logits. In each round every one has its
turn, in a random order, since the memory that one frees is the memory that the next one gets. A figure is the
median over the rounds of (time of the contender / time of rgd.jax in the same round), with the quartiles.
Where the logits are donated, a fresh copy of them is made outside the measured time.
"""

import argparse
import importlib.metadata
import random
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import rgd.jax
from _report import machine, processor, publish, write

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
    turns = random.Random(0)
    stop = time.perf_counter() + budget
    while time.perf_counter() < stop or len(times["rgd.jax"]) < 7:
        for name, step in turns.sample(list(steps.items()), len(steps)):
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


def cell(ratio):
    """A ratio with its quartiles."""
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f}-{high:.2f})"


def table(results):
    """The table of docs/speed.md: the time of rgd.jax over that of each other."""
    version = importlib.metadata.version("jax")
    names = [name for name in CONTENDERS if name != "rgd.jax"]
    lines = [
        f"Value and gradient, jitted, on {machine()['cores']} cores of an {processor()}, jax {version}:",
        "the time of each contender over that of `rgd.jax.cross_entropy`, median of rounds, with quartiles.",
        "Above 1, `rgd.jax` is faster. `make bench BENCH=benches/jax_cross_entropy.py` measures it.",
        "",
        "| logits | dtype | donated | rgd.jax, ms | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for result in results:
        size, donated = (result["rows"], result["classes"]), "yes" if result["donated"] else "no"
        lines.append(
            f"| {size} | {result['dtype']} | {donated} | {result['milliseconds']['rgd.jax']:.3f} | "
            + " | ".join(cell(result["ratio"][name]) for name in names)
            + " |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=SIZES, help=f"rows x classes, by commas (default: {SIZES})")
    parser.add_argument("--dtype", default="float32,bfloat16", help="by commas (default: float32,bfloat16)")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each table row (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--write", action="store_true", help="also write the table of docs/speed.md")
    arguments = parser.parse_args()

    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes.split(",")]
    results = [
        measure(rows, classes, dtype, donate, arguments.seconds)
        for rows, classes in sizes
        for dtype in arguments.dtype.split(",")
        for donate in (False, True)
    ]
    print(table(results))
    if arguments.json:
        write(arguments.json, results)
    if arguments.write:
        publish("docs/speed.md", "jax", table(results), results)


if __name__ == "__main__":
    main()
