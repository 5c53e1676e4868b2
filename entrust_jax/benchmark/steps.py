"""The steps suite: what few steps and the scale b cost when the network makes no mistake.

An exact denoiser of a known law over masks stands in for the network. A disc of one of three radii is there with
probability .7; hypotheses should show it that often, each radius equally. And where on the noise scale the presence of
a structure can be read off the noisy mask, beside the rule ln(6.25 / (n b^2)) of `schedule.decision_log_snr`. Masks are
one-hot: n counts every pixel twice, and a single channel of scale b corresponds to b / sqrt(2).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer
from scipy import stats

from entrust_jax.segdiff import sampler, schedule
from entrust_jax.segdiff.sampler import Sampler

SCALES = {"1/sqrt 2": 1 / np.sqrt(2), ".3/sqrt 2": 0.3 / np.sqrt(2), ".1/sqrt 2": 0.1 / np.sqrt(2)}
STEPS = (1, 2, 4, 8, 16, 64)
SIZE, RADII, PRESENCE = 15, (2.0, 3.0, 4.0), 0.7
LAMBDA_MIN, LAMBDA_MAX = -12.0, 8.5
DRAWS = 4096
FOUND = stats.norm.cdf(-2.5)  # a structure is found when it is missed no more often than at d' = 5


def discs(size: int, radii: Sequence[float], centre: float | None = None) -> Integer[np.ndarray, "n h w"]:
    """Binary masks of concentric discs; radius 0 is the empty mask."""
    centre = (size - 1) / 2 if centre is None else centre
    grid = np.arange(size) - centre
    distance = np.hypot(grid[:, None], grid[None, :])
    return np.stack([(distance <= r) & (r > 0) for r in radii]).astype(np.int32)


def exact_denoiser(masks: Integer[np.ndarray, "j *s"], weights: Any, b: float, classes: int) -> Callable[..., Array]:
    """denoise(x_t, log_snr, condition) for P(y = masks[j]) = weights[j]: what a perfectly trained network returns.

    P(j | x_t) is proportional to weights[j] exp(alpha / sigma^2 <x_t, x0_j>), all scaled one-hot masks having the same
    norm; the logits are ln sum_j P(j | x_t) 1[y_j(u) = k], floored at 1e-12.
    """
    clean = schedule.scale_onehot(jnp.asarray(masks), classes, b)
    onehot = jax.nn.one_hot(jnp.asarray(masks), classes)
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32))

    def denoise(x: Array, log_snr: Array, condition: Any) -> Array:
        del condition
        alpha, sigma = schedule.alpha_sigma(log_snr)
        match = jnp.einsum("b...,j...->bj", x.reshape(x.shape[0], -1), clean.reshape(clean.shape[0], -1))
        posterior = jax.nn.softmax(log_weights[None] + (alpha / sigma**2)[:, None] * match)
        marginal = jnp.tensordot(posterior, onehot, axes=1)
        return jnp.log(jnp.maximum(marginal, 1e-12))

    return denoise


def frequencies(b: float, steps: int, method: str) -> dict[str, float]:
    """How often hypotheses show the disc, and the smallest and largest share of a radius among those that do."""
    masks = discs(SIZE, (0.0, *RADII))
    denoise = exact_denoiser(masks, [1 - PRESENCE, *[PRESENCE / len(RADII)] * len(RADII)], b, 2)
    chain = Sampler(b, LAMBDA_MIN, LAMBDA_MAX, steps, method)

    @jax.jit
    def draw(key: Array) -> Array:
        flat = jnp.zeros((1, SIZE, SIZE))
        options = {"sampler": chain, "classes": 2, "hypotheses": DRAWS, "chunk": 512}
        return sampler.sample(denoise, None, flat, jnp.array([0]), key, **options)[1][0]

    members = np.asarray(draw(jax.random.key(0)))
    distance = (np.argmax(members, -1)[:, None] != masks[None]).sum((2, 3))
    share = np.bincount(distance.argmin(1), minlength=len(masks)) / DRAWS
    radii = share[1:] / max(share[1:].sum(), 1e-9)
    return {
        "presence": float(1 - share[0]),
        "smallest": float(radii.min()),
        "largest": float(radii.max()),
    }


def decision(b: float, radius: float) -> dict[str, float]:
    """The log SNR from which the exact denoiser finds a structure in x_t without an image, and what the rule says."""
    mask = discs(SIZE, [radius])[0]
    denoise = exact_denoiser(np.stack([np.zeros_like(mask), mask]), [0.5, 0.5], b, 2)
    noise = jax.random.normal(jax.random.key(3), (1500, SIZE, SIZE, 2))
    x0 = schedule.scale_onehot(jnp.asarray(mask), 2, b)

    @jax.jit
    def missed(level: Float[Array, ""]) -> Array:
        levels = jnp.full((len(noise),), level)
        logits = denoise(schedule.diffuse(jnp.broadcast_to(x0, noise.shape), levels, noise), levels, None)
        return jnp.mean(logits[:, SIZE // 2, SIZE // 2, 1] < logits[:, SIZE // 2, SIZE // 2, 0])

    levels = np.arange(-6.0, 8.0, 0.125)
    shares = np.array([missed(jnp.float32(level)) for level in levels])
    n = int(mask.sum())
    return {
        "pixels": n,
        "measured": float(levels[np.argmax(shares <= FOUND)]),
        "rule": float(schedule.decision_log_snr(2 * n, b)),
    }


def table() -> str:
    """Both tables as markdown."""
    lines = [f"Presence of a disc that is there with probability {PRESENCE} ({DRAWS} hypotheses, exact denoiser;"]
    lines += ["in brackets the smallest and largest share of the three radii):", ""]
    lines += ["| steps | sampler | " + " | ".join(f"b = {name}" for name in SCALES) + " |", "|" + " --- |" * 5]
    for method in ("ddim", "dpmpp2m"):
        for steps in STEPS:
            found = [frequencies(b, steps, method) for b in SCALES.values()]
            cells = [f"{one['presence']:.3f} ({one['smallest']:.2f}, {one['largest']:.2f})" for one in found]
            lines.append(f"| {steps} | {method} | " + " | ".join(cells) + " |")
    lines += ["", "Log SNR from which a structure is found in the noisy mask alone:", ""]
    lines += ["| pixels | b | measured | rule |", "| --- | --- | --- | --- |"]
    for radius in (1.5, 3.0, 6.2):
        for name, b in SCALES.items():
            one = decision(b, radius)
            lines.append(f"| {one['pixels']:.0f} | {name} | {one['measured']:.2f} | {one['rule']:.2f} |")
    return "\n".join(lines) + "\n"
