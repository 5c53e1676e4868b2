"""The working grid: what is planned, that it lies on the scan, and that nothing is lost on the way there and back."""

import dataclasses
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

import configs.phantom
from entrust_jax import train
from entrust_jax.data import dataset, resampling, scans
from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume
from entrust_jax.data.resampling import Lattice
from entrust_jax.errors import UserError

ISOTROPIC = [[1.0, 1.0, 1.0]] * 9 + [[2.0, 0.5, 0.5]]
CARDIAC = [[10.0, 1.5, 1.4]] * 7 + [[5.0, 1.5, 1.6]] * 3


def volume(shape=(4, 12, 10), spacing=(5.0, 2.0, 2.0), seed=0) -> Volume:
    rng = np.random.default_rng(seed)
    body = np.zeros(shape, bool)
    body[:, 2:-2, 2:-1] = True
    return Volume(
        name="case", patient="case", number=1, image=(rng.normal(size=(2, *shape)) * body).astype(np.float32),
        present=np.array([True, True]), label=rng.integers(-1, 3, shape).astype(np.int32), body=body,
        coordinates=coordinates(body), spacing=spacing, reference=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spacings", "sizes", "expected"),
    [
        (ISOTROPIC, [[100, 100, 100]] * 10, (1.0, 1.0, 1.0)),
        # Coarse along one axis, in spacing and in size: its 10th percentile, as nnU-Net has it for ACDC.
        (CARDIAC, [[10, 200, 220]] * 10, (5.0, 1.5, 1.4)),
        (CARDIAC, [[70, 200, 220]] * 10, (10.0, 1.5, 1.4)),  # too many slices for the rule
        ([[4.4, 1.5, 1.4]] * 10, [[10, 200, 220]] * 10, (4.4, 1.5, 1.4)),  # too fine for it
        ([[1.4, 10.0, 1.5]] * 7 + [[1.4, 5.0, 1.5]] * 3, [[220, 10, 200]] * 10, (1.4, 5.0, 1.5)),  # any axis
        # The 10th percentile is finer than the other axes: not below the largest of them.
        ([[10.0, 1.5, 1.4]] * 7 + [[1.0, 1.5, 1.4]] * 3, [[10, 200, 220]] * 10, (1.50001, 1.5, 1.4)),
        ([[2.0, 1.0, 1.0], [4.0, 2.0, 2.0]], [[50, 50, 50]] * 2, (3.0, 1.5, 1.5)),
    ],
)
def test_the_plan_is_that_of_nnunet(spacings, sizes, expected):
    np.testing.assert_allclose(resampling.plan(np.array(spacings), np.array(sizes)), expected, rtol=1e-9)


def test_in_two_dimensions_and_one_the_rule_is_the_same():
    assert resampling.plan(np.array([[8.0, 1.0]] * 3), np.array([[10, 100]] * 3)) == (8.0, 1.0)
    assert resampling.plan(np.array([[2.0], [4.0]]), np.array([[10], [100]])) == (3.0,)


@pytest.mark.parametrize(
    ("spacing", "patch", "fold", "expected"),
    [
        ((1.0, 1.0, 1.0), (32, 64, 64), 1, ((1, 1, 1), (2, 2, 2), (2, 2, 2))),
        ((1.0, 1.0, 1.0), (32, 64, 64), 2, ((2, 2, 2), (2, 2, 2), (2, 2, 2))),
        # Slices of 5 mm wait until the plane is as coarse.
        ((5.0, 1.0, 1.0), (16, 64, 64), 1, ((1, 1, 1), (1, 2, 2), (1, 2, 2))),
        ((3.27, 0.98, 0.98), (16, 96, 96), 2, ((1, 2, 2), (2, 2, 2), (2, 2, 2))),
        # A patch is never shorter than four voxels, nor cut.
        ((1.0, 1.0, 1.0), (8, 64, 64), 2, ((2, 2, 2), (1, 2, 2), (1, 2, 2))),
        ((1.0, 1.0, 1.0), (10, 64, 64), 2, ((2, 2, 2), (1, 2, 2), (1, 2, 2))),
    ],
)
def test_strides_make_cubes_of_voxels(spacing, patch, fold, expected):
    assert resampling.plan_strides(spacing, patch, 3, fold) == expected


