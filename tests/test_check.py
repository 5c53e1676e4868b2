"""The check as a person meets it: a process, its exit code, its words, its picture."""

import json
import os
import shutil
import subprocess
import sys

import nibabel
import numpy as np
from ml_collections import ConfigDict

import made_up
from configs import common
from entrust_jax import check


def run(repository, *words):
    command = [sys.executable, "-m", "entrust_jax.check", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=repository, env=dict(os.environ))


def test_a_sound_set_is_counted_pictured_and_planned(repository, tmp_path):
    done = run(
        repository, "--config=configs/phantom.py", f"--output={tmp_path}/seen", "--config.method=unet",
        "--config.unet.widths=(4,4)", "--config.train.batch=8", "--config.data.phantom.cases=(8,4,4,4)",
        "--config.data.augment=True", "--config.data.augmentation.bias=0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "16 cases of 16 patients, 0 of them unreadable" in done.stdout
    assert "A in 16, B in 16" in done.stdout and "an epoch of 8 slices takes" in done.stdout
    assert ", measured on two batches of phantom_" in done.stdout.lower()
    found = json.loads((tmp_path / "seen" / "check.json").read_text())
    assert found["errors"] == [] and found["plan"]["unet"]["seconds_per_step"] > 0
    assert found["plan"]["patch"] == [32, 32] and found["plan"]["batch"] == 8
    assert "  working spacing: as scanned, 1 x 1 x 1 (mm along D H W)\n" in done.stdout
    assert found["labels"]["lesion"]["voxels"] > 0
    assert (tmp_path / "seen" / "check.png").stat().st_size > 50_000
    assert (tmp_path / "seen" / "augmented.png").stat().st_size > 20_000 and "augmented.png: look" in done.stdout


def test_pet_and_ct_in_each_others_place_are_noticed(repository, tmp_path):
    made_up.pet_ct_t1(tmp_path / "data", 11)
    pet, ct = (tmp_path / "data" / "p4" / f"{name}.nii.gz" for name in ("PET", "CT"))
    pet.rename(tmp_path / "aside.nii.gz")
    ct.rename(pet)
    (tmp_path / "aside.nii.gz").rename(ct)
    broken = tmp_path / "data" / "p9" / "T1.nii.gz"  # an error: nothing is compiled
    broken.write_bytes(broken.read_bytes()[:100])
    place = (f"--config.data.dir={tmp_path}/data", f"--output={tmp_path}/seen")
    done = run(repository, "--config=configs/sarcoma.py", *place)
    assert done.returncode == 2 and "error: 1 to mend" in done.stderr, done.stderr
    said = [line for line in done.stdout.splitlines() if "warning:" in line and "p4" in line]
    assert any("case p4: PET looks like CT, CT looks like PET; see whether the files" in line for line in said)
    assert any(
        f"{pet}: is negative inside the body" in line and "intensity.PET = ('scale', 2.5)" in line for line in said
    )
    assert any(f"{ct}: is nowhere below 0 inside the body" in line for line in said)
    others = [line for line in done.stdout.splitlines() if "looks like" in line or "does not go with" in line]
    assert len(others) == 3, others  # and of no other case


def test_a_damaged_set_leaves_with_2_and_names_the_file(repository, tmp_path):
    grid = np.random.default_rng(0).normal(size=(16, 16, 4)).astype(np.float32)
    for name in "ab":
        (tmp_path / name).mkdir()
        for kind in ("t1", "t1ce", "t2", "flair", "seg"):
            values = np.zeros(grid.shape, np.uint8) if kind == "seg" else grid + ord(kind[-1])
            nibabel.Nifti1Image(values, np.eye(4)).to_filename(tmp_path / name / f"{name}_{kind}.nii.gz")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    for name in ("c_t1n.nii.gz", "c_seg.nii.gz"):  # mistakes in the listing: the rest is looked at all the same
        (tmp_path / "c" / name).write_bytes(b"")
    broken = tmp_path / "b" / "b_t2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:100])
    done = run(repository, "--config=configs/brats.py", f"--config.data.dir={tmp_path}", f"--output={tmp_path}/seen")
    assert done.returncode == 2, done.stderr
    assert "error: 4 to mend" in done.stderr and "case c has two files for T1: a_t1.nii.gz and c_t1n" in done.stderr
    assert f"error: {tmp_path}/c: case c has two files for the label" in done.stdout
    assert f"error: {broken}: " in done.stdout and "leaves no patient" in done.stdout  # two patients are no data set
    assert "the same scan voxel for voxel" in done.stdout and "empty label" in done.stdout
    assert (tmp_path / "seen" / "check.png").exists() and "Traceback" not in done.stderr


def test_what_the_spacing_is_when_none_is_set(capsys):
    found = {
        "cases": 2, "patients": 2, "unreadable": 0, "modalities": {"T1": 2}, "size": {}, "labels": {}, "warnings": [],
        "errors": [], "working_spacing": (),
        "spacing": {"least": [3.0, 1.0, 1.0], "median": [4.0, 1.0, 1.0], "most": [5.0, 1.5, 1.5]},
    }  # fmt: skip
    check.print_found(found)
    assert "  working spacing: as scanned, 3 x 1 x 1 to 5 x 1.5 x 1.5 (mm along D H W)\n" in capsys.readouterr().out
    check.print_found(found | {"working_spacing": (0.0, 1.0, 1.0)})
    assert "  working spacing: as scanned x 1 x 1 (mm along D H W)\n" in capsys.readouterr().out


def small_set(folder, label):
    """Twelve cases of noise in two modalities, all with this label, listed in a table with a column too many."""
    rng = np.random.default_rng(0)
    rows = ["case,T1,FLAIR,age,label"]
    for i in range(12):
        for kind in ("t1", "flair", "seg"):
            values = label if kind == "seg" else rng.normal(size=label.shape).astype(np.float32)
            nibabel.Nifti1Image(values, np.eye(4)).to_filename(folder / f"{i}_{kind}.nii.gz")
        rows.append(f"c{i},{i}_t1.nii.gz,{i}_flair.nii.gz,50,{i}_seg.nii.gz")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    config = common.get_config()
    config.name = "small"
    config.data.update(
        layout="manifest", dir=str(folder), modalities=("T1", "FLAIR"), reference="T1", patch=(16, 16),
        classes=("background", "lesion", "core"), label_map=((0, 0), (1, 1), (4, 2)), augment=False,
    )  # fmt: skip
    config.data.regions = ConfigDict({"lesion": (1, 2)})
    return config.lock()


def test_columns_classes_and_folders_that_nothing_reads_are_warnings(tmp_path):
    label = np.zeros((16, 16, 2), np.uint8)
    label[4:8, 4:8] = 1
    config = small_set(tmp_path, label)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "c99_t1.nii.gz").touch()
    found, errors = check.inspect(config, tmp_path / "seen")
    warnings = "\n".join(found["warnings"])
    assert errors == [] and "manifest.csv: column age is no modality of the config; not read" in warnings
    assert "class core: not a voxel in any mask (label values seen: 0, 1)" in warnings
    assert f"{tmp_path}/late: nothing in it is read, though it holds 1 scan, such as c99_t1.nii.gz" in warnings
    assert "1_seg.nii.gz holds the same mask as" in warnings


def test_empty_masks_alone_are_an_error(tmp_path):
    found, errors = check.inspect(small_set(tmp_path, np.zeros((16, 16, 2), np.uint8)), tmp_path / "seen")
    (line,) = errors
    assert "no mask in config.data.dir holds anything but background (label values seen: 0)" in line
    assert not any("holds the same mask" in line for line in found["warnings"])
