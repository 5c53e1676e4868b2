"""The exact denoiser of a finite law over masks: what a perfectly trained network would return."""

import jax
import jax.numpy as jnp
import numpy as np

from entrust_jax.segdiff import schedule


def exact_denoiser(masks, weights, b, classes):
    """denoise(x_t, log_snr, condition) for P(y = masks[j]) = weights[j].

    masks [J, *S] integer, weights [J]. P(j | x_t) is proportional to weights[j] exp(alpha / sigma^2 <x_t,
    x0_j>), all scaled one-hot masks having the same norm; the logits are ln sum_j P(j | x_t) 1[y_j(u) = k],
    floored at 1e-12.
    """
    clean = schedule.scale_onehot(jnp.asarray(masks), classes, b)
    onehot = jax.nn.one_hot(jnp.asarray(masks), classes)
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32))

    def denoise(x, log_snr, condition):
        del condition
        alpha, sigma = schedule.alpha_sigma(log_snr)
        match = jnp.einsum("b...,j...->bj", x.reshape(x.shape[0], -1), clean.reshape(clean.shape[0], -1))
        posterior = jax.nn.softmax(log_weights[None] + (alpha / sigma**2)[:, None] * match)
        marginal = jnp.tensordot(posterior, onehot, axes=1)
        return jnp.log(jnp.maximum(marginal, 1e-12))

    return denoise


def discs(size, radii, centre=None):
    """Binary masks [len(radii), size, size] of concentric discs; radius 0 is the empty mask."""
    centre = (size - 1) / 2 if centre is None else centre
    grid = np.arange(size) - centre
    distance = np.hypot(grid[:, None], grid[None, :])
    return np.stack([(distance <= r) & (r > 0) for r in radii]).astype(np.int32)


def one_channel_presence(x, log_snr, mask, b):
    """Exact P(mask present | x_t) under equal odds, for a single +-b channel; x [n, *S]."""
    alpha, sigma = schedule.alpha_sigma(jnp.float32(log_snr))
    return jax.nn.sigmoid(alpha / sigma**2 * 2 * b * (x * mask[None]).reshape(x.shape[0], -1).sum(-1))
