"""The output folder: geometry, contents, and that it comes whole or not at all."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import nibabel
import numpy as np
import pytest

from entrust_jax.data import layouts, preprocess
from entrust_jax.errors import UserError
from entrust_jax.report import output as report
from entrust_jax.trustmap import explanation

MODALITIES = ("T1", "FLAIR")
CLASSES = ("background", "core", "oedema")
LABEL_MAP = ((0, 0), (4, 1), (3, 1), (2, 2))
# Permuted and flipped: stored axes are (A, S, R), two of them reversed, with anisotropic voxels.
AFFINE = np.array([[0.0, 0, -1.5, 20], [-2.0, 0, 0, 30], [0, 3.0, 0, -10], [0, 0, 0, 1]])
SHAPE = (14, 6, 12)


def save(path: Path, values: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), path)
    return path


@pytest.fixture(autouse=True)
def picture(monkeypatch, request):
    """The picture has tests of its own; here it is a file, but for one test."""
    if request.function is not test_report_names_every_file_and_every_absence:
        monkeypatch.setattr(report.figures, "overview", lambda path, *_, **__: path.write_bytes(b"PNG"))


@pytest.fixture
def stored() -> np.ndarray:
    """A label in the scan's own array, without any symmetry."""
    label = np.zeros(SHAPE, np.uint8)
    label[2:6, 1:3, 3:5] = 4
    label[5, 4, 7:11] = 2
    return label


def read(folder: Path, stored: np.ndarray, names: tuple[str, ...] = MODALITIES) -> preprocess.Volume:
    rng = np.random.default_rng(0)
    files = {}
    for name in names:
        values = 100 + 10 * rng.standard_normal(SHAPE) + 20 * (stored > 0)
        files[name] = save(folder / f"{name}.nii.gz", values.astype(np.float32))
    case = layouts.case_from_files(files, MODALITIES)
    return preprocess.read_volume(case, modalities=MODALITIES, reference="FLAIR", label_map=LABEL_MAP, classes=CLASSES)


def canonical(stored: np.ndarray) -> np.ndarray:
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(stored, AFFINE))
    return np.moveaxis(np.asarray(image.dataobj), 2, 0)


def make_prediction(volume: preprocess.Volume, stored: np.ndarray, *, full: bool = True) -> dict:
    """A prediction by hand: the stored label, with doubt along one side of it."""
    values = canonical(stored)
    label = np.select([values == 4, values == 2], [1, 2], 0).astype(np.uint8)
    probability = np.full((*label.shape, 3), 0.05, np.float32)
    np.put_along_axis(probability, label[..., None].astype(int), 0.9, axis=-1)
    error = np.where(label == 1, 0.4, 0.02).astype(np.float32)
    entropy = -(probability * np.log(probability)).sum(-1)
    made = {
        "label": label,
        "probability": probability,
        "probability_raw": probability,
        "error_probability": error,
        "entropy": entropy,
        "predicted_dice": float("nan"),
        "regions": {"whole": {"volume_ml": float((label > 0).sum() * 0.009), "interval": None}},
        "records": explanation.records(error, label, volume.spacing, MODALITIES, CLASSES, preprocess.shown(volume)),
        "seconds": 1.5,
    }
    if full:
        hypotheses = np.stack([label, np.where(label == 1, 0, label), label]).astype(np.uint8)
        conflict = np.where(label == 1, 0.5, 0.0).astype(np.float32)
        support = np.zeros((2, *label.shape, 3), np.float32)
        support[0, ..., 0], support[1, ..., 1] = 0.6, 0.8
        pairs = np.stack([conflict for _ in combinations(MODALITIES, 2)])
        distance = np.full(label.shape, 5.0, np.float32)
        far, shown = np.full(label.shape, np.inf), preprocess.shown(volume)
        cause = explanation.cause(error, conflict, support, far, far, distance, volume.body, shown)
        attribution = np.stack([-0.3 * conflict, conflict])
        made |= {
            "hypotheses": hypotheses,
            "divergence": entropy / 2,
            "conflict": conflict,
            "cause": cause,
            "attribution": attribution,
            "counterfactual": np.stack([np.where(label == 1, 0, label), label]).astype(np.uint8),
            "regions": {"whole": {"volume_ml": 1.0, "interval": [0.5, 1.5]}},
            "predicted_dice": 0.8,
            "records": explanation.records(
                error,
                label,
                volume.spacing,
                MODALITIES,
                CLASSES,
                shown,
                cause,
                pairs,
                support,
                support,
                attribution,
            ),
        }
    return made


def write(output: Path, prediction: dict, volume: preprocess.Volume, **changes) -> None:
    arguments = {
        "name": "unit",
        "method": "entrust",
        "modalities": MODALITIES,
        "reference": "FLAIR",
        "classes": CLASSES,
        "label_map": LABEL_MAP,
        "regions": {"whole": (1, 2)},
        "hypotheses": True,
        "versions": {"numpy": np.__version__},
        "warnings": ["a warning"],
    }
    report.write_prediction(output, prediction, volume, **(arguments | changes))


