"""From the files of a case to arrays: body, normalisation, label, and the errors that damaged files cause."""

import dataclasses
import gzip
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from entrust_jax.data import layouts, preprocess, scans
from entrust_jax.errors import UserError
from made_up import AFFINE, head, picture, save

OPTIONS = {
    "modalities": ("T1", "FLAIR"),
    "reference": "FLAIR",
    "label_map": ((0, 0), (1, 1), (4, 2)),
    "classes": ("background", "core", "ring"),
}


def make_case(folder: Path, t1=None, flair=None, label=None, **affines) -> layouts.Case:
    images = {
        "T1": save(folder / "T1.nii.gz", head(seed=1) if t1 is None else t1, affines.get("t1", AFFINE)),
        "FLAIR": save(folder / "FLAIR.nii.gz", head(seed=2) if flair is None else flair, affines.get("flair", AFFINE)),
    }
    if label is None:
        label = np.zeros((16, 14, 6), np.uint8)
        label[6:9, 6:9, 2:4] = 1
        label[7, 7, 3] = 4
    mask = save(folder / "label.nii.gz", label, affines.get("label", AFFINE))
    return layouts.Case("case", "patient", 7, images, mask)


def read(case, **changes):
    return preprocess.read_volume(case, **{**OPTIONS, **changes})


def test_volume_of_a_plain_case(tmp_path):
    volume = read(make_case(tmp_path))
    assert volume.image.shape == (2, 6, 16, 14) and volume.image.dtype == np.float32
    assert volume.spacing == (4.0, 2.0, 3.0)
    assert volume.present.all() and volume.reference == tmp_path / "FLAIR.nii.gz" and volume.warnings == ()
    assert (volume.name, volume.patient, volume.number) == ("case", "patient", 7)
    label = volume.label
    assert label is not None and label.dtype == np.int32
    assert label[3, 7, 7] == 2 and label[2, 6, 8] == 1 and np.bincount(label.ravel()).tolist()[1:] == [17, 1]
    x, y = np.meshgrid(np.linspace(-1, 1, 16), np.linspace(-1, 1, 14), indexing="ij")
    np.testing.assert_array_equal(volume.body, np.broadcast_to(x**2 + y**2 < 0.6, (6, 16, 14)))
    inside = volume.image[:, volume.body]
    np.testing.assert_allclose(inside.mean(1), 0, atol=0.01)
    np.testing.assert_allclose(inside.std(1), 1, atol=0.02)
    assert not volume.image[:, ~volume.body].any()


def test_missing_modality_and_missing_reference(tmp_path):
    case = make_case(tmp_path)
    only = layouts.Case("c", "c", 1, {"T1": case.images["T1"]}, None)
    volume = read(only)
    assert volume.present.tolist() == [True, False] and not volume.image[1].any()
    assert volume.reference == case.images["T1"] and volume.label is None
    with pytest.raises(UserError, match="none of T1, FLAIR"):
        read(layouts.Case("c", "c", 1, {}, None))


def test_smaller_field_of_view_is_neither_body_nor_measured(tmp_path):
    """T1 covers the lower half in x only: beyond it T1 is 0 and does not extend the body."""
    case = make_case(tmp_path, t1=head()[:8])
    volume = read(case)
    full = read(make_case(tmp_path))
    assert not volume.image[0, :, 8:].any() and volume.image[0, :, :8].any()
    np.testing.assert_array_equal(volume.body, full.body)
    # The label's own grid is smaller: what it does not reach is unlabelled, and that is said.
    part = read(make_case(tmp_path, label=np.ones((8, 14, 6), np.uint8)))
    assert part.label is not None and (part.label[:, :8] == 1).all() and (part.label[:, 8:] == -1).all()
    assert "label.nii.gz: lies on another grid than" in part.warnings[0]
    assert (
        "(shape 8 x 14 x 6, not 16 x 14 x 6; 50% of it covered); resampled by nearest voxel, the rest"
        in part.warnings[0]
    )


def test_float_label_and_label_map(tmp_path):
    label = np.zeros((16, 14, 6), np.float32)
    label[8, 8, 3] = 4.0
    volume = read(make_case(tmp_path, label=label))
    assert volume.label is not None and volume.label[3, 8, 8] == 2
    with pytest.raises(UserError, match=r"config\.data\.label_map has classes 0 to 5"):
        read(make_case(tmp_path), label_map=((0, 0), (1, 1), (4, 5)))


