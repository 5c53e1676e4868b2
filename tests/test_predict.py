"""The command line of predict: what it takes and refuses, and a run from files to folder."""

import json
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import nibabel
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from scipy.spatial.transform import Rotation

import entrust_jax
from entrust_jax import predict
from entrust_jax.data import layouts, preprocess, resampling
from entrust_jax.errors import UserError
from entrust_jax.report import output as report
from entrust_jax.trustmap import prediction

if "hypotheses" not in flags.FLAGS:
    predict.define_flags()
flags.FLAGS.mark_as_parsed()


@pytest.fixture
def scan(tmp_path) -> Path:
    values = np.random.default_rng(0).normal(100, 10, (12, 10, 5)).astype(np.float32)
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-1.0, 2.0, 3.0, 1.0])), path)
    return path


@pytest.fixture
def second(scan) -> Path:
    """Another file of the same patient."""
    return Path(shutil.copy(scan, scan.with_name("second.nii.gz")))


def test_files_by_name(scan, second):
    assert predict.parse_files([f"T1={scan}", f"flair={second}"], None) == {"T1": scan, "flair": second}


def test_a_folder_is_no_scan(tmp_path, scan):
    with pytest.raises(UserError) as raised:
        predict.parse_files([f"T1={tmp_path}"], None)
    said = f"{tmp_path}: is a folder; give the T1 scan itself, a .nii.gz file, or --case=FOLDER"
    assert str(raised.value) == said
    series = tmp_path / "series"
    series.mkdir()
    (series / "IM1").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 500)
    with pytest.raises(UserError, match=r"is a DICOM file; convert the series to NIfTI first: dcm2niix"):
        predict.parse_files([f"T1={series}"], None)


@pytest.mark.parametrize(
    ("arguments", "case", "message"),
    [
        ([], None, "no scan given"),
        (["FLAIR"], None, "not of the form"),
        (["=x.nii.gz"], None, "not of the form"),
        (["T1=", "T2=x"], None, "not of the form"),
        (["T1={scan}", "t1={scan}"], None, "given twice"),
        (["T1=nowhere.nii.gz"], None, "nowhere.nii.gz: no such file"),
        (["T1={scan}"], "folder", "not together with --case"),
        ([], "nowhere", "no such folder"),
    ],
)
def test_wrong_arguments_are_one_line(scan, arguments, case, message):
    with pytest.raises(UserError, match=message) as raised:
        predict.parse_files([argument.format(scan=scan) for argument in arguments], case)
    assert "\n" not in str(raised.value)


def test_what_is_lost_is_said():
    modalities = ("T1", "FLAIR", "T1ce")
    assert predict.losses(modalities, modalities, "FLAIR") == []
    assert len(predict.losses(("T1", "FLAIR"), modalities, "FLAIR")) == 1
    assert predict.losses(("CT",), ("CT",), "CT") == ["With CT alone no conflict between scans can be seen."]
    missing, geometry, alone = predict.losses(("T1ce",), modalities, "FLAIR")
    assert missing.startswith("T1, FLAIR are missing") and "geometry of T1ce" in geometry and "conflict" in alone


def test_a_usage_error_is_one_line_and_exit_code_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "entrust_jax.predict",
        f"--workdir={tmp_path}",
        f"--output={tmp_path / 'o'}",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.strip().count("\n") == 0 and "no scan given" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def trained(monkeypatch):
    """A network by hand in place of a trained one: everything that is bright is lesion."""
    data = types.SimpleNamespace(
        modalities=("T1", "FLAIR"),
        reference="FLAIR",
        classes=("background", "lesion"),
        label_map=((0, 0), (7, 1)),
        intensity=ConfigDict({}),
        drop_copies=False,
        names=ConfigDict({}),
        regions={"lesion": (1,)},
    )
    config = types.SimpleNamespace(name="unit", method="unet", data=data)

    def predict_volume(trained, volume):
        bright = volume.image.max(axis=0) > 1.0
        probability = np.stack([0.9 - 0.8 * bright, 0.1 + 0.8 * bright], axis=-1).astype(np.float32)
        return {
            "label": bright.astype(np.uint8),
            "probability": probability,
            "error_probability": np.full(bright.shape, 0.1, np.float32),
            "entropy": np.full(bright.shape, 0.3, np.float32),
            "predicted_dice": 0.9,
            "regions": {"lesion": {"volume_ml": 0.1, "interval": None}},
            "records": [],
            "seconds": 0.5,
            "trust": {
                "score": bright.any() / len(bright),
                "nothing_found": not bright.any(),
                "predicted_dice": 0.9,
                "mean_error": 0.1,
            },
        }

    api = types.ModuleType("entrust_jax.api")
    api.read_config = lambda workdir: config
    api.load = lambda workdir: types.SimpleNamespace(config=config, splits={}, workdir=workdir)
    api.predict_volume = predict_volume
    api.compare_volume = lambda trained, volume: None  # as for every method but EnTrust
    api.memory_in_words = lambda trained, volume: None  # as for slices
    monkeypatch.setitem(sys.modules, "entrust_jax.api", api)
    monkeypatch.setattr(entrust_jax, "api", api, raising=False)


