"""What the check says of a data set: counts, damage, copies, and files in each other's place."""

import dataclasses
import itertools
import shutil

import nibabel
import numpy as np
import pytest
from ml_collections import ConfigDict

import made_up
from entrust_jax import check
from entrust_jax.data import augment, layouts, manifest, pipeline, survey
from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.report import contact, curves

MODALITIES = ("T1", "FLAIR", "T1ce")


def volume(number: int, modalities: int = 3) -> Volume:
    """A body in which every modality has a pattern of its own, and every case a noise of its own."""
    rng = np.random.default_rng(number)
    body = np.zeros((6, 24, 24), bool)
    body[:, 2:22, 3:21] = True
    place = coordinates(body)
    waves = [np.sin((m + 1) * place[..., 1] + m) + place[..., 2] * (m - 1) for m in range(modalities)]
    image = np.stack([w + 0.5 * rng.normal(size=body.shape) for w in waves]).astype(np.float32) * body
    label = np.zeros(body.shape, np.int32)
    label[3, 8:12, 8:12] = 1
    return Volume(
        name=f"case{number}", patient=f"p{number // 2}", number=number, image=image, present=np.ones(modalities, bool),
        label=label, body=body, coordinates=place, spacing=(3.0, 1.0, 1.0), reference=None,
    )  # fmt: skip


def finding(one: Volume) -> survey.Finding:
    d, h, w = one.body.shape
    own = [survey.appearance(one, image, one.body) for image in one.image]
    looks = np.repeat(np.stack(own)[:, None], len(own), axis=1)
    looks[~one.present] = np.nan
    present = tuple(name for name, here in zip(MODALITIES, one.present, strict=False) if here)
    return survey.Finding(one.name, one.patient, present, (d, h, w), one.spacing, 6, (10, 2), looks, (), ())


def swapped(one: Volume, a: int, b: int) -> Volume:
    image = one.image.copy()
    image[[a, b]] = image[[b, a]]
    return dataclasses.replace(one, image=image)


@pytest.mark.parametrize(("a", "b"), [(0, 1), (0, 2), (1, 2)])
def test_two_files_in_each_others_place_are_noticed_and_nothing_else_is(a, b):
    volumes = [volume(n) for n in range(10)]
    assert survey.exchanged([finding(one) for one in volumes], MODALITIES) == []
    volumes[4] = swapped(volumes[4], a, b)
    (line,) = survey.exchanged([finding(one) for one in volumes], MODALITIES)
    assert "case case4: " in line and f"{MODALITIES[a]} looks like {MODALITIES[b]}" in line
    assert f"{MODALITIES[b]} looks like {MODALITIES[a]}" in line


def test_a_missing_modality_and_few_cases_say_nothing_of_exchanges():
    volumes = [volume(n) for n in range(10)]
    present = np.array([True, False, True])
    image = volumes[4].image * present[:, None, None, None]
    volumes[4] = swapped(dataclasses.replace(volumes[4], present=present, image=image), 0, 2)
    (line,) = survey.exchanged([finding(one) for one in volumes], MODALITIES)
    assert "FLAIR" not in line
    assert survey.exchanged([finding(one) for one in volumes[:8]], MODALITIES) == [
        "too few cases to notice exchanged files of T1, FLAIR, T1ce: that takes 9"
    ]
    assert survey.exchanged([], MODALITIES) == []


def test_a_scan_of_odd_voxels_is_named():
    findings = [finding(volume(n))._replace(scan=f"{n}.nii.gz") for n in range(4)]
    assert survey.odd_spacings(findings) == [] and survey.odd_spacings([]) == []
    findings[2] = findings[2]._replace(spacing=(0.003, 0.001, 0.001))
    (line,) = survey.odd_spacings(findings)
    assert line.startswith("2.nii.gz: has voxels of 0.003 x 0.001 x 0.001 mm, the set's median is 3 x 1 x 1 (D H W)")
    findings[2] = findings[2]._replace(spacing=(3.0, 20.0, 1.0))
    (line,) = survey.odd_spacings(findings)
    assert line.startswith("2.nii.gz: has voxels of 3 x 20 x 1 mm")
    assert survey.odd_spacings([findings[0], findings[2]]) == []
    with pytest.raises(UserError, match=r"2\.nii\.gz: has 20 mm where config\.data\.spacing asks for 1 mm"):
        survey.epoch(findings, [one.name for one in findings], (0.0, 1.0, 1.0))


