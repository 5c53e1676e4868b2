"""The rungs of the ladder of calibrators, from the identity to the head: their equations, and `apply`.

Every rung starts from the same base, log p = sigmoid(2) log p_1 + (1 - sigmoid(2)) log pbar (normalised):
mostly the one-step prediction p_1, because the mean pbar of N hypotheses carries Monte-Carlo noise. All
log-likelihoods are in nats.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, PRNGKeyArray

RUNGS = ("identity", "temperature", "vector", "dirichlet", "local_temperature", "isotonic", "head")
MIX = 2.0
SLICES = 16  # in a call of `apply`
FEATURE_CLIP = 10.0
ISOTONIC_GRID = np.linspace(-14.0, 14.0, 281, dtype=np.float32)
HEAD_WIDTH, LOCAL_WIDTH = 16, 8

Params = dict[str, np.ndarray]


def start(one_step: Float[Array, "*s k"], mean: Float[Array, "*s k"]) -> Float[Array, "*s k"]:
    """The log-probabilities that every rung starts from, of log p_1 and log pbar."""
    share = jax.nn.sigmoid(MIX)
    return jax.nn.log_softmax(share * one_step + (1 - share) * mean, axis=-1)


def local_inputs(base: Float[Array, "*s k"]) -> Float[Array, "*s k+1"]:
    """log p and its entropy, which is all that local temperature scaling may see."""
    return jnp.concatenate([base, -jnp.sum(jnp.exp(base) * base, axis=-1, keepdims=True)], axis=-1)


def standardise(params: dict, x: Float[Array, "*s f"]) -> Float[Array, "*s f"]:
    """Features in standard deviations from their mean, by `center` and `scale` of params, at most 10."""
    one = (1,) * (x.ndim - 1) + (-1,)
    z = (x - params["center"].reshape(one)) * params["scale"].reshape(one)
    return jnp.clip(z, -FEATURE_CLIP, FEATURE_CLIP)


def _add(x: Array, bias: Array) -> Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def window_convolution(kernel: Array) -> Callable[[Array], Array]:
    """The 3x3 convolution at single pixels, whose zero-padded windows [p, 9, f] are given."""
    return lambda windows: windows.reshape((windows.shape[0], -1)) @ kernel.reshape((-1, kernel.shape[-1]))


def _image_convolution(kernel: Array) -> Callable[[Array], Array]:
    return lambda image: jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _log_not(log_p: Array, label: Array) -> Array:
    """log(1 - p[label]) without cancellation: the log-sum of the other classes."""
    classes = jnp.arange(log_p.shape[-1]).reshape((1,) * label.ndim + (-1,))
    others = jnp.where(classes == label[..., None], -jnp.inf, log_p)
    return jnp.maximum(jax.nn.logsumexp(others, axis=-1), -30.0)


def pick(log_p: Float[Array, "*s k"], label: Integer[Array, "*s"]) -> Float[Array, "*s"]:
    """The entry of each voxel's label."""
    return jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]