def test_maps_lie_on_the_scan_voxel_for_voxel(tmp_path, stored):
    volume = read(tmp_path, stored)
    prediction = make_prediction(volume, stored)
    write(tmp_path / "out", prediction, volume)
    image = nibabel.load(tmp_path / "out" / "label.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), stored)
    np.testing.assert_array_equal(image.affine, AFFINE)
    probability = nibabel.load(tmp_path / "out" / "probability.nii.gz").get_fdata()
    assert probability.shape == (*SHAPE, 3)
    np.testing.assert_allclose(probability[stored == 4], [[0.05, 0.9, 0.05]] * int((stored == 4).sum()), atol=1e-6)
    hypotheses = np.asarray(nibabel.load(tmp_path / "out" / "hypotheses.nii.gz").dataobj)
    assert hypotheses.shape == (*SHAPE, 3)
    np.testing.assert_array_equal(hypotheses[..., 0], stored)
    np.testing.assert_array_equal(hypotheses[..., 1], np.where(stored == 4, 0, stored))
    for name, expected in (("T1", np.where(stored == 4, 0, stored)), ("FLAIR", stored)):
        alone = np.asarray(nibabel.load(tmp_path / "out" / f"counterfactual_{name}.nii.gz").dataobj)
        np.testing.assert_array_equal(alone, expected)
        assert alone.dtype == np.uint8
    error = nibabel.load(tmp_path / "out" / "error_probability.nii.gz")
    assert error.get_data_dtype() == np.float32
    np.testing.assert_allclose(error.get_fdata(), np.where(stored == 4, 0.4, 0.02), atol=1e-6)


def test_report_names_every_file_and_every_absence(tmp_path, stored):
    volume = read(tmp_path, stored)
    write(tmp_path / "out", make_prediction(volume, stored), volume)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.json", *found["files"]}
    assert found["absent"] == {}
    assert "not a medical device" in found["statement"]
    assert found["modalities"]["present"] == list(MODALITIES)
    assert found["regions"]["whole"] == {
        "classes": ["core", "oedema"],
        "interval_means": "5th to 95th percentile over the hypotheses",
        "volume_ml": 1.0,
        "interval": [0.5, 1.5],
        "guaranteed_interval": None,
    }
    assert found["guarantees"] == [] and found["predicted_dice_interval"] is None
    (review,) = found["review"]
    assert review["cause"] == "conflict" and "contradict" in review["sentence"]
    assert stored[tuple(review["scan_voxel"])] == 4
    np.testing.assert_allclose(nibabel.affines.apply_affine(AFFINE, review["scan_voxel"]), review["world_mm"])


def test_a_method_without_hypotheses_says_what_is_absent(tmp_path, stored):
    volume = read(tmp_path, stored, ("T1",))
    write(tmp_path / "out", make_prediction(volume, stored, full=False), volume, method="unet")
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    expected = {"divergence", "conflict", "cause", "hypotheses"}
    expected |= {f"{kind}_{name}" for kind in ("attribution", "counterfactual") for name in MODALITIES}
    assert set(found["absent"]) == {f"{stem}.nii.gz" for stem in expected}
    assert all("unet" in why for why in found["absent"].values())
    assert not any((tmp_path / "out" / name).exists() for name in found["absent"])
    assert found["predicted_dice"] is None
    assert found["modalities"]["missing"] == ["FLAIR"]
    assert found["modalities"]["geometry_from"] == "T1.nii.gz"


def test_guaranteed_masks_lie_on_the_scan_and_refusals_are_said(tmp_path, stored):
    volume = read(tmp_path, stored)
    prediction = make_prediction(volume, stored)
    core = canonical(stored) == 4
    promised = {
        "outer_mask": {"whole": canonical(stored) > 0, "core": core},
        "inner_mask": {"core": core},
        "dice": (0.7, 0.9),
        "volume": {"whole": (0.25, 2.0)},
        "statements": ["The outer mask misses at most 10 %.", "No inner mask of whole."],
    }
    write(tmp_path / "out", prediction | {"conformal": promised, "trust": {"score": 0.9}}, volume)
    outer, inner = (nibabel.load(tmp_path / "out" / f"{kind}_mask.nii.gz") for kind in ("outer", "inner"))
    assert outer.get_data_dtype() == inner.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(outer.dataobj), np.stack([stored > 0, stored == 4], -1))
    np.testing.assert_array_equal(np.asarray(inner.dataobj), stored == 4)  # one region: no fourth axis
    np.testing.assert_array_equal(outer.affine, AFFINE)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "fourth axis: whole, core" in found["files"]["outer_mask.nii.gz"]
    assert found["files"]["inner_mask.nii.gz"].endswith("(core)")
    assert found["guarantees"] == promised["statements"] and found["trust"] == {"score": 0.9}
    assert found["predicted_dice_interval"] == [0.7, 0.9]
    assert found["regions"]["whole"]["guaranteed_interval"] == [0.25, 2.0]
    none = promised | {"outer_mask": {}, "inner_mask": {}, "dice": None, "volume": {}}
    write(tmp_path / "out", prediction | {"conformal": none}, volume)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"outer_mask.nii.gz", "inner_mask.nii.gz"} == set(found["absent"])
    assert not list((tmp_path / "out").glob("*_mask.nii.gz"))


