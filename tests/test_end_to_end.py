"""The commands as a person gives them: train, evaluate and predict on a small phantom, killed, stopped and misused."""

import contextlib
import csv
import json
import shutil
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest
from ml_collections import ConfigDict

from entrust_jax import train
from entrust_jax.runtime import checkpoint
from entrust_jax.trustmap import explanation

METHODS = ("entrust", "unet", "deep_ensemble")
MODALITIES = ("T1", "T1ce", "T2", "FLAIR")
CASES = {"train": 8, "val": 4, "calibration": 9, "test": 4}
ENFUSE, SEGDIFF, UNET = 6, 10, 8  # steps of the small run's stages
FIGURES = (
    "dice", "hd95", "ece_classwise_roi", "ece_classwise_body", "nll", "brier", "error_auroc", "error_auprc", "aurc",
    "aurc_referral", "predicted_dice_mae", "predicted_dice_spearman", "hypothesis_diversity", "seconds_per_case",
    "peak_memory_mb",
)  # fmt: skip


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def promised(workdir) -> set[str]:
    """The masks that a trained folder promises something of."""
    found = json.loads((workdir / "conformal.json").read_text())
    kinds = ("outer", "inner")
    return {f"{kind}_mask" for kind in kinds if any(one["threshold"] is not None for one in found[kind].values())}


def scans_of(workdir) -> dict[str, Path]:
    """The example case that training leaves, by modality."""
    (folder,) = (workdir / "example").iterdir()
    return {name: folder / f"{folder.name}_{name.lower()}.nii.gz" for name in MODALITIES}


# Training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_folder_explains_itself(trained, method):
    workdir = trained(method)
    assert json.loads((workdir / "config.json").read_text())["method"] == method
    assert json.loads((workdir / "version.json").read_text())["jax"] == jax.__version__
    splits = json.loads((workdir / "splits.json").read_text())
    assert {part: len(splits[part]) for part in CASES} == CASES
    assert len({name for part in CASES for name in splits[part]}) == sum(CASES.values())
    assert list((workdir / "tensorboard").glob("events*"))
    found = json.loads((workdir / "calibration.json").read_text())
    assert found["chosen"] in found["table"] and 0 < found["tau"] < 1
    assert found["thresholds"] == explanation.THRESHOLDS
    found = json.loads((workdir / "conformal.json").read_text())
    assert found["patients"] == CASES["calibration"] and set(found["outer"]) == {"WT", "TC", "ET"}
    assert found["dice"]["margin"] >= 0 and all(one["patients"] <= 9 for one in found["outer"].values())
    assert all("needs 22 calibration patients" in one["reason"] for one in found["inner"].values())
    assert (workdir / "ood.json").exists() == (workdir / "ood.npz").exists() == (method == "entrust")
    if method == "entrust":
        found = json.loads((workdir / "ood.json").read_text())
        assert (found["training"], found["patients"]) == (CASES["train"], CASES["val"] + CASES["calibration"])
    assert all(path.is_file() for path in scans_of(workdir).values())

    rows = rows_of(workdir)
    total = ENFUSE + SEGDIFF if method == "entrust" else UNET
    assert [row["step"] for row in rows] == list(range(1, total + 1))
    assert all(np.isfinite(row["loss"]) for row in rows)
    validated = [row["step"] for row in rows if "val/score" in row]
    assert validated == ([5, 6, 11, 16] if method == "entrust" else [5, 8])  # every 5 steps of a stage and at its end
    if method == "entrust":
        assert [row["stage"] for row in rows] == ["enfuse"] * ENFUSE + ["segdiff"] * SEGDIFF
        assert any("kappa" in row for row in rows) and all("val/kappa" in row for row in rows if "val/score" in row)
        assert any(name.startswith("ce/bin_") for name in rows[-1]) and "val/ce_bin_0" in rows[-1]

    # Shapes, memory and minutes are said before data is touched.
    printed = workdir.with_suffix(".log").read_text()
    words = ["parameters", "MB per device", "planned:", "train: 8 of 8 cases", "calibration: 9 of 9", "threshold:"]
    words += ["guarantees: 9 patients", "No inner mask of WT at 10 % false: it needs 22"]
    places = [printed.index(word) for word in words]
    assert places == sorted(places)


