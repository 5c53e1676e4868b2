import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import spatial

from entrust_jax.metrics import surface

SPACING = (3.0, 1.0, 0.5)
masks = hnp.arrays(bool, (4, 5, 6))


def brute_force(ours, theirs):
    def points(mask):
        padded = np.pad(mask, 1)
        found = []
        for z, y, x in np.argwhere(mask) + 1:
            around = [padded[z - 1, y, x], padded[z + 1, y, x], padded[z, y - 1, x]]
            around += [padded[z, y + 1, x], padded[z, y, x - 1], padded[z, y, x + 1]]
            if not all(around):
                found.append((z, y, x))
        return np.array(found) * np.array(SPACING)

    distance = spatial.distance.cdist(points(ours), points(theirs))
    return distance.min(axis=1), distance.min(axis=0)


def test_anisotropic_pair_by_hand():
    # Two parallel bars along H (1 mm), one slice (3 mm) apart; the second is 20 voxels long, the first 10.
    first, second = np.zeros((2, 3, 24, 5), bool)
    first[0, 2:12, 2] = True
    second[1, 2:22, 2] = True
    # First to second: 3 everywhere. Second to first: 3 over the shared ten, then sqrt(9 + i^2), i = 1..10.
    backward = np.concatenate([np.full(10, 3.0), np.sqrt(9.0 + np.arange(1, 11) ** 2)])
    directed = np.percentile(backward, 95)
    pooled = np.percentile(np.concatenate([np.full(10, 3.0), backward]), 95)
    assert directed == pytest.approx(np.sqrt(90) + 0.05 * (np.sqrt(109) - np.sqrt(90)))
    assert pooled == pytest.approx(np.sqrt(73) + 0.55 * (np.sqrt(90) - np.sqrt(73)))
    assert surface.hd95(first, second, SPACING, "max_of_directed") == pytest.approx(directed)
    assert surface.hd95(second, first, SPACING, "max_of_directed") == pytest.approx(directed)
    assert surface.hd95(first, second, SPACING, "pooled") == pytest.approx(pooled)


def test_empty_and_equal():
    mask, empty = np.zeros((2, 4, 4, 4), bool)
    mask[1:3, 1:3, 1:3] = True
    for convention in ("max_of_directed", "pooled"):
        assert surface.hd95(mask, mask, SPACING, convention) == 0
        assert np.isnan(surface.hd95(mask, empty, SPACING, convention))
        assert np.isnan(surface.hd95(empty, empty, SPACING, convention))
    with pytest.raises(ValueError, match="non-empty"):
        surface.surface_distances(mask, empty, SPACING)


@settings(max_examples=40, deadline=None)
@given(masks, masks)
def test_distances_equal_brute_force(ours, theirs):
    if not ours.any() or not theirs.any():
        return
    forward, backward = surface.surface_distances(ours, theirs, SPACING)
    expected = brute_force(ours, theirs)
    np.testing.assert_allclose(np.sort(forward), np.sort(expected[0]))
    np.testing.assert_allclose(np.sort(backward), np.sort(expected[1]))
    pooled = np.percentile(np.concatenate(expected), 95)
    assert surface.hd95(ours, theirs, SPACING, "pooled") == pytest.approx(pooled)
    directed = max(np.percentile(one, 95) for one in expected)
    assert surface.hd95(ours, theirs, SPACING, "max_of_directed") == pytest.approx(directed)


@settings(max_examples=30, deadline=None)
@given(masks, st.integers(0, 2))
def test_bounding_box(mask, margin):
    box = surface.bounding_box(mask, margin)
    assert mask[box].sum() == mask.sum()
    if mask.any():
        tight = surface.bounding_box(mask)
        for axis, (wide, narrow) in enumerate(zip(box, tight, strict=True)):
            assert wide.start == max(narrow.start - margin, 0)
            assert min(wide.stop, mask.shape[axis]) == min(narrow.stop + margin, mask.shape[axis])
            others = tuple(other for other in range(3) if other != axis)
            line = mask.any(axis=others)
            assert line[narrow.start] and line[narrow.stop - 1]


def test_border_distance():
    label = np.zeros((1, 1, 6), np.uint8)
    label[..., 2:4] = 2
    np.testing.assert_allclose(surface.border_distance(label, (9.0, 9.0, 2.0))[0, 0], [2, 0, 0, 0, 0, 2])
    label[..., 3] = 1  # a border between two foreground classes counts too
    assert surface.border_distance(label, (1.0, 1.0, 1.0))[0, 0, 3] == 0
    assert np.isinf(surface.border_distance(np.zeros((2, 2, 2), np.uint8), (1.0, 1.0, 1.0))).all()
