"""Re-weighted Gradient Descent for JAX: pure functions, under jit, grad, vmap, scan, shard_map and export.

    losses = per_example_loss(params, x, y)                  # (batch,)
    objective = rgd.jax.reweighted_mean(losses, tau=1.0)     # mean_i sg(w_i) * l_i

The weights are constants of the gradient. A weighting (`rgd.KL`, `rgd.KLBall`) is a pytree, so that its
numbers may be traced, vmapped over and scheduled. Everything is plain `jax.numpy`, but for the cross-entropy
on a CPU, which is a Rust kernel where that is faster (`rgd.jax.cross_entropy`).
"""

from rgd.jax._cross_entropy import cross_entropy
from rgd.jax._objective import value_and_grad
from rgd.jax._weights import reweighted_mean, sample_weights, weight_stats

__all__ = ["cross_entropy", "reweighted_mean", "sample_weights", "value_and_grad", "weight_stats"]
