"""Equinox: regression of a function of which one part is rare, by `rgd.jax.value_and_grad` and optax.

    python examples/jax_equinox.py

One sample in ten comes from a fast wave on the right, the others from a slow one on the left. The same
network is trained with the mean squared error and re-weighted, over five seeds; the table has the error on
each part.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import rgd
import rgd.jax
from tqdm import trange

STEPS, BATCH = 4000, 64


def target(x):
    return jnp.where(x < 0, jnp.sin(2 * x), jnp.sin(6 * x))


def sample(key):
    side, place = jax.random.split(key)
    right = jax.random.bernoulli(side, 0.1, (BATCH, 1))
    x = jax.random.uniform(place, (BATCH, 1), minval=0.0, maxval=2.0)
    x = jnp.where(right, x, -x)
    return x, target(x)[:, 0]


def losses(model, x, y):
    """One loss a sample: no mean."""
    return jnp.square(jax.vmap(model)(x)[:, 0] - y)


def train(seed, weighting, progress):
    model = eqx.nn.MLP(1, 1, 64, 2, activation=jnp.tanh, key=jax.random.key(seed))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

    def step(carry, key):
        params, state = carry
        per_example = lambda params, x, y: losses(eqx.combine(params, static), x, y)  # noqa: E731
        value, grads = rgd.jax.value_and_grad(per_example, weighting=weighting)(params, *sample(key))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    carry = params, optimizer.init(params)
    for keys in jax.random.split(jax.random.key(seed + 100), STEPS).reshape(10, -1):
        carry, _ = run(carry, keys)
        progress.update()
    model = eqx.combine(carry[0], static)
    grid = jnp.linspace(0.0, 2.0, 500)[:, None]
    return [float(losses(model, x, target(x)[:, 0]).mean()) for x in (-grid, grid)]


def main(seeds=5):
    arms = {"mean squared error": rgd.ERM(), "RGD in a KL ball": rgd.KLBall(1.0)}
    results = {}
    with trange(len(arms) * seeds * 10, desc="training", unit="part") as progress:
        for name, weighting in arms.items():
            results[name] = jnp.array([train(seed, weighting, progress) for seed in range(seeds)])
    print(f"\n{'objective':>20} {'common part':>20} {'rare part':>20}   (squared error, {seeds} seeds)")
    for name, error in results.items():
        mean, spread = error.mean(0), error.std(0, ddof=1) / seeds**0.5
        print(f"{name:>20} " + " ".join(f"{m:>10.4f} +- {s:.4f}" for m, s in zip(mean, spread, strict=True)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
