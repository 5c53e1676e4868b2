"""nnU-Net raw: what dataset.json says, explicit paths, and the folds that come with a data set."""

import json
import types
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from ml_collections import ConfigDict

import configs.nnunet
from entrust_jax.data import dataset, layouts, nnunet, splits
from entrust_jax.errors import UserError
from entrust_jax.report import output

PATH = Path("F/dataset.json")
REGIONS = {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing": 3}


def write(folder, channels=("T1", "FLAIR"), names=(), **more):
    """An nnU-Net raw folder of empty files."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in names:
        for index in range(len(channels)):
            (folder / "imagesTr" / f"{name}_{index:04d}.nii.gz").touch()
        (folder / "labelsTr" / f"{name}.nii.gz").touch()
    said = {"channel_names": {str(i): name for i, name in enumerate(channels)}, "labels": {"background": 0, "x": 1}}
    (folder / "dataset.json").write_text(json.dumps(said | more))
    return folder


def test_plain_labels_are_classes_and_regions():
    found = nnunet.labels_of({"labels": {"organ": 2, "background": 0, "lesion": 1}}, PATH)
    assert found.classes == ("background", "lesion", "organ") and found.label_map == ((0, 0), (1, 1), (2, 2))
    assert found.regions == {"organ": (2,), "lesion": (1,)}
    old = nnunet.labels_of({"labels": {"0": "background", "1": "lesion", "2": "organ"}}, PATH)  # version 1
    assert old.classes == found.classes and old.label_map == found.label_map


def test_regions_are_unions_of_the_values_in_the_files():
    found = nnunet.labels_of({"labels": REGIONS, "regions_class_order": [1, 2, 3]}, PATH)
    assert found.classes == ("background", "whole_tumor 1", "tumor_core 2", "enhancing")
    assert found.label_map == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert found.regions == {"whole_tumor": (1, 2, 3), "tumor_core": (2, 3), "enhancing": (3,)}
    # Without the order a value is named after the smallest region that holds it; with it, after the one it is for.
    crossing = {"background": 0, "a": [1, 2], "b": [2, 3, 4], "c": [3, 4]}
    assert nnunet.labels_of({"labels": crossing}, PATH).classes[1:] == ("a 1", "a 2", "c 3", "c 4")
    order = nnunet.labels_of({"labels": crossing, "regions_class_order": [1, 2, 3]}, PATH)
    assert order.classes[1:] == ("a 1", "b 2", "c 3", "c 4")


def test_the_ignored_label_counts_nowhere():
    found = nnunet.labels_of({"labels": {"background": 0, "lesion": 1, "ignore": 2}}, PATH)
    assert found.classes == ("background", "lesion") and found.regions == {"lesion": (1,)}
    assert found.label_map == ((0, 0), (1, 1), (2, -1))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, 'has no "labels"'),
        ({"labels": []}, 'has no "labels"'),
        ({"labels": {"background": 0}}, "only the background"),
        ({"labels": {"background": 0, "x": "1"}}, "label 'x' is '1'; give a whole number"),
        ({"labels": {"background": 0, "x": True}}, "label 'x' is True"),
        ({"labels": {"background": 0, "x": []}}, r"label 'x' is \[\]"),
        ({"labels": {"background": 0, "x": [0, 1]}}, "'x' holds the background"),
        ({"labels": {"x": [1, 2], "ignore": 2}}, "'x' holds the background or the ignored"),
        ({"labels": {"x": 1, "y": 1}}, "one value two names"),
        ({"labels": {"x": 1, "ignore": 0}}, "'ignore' is 0, the value of the background"),
        ({"labels": {"x": [1, 2], "x 1": 2}}, "names that say two things"),
        ({"labels": REGIONS, "regions_class_order": [1, 2]}, r"\"regions_class_order\" is \[1, 2\]; give one value"),
        ({"labels": REGIONS, "regions_class_order": [1, 1, 3]}, "regions_class_order"),
    ],
)
def test_labels_that_cannot_be(info, message):
    with pytest.raises(UserError, match=message) as error:
        nnunet.labels_of(info, PATH)
    assert str(error.value).startswith("F/dataset.json: ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"channel_names": {"0": "T1", "00": "FLAIR"}}, "one number twice"),
        ({"channel_names": {"0": "T1", "1": ""}}, "has ''; give every channel a name"),
        ({"channel_names": {"²": "T1"}}, 'has no "channel_names"'),
        ({"channel_names": {"0": "T1", "1": "t1", "2": "FLAIR"}}, r"\"channel_names\" has t1 twice"),
        ({"file_ending": ".png"}, r"\"file_ending\" is '\.png'; only \.nii\.gz and \.nii are read"),
        ({"file_ending": 3}, "file_ending"),
        ({"dataset": []}, "is no object of cases"),
    ],
)
def test_a_description_that_cannot_be(tmp_path, more, message):
    write(tmp_path, names=("a",), **more)
    with pytest.raises(UserError, match=message):
        layouts.find_cases("nnunet", tmp_path, ("T1", "FLAIR"))


def test_explicit_paths_of_each_case(tmp_path, monkeypatch):
    monkeypatch.setenv("SCANS", str(tmp_path / "far"))
    names = ("a2.nii.gz", "b2.nii.gz", "e2.nii.gz", "f2.nii.gz", "g.nrrd", "label.nii.gz")
    for name in ("far/a1.nii.gz", *(f"near/{name}" for name in names)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    entries = {
        "b": {"images": [None, "near/b2.nii.gz"]},
        "a": {"images": ["$SCANS/a1.nii.gz", "./near/a2.nii.gz"], "label": str(tmp_path / "near/label.nii.gz")},
    }
    write(tmp_path, dataset=entries)
    a, b = layouts.find_cases("nnunet", tmp_path, ("FLAIR", "T1"))
    assert (a.name, b.name, b.label, set(b.images)) == ("a", "b", None, {"FLAIR"})
    assert a.images == {"T1": tmp_path / "far/a1.nii.gz", "FLAIR": tmp_path / "near/a2.nii.gz"}
    assert a.label == tmp_path / "near/label.nii.gz"
    entries |= {"c": {"images": ["near/a2.nii.gz"]}, "d": 3, "e": {"images": ["gone.nii.gz", "near/e2.nii.gz"]}}
    entries |= {"f": {"images": ["near/f2.nii.gz", "near/f2.nii.gz"], "label": 7}}
    entries |= {"g": {"images": ["near", "near/g.nrrd"]}}
    write(tmp_path, dataset=entries)
    listing = layouts.list_cases("nnunet", tmp_path, ("FLAIR", "T1"))
    assert [case.name for case in listing.cases] == ["a", "b", "e"]
    said = [mistake.text.partition('"dataset"')[2] or mistake.text for mistake in listing.mistakes]
    assert "case 'c' must have 2 images" in said[0] and "case 'd'" in said[1]
    assert "T1 of case e: gone.nii.gz: no such file" in said[2]
    assert "label of case f: 7: no such file" in said[3] and "is FLAIR and T1 of case f" in said[4]
    assert "FLAIR of case g: near/g.nrrd: is .nrrd, a format that is not read" in said[5]
    assert "T1 of case g: near: is a folder; give the file" in said[6]
    with pytest.raises(UserError, match=r"case 'c' .* \(6 more; python -m entrust_jax\.check lists them all\)"):
        layouts.find_cases("nnunet", tmp_path, ("FLAIR", "T1"))


# --- the config of any folder -------------------------------------------------------------------------------


def test_a_folder_is_a_config(tmp_path):
    folder = write(
        tmp_path / "Dataset007_Pancreas", ("CT", "PET"), labels=REGIONS | {"ignore": 4}, regions_class_order=[1, 2, 3]
    )
    data = configs.nnunet.get_config(str(folder)).data
    assert (data.layout, data.dir, data.modalities, data.reference) == ("nnunet", str(folder), ("CT", "PET"), "CT")
    assert data.classes == ("background", "whole_tumor 1", "tumor_core 2", "enhancing")
    assert data.label_map == ((0, 0), (1, 1), (2, 2), (3, 3), (4, -1))
    assert data.regions.to_dict() == {"whole_tumor": (1, 2, 3), "tumor_core": (2, 3), "enhancing": (3,)}
    assert data.intensity.to_dict() == {"CT": ("window", -1000.0, 1000.0)}
    assert configs.nnunet.get_config(str(folder)).name == "Dataset007_Pancreas"


@pytest.mark.parametrize(
    ("channels", "labels", "message"),
    [
        (("T1.5",), {"x": 1}, "channel 'T1.5' has a dot or a slash"),
        (("a/b",), {"x": 1}, "channel 'a/b' has a dot or a slash"),
        (("T1", "t1"), {"x": 1}, "has t1 twice, so files of both would be one; rename one"),
        (("T1",), {"x.y": 1}, "label 'x.y' has a dot"),
        (("T1",), {}, 'has no "labels"'),
    ],
)
def test_a_folder_that_can_be_no_config(tmp_path, channels, labels, message):
    write(tmp_path, channels, labels=labels)
    with pytest.raises(UserError, match=message):
        configs.nnunet.get_config(str(tmp_path))


def test_the_generic_config_wants_a_folder_with_a_description(tmp_path):
    with pytest.raises(UserError, match=r"--config=configs/nnunet\.py:FOLDER"):
        configs.nnunet.get_config()
    with pytest.raises(UserError, match=r"dataset\.json: no such file"):
        configs.nnunet.get_config(str(tmp_path))


# --- the folds of splits_final.json -------------------------------------------------------------------------

NAMES = [f"c{i:02d}" for i in range(20)]


def data(folder, fold=0, test_pattern="", patient_pattern="", folds=5):
    split = {"seed": 0, "folds": folds, "fold": fold, "test_pattern": test_pattern}
    values = {
        "layout": "nnunet", "dir": str(folder), "source": "", "modalities": ("T1", "FLAIR"), "names": {},
        "patient_pattern": patient_pattern, "split": split,
    }  # fmt: skip
    return ConfigDict(values)


def folds(folder, *pairs):
    (folder / "splits_final.json").write_text(json.dumps([{"train": train, "val": val} for train, val in pairs]))


def test_the_folds_val_is_our_test_and_ours_are_drawn_from_its_train(tmp_path):
    folder = write(tmp_path / "d", names=NAMES)
    before, lines = dataset.split(data(folder, fold=4), tmp_path / "before" / "splits.json")
    assert lines == [] and len(before["test"]) == 4
    folds(folder, (NAMES[3:], NAMES[:3]), (NAMES[:15], NAMES[15:19]))
    path = tmp_path / "w" / "splits.json"
    parts, (line,) = dataset.split(data(folder), path)
    assert parts["test"] == NAMES[:3] and sorted(name for part in parts.values() for name in part) == NAMES
    assert [len(parts[part]) for part in splits.PARTS] == [11, 2, 4, 3]
    assert "splits_final.json: val of its fold 0 of 2 is the test part" in line
    kept = json.loads(path.read_text())
    assert kept["drawn_with"]["splits_final.json"] == "fold 0 of 2" and kept["test"] == NAMES[:3]
    assert dataset.split(data(folder), path) == (parts, [])
    everything, (line,) = dataset.split(data(folder, folds=1), tmp_path / "all" / "splits.json")
    assert everything["test"] == everything["train"] == NAMES and "every case is in every part" in line
    # A folder that was trained before the file came goes on with its own split.
    assert dataset.split(data(folder, fold=4), tmp_path / "before" / "splits.json") == (before, [])
    dataset.check(data(folder, fold=4), tmp_path / "before" / "splits.json")
    with pytest.raises(UserError, match=r"fold is 4; .*splits_final\.json has 2, give 0 to 1"):
        dataset.check(data(folder, fold=4))
    # What the fold does not name is in no part, and is said; a pattern goes before the file.
    parts, (_, line) = dataset.split(data(folder, fold=1), tmp_path / "w1" / "splits.json")
    assert "does not name, so in no part of the split: 1 case (c19)" in line and parts["test"] == NAMES[15:19]
    assert dataset.split(data(folder, fold=1), tmp_path / "w1" / "splits.json")[0] == parts
    assert dataset.drawn(data(folder, 4, "c1"), dataset.find(data(folder))).parts["test"] == NAMES[10:]


def test_a_fold_goes_by_patient_and_names_only_what_is_there(tmp_path):
    folder = write(tmp_path, names=[f"p{i}_{t}" for i in range(8) for t in "ab"])
    names = sorted(path.name[:4] for path in (folder / "labelsTr").iterdir())
    by_patient = data(folder, patient_pattern="(.+)_.$")
    folds(folder, (names[4:], names[:4]))
    parts = dataset.drawn(by_patient, dataset.find(by_patient)).parts
    assert all(len(own) == 2 * len({name[:2] for name in own}) for own in parts.values())
    folds(folder, (names[3:], names[:3]))
    with pytest.raises(UserError, match="fold 0 has patient p1 in train and in val"):
        dataset.drawn(by_patient, dataset.find(by_patient))
    folds(folder, ([*names[3:], "q_a"], names[:3]))
    with pytest.raises(UserError, match=r"fold 0 names what is not there: 1 case \(q_a\)"):
        dataset.drawn(data(folder), dataset.find(data(folder)))
    folds(folder, (names[:3], []))
    with pytest.raises(UserError, match=r"splits_final\.json: fold 0 leaves no patient for test"):
        dataset.drawn(data(folder), dataset.find(data(folder)))


@pytest.mark.parametrize("text", ["", "{}", "[]", "[3]", '[{"train": ["a"]}]', '[{"train": ["a"], "val": [3]}]'])
def test_damaged_folds(tmp_path, text):
    (tmp_path / "splits_final.json").write_text(text)
    with pytest.raises(UserError, match=r"splits_final\.json: "):
        nnunet.fold_of(tmp_path, 0)


# --- whatever stands in the files ---------------------------------------------------------------------------

ODD = st.sampled_from([None, True, -1, 0, 1, 2, 3, 0.5, float("nan"), 10**30, "", "T1", "a\0", "²"])
ANY = st.recursive(ODD, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from("ab01"), x, max_size=3))
WORDS = st.sampled_from(["0", "1", "2", "00", "²", "T1", "background", "ignore", "x", "x 1", "y", "a.b", ""])
CHANNELS = st.dictionaries(st.sampled_from(["0", "1", "01"]), st.sampled_from(["T1", "t1", "FLAIR", "CT", "a/b"]) | ODD)
VALUES = st.integers(-1, 4) | st.lists(st.integers(0, 4), max_size=4)
LABELS = st.dictionaries(WORDS, VALUES | ANY, max_size=5) | st.dictionaries(st.sampled_from(["0", "1", "2"]), WORDS)
ENTRY = st.fixed_dictionaries(
    {"images": st.lists(st.sampled_from(["1.nii", "2.nii", "gone", "a\0", None, "", "$X/1.nii"]) | ANY, max_size=3)},
    optional={"label": st.sampled_from(["1.nii", "3.nii", None]) | ANY},
)
INFO = st.fixed_dictionaries(
    {"channel_names": CHANNELS, "labels": LABELS},
    optional={
        "file_ending": st.sampled_from([".nii.gz", ".NII", ".png"]) | ANY,
        "regions_class_order": st.lists(st.integers(0, 4), max_size=4) | ANY,
        "dataset": st.dictionaries(st.sampled_from(["a", "b", "", "\ud800"]), ENTRY | ANY, max_size=4) | ANY,
    },
)
SETTINGS = hypothesis.settings(
    max_examples=300, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def three(tmp_path):
    for name in ("1.nii", "2.nii", "3.nii"):
        (tmp_path / name).touch()
    (tmp_path / "imagesTr").mkdir()
    for name in ("p_0000.nii", "p_0001.nii.gz", "p_².nii", "p_" + 200 * "9" + ".nii", "q_0001.nii", "q_1.nii"):
        (tmp_path / "imagesTr" / name).touch()
    return tmp_path


@hypothesis.given(INFO | ANY, st.randoms(use_true_random=False))
@SETTINGS
def test_whatever_a_description_says_it_is_read_or_refused(three, info, random):
    (three / "dataset.json").write_text(json.dumps(info))
    for modalities in (("T1",), ("FLAIR", "T1")):
        try:
            listing = layouts.list_cases("nnunet", three, modalities)
        except UserError as error:
            assert str(three) in str(error) and "\n" not in str(error)
            continue
        for case in listing.cases:
            files = [*case.images.values(), *([case.label] if case.label else [])]
            assert case.images and set(case.images) <= set(modalities) and len({*files}) == len(files)
        if isinstance(info.get("dataset"), dict):
            shuffled = random.sample(list(info["dataset"].items()), len(info["dataset"]))
            (three / "dataset.json").write_text(json.dumps(info | {"dataset": dict(shuffled)}))
            assert layouts.list_cases("nnunet", three, modalities) == listing


@hypothesis.given(INFO | ANY)
@SETTINGS
def test_whatever_a_description_says_it_is_a_config_or_refused(three, info):
    (three / "dataset.json").write_text(json.dumps(info))
    try:
        data = configs.nnunet.get_config(str(three)).data
    except UserError as error:
        assert "\n" not in str(error)
        return
    count = len(data.classes)
    assert len(set(data.classes)) == count > 1 and data.reference in data.modalities and data.regions
    assert len(output.label_values(data.label_map, count)) == count
    assert all(-1 <= index < count for _, index in data.label_map)
    assert all(own and min(own) >= 1 and max(own) < count for own in data.regions.values())


@hypothesis.given(
    ANY
    | st.lists(st.fixed_dictionaries({part: st.lists(st.sampled_from([*NAMES, "z"])) for part in ("train", "val")})),
    st.integers(-1, 3),
)
@SETTINGS
def test_whatever_the_folds_say_there_is_a_split_by_patient_or_a_reason(tmp_path, said, number):
    (tmp_path / "splits_final.json").write_text(json.dumps(said))
    label = Path("label.nii.gz")
    cases = [layouts.Case(name, name[:2] + name[2:].rstrip("13579"), i, {}, label) for i, name in enumerate(NAMES)]
    split = types.SimpleNamespace(seed=0, folds=5, fold=number, test_pattern="")
    try:
        fold = nnunet.fold_of(tmp_path, number)
        assert fold is not None
        draw = splits.plan(cases, split, fold)
    except UserError as error:
        assert "\n" not in str(error)
        return
    patient = {case.name: case.patient for case in cases}
    people = [{patient[name] for name in draw.parts[part]} for part in splits.PARTS]
    assert sum(map(len, people)) == len(set().union(*people)) and all(people)
    assert set(draw.parts["test"]) == set(fold.val)
