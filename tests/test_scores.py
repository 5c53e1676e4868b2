"""Scores and how they are averaged."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from entrust_jax import scores

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 3, 4, 3)).astype(np.float32)
LABEL = RNG.integers(0, 3, size=(2, 3, 4)).astype(np.int32)


def test_cross_entropy_is_minus_log_softmax_of_the_label():
    expected = -np.take_along_axis(log_softmax(LOGITS, axis=-1), LABEL[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABEL)), expected, rtol=1e-5)


def test_an_ignored_label_counts_for_nothing():
    label = LABEL.copy()
    label[0, 1, 2] = -1
    summed = jax.jit(jax.value_and_grad(lambda x: jnp.sum(scores.cross_entropy(x, jnp.asarray(label)))))
    value, gradient = summed(LOGITS)
    kept = scores.cross_entropy(jnp.asarray(LOGITS), jnp.asarray(LABEL))
    np.testing.assert_allclose(value, np.sum(kept) - kept[0, 1, 2], rtol=1e-5)
    assert np.all(np.asarray(gradient)[0, 1, 2] == 0)
    assert np.all(np.any(np.asarray(gradient) != 0, axis=-1) == (label >= 0))


def test_cross_entropy_stays_finite_at_extreme_logits():
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
    value = scores.cross_entropy(logits, jnp.array([1, 1]))
    np.testing.assert_allclose(value, [2e4, 0.0])


def test_case_mean_by_hand():
    value = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    weight = jnp.array([[1.0, 1.0, 0.0], [0.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(scores.case_mean(value, weight), [1.5, (10 + 36) / 8, 0.0], rtol=1e-6)


def test_importance_weights_act_outside_the_normalisation():
    """Inside it a weight that is constant over a case cancels; outside, the sampling of patches is undone."""
    value = RNG.uniform(size=(3, 10)).astype(np.float32)
    voxels = RNG.uniform(size=(3, 10)).astype(np.float32)
    importance = np.array([0.25, 1.0, 3.0], np.float32)
    plain = scores.case_mean(jnp.asarray(value), jnp.asarray(voxels))
    inside = scores.case_mean(jnp.asarray(value), jnp.asarray(voxels * importance[:, None]))
    np.testing.assert_allclose(inside, plain, rtol=1e-5)
    got = scores.over_cases(plain, jnp.asarray(importance))
    expected = np.mean(importance * (value * voxels).sum(1) / voxels.sum(1))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert abs(float(got) - float(jnp.mean(plain))) > 0.01


def test_importance_sampled_slots_estimate_the_population_mean():
    """Half the slots from a group that is a tenth of the population, weights share / sampling share."""
    rare, common = 5.0, 1.0
    value = jnp.array([rare, common] * 50)
    weight = jnp.array([0.1 / 0.5, 0.9 / 0.5] * 50)
    np.testing.assert_allclose(scores.over_cases(value, weight), 0.1 * rare + 0.9 * common, rtol=1e-6)


def test_cases_without_weight_are_skipped():
    value, weight = jnp.array([2.0, 100.0, 4.0]), jnp.array([1.0, 0.0, 0.5])
    np.testing.assert_allclose(scores.over_cases(value, weight), (2.0 + 2.0) / 2)
    assert float(scores.over_cases(value, 0 * weight)) == 0.0
