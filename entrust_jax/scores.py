"""Proper scores and the one way in which they are averaged: over the voxels of a case, then over cases with weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(logits: Float[Array, "*a k"], label: Int[Array, "*a"]) -> Float[Array, "*a"]:
    """-log softmax(logits)[label], in nats; 0 where the label is ignored (< 0)."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(log_p, jnp.maximum(label, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(label < 0, 0.0, -picked)


def case_mean(value: Float[Array, "b *s"], weight: Float[Array, "b *s"]) -> Float[Array, " b"]:
    """Weighted mean over the voxels of each case; 0 for a case without weight."""
    axes = tuple(range(1, value.ndim))
    return jnp.sum(weight * value, axis=axes) / jnp.maximum(jnp.sum(weight, axis=axes), 1e-6)


def over_cases(value: Float[Array, " b"], weight: Float[Array, " b"]) -> Float[Array, ""]:
    """sum_i w_i value_i / #{w_i > 0}: inside the per-case normalisation importance weights would cancel."""
    return jnp.sum(weight * value) / jnp.maximum(jnp.sum(weight > 0), 1)