def data(folder, **changes):
    values = {
        "layout": "brats", "dir": str(folder), "source": "", "modalities": ("T1", "FLAIR"), "reference": "FLAIR",
        "patient_pattern": "", "classes": ("background", "lesion"), "label_map": ((0, 0), (1, 1)), "intensity": {},
        "drop_copies": False, "names": {},
    }  # fmt: skip
    return ConfigDict(values | changes)


def write(folder, name, t1, flair, label=None):
    (folder / name).mkdir()
    for kind, values in (("t1", t1), ("flair", flair), ("seg", label)):
        if values is not None:
            path = folder / name / f"{name}_{kind}.nii.gz"
            nibabel.Nifti1Image(np.asarray(values), np.diag([1.0, 1.0, 3.0, 1.0])).to_filename(path)


@pytest.fixture
def folder(tmp_path):
    """Four cases: whole, without a label, with a copy, and truncated."""
    whole = volume(1, 2)
    t1, flair = (np.moveaxis(x, 0, 2) + 5 * np.moveaxis(whole.body, 0, 2) for x in whole.image)
    assert whole.label is not None
    label = np.moveaxis(whole.label, 0, 2).astype(np.uint8)
    write(tmp_path, "a", t1, flair, label)
    write(tmp_path, "b", t1, flair)
    write(tmp_path, "c", t1, 7 * t1 + 3, label)
    write(tmp_path, "d", t1, flair, label)
    path = tmp_path / "d" / "d_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    return tmp_path


