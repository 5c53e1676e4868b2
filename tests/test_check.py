"""The check as a person meets it: a process, its exit code, its words, its picture."""

import json
import os
import shutil
import subprocess
import sys

import nibabel
import numpy as np

import made_up


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
