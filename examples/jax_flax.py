"""Flax NNX: a classifier of long-tailed data, trained with and without re-weighting.

    python examples/jax_flax.py

Ten Gaussian classes, the commonest with 500 training samples and the rarest with 5. The same network is
trained by plain cross-entropy and by `rgd.jax.cross_entropy`, over five seeds; the table has the accuracy
on a balanced test set, and that of the worst class. `python examples/jax_flax.py 2 50` takes two seeds and 50
steps.
"""

import sys

import jax
import jax.numpy as jnp
import optax
import rgd
import rgd.jax
from flax import nnx
from tqdm import trange

CLASSES, FEATURES, BATCH = 10, 16, 128
COUNTS = [round(500 * 0.01 ** (k / (CLASSES - 1))) for k in range(CLASSES)]


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(FEATURES, 32, rngs=rngs)
        self.out = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def sample(seed, labels):
    centres = 1.2 * jax.random.normal(jax.random.key(0), (CLASSES, FEATURES))
    return centres[labels] + 1.5 * jax.random.normal(jax.random.key(seed), (len(labels), FEATURES))


@nnx.jit  # the numbers of a weighting are traced: another tau, as of a schedule, compiles nothing
def train_step(model, optimizer, x, y, weighting):
    def loss_fn(model):
        return rgd.jax.cross_entropy(model(x), y, weighting=weighting)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def train(seed, weighting, steps, progress):
    model = Classifier(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(3e-3, steps)), wrt=nnx.Param)
    labels = jnp.repeat(jnp.arange(CLASSES), jnp.array(COUNTS))
    inputs = sample(seed, labels)
    for step in range(steps):
        batch = jax.random.choice(jax.random.key(step), len(labels), (BATCH,))
        train_step(model, optimizer, inputs[batch], labels[batch], weighting)
        progress.update()
    labels = jnp.tile(jnp.arange(CLASSES), 400)
    correct = jnp.argmax(model(sample(1000 + seed, labels)), axis=-1) == labels
    return float(correct.mean()), float(correct.reshape(400, CLASSES).mean(0).min())


def main(seeds=5, steps=300):
    arms = {"cross-entropy": rgd.ERM(), "RGD": rgd.KL(tau=3.0)}
    results = {}
    with trange(len(arms) * seeds * steps, desc="training", unit="step") as progress:
        for name, weighting in arms.items():
            results[name] = jnp.array([train(seed, weighting, steps, progress) for seed in range(seeds)])
    print(f"\n{'loss':>16} {'accuracy':>16} {'worst class':>16}   (mean and standard error of {seeds} seeds)")
    for name, accuracy in results.items():
        mean, error = accuracy.mean(0), accuracy.std(0, ddof=1) / seeds**0.5
        print(
            f"{name:>16} "
            + " ".join(f"{100 * m:>7.1f} +- {100 * e:.1f} %" for m, e in zip(mean, error, strict=True))
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