def run(tmp_path: Path, *arguments: str, **values) -> Path:
    given = {
        "workdir": str(tmp_path),
        "output": str(tmp_path / "out"),
        "case": None,
        "cases": None,
        "hypotheses": False,
    } | values
    with flagsaver.flagsaver(**given):
        predict.main(["predict", *arguments])
    return tmp_path / "out"


def test_from_files_to_folder(tmp_path, scan, trained, capsys):
    out = run(tmp_path, f"t1={scan}", hypotheses=True)
    label = nibabel.load(out / "label.nii.gz")
    values = nibabel.load(scan).get_fdata()
    stored = np.asarray(label.dataobj)
    assert set(np.unique(stored)) == {0, 7}
    assert values[stored == 7].min() > values[stored == 0].max()
    report = json.loads((out / "report.json").read_text())
    assert report["modalities"]["missing"] == ["FLAIR"] and report["warnings"]
    assert report["versions"]["numpy"] == np.__version__
    printed = capsys.readouterr().out
    assert (
        "present T1; missing FLAIR" in printed
        and "overview.png" in printed
        and "hypotheses.nii.gz is not written" in printed
    )


def test_a_case_folder_with_a_mask_of_unknown_values_is_predicted(tmp_path, scan, trained):
    folder = tmp_path / "P1"
    folder.mkdir()
    for suffix in ("t1", "flair", "seg"):
        (folder / f"P1_{suffix}.nii.gz").write_bytes(scan.read_bytes())
    out = run(tmp_path, case=str(folder))
    assert json.loads((out / "report.json").read_text())["case"] == "P1"


def test_a_folder_of_cases_gets_an_order_of_referral(tmp_path, trained, capsys):
    rng = np.random.default_rng(0)
    # The network by hand trusts long scans less.
    for name, slices in (("calm", 4), ("worst", 6), ("blank", 3), ("odd", 5)):
        folder = tmp_path / "cases" / name
        folder.mkdir(parents=True)
        values = rng.normal(100, 1, (12, 10, slices))
        if name == "blank":
            values = np.where(values > 99, 101, 100)  # nowhere more than a deviation above the mean
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), folder / f"{name}_t1.nii.gz")
    (tmp_path / "cases" / "broken").mkdir()
    (tmp_path / "cases" / "broken" / "broken_t1.nii.gz").write_bytes(b"no scan")
    (tmp_path / "cases" / "notes.txt").write_text("not a case")
    with pytest.raises(UserError, match=r"1 of 5 cases were not predicted; the first: .*broken_t1"):
        run(tmp_path, cases=str(tmp_path / "cases"))
    lines = (tmp_path / "out" / "referral.csv").read_text().splitlines()
    assert lines[0] == "review,case,score,nothing_found,predicted_dice,mean_error"
    order = ["blank", "worst", "odd", "calm"]
    assert [line.split(",")[:2] for line in lines[1:]] == [[str(n), name] for n, name in enumerate(order, 1)]
    for name in order:
        assert json.loads((tmp_path / "out" / name / "report.json").read_text())["case"] == name
    printed = capsys.readouterr().out
    assert not (tmp_path / "out" / "broken").exists() and "broken: not predicted" in printed
    assert printed.count("  nothing found, 0.5 s") == 1 and "  trust 0.2500, 0.5 s" in printed


def test_of_equal_scores_the_one_with_the_larger_mean_error_is_reviewed_first():
    rows = [
        {"case": name, "score": score, "mean_error": error}
        for name, score, error in (("a", 0.9, 0.5), ("b", 0.4, 0.1), ("c", 0.4, 0.3), ("d", 0.0, 0.0), ("e", 0.4, 0.1))
    ]
    lines = predict.referral(rows).splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ["d", "c", "b", "e", "a"]


def compared(*unlike, note=""):
    """What a comparison with training's scans says, of T1 and FLAIR."""
    own = {
        name: {"distance": 9.0 if name in unlike else 1.0, "group": "look", "times": 4.1, "like": None}
        for name in ("T1", "FLAIR")
    }
    found = {"unlike": [*unlike], "distance": 9.0, "farthest": 2.5, "patients": 17, "note": note, "modalities": own}
    return found


