"""SegDiff's objective: weights that read the input leave the exact posterior the optimum."""

import jax
import jax.numpy as jnp
import numpy as np

from entrust_jax.scores import case_mean, cross_entropy
from entrust_jax.segdiff import objective

POSTERIOR = np.float32([[0.02, 0.3, 0.5, 0.69, 0.89, 0.97]])  # P(y_u = 1 | x), one case
KAPPA = np.float32([[0.0, 0.36, 0.64, 0.48, 0.1, 1.0]])


def expected_loss(score: jax.Array, weights) -> jax.Array:
    """E_y of the weighted cross-entropy, y_u ~ POSTERIOR independently, by enumeration; `weights(y)` voxel by voxel."""
    logits = jnp.stack([jnp.zeros_like(score), score], axis=-1)
    values = []
    for bits in range(2**POSTERIOR.size):
        y = (bits >> np.arange(POSTERIOR.size) & 1)[None]
        p = np.prod(np.where(y == 1, POSTERIOR, 1 - POSTERIOR))
        values.append((p, y, weights(y)))
    p, y, v = (np.stack([value[i] for value in values]) for i in range(3))
    each = jax.vmap(lambda y, v: case_mean(cross_entropy(logits, y), v)[0])(jnp.asarray(y), jnp.asarray(v, jnp.float32))
    return jnp.sum(jnp.asarray(p, jnp.float32) * each)


def test_conflict_weights_leave_the_minimiser_where_it_is():
    v = np.asarray(objective.voxel_weight(jnp.ones_like(KAPPA), jnp.asarray(KAPPA)))
    np.testing.assert_allclose(v, 1 + objective.BETA * KAPPA, rtol=1e-6)
    exact = np.log(POSTERIOR / (1 - POSTERIOR))
    at = jax.jit(jax.value_and_grad(lambda score: expected_loss(score, lambda y: v)))
    minimum, gradient = at(exact)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert at(exact + rng.normal(0, 0.5, exact.shape).astype(np.float32))[0] > minimum
    # The check has power: weights that look at the label move the optimum.
    _, biased = jax.jit(jax.value_and_grad(lambda score: expected_loss(score, lambda y: 1 + 3 * y)))(exact)
    assert np.max(np.abs(biased)) > 0.01


def test_voxel_weights_stay_in_the_body_and_push_no_gradient_into_conflict():
    body = jnp.array([[1.0, 1.0, 0.0]])
    kappa = jnp.array([[0.0, 1.0, 1.0]])
    np.testing.assert_allclose(objective.voxel_weight(body, kappa), [[1.0, 4.0, 0.0]])
    gradient = jax.grad(lambda k: jnp.sum(objective.voxel_weight(body, k)))(kappa)
    assert np.all(np.asarray(gradient) == 0)


def test_a_quarter_of_the_slots_is_terminal_whatever_their_order():
    slots = jax.jit(objective.terminal_slots, static_argnums=1)
    drawn = np.stack([slots(jax.random.key(i), 16) for i in range(200)])
    np.testing.assert_array_equal(drawn.sum(axis=1), 4)
    share = drawn.mean(axis=0)
    assert np.all(np.abs(share - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / 200))
    assert np.sum(slots(jax.random.key(0), 2)) == 1


def test_log_snr_bins():
    low, high = -12.0, 8.0  # five bins of width 4 behind the one of lambda_min itself
    log_snr = jnp.array([-12.0, -12.0, -11.9, -8.1, -7.9, 0.0, 7.9, 8.0, 3.0])
    value = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
    weight = jnp.array([1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0])
    sums, counts = objective.log_snr_bins(value, log_snr, weight, low, high)
    np.testing.assert_allclose(sums, [3, 12, 8, 0, 32, 192])
    np.testing.assert_allclose(counts, [2, 2, 0.5, 0, 1, 2])