def test_a_value_of_the_map_that_no_class_can_have_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.label_map has the value 0\.6; masks hold whole numbers"):
        read(make_case(tmp_path), label_map=((0, 0), (0.6, 1)))


def shifted(*mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:3, 3] += mm
    return affine


MIRRORED = np.array([[-2.0, 0, 0, 32], [0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    ("affine", "said"),
    [
        (np.eye(4), r"up to 33\.6 mm apart by the affines; 6% of it covered\)"),
        (MIRRORED, r"up to 2 mm apart by the affines; 94% of it covered\)"),
        (shifted(0.0, 0.0, 2.0), r"up to 2 mm apart by the affines\)"),
        (shifted(0.25, 0.0, 0.0), r"up to 0\.25 mm apart by the affines\)"),
    ],
)
def test_a_label_that_lost_its_affine_is_an_error_that_names_both_files(tmp_path, affine, said):
    case = make_case(tmp_path)
    save(case.label, np.asanyarray(nibabel.load(case.label).dataobj), affine)
    with pytest.raises(UserError, match=said) as error:
        read(case)
    assert f"{tmp_path}/label.nii.gz: lies on another grid than {tmp_path}/FLAIR.nii.gz (the same" in str(error.value)
    assert "save the label with the affine of that scan" in str(error.value) and "\n" not in str(error.value)
    good = tmp_path / "good"
    good.mkdir()
    volumes, problems = preprocess.read_volumes([case, make_case(good)], **OPTIONS)
    assert len(volumes) == 1 and "label.nii.gz: lies on another grid" in problems[0] and "is left out" in problems[0]


def test_a_label_that_covers_little_is_an_error_that_names_both_files(tmp_path):
    with pytest.raises(
        UserError, match=r"label\.nii\.gz: lies on another grid than .*FLAIR\.nii\.gz \(shape 5 x 14 x 6"
    ):
        read(make_case(tmp_path, label=np.ones((5, 14, 6), np.uint8)))


def test_a_label_on_another_grid_is_told_and_one_that_was_drawn_on_a_scan_stays(tmp_path):
    label = np.zeros((8, 7, 6), np.uint8)
    label[3:5, 3:5, 2:4] = 1
    case = make_case(tmp_path, label=label)
    coarse = np.diag([4.0, 6.0, 4.0, 1.0])
    coarse[:3, 3] = (1.0, 1.5, 0.0)
    save(case.label, label, coarse)
    volume = read(case)
    (line,) = volume.warnings
    assert line == (
        f"{case.label}: lies on another grid than {case.images['FLAIR']} (shape 8 x 7 x 6, not 16 x 14 x 6); resampled"
        " by nearest voxel"
    )
    assert (volume.label == 1).sum() == 32
    rounded = make_case(tmp_path)
    save(rounded.label, np.asanyarray(nibabel.load(rounded.label).dataobj), shifted(0.01, 0.0, 0.0))
    (line,) = read(rounded).warnings
    assert "up to 0.01 mm apart by the affines); resampled by nearest voxel" in line
    # Of another scan's grid, whatever its place: it was drawn there.
    moved = shifted(0.0, 9.0, 0.0)
    on_t1 = make_case(tmp_path)
    for path in (on_t1.images["T1"], on_t1.label):
        save(path, np.asanyarray(nibabel.load(path).dataobj), moved)
    lines = read(on_t1).warnings
    assert any("label.nii.gz: lies on another grid than" in line and "up to 9 mm" in line for line in lines)


def test_voxels_of_an_ignored_value_count_as_unlabelled(tmp_path):
    label = np.zeros((16, 14, 6), np.uint8)
    label[6:9, 6:9, 2:4], label[0, 0, 0] = 1, 255
    volume = read(make_case(tmp_path, label=label), label_map=((0, 0), (1, 1), (255, -1)))
    assert volume.label is not None and volume.label[0, 0, 0] == -1 and np.sum(volume.label < 0) == 1
    with pytest.raises(UserError, match="has classes -2 to 1"):
        read(make_case(tmp_path, label=label), label_map=((0, 0), (1, 1), (255, -2)))


def test_empty_label_is_allowed_and_said(tmp_path):
    volume = read(make_case(tmp_path, label=np.zeros((16, 14, 6), np.uint8)))
    assert volume.label is not None and not volume.label.any()
    assert "label.nii.gz: empty label" in volume.warnings[0]


def with_nan():
    values = head()
    values[1, 2, 3] = np.nan
    return values


FAR = np.array([[2.0, 0, 0, 5000], [0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    "what, file, message",
    [
        ({"t1": with_nan()}, "T1.nii.gz", "contains NaN"),
        (
            {"t1": np.full((16, 14, 6), 5.0), "flair": np.zeros((16, 14, 6))},
            "T1.nii.gz",
            "every voxel has the same value, and no other scan of case case says more",
        ),
        ({"t1": np.zeros((16, 14, 6, 2))}, "T1.nii.gz", r"shape \(16, 14, 6, 2\), expected one 3-D scan"),
        ({"t1": head()[0]}, "T1.nii.gz", "expected one 3-D scan"),
        (
            {"label": np.full((16, 14, 6), 3)},
            "label.nii.gz",
            r"label value 3 .*config\.data\.label_map.*add \(3",
        ),
        (
            {"label": np.where(np.arange(6) < 3, 0.6, 0.25) * np.ones((16, 14, 6))},
            "label.nii.gz",
            r"values between whole numbers \(0\.25, 0\.6\), so it is no mask of classes; give the mask",
        ),
        (
            {"label": np.arange(16)[:, None, None] // 3 * np.ones((16, 14, 6))},
            "label.nii.gz",
            r"label values 2, 3, 5 are not in config\.data\.label_map \(it knows \[0, 1, 4\]\); add",
        ),
        (
            {"label": np.arange(16 * 14 * 6).reshape(16, 14, 6)},
            "label.nii.gz",
            "values 2, 3, 5, 6, .*, 10 and 1333 more are",
        ),
    ],
)
def test_bad_content_names_the_file(tmp_path, what, file, message):
    what = {name: np.float32(values) for name, values in what.items()}
    with pytest.raises(UserError, match=message) as error:
        read(make_case(tmp_path, **what))
    assert str(tmp_path / file) in str(error.value) and "\n" not in str(error.value)


def test_what_a_header_leaves_open_is_told_of_scans_and_labels(tmp_path):
    case = make_case(tmp_path)
    for path in (*case.images.values(), case.label):
        scan = nibabel.load(path)
        scan.set_sform(None, code=0)
        scan.set_qform(None, code=0)
        scan.to_filename(path)
    lines = read(case).warnings
    assert len(lines) == 3
    for path, line in zip((case.images["FLAIR"], case.images["T1"], case.label), lines, strict=True):
        assert line.startswith(f"{path}: does not say how it is oriented (sform_code and qform_code are 0)")


def test_a_header_in_metres_gives_the_case_that_millimetres_give(tmp_path):
    plain, metres = tmp_path / "plain", tmp_path / "metres"
    plain.mkdir()
    metres.mkdir()
    expected, case = read(make_case(plain)), make_case(metres)
    for path in (case.images["T1"], case.label):
        scan = nibabel.load(path)
        scan = nibabel.Nifti1Image(np.asanyarray(scan.dataobj), np.diag([1e-3, 1e-3, 1e-3, 1.0]) @ scan.affine)
        scan.header.set_xyzt_units("meter")
        scan.to_filename(path)
    volume = read(case)
    np.testing.assert_allclose(volume.image, expected.image, atol=1e-4)
    np.testing.assert_array_equal(volume.label, expected.label)
    assert [line for line in volume.warnings if "T1.nii.gz: its header is in metres: voxels of 2 x 3 x 4 mm" in line]


@pytest.mark.parametrize(("name", "other"), [("t1", "FLAIR"), ("flair", "T1")])
def test_a_scan_with_one_value_is_a_missing_one(tmp_path, name, other):
    case = make_case(tmp_path, **{name: np.full((16, 14, 6), 5.0, np.float32)})
    volume = read(case)
    assert volume.reference == case.images[other] and f"{name.upper()}.nii.gz: every voxel" in volume.warnings[0]
    alone = read(dataclasses.replace(case, images={other: case.images[other]}))
    np.testing.assert_array_equal(volume.present, alone.present)
    np.testing.assert_array_equal(volume.image, alone.image)


def test_a_scan_with_one_value_inside_the_body_is_a_missing_one(tmp_path):
    far = np.full((16, 14, 6), 2.0, np.float32)
    far[0, 0] = 3.0  # in the air
    volume = read(make_case(tmp_path, t1=far))
    assert not volume.present[OPTIONS["modalities"].index("T1")] and volume.present.sum() == 1
    assert any("T1.nii.gz: has one single value inside the body" in warning for warning in volume.warnings)


@pytest.mark.parametrize("name, file", [("t1", "T1.nii.gz"), ("label", "label.nii.gz")])
def test_grid_that_does_not_overlap_names_both_files(tmp_path, name, file):
    with pytest.raises(UserError, match="does not overlap") as error:
        read(far_case(tmp_path, name))
    assert str(tmp_path / file) in str(error.value) and str(tmp_path / "FLAIR.nii.gz") in str(error.value)


def far_case(folder, name):
    case = make_case(folder)
    path = case.images["T1"] if name == "t1" else case.label
    assert path is not None
    scan = nibabel.load(path)
    save(path, np.asanyarray(scan.dataobj), FAR)
    return case


def damage_truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damage_magic(path):
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[344:348] = b"xxxx"
    data[:4] = b"\0\0\0\0"
    path.write_bytes(gzip.compress(bytes(data)))


def damage_not_gzip(path):
    path.write_bytes(b"<html>403 Forbidden</html>")


def damage_empty(path):
    path.write_bytes(b"")


def damage_short(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:1000]))


def damage_crc(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def damage_affine(value):
    def damage(path):
        scan = nibabel.load(path)
        values = np.asanyarray(scan.dataobj)
        scan.header.set_sform(np.eye(4), code=1)
        scan.header["srow_x"] = value
        scan.header["srow_y"] = value
        raw = bytes(scan.header.binaryblock) + b"\0" * 4 + values.astype("<f4").tobytes(order="F")
        path.write_bytes(gzip.compress(raw))

    return damage


def damage_axis(path):
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[42:44] = (0).to_bytes(2, "little")
    path.write_bytes(gzip.compress(bytes(data)))


def damage_shape(path):
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[42:48] = np.array([2000, 2000, 500], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(data)))


def damage_shear(path):
    """Two axes that run the same way, as far as floats can tell, with a determinant of 1."""
    scan = nibabel.load(path)
    header = scan.header
    header.set_sform(np.eye(4), code=1)
    header["srow_x"] = [1, 0, 1e17, 0]
    raw = bytes(header.binaryblock) + b"\0" * 4 + np.asanyarray(scan.dataobj).astype("<f4").tobytes(order="F")
    path.write_bytes(gzip.compress(raw))


def damage_colour(path):
    colour = np.zeros((16, 14, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    image = nibabel.Nifti1Image(colour, AFFINE)
    data = bytearray(image.to_bytes())
    data[112:116] = np.float32(2).tobytes()  # a slope, which numpy cannot multiply colours by
    path.write_bytes(gzip.compress(bytes(data)))


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_truncate, "truncated.*Compressed file ended before"),
        (damage_magic, "unreadable.*Cannot work out file type"),
        (damage_not_gzip, "unreadable.*Not a gzipped file"),
        (damage_empty, "unreadable.*Empty file"),
        (damage_short, r"truncated.*its header promises 5728 bytes, the file holds 1000\)"),
        (damage_crc, "unreadable.*(CRC check failed|Error -3 while decompressing)"),
        (damage_axis, "empty axis"),
        (damage_shape, r"truncated.*its header promises 8000000352 bytes, the file holds 5728\)"),
        (damage_shear, "affine is singular"),
        (damage_colour, r"holds .*'R'.*, not one number per voxel"),
        (damage_affine(0), "affine is singular"),
        (damage_affine(np.nan), "affine is singular or not finite"),
        (Path.unlink, "no such file"),
    ],
)
def test_damaged_file_stops_that_case_and_training_goes_on(tmp_path, damage, message):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    cases = [make_case(bad), make_case(good)]
    damage(cases[0].images["T1"])
    with pytest.raises(UserError, match=message) as error:
        read(cases[0])
    assert str(bad / "T1.nii.gz") in str(error.value) and "\n" not in str(error.value)
    volumes, problems = preprocess.read_volumes(cases, **OPTIONS)
    assert [volume.reference for volume in volumes] == [good / "FLAIR.nii.gz"]
    assert len(problems) == 1 and str(bad / "T1.nii.gz") in problems[0] and "left out" in problems[0]


def test_a_label_value_that_the_config_forgot_stops_the_whole_set(tmp_path):
    """Leaving such cases out would leave out just those with that class."""
    cases = []
    for name, value in (("good", 1), ("forgot", 3)):
        folder = tmp_path / name
        folder.mkdir()
        label = np.zeros((16, 14, 6), np.uint8)
        label[6:9, 6:9, 2:4] = value
        cases.append(make_case(folder, label=label))
    with pytest.raises(UserError, match=r"forgot.*label value 3"):
        preprocess.read_volumes(cases, **OPTIONS)


def test_a_modality_that_covers_little_of_the_body_is_told(tmp_path):
    case = make_case(tmp_path)
    save(case.images["T1"], head()[:, :, :2])
    (line,) = read(case).warnings
    assert "T1.nii.gz: covers only 3" in line
    assert read(make_case(tmp_path)).warnings == ()


def test_a_scan_that_ends_is_missing_in_the_slices_beyond(tmp_path):
    """Of five slices T1 was measured in three; another scan may be filled up with one value."""
    rng = np.random.default_rng(0)
    t1 = rng.normal(200, 20, (12, 12, 3)).astype(np.float32)
    flair = rng.normal(200, 20, (12, 12, 5)).astype(np.float32)
    case = read(make_case(tmp_path, t1=t1, flair=flair))
    assert case.present.all() and case.body.any(axis=(1, 2)).all()
    ends = preprocess.shown(case)
    assert sorted(ends.tolist()) == [[True, True, True, False, False], [True] * 5]
    filled, other = int(np.flatnonzero(ends.all(axis=1))[0]), int(np.flatnonzero(~ends.all(axis=1))[0])
    image, body = case.image.copy(), case.body.copy()
    image[filled, 0], body[4] = np.where(body[0], -0.7, 0), False
    changed = dataclasses.replace(case, image=image, body=body)
    assert preprocess.shown(changed)[filled].tolist() == [False, True, True, True, True]
    assert preprocess.shown(changed)[other].tolist() == [True, True, True, False, True]  # without a body: as the case
    lacking = dataclasses.replace(changed, present=np.arange(2) == filled)
    assert not preprocess.shown(lacking)[other].any()


def test_a_copy_counts_as_missing_where_the_config_says_so(tmp_path):
    same = make_case(tmp_path, t1=head(seed=1), flair=head(seed=1))
    kept, dropped = read(same), read(same, drop_copies=True)
    assert kept.present.all() and dropped.present.tolist() == [False, True]  # FLAIR is the reference
    assert not dropped.image[0].any() and dropped.image[1].any() and "T1 counts as missing" in dropped.warnings[0]


def test_read_volumes_leaves_out_unlabelled_cases_and_passes_warnings_on(tmp_path):
    case = make_case(tmp_path, label=np.zeros((16, 14, 6), np.uint8))
    bare = layouts.Case("bare", "bare", 1, case.images, None)
    volumes, problems = preprocess.read_volumes([bare, case], **OPTIONS)
    assert [volume.name for volume in volumes] == ["case"]
    assert "bare has no label" in problems[0] and "empty label" in problems[1]


def test_a_rule_that_does_not_fit_the_values_is_noticed(tmp_path):
    """CT that was stored with another offset lies above its window; CT that was scaled to 0 ... 1 fills none of it."""
    above = read(make_case(tmp_path), intensity={"T1": ("window", -1000, -900)})
    assert not above.present[0] and "T1.nii.gz: has one single value inside the body" in above.warnings[0]
    assert "config.data.intensity.T1 = ('window', -1000, -900)" in above.warnings[0]
    little = read(make_case(tmp_path, t1=head(seed=1) / 1e4), intensity={"T1": ("window", -160, 240)})
    assert little.present[0] and "T1.nii.gz: hardly varies inside the body" in little.warnings[0]


@pytest.mark.parametrize(
    ("rule", "values", "said"),
    [
        (("scale", 2.5), (-1000, -90, 40, 60), r"is negative inside the body \(down to -1000\)"),
        (("scale", 2.5), (-0.1, 0.3, 0.9, 12.0), None),  # a reconstruction's ripples
        (
            ("window", -160.0, 240.0),
            (0, 0.3, 0.9, 12.0),
            "is nowhere below 0 inside the body, as fat and air are on CT",
        ),
        (("window", -160.0, 240.0), (-1000, -90, 40, 1900), None),
        (("window", -160.0, 240.0), (-500, 1200, 1500, 3000), "half of them above 1350, inside the body, as no CT has"),
        (("window", -160.0, 240.0), (-30000, -90, 40, 60), "has values from -3e\\+04, half of them above -25"),
        (("window", 0.0, 80.0), (1, 20, 40, 60), None),  # a brain without its skull has no fat and no air
        (None, (-1000, -90, 40, 60), None),
    ],
)
def test_values_that_a_rule_cannot_be_for_are_told(rule, values, said):
    found = preprocess.unfit(np.repeat(np.array(values, np.float32), 20), rule)
    assert found is None if said is None else re.search(said, found or "")


def test_values_that_do_not_go_with_their_rule_name_the_file_and_the_rule(tmp_path):
    ct = np.where(head(seed=1) > 50, head(seed=1) - 90, -1000.0).astype(np.float32)
    lines = read(make_case(tmp_path, t1=ct), intensity={"T1": ("scale", 2.5)}).warnings
    assert any(
        "T1.nii.gz: is negative inside the body" in line and "intensity.T1 = ('scale', 2.5)" in line for line in lines
    )
    lines = read(make_case(tmp_path), intensity={"T1": ("window", -160.0, 240.0)}).warnings
    assert any("T1.nii.gz: is nowhere below 0" in line for line in lines)


def test_a_copy_is_named_also_where_scale_and_type_differ(tmp_path):
    t1 = head(seed=1).astype(np.float32)
    scaled = np.rint(3e4 * (t1 - t1.min()) / np.ptp(t1)).astype(np.int16)
    volume = read(make_case(tmp_path, t1=t1, flair=scaled), intensity={"T1": ("scale", 2.0)})
    assert "T1.nii.gz and " in volume.warnings[0] and "are the same scan voxel for voxel" in volume.warnings[0]
    assert read(make_case(tmp_path)).warnings == ()


def test_a_label_beside_the_body_gets_a_word(tmp_path):
    label = np.zeros((16, 14, 6), np.uint8)
    label[0, :3] = 1
    assert any("outside the body" in line for line in read(make_case(tmp_path, label=label)).warnings)


def test_a_case_is_read_by_the_rules_of_its_config(tmp_path):
    case = make_case(tmp_path)
    volume = read(case, intensity={"T1": ("window", 0.0, 1e4)})
    plain = read(case)
    np.testing.assert_array_equal(volume.image[1], plain.image[1])
    assert np.all(volume.image[0][volume.body] < -1.9) and np.all(volume.present)


def test_real_glioma_cases(data_root):
    folder = data_root / "Dataset101_LowerGradeGlioma"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    names = ("T1", "FLAIR", "T1ce")
    cases = layouts.find_cases("nnunet", folder, names)
    incomplete = [case for case in cases if len(case.images) < 3]
    options = {
        **OPTIONS,
        "modalities": names,
        "label_map": ((0, 0), (1, 1)),
        "classes": ("background", "lesion"),
    }
    volumes, problems = preprocess.read_volumes(cases[::6] + incomplete, **options)
    assert len(volumes) == len(cases[::6]) + len(incomplete) and not problems
    for volume in volumes:
        assert volume.spacing == (5.0, 2.0, 2.0) and 0.25 < volume.body.mean() < 0.7
        assert volume.label is not None
        assert not ((volume.label > 0) & ~volume.body).any()
        for m in range(3):
            assert volume.image[m].any() == volume.present[m]
    assert sum(not v.present.all() for v in volumes) >= 4


def test_real_brats_floats(data_root):
    folder = data_root / "brats13"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    names = ("FLAIR", "T1ce")
    case = layouts.find_cases("brats", folder, names)[0]
    with pytest.raises(UserError, match="label value"):
        read(case, modalities=names, label_map=((0, 0), (1, 1), (4, 1)))
    table = ((0, 0), (1, 1), (2, 2), (3, 1), (4, 2))
    volume = read(case, modalities=names, label_map=table)
    # Skull-stripped with a background of -3.5: the body is exactly what differs from it, up to holes.
    raw = np.moveaxis(np.asanyarray(nibabel.as_closest_canonical(nibabel.load(case.images["FLAIR"])).dataobj), 2, 0)
    brain = raw != raw[0, 0, 0]
    assert (brain != volume.body).mean() < 0.01
    assert volume.label is not None
    assert np.mean(volume.body[volume.label > 0]) > 0.998


def test_real_sarcoma_grids(data_root):
    folder = data_root / "sarcoma_pet_ct_mr" / "STS_024"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    names = ("PET", "CT", "MR_T1")
    images = {name: folder / f"{name}_image.nii.gz" for name in names}
    volume_ml = {}
    for reference in names:
        case = layouts.Case("STS_024", "STS_024", 1, images, folder / f"{reference}_mask.nii.gz")
        v = read(case, modalities=names, reference=reference)
        scan = nibabel.load(images[reference])
        assert v.body.shape == (scan.shape[2], scan.shape[0], scan.shape[1])
        assert v.present.all() and v.image.any((1, 2, 3)).all() and v.label is not None
        assert not ((v.label > 0) & ~v.body).any()
        volume_ml[reference] = (v.label > 0).sum() * np.prod(v.spacing) / 1000
        # The mask of another grid lands on the same tissue.
        other = layouts.Case("STS_024", "STS_024", 1, images, folder / "CT_mask.nii.gz")
        moved = read(other, modalities=names, reference=reference).label
        assert moved is not None
        both = ((moved > 0) & (v.label > 0)).sum()
        assert 2 * both / ((moved > 0).sum() + (v.label > 0).sum()) > 0.8
    assert max(volume_ml.values()) < 1.3 * min(volume_ml.values())


# --- several raters, pictures ----------------------------------------------------------------------------------


def test_raters_are_read_beside_each_other(tmp_path):
    case = make_case(tmp_path)
    second, none = np.zeros((16, 14, 6), np.uint8), np.zeros((16, 14, 6), np.uint8)
    second[6:9, 6:9, 2:4] = 4
    more = (save(tmp_path / "second.nii.gz", second), save(tmp_path / "none.nii.gz", none))
    volume = read(dataclasses.replace(case, raters=more))
    alone = read(case)
    assert volume.raters is not None and volume.raters.shape == (3, 6, 16, 14) and volume.raters.dtype == np.int32
    np.testing.assert_array_equal(volume.raters[0], alone.label)
    assert (volume.raters[1] > 0).sum() == 18 and not volume.raters[2].any()
    # One says 1, one 2, one nothing: of equals the lowest. Where two say 2 it is 2.
    assert volume.label is not None and (volume.label == 2).sum() == 1 and not (volume.label == 1).any()
    assert volume.warnings == () and alone.raters is None
    np.testing.assert_array_equal(preprocess.labels_of(alone), alone.label[None])
    np.testing.assert_array_equal(preprocess.labels_of(volume), volume.raters)
    with pytest.raises(ValueError, match="has no label"):
        preprocess.labels_of(read(dataclasses.replace(case, label=None)))
    empty = read(dataclasses.replace(case, label=more[1], raters=more[1:]))
    assert "empty label" in empty.warnings[0] and len(empty.warnings) == 1


def test_a_majority_leaves_out_who_does_not_know():
    raters = np.array([[1, -1, 0, -1], [1, 2, 2, -1], [0, 1, 2, -1]], np.int32)
    np.testing.assert_array_equal(preprocess.majority(raters, 3), [1, 1, 2, -1])


PICTURE = {
    "modalities": ("CT",),
    "reference": "CT",
    "label_map": ((0, 0), (255, 1)),
    "classes": ("background", "nodule"),
}


def mask(path: Path, mode="L", value=255) -> Path:
    values = np.zeros((20, 26), np.uint8)
    values[4:8, 15:19] = value
    Image.fromarray(values).convert(mode).save(path)
    return path


@pytest.mark.parametrize("ending", [".jpg", ".png", ".JPEG"])
def test_a_picture_is_one_slice_as_radiologists_show_it(tmp_path, ending):
    path = picture(tmp_path / f"image{ending}")
    label = mask(tmp_path / f"label{ending}")
    volume = read(layouts.Case("c", "c", 1, {"CT": path}, label), **PICTURE)
    assert volume.image.shape == (1, 1, 26, 20) and volume.spacing == (1.0, 1.0, 1.0)
    # H runs to the patient's right, the picture's left; W to his front, the picture's top.
    expected = np.zeros((20, 26), int)
    expected[4:8, 15:19] = 1
    np.testing.assert_array_equal(volume.label[0], expected.T[::-1, ::-1])
    assert scans.is_picture(path) and not scans.is_picture(tmp_path / "scan.nii.gz")
    scans.write_map(tmp_path / "map.nii.gz", volume.label, path, np.uint8)
    written = nibabel.load(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(written.dataobj)[..., 0], expected.T)  # as in the file
    assert nibabel.aff2axcodes(written.affine) == ("L", "P", "S")


def test_pictures_of_two_sizes_do_not_go_together(tmp_path):
    scan, large = picture(tmp_path / "image.png"), tmp_path / "large.png"
    Image.open(mask(tmp_path / "label.png")).resize((52, 40), Image.Resampling.NEAREST).save(large)
    with pytest.raises(UserError, match=r"large\.png: has 52 x 40 x 1 voxels, .*image\.png 26 x 20 x 1; pictures"):
        read(layouts.Case("c", "c", 1, {"CT": scan}, large), **PICTURE)


def test_masks_from_jpeg_are_restored_and_those_in_doubt_refused(tmp_path):
    scan = picture(tmp_path / "image.png")
    case = layouts.Case("c", "c", 1, {"CT": scan}, mask(tmp_path / "label.jpg"))
    stored = np.asarray(Image.open(tmp_path / "label.jpg"))
    assert len(np.unique(stored)) > 2  # the compression did change it
    assert (read(case, **PICTURE).label > 0).sum() == 16
    grey = layouts.Case("c", "c", 1, {"CT": scan}, mask(tmp_path / "grey.jpg", value=128))
    with pytest.raises(UserError, match=r"grey\.jpg: label values 1.* are not in config\.data\.label_map"):
        read(grey, **PICTURE)
    with pytest.raises(UserError, match=r"label\.jpg: JPEG changes .* store masks as PNG or NIfTI"):
        read(case, **PICTURE | {"label_map": ((0, 0), (1, 1))})
    # PNG changes nothing: any values, none restored.
    exact = layouts.Case("c", "c", 1, {"CT": scan}, mask(tmp_path / "label.png", value=1))
    assert (read(exact, **PICTURE | {"label_map": ((0, 0), (1, 1))}).label > 0).sum() == 16
    binary = layouts.Case("c", "c", 1, {"CT": scan}, mask(tmp_path / "binary.png", mode="1"))
    assert (read(binary, **PICTURE | {"label_map": ((0, 0), (1, 1))}).label > 0).sum() == 16
    with pytest.raises(UserError, match=r"label\.png: label value 1 is not"):
        read(exact, **PICTURE)


@settings(max_examples=30, deadline=None)
@given(arrays(np.uint8, (3, 4), elements=st.integers(0, 255)), st.lists(st.integers(0, 255), min_size=1, unique=True))
def test_restored_values_are_known_or_untouched(values, keys):
    keys = np.array(sorted(keys))
    if len(keys) > 1 and np.diff(keys).min() <= 2 * preprocess.JPEG_ERROR:
        with pytest.raises(UserError, match="too close"):
            preprocess.restored(values, keys, Path("x.jpg"))
        return
    found = preprocess.restored(values, keys, Path("x.jpg"))
    near = np.abs(values[..., None].astype(int) - keys).min(axis=-1) <= preprocess.JPEG_ERROR
    assert np.isin(found[near], keys).all() and np.array_equal(found[~near], values[~near])
    assert np.abs(found.astype(int) - values).max(initial=0) <= preprocess.JPEG_ERROR


def test_nodules_of_four_raters(data_root):
    """28 crops of the lung, of which some raters saw no nodule."""
    folder = data_root / "lidc_4raters"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    for place, sizes in (("training/0", (264, 261, 268, 268)), ("testing/12", (0, 0, 0, 15))):
        own = folder / place
        labels = [own / f"label{r}_.jpg" for r in range(4)]
        (image,) = own.glob("image_*.jpg")
        volume = read(layouts.Case("c", "c", 1, {"CT": image}, labels[0], tuple(labels[1:])), **PICTURE)
        assert volume.image.shape == (1, 1, 128, 128) and volume.warnings == ()
        assert tuple((volume.raters > 0).sum(axis=(1, 2, 3))) == sizes
        assert volume.raters[:, volume.body].sum() >= 0.9 * volume.raters.sum()
