"""Re-weighted Gradient Descent for JAX: pure functions, under jit, grad, vmap, scan, shard_map and export.

    losses = per_example_loss(params, x, y)                  # (batch,)
    objective = rgd.jax.reweighted_mean(losses, tau=1.0)     # mean_i sg(w_i) * l_i

The weights are constants of the gradient. A weighting (`rgd.KL`, any other, or a subclass of your own of
`rgd.Weighting`) is a pytree, so that its numbers may be traced, vmapped over and scheduled. A weighting that
remembers takes and returns its state:

    state = weighting.init()
    objective, state = rgd.jax.reweighted_mean(losses, weighting, state=state)

Everything is plain `jax.numpy`, except the cross-entropy on a CPU, which is a Rust kernel where that is
faster (`rgd.jax.cross_entropy`). `rgd.jax.linear_cross_entropy` takes the inputs and the kernel of an output
layer, and never holds all logits.
"""

from rgd.jax import _pytrees  # pyright: ignore[reportUnusedImport] # noqa: F401 - registers the weightings
from rgd.jax.cross_entropy import cross_entropy
from rgd.jax.functional import reweighted_mean, sample_weights, value_and_grad, weight_stats
from rgd.jax.linear import linear_cross_entropy

__all__ = [
    "cross_entropy",
    "linear_cross_entropy",
    "reweighted_mean",
    "sample_weights",
    "value_and_grad",
    "weight_stats",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
