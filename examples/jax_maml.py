"""MAML on sinusoid regression, with RGD over the tasks of a meta-batch.

    python examples/jax_maml.py

Each task is a sine wave of its own amplitude and phase. The inner loop takes one gradient step on ten
points of it; the outer loop minimises the loss after that step. `jax.vmap` makes that loss a vector, one
for each task of the meta-batch, and RGD weights the hard tasks up. The table has the loss after adaptation
on new tasks: the mean, and the mean of the worst tenth. `python examples/jax_maml.py 2 100` takes two seeds
and 100 steps, a multiple of ten.

References:
    Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017, section 5.1;
    Kumar et al., arXiv 2306.09222.
"""

import sys

import jax
import jax.numpy as jnp
import optax
import rgd
import rgd.jax
from tqdm import trange

META_BATCH, POINTS, INNER_RATE = 25, 10, 0.01


def init(key, sizes=(1, 40, 40, 1)):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def predict(params, x):
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = params[-1]
    return (x @ weight + bias)[:, 0]


def task(key):
    """Points to adapt on, and points to be judged on, of a sine wave."""
    amplitude, phase, place = jax.random.split(key, 3)
    amplitude = jax.random.uniform(amplitude, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase, maxval=jnp.pi)
    x = jax.random.uniform(place, (2, POINTS, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x[..., 0] - phase)
    return (x[0], y[0]), (x[1], y[1])


def loss(params, x, y):
    return jnp.mean(jnp.square(predict(params, x) - y))


def adapted_loss(params, key):
    """The loss of one task after one step on it."""
    support, query = task(key)
    grads = jax.grad(loss)(params, *support)
    return loss(jax.tree.map(lambda p, g: p - INNER_RATE * g, params, grads), *query)


def task_losses(params, keys):
    return jax.vmap(adapted_loss, in_axes=(None, 0))(params, keys)


judge = jax.jit(task_losses)


def train(seeds, weighting, steps, progress):
    """The mean loss on new tasks, and that of the worst tenth, after the training of each seed."""
    optimizer = optax.adam(1e-3)

    def step(carry, key):
        params, state = carry
        keys = jax.random.split(key, META_BATCH)
        value, grads = rgd.jax.value_and_grad(task_losses, weighting=weighting)(params, keys)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    results = []
    for seed in range(seeds):
        params = init(jax.random.key(seed))
        carry = params, optimizer.init(params)
        for keys in jax.random.split(jax.random.key(seed + 100), steps).reshape(10, -1):
            carry, _ = run(carry, keys)
            progress.update()
        judged = jnp.sort(judge(carry[0], jax.random.split(jax.random.key(9), 1000)))
        results.append([judged.mean(), judged[-100:].mean()])
    return jnp.array(results)


def main(seeds=3, steps=2000):
    arms = {"MAML": rgd.ERM(), "MAML + RGD": rgd.KL(tau=5.0)}
    with trange(len(arms) * seeds * 10, desc="meta-training", unit="part") as progress:
        results = {name: train(seeds, weighting, steps, progress) for name, weighting in arms.items()}
    print(f"\n{'objective':>12} {'all tasks':>18} {'worst tenth':>18}   (loss after one step, {seeds} seeds)")
    for name, values in results.items():
        mean, error = values.mean(0), values.std(0, ddof=1) / seeds**0.5
        print(f"{name:>12} " + " ".join(f"{m:>9.3f} +- {e:.3f}" for m, e in zip(mean, error, strict=True)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
