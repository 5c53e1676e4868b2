"""The command that writes a manifest, in a process of its own."""

import os
import subprocess
import sys

from entrust_jax.data import layouts


def run(*words):
    command = [sys.executable, "-m", "entrust_jax.manifest", *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_writes_what_training_reads(tmp_path):
    for case in ("p1", "p2"):
        (tmp_path / case).mkdir()
        for name in ("T1.nii.gz", "seg.nii.gz"):
            (tmp_path / case / name).write_bytes(b"")
    (tmp_path / "p2" / "FLAIR.nii.gz").write_bytes(b"")
    (tmp_path / "p3").mkdir()
    (tmp_path / "p3" / "t1.nii.gz").write_bytes(b"")
    patterns = ("T1={case}/T1.nii.gz", "FLAIR={case}/FLAIR.nii.gz", "label={case}/seg.nii.gz")
    done = run(f"--dir={tmp_path}", *patterns)
    assert done.returncode == 0, done.stderr
    assert "manifest.csv: 2 cases; T1 2, FLAIR 1, label 2" in done.stdout
    one, two = layouts.find_cases("manifest", tmp_path, ("FLAIR", "T1"))
    assert set(one.images) == {"T1"} and set(two.images) == {"T1", "FLAIR"} and one.label and two.label
    assert "1 scan fits no pattern and is not in it, such as p3/t1.nii.gz" in done.stdout
    before = (tmp_path / "manifest.csv").read_text()
    again = run(f"--dir={tmp_path}", "T1={case}/T1.nii.gz")
    assert again.returncode == 2 and "manifest.csv: is there already" in again.stderr
    other = f"--output={tmp_path}/m.csv"
    for words, message in (
        ((f"--dir={tmp_path}", other, "T1"), "T1: is no NAME=PATTERN"),
        ((f"--dir={tmp_path}", other, "label={case}/seg.nii.gz"), "no modality given"),
        ((f"--dir={tmp_path}", other, "T1={case}/T1.nii.gz", "t1={case}/T2.nii.gz"), "t1 is taken"),
        ((f"--dir={tmp_path}", other, "T1={case}/T9.nii.gz"), "no NIfTI, PNG or JPEG file fits"),
        ((f"--dir={tmp_path}", other, "label2={case}/seg.nii.gz"), "no modality given"),
        ((f"--dir={tmp_path}", other, "label_b={case}/seg.nii.gz"), "name the labels of several raters"),
        ((f"--dir={tmp_path}/gone", "T1={case}/T1.nii.gz"), "no such folder"),
        ((f"--dir={tmp_path}", f"--output={tmp_path}/m.xlsx", "T1={case}/T1.nii.gz"), "must end in .csv"),
        (("T1={case}/T1.nii.gz",), "--dir: missing"),
    ):
        done = run(*words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr, done.stderr
    assert (tmp_path / "manifest.csv").read_text() == before


def test_names_of_another_encoding(tmp_path):
    folder = tmp_path / os.fsdecode(b"b\xfc")
    folder.mkdir()
    (folder / "T1.nii.gz").write_bytes(b"")
    done = run(f"--dir={tmp_path}", "T1={case}/T1.nii.gz")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert r"error: 'b\udcfc/T1.nii.gz': this path is no text (not UTF-8)" in done.stderr
    assert not (tmp_path / "manifest.csv").exists()
    inside = run(f"--dir={folder}", "T1={case}1.nii.gz")  # the table itself is text, and what is said of it too
    assert inside.returncode == 0 and r"b\udcfc/manifest.csv: 1 cases" in inside.stdout, inside.stderr