def head(
    params: dict, hidden: Array, one_step: Array, mean: Array, delivered: Array
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Equations of the head after its first convolution (ours):

        [theta, beta_1..K, omega, eps] = conv1x1(SiLU(conv1x1(SiLU(hidden))))                zero-initialised
        log p_mix = sigmoid(omega + 2) log p_1 + (1 - sigmoid(omega + 2)) log pbar
        p_cal = softmax(exp(theta) log p_mix + beta),  e = sigmoid(logit(1 - p_cal[yhat]) + eps)

    hidden [*s 16]: the first convolution's output; one_step, mean [*s k]: log p_1 and log pbar; delivered [*s]: yhat.
    Returns log p_cal [*s k], logit e [*s], (theta [*s], beta [*s k]).
    """
    h = jax.nn.silu(_add(hidden, params["bias0"]))
    h = jax.nn.silu(_add(h @ params["kernel1"], params["bias1"]))
    out = _add(h @ params["kernel2"], params["bias2"])
    classes = one_step.shape[-1]
    theta, beta, omega, eps = out[..., :1], out[..., 1 : 1 + classes], out[..., -2:-1], out[..., -1]
    share = jax.nn.sigmoid(omega + MIX)
    log_p = jax.nn.log_softmax(jnp.exp(theta) * (share * one_step + (1 - share) * mean) + beta, axis=-1)
    error = _log_not(log_p, delivered) - jnp.maximum(pick(log_p, delivered), -30.0) + eps
    return log_p, error, (theta[..., 0], beta)


def local_temperature(params: dict, hidden: Array, base: Array) -> Array:
    """softmax(log p / T(u)), T = exp(conv1x1(SiLU(conv3x3(log p, H)))) (Ding et al. 2021, arXiv
    2008.05105). hidden [*s 8]: the convolution's output; base [*s k]: log p. Returns log probabilities [*s k].
    """
    h = jax.nn.silu(_add(hidden, params["bias0"]))
    return jax.nn.log_softmax(base * jnp.exp(-_add(h @ params["kernel1"], params["bias1"])), axis=-1)


def affine(name: str, params: dict, base: Array) -> Array:
    """The rungs that see nothing but the pixel's own log-probabilities, [*s k] to [*s k].

    temperature: log p / T (Guo et al. 2017); vector: w_k log p_k + b_k (the same); dirichlet: W log p + b
    (Kull et al. 2019).
    """
    if name == "identity":
        return base
    if name == "temperature":
        return jax.nn.log_softmax(base * jnp.exp(-params["log_temperature"]), axis=-1)
    if name == "vector":
        one = (1,) * (base.ndim - 1) + (-1,)
        return jax.nn.log_softmax(_add(base * params["scale"].reshape(one), params["bias"]), axis=-1)
    return jax.nn.log_softmax(_add(base @ params["matrix"], params["bias"]), axis=-1)


def _isotonic(params: dict, base: Array) -> Array:
    """One-vs-rest isotonic maps of p_k, normalised to sum to one (Zadrozny and Elkan 2002)."""
    grid = jnp.asarray(ISOTONIC_GRID)
    columns = []
    for k in range(base.shape[-1]):
        logit = base[..., k] - _log_not(base, jnp.full(base.shape[:-1], k))
        columns.append(jnp.interp(logit, grid, params["value"][k]))
    p = jnp.stack(columns, axis=-1)
    return jnp.log(p) - jnp.log(jnp.sum(p, axis=-1, keepdims=True))


def initial(name: str, classes: int, inputs: int, key: PRNGKeyArray) -> dict[str, Array]:
    """Parameters with which the rung returns the base probabilities; inputs: channels that its network sees."""
    zeros = jnp.zeros
    if name == "temperature":
        return {"log_temperature": zeros(())}
    if name == "vector":
        return {"scale": jnp.ones(classes), "bias": zeros(classes)}
    if name == "dirichlet":
        return {"matrix": jnp.eye(classes), "bias": zeros(classes)}
    first, second = jax.random.split(key)
    width = HEAD_WIDTH if name == "head" else LOCAL_WIDTH
    params = {
        "kernel0": jax.random.normal(first, (3, 3, inputs, width)) / np.sqrt(9 * inputs),
        "bias0": zeros(width),
    }
    if name == "local_temperature":
        return params | {"kernel1": zeros((width, 1)), "bias1": zeros(1)}
    return params | {
        "kernel1": jax.random.normal(second, (width, width)) / np.sqrt(width),
        "bias1": zeros(width),
        "kernel2": zeros((width, classes + 3)),
        "bias2": zeros(classes + 3),
    }


@functools.partial(jax.jit, static_argnames="name")
def _apply(
    name: str, params: dict, inputs: Array, one_step: Array, mean: Array, delivered: Array
) -> tuple[Array, Array]:
    base = start(one_step, mean)
    if name == "head":
        hidden = _image_convolution(params["kernel0"])(standardise(params, inputs))
        log_p, error, _ = head(params, hidden, one_step, mean, delivered)
        return jnp.exp(log_p), jax.nn.sigmoid(error)
    if name == "local_temperature":
        hidden = _image_convolution(params["kernel0"])(standardise(params, local_inputs(base)))
        log_p = local_temperature(params, hidden, base)
    elif name == "isotonic":
        log_p = _isotonic(params, base)
    else:
        log_p = affine(name, params, base)
    return jnp.exp(log_p), jnp.exp(_log_not(log_p, delivered))


def apply(
    name: str,
    params: Params,
    inputs: Float[np.ndarray, "n h w f"],
    one_step: Float[np.ndarray, "n h w k"],
    mean: Float[np.ndarray, "n h w k"],
    delivered: Integer[np.ndarray, "n h w"],
) -> tuple[Float[np.ndarray, "n h w k"], Float[np.ndarray, "n h w"]]:
    """Calibrated probabilities p_cal and the probability e that the delivered mask is wrong, of new slices.

    inputs: `pixels.features` (only the head reads them); one_step, mean: log-probabilities. Rungs without an error
    output give e = 1 - p_cal[yhat]. Compiled once per slice shape: slices go through in groups of 16.

    Raises ValueError for an unknown rung, or features that the head was not fitted on.
    """
    if name not in RUNGS:
        raise ValueError(f"unknown calibrator {name!r}: one of {', '.join(RUNGS)}")
    if name == "head" and inputs.shape[-1] != len(params["center"]):
        raise ValueError(f"the head was fitted on {len(params['center'])} features, got {inputs.shape[-1]}")
    if name != "head":
        inputs = inputs[..., :0]
    arrays = [np.asarray(a, np.float32) for a in (inputs, one_step, mean)] + [np.asarray(delivered, np.int32)]
    probability, error = np.empty(one_step.shape, np.float32), np.empty(delivered.shape, np.float32)
    for first in range(0, len(delivered), SLICES):
        part = [a[first : first + SLICES] for a in arrays]
        size = len(part[0])
        part = [np.pad(a, [(0, SLICES - size)] + [(0, 0)] * (a.ndim - 1)) for a in part]
        p, e = _apply(name, params, *part)
        probability[first : first + size], error[first : first + size] = np.asarray(p)[:size], np.asarray(e)[:size]
    return probability, error
