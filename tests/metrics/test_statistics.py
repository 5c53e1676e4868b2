import functools

import numpy as np
import pytest
from scipy import stats

from entrust_jax.metrics import statistics


def mean_of(values):
    return functools.partial(statistics.weighted_mean, values)


def test_interval_agrees_with_scipy_bca():
    values = np.random.default_rng(0).gamma(2.0, 1.0, 40)
    ours, reason = statistics.bootstrap_interval(mean_of(values), 40, resamples=5000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=5000, method="BCa", random_state=1)
    assert reason is None
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    np.testing.assert_allclose(ours, theirs.confidence_interval, atol=0.06 * width)


def test_interval_covers():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(80):
        values = rng.exponential(1.0, 30)
        (low, high), _ = statistics.bootstrap_interval(mean_of(values), 30, resamples=300, seed=seed)
        hits += low <= 1.0 <= high
    assert 0.85 <= hits / 80 <= 1.0


def test_interval_holds_a_value_that_resampling_moves():
    # |mean| of values around zero: every resample's is larger, as with the calibration error of a good model.
    values = np.random.default_rng(3).normal(size=30)
    values -= values.mean() - 1e-3

    def size_of_mean(weights):
        return abs(statistics.weighted_mean(values, weights))

    (low, high), _ = statistics.bootstrap_interval(size_of_mean, 30)
    assert low <= 1e-3 <= high and high > 0.1


def test_few_patients_have_a_value_but_no_interval():
    found = statistics.figure(mean_of(np.arange(9.0)), 9)
    assert found["value"] == 4 and found["ci95"] is None and found["n"] == 9
    assert "9 patients" in found["reason"]
    assert statistics.figure(mean_of(np.arange(10.0)), 10)["ci95"] is not None


def test_undefined_and_constant_statistics():
    found = statistics.figure(mean_of(np.zeros(0)), 0)
    assert found["value"] is None and found["ci95"] is None and found["reason"]
    assert statistics.figure(mean_of(np.full(12, 0.5)), 12)["ci95"] == [0.5, 0.5]
    # Only one patient makes the statistic defined: a third of the resamples lack that patient.
    sums = np.zeros((12, 2))
    sums[0] = 1, 2
    found = statistics.figure(functools.partial(statistics.pooled_ratio, sums), 12)
    assert found["value"] == 0.5 and found["ci95"] is None and "resamples" in found["reason"]


def test_pooled_ratio_is_resampled_as_a_ratio():
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 1000, 25).astype(float)
    sums = np.stack([counts * 0.3, counts], axis=-1)  # the same ratio in every patient: no uncertainty
    found = statistics.figure(functools.partial(statistics.pooled_ratio, sums), 25)
    assert found["value"] == pytest.approx(0.3)
    np.testing.assert_allclose(found["ci95"], [0.3, 0.3])


def test_paired_test_equals_scipy_and_keeps_zeros():
    d = np.array([0.0, 0.0, 0.3, 0.1, 0.5, -0.2, 0.4, 0.7, np.nan])
    found = statistics.paired_test(d)
    expected = stats.wilcoxon(d[:-1], zero_method="pratt")
    assert found["p"] == pytest.approx(expected.pvalue)
    assert found["n"] == 8
    # |d| ranks with zeros ranked 1.5 twice: .1 3, .2 4, .3 5, .4 6, .5 7, .7 8.
    assert found["rank_biserial"] == pytest.approx((3 + 5 + 6 + 7 + 8 - 4) / 33)
    assert statistics.paired_test(np.zeros(5))["p"] is None
    assert statistics.paired_test(np.array([1.0]))["p"] is None


def test_holm():
    assert statistics.holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, 0.06, 0.06]
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_sign_flip():
    assert statistics.sign_flip_p(np.ones(5)) == 2**-5
    assert statistics.sign_flip_p(-np.ones(5)) == 1.0
    assert statistics.sign_flip_p(np.zeros(4)) == 1.0
    effects = np.array([0.5, -0.2, 0.3])
    flips = [a * 0.5 + b * 0.2 + c * 0.3 for a in (1, -1) for b in (1, -1) for c in (1, -1)]
    assert statistics.sign_flip_p(effects) == np.mean(np.array(flips) >= 0.6 - 1e-9)
    many = np.random.default_rng(0).normal(0.0, 1.0, 30)
    p = statistics.sign_flip_p(many)
    assert p == pytest.approx(stats.ttest_1samp(many, 0, alternative="greater").pvalue, abs=0.03)
    assert np.isnan(statistics.sign_flip_p(np.zeros(0)))