def test_a_scan_unlike_training_is_told_before_anything_else(tmp_path, scan, second, trained, capsys, monkeypatch):
    api = sys.modules["entrust_jax.api"]
    predict_volume = api.predict_volume

    def watched(trained, volume):
        assert capsys.readouterr().out.startswith("warning: ")  # it was told before the prediction began
        return predict_volume(trained, volume)

    monkeypatch.setattr(api, "compare_volume", lambda trained, volume: compared("T1"))
    monkeypatch.setattr(api, "predict_volume", watched)
    out = run(tmp_path, f"T1={scan}", f"FLAIR={second}")
    found = json.loads((out / "report.json").read_text())
    line = found["warnings"][0]
    assert "T1 does not look like the T1 scans of training" in line and "farthest of 17 reference patients" in line
    assert "see whether the right file was given" in line
    assert not any("FLAIR does not" in one for one in found["warnings"])
    assert found["compared_with_training"] == compared("T1")

    monkeypatch.setattr(api, "predict_volume", predict_volume)
    capsys.readouterr()
    for note, words in (("", "present T1, FLAIR"), ("it is old", "Not compared with the scans of training: it is old")):
        monkeypatch.setattr(api, "compare_volume", lambda trained, volume, note=note: compared(note=note))
        out = run(tmp_path, f"T1={scan}", f"FLAIR={second}")
        printed = capsys.readouterr().out
        assert words in printed and "warning" not in printed
        assert json.loads((out / "report.json").read_text())["compared_with_training"]["unlike"] == []


def test_the_order_of_referral_names_scans_unlike_training(tmp_path, scan, trained, monkeypatch):
    for name in ("a", "b"):
        folder = tmp_path / "cases" / name
        folder.mkdir(parents=True)
        (folder / f"{name}_t1.nii.gz").write_bytes(scan.read_bytes())
        (folder / f"{name}_flair.nii.gz").write_bytes(scan.read_bytes())
    unlike = {"a": (), "b": ("FLAIR", "T1")}
    api = sys.modules["entrust_jax.api"]
    monkeypatch.setattr(api, "compare_volume", lambda trained, volume: compared(*unlike[volume.name]))
    run(tmp_path, cases=str(tmp_path / "cases"))
    lines = (tmp_path / "out" / "referral.csv").read_text().splitlines()
    assert lines[0] == "review,case,score,nothing_found,predicted_dice,mean_error,unlike"
    assert [line.split(",")[-1] for line in lines[1:]] == ["", "FLAIR T1"]


@pytest.mark.parametrize(
    ("arguments", "case", "cases", "message"),
    [
        (["T1=x"], None, ".", "T1=x: goes not together with --cases"),
        ([], "folder", ".", "--case: goes not together"),
        ([], None, "nowhere", "nowhere: no such folder"),
        ([], None, "{tmp}", "has no folder in it"),
    ],
)
def test_wrong_folders_of_cases_are_one_line(tmp_path, arguments, case, cases, message):
    with pytest.raises(UserError, match=message) as raised:
        predict.parse_folders(arguments, case, cases.format(tmp=tmp_path))
    assert "\n" not in str(raised.value)


def test_a_modality_by_another_name(tmp_path, scan, second, trained):
    sys.modules["entrust_jax.api"].read_config(tmp_path).data.names = ConfigDict({"FLAIR": ("dark-fluid",)})
    out = run(tmp_path, f"t1w={scan}", f"Dark-Fluid={second}")
    assert json.loads((out / "report.json").read_text())["modalities"]["missing"] == []


def test_an_unknown_modality_names_those_of_the_model(tmp_path, scan, trained):
    with pytest.raises(UserError, match=r"PET.*T1, FLAIR"):
        run(tmp_path, f"PET={scan}")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_refused_before_the_prediction(tmp_path, scan, trained, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys.modules["entrust_jax.api"], "predict_volume", None)
    with pytest.raises(UserError, match="no prediction of ours"):
        run(tmp_path, f"T1={scan}")
    assert (out / "notes.txt").read_text() == "mine"


# The way of a scan to a label file and back --------------------------------------------------------------------------

FIELD, RADIUS = 40.0, 11.0  # mm: of view, and of the ball in it