@given(
    st.tuples(*[st.floats(0.3, 8)] * 3), st.tuples(*[st.integers(4, 128)] * 3), st.integers(1, 5),
    st.sampled_from((1, 2, 4)),
)  # fmt: skip
@settings(deadline=None)
def test_any_patch_can_be_pooled_as_planned(spacing, patch, scales, fold):
    strides = resampling.plan_strides(spacing, patch, scales, fold)
    whole = np.prod(strides, axis=0)
    assert len(strides) == scales
    assert np.all(np.array(patch) % whole == 0) and np.all(np.array(patch) // whole >= 4)


@pytest.mark.parametrize("value", [(), ("median",), (0.0, 1.0, 1.0), (0, 2, 1.5), ["median"], [3.0, 1.0, 1.0], []])
def test_a_spacing_survives_its_json(value):
    found = resampling.asked_spacing(value)
    assert found == tuple(value) and resampling.asked_spacing(json.loads(json.dumps(found))) == found


@pytest.mark.parametrize(
    "value", [("mean",), (1.0, 1.0), (1.0, 1.0, -1.0), (0, 0, 0), (1.0, "median", 1.0), 2.0, (True, 1, 1),
              (float("nan"), 1.0, 1.0)],
)  # fmt: skip
def test_a_spacing_that_is_none_is_named_before_anything_is_read(value, tmp_path):
    config = configs.phantom.get_config().copy_and_resolve_references()
    with config.data.ignore_type():
        config.data.spacing = value
    with pytest.raises(UserError, match=r"config\.data\.spacing is .*; give \(\)"):
        train.check(tmp_path, config)


def test_on_its_own_grid_a_case_is_itself():
    one = volume()
    for spacing in ((), (0.0, 0.0, 2.0), (5.0, 2.0, 2.0), (0.0, 2.0005, 2.0)):
        assert resampling.at_spacing(one, spacing) is one


def lattices():
    sizes = st.tuples(*[st.integers(3, 14)] * 3)
    return st.builds(Lattice, sizes, st.tuples(*[st.floats(0.4, 6.0)] * 3))


@settings(max_examples=60, deadline=None)
@given(lattices(), st.tuples(*[st.sampled_from([0.0, 0.5, 0.9, 1.3, 2.5, 4.0])] * 3))
def test_a_working_grid_lies_on_the_scan(own, spacing):
    """A map that is linear in the scan's world is the same map on the working grid, at the places of its affine."""
    target = resampling.working(own, spacing, "scan.nii.gz")
    for size, step, new_size, new_step, wanted in zip(*own, *target, spacing, strict=True):
        assert new_step == (wanted or step) or abs(wanted / step - 1) < 1e-3
        assert abs(new_size * new_step - size * step) <= 0.5 * new_step + 1e-9 or new_size == 1
    # Places in mm from the centre of the field of view, which the two grids share.
    own_mm, mm = (
        np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(*one, strict=True)], indexing="ij"))
        for one in (own, target)
    )
    values = (own_mm[0] - 2 * own_mm[1] + 0.5 * own_mm[2]).astype(np.float32)
    expected = mm[0] - 2 * mm[1] + 0.5 * mm[2]
    inside = np.all([np.abs(a) <= np.abs(b).max() + 1e-6 for a, b in zip(mm, own_mm, strict=True)], axis=0)
    np.testing.assert_allclose(resampling.moved(values, own, target)[inside], expected[inside], atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(lattices(), st.tuples(*[st.floats(0.3, 0.99)] * 3), st.integers(0, 9))
def test_classes_come_back_from_any_finer_grid_as_they_were(own, shares, seed):
    finer = resampling.working(
        own, [step * share for step, share in zip(own.spacing, shares, strict=True)], "scan.nii.gz"
    )
    label = np.random.default_rng(seed).integers(-1, 4, (2, *own.sizes)).astype(np.int32)
    there = resampling.moved(label, own, finer, first=1)
    assert there.dtype == np.int32 and there.shape == (2, *finer.sizes)
    np.testing.assert_array_equal(resampling.moved(there, finer, own, first=1), label)


def test_a_map_with_channels_is_moved_like_each_of_them():
    own, target = Lattice((4, 5, 6), (3.0, 1.0, 1.0)), Lattice((4, 7, 3), (3.0, 0.7, 2.0))
    values = np.random.default_rng(0).normal(size=(2, 4, 5, 6, 3)).astype(np.float32)
    found = resampling.moved(values, own, target, first=1)
    assert found.shape == (2, 4, 7, 3, 3) and found.dtype == np.float32
    for m in range(2):
        for k in range(3):
            np.testing.assert_array_equal(found[m, ..., k], resampling.moved(values[m, ..., k].copy(), own, target))


def test_a_case_keeps_its_field_of_view_and_nothing_bleeds_in_from_outside_the_body():
    one = volume()
    one.image[0] = one.body
    found = resampling.at_spacing(one, (0.0, 1.3, 3.0))
    assert found.body.shape == (4, 18, 7) and found.spacing == (5.0, 1.3, 3.0)
    assert found.image.dtype == np.float32 and found.label is not None and found.label.dtype == np.int32
    np.testing.assert_allclose(found.image[0], found.body, atol=1e-6)
    assert not found.image[:, ~found.body].any() and set(np.unique(found.label)) == {-1, 0, 1, 2}
    ml = [one.body.sum() * np.prod(one.spacing) / 1000, found.body.sum() * np.prod(found.spacing) / 1000]
    assert abs(ml[1] / ml[0] - 1) < 0.15
    np.testing.assert_array_equal(found.coordinates, coordinates(found.body))
    thin = np.zeros_like(one.body)
    thin[:, 3, 3] = True
    whole = resampling.at_spacing(dataclasses.replace(one, body=thin, image=one.image * thin), (0.0, 11.0, 11.0))
    assert whole.body.all() and np.isfinite(whole.image).all()


def test_a_checkerboard_in_the_body_becomes_its_mean_on_much_coarser_voxels():
    one = volume((4, 48, 45), spacing=(5.0, 1.0, 1.0))
    board = 2.0 * (np.indices(one.body.shape).sum(axis=0) % 2)
    one = dataclasses.replace(one, image=np.stack([board, board]).astype(np.float32) * one.body)
    found, fine = (resampling.at_spacing(one, (0.0, working, working)) for working in (3.0, 1.4))
    assert found.body.shape == (4, 16, 15) and found.label is not None and set(np.unique(found.label)) == {-1, 0, 1, 2}
    # To the border of the body: the zeros outside do not bleed in.
    np.testing.assert_allclose(found.image[:, found.body], 1.0, atol=0.15)
    assert fine.image[:, fine.body].std() > 0.3 and not found.image[:, ~found.body].any()


@pytest.mark.parametrize("working", [1.0, 3.0, 4.0])
def test_the_rounding_of_an_affine_changes_nothing(working):
    """At such ratios voxel centres lie half-way between others: which neighbour is taken must not hang on a bit."""
    one = volume()
    rough = dataclasses.replace(one, spacing=(5.0000002, 1.9999999, 2.0000003))
    a, b = (resampling.at_spacing(case, (0.0, working, working)) for case in (one, rough))
    np.testing.assert_array_equal(a.body, b.body)
    np.testing.assert_array_equal(a.label, b.label)
    np.testing.assert_allclose(a.image, b.image, atol=1e-3)
    back = [resampling.moved(a.label, resampling.lattice_of(a), resampling.lattice_of(case)) for case in (one, rough)]
    np.testing.assert_array_equal(*back)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(3)), st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3), st.integers(0, 99))