# A run that interrupts itself: the signal comes in the middle of a step's row. Checkpoints are saved at every step
# up to `until` (the trainer's own rule goes by minutes), none later, so that work is lost and done again.
INTERRUPTED = """
import os, signal, sys
from entrust_jax import cli, train
from entrust_jax.runtime import logs

name, at, until = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
append_row = logs.append_row

def append(path, row):
    append_row(path, row)
    train.CHECKPOINT_SECONDS = 0 if row["step"] < until else 1e9
    if row["step"] == at:
        if name == "SIGKILL":
            with open(path, "a") as file:
                file.write('{"step": 1')  # a torn line
        os.kill(os.getpid(), signal.Signals[name])

logs.append_row = append
train.define_flags()
cli.run(train.main, required=["config"])
"""


def saved(workdir):
    """Every array of the last checkpoint (parameters, EMA, optimiser) and of the best, by name."""
    config = ConfigDict(json.loads((workdir / "config.json").read_text()))
    stage = train.plan_stages(config, train.api.network_of(config))[-1]
    state = jax.eval_shape(lambda: train.initial_state(config, train.optimiser(config, stage)))
    found = {}
    for folder, restore, abstract in (
        ("last", checkpoint.restore_last, state),
        ("best", checkpoint.restore_best, state.params),
    ):
        manager = checkpoint.open_manager(workdir / "checkpoints" / folder, read_only=True)
        with contextlib.closing(manager):
            tree, meta = restore(manager, abstract)
        found[f"{folder} meta"] = meta
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[folder + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def test_a_killed_run_ends_as_one_that_was_not(trained, command, small, tmp_path):
    whole, workdir = trained("entrust"), tmp_path / "entrust"
    arguments = (*small, "--config.method=entrust", f"--workdir={workdir}")

    # SIGTERM in stage 1: saves, says so in one line and leaves.
    done = command("train", "SIGTERM", 3, 99, *arguments, script=INTERRUPTED, code=143)
    *progress, last = done.stderr.splitlines()
    assert last == f"{workdir}: stopped at step 3 and saved; run the same command to go on"
    assert all(line.startswith("enfuse ") for line in progress)
    assert [path.name for path in (workdir / "checkpoints" / "last").iterdir()] == ["3"]
    splits = (workdir / "splits.json").read_bytes()

    # SIGKILL in the middle of stage 2a, three steps behind the last checkpoint and one behind a better best.
    done = command("train", "SIGKILL", ENFUSE + 6, ENFUSE + 4, *arguments, script=INTERRUPTED, code=-9)
    assert "resumed at step 3 (enfuse)" in done.stdout
    assert [row["step"] for row in rows_of_torn(workdir)] == list(range(1, ENFUSE + 6 + 1))
    steps = {path.name for path in (workdir / "checkpoints" / "last").iterdir()}
    assert str(ENFUSE + 3) in steps and str(ENFUSE + 6) not in steps

    done = command("train", *arguments)
    assert f"resumed at step {ENFUSE + 3} (segdiff)" in done.stdout
    assert (workdir / "splits.json").read_bytes() == splits == (whole / "splits.json").read_bytes()
    assert (workdir / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    ours, theirs = saved(workdir), saved(whole)
    assert ours.keys() == theirs.keys() and sum("opt_state" in name for name in ours) > 100
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for name in ("calibration.json", "calibration.npz", "conformal.json", "ood.json"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def rows_of_torn(workdir):
    """The rows of a killed run, the torn last line left out."""
    *lines, torn = (workdir / "metrics.jsonl").read_text().splitlines()
    assert torn == '{"step": 1'
    return [json.loads(line) for line in lines]


def test_an_older_folder_gets_its_guarantees_without_training(trained, command, small, tmp_path):
    workdir, output = shutil.copytree(trained("unet"), tmp_path / "unet"), tmp_path / "out"
    (workdir / "conformal.json").unlink()
    values = json.loads((workdir / "config.json").read_text())
    del values["trust"]
    (workdir / "config.json").write_text(json.dumps(values))
    files = [f"{name}={path}" for name, path in scans_of(workdir).items()]
    done = command("predict", f"--workdir={workdir}", f"--output={output}", *files)
    assert "No guarantee: this model has no conformal.json" in done.stdout
    assert not {"outer_mask", "inner_mask"} & set(maps_of(output))

    kept = {name: (workdir / name).stat().st_mtime_ns for name in ("metrics.jsonl", "calibration.json")}
    levels = ("--config.trust.fnr=0.3", "--config.trust.fdr=0.9", "--config.trust.coverage=0.75")
    done = command("train", *small, *levels, "--config.method=unet", f"--workdir={workdir}")
    assert "guarantees: 9 patients" in done.stdout and "calibration: 9 patients" not in done.stdout
    assert kept == {name: (workdir / name).stat().st_mtime_ns for name in kept}
    found = json.loads((workdir / "conformal.json").read_text())
    assert found["levels"] == {"fnr": 0.3, "fdr": 0.9, "coverage": 0.75}
    assert found["outer"]["WT"]["threshold"] is not None and "outer_mask" in promised(workdir)
    done = command("predict", f"--workdir={workdir}", f"--output={output}", *files)
    assert "The outer mask of WT misses at most 30 % of it" in done.stdout
    maps = maps_of(output)
    assert promised(workdir) == {"outer_mask", "inner_mask"} & set(maps)
    check_geometry(maps, scans_of(workdir)["T1ce"])
    report = json.loads((output / "report.json").read_text())
    low, high = report["regions"]["WT"]["guaranteed_interval"]
    assert 0 <= low <= high and report["trust"]["score"] > 0
    assert report["predicted_dice_interval"][0] <= report["predicted_dice"] <= report["predicted_dice_interval"][1]

    # A folder of before what they were made with was written gets that, too, and the same figures but for rounding.
    (workdir / "conformal.json").write_text(json.dumps({key: found[key] for key in found if key != "made_with"}))
    train.guarantee(workdir)
    again = json.loads((workdir / "conformal.json").read_text())
    assert again.keys() == found.keys() and again["made_with"] == found["made_with"]
    assert again["outer"]["WT"]["threshold"] == pytest.approx(found["outer"]["WT"]["threshold"], abs=1e-3)


# Evaluation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(trained, command, tmp_path_factory):
    """The three methods evaluated at once: (folder, printed)."""
    output = tmp_path_factory.mktemp("comparison") / "out"
    workdirs = ",".join(str(trained(method)) for method in METHODS)
    done = command("evaluate", f"--workdir={workdirs}", f"--output={output}")
    return output, done.stdout


def check_figure(name, figure, n):
    assert {"value", "ci95", "n"} <= figure.keys(), name
    assert figure["ci95"] is None and figure["reason"], name  # below ten patients there is no interval
    assert figure["n"] <= n, name
    assert figure["value"] is None or np.isfinite(figure["value"]), name


@pytest.mark.parametrize("method", METHODS)
def test_summary_has_every_figure(comparison, method):
    output, _ = comparison
    summary = json.loads((output / method / "summary.json").read_text())
    absent = {"hypothesis_diversity"} if method == "unet" else set()  # a U-Net draws nothing
    assert [name for name in FIGURES if name not in summary] == sorted(absent)
    for name in set(FIGURES) - absent:
        for figure in summary[name].values() if "before" in summary[name] else [summary[name]]:
            check_figure(name, figure, CASES["test"])
    for name in ("ece_classwise_roi", "ece_classwise_body", "nll", "brier"):
        assert set(summary[name]) == {"before", "after"}
        assert all(stage["value"] is not None for stage in summary[name].values())
    for name in ("dice", "error_auroc", "aurc", "predicted_dice_mae", "seconds_per_case", "peak_memory_mb"):
        assert summary[name]["value"] is not None
    for name in ("aurc_referral", "aurc"):
        assert summary[name]["oracle"] <= min(summary[name]["value"], summary[name]["random"]) + 1e-12
    # Truth and prediction both empty: the case has no Dice, and is counted.
    assert summary["dice"]["n"] + summary["dice"]["empty"] == CASES["test"] and summary["method"] == method
    if not absent:
        assert 0 <= summary["hypothesis_diversity"]["value"] <= 1
    with (output / method / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["case"] for row in rows) == [f"PHANTOM_{i:05d}" for i in range(21, 25)]
    mean = np.mean([float(row["dice"]) for row in rows if row["dice"]])
    assert summary["dice"]["value"] == pytest.approx(mean)
    for name in ("reliability.png", "risk_coverage.png"):
        assert (output / method / name).read_bytes().startswith(b"\x89PNG")


def test_several_folders_give_a_comparison(comparison):
    output, printed = comparison
    table = (output / "comparison.md").read_text()
    assert all(method in table for method in METHODS) and "dice" in table.lower()
    figures = json.loads((output / "comparison.json").read_text())
    assert list(figures["figures"]) == list(METHODS) and figures["reference"] == "entrust"
    assert set(figures["differences"]) == {"unet", "deep_ensemble"} and figures["roi_shared_by"] == list(METHODS)
    assert (output / "risk_coverage.png").is_file()
    assert "4/4 PHANTOM_00024" in printed
    assert not list(output.parent.glob(".*"))


def test_one_folder_is_evaluated_into_itself(trained, command, comparison):
    workdir = trained("unet")
    done = command("evaluate", f"--workdir={workdir}")
    alone = json.loads((workdir / "evaluation" / "summary.json").read_text())
    beside = json.loads((comparison[0] / "unet" / "summary.json").read_text())
    assert alone["dice"] == beside["dice"] and alone["ece_classwise_body"] == beside["ece_classwise_body"]
    assert alone["about"]["trained_on"] == {"unet": []}
    assert f"wrote {workdir / 'evaluation'}" in done.stdout
    shutil.rmtree(workdir / "evaluation")


# Prediction ---------------------------------------------------------------------------------------------------


def maps_of(output):
    return {path.name.removesuffix(".nii.gz"): nibabel.load(path) for path in output.glob("*.nii.gz")}


def check_geometry(maps, reference):
    scan = nibabel.load(reference)
    for name, image in maps.items():
        assert image.shape[:3] == scan.shape, name
        np.testing.assert_array_equal(image.affine, scan.affine, err_msg=name)
        for code in ("sform_code", "qform_code", "xyzt_units"):
            assert image.header[code] == scan.header[code], (name, code)


def check_values(maps):
    assert set(np.unique(maps["label"].dataobj)) <= {0, 1, 2, 4}  # the data set's own values
    probability = np.asarray(maps["probability"].dataobj)
    np.testing.assert_allclose(probability.sum(-1), 1, atol=1e-4)
    error = np.asarray(maps["error_probability"].dataobj)
    assert error.min() >= 0 and error.max() <= 1
    entropy = np.asarray(maps["entropy"].dataobj)
    assert entropy.min() >= 0 and entropy.max() <= np.log(4) + 1e-4
    assert all(np.isfinite(np.asarray(image.dataobj)).all() for image in maps.values())


def test_prediction_from_all_modalities(trained, command, tmp_path):
    workdir, output = trained("entrust"), tmp_path / "out"
    scans = scans_of(workdir)
    files = [f"{name}={path}" for name, path in scans.items()]
    done = command("predict", f"--workdir={workdir}", f"--output={output}", "--hypotheses", *files)
    assert "present T1, T1ce, T2, FLAIR; missing none" in done.stdout and str(output / "overview.png") in done.stdout
    maps = maps_of(output)
    assert set(maps) == {
        "label", "probability", "error_probability", "entropy", "divergence", "conflict", "cause", "hypotheses",
        *(f"{kind}_{name}" for kind in ("attribution", "counterfactual") for name in MODALITIES), *promised(workdir),
    }  # fmt: skip
    check_geometry(maps, scans["T1ce"])
    check_values(maps)
    assert maps["probability"].shape[3] == 4 and maps["hypotheses"].shape[3] == 4
    assert set(np.unique(maps["hypotheses"].dataobj)) <= {0, 1, 2, 4}
    assert all(set(np.unique(maps[f"counterfactual_{name}"].dataobj)) <= {0, 1, 2, 4} for name in MODALITIES)
    assert set(np.unique(maps["cause"].dataobj)) <= {0, 1, 2, 3, 4, 5}
    report = json.loads((output / "report.json").read_text())
    assert report["modalities"]["present"] == list(MODALITIES) and report["modalities"]["missing"] == []
    assert report["versions"]["jax"] == jax.__version__ and report["predicted_dice"] is not None
    assert (
        explanation.THRESHOLDS.items() < report["thresholds"].items() and "pixel" in report["thresholds"]["a_voxel_is"]
    )
    assert set(report["regions"]) == {"WT", "TC", "ET"}
    for region in report["regions"].values():
        assert region["interval"][0] <= region["interval"][1]
    assert all(record["sentence"] for record in report["review"])
    assert set(report["files"]) == {path.name for path in output.iterdir()} - {"report.json"}
    assert (output / "overview.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_prediction_without_the_reference_and_from_turned_scans(trained, command, tmp_path):
    workdir, output = trained("entrust"), tmp_path / "out"
    scans = scans_of(workdir)
    # The same voxels stored in another order, and moved to another place: T1 gives the grid, FLAIR follows.
    turned = {}
    for name, axes in (("T1", ("P", "S", "R")), ("FLAIR", ("L", "A", "I"))):
        image = nibabel.load(scans[name])
        to = nibabel.orientations.axcodes2ornt(axes)
        image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), to))
        image.set_sform(np.diag([1, 1, 1, 1]) @ image.affine, code=2)
        turned[name] = tmp_path / f"{name}.nii.gz"
        nibabel.save(image, turned[name])
    files = [f"{name}={path}" for name, path in turned.items()]
    done = command("predict", f"--workdir={workdir}", f"--output={output}", *files)
    assert "present T1, FLAIR; missing T1ce, T2" in done.stdout
    assert "Without T1ce the maps take the geometry of T1." in done.stdout
    maps = maps_of(output)
    for kind in ("attribution", "counterfactual"):
        assert {name for name in maps if name.startswith(kind)} == {f"{kind}_T1", f"{kind}_FLAIR"}
    assert "hypotheses" not in maps and maps["label"].shape == (48, 4, 48)
    check_geometry(maps, turned["T1"])
    check_values(maps)
    report = json.loads((output / "report.json").read_text())
    assert report["modalities"] == {"present": ["T1", "FLAIR"], "missing": ["T1ce", "T2"], "geometry_from": "T1.nii.gz"}
    assert report["absent"]["attribution_T2.nii.gz"] == "no T2 scan was given"
    assert report["absent"]["counterfactual_T2.nii.gz"] == "no T2 scan was given"


def test_the_order_and_the_names_of_the_scans_change_nothing(trained, command, tmp_path):
    """To the last bit: in the order of the model, in another, by synonyms, and by the names of the config."""
    workdir, scans = trained("unet"), scans_of(trained("unet"))
    renamed = tmp_path / "workdir"
    shutil.copytree(workdir, renamed)
    config = json.loads((renamed / "config.json").read_text())
    config["data"]["names"] = {"FLAIR": ["dark-fluid"], "T1": ["MPRAGE"]}
    (renamed / "config.json").write_text(json.dumps(config))
    synonyms = {"T1": "t1n", "T1ce": "T1Gd", "T2": "t2w", "FLAIR": "t2f"}
    own = {"T1": "mprage", "T1ce": "t1c", "T2": "T2", "FLAIR": "Dark-Fluid"}
    given = {
        "ordered": (workdir, [f"{name}={scans[name]}" for name in MODALITIES]),
        "turned": (workdir, [f"{synonyms[name]}={scans[name]}" for name in reversed(MODALITIES)]),
        "renamed": (renamed, [f"{own[name]}={scans[name]}" for name in ("T2", "FLAIR", "T1", "T1ce")]),
    }
    found = {}
    for name, (folder, files) in given.items():
        command("predict", f"--workdir={folder}", f"--output={tmp_path / name}", *files)
        found[name] = maps_of(tmp_path / name)
    expected = found.pop("ordered")
    assert "probability" in expected and "label" in expected
    for name, maps in found.items():
        assert set(maps) == set(expected), name
        for key, image in maps.items():
            assert np.asarray(image.dataobj).tobytes() == np.asarray(expected[key].dataobj).tobytes(), (name, key)
            assert image.header.binaryblock == expected[key].header.binaryblock, (name, key)


@pytest.mark.parametrize("method", ["unet", "deep_ensemble"])
def test_a_baseline_predicts_a_folder(trained, command, tmp_path, method):
    workdir, output = trained(method), tmp_path / "out"
    case = scans_of(workdir)["T1"].parent
    done = command("predict", f"--workdir={workdir}", f"--output={output}", f"--case={case}", "--hypotheses")
    maps = maps_of(output)
    several = {"divergence", "hypotheses"} if method == "deep_ensemble" else set()
    assert set(maps) == {"label", "probability", "error_probability", "entropy"} | several | promised(workdir)
    check_geometry(maps, scans_of(workdir)["T1ce"])
    check_values(maps)
    report = json.loads((output / "report.json").read_text())
    assert report["method"] == method and "conflict.nii.gz" in report["absent"]
    if several:
        assert maps["hypotheses"].shape[3] == 2  # members
    else:
        assert "hypotheses.nii.gz is not written" in done.stdout


# Mistakes -----------------------------------------------------------------------------------------------------

# Every command in a fork of one process that has imported everything: none of them gets as far as compiling.
MISTAKEN = """
import importlib, json, os, sys, traceback
from entrust_jax import cli, evaluate, predict, train

required = {"train": ["config"], "evaluate": [], "predict": ["workdir", "output"]}
results = []
for module, *arguments in json.load(open(sys.argv[1])):
    outputs = [sys.argv[1] + ".out", sys.argv[1] + ".err"]
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for number, path in enumerate(outputs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = 0
        try:
            sys.argv = [module, *arguments]
            entry = importlib.import_module("entrust_jax." + module)
            entry.define_flags()
            cli.run(entry.main, required=required[module], words="files" if module == "predict" else "")
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append([code, *(open(path).read() for path in outputs)])
print(json.dumps(results))
"""

# name: (command, words that its one line holds). {w} a trained U-Net, {d} a folder of data, {o} an absent folder.
MISTAKES = {
    "no data set": (
        ["train", "--config=configs/brats.py"],
        ["config.data.dir is not set", "synapse.org", "NAME_flair.nii.gz", "brats.py:demo"],
    ),
    "no data folder": (
        ["train", "--config=configs/glioma.py", "--config.data.dir={d}/none"],
        ["/none: no such folder", "Cancer Imaging Archive", "imagesTr", "brats.py:demo"],
    ),
    "no complete case": (
        ["train", "--config=configs/brats.py", "--config.data.dir={d}/partial"],
        ["partial", "none of its 2 cases has every modality", "add the missing files"],
    ),
    "no case at all": (["train", "--config=configs/brats.py", "--config.data.dir={d}/empty"], ["empty", "no case"]),
    "two files": (
        ["train", "--config=configs/brats.py", "--config.data.dir={d}/twice"],
        ["two files for T1", "A_t1.nii and A_t1.nii.gz", "keep one"],
    ),
    "unknown key": (["train", "--config=configs/brats.py:demo", "--config.train.bach=3"], ["train.bach", "batch"]),
    "value of another type": (["train", "--config=configs/brats.py:demo", "--config.seed=x"], ["seed"]),
    "unknown variant": (["train", "--config=configs/brats.py:nosuch"], ["nosuch", "demo"]),
    "unknown variant of glioma": (["train", "--config=configs/glioma.py:nosuch"], ["nosuch", "gpu"]),
    "unknown variant of phantom": (["train", "--config=configs/phantom.py:nosuch"], ["nosuch"]),
    "no config": (["train"], ["--config"]),
    "unknown method": (
        ["train", "--config=configs/brats.py:demo", "--config.method=magic"],
        ["config.method is 'magic'", "deep_ensemble"],
    ),
    "patch that cannot be halved": (
        ["train", "--config=configs/glioma.py", "--config.data.patch=(100,96)"],
        ["config.data.patch is (100, 96)", "multiples of 16"],
    ),
    "unknown reference": (
        ["train", "--config=configs/glioma.py", "--config.data.reference=Flair"],
        ["config.data.reference is 'Flair'", "T1, FLAIR, T1ce"],
    ),
    "working folder is a file": (
        ["train", "--config=configs/brats.py:demo", "--workdir={d}/good.nii.gz"],
        ["good.nii.gz: is a file"],
    ),
    "phantom that does not fit": (
        ["train", "--config=configs/brats.py:demo", "--config.data.phantom.radius=20.0"],
        ["data.phantom.radius", "smaller"],
    ),
    "unknown layout": (["train", "--config=configs/brats.py", "--config.data.layout=dicom"], ["layout", "brats"]),
    "another config": (
        ["train", "--config=configs/brats.py:demo", "--workdir={w}"],
        ["config.json", "another --workdir"],
    ),
    "predict: unfinished": (
        ["predict", "--workdir={u}", "--output={o}", "T1={d}/good.nii.gz"],
        ["has not finished", "same train command"],
    ),
    "predict: no such working folder": (
        ["predict", "--workdir={d}/none", "--output={o}", "T1={d}/good.nii.gz"],
        ["none", "no such folder"],
    ),
    "predict: never trained": (
        ["predict", "--workdir={d}", "--output={o}", "T1={d}/good.nii.gz"],
        ["config.json", "train first"],
    ),
    "predict: no output": (["predict", "--workdir={w}", "T1={d}/good.nii.gz"], ["--output", "missing"]),
    "predict: no scan": (["predict", "--workdir={w}", "--output={o}"], ["no scan given"]),
    "predict: no such scan": (
        ["predict", "--workdir={w}", "--output={o}", "T1={d}/x.nii.gz"],
        ["x.nii.gz: no such file"],
    ),
    "predict: unknown modality": (
        ["predict", "--workdir={w}", "--output={o}", "PET={d}/good.nii.gz"],
        ["PET", "T1, T1ce, T2, FLAIR"],
    ),
    "predict: truncated": (
        ["predict", "--workdir={w}", "--output={o}", "T1={d}/good.nii.gz", "T2={d}/truncated.nii.gz"],
        ["truncated.nii.gz", "copy or download"],
    ),
    "predict: NaN": (["predict", "--workdir={w}", "--output={o}", "T1={d}/nan.nii.gz"], ["nan.nii.gz", "NaN"]),
    "predict: constant": (
        ["predict", "--workdir={w}", "--output={o}", "T1={d}/constant.nii.gz"],
        ["constant", "same value"],
    ),
    "predict: elsewhere": (
        ["predict", "--workdir={w}", "--output={o}", "T1={d}/good.nii.gz", "FLAIR={d}/far.nii.gz"],
        ["far.nii.gz", "does not overlap", "good.nii.gz"],
    ),
    "predict: not a scan": (["predict", "--workdir={w}", "--output={o}", "T1={d}/text.nii.gz"], ["text.nii.gz"]),
    "predict: two files": (
        ["predict", "--workdir={w}", "--output={o}", "--case={d}/twice/A"],
        ["two files for T1", "keep one"],
    ),
    "predict: output holds other files": (
        ["predict", "--workdir={w}", "--output={d}", "T1={d}/good.nii.gz"],
        ["no prediction of ours"],
    ),
    "predict: corrupt checkpoint": (
        ["predict", "--workdir={c}", "--output={o}", "T1={d}/good.nii.gz"],
        ["checkpoints/best", "damaged", "train again"],
    ),
    "evaluate: no working folder": (["evaluate"], ["--workdir is missing"]),
    "evaluate: no such working folder": (["evaluate", "--workdir={d}/none"], ["none", "train first"]),
    "evaluate: unfinished": (["evaluate", "--workdir={u}", "--output={o}"], ["has not finished"]),
    "evaluate: one of two missing": (["evaluate", "--workdir={w},{d}/none", "--output={o}"], ["none"]),
    "evaluate: named twice": (["evaluate", "--workdir={w},{w}", "--output={o}"], ["twice"]),
    "evaluate: corrupt checkpoint": (["evaluate", "--workdir={c}", "--output={o}"], ["checkpoints/best", "damaged"]),
    "evaluate: a folder for the phantom": (
        ["evaluate", "--workdir={w}", "--data_dir={d}", "--output={o}"],
        ["--data_dir", "phantom"],
    ),
    "evaluate: output holds other files": (["evaluate", "--workdir={w}", "--output={d}"], ["holds other files"]),
    "evaluate: unknown split": (["evaluate", "--workdir={w}", "--split=train", "--output={o}"], ["split", "test"]),
}


def write_scan(path, values, shift=0.0):
    affine = np.eye(4)
    affine[0, 3] = shift
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), path)


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def answers(trained, command, tmp_path_factory):
    """What every mistaken command says, {name: (code, stdout, stderr)}, and whether any of them left a file."""
    root = tmp_path_factory.mktemp("mistakes")
    data = root / "data"
    good = np.random.default_rng(0).normal(100, 20, (16, 16, 4))
    write_scan(data / "good.nii.gz", good)
    write_scan(data / "far.nii.gz", good, shift=500.0)
    write_scan(data / "constant.nii.gz", np.full((16, 16, 4), 7.0))
    write_scan(data / "nan.nii.gz", np.where(good > 150, np.nan, good) + np.where(np.arange(4) == 0, np.nan, 0))
    (data / "truncated.nii.gz").write_bytes((data / "good.nii.gz").read_bytes()[:-200])
    (data / "text.nii.gz").write_text("no scan")
    (data / "empty").mkdir()
    for name, modalities in (("A", ("t1", "t1ce", "flair")), ("B", ("t1", "t1ce", "t2"))):
        for modality in (*modalities, "seg"):
            write_scan(data / "partial" / name / f"{name}_{modality}.nii.gz", good)
    for ending in ("nii", "nii.gz"):
        write_scan(data / "twice" / "A" / f"A_t1.{ending}", good)
    workdir, unfinished, corrupt = trained("unet"), root / "unfinished", root / "corrupt"
    unfinished.mkdir()
    shutil.copy(workdir / "config.json", unfinished)
    shutil.copytree(workdir, corrupt)
    damaged = [path for path in (corrupt / "checkpoints" / "best").rglob("*") if path.parent.name == "d"]
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert damaged

    places = {"w": workdir, "u": unfinished, "c": corrupt, "d": data, "o": root / "output"}
    commands = [[argument.format(**places) for argument in given] for given, _ in MISTAKES.values()]
    for given in commands:
        if given[0] == "train" and not any(argument.startswith("--workdir") for argument in given):
            given.append(f"--workdir={root / 'new'}")
    (root / "commands.json").write_text(json.dumps(commands))
    before = contents(root), contents(workdir)
    done = command("", root / "commands.json", script=MISTAKEN)
    results = json.loads(done.stdout.splitlines()[-1])
    own = {root, *root.glob("commands.json*")}
    after = {path: time for path, time in contents(root).items() if path not in own}
    untouched = (after, contents(workdir)) == ({p: t for p, t in before[0].items() if p not in own}, before[1])
    return dict(zip(MISTAKES, results, strict=True)), untouched


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(answers, name):
    code, printed, said = answers[0][name]
    assert code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert "parameters" not in printed  # said before anything is compiled
    for word in MISTAKES[name][1]:
        assert word in said