def test_every_case_is_a_finding_whatever_is_wrong_with_it(folder, tmp_path):
    options = data(folder)
    found, glimpses = zip(*(survey.look(options, case, 0) for case in survey.cases_of(options)[0]), strict=True)
    a, b, c, d = found
    assert a.warnings == () and a.counts is not None and a.counts[1] == 16 and a.shape == (6, 24, 24)
    assert a.spacing == (3.0, 1.0, 1.0) and a.slices == 6
    assert "case b: has no label" in b.warnings[0] and b.counts is None
    assert any("c_t1.nii.gz and" in line and "are the same scan" in line for line in c.warnings)
    assert "d_t1.nii.gz: unreadable or truncated" in d.error and glimpses[3] is None
    summary = survey.summary(found, ("T1", "FLAIR"), ("background", "lesion"))
    assert (summary["cases"], summary["unreadable"]) == (4, 1)
    assert summary["modalities"] == {"T1": 3, "FLAIR": 3}
    assert summary["labels"]["lesion"] == {"cases": 2, "voxels": 32}
    assert summary["spacing"]["median"] == [3, 1, 1]
    # Labelled cases alone; 6 slices of 3 mm are 9 of 2 mm, and in the plane nothing changes.
    assert survey.epoch(found, "abcd", ()) == 12 and survey.epoch(found, "ab", ()) == 6
    assert survey.epoch(found, "ac", (2.0, 0.0, 0.0)) == 18 and survey.epoch(found, "a", (0.0, 2.0, 2.0)) == 6
    assert glimpses[0].number == 3  # where the label is
    assert glimpses[0].image.base is None  # nothing of the volume is kept
    same = f"{folder}/b/b_t1.nii.gz holds the same scan as {folder}/a/a_t1.nii.gz of case a (1 more too)"
    assert survey.repeated(found)[0] == f"case b: {same}; remove one of the cases"
    shown = [one for one in glimpses if one is not None]
    curves.save(contact.sheet(shown, ("T1", "FLAIR"), ("background", "lesion"), "four"), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def trained_on(**changes):
    kinds = dict.fromkeys(augment.KINDS, 0.0) | {"affine": 0.3, "noise": 0.1}
    values = {
        "modalities": MODALITIES, "reference": "FLAIR", "intensity": {}, "patch": (16, 16), "foreground_share": 0.5,
        "augment": True, "augmentation": kinds, "classes": ("background", "lesion"),
    }  # fmt: skip
    return ConfigDict(values | changes)


def test_the_picture_of_augmentation_shows_what_training_would_see(tmp_path):
    one, options = volume(1), trained_on()
    samples = survey.samples(options, one, seed=4)
    plain, mirrored, mild, affine, noise, every = samples
    assert [sample.title.split("\n")[-1] for sample in samples[3:]] == ["(30 %)", "(10 %)", "all of it"]
    assert (plain.label > 0).any() and np.array_equal(mirrored.image, plain.image[:, ::-1])
    assert not np.array_equal(affine.label, plain.label) and np.array_equal(noise.label, plain.label)
    assert not np.array_equal(mild.image, plain.image) and not np.array_equal(every.image, affine.image)
    # One of training's own examples, when what is rare has its turn.
    table, kinds = pipeline.make_table([one], (16, 16)), augment.settings_of(options)
    empty = [augment.no_signal(one.image, kinds.rules)]
    certain = kinds._replace(rate={"affine": 1.0, "noise": 1.0})
    examples = [
        pipeline.example(i, table=table, seed=4, share=0.5, augment=True, kinds=certain, empty=empty)
        for i in range(survey.SAMPLES)
    ]
    assert any(np.array_equal(example["image"], every.image) for example in examples)
    picture = contact.changes(samples, MODALITIES, ("background", "lesion"), one.spacing, "a patch")
    curves.save(picture, tmp_path / "changes.png")
    assert (tmp_path / "changes.png").stat().st_size > 10_000


def test_a_missing_modality_is_pictured_as_missing():
    one = volume(1)
    one = dataclasses.replace(one, present=np.array([True, False, True]))
    samples = survey.samples(trained_on(), one, seed=0)
    picture = contact.changes(samples, MODALITIES, ("background", "lesion"), one.spacing, "a patch")
    words = [text.get_text() for axis in picture.axes for text in axis.texts]
    assert words.count("missing") == len(samples) and not samples[-1].image[1].any()


def test_the_case_that_is_pictured_has_most_modalities_and_most_label():
    findings = [finding(volume(n)) for n in range(4)]
    findings[1] = findings[1]._replace(counts=(10, 9))
    findings[2] = findings[2]._replace(counts=(10, 99), present=("T1",))
    findings[3] = findings[3]._replace(counts=(10, 999), error="damaged")
    assert survey.telling(findings) == "case1"
    assert survey.telling([one._replace(counts=None) for one in findings]) is None


def test_without_augmentation_no_picture_is_left(tmp_path):
    (tmp_path / "augmented.png").write_bytes(b"of another config")
    check.picture_changes(ConfigDict({"data": trained_on(augment=False), "seed": 0}), "case1", (), tmp_path)
    assert not (tmp_path / "augmented.png").exists()


def test_why_no_training_can_come_of_a_set(folder):
    options = data(folder)
    found = [survey.look(options, case, 0)[0] for case in survey.cases_of(options)[0]]
    parts = {"train": ["a"], "val": ["b"], "calibration": ["c", "b"], "test": ["d"]}
    val, test = survey.impossible(found, ("T1", "FLAIR"), parts)
    assert "the part val of the split has no readable case with a label" in val and "the part test" in test
    (line,) = survey.impossible(found, ("T1", "FLAIR", "T2"), {"train": ["a"]})
    assert "no labelled case has every modality" in line


def surveyed(options):
    return [survey.look(options, case, 0)[0] for case in survey.cases_of(options)[0]]


def test_masks_without_a_lesion_are_no_data_set(folder):
    shutil.rmtree(folder / "d")
    empty = np.zeros((24, 24, 6), np.uint8)
    nibabel.Nifti1Image(empty, np.diag([1.0, 1.0, 3.0, 1.0])).to_filename(folder / "c" / "c_seg.nii.gz")
    found = surveyed(data(folder))
    parts = {"train": ["a"], "test": ["c"]}
    assert survey.impossible(found, ("T1", "FLAIR"), parts) == []
    (line,) = survey.impossible(found, ("T1", "FLAIR"), {"train": ["c"], "test": ["a"]})
    assert line.startswith("no mask in the part train of the split holds anything but background")
    options = data(folder, label_map=((0, 0), (1, 0), (7, 1)))
    (line,) = survey.impossible(surveyed(options), ("T1", "FLAIR"), parts)
    assert "no mask in config.data.dir holds anything but background (label values seen: 0, 1), so nothing can" in line


def test_a_class_without_a_voxel_is_named_with_the_values_that_there_are(folder):
    classes = ("background", "lesion", "core")
    found = surveyed(data(folder, classes=classes, label_map=((0, 0), (1, 1), (4, 2))))
    (line,) = survey.absent(found, classes)
    assert line.startswith("class core: not a voxel in any mask (label values seen: 0, 1)")
    assert survey.absent(found, classes[:2]) == [] and survey.absent(found[1:2], classes) == []


def test_copies_are_noticed_though_a_modality_is_missing_or_the_mask_alone_was_copied(folder):
    for name in "bcd":
        shutil.rmtree(folder / name)
    other, third = volume(2, 2), volume(3, 2)
    t1, flair = (np.moveaxis(x, 0, 2) for x in other.image)
    label = nibabel.load(folder / "a" / "a_seg.nii.gz").get_fdata()
    write(folder, "b", t1, flair, label)  # the mask of another patient, stored otherwise
    write(folder, "c", t1, None, np.zeros(t1.shape, np.uint8))  # all that is left of b
    write(folder, "e", *(np.moveaxis(x, 0, 2) for x in third.image), np.zeros(t1.shape, np.uint8))  # empty like c's
    mask, scan = survey.repeated(surveyed(data(folder)))
    path = f"{folder}/{{0}}/{{0}}_{{1}}.nii.gz"
    assert mask == (
        f"case b: {path.format('b', 'seg')} holds the same mask as {path.format('a', 'seg')} of case a; see whose it is"
    )
    assert scan == (
        f"case c: {path.format('c', 't1')} holds the same scan as {path.format('b', 't1')} of case b; remove one of the"
        " cases"
    )


def test_cases_that_vanish_as_a_whole_get_a_line(folder):
    def wipe(name):
        shutil.rmtree(folder / name)
        (folder / name).mkdir()

    wipe("b")
    for name in ("scan_one.nii.gz", "scan_two.nii.gz"):  # renamed
        (folder / "b" / name).touch()
    wipe("c")
    (folder / "c" / "deep").mkdir()
    (folder / "c" / "deep" / "c_t1.nii.gz").touch()  # one folder deeper
    wipe("d")
    (folder / "d" / "d_seg.nii.gz").touch()  # a mask alone
    for name, file, content in (("e", "e_scan.nrrd", b""), ("f", "IM1", b"\0" * 128 + b"DICM"), (".git", "x.nii", b"")):
        (folder / name).mkdir()
        (folder / name / file).write_bytes(content)
    (folder / "g").mkdir()
    (folder / "g" / "notes.txt").touch()  # no scan
    options = data(folder)
    cases, mistakes, _ = survey.cases_of(options)
    lines = survey.unused(options, [case for case in cases if isinstance(case, layouts.Case)], mistakes)
    expected = "if it is a case, name it as the layout brats does"
    assert [line.partition(" (one folder")[0] for line in lines[:3]] == [
        f"{folder}/b: nothing in it is read, though it holds 2 scans, such as scan_one.nii.gz; {expected}",
        f"{folder}/c: nothing in it is read, though it holds 1 scan, such as deep/c_t1.nii.gz; {expected}",
        f"{folder}/d: nothing in it is read, though it holds 1 scan, such as d_seg.nii.gz; {expected}",
    ]
    assert (
        f"{folder}/e: nothing in it is read" in lines[3] and "such as e_scan.nrrd, which is .nrrd, a form" in lines[3]
    )
    assert f"{folder}/f: nothing in it is read" in lines[4] and "such as IM1, which is a DICOM file; conv" in lines[4]
    assert len(lines) == 5
    (folder / "stray.nii.gz").touch()
    for number in range(3):
        (folder / f"h{number}").mkdir()
        (folder / f"h{number}" / "x.nii.gz").touch()
    scans = [case for case in survey.cases_of(options)[0] if isinstance(case, layouts.Case)]
    assert survey.unused(options, scans)[5:] == [
        "... and 3 more such folders",
        f"{folder}/stray.nii.gz: is not read: no modality of the config, and no label of a case",
    ]


def test_the_test_set_of_nnunet_is_no_case_that_vanished(tmp_path):
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T1", "1": "FLAIR"}}')
    for name in ("imagesTr/a_0000", "labelsTr/a", "imagesTs/b_0000", "old/c_0000"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    options = data(tmp_path, layout="nnunet", modalities=("T1",))
    cases = [case for case in survey.cases_of(options)[0] if isinstance(case, layouts.Case)]
    (line,) = survey.unused(options, cases)
    assert line.startswith(f"{tmp_path}/old: nothing in it is read")


def test_missing_and_misspelt_files_get_a_line(folder):
    (folder / "a" / "a_flair.nii.gz").rename(folder / "a" / "a_fliar.nii.gz")
    options = data(folder)
    cases = [case for case in survey.cases_of(options)[0] if isinstance(case, layouts.Case)]
    assert "case a: lacks FLAIR" in survey.look(options, cases[0], 0)[0].warnings
    (line,) = survey.unused(options, cases)
    assert "a_fliar.nii.gz: is not read: no modality of the config, and no label" in line


def test_files_of_a_mistake_have_their_line_already(folder):
    (folder / "a" / "a_t1w.nii.gz").write_bytes(b"")
    options = data(folder)
    cases, mistakes, _ = survey.cases_of(options)
    assert len(cases) == 4 and "case a has two files for T1" in mistakes[0].text and len(mistakes) == 1
    scans = [case for case in cases if isinstance(case, layouts.Case)]
    assert survey.unused(options, scans, mistakes) == []
    first, second = survey.unused(options, scans)
    assert "a_t1.nii.gz: is not read" in first and "a_t1w.nii.gz" in second
    options.patient_pattern = "(x)"
    assert "finds no patient in the case name a" in survey.cases_of(options)[1][1].text


def test_nothing_readable_still_has_a_summary(folder):
    options = data(folder, label_map=((0, 0), (9, 1)))
    found = [survey.look(options, case, 0)[0] for case in survey.cases_of(options)[0]]
    assert "label value 1 is not in config.data.label_map" in found[0].error
    summary = survey.summary([one for one in found if one.error], ("T1", "FLAIR"), ("background", "lesion"))
    assert summary["spacing"] == {} and summary["modalities"] == {"T1": 0, "FLAIR": 0}


def test_real_scans_exchanged_by_hand_are_noticed(data_root):
    place = data_root / "Dataset101_LowerGradeGlioma"
    if not place.is_dir():
        pytest.skip(f"no {place}")
    options = data(place, layout="nnunet", modalities=MODALITIES, label_map=((0, 0), (1, 1), (255, 1)))
    cases = [case for case in survey.cases_of(options)[0] if isinstance(case, layouts.Case)][20:34]
    files = {**cases[3].images, "FLAIR": cases[3].images["T1ce"], "T1ce": cases[3].images["FLAIR"]}
    cases[3] = dataclasses.replace(cases[3], images=files)
    found = [survey.look(options, case, 0)[0] for case in cases]
    assert any(f"case {cases[3].name}: " in line for line in survey.exchanged(found, MODALITIES))


@pytest.mark.parametrize(("a", "b"), [("PET", "CT"), ("PET", "T1"), ("CT", "T1")])
def test_exchanged_files_are_noticed_where_modalities_have_rules(tmp_path, a, b):
    """Each file is read by the rule of the place that it may belong in."""
    made_up.pet_ct_t1(tmp_path, 10)
    names = ("PET", "CT", "T1")
    rules = {"PET": ("scale", 2.5), "CT": ("window", -160.0, 240.0)}
    options = data(tmp_path, layout="manifest", modalities=names, reference="T1", intensity=rules)
    cases = [case for case in survey.cases_of(options)[0] if isinstance(case, layouts.Case)]
    found = [survey.look(options, case, 0)[0] for case in cases]
    assert survey.exchanged(found, names) == [] and not any(one.warnings for one in found)
    files = {**cases[3].images, a: cases[3].images[b], b: cases[3].images[a]}
    found[3] = survey.look(options, dataclasses.replace(cases[3], images=files), 0)[0]
    (line,) = survey.exchanged(found, names)
    assert f"case p3: {a} looks like {b}, {b} looks like {a}" in line


def test_real_pet_ct_and_t1_exchanged_by_hand_are_noticed(data_root, tmp_path):
    folder = data_root / "sarcoma_pet_ct_mr"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    files = {"PET": "PET_image", "CT": "CT_image", "T1": "MR_T1_image", "label": "MR_T1_mask"}
    rows = manifest.collect(folder, {name: f"{{case}}/{file}.nii.gz" for name, file in files.items()})
    place = tmp_path / "manifest.csv"
    place.write_text(manifest.as_csv(rows, [*files], str(folder)))
    names = ("PET", "CT", "T1")
    rules = {"PET": ("scale", 2.5), "CT": ("window", -160.0, 240.0)}
    options = data(place, layout="manifest", modalities=names, reference="T1", intensity=rules)
    cases = [case for case in survey.cases_of(options)[0] if isinstance(case, layouts.Case)][:10]
    found = [survey.look(options, case, 0)[0] for case in cases]
    assert survey.exchanged(found, names) == []
    assert not any("does not go with" in line for one in found for line in one.warnings)
    for a, b in itertools.combinations(names, 2):
        files = {**cases[3].images, a: cases[3].images[b], b: cases[3].images[a]}
        seen = [*found]
        seen[3] = survey.look(options, dataclasses.replace(cases[3], images=files), 0)[0]
        (line,) = survey.exchanged(seen, names)
        assert f"case {cases[3].name}: {a} looks like {b}, {b} looks like {a}" in line
