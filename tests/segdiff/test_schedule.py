"""The forward process and the rule for its input scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from entrust_jax.benchmark.steps import discs, exact_denoiser
from entrust_jax.segdiff import schedule


@pytest.mark.parametrize("low, high", [(-12.0, 6.0), (-15.0, 8.5)])
def test_schedule_ends_and_monotone(low, high):
    u = jnp.linspace(0.0, 1.0, 65)
    value = schedule.log_snr(u, low, high)
    np.testing.assert_allclose(value[jnp.array([0, 64])], [high, low], atol=2e-3)
    assert np.all(np.diff(value) < 0)
    np.testing.assert_allclose(schedule.grid(64, low, high), value[::-1], atol=2e-3)
    assert schedule.grid(8, low, high)[0] == low and schedule.grid(8, low, high)[-1] == high


def test_alpha_sigma_inverse_and_extremes():
    value = jnp.array([-80.0, -15.0, -3.0, 0.0, 2.0, 9.0, 80.0])
    alpha, sigma = schedule.alpha_sigma(value)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)
    np.testing.assert_allclose(2 * (jnp.log(alpha) - jnp.log(sigma))[1:-1], value[1:-1], rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(alpha)) and np.all(sigma > 0)


def test_stratified_covers_every_stratum_once_and_is_cosine():
    n, low, high = 16, -12.0, 6.0
    draws = jax.vmap(lambda k: schedule.stratified(k, n, low, high))(jax.random.split(jax.random.key(0), 200))
    ends = 2 / np.pi * np.arctan(np.exp(-np.array([high, low]) / 2))
    u = (2 / np.pi * np.arctan(np.exp(-np.asarray(draws) / 2)) - ends[0]) / (ends[1] - ends[0])
    assert np.all(np.diff(np.sort(u, axis=1), axis=1) < 1 / n + 1e-3)
    assert stats.kstest(u[:, 0], "uniform").pvalue > 1e-3


@pytest.mark.parametrize("value", [-12.0, -4.0, -1.0, 0.0, 2.0, 6.0])
def test_forward_moments_and_unit_input(value):
    b, n = 0.21, 20000
    label = jnp.asarray(np.arange(n).reshape(4, -1) % 3, jnp.int32)
    x0 = schedule.scale_onehot(label, 3, b)
    log_snr = jnp.full((4,), value)
    x = schedule.diffuse(x0, log_snr, jax.random.normal(jax.random.key(1), x0.shape))
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-value)), 1 / np.sqrt(1 + np.exp(value))
    error = 4 * sigma / np.sqrt(n)
    for k in range(3):
        inside = np.asarray(label == k)
        np.testing.assert_allclose(np.asarray(x[..., k])[inside].mean(), alpha * b, atol=2 * error)
        np.testing.assert_allclose(np.asarray(x[..., k])[~inside].mean(), -alpha * b, atol=2 * error)
    np.testing.assert_allclose(np.var(np.asarray(x - alpha * x0)), sigma**2, rtol=0.02)
    scaled = x * schedule.per_case(schedule.input_scale(log_snr, b), x.ndim)
    np.testing.assert_allclose(np.mean(np.asarray(scaled) ** 2), 1, atol=0.02)


def test_scale_onehot_values_and_ignored_pixels():
    np.testing.assert_allclose(
        schedule.scale_onehot(jnp.array([0, 2, -1]), 3, 0.5),
        [[0.5, -0.5, -0.5], [-0.5, -0.5, 0.5], [0, 0, 0]],
    )


def one_channel_presence(x, log_snr, mask, b):
    """Exact P(mask present | x_t) under equal odds, for a single +-b channel; x [n, *S]."""
    alpha, sigma = schedule.alpha_sigma(jnp.float32(log_snr))
    return jax.nn.sigmoid(alpha / sigma**2 * 2 * b * (x * mask[None]).reshape(x.shape[0], -1).sum(-1))


def test_diffuse_uses_each_case_own_level():
    x = schedule.diffuse(jnp.ones((2, 3, 3, 2)), jnp.array([-80.0, 80.0]), jnp.full((2, 3, 3, 2), 7.0))
    np.testing.assert_allclose(x[0], 7, rtol=1e-6)
    np.testing.assert_allclose(x[1], 1, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("b", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("radius, n", [(1.5, 9), (3.0, 29), (6.2, 120)])
def test_leakage_rule(radius, n, b, channels):
    """Samples x_t with a structure of n pixels: the exact denoiser, which sees no image, finds the structure
    from ln(6.25 / (n b^2)) on, within .5; one-hot channels count n twice.

    Found: it says "absent" no more often than an optimal detector at d' = 5, Phi(-2.5) = .6 %.
    """
    mask = discs(15, [radius])[0]
    assert abs(mask.sum() - n) <= 0.07 * n
    shape = (1500, 15, 15) if channels == 1 else (1500, 15, 15, 2)
    noise = jax.random.normal(jax.random.key(3), shape)
    x0 = jnp.asarray(b * (2.0 * mask - 1)) if channels == 1 else schedule.scale_onehot(jnp.asarray(mask), 2, b)
    denoise = exact_denoiser(np.stack([np.zeros_like(mask), mask]), [0.5, 0.5], b, 2)

    @jax.jit
    def missed(level):
        levels = jnp.full((shape[0],), level)
        x = schedule.diffuse(jnp.broadcast_to(x0, shape), levels, noise)
        if channels == 1:
            return jnp.mean(one_channel_presence(x, level, mask, b) < 0.5)
        logits = denoise(x, levels, None)[:, 7, 7]
        return jnp.mean(logits[:, 1] < logits[:, 0])

    levels = np.arange(-6.0, 8.0, 0.125)
    shares = np.array([missed(jnp.float32(level)) for level in levels])
    measured = levels[np.argmax(shares <= stats.norm.cdf(-2.5))]
    assert abs(measured - float(schedule.decision_log_snr(channels * n, b))) < 0.5


def test_decision_log_snr_values():
    for b, expected in ((1.0, -1.5), (0.3, 0.9), (0.1, 3.1)):  # n = 29
        assert float(schedule.decision_log_snr(29, b)) == pytest.approx(expected, abs=0.06)


def test_own_evidence_is_the_exact_bayes_factor_of_a_voxel():
    """One voxel, three classes, prior p: softmax(log p + own_evidence) is the posterior by direct densities."""
    b, prior = 0.3, np.array([0.6, 0.3, 0.1])
    for level in (-6.0, 0.0, 4.0):
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(jnp.float32(level)))
        means = alpha * b * (2 * np.eye(3) - 1)
        x = means[1] + sigma * np.array([0.3, -0.8, 1.1])
        density = np.exp(-0.5 * np.sum((x[None] - means) ** 2, axis=1) / sigma**2)
        expected = prior * density / np.sum(prior * density)
        own = schedule.own_evidence(jnp.asarray(x, jnp.float32)[None, None], jnp.array([level]), b)[0, 0]
        np.testing.assert_allclose(jax.nn.softmax(jnp.log(jnp.asarray(prior, jnp.float32)) + own), expected, atol=2e-5)
