"""The data of a config: whose scan is whose."""

import json

import pytest
from ml_collections import ConfigDict

import configs.phantom
from entrust_jax.data import dataset, splits
from entrust_jax.data.layouts import Case
from entrust_jax.errors import UserError

NAMES = [f"HOSP_{patient:02d}_{time}" for patient in range(12) for time in (1, 2)]
CASES = [Case(name, name, i, {}, None) for i, name in enumerate(NAMES)]


def test_without_a_pattern_the_layout_says_who_it_is():
    assert dataset.name_patients(CASES, "") == CASES


def test_the_pattern_names_the_patient_and_keeps_the_scans_together():
    found = dataset.name_patients(CASES, r"(.+)_\d$")
    assert [case.patient for case in found[:3]] == ["HOSP_00", "HOSP_00", "HOSP_01"]
    assert [(case.name, case.number) for case in found] == [(case.name, case.number) for case in CASES]
    pairs = [(case.name, case.patient) for case in found]
    parts = splits.draw(pairs, seed=0, folds=4, fold=0, test_pattern="")
    for names in parts.values():
        assert len(names) == 2 * len({name[:7] for name in names})


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("(", "mend the pattern"), (r".+_\d", "no group"), (r"(.+)_1$", "HOSP_00_2"), ("(x*)", "HOSP_00_1")],
)
def test_a_pattern_that_does_not_fit_is_one_clear_error(pattern, said):
    with pytest.raises(UserError, match="patient_pattern") as error:
        dataset.name_patients(CASES, pattern)
    assert said in str(error.value)


def table(folder, patients, more=""):
    """A manifest of cases with a scan and a mask each, one patient a case as named."""
    rows = ["case,patient,T1,age,label"]
    for i, patient in enumerate(patients):
        for name in ("t1", "seg"):
            (folder / f"{i}_{name}.nii.gz").touch()
        rows.append(f"c{i:02d},{patient},{i}_t1.nii.gz,50,{i}_seg.nii.gz")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n" + more)
    split = {"seed": 0, "folds": 4, "fold": 0, "test_pattern": ""}
    values = {"layout": "manifest", "dir": str(folder), "source": "", "modalities": ("T1",), "names": {}}
    return ConfigDict(values | {"patient_pattern": "", "split": split})


def test_training_is_told_of_columns_that_nothing_reads(tmp_path):
    data = table(tmp_path, range(12))
    for _ in range(2):  # with a split that was kept, too
        _, lines = dataset.split(data, tmp_path / "w" / "splits.json")
        assert lines == [f"{tmp_path}/manifest.csv: column age is no modality of the config; not read"]


def test_a_kept_split_that_tears_a_patient_apart_is_told_before_anything_is_compiled(tmp_path):
    path = tmp_path / "w" / "splits.json"
    dataset.split(table(tmp_path, range(12)), path)
    dataset.check(table(tmp_path, range(12)), path)
    mended = table(tmp_path, [i // 4 for i in range(12)])
    with pytest.raises(UserError, match=r"splits\.json: patient \d is in train \(case c\d\d\) and in"):
        dataset.check(mended, path)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("", {}),
        ("places", {"reliability": ((0.95, 0.7), (0.7, 0.95))}),
        ("class_conflict", {"variant": "class", "prior": (0.35, 0.35)}),
        ("correlated", {"reliability": (0.9, 0.8, 0.8), "correlated": ("B", "C", 0.76)}),
        ("four_readers", {"reliability": (0.9,) * 4, "modalities": ("A", "B", "C", "D")}),
    ],
)
def test_the_phantom_of_a_config_survives_its_file(variant, expected):
    """As the trainer writes and reads it: tuples come back as lists."""
    data = ConfigDict(json.loads(configs.phantom.get_config(variant).to_json())).data
    spec = dataset.phantom_spec(data)
    assert {key: getattr(spec, key) for key in expected} == expected
    assert spec.classes == tuple(data.classes) and len(data.label_map) == len(spec.classes)
    assert spec == dataset.phantom_spec(configs.phantom.get_config(variant).data) and hash(spec)
    assert ("correlated" in data.phantom) == (variant == "correlated")  # a folder trained before goes on
    dataset.check(data)


def test_an_unknown_phantom_names_those_there_are():
    with pytest.raises(UserError, match=r"no variant 'nosuch'.*class_conflict, correlated, four_readers"):
        configs.phantom.get_config("nosuch")