def test_a_header_alone_tells_the_lattice_that_reading_gives(tmp_path_factory, permutation, signs, seed):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    angle = rng.uniform(-0.4, 0.4)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ np.eye(3)[:, permutation] * signs * rng.uniform(0.5, 4, 3)
    path = tmp_path_factory.mktemp("header") / "scan.nii.gz"
    nibabel.Nifti1Image(rng.normal(size=(4, 5, 6)).astype(np.float32), affine).to_filename(path)
    grid, _ = scans.load_scan(path)
    x, y, z = nibabel.affines.voxel_sizes(grid.affine)
    found = resampling.header_lattice(path)
    assert found is not None and found.sizes == (grid.shape[2], *grid.shape[:2])
    np.testing.assert_allclose(found.spacing, (z, x, y), rtol=1e-6)


def test_a_file_without_a_header_has_no_lattice(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"<html>")
    assert resampling.header_lattice(tmp_path / "a.nii.gz") is None
    assert resampling.header_lattice(tmp_path / "b.nii.gz") is None
    nibabel.Nifti1Image(np.ones((4, 5), np.float32), np.eye(4)).to_filename(tmp_path / "c.nii.gz")
    assert resampling.header_lattice(tmp_path / "c.nii.gz") is None
    Image.new("RGB", (4, 5)).save(tmp_path / "d.png")
    assert resampling.header_lattice(tmp_path / "d.png") is None


def data(folder, spacing) -> ConfigDict:
    return ConfigDict(
        {
            "layout": "brats", "dir": str(folder), "source": "", "modalities": ("T1", "FLAIR"), "reference": "FLAIR",
            "patient_pattern": "", "classes": ("background", "lesion"), "label_map": ((0, 0), (1, 1)), "intensity": {},
            "drop_copies": False, "names": {}, "spacing": spacing, "patch": (8, 8),
        }
    )  # fmt: skip


