import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from entrust_jax.metrics import calibration


def draw(seed, shape=(2, 6, 7), classes=3):
    rng = np.random.default_rng(seed)
    probability = rng.dirichlet(np.full(classes, 0.5), shape).astype(np.float32)
    return probability, rng.integers(-1, classes, shape), rng.random(shape) < 0.7


def test_worked_example():
    # One class of two: voxels at .1 (3 of them, 1 positive) and .9 (2, both positive), ten bins.
    positive = np.array([0.1, 0.1, 0.1, 0.9, 0.9], np.float32)
    probability = np.stack([1 - positive, positive], axis=-1)
    label = np.array([0, 0, 1, 1, 1])
    bins = calibration.class_bins(probability, label, np.ones(5, bool), 10)
    gaps = np.array([abs(1 / 3 - 0.1), abs(1 - 0.9)])
    for k in (0, 1):
        one = bins[k : k + 1]
        assert calibration.ece_from_bins(one)[0] == pytest.approx((3 * gaps[0] + 2 * gaps[1]) / 5, abs=1e-6)
        assert calibration.ece_from_bins(one, "average")[0] == pytest.approx(gaps.mean(), abs=1e-6)
        assert calibration.ece_from_bins(one, "maximum")[0] == pytest.approx(gaps.max(), abs=1e-6)
    top = calibration.top_label_bins(probability, label, np.ones(5, bool), 10)
    # All five have confidence .9 and four are right.
    assert calibration.classwise_ece(top) == pytest.approx(0.1, abs=1e-6)


def test_no_voxel_is_nan_not_zero():
    probability, label, mask = draw(0)
    bins = calibration.class_bins(probability, label, np.zeros_like(mask))
    for reduction in ("expected", "average", "maximum"):
        assert np.isnan(calibration.ece_from_bins(bins, reduction)).all()


def test_certain_probabilities_stay_in_the_last_bin():
    bins = calibration.class_bins(np.array([[0.0, 1.0]], np.float32), np.array([1]), np.ones(1, bool), 15)
    assert bins[1, 14, 0] == 1 and bins[0, 0, 0] == 1 and bins[..., 0].sum() == 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 20))
def test_bins_equal_brute_force(seed, n_bins):
    probability, label, mask = draw(seed)
    bins = calibration.class_bins(probability, label, mask, n_bins)
    expected = np.zeros((3, n_bins, 3))
    for p, y, m in zip(probability.reshape(-1, 3), label.ravel(), mask.ravel(), strict=True):
        if m and y >= 0:
            for k in range(3):
                b = min(int(np.float32(p[k]) * n_bins), n_bins - 1)
                expected[k, b] += (1, p[k], y == k)
    np.testing.assert_allclose(bins, expected, rtol=1e-6)
    weighted = calibration.class_bins(probability, label, mask * 0.25, n_bins)
    np.testing.assert_allclose(weighted, bins / 4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16))
def test_sums_of_parts_pool_exactly(seed):
    probability, label, mask = draw(seed)
    halves = [(probability[i], label[i], mask[i]) for i in (0, 1)]
    for function in (calibration.class_bins, calibration.top_label_bins):
        whole = function(probability, label, mask)
        np.testing.assert_allclose(sum(function(*half) for half in halves), whole)
    for function in (calibration.nll, calibration.brier):
        whole = function(probability, label, mask)
        np.testing.assert_allclose(np.sum([function(*half) for half in halves], axis=0), whole)


def test_proper_scores_by_hand():
    probability = np.array([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]], np.float32)
    label, mask = np.array([1, 1, -1]), np.ones(3, bool)
    total, count = calibration.nll(probability, label, mask)
    assert count == 2
    assert total == pytest.approx(-np.log(0.8) - np.log(1e-6), rel=1e-6)
    total, count = calibration.brier(probability, label, mask)
    assert count == 2
    assert total == pytest.approx(2 * 0.04 + 2, rel=1e-6)


def test_calibrated_draws_score_lower_than_overconfident_ones():
    rng = np.random.default_rng(1)
    p = rng.random(200_000).astype(np.float32)
    label = (rng.random(p.size) < p).astype(int)
    sharp = p**3 / (p**3 + (1 - p) ** 3)
    ece = [
        calibration.classwise_ece(calibration.class_bins(np.stack([1 - q, q], -1), label, np.ones(p.size, bool)))
        for q in (p, sharp)
    ]
    assert ece[0] < 0.005 < 0.1 < ece[1]


def test_roi_is_the_dilated_union_in_plane_and_ignores_the_truth():
    first = np.ones((3, 30, 30), np.float32)
    second = first.copy()
    first[1, 10, 10] = 0.9
    second[1, 25, 25] = 0.94
    second[0, 3, 3] = 0.96  # foreground .04: outside
    roi = calibration.region_of_interest([first, second])
    seed = np.zeros((3, 30, 30), bool)
    seed[1, 10, 10] = seed[1, 25, 25] = True
    expected = ndimage.binary_dilation(seed, np.ones((1, 11, 11), bool))
    np.testing.assert_array_equal(roi, expected)
    assert not roi[0].any() and not roi[2].any()
