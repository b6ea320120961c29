"""Equinox: regression of a function of which one part is rare, by `rgd.jax.value_and_grad` and optax.

    python examples/jax_equinox.py

One sample in ten comes from a fast wave on the right, the others from a slow one on the left. The same
network is trained with the mean squared error and re-weighted, over five seeds; the table has the error on
each part. `python examples/jax_equinox.py 2 100` takes two seeds and 100 steps, a multiple of ten.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import rgd
import rgd.jax
from tqdm import trange

BATCH = 64


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


def train(seeds, weighting, steps, progress):
    """The error on each part, after the training of each seed."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    models = [eqx.nn.MLP(1, 1, 64, 2, activation=jnp.tanh, key=jax.random.key(s)) for s in range(seeds)]
    static = eqx.partition(models[0], eqx.is_inexact_array)[1]  # the same in all of them

    def step(carry, key):
        params, state = carry
        per_example = lambda params, x, y: losses(eqx.combine(params, static), x, y)  # noqa: E731
        value, grads = rgd.jax.value_and_grad(per_example, weighting=weighting)(params, *sample(key))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    results = []
    for seed, model in enumerate(models):
        params = eqx.filter(model, eqx.is_inexact_array)
        carry = params, optimizer.init(params)
        for keys in jax.random.split(jax.random.key(seed + 100), steps).reshape(10, -1):
            carry, _ = run(carry, keys)
            progress.update()
        trained = eqx.combine(carry[0], static)
        grid = jnp.linspace(0.0, 2.0, 500)[:, None]
        results.append([losses(trained, x, target(x)[:, 0]).mean() for x in (-grid, grid)])
    return jnp.array(results)


def main(seeds=5, steps=4000):
    arms = {"mean squared error": rgd.ERM(), "RGD in a KL ball": rgd.KLBall(1.0)}
    with trange(len(arms) * seeds * 10, desc="training", unit="part") as progress:
        results = {name: train(seeds, weighting, steps, progress) for name, weighting in arms.items()}
    print(f"\n{'objective':>20} {'common part':>20} {'rare part':>20}   (squared error, {seeds} seeds)")
    for name, error in results.items():
        mean, spread = error.mean(0), error.std(0, ddof=1) / seeds**0.5
        print(f"{name:>20} " + " ".join(f"{m:>10.4f} +- {s:.4f}" for m, s in zip(mean, spread, strict=True)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