def test_mistakes_leave_nothing_behind(answers):
    assert answers[1]


# Suites -------------------------------------------------------------------------------------------------------


def test_a_suite_is_a_command_on_a_trained_folder(trained, command, tmp_path):
    workdir, output = trained("entrust"), tmp_path / "out"
    done = command(
        "benchmark", "--suite=subsets", f"--workdir={workdir}", "--hypotheses=2", f"--output={output}"
    )  # fmt: skip
    found = json.loads((output / "subsets.json").read_text())
    assert found["hypotheses"] == 2 != json.loads((workdir / "config.json").read_text())["diffusion"]["hypotheses"]
    assert len(found["subsets"]) == 15
    counts = [one["predicted_dice_mae"]["n"] for one in found["subsets"].values()]
    assert 1 <= counts[0] == min(counts) and max(counts) == CASES["test"]  # a case may lack a modality
    assert (output / "subsets.md").read_text() in done.stdout
    assert sorted(path.name for path in output.iterdir()) == ["subsets.json", "subsets.md"]


# Volumes ------------------------------------------------------------------------------------------------------

# configs/phantom.py in 3-D: two windows along W, the strides planned from the spacing.
VOLUMES = (
    "--config=configs/phantom.py",
    "--config.data.phantom.cases=(4,2,3,2)",
    "--config.data.phantom.depth=4",
    "--config.data.patch=(4,32,16)",
    "--config.model.widths=(4,8)",
    "--config.model.d_c=4",
    "--config.model.d_u=4",
    "--config.unet.widths=(4,8)",
    "--config.diffusion.steps=2",
    "--config.diffusion.hypotheses=3",
    "--config.train.batch=2",
    "--config.train.enfuse_steps=2",
    "--config.train.segdiff_steps=2",
    "--config.train.unet_steps=2",
    "--config.train.eval_every=2",
    "--config.train.val_slices=2",
    "--config.train.calibration_slices=2",
    "--config.train.head_steps=2",
)


def test_volumes_from_training_to_their_maps(command, tmp_path):
    workdir, output = tmp_path / "volumes", tmp_path / "out"
    done = command("train", *VOLUMES, f"--workdir={workdir}")
    assert "planned strides along D x H x W" in done.stdout and "patches (4, 32, 16)" in done.stdout
    assert json.loads((workdir / "config.json").read_text())["model"]["strides"] == [[1, 2, 2], [1, 2, 2]]

    (folder,) = (workdir / "example").iterdir()
    done = command("predict", f"--workdir={workdir}", f"--output={output}", f"--case={folder}", "--hypotheses")
    assert "windows of 4 x 32 x 16 voxels, 3 hypotheses: about" in done.stdout and "GB of memory" in done.stdout
    maps = maps_of(output)
    assert {"label", "probability", "error_probability", "conflict", "cause", "hypotheses"} <= set(maps)
    (scan, *_) = sorted(folder.glob("*_a.nii.gz"))
    check_geometry(maps, scan)

    command("evaluate", f"--workdir={workdir}")
    found = json.loads((workdir / "evaluation" / "summary.json").read_text())
    assert found["seconds_per_case"]["n"] == 2 and "interslice_dice" in found
