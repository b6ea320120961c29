"""What `returns=` asks of a call beside the loss: of the logits of each target, constants."""

# The types of jax leave members partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from rgd.jax._devices import pmax, psum

Extras = dict[str, jax.Array]


def extras_of(
    names: tuple[str, ...],
    logits: jax.Array,
    label: jax.Array,
    counted: jax.Array | None,
    *,
    vocab_axis: str | None = None,
    first_class: jax.Array | None = None,
) -> Extras:
    """The extras of these names, each of the shape (...), 0 where a row does not count.

    Args:
        names: Out of `rgd._extras.EXTRAS`.
        logits: (..., C), as the loss sees them.
        label: The class of each target, integers (...); of all devices' classes.
        counted: Which rows count, (...); None for all.
        vocab_axis: The mapped axis that the classes are spread over, or None.
        first_class: The first class of this device there.

    Returns:
        "entropy" and "logsumexp" in the accumulator's dtype, "correct" as bool.
    """
    logits = lax.stop_gradient(logits).astype(jnp.promote_types(logits.dtype, jnp.float32))
    own = jnp.max(logits, axis=-1)
    largest = pmax(own, vocab_axis)
    found: Extras = {}
    if "entropy" in names or "logsumexp" in names:
        shifted = logits - largest[..., None]
        exps = jnp.exp(shifted)
        total = psum(jnp.sum(exps, axis=-1), vocab_axis)
        log_sum = jnp.log(total)
        if "entropy" in names:
            dot = psum(jnp.sum(jnp.where(exps == 0, 0, exps * shifted), axis=-1), vocab_axis)
            # Rounding must not make the entropy of one sure class negative.
            found["entropy"] = jnp.maximum(log_sum - dot / total, 0)
        if "logsumexp" in names:
            found["logsumexp"] = jnp.where(jnp.isinf(largest), largest, largest + log_sum)
    if "correct" in names:
        first = jnp.argmax(logits, axis=-1)
        if first_class is not None:
            # The least class of those devices that have the largest logit.
            first = -pmax(
                jnp.where(own == largest, -(first + first_class), jnp.iinfo(first.dtype).min), vocab_axis
            )
        found["correct"] = (first == label) & ~jnp.isnan(largest)
    if counted is not None:
        found = {name: jnp.where(counted, one, jnp.zeros((), one.dtype)) for name, one in found.items()}
    return {name: found[name] for name in names}
