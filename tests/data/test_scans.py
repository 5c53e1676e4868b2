"""A scan's file: geometry there and back, and every way in which a file can be none."""

import bz2
import gzip
import tracemalloc
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from entrust_jax.data import resampling, scans
from entrust_jax.errors import UserError
from made_up import AFFINE, head, picture, save


def orientations():
    """A permutation of the axes with signs, as an affine's linear part."""
    return st.tuples(st.permutations(range(3)), st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))


@settings(max_examples=200, deadline=None)
@given(orientations(), arrays(np.int16, (4, 5, 6), elements=st.integers(-50, 50)), st.integers(0, 3))
def test_round_trip_over_orientations(tmp_path_factory, orientation, values, seed):
    folder = tmp_path_factory.mktemp("trip")
    permutation, signs = orientation
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, permutation] * signs * rng.uniform(0.5, 4, 3)
    # A few degrees of obliqueness and an origin, as scanners have.
    angle = rng.uniform(-0.3, 0.3)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = rng.uniform(-90, 90, 3)
    scan = nibabel.Nifti1Image(values, affine)
    scan.header.set_sform(affine, code=[1, 2, 3, 4][seed])
    scan.header.set_qform(affine, code=seed)
    scan.header.set_xyzt_units("mm", "sec")
    scan.header["scl_slope"], scan.header["scl_inter"] = 2, 1
    scan.to_filename(folder / "scan.nii.gz")
    grid, canonical = scans.load_scan(folder / "scan.nii.gz")
    reference = nibabel.load(folder / "scan.nii.gz")
    expected = nibabel.as_closest_canonical(reference)
    np.testing.assert_array_equal(canonical, np.asanyarray(expected.dataobj))
    np.testing.assert_array_equal(grid.affine, expected.affine)
    internal = np.moveaxis(canonical, 2, 0)
    scans.write_map(folder / "map.nii.gz", internal, folder / "scan.nii.gz", np.float32)
    written = nibabel.load(folder / "map.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.asanyarray(reference.dataobj))
    for name in (
        "srow_x",
        "srow_y",
        "srow_z",
        "sform_code",
        "qform_code",
        "quatern_b",
        "quatern_c",
        "quatern_d",
    ):
        np.testing.assert_array_equal(written.header[name], reference.header[name])
    np.testing.assert_array_equal(written.affine, reference.affine)
    assert written.header.get_xyzt_units() == reference.header.get_xyzt_units()
    assert sorted(p.name for p in folder.iterdir()) == ["map.nii.gz", "scan.nii.gz"]


def test_channel_axes_and_stored_type(tmp_path):
    reference = save(tmp_path / "r.nii.gz", np.ones((4, 5, 6), np.int16), np.diag([-1.0, -1, 2, 1]))
    array = np.random.default_rng(0).integers(0, 255, (3, 6, 4, 5)).astype(np.uint8)
    for axis, given_array in ((0, array), (-1, np.moveaxis(array, 0, -1))):
        scans.write_map(tmp_path / "m.nii.gz", given_array, reference, np.uint8, channel_axis=axis)
        written = nibabel.load(tmp_path / "m.nii.gz")
        assert written.shape == (4, 5, 6, 3) and written.get_data_dtype() == np.uint8
        stored = np.asanyarray(written.dataobj)
        # Canonical x and y run against this scan's.
        np.testing.assert_array_equal(stored[0, 1, 2, 1], array[1, 2, 3, 3])
    for wrong, axis in ((array, None), (array[0], 0), (array[0], 1), (array[0, :5], None)):
        with pytest.raises(ValueError):
            scans.write_map(tmp_path / "n.nii.gz", wrong, reference, np.uint8, channel_axis=axis)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.nii.gz", "r.nii.gz"]


def test_a_map_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    reference = save(tmp_path / "r.nii.gz", np.ones((2, 3, 4), np.int16))

    def fail(image, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nibabel, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        scans.write_map(tmp_path / "m.nii.gz", np.zeros((4, 2, 3)), reference, np.float32)
    assert [p.name for p in tmp_path.iterdir()] == ["r.nii.gz"]


def test_other_grid_is_resampled_in_world_space(tmp_path):
    """A linear ramp in world space survives any linear resampling exactly, whatever the two grids."""

    def ramp(shape, affine):
        index = np.concatenate([np.indices(shape), np.ones((1, *shape))])
        x, y, z, _ = np.einsum("ij,jxyz->ixyz", affine, index)
        return (x + 2 * y - 3 * z).astype(np.float32)

    fine = np.diag([-1.0, 1.0, 2.0, 1.0])
    fine[:3, 3] = (15, -5, -2)
    coarse = np.diag([2.0, -3.0, 4.0, 1.0])
    coarse[:3, 3] = (-4, 20, 0)
    save(tmp_path / "a.nii.gz", ramp((40, 40, 20), fine), fine)
    save(tmp_path / "b.nii.gz", ramp((8, 7, 5), coarse), coarse)
    target, expected = scans.load_scan(tmp_path / "b.nii.gz")
    source, values = scans.load_scan(tmp_path / "a.nii.gz")
    result, covered = scans.resample(values, source, target, order=1)
    world = np.einsum("ij,jxyz->ixyz", target.affine, np.concatenate([np.indices((8, 7, 5)), np.ones((1, 8, 7, 5))]))
    within = (world[0] >= -24) & (world[0] <= 15) & (world[1] >= -5) & (world[1] <= 34) & (world[2] <= 36)
    assert within.mean() > 0.3
    assert covered[within].all()
    np.testing.assert_allclose(result[within], expected[within], atol=5e-3)  # smoothing bends it at the very border


def checkerboard(shape=(30, 30, 30)) -> np.ndarray:
    return (np.indices(shape).sum(axis=0) % 2).astype(np.float32)


def turned(degrees: float, step: float, middle: float) -> np.ndarray:
    """Voxels of `step` mm, turned about the slice axis, whose grid begins near the middle."""
    angle = np.deg2rad(degrees)
    affine = np.diag([step, step, step, 1.0])
    affine[:2, :2] = step * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine[:3, 3] = middle
    return affine


@pytest.mark.parametrize(("degrees", "step"), [(0, 3.0), (0, 4.0), (45, 4.0)])
def test_a_checkerboard_on_a_much_coarser_grid_is_its_mean(tmp_path, degrees, step):
    board, label = checkerboard(), checkerboard().astype(np.int32)
    source = scans.Grid(tmp_path / "a.nii.gz", board.shape, np.eye(4))
    target = scans.Grid(tmp_path / "b.nii.gz", (4, 4, 4), turned(degrees, step, 12.0))
    result, covered = scans.resample(board, source, target, order=1)
    assert covered.all()
    np.testing.assert_allclose(result, 0.5, atol=0.01)
    # Classes have no mean.
    assert set(np.unique(scans.resample(label, source, target, order=0)[0])) <= {0, 1}


def test_an_image_on_a_grid_that_is_little_coarser_is_not_smoothed(tmp_path):
    board = checkerboard((9, 9, 9))
    for step in (0.5, 1.0, 1.5, 1.5000002):
        assert scans.smoothed(board, np.full(3, step)) is board
    along_one = scans.smoothed(board, np.array([1.0, 3.0, 1.0]))
    np.testing.assert_allclose(along_one[:, 4], 0.5, atol=0.01)


FIELDS = st.tuples(st.integers(0, 359), st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    return save(tmp_path_factory.mktemp("sound") / "sound.nii", head((8, 7, 6))).read_bytes()


OTHERS = (".mgz", ".mgh", ".img", ".hdr", ".img.gz", ".hdr.gz", ".nii.bz2", ".nii.zst", ".nrrd", ".npy", "")
PACKINGS = (bytes, partial(gzip.compress, compresslevel=1), bz2.compress)
NAMED = st.sampled_from(tuple(zip((".nii", ".nii.gz"), PACKINGS, strict=False)))  # as their content says
MISNAMED = st.tuples(st.sampled_from((".nii", ".nii.gz", *OTHERS)), st.sampled_from(PACKINGS))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of nibabel, where a quaternion or a slope is absurd
@settings(max_examples=2000, deadline=None)
@given(
    changes=st.lists(FIELDS, min_size=1, max_size=8),
    kind=NAMED | NAMED | MISNAMED,
    kept=st.integers(0, 2000) | st.none(),
)
def test_a_header_of_any_bytes_is_read_or_refused_in_one_line(tmp_path_factory, sound, changes, kind, kept):
    """Whatever its name and packing, and never costs more memory than the file could fill: sizes are checked before

    anything is allocated.
    """
    data = bytearray(sound)
    for place, value in changes:
        data[place] = value
    ending, packing = kind
    path = tmp_path_factory.getbasetemp() / f"fuzzed{ending}"
    path.write_bytes(packing(bytes(data[:kept])))
    tracemalloc.start()
    try:
        grid, values = scans.load_scan(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        assert ending in (".nii", ".nii.gz")
        assert values.shape == grid.shape and len(grid.shape) == 3 and np.isfinite(values).all()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10e6


def of_another_kind(folder: Path, ending: str) -> Path:
    """A sound scan in a format whose header nibabel does not hold against the file, which then promises gigabytes."""
    path, values = folder / f"scan{ending}", head((8, 7, 6))
    kind = nibabel.MGHImage if ending == ".mgz" else nibabel.Nifti1Image if ending == ".nii.bz2" else nibabel.Nifti1Pair
    kind(values, AFFINE).to_filename(path)
    header = path.with_name(path.name.replace(".img", ".hdr"))
    unpack, pack = {".mgz": (gzip.decompress, gzip.compress), ".img.gz": (gzip.decompress, gzip.compress)}.get(
        ending, (bz2.decompress, bz2.compress) if ending == ".nii.bz2" else (bytes, bytes)
    )
    data = bytearray(unpack(header.read_bytes()))
    if ending == ".mgz":
        data[4:16] = np.array([2000, 1000, 200], ">i4").tobytes()
    else:
        data[42:48] = np.array([2000, 1000, 200], "<i2").tobytes()
    header.write_bytes(pack(bytes(data)))
    return path


@pytest.mark.parametrize("ending", [".mgz", ".img", ".img.gz", ".nii.bz2"])
def test_other_formats_are_told_to_be_converted_before_anything_is_allocated(tmp_path, ending):
    path = of_another_kind(tmp_path, ending)
    tracemalloc.start()
    with pytest.raises(
        UserError, match=r"is no \.nii\.gz or \.nii file by its name.*; convert it to \.nii\.gz"
    ) as error:
        scans.load_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: ") and peak < 10e6


def test_a_folder_is_no_scan(tmp_path):
    with pytest.raises(UserError, match=r": is a folder; give the scan in it"):
        scans.load_scan(tmp_path)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_file_under_the_name_of_a_packed_one_is_told_its_own(tmp_path, kind):
    values = head((8, 7, 6))
    kind(values, AFFINE).to_filename(tmp_path / "plain.nii")
    kind(values, AFFINE).to_filename(tmp_path / "packed.nii.gz")
    plain, packed = tmp_path / "A.nii.gz", tmp_path / "B.NII"
    (tmp_path / "plain.nii").rename(plain)
    (tmp_path / "packed.nii.gz").rename(packed)
    for path, name in ((plain, "A.nii"), (packed, "B.NII.gz")):
        with pytest.raises(UserError, match=f"is a NIfTI file under a wrong name; rename it to {name}$"):
            scans.load_scan(path)
        assert scans.load_scan(path.rename(tmp_path / name))[1].shape == (8, 7, 6)


def test_values_that_float32_cannot_hold_are_infinite_and_said(tmp_path, recwarn):
    path = save(tmp_path / "large.nii", head().astype(np.float64) * 1e300)
    with pytest.raises(UserError, match=r"large\.nii: contains NaN or infinite values"):
        scans.load_scan(path)
    assert not [one for one in recwarn if one.category is RuntimeWarning]


def test_a_header_that_promises_gigabytes_is_refused_before_they_are_allocated(tmp_path):
    path = save(tmp_path / "absurd.nii.gz", head((8, 7, 6)))
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[42:48] = np.array([2000, 2000, 500], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(data)))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"its header promises 8000000352 bytes, the file holds 1696\)"):
        scans.load_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_a_bad_header_is_one_error_without_lines_of_another_library(tmp_path, capfd):
    path = save(tmp_path / "bad.nii", head())
    data = bytearray(path.read_bytes())
    data[70:72] = (999).to_bytes(2, "little")  # datatype
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"bad\.nii"):
        scans.load_scan(path)
    assert capfd.readouterr() == ("", "")


def test_an_upper_case_file_is_checked_like_any_other(tmp_path):
    path = save(tmp_path / "scan.nii.gz", head()).rename(tmp_path / "SCAN.NII.GZ")
    assert scans.load_scan(path)[1].shape == (16, 14, 6)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="unreadable or truncated"):
        scans.load_scan(path)


