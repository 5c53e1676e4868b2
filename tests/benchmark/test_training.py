"""A training small enough for every change finds the phantom's posterior, by the command that runs the full suite."""

import json
import os
import subprocess
import sys

import pytest

SHRUNK = {
    "data.phantom.cases": "(2048, 64, 16, 4)",
    "model.widths": "(12, 16, 16)",
    "train.batch": 16,
    "train.enfuse_steps": 250,
    "train.segdiff_steps": 700,
    "train.eval_every": 350,
    "train.val_slices": 64,
    "train.head_steps": 20,
}


@pytest.fixture(scope="module")
def checks(repository, tmp_path_factory):
    """What `--quick` finds with a shrunk config, in a process of its own with as many devices as a user has."""
    output = tmp_path_factory.mktemp("suite")
    command = [sys.executable, "-m", "entrust_jax.benchmark", "--suite=phantom", "--quick", f"--output={output}"]
    command += [f"--config.{key}={value}" for key, value in SHRUNK.items()]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| G11 |" in done.stdout
    return json.loads((output / "summary.json").read_text())["checks"]


def test_blobs_in_conflict_get_what_bayes_gives_them(checks):
    value = checks["G1"]["value"]
    assert value["conflict"] <= 0.15 and value["agree"] <= 0.1, value
    assert checks["G2"]["value"] > 0.75  # on the side of the reliable reader: neither the average, .63, nor .5


def test_hypotheses_are_whole_and_differ_as_much_as_they_should(checks):
    assert checks["G3"]["value"] >= 0.85
    assert 0.6 <= checks["G5"]["value"] <= 1.2


def test_conflict_is_found_where_it_was_planted_and_nowhere_without_a_second_modality(checks):
    value = checks["G6"]["value"]
    assert min(value["auroc_ignorance"], value["auroc_boundary"]) > 0.85, value
    assert checks["G11"]["value"]["kappa"] == 0
