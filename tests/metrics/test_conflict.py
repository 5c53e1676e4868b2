import math

import numpy as np
import pytest

from entrust_jax.metrics import conflict, usefulness


def scene(seed, bonus, n=4000):
    """Voxels where entropy drives both divergence and conflict; `bonus` is what conflict itself adds."""
    rng = np.random.default_rng(seed)
    entropy, distance = rng.random(n), rng.exponential(4.0, n)
    stratum = conflict.strata(entropy, distance)
    level = stratum / stratum.max()  # the confounder, constant within a stratum
    high = rng.random(n) < 0.05 + 0.4 * level
    divergence = level + 0.05 * rng.normal(size=n) + bonus * high
    return divergence, high, stratum


def run(bonus, patients=6, permutations=200):
    return conflict.alignment_summary(
        [conflict.alignment(*scene(seed, bonus), permutations=permutations, seed=seed) for seed in range(patients)]
    )


def test_strata_separate_entropy_and_distance():
    columns = len(conflict.DISTANCE_EDGES) + 1
    found = conflict.strata(np.array([0.0, 0.0, 0.015, 1.0]), np.array([0.5, 3.0, 0.5, np.inf]))
    assert list(found) == [0, 3, columns, len(conflict.ENTROPY_EDGES) * columns + columns - 1]


def test_a_confounder_alone_gives_no_effect_though_the_raw_difference_is_large():
    divergence, high, _ = scene(0, 0.0)
    assert divergence[high].mean() - divergence[~high].mean() > 0.05
    found = run(0.0)
    assert abs(found["value"]) < 0.005
    assert found["null"]["q025"] <= found["value"] <= found["null"]["q975"]
    assert found["ratio"] == pytest.approx(1, abs=0.02)
    assert found["ci95"] is None and "6 patients" in found["reason"]


def test_a_planted_effect_is_recovered_at_its_size():
    found = run(0.1)
    assert found["value"] == pytest.approx(0.1, abs=0.005)
    assert found["value"] > found["null"]["q975"]
    assert found["p_permutation"] == pytest.approx(1 / 201)
    assert found["p_sign_flip"] == 2**-6
    assert abs(found["null"]["median"]) < 0.002
    reverse = run(-0.1)
    assert reverse["value"] == pytest.approx(-0.1, abs=0.005)
    assert reverse["p_permutation"] == 1.0 and reverse["p_sign_flip"] == 1.0


def test_permutation_p_is_uniform_under_the_null():
    p = [
        conflict.alignment_summary([conflict.alignment(*scene(s, 0.0, 600), permutations=60, seed=s)])
        for s in range(60)
    ]
    values = np.array([one["p_permutation"] for one in p])
    assert 0.38 < values.mean() < 0.62
    assert (values < 0.1).mean() < 0.25


def test_sums_by_hand():
    divergence = np.array([1.0, 3.0, 5.0, 7.0, 9.0])
    high = np.array([True, False, False, True, True])
    found = conflict.alignment(divergence, high, np.array([0, 0, 0, 1, 1]), permutations=50, seed=0)
    weight = 1 * 2 / 3  # stratum 1 holds high conflict only and is left out
    np.testing.assert_allclose(found.observed, weight * np.array([1, 1.0, 4.0]))
    np.testing.assert_array_equal(found.voxels, [1, 2])
    # A permutation puts the one high label on 1, 3 or 5, and the total stays 9.
    tops = found.null[:, 0] / weight
    assert set(np.round(tops)) == {1, 3, 5}
    np.testing.assert_allclose(found.null[:, 1] / weight, (9 - tops) / 2)
    both = conflict.add(found, found)
    np.testing.assert_allclose(both.observed, 2 * found.observed)


def test_the_profile_shows_each_entropy_bin_by_itself():
    entropy = np.array([0.0, 0.0, 0.5, 0.5, 0.5, 1.0])
    stratum = conflict.strata(entropy, np.zeros(6))
    high = np.array([True, False, True, False, False, True])
    found = conflict.alignment(np.array([1.0, 2.0, 6.0, 3.0, 5.0, 9.0]), high, stratum, permutations=5, seed=0)
    profile = conflict.divergence_profile([found, found])
    seen = profile[profile[:, 3] > 0]
    np.testing.assert_allclose(seen[:, 1:], [[1, 2, 2 * 0.5], [6, 4, 2 * 2 / 3]])  # the last bin holds one kind only
    assert seen[0, 0] < 0.01 and 0.45 < seen[1, 0] < 0.55
    assert np.isnan(profile[-1, 1:3]).all()
    effects, null = conflict.effects_and_null([found, found])
    expected = (0.5 * -1 + 2 / 3 * 2) / (0.5 + 2 / 3)
    np.testing.assert_allclose(effects, [expected, expected])
    assert null.shape == (5,)


