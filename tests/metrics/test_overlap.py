import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from entrust_jax.metrics import overlap

maps = hnp.arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 3))


def test_worked_example():
    truth = np.array([[0, 1, 1, 2], [0, 0, 2, -1]])
    prediction = np.array([[0, 1, 2, 2], [1, 0, 0, 3]])
    matrix = overlap.confusion(prediction, truth, 4)
    assert matrix.sum() == 7  # the unknown voxel is left out
    assert overlap.counts(matrix, (1,)) == (1, 1, 1)
    assert overlap.dice(matrix, (1,)) == 0.5
    assert overlap.dice(matrix, (1, 2)) == 2 * 3 / (2 * 3 + 1 + 1)  # a swap inside the region is right
    assert overlap.iou(matrix, (1,), empty=1.0) == 1 / 3
    assert np.isnan(overlap.dice(matrix, (3,)))
    assert overlap.iou(matrix, (3,), empty=1.0) == 1.0
    assert overlap.mean_dice(matrix, [(1,), (2,), (3,)]) == 0.5
    assert overlap.volume_ml(truth == 1, (2.0, 10.0, 25.0)) == 1.0


@given(maps, maps)
def test_dice_equals_its_definition_on_masks(prediction, truth):
    matrix = overlap.confusion(prediction, truth, 4)
    for members in ((1,), (2, 3), (1, 2, 3)):
        ours, theirs = overlap.mask_of(prediction, members), overlap.mask_of(truth, members)
        size = ours.sum() + theirs.sum()
        expected = 2 * (ours & theirs).sum() / size if size else np.nan
        np.testing.assert_allclose(overlap.dice(matrix, members), expected)
        union = (ours | theirs).sum()
        np.testing.assert_allclose(
            overlap.iou(matrix, members, empty=1.0), (ours & theirs).sum() / union if union else 1.0
        )


def test_pairwise_dice():
    masks = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], bool)
    expected = [[1, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, np.nan, np.nan], [0, 0, np.nan, np.nan]]
    np.testing.assert_allclose(overlap.pairwise_dice(masks), expected)
