import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from entrust_jax.metrics import lesions, surface

UNIT = (1.0, 1.0, 1.0)
EXACT = lesions.Rule(dilation=1, floor=0.0)
MEANS = ("lesion_dice", "lesion_hd95", "lesion_f1")
masks = hnp.arrays(bool, (6, 7, 8), elements=st.sampled_from([False] * 5 + [True]))


def balls(*centres_and_radii, shape=(20, 30, 30)):
    grid = np.indices(shape)
    mask = np.zeros(shape, bool)
    for centre, radius in centres_and_radii:
        mask |= sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2
    return mask


def test_scores_are_those_of_the_challenge(golden):
    for case in golden["lesions"]:
        for rule, expected in case["brats"].items():
            found = lesions.scores(case["prediction"], case["truth"], tuple(case["spacing"]), lesions.RULES[rule])
            where = (case["name"], rule)
            assert found["lesions"] - found["lesions_missed"] == expected["found"], where
            assert found["lesions_missed"] == expected["missed"], where
            assert found["lesions_spurious"] == expected["spurious"], where
            assert found["lesion_dice"] == pytest.approx(expected["dice"]), where
            assert found["lesion_hd95"] == pytest.approx(expected["hd95"]), where


def test_f1_is_the_recognition_quality_of_lesions_far_apart(golden):
    (case,) = (case for case in golden["lesions"] if "panoptica" in case)
    found = lesions.scores(case["prediction"], case["truth"], tuple(case["spacing"]), EXACT)
    expected = case["panoptica"]
    assert found["lesion_f1"] == pytest.approx(expected["rq"])
    counts = found["lesions"] - found["lesions_missed"], found["lesions_spurious"], found["lesions_missed"]
    assert counts == (expected["tp"], expected["fp"], expected["fn"])
    assert found["lesion_dice"] == pytest.approx(expected["sq_dsc"] * counts[0] / sum(counts))


def test_missed_and_made_up_lesions_by_hand():
    truth = balls(((6, 6, 6), 3), ((6, 22, 22), 3))
    guess = balls(((6, 6, 6), 3), ((15, 6, 24), 3), ((15, 24, 6), 1))
    found = lesions.scores(guess, truth, UNIT, lesions.RULES["glioma"])
    assert found == {
        "lesion_dice": 1 / 4,
        "lesion_hd95": 374 * 3 / 4,
        "lesion_f1": 2 / 5,
        "lesions": 2,
        "lesions_missed": 1,
        "lesions_spurious": 2,
    }


def test_lesions_near_each_other_are_one():
    truth = balls(((10, 8, 8), 3), ((10, 20, 8), 3))  # five voxels between them
    found = lesions.scores(truth, truth, UNIT, lesions.RULES["glioma"])
    assert found["lesions"] == 1 and found["lesion_dice"] == 1 and found["lesion_hd95"] == 0
    assert lesions.scores(truth, truth, UNIT, lesions.RULES["metastases"])["lesions"] == 2


def test_a_small_lesion_counts_neither_as_found_nor_as_missed_nor_as_made_up():
    large, small = ((6, 6, 6), 3), ((6, 22, 22), 1)  # 123 and 7 mm^3
    truth, rule = balls(large, small), lesions.RULES["glioma"]
    perfect = lesions.scores(truth, truth, UNIT, rule)
    assert perfect["lesions"] == 1 and perfect["lesions_spurious"] == 0 and perfect["lesion_f1"] == 1
    assert lesions.scores(balls(large), truth, UNIT, rule) == perfect
    assert lesions.scores(truth, truth, (2.0, 2.0, 2.0), rule)["lesions"] == 2  # 56 mm^3: the volume decides
    alone = lesions.scores(balls(small), balls(small), UNIT, rule)
    assert [alone[key] for key in MEANS] == [1, 0, 1] and alone["lesions"] == 0


@pytest.mark.parametrize("rule", list(lesions.RULES.values()))
def test_a_picture_has_lesions_too(rule):
    truth = balls(((5, 8), 4.5), ((22, 22), 5), shape=(30, 30))
    found = lesions.scores(np.roll(truth, 1, axis=0), truth, (1.0, 1.0), rule)
    assert found["lesions"] == 2 and found["lesion_f1"] == 1 and 0.8 < found["lesion_dice"] < 1
    small = balls(((8, 8), 2), shape=(20, 20))  # 13 mm^2
    assert [lesions.scores(small, small, (1.0, 1.0), rule, t)["lesions"] for t in (0.1, 6.0)] == [0, 1]


@settings(max_examples=40, deadline=None)
@given(masks, masks)
def test_one_lesion_and_its_pieces_are_scored_as_the_whole_masks(prediction, truth):
    """Grown so far that all is one lesion which every piece meets: the figures of the masks as they are."""
    if not truth.any() or not prediction.any():
        return
    found = lesions.scores(prediction, truth, (2.0, 1.0, 0.5), lesions.Rule(dilation=8, floor=0.0))
    dice = 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
    assert found["lesion_dice"] == pytest.approx(dice) and found["lesion_f1"] == 1 == found["lesions"]
    assert found["lesion_hd95"] == surface.hd95(prediction, truth, (2.0, 1.0, 0.5), "area_weighted")


@settings(max_examples=40, deadline=None)
@given(masks, masks, st.integers(0, 3))
def test_scores_stay_in_their_range_and_know_no_place(prediction, truth, shift):
    found = lesions.scores(prediction, truth, UNIT, EXACT)
    moved = lesions.scores(*(np.pad(one, ((shift, 4), (3, 3), (4, shift))) for one in (prediction, truth)), UNIT, EXACT)
    for key, value in found.items():
        np.testing.assert_allclose(moved[key], value)
    if truth.any():
        assert all(0 <= found[key] <= limit for key, limit in zip(MEANS, (1, 374, 1), strict=True))
        assert found["lesions_missed"] <= found["lesions"]
        perfect = lesions.scores(truth, truth, UNIT, EXACT)
        assert perfect["lesion_dice"] <= 1 and perfect["lesion_f1"] == 1 and perfect["lesions_spurious"] == 0
