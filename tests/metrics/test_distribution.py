import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrust_jax.metrics import distribution


def matrices(samples, raters, classes=(1,), empty=1.0):
    return (
        distribution.pairwise_distance(samples, raters, classes, empty),
        distribution.pairwise_distance(samples, samples, classes, empty),
        distribution.pairwise_distance(raters, raters, classes, empty),
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
    # Other conventions for two empty masks: left out (Kohl et al. 2018), a small number in the denominator.
    assert distribution.ged_squared(*matrices(samples, raters, empty=np.nan), "v") == pytest.approx(1 / 3)
    assert distribution.ged_squared(*matrices(samples, raters, empty=0.0), "v") == pytest.approx(0.25)
    # Two of the four raters are met by every sample, the others by none.
    assert distribution.hm_iou(found[0]) == pytest.approx(0.5)
    assert distribution.d_max(distribution.pairwise_class_dice(samples, raters, (1,))[0]) == pytest.approx(0.5)
    # S_c = 1, D_max = 1/2, D_a = 1 - (|0 - 0| + |0 - 1|) / 2 = 1/2: 3 / (1 + 2 + 2).
    assert distribution.ci_score(samples, raters, (1,)) == pytest.approx(0.6)


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


def drawn(seed, count, shape=(4, 4), classes=3):
    """Masks of which a third is empty."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, (count, *shape)) * (rng.random((count, *(1,) * len(shape))) < 0.7)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 4))
def test_scores_against_raters_have_their_bounds_and_know_no_order(seed, n, r):
    samples, raters = drawn(seed, n), drawn(seed + 1, r)
    rng = np.random.default_rng(seed)

    def scores(x, y):
        between, within, among = matrices(x, y, (1, 2))
        dice = distribution.pairwise_class_dice(x, y, (1, 2)).mean(axis=0)
        return np.array(
            [
                distribution.ged_squared(between, within, among),
                distribution.hm_iou(between),
                distribution.d_max(dice),
                distribution.ci_score(x, y, (1, 2)),
            ]
        )

    found = scores(samples, raters)
    assert (found >= -1e-9).all() and (found[1:] <= 1 + 1e-9).all() and found[0] <= 2
    np.testing.assert_allclose(scores(rng.permutation(samples), rng.permutation(raters)), found, atol=1e-9)
    # Sets that are equal but for repetitions of the whole of one cannot be told apart by the first three.
    repeated = np.repeat(raters, 3, axis=0)
    np.testing.assert_allclose(scores(repeated, raters)[:3], [0, 1, 1], atol=1e-9)
    np.testing.assert_allclose(scores(raters, raters), [0, 1, 1, 1], atol=1e-9)
    # A matching serves no rater better than his own best sample.
    iou = 1 - distribution.pairwise_distance(samples, raters, (1, 2))
    assert iou.mean() - 1e-9 <= found[1] <= iou.max(axis=0).mean() + 1e-9


def test_hm_iou_by_hand():
    """Two samples, three raters: each sample stands three times, each rater twice."""
    between = 1 - np.array([[0.9, 0.8, 0.0], [0.7, 0.2, 0.1]])
    # Six pairs; the first sample takes both copies of rater 2 and one of rater 1, or what else adds up to most.
    best = max(
        (a * 0.9 + b * 0.8 + c * 0.0 + (2 - a) * 0.7 + (2 - b) * 0.2 + (2 - c) * 0.1) / 6
        for a in range(3)
        for b in range(3)
        for c in range(3)
        if a + b + c == 3
    )
    assert distribution.hm_iou(between) == pytest.approx(best)


def test_ci_score_punishes_each_of_its_parts():
    mask = np.zeros((3, 6), int)
    mask[:, :3] = 1
    wide, none = np.ones_like(mask), np.zeros_like(mask)
    raters = np.stack([mask, wide])
    assert distribution.ci_score(raters, raters, (1,)) == pytest.approx(1)
    # One sample: no spread. S_c = 1/2, D_max = (1 + 2/3) / 2, D_a = 1 - 1/3 (one pair of raters, Dice 2/3).
    parts = (0.5, 5 / 6, 2 / 3)
    assert distribution.ci_score(mask[None], raters, (1,)) == pytest.approx(3 / sum(1 / p for p in parts))
    assert distribution.ci_score(none[None], raters, (1,)) == 0
    assert distribution.ci_score(none[None], np.stack([none, none]), (1,)) == 1  # all agree that there is nothing


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


def test_interslice_dice_by_hand():
    label = np.zeros((2, 4, 3, 3), np.uint8)
    label[0, 1, 0, :2] = 1
    label[0, 2, 0, 1:] = 2  # any foreground
    # Pairs of slices of the first map: nothing and two, two and two (one shared), two and nothing; the second is empty.
    assert distribution.interslice_dice(label) == pytest.approx((0 + 0.5 + 0) / 3)
    assert np.isnan(distribution.interslice_dice(label[1:]))
    assert distribution.interslice_dice(np.ones((1, 5, 2, 2), np.uint8)) == 1
