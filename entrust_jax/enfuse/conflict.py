"""Conflict between modalities: opposing evidence, free of the prior.

What modality m says beyond the base rate pi is its weight of evidence (Good 1950), the posterior that it would give
under a flat prior; two modalities conflict where their supports s oppose each other:

    q_mk = (p_mk / pi_k) / sum_j (p_mj / pi_j)          s_mk = max(0, (q_mk - 1/K) / (1 - 1/K))
    d = s_m - s_n      kappa_mn = mu_m mu_n max(0, -sum_{k<l} d_k d_l)      kappa = max_{m<n} kappa_mn

For K = 2 kappa_mn is Dempster's conflict mass between two simple support functions; for K > 2 that mass less the mean
conflict of each modality with itself. Equations: ours.
"""

import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

TAU = 0.1  # kappa at which the gate is at 1 - 1/e
FLOOR = 1e-6  # probabilities below it are rounded up before a logarithm


def pairs(modalities: int) -> np.ndarray:
    """Pairs m < n in lexicographic order: int [P, 2], P = M (M - 1) / 2."""
    return np.array(list(itertools.combinations(range(modalities), 2)), np.int32).reshape(-1, 2)


def support(posterior: Float[Array, "b m *s k"], prior: Float[Array, "b *s k"]) -> Float[Array, "b m *s k"]:
    """s_mk in [0, 1], with sum_k s_mk <= 1; zero where the modality says no more than the prior."""
    k = posterior.shape[-1]
    ratio = posterior / prior[:, None]
    q = ratio / jnp.sum(ratio, axis=-1, keepdims=True)
    return jnp.maximum(0.0, (q - 1 / k) / (1 - 1 / k))


def pair_conflict(
    s: Float[Array, "b m *s k"], availability: Float[Array, "b m *s"]
) -> tuple[Float[Array, "b p *s"], Float[Array, "b *s k"]]:
    """kappa_mn in [0, 1] for every pair, and how contested each class is: sum_mn max(0, -d_k sum_{l!=k} d_l)."""
    index = pairs(s.shape[1])
    d = s[:, index[:, 0]] - s[:, index[:, 1]]
    both = availability[:, index[:, 0]] * availability[:, index[:, 1]]
    total = jnp.sum(d, axis=-1)
    # -d_k sum_{l!=k} d_l; half its sum is kappa_mn, with an exact zero where both support one class (|d|^2 - (sum d)^2
    # leaves a rounding error there).
    against = -d * (total[..., None] - d)
    kappa = both * jnp.maximum(0.0, 0.5 * jnp.sum(against, axis=-1))
    return kappa, jnp.sum(both[..., None] * jnp.maximum(0.0, against), axis=1)


def strongest(kappa_pairs: Float[Array, "b p *s"]) -> Float[Array, "b *s"]:
    """kappa = max over the pairs; zero with a single modality."""
    return jnp.max(kappa_pairs, axis=1, initial=0.0)


def gate(kappa: Float[Array, "*a"], rho: Float[Array, ""] | float = 0.0) -> Float[Array, "*a"]:
    """g = rho + (1 - rho)(1 - exp(-kappa / tau)); exactly 0 where kappa and rho are."""
    return rho + (1 - rho) * (1 - jnp.exp(-kappa / TAU))


def entropy(p: Float[Array, "*a k"]) -> Float[Array, "*a"]:
    """-sum_k p_k log p_k, in nats."""
    return -jnp.sum(p * jnp.log(jnp.maximum(p, FLOOR)), axis=-1)


def jensen_shannon(posterior: Float[Array, "b m *s k"], availability: Float[Array, "b m *s"]) -> Float[Array, "b *s"]:
    """H(mean_m p_m) - mean_m H(p_m) over the available modalities, in bits.

    An auxiliary channel, never the conflict map: it also fires where one modality merely knows nothing.
    """
    weight = availability / (jnp.sum(availability, axis=1, keepdims=True) + 1e-9)
    mean = jnp.sum(weight[..., None] * posterior, axis=1)
    inner = jnp.sum(weight * entropy(posterior), axis=1)
    return jnp.maximum(0.0, entropy(mean) - inner) / jnp.log(2.0)