def test_majority_in_conflict_draws_the_complement():
    rng = np.random.default_rng(0)
    divergence = rng.random(40)
    high = np.arange(40) < 35
    found = conflict.alignment(divergence, high, np.zeros(40, int), permutations=2000, seed=0)
    assert found.null[:, 0].mean() / found.observed[0] == pytest.approx(divergence.mean(), abs=0.01)
    np.testing.assert_allclose((found.null[:, 0] * 35 + found.null[:, 1] * 5) / found.observed[0], divergence.sum())


def test_large_strata_are_permuted_as_small_ones():
    rng = np.random.default_rng(0)
    for n in (1000, 1001):  # either side of the switch between the two ways of drawing
        values = rng.normal(size=n)
        found = conflict.alignment(values, np.arange(n) < 50, np.zeros(n, int), permutations=3000, seed=0)
        null = found.null[:, 0] / found.observed[0]
        assert null.mean() == pytest.approx(values.mean(), abs=0.01)
        spread = values.std(ddof=1) / np.sqrt(50) * np.sqrt(1 - 50 / n)  # of a mean drawn without replacement
        assert null.std() == pytest.approx(spread, rel=0.06)


def test_without_any_mixed_stratum_there_is_no_figure():
    alone = conflict.alignment(np.ones(4), np.ones(4, bool), np.zeros(4, int), permutations=5, seed=0)
    found = conflict.alignment_summary([alone])
    assert found["value"] is None and found["n"] == 0 and found["reason"]


@pytest.mark.parametrize("seed", range(3))
def test_partial_spearman_takes_a_common_cause_away(seed):
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=2000)
    x, y = (cause + 0.5 * rng.normal(size=2000) for _ in range(2))
    assert conflict.partial_spearman(x, y, []) > 0.6
    assert abs(conflict.partial_spearman(x, y, [cause])) < 0.1
    assert conflict.partial_spearman(x, x**3, [cause]) == pytest.approx(1.0)
    assert math.isnan(conflict.partial_spearman(x, np.ones(2000), []))
    assert math.isnan(conflict.partial_spearman(x, y, [x]))


def test_kendall_of_a_response():
    assert conflict.kendall((0, 1, 2), (0.1, 0.2, 0.3)) == pytest.approx(1.0)
    assert conflict.kendall((0, 1, 2), (0.3, 0.2, 0.1)) == pytest.approx(-1.0)
    assert conflict.kendall((0, 1, 2), (0.2, 0.2, 0.2)) == 0.0


def test_the_auroc_of_sites_resamples_patients():
    """Ten patients of whom one is wrong twenty times: pooled over sites, an interval as wide as ten patients'."""
    score = np.array([1.0, 0.0] * 9 + [0.0, 1.0] * 20 + [np.nan])
    positive = np.array([True, False] * 29 + [True])
    patient = np.array([f"P{i}" for i in range(9) for _ in "ab"] + ["P9"] * 40 + ["P10"])
    found = conflict.site_auroc(score, positive, patient, resamples=500)
    known = slice(0, -1)
    assert found["value"] == pytest.approx(usefulness.auroc(score[known], positive[known]))
    assert found["n"] == 10 and found["ci95"][0] < 0.2 and found["ci95"][1] > 0.95
    assert conflict.site_auroc(score[-1:], positive[-1:], patient[-1:])["value"] is None


def test_the_null_of_shifts_by_hand():
    read = np.array([[0.0, 0.4, 0.6], [0.5, 0.0, np.nan], [0.2, 0.6, 0.0]])
    found = conflict.shift_null(np.array([0.5, 0.5, 0.5]), read)  # T_1 = (.4 + .2) / 2, T_2 = (.6 + .5 + .6) / 3
    assert found["value"] == pytest.approx((0.3 + 1.7 / 3) / 2) and found["shifts"] == 2
    assert (found["quantile"], found["p"]) == pytest.approx((0.5, 2 / 3))
    assert conflict.shift_null(np.array([0.9]), np.full((1, 1), np.nan))["p"] is None


def test_the_p_of_shifts_is_uniform_where_a_map_knows_nothing_of_its_patient():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        every = rng.random((10, 10))
        found.append(conflict.shift_null(np.diag(every).copy(), every)["p"])
    assert set(np.round(found, 6)) <= {round(i / 10, 6) for i in range(1, 11)}
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.04)
    assert np.mean(np.array(found) <= 0.5) == pytest.approx(0.5, abs=0.07)
