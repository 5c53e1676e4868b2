"""SegDiff's objective: pixel-wise cross-entropy of the predicted clean mask, at every noise level.

    L_diff = E_{lambda, eps} [ sum_u v(u) CE(l(u), y(u)) / sum_u v(u) ],      v(u) = 1 + beta kappa(u)

Cross-entropy is strictly proper, so its minimiser is the exact denoiser and the sampler converges to the true joint law
of the masks; weights that depend on the input alone (kappa does) leave that optimum where it is. Dice or class weights
would not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

BETA = 3.0
TERMINAL_SHARE = 0.25  # of the batch, trained at pure noise: the one-step marginal p_1
LOG_SNR_BINS = 6


def voxel_weight(body: Float[Array, "b *s"], kappa: Float[Array, "b *s"]) -> Float[Array, "b *s"]:
    """v(u) inside the body, 0 outside."""
    return body * (1 + BETA * jax.lax.stop_gradient(kappa))


def terminal_slots(key: Array, n: int) -> Bool[Array, " n"]:
    """A random quarter of the batch; not by slot order, for foreground slots come first."""
    count = max(1, round(TERMINAL_SHARE * n))
    return jax.random.permutation(key, n) < count


def bin_levels(low: float, high: float) -> Float[np.ndarray, " n"]:
    """lambda_min and the middles of the other bins of `log_snr_bins`: where validation looks at the same curve."""
    edges = np.linspace(low, high, LOG_SNR_BINS)
    return np.concatenate([[low], (edges[1:] + edges[:-1]) / 2]).astype(np.float32)


def log_snr_bins(
    value: Float[Array, " b"], log_snr: Float[Array, " b"], weight: Float[Array, " b"], low: float, high: float
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """(sum, count) of a per-case value by bins of log SNR, the first holding lambda_min itself."""
    width = (high - low) / (LOG_SNR_BINS - 1)
    index = jnp.where(log_snr <= low + 1e-3, 0, 1 + jnp.floor((log_snr - low) / width).astype(jnp.int32))
    onehot = jax.nn.one_hot(jnp.clip(index, 0, LOG_SNR_BINS - 1), LOG_SNR_BINS) * weight[:, None]
    return jnp.sum(onehot * value[:, None], axis=0), jnp.sum(onehot, axis=0)
