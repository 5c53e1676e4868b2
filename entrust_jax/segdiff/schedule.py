"""The forward process: a Gaussian diffusion on scaled one-hot masks, its noise schedule and its input scale.

Variance preserving, described by the log signal-to-noise ratio lambda = ln(alpha^2 / sigma^2):

    x0 = b (2 onehot(y) - 1),   x_t = alpha x0 + sigma eps,   alpha^2 = sigmoid(lambda),   sigma^2 =
    sigmoid(-lambda)

"Analog" one-hot targets: Chen, Zhang, Hinton, arXiv 2208.04202. The effect of the scale b: Chen, arXiv
2301.10972.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

# Discriminability d' at which a structure's presence can be read off x_t; 2 alpha b sqrt(n) / sigma = 5 gives
# 6.25.
_DECISION_CONSTANT = 6.25


def _angle(log_snr: float) -> float:
    """u' in (0, 1) with log_snr = -2 ln tan(pi u' / 2)."""
    return 2 / math.pi * math.atan(math.exp(-log_snr / 2))


def log_snr(u: Float[Array, "*n"], lambda_min: float, lambda_max: float) -> Float[Array, "*n"]:
    """Cosine schedule: log SNR in nats at time u in [0, 1]; u = 0 gives lambda_max (data), u = 1 lambda_min
    (noise).

    lambda = -2 ln tan(pi u' / 2), with u' an affine map of u so that lambda covers exactly [lambda_min,
    lambda_max].
    """
    low, high = _angle(lambda_max), _angle(lambda_min)
    value = -2 * jnp.log(jnp.tan(0.5 * jnp.pi * (low + (high - low) * u)))
    return jnp.clip(value, lambda_min, lambda_max)  # tan is steep near pi / 2: float32 would overshoot by 1e-4


def alpha_sigma(log_snr: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """(alpha, sigma) of the variance-preserving process; by log-sigmoid, so that no lambda overflows."""
    return jnp.exp(0.5 * jax.nn.log_sigmoid(log_snr)), jnp.exp(0.5 * jax.nn.log_sigmoid(-log_snr))


def stratified(key: PRNGKeyArray, n: int, lambda_min: float, lambda_max: float) -> Float[Array, " n"]:
    """n log SNRs (nats) at times u_i = (u_0 + i / n) mod 1 with one uniform u_0: each is cosine distributed,
    together they cover the range evenly (low-discrepancy times, Kingma et al., arXiv 2107.00630)."""
    u = (jax.random.uniform(key) + jnp.arange(n, dtype=jnp.float32) / n) % 1.0
    return log_snr(u, lambda_min, lambda_max)


def grid(steps: int, lambda_min: float, lambda_max: float) -> np.ndarray:
    """The sampling grid: steps + 1 log SNRs (float64), from lambda_min up to lambda_max, uniform in u'.

    The last point is where the last step leads; it is never evaluated.
    """
    u = np.linspace(_angle(lambda_min), _angle(lambda_max), steps + 1)
    values = -2 * np.log(np.tan(0.5 * np.pi * u))
    values[0], values[-1] = lambda_min, lambda_max
    return values


def scale_onehot(label: Int[Array, "*s"], classes: int, b: float) -> Float[Array, "*s k"]:
    """Clean sample x0 = b (2 onehot(label) - 1) in {-b, b}^classes; 0 where the label is negative
    (ignored)."""
    x0 = b * (2 * jax.nn.one_hot(label, classes, dtype=jnp.float32) - 1)
    return jnp.where(label[..., None] >= 0, x0, 0.0)


def per_case(value: Float[Array, " b"], ndim: int) -> Float[Array, "b ..."]:
    """Appends singleton axes to a value per case until it has ndim axes, to scale arrays [b, *s, k]."""
    return value.reshape(value.shape + (1,) * (ndim - 1))


def diffuse(
    x0: Float[Array, "b *s k"], log_snr: Float[Array, " b"], eps: Float[Array, "b *s k"]
) -> Float[Array, "b *s k"]:
    """x_t = alpha x0 + sigma eps at one log SNR per case."""
    alpha, sigma = alpha_sigma(log_snr)
    return per_case(alpha, x0.ndim) * x0 + per_case(sigma, x0.ndim) * eps


def input_scale(log_snr: Float[Array, "*n"], b: float) -> Float[Array, "*n"]:
    """1 / sqrt(alpha^2 b^2 + sigma^2): times x_t it has unit second moment at every log SNR (where labels are
    known)."""
    return jax.lax.rsqrt(jax.nn.sigmoid(log_snr) * b**2 + jax.nn.sigmoid(-log_snr))


def own_evidence(x_t: Float[Array, "b *s k"], log_snr: Float[Array, " b"], b: float) -> Float[Array, "b *s k"]:
    """What a voxel's own noisy value says of its class, as logits: 2 alpha b x_t / sigma^2.

    Noise is independent given the mask, so P(y_u = k | x_t) is proportional to
    P(y_u = k | x_t elsewhere) p(x_t(u) | y_u = k), and log p(x_t(u) | y_u = k) is this up to a constant in k: exact,
    whatever the law of the masks. Equation: ours.
    """
    alpha, sigma = alpha_sigma(log_snr)
    return per_case(2 * alpha * b / jnp.square(sigma), x_t.ndim) * x_t


def decision_log_snr(n: Float[Array, "*n"] | float | int, b: float) -> Float[Array, "*n"]:
    """Log SNR at which a structure of n independent mask values is decided: ln(6.25 / (n b^2)) (ours).

    Above it the presence of the structure can be read off x_t without looking at the image, and training
    teaches copying. n counts pixels times the channels that carry them: with two one-hot channels it is twice
    the area.
    """
    return jnp.log(_DECISION_CONSTANT / (jnp.asarray(n, jnp.float32) * b**2))