def test_hypotheses_only_on_demand(tmp_path, stored):
    volume = read(tmp_path, stored)
    write(tmp_path / "out", make_prediction(volume, stored), volume, hypotheses=False)
    assert not (tmp_path / "out" / "hypotheses.nii.gz").exists()
    assert "--hypotheses" in json.loads((tmp_path / "out" / "report.json").read_text())["absent"]["hypotheses.nii.gz"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, stored, monkeypatch, failure):
    volume = read(tmp_path, stored)
    before = sorted(tmp_path.iterdir())

    def fail(path, *_, **__):
        assert (path.parent / "label.nii.gz").exists()  # it is the middle
        raise failure

    monkeypatch.setattr(report.figures, "overview", fail)
    with pytest.raises(failure):
        write(tmp_path / "out", make_prediction(volume, stored), volume)
    assert sorted(tmp_path.iterdir()) == before


def test_a_failure_keeps_the_earlier_prediction(tmp_path, stored, monkeypatch):
    volume = read(tmp_path, stored)
    prediction = make_prediction(volume, stored)
    write(tmp_path / "out", prediction, volume)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    broken = prediction | {"cause": prediction["cause"][:2]}
    with pytest.raises(ValueError, match="shape"):
        write(tmp_path / "out", broken, volume)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"out", "T1.nii.gz", "FLAIR.nii.gz"}


def test_ctrl_c_in_a_process_of_its_own_leaves_nothing(tmp_path):
    program = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from entrust_jax.report.output import check_output, whole_folder\n"
        # a shell's background jobs start with the signal ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with whole_folder(Path(sys.argv[1]), check_output) as folder:\n"
        "    (folder / 'a').write_bytes(b'x'); os.kill(os.getpid(), signal.SIGINT); time.sleep(20)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, check=False)
    assert ended.returncode != 0 and b"KeyboardInterrupt" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_is_filled_where_it_stands(tmp_path, monkeypatch):
    """A container's volume cannot be renamed: what is in it is replaced."""
    mount = tmp_path / "out"
    mount.mkdir()
    (mount / "earlier").write_text("")
    rename = Path.rename

    def busy(self, target):
        if self == mount:
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with report.whole_folder(mount, lambda path: None) as folder:
        (folder / "a").write_text("new")
        (folder / "inner").mkdir()
        (folder / "inner" / "b").write_text("new")
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"out/a", "out/inner/b"}


def test_an_earlier_prediction_is_replaced_whole(tmp_path, stored):
    volume = read(tmp_path, stored)
    prediction = make_prediction(volume, stored)
    write(tmp_path / "out", prediction, volume)
    write(tmp_path / "out", prediction, volume, hypotheses=False)
    assert not (tmp_path / "out" / "hypotheses.nii.gz").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "T1.nii.gz", "FLAIR.nii.gz"}


def test_a_folder_with_anything_else_is_refused(tmp_path, stored):
    volume = read(tmp_path, stored)
    prediction = make_prediction(volume, stored)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no prediction of ours"):
        write(out, prediction, volume)
    (out / "thesis.tex").unlink()
    write(out, prediction, volume)  # empty: taken
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        write(out, prediction, volume)
    assert (out / "thesis.tex").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        report.check_output(file)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text('{"made_by": "somebody else", "files": {}}')
    with pytest.raises(UserError, match="no prediction of ours"):
        report.check_output(tmp_path / "other")


def test_label_values_are_the_data_sets_own():
    np.testing.assert_array_equal(report.label_values(LABEL_MAP, 3), [0, 4, 2])
    assert report.label_values(LABEL_MAP, 3).dtype == np.uint8
    assert report.label_values(((0, 0), (1000, 1)), 2).dtype == np.int32
    with pytest.raises(UserError, match="class index 2"):
        report.label_values(((0, 0), (1, 1)), 3)


def test_a_volume_without_a_file_is_refused_before_anything_is_made(tmp_path, stored):
    import dataclasses

    volume = dataclasses.replace(read(tmp_path, stored), reference=None)
    with pytest.raises(UserError, match="NIfTI"):
        write(tmp_path / "out", {}, volume)
    assert not (tmp_path / "out").exists()
