"""Sampling of segmentation hypotheses from a denoiser, and its one-step estimate of the same marginal.

The denoiser is any callable denoise(x_t [b, *s, k], log_snr [b], condition) -> logits [b, *s, k] with
softmax(logits) = P(y_u = class | x_t, condition), so that D = b (2 softmax(logits) - 1) = E[x0 | x_t,
condition] is the exact denoiser and eps = (x_t - alpha D) / sigma the exact noise estimate. From t to s, less
noisy:

    ddim, ancestral   x_s = alpha_s D + sqrt(sigma_s^2 - tau^2) eps + tau z,
                      tau = eta sigma_s sqrt(1 - e^(lambda_t - lambda_s))
    dpmpp2m           x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) Dbar,   h = (lambda_s - lambda_t) / 2,
                      Dbar = (1 + 1 / 2r) D_t - 1 / 2r D_previous,   r = h_previous / h,
                      the first step of first order

DDIM: Song, Meng, Ermon, arXiv 2010.02502; DPM-Solver++(2M): Lu et al., arXiv 2211.01095. eta may differ from
pixel to pixel: in dx = [f - g^2 / 2 (1 + A) score] dt + g A^(1/2) dw the marginals do not depend on the
diagonal A as long as A does not depend on x (ours). Hence eta = eta_min + (1 - eta_min) (1 - exp(-conflict /
tau)) spends randomness where the modalities disagree and leaves the law of the hypotheses as it is.

Everything is pure, and the noise of hypothesis n of case c depends on (key, c, n) alone: neither on the
batch, nor on the devices, nor on how many hypotheses are drawn at once. Batch items with the same case number
(the slices of one scan) share one noise field.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from entrust_jax.errors import UserError
from entrust_jax.segdiff import schedule

Denoise = Callable[[Float[Array, "b *s k"], Float[Array, " b"], Any], Float[Array, "b *s k"]]

METHODS = ("ancestral", "ddim", "dpmpp2m")
CONFLICT_SCALE = 0.1  # conflict at which 1 - 1/e of what eta_min leaves is fresh noise

# Noise fields of one member of one case, told apart by a last fold_in; step i of the chain uses _FIRST_STEP +
# i.
_START, _ONE_STEP, _FIRST_STEP = 0, 1, 2


@dataclass(frozen=True)
class Sampler:
    """What defines the reverse chain; hashable, hence usable as a static argument of jit.

    b: scale of the one-hot masks; lambda_min, lambda_max: range of the log SNR (nats); steps: denoiser
    evaluations per hypothesis; method: 'ancestral' (eta = 1), 'ddim' (eta map) or 'dpmpp2m' (deterministic);
    eta_min: of the map eta = eta_min + (1 - eta_min) (1 - exp(-conflict / .1)).

    Raises UserError where a value makes no sense.
    """

    b: float
    lambda_min: float
    lambda_max: float
    steps: int
    method: str = "ddim"
    eta_min: float = 0.2

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"diffusion.sampler is {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.steps < 1:
            raise UserError(f"diffusion.steps is {self.steps}: at least 1 step is needed")
        if not self.lambda_min < self.lambda_max:
            raise UserError(
                f"diffusion.lambda_min is {self.lambda_min}: it must lie below lambda_max ({self.lambda_max})"
            )
        if self.b <= 0 or not 0 <= self.eta_min <= 1:
            raise UserError(f"diffusion: b ({self.b}) must be positive, eta_min ({self.eta_min}) in [0, 1]")


class Transitions(NamedTuple):
    """Coefficients of the steps from t = grid[i] to s = grid[i + 1], one entry per step."""

    index: Int[Array, " steps"]
    log_snr: Float[Array, " steps"]
    alpha: Float[Array, " steps"]
    sigma: Float[Array, " steps"]
    alpha_next: Float[Array, " steps"]
    sigma_next: Float[Array, " steps"]
    variance: Float[Array, " steps"]  # sigma_s^2 (1 - e^(lambda_t - lambda_s)): tau^2 at eta = 1
    shrink: Float[Array, " steps"]  # 1 - e^-h
    second_order: Float[Array, " steps"]  # 1 / 2r, 0 in the first step


def transitions(sampler: Sampler) -> Transitions:
    """The static table that the reverse chain scans over; computed in float64 (differences of near-equal
    terms)."""
    values = schedule.grid(sampler.steps, sampler.lambda_min, sampler.lambda_max)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-values))), np.sqrt(1 / (1 + np.exp(values)))
    gap = np.diff(values)
    second_order = np.concatenate([[0.0], gap[1:] / (2 * gap[:-1])])
    columns = (
        values[:-1],
        alpha[:-1],
        sigma[:-1],
        alpha[1:],
        sigma[1:],
        -(sigma[1:] ** 2) * np.expm1(-gap),
        -np.expm1(-gap / 2),
        second_order,
    )
    return Transitions(jnp.arange(sampler.steps), *(jnp.asarray(column, jnp.float32) for column in columns))


def eta_map(conflict: Float[Array, "b *s"], sampler: Sampler) -> Float[Array, "b *s"]:
    """Share of fresh noise per pixel: 1 for 'ancestral', eta_min + (1 - eta_min) (1 - exp(-conflict / .1))
    for 'ddim'."""
    if sampler.method == "ancestral":
        return jnp.ones_like(conflict)
    return sampler.eta_min - (1 - sampler.eta_min) * jnp.expm1(-conflict / CONFLICT_SCALE)


def advance(
    x: Float[Array, "b *s k"],
    mean: Float[Array, "b *s k"],
    previous: Float[Array, "b *s k"],
    eta: Float[Array, "b *s"],
    noise: Callable[[], Float[Array, "b *s k"]],
    step: Transitions,
    sampler: Sampler,
) -> Float[Array, "b *s k"]:
    """One step t -> s: x_t, D(x_t), the D of the step before, eta, a draw of N(0, I) and one row of the table
    -> x_s.

    noise is called only by the methods that use it.
    """
    if sampler.method == "dpmpp2m":
        extrapolated = (1 + step.second_order) * mean - step.second_order * previous
        return step.sigma_next / step.sigma * x + step.alpha_next * step.shrink * extrapolated
    fresh = jnp.square(eta)[..., None] * step.variance
    eps = (x - step.alpha * mean) / step.sigma
    return step.alpha_next * mean + jnp.sqrt(jnp.square(step.sigma_next) - fresh) * eps + jnp.sqrt(fresh) * noise()


def _member_keys(key: PRNGKeyArray, case: Int[Array, " b"], number: Int[Array, ""] | int) -> Key[Array, " b"]:
    return jax.vmap(lambda c: jax.random.fold_in(jax.random.fold_in(key, c), number))(case)


def _noise(keys: Key[Array, " b"], field: Int[Array, ""] | int, shape: tuple[int, ...]) -> Float[Array, "b *s k"]:
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, field), shape, jnp.float32))(keys)


def _mean(p: Float[Array, "b *s k"], sampler: Sampler) -> Float[Array, "b *s k"]:
    return sampler.b * (2 * p - 1)


def hypothesis(
    denoise: Denoise,
    condition: Any,
    conflict: Float[Array, "b *s"],
    case: Int[Array, " b"],
    key: PRNGKeyArray,
    number: Int[Array, ""] | int,
    *,
    sampler: Sampler,
    classes: int,
) -> Float[Array, "b *s k"]:
    """Hypothesis `number` of every case: the last step's softmax probabilities after sampler.steps
    evaluations.

    conflict in [0, 1] steers eta; case holds the scans' stable numbers.
    """
    shape = (*conflict.shape[1:], classes)
    keys = _member_keys(key, case, number)
    eta = eta_map(conflict, sampler)

    def step(carry, row):
        x, previous = carry
        p = jax.nn.softmax(denoise(x, jnp.broadcast_to(row.log_snr, case.shape), condition))
        noise = functools.partial(_noise, keys, _FIRST_STEP + row.index, shape)
        x = advance(x, _mean(p, sampler), _mean(previous, sampler), eta, noise, row, sampler)
        return (x, p), None

    # One scan over all steps, the x of the last one unused, keeps a single copy of the denoiser in the
    # program: a copy after the scan would double the compilation.
    start = _noise(keys, _START, shape)
    (_, p), _ = jax.lax.scan(step, (start, jnp.full_like(start, 1 / classes)), transitions(sampler))
    return p


def one_step(
    denoise: Denoise,
    condition: Any,
    case: Int[Array, " b"],
    key: PRNGKeyArray,
    *,
    sampler: Sampler,
    shape: tuple[int, ...],
    classes: int,
    draws: int = 4,
) -> Float[Array, "b *s k"]:
    """p_1: the mean over `draws` of softmax(denoise(eps, lambda_min)), an estimate of the marginal P(y_u =
    class | condition).

    By the tower property it equals the mean of the hypotheses up to Monte Carlo error. shape is *s. The same
    key gives the same noise for another condition, so that differences between conditions carry no noise of
    their own.
    """
    level = jnp.full(case.shape, sampler.lambda_min, jnp.float32)

    def draw(number):
        x = _noise(_member_keys(key, case, number), _ONE_STEP, (*shape, classes))
        return jax.nn.softmax(denoise(x, level, condition))

    return jnp.mean(jax.vmap(draw)(jnp.arange(draws)), axis=0)


def sample(
    denoise: Denoise,
    condition: Any,
    conflict: Float[Array, "b *s"],
    case: Int[Array, " b"],
    key: PRNGKeyArray,
    *,
    sampler: Sampler,
    classes: int,
    hypotheses: int,
    chunk: int | None = None,
) -> tuple[Float[Array, "b *s k"], Float[Array, "b n *s k"]]:
    """(p_1, hypotheses): the one-step probabilities and N i.i.d. hypotheses, as softmax probabilities of the
    last step.

    The condition is shared by all hypotheses, never copied. chunk bounds the memory: so many hypotheses at a
    time.
    """

    def draw(number):
        return hypothesis(denoise, condition, conflict, case, key, number, sampler=sampler, classes=classes)

    numbers = jnp.arange(hypotheses)
    members = jax.vmap(draw)(numbers) if chunk is None else jax.lax.map(draw, numbers, batch_size=chunk)
    first = one_step(denoise, condition, case, key, sampler=sampler, shape=conflict.shape[1:], classes=classes)
    return first, jnp.moveaxis(members, 0, 1)