def test_a_dicom_file_is_told_what_to_become(tmp_path):
    for name in ("IM1.nii", "IM1.dcm", "IM1"):
        (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 500)
        with pytest.raises(UserError, match=rf"{name}: is a DICOM file; convert"):
            scans.load_scan(tmp_path / name)


def test_a_picture_is_read_as_it_is_shown(tmp_path):
    """Turned by what its camera noted, and without its transparency."""
    scan = Image.open(picture(tmp_path / "image.png"))
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by a quarter to the right
    scan.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    scan.convert("LA").save(tmp_path / "clear.png")
    expected = scans.load_scan(tmp_path / "image.png")[1]
    for name in ("turned.png", "clear.png"):
        np.testing.assert_array_equal(scans.load_scan(tmp_path / name)[1], expected)


def test_pictures_that_are_none(tmp_path):
    colour = tmp_path / "colour.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(colour)
    with pytest.raises(UserError, match=r"colour\.png: is a picture in colour"):
        scans.load_scan(colour)
    whole = picture(tmp_path / "whole.jpg").read_bytes()
    for name, content in (("half.jpg", whole[: len(whole) // 2]), ("text.png", b"text"), ("nothing.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: unreadable or truncated"):
            scans.load_scan(tmp_path / name)
    with pytest.raises(UserError, match=r"gone\.png: no such file"):
        scans.load_scan(tmp_path / "gone.png")


def with_header(path: Path, affine: np.ndarray, unit: str = "mm", **forms) -> Path:
    """A scan with this affine, or with an sform and a qform (affine, code)."""
    scan = nibabel.Nifti1Image(head(), affine)
    for name, (form, code) in forms.items():
        getattr(scan, f"set_{name}")(form, code=code)
    scan.header.set_xyzt_units(unit)
    scan.to_filename(path)
    return path


@pytest.mark.parametrize(("unit", "factor", "words"), [("meter", 1e-3, "metres"), ("micron", 1e3, "microns")])
def test_a_header_in_another_unit_is_read_in_mm_and_told(tmp_path, unit, factor, words):
    affine = np.diag([-0.8, 2.0, 5.0, 1.0])
    affine[:3, 3] = (60.0, -70.0, 80.0)
    expected, values = scans.load_scan(with_header(tmp_path / "mm.nii.gz", affine))
    path = with_header(tmp_path / f"{unit}.nii.gz", np.diag([factor] * 3 + [1.0]) @ affine, unit)
    grid, same = scans.load_scan(path)
    np.testing.assert_array_equal(values, same)
    np.testing.assert_allclose(grid.affine, expected.affine, rtol=1e-6)
    assert expected.doubts == ()
    assert grid.doubts == (f"{path}: its header is in {words}: voxels of 0.8 x 2 x 5 mm are taken",)
    found = resampling.header_lattice(path)
    assert found is not None
    np.testing.assert_allclose(found.spacing, (5.0, 0.8, 2.0), rtol=1e-6)
    # A map is written in the scan's own geometry, unit included.
    scans.write_map(tmp_path / "map.nii.gz", np.moveaxis(same, 2, 0), path, np.float32)
    written, scan = nibabel.load(tmp_path / "map.nii.gz"), nibabel.load(path)
    np.testing.assert_array_equal(written.affine, scan.affine)
    assert written.header.get_xyzt_units() == scan.header.get_xyzt_units()
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), np.asanyarray(scan.dataobj))


@pytest.mark.parametrize(
    ("affine", "words"),
    [(np.diag([0.002, 0.002, 0.005, 1.0]), "0.002 x 0.002 x 0.005"), (np.diag([1.0, 1.0, 900.0, 1.0]), "1 x 1 x 900")],
)
def test_voxels_that_no_patient_has_are_told(tmp_path, affine, words):
    path = with_header(tmp_path / "a.nii.gz", affine)
    assert scans.load_scan(path)[0].doubts == (
        f"{path}: has voxels of {words} mm, which no scan of a patient has; mend the spacing or the unit in its header",
    )


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_voxels_that_arithmetic_cannot_hold_are_refused(tmp_path, size):
    with pytest.raises(UserError, match="affine is singular or not finite"):
        scans.load_scan(with_header(tmp_path / "a.nii.gz", np.diag([size, size, size, 1.0])))


def test_a_file_that_does_not_say_how_it_is_oriented_is_named(tmp_path):
    path = with_header(tmp_path / "a.nii.gz", np.diag([-2.0, 3.0, 4.0, 1.0]), sform=(None, 0), qform=(None, 0))
    grid, _ = scans.load_scan(path)
    (line,) = grid.doubts
    assert line.startswith(f"{path}: does not say how it is oriented (sform_code and qform_code are 0)")
    # What it says is what is done: the first axis runs to the left, the others to the front and to the head.
    assert nibabel.aff2axcodes(nibabel.load(path).affine) == ("L", "A", "S")


def test_two_affines_of_one_file_that_disagree_are_told_with_the_distance(tmp_path):
    sform, qform = np.diag([2.0, 2.0, 5.0, 1.0]), np.diag([2.0, 2.0, 5.0, 1.0])
    qform[:3, 3] = (0.0, 30.0, 40.0)
    path = with_header(tmp_path / "a.nii.gz", sform, sform=(sform, 1), qform=(qform, 1))
    grid, _ = scans.load_scan(path)
    (line,) = grid.doubts
    assert line.startswith(f"{path}: its qform and its sform place voxels up to 50 mm apart; the sform is used")
    np.testing.assert_array_equal(grid.affine, sform)
    for near in ((0.0, 0.0, 0.0), (0.0, 1.9, 0.0)):  # less than a voxel
        qform[:3, 3] = near
        assert scans.load_scan(with_header(path, sform, sform=(sform, 1), qform=(qform, 1)))[0].doubts == ()
    qform[:3, 3] = (0.0, 30.0, 0.0)  # not in use
    assert scans.load_scan(with_header(path, sform, sform=(sform, 1), qform=(qform, 0)))[0].doubts == ()
