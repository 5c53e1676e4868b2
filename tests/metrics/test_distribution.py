import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrust_jax.metrics import distribution


def matrices(samples, raters, classes=(1,)):
    return (
        distribution.pairwise_distance(samples, raters, classes),
        distribution.pairwise_distance(samples, samples, classes),
        distribution.pairwise_distance(raters, raters, classes),
    )


def test_ged_of_four_raters_two_empty():
    # Every sample is the mask that two raters drew; the two others drew nothing.
    mask = np.zeros((5, 5), np.uint8)
    mask[1:4, 1:4] = 1
    samples = np.stack([mask] * 6)
    raters = np.stack([mask, mask, np.zeros_like(mask), np.zeros_like(mask)])
    found = matrices(samples, raters)
    assert distribution.ged_squared(*found, "v") == pytest.approx(0.5)
    assert distribution.ged_squared(*found, "u") == pytest.approx(1 / 3)


def test_distance_by_hand_over_classes():
    first = np.array([[1, 1, 2, 0]])
    second = np.array([[1, 0, 2, 2], [0, 0, 0, 0]])
    found = distribution.pairwise_distance(first, second, (1, 2))
    np.testing.assert_allclose(found, [[(0.5 + 0.5) / 2, 1.0]])
    empty = distribution.pairwise_distance(second[1:], second[1:], (1, 2))
    assert empty == 0  # empty with empty: IoU 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 4))
def test_distance_is_a_bounded_metric_and_ged_v_is_not_negative(seed, n, r):
    rng = np.random.default_rng(seed)
    samples, raters = (rng.random((n, 4, 4)) < 0.4).astype(int), (rng.random((r, 4, 4)) < 0.4).astype(int)
    between, within, among = matrices(samples, raters)
    assert ((between >= 0) & (between <= 1)).all()
    np.testing.assert_allclose(np.diag(within), 0, atol=1e-12)
    np.testing.assert_allclose(within, within.T)
    triangle = within[:, :, None] + within[None] - within[:, None, :]
    assert (triangle >= -1e-9).all()  # d_ij + d_jk >= d_ik: the Jaccard distance is a metric
    assert distribution.ged_squared(between, within, among) >= -1e-9
    assert distribution.ged_squared(within, within, within) == pytest.approx(0)
    for i in range(n):
        for j in range(r):
            union = ((samples[i] > 0) | (raters[j] > 0)).sum()
            shared = ((samples[i] > 0) & (raters[j] > 0)).sum()
            assert between[i, j] == pytest.approx(1 - shared / union if union else 0)


def test_diversity_is_unbiased_in_the_number_of_hypotheses():
    # One voxel, a fair coin: E d(X, X') = 1/2 whatever N; the plug-in estimate is (1 - 1/N) / 2.
    rng = np.random.default_rng(0)
    for n in (2, 5):
        drawn = [rng.integers(0, 2, (n, 1)) for _ in range(1500)]
        u = np.mean([distribution.diversity(one, (1,), "u") for one in drawn])
        v = np.mean([distribution.diversity(one, (1,), "v") for one in drawn])
        assert u == pytest.approx(0.5, abs=0.05)
        assert v == pytest.approx(0.5 * (1 - 1 / n), abs=0.05)
    assert np.isnan(distribution.diversity(np.ones((1, 3), int), (1,)))


def test_mean_pairwise_dice():
    hypotheses = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert distribution.mean_pairwise_dice(hypotheses, (1,)) == pytest.approx(0.5 / 3)
    assert distribution.mean_pairwise_dice(hypotheses, (1, 2)) == pytest.approx(0.5 / 3)  # class 2: nowhere
    assert np.isnan(distribution.mean_pairwise_dice(np.zeros((3, 4), int), (1,)))