@st.composite
def affines(draw):
    """Any rotation, flips and order of the axes, voxels of .9 to 3 mm, any place: (affine, shape)."""
    turn = Rotation.from_euler("xyz", [draw(st.floats(-180, 180)) for _ in range(3)], degrees=True).as_matrix()
    signs = [draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)]
    zooms = np.array([draw(st.floats(0.9, 3.0)) for _ in range(3)])
    affine = np.eye(4)
    affine[:3, :3] = turn[:, draw(st.permutations(range(3)))] * signs * zooms
    affine[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    return affine, tuple(np.ceil(FIELD / zooms).astype(int).tolist())


def distances(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How far every voxel lies from the middle of the ball, in mm."""
    middle = nibabel.affines.apply_affine(affine, (np.array(shape) - 1) / 2) + np.array([1.3, -0.7, 0.4])
    return np.linalg.norm(nibabel.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)) - middle, axis=-1)


def ball(folder: Path, affine: np.ndarray, shape: tuple[int, ...], sform: int, qform: int) -> dict[str, Path]:
    """FLAIR shows a ball with a soft border, off the centre; T1 a body that fills all but one side of the scan."""
    values = {"FLAIR": 100 / (1 + np.exp(distances(affine, shape) - RADIUS))}
    values["T1"] = 100 + np.random.default_rng(0).normal(size=shape)
    values["T1"][0] = 0
    files = {}
    for name, array in values.items():
        scan = nibabel.Nifti1Image(array.astype(np.float32), affine)
        scan.set_sform(affine, code=sform)
        scan.set_qform(affine, code=qform)
        files[name] = folder / f"{name}.nii.gz"
        scan.to_filename(files[name])
    return files


def label_of(files: dict[str, Path], output: Path, spacing: tuple[float, ...]) -> nibabel.Nifti1Image:
    """label.nii.gz of a network by hand that calls lesion what is brighter than half of FLAIR."""
    case = layouts.case_from_files(files, ("T1", "FLAIR"))
    volume = preprocess.read_volume(
        case, modalities=("T1", "FLAIR"), reference="FLAIR", label_map=((0, 0), (7, 1)),
        classes=("background", "lesion"), intensity={"FLAIR": ("scale", 100.0)},
    )  # fmt: skip
    seen = resampling.at_spacing(volume, spacing)
    p = np.clip(seen.image[1], 0, 1)
    p = np.stack([1 - p, p], axis=-1).astype(np.float32)
    raw = {"one_step": p, "mean": p, "label": (p[..., 1] > 0.5).astype(np.uint8), "action": 0.5}
    raw |= {"entropy": np.zeros(p.shape[:-1], np.float32), "predicted_dice": 0.9}
    raw["border"] = prediction.border(raw["label"], seen.spacing, volumetric=False)
    found = prediction.finish(
        raw, seen, scan=volume, chosen="identity", params={}, modalities=("T1", "FLAIR"),
        classes=("background", "lesion"), regions={"lesion": (1,)}, volumetric=False,
        started=time.perf_counter(),
    )  # fmt: skip
    with mock.patch.object(report.figures, "overview", lambda path, *_, **__: path.write_bytes(b"PNG")):
        report.write_prediction(
            output, found, volume, name="unit", method="unet", modalities=("T1", "FLAIR"), reference="FLAIR",
            classes=("background", "lesion"), label_map=((0, 0), (7, 1)), regions={"lesion": (1,)}, hypotheses=False,
            versions={},
        )  # fmt: skip
    return nibabel.load(output / "label.nii.gz")


@settings(max_examples=40, deadline=None)
@given(affines(), st.sampled_from([(1, 1), (4, 0), (0, 2), (2, 3)]), st.floats(1.0, 2.5), st.booleans())
def test_a_label_lies_on_the_scan_it_was_made_from(tmp_path_factory, geometry, codes, working, slices):
    """To the voxel as scanned; at a working spacing no voxel is another that lies a fifth of a working voxel from the

    ball's surface (a ninth in 500 examples). Whatever the scan's affine is.
    """
    folder = tmp_path_factory.mktemp("trip")
    affine, shape = geometry
    files = ball(folder, affine, shape, *codes)
    scan = nibabel.load(files["FLAIR"])
    truth = scan.get_fdata() > 50
    spacing = (working if slices else 0.0, working, working)
    for name, asked in (("as_scanned", ()), ("working", spacing)):
        label = label_of(files, folder / name, asked)
        np.testing.assert_array_equal(label.affine, scan.affine)
        assert (label.affine.tobytes(), label.shape) == (scan.affine.tobytes(), scan.shape)
        for key in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d",
                    "qoffset_x", "qoffset_y", "qoffset_z"):  # fmt: skip
            np.testing.assert_array_equal(label.header[key], scan.header[key])
        np.testing.assert_array_equal(label.header["pixdim"][:4], scan.header["pixdim"][:4])
        found = np.asanyarray(label.dataobj)
        assert set(np.unique(found)) == {0, 7}
        if not asked:
            np.testing.assert_array_equal(found == 7, truth)
        else:
            assert 2 * np.sum((found == 7) & truth) / (np.sum(found == 7) + truth.sum()) > 0.95
            apart = np.argwhere(found == 7).mean(0) - np.argwhere(truth).mean(0)
            assert np.linalg.norm(scan.affine[:3, :3] @ apart) < 0.2 * working
            assert np.abs(distances(affine, shape) - RADIUS)[(found == 7) != truth].max(initial=0) < 0.2 * working
