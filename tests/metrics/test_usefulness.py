import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrust_jax.metrics import usefulness


def draw(seed, n=40, levels=7):
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, n) / levels, rng.random(n) < 0.3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16))
def test_auroc_equals_all_pairs(seed):
    score, positive = draw(seed)
    if positive.all() or not positive.any():
        assert np.isnan(usefulness.auroc(score, positive))
        return
    pairs = score[positive][:, None] - score[~positive][None]
    assert usefulness.auroc(score, positive) == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16))
def test_average_precision_equals_the_sum_over_thresholds(seed):
    score, positive = draw(seed)
    if not positive.any():
        assert np.isnan(usefulness.average_precision(score, positive))
        return
    expected, recall = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        flagged = score >= threshold
        new = (flagged & positive).sum() / positive.sum()
        expected += (new - recall) * (flagged & positive).sum() / flagged.sum()
        recall = new
    assert usefulness.average_precision(score, positive) == pytest.approx(expected)


def test_average_precision_golden():
    # scikit-learn's own documentation: average_precision_score([0, 0, 1, 1], [.1, .4, .35, .8]) = .8333
    found = usefulness.average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1], bool))
    assert found == pytest.approx(0.8333, abs=1e-4)


def test_histograms_pool_and_agree_with_the_exact_figures():
    rng = np.random.default_rng(3)
    positive = rng.random((2, 50, 40)) < 0.1
    score = 1 / (1 + np.exp(-(rng.normal(-5, 2, positive.shape) + 2 * positive)))
    mask = rng.random(positive.shape) < 0.8
    parts = [usefulness.score_histogram(score[i], positive[i], mask[i]) for i in (0, 1)]
    whole = usefulness.score_histogram(score, positive, mask)
    np.testing.assert_array_equal(parts[0] + parts[1], whole)
    assert whole.sum() == mask.sum()
    exact = usefulness.auroc(score[mask], positive[mask])
    assert usefulness.auroc_from_histogram(whole) == pytest.approx(exact, abs=1e-3)
    exact = usefulness.average_precision(score[mask], positive[mask])
    assert usefulness.average_precision_from_histogram(whole) == pytest.approx(exact, abs=5e-3)
    assert usefulness.prevalence_from_histogram(whole) == pytest.approx(positive[mask].mean())
    assert np.isnan(usefulness.prevalence_from_histogram(whole * 0))


def test_histogram_takes_the_ends_of_the_range():
    whole = usefulness.score_histogram(np.array([0.0, 1.0]), np.array([False, True]), np.ones(2, bool))
    assert whole[0, 0] == 1 and whole[-1, 1] == 1
    with pytest.raises(ValueError, match="NaN"):
        usefulness.score_histogram(np.array([0.0, np.nan]), np.array([False, True]), np.ones(2, bool))


def test_risk_coverage_by_hand():
    risk, confidence = np.array([0.1, 0.5, 0.3]), np.array([0.9, 0.2, 0.6])
    coverage, kept = usefulness.risk_coverage(risk, confidence)
    np.testing.assert_allclose(coverage, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(kept, [0.1, 0.2, 0.3])
    assert usefulness.aurc(risk, confidence) == pytest.approx(0.2)
    assert usefulness.excess_aurc(risk, confidence) == pytest.approx(0)
    assert usefulness.excess_aurc(risk, -confidence) == pytest.approx((0.5 + 0.4 + 0.3) / 3 - 0.2)
    referred, quality = usefulness.referral_curve(1 - risk, -confidence)
    np.testing.assert_allclose(referred, [0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(quality, [0.7, 0.8, 0.9])
    assert np.isnan(usefulness.aurc(risk[:0], confidence[:0]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16))
def test_tied_confidence_gives_the_expectation_over_orders(seed):
    rng = np.random.default_rng(seed)
    risk, confidence = rng.random(6), rng.integers(0, 3, 6).astype(float)
    mean = np.zeros(6)
    for _ in range(300):
        jitter = confidence + rng.random(6) * 1e-3
        mean += usefulness.risk_coverage(risk, jitter)[1] / 300
    found = usefulness.risk_coverage(risk, confidence)[1]
    np.testing.assert_allclose(found, mean, atol=0.12)
    assert found[-1] == pytest.approx(risk.mean())
    assert usefulness.excess_aurc(risk, confidence) >= -1e-12


def test_constant_confidence_has_the_mean_risk_everywhere():
    risk = np.array([0.0, 0.2, 0.7])
    np.testing.assert_allclose(usefulness.risk_coverage(risk, np.zeros(3))[1], risk.mean())


def test_places_go_by_the_score_and_then_by_the_uncertainty():
    score = np.array([0.8, 0.2, 0.2, 0.2, np.nan, 0.8])
    uncertainty = np.array([0.9, 0.3, 0.5, 0.3, 0.1, 0.1])
    found = usefulness.places(score, uncertainty)
    np.testing.assert_array_equal(found, [2, 1, 0, 1, np.nan, 3])  # the tied share a place
    assert usefulness.places(score[:0], uncertainty[:0]).shape == (0,)


def test_unit_entropy_and_mean_inside():
    np.testing.assert_allclose(usefulness.unit_entropy(np.array([0.0, np.log(4), 9.0]), 4), [0, 1, 1])
    np.testing.assert_allclose(usefulness.entropy(np.array([[0.25] * 4, [1.0, 0, 0, 0]])), [np.log(4), 0], atol=1e-12)
    values, mask = np.array([1.0, 2.0, 6.0]), np.array([False, True, True])
    none = np.zeros(3, bool)
    assert usefulness.mean_inside(values, mask, none) == 4
    assert usefulness.mean_inside(values, none, mask) == 4
    assert np.isnan(usefulness.mean_inside(values, none, none))