def write_case(folder: Path, name: str, zooms: tuple[float, float, float], label: bool = True) -> None:
    (folder / name).mkdir()
    values = np.random.default_rng(len(name)).uniform(1, 9, (12, 12, 4)).astype(np.float32)
    for kind in ("t1", "flair", "seg") if label else ("t1", "flair"):
        array = (values > 5).astype(np.uint8) if kind == "seg" else values + len(kind)
        # T1 is finer: the reference alone counts.
        affine = np.diag([*(np.array(zooms) / (2 if kind == "t1" else 1)), 1.0])
        nibabel.Nifti1Image(array, affine).to_filename(folder / name / f"{name}_{kind}.nii.gz")


def test_a_spacing_far_finer_than_a_scan_is_a_slip_of_the_pen():
    own = resampling.Lattice((4, 40, 40), (5.0, 1.0, 1.0))
    assert resampling.working(own, (0.0, 0.5, 0.5), "scan.nii.gz").sizes == (4, 80, 80)
    with pytest.raises(UserError, match=r"^scan\.nii\.gz: has 1 mm where config\.data\.spacing asks for 0\.01 mm"):
        resampling.working(own, (0.0, 0.01, 1.0), "scan.nii.gz")
    coarse = dataclasses.replace(volume(spacing=(5.0, 20.0, 20.0)), reference=Path("odd.nii.gz"))
    with pytest.raises(UserError, match=r"^odd\.nii\.gz: has 20 mm where config\.data\.spacing asks for 1 mm"):
        resampling.at_spacing(coarse, (0.0, 1.0, 1.0))


def test_a_plan_is_made_of_the_training_cases_once_and_kept(tmp_path):
    for name, zooms in (("a", (1, 1, 5)), ("b", (2, 2, 6)), ("c", (2, 3, 5)), ("d", (9, 9, 9)), ("e", (8, 8, 5))):
        write_case(tmp_path, name, zooms, label=name != "d")
    options, path = data(tmp_path, ("median",)), tmp_path / "spacing.json"
    with pytest.raises(UserError, match=r"spacing\.json: no such file; train"):
        dataset.working_spacing(options, path)
    assert dataset.working_spacing(options, path, ("a", "b", "c", "d")) == (0.0, 2.0, 2.0)
    assert json.loads(path.read_text()) == {"spacing": [0.0, 2.0, 2.0], "planned": [5.0, 2.0, 2.0], "cases": 3}
    assert dataset.working_spacing(options, path, ("e",)) == (0.0, 2.0, 2.0)  # never planned again
    (first, second), _ = dataset.read(options, ("a", "e"), 0, (0.0, 2.0, 2.0))
    assert first.body.shape == (4, 6, 6) and first.spacing == (5.0, 2.0, 2.0)
    assert second.body.shape == (4, 48, 48) and second.spacing == (5.0, 2.0, 2.0)
    volumes = data(tmp_path, ("median",))
    volumes.patch = (4, 8, 8)  # networks that see volumes have no reason to leave the slices as they are
    assert dataset.plan_spacing(volumes, ("a", "b", "c"))["spacing"] == [5.0, 2.0, 2.0]
    assert dataset.plan_strides(volumes, 2, 2) == ((1, 2, 2), (1, 1, 1))
    path.write_text("{")
    with pytest.raises(UserError, match=r"spacing\.json: is damaged"):
        dataset.working_spacing(options, path)
    path.unlink()
    assert dataset.working_spacing(data(tmp_path, (0, 1, 1)), path, ("a",)) == (0.0, 1.0, 1.0) and not path.exists()
    assert dataset.working_spacing(data(tmp_path, ()), path, ("a",)) == () and not path.exists()
    with pytest.raises(UserError, match="no training case has a header"):
        dataset.working_spacing(options, path, ("d",))


def test_training_reads_its_cases_at_the_planned_spacing(tmp_path):
    config = configs.phantom.get_config().copy_and_resolve_references().unlock()
    config.data.phantom.cases = (2, 1, 1, 1)
    config.data.spacing = (0.0, 2.0, 2.0)
    _, volumes, _ = train.read_data(config, tmp_path / "fixed")
    assert all(one.body.shape == (1, 16, 16) for part in volumes.values() for one in part)
    config.data.spacing = ("median",)
    _, volumes, _ = train.read_data(config, tmp_path / "planned")
    assert volumes["train"][0].body.shape == (1, 32, 32)
    assert json.loads((tmp_path / "planned" / "spacing.json").read_text())["planned"] == [1.0, 1.0, 1.0]
