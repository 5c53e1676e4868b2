import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import spatial

from entrust_jax.metrics import surface

SPACING = (3.0, 1.0, 0.5)
CONVENTIONS = ("max_of_directed", "pooled", "area_weighted")
masks = hnp.arrays(bool, (4, 5, 6))
spacings = st.tuples(*[st.sampled_from([0.3, 0.7, 1.0, 2.5, 5.0])] * 3)


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
    for convention in CONVENTIONS:
        assert surface.hd95(mask, mask, SPACING, convention) == 0
        assert np.isnan(surface.hd95(mask, empty, SPACING, convention))
        assert np.isnan(surface.hd95(empty, empty, SPACING, convention))
    with pytest.raises(ValueError, match="non-empty"):
        surface.surface_distances(mask, empty, SPACING)
    with pytest.raises(ValueError, match="non-empty"):
        surface.element_distances(empty, mask, SPACING)
    for convention in ("voxels", "area_weighted"):
        assert surface.nsd(mask, mask, SPACING, 0.0, convention) == 1
        assert surface.nsd(mask, empty, SPACING, 9.0, convention) == 0
        assert surface.nsd(empty, mask, SPACING, 9.0, convention) == 0
        assert np.isnan(surface.nsd(empty, empty, SPACING, 9.0, convention))


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


def test_hd95_is_that_of_the_reference_that_its_convention_names(golden):
    made_by = {"pooled": "medpy", "max_of_directed": "monai", "area_weighted": "surface-distance"}
    differ = set()
    for case in golden["surfaces"]:
        masks, expected = (case["prediction"], case["truth"], tuple(case["spacing"])), case["hd95"]
        for convention, tool in made_by.items():
            found = surface.hd95(*masks, convention)
            if not (masks[0].any() and masks[1].any()):
                # What the tools do with an empty mask: raise, NaN, infinity. Here it is NaN.
                assert np.isnan(found) and expected[tool] in ("raises RuntimeError", "nan", "inf")
            else:
                assert found == pytest.approx(expected[tool], rel=1e-6), (case["name"], convention)
                differ |= {convention} if abs(found - expected["monai"]) > 0.1 else set()
    assert differ == {"pooled", "area_weighted"}  # the conventions are no synonyms


def test_nsd_is_that_of_the_reference_that_its_convention_names(golden):
    for case in golden["surfaces"]:
        for tolerance, expected in case["nsd"].items():
            for convention, tool in (("voxels", "monai"), ("area_weighted", "surface-distance")):
                found = surface.nsd(
                    case["prediction"], case["truth"], tuple(case["spacing"]), float(tolerance), convention
                )
                assert found == pytest.approx(float(expected[tool]), rel=1e-6, nan_ok=True), (case["name"], convention)
            weighted = float(expected["monai, use_subvoxels"])  # a second reference
            assert found == pytest.approx(weighted, rel=1e-6, nan_ok=True)


def test_surface_of_a_box_with_its_edges_bevelled():
    # Inside, faces count whole; along edges and at corners the elements cut half a voxel off.
    mask = np.ones((3, 4, 5), bool)
    (a, b, c), (k, m, n) = (2.0, 3.0, 5.0), (2, 3, 4)  # spacing; elements along a face
    faces = 2 * (k * m * a * b + m * n * b * c + k * n * a * c)
    edges = 4 * (k * a * np.hypot(b, c) + m * b * np.hypot(a, c) + n * c * np.hypot(a, b)) / 2
    corners = 8 * np.linalg.norm([b * c, a * c, a * b]) / 8
    _, (area, _) = surface.element_distances(mask, mask, (a, b, c))
    assert area.sum() == pytest.approx(faces + edges + corners)
    _, (length, _) = surface.element_distances(mask[0], mask[0], (b, c))
    assert length.sum() == pytest.approx(2 * (m * b + n * c) + 2 * np.hypot(b, c))


def test_element_areas_are_those_of_either_side_and_of_every_turn():
    areas = surface.element_areas((1.0, 1.0, 1.0))
    np.testing.assert_allclose(areas, areas[::-1])  # inside and outside exchanged
    corners = (np.arange(256)[:, None] >> np.arange(8) & 1).reshape(256, 2, 2, 2)
    for turned in (np.rot90(corners, axes=(1, 2)), np.rot90(corners, axes=(2, 3)), corners[:, ::-1]):
        np.testing.assert_allclose(areas[turned.reshape(256, 8) @ (1 << np.arange(8))], areas)
    stretched = surface.element_areas((2.0, 3.0, 5.0)).reshape([2] * 8)
    order = [4 * i + 2 * k + j for i in (0, 1) for j in (0, 1) for k in (0, 1)]  # the last two axes exchanged
    swapped = surface.element_areas((2.0, 5.0, 3.0)).reshape([2] * 8)
    axes = [7 - bit for bit in order][::-1]  # numpy's first axis is the highest bit
    np.testing.assert_allclose(swapped.transpose(axes), stretched)
    with pytest.raises(ValueError, match="2 or 3 axes"):
        surface.element_areas((1.0,))


@settings(max_examples=25, deadline=None)
@given(masks, masks, spacings, st.integers(0, 6), st.sampled_from([0.5, 2.0, 4.0]))
def test_symmetry_scale_and_place(ours, theirs, spacing, tolerance, factor):
    moved = [np.pad(mask, ((2, 0), (0, 3), (1, 1))) for mask in (ours, theirs)]
    scaled = tuple(factor * side for side in spacing)  # powers of two: no rounding
    for convention in CONVENTIONS:
        found = surface.hd95(ours, theirs, spacing, convention)
        for other in (
            surface.hd95(theirs, ours, spacing, convention),
            surface.hd95(*moved, spacing, convention),
            surface.hd95(ours, theirs, scaled, convention) / factor,
        ):
            np.testing.assert_allclose(other, found)
        assert not ours.any() or surface.hd95(ours, ours, spacing, convention) == 0
    for convention in ("voxels", "area_weighted"):
        found = surface.nsd(ours, theirs, spacing, tolerance, convention)
        for other in (
            surface.nsd(theirs, ours, spacing, tolerance, convention),
            surface.nsd(*moved, spacing, tolerance, convention),
            surface.nsd(ours, theirs, scaled, tolerance * factor, convention),
        ):
            np.testing.assert_allclose(other, found)
        assert not ours.any() or surface.nsd(ours, ours, spacing, 0.0, convention) == 1


@settings(max_examples=25, deadline=None)
@given(masks, masks, spacings, st.lists(st.floats(0, 40), min_size=2, max_size=4))
def test_nsd_is_a_share_and_grows_with_the_tolerance(ours, theirs, spacing, tolerances):
    if not ours.any() or not theirs.any():
        return
    for convention in ("voxels", "area_weighted"):
        found = [surface.nsd(ours, theirs, spacing, one, convention) for one in sorted(tolerances)]
        assert min(found) >= 0 and max(found) <= 1 and found == sorted(found)
        assert surface.nsd(ours, theirs, spacing, 60.0, convention) == 1  # farther than the array reaches


def test_an_unknown_convention_is_refused():
    mask = np.ones((2, 2, 2), bool)
    with pytest.raises(Exception, match="convention"):
        surface.hd95(mask, mask, SPACING, "mean")
    with pytest.raises(Exception, match="convention"):
        surface.nsd(mask, mask, SPACING, 1.0, "both")


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
