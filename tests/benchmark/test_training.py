"""A training of minutes finds the phantom's posterior, as the suite's full trainings do. Run with -m training."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.training

SHRUNK = (
    "--config.data.phantom.cases=(4096,64,64,4)",
    "--config.train.enfuse_steps=300",
    "--config.train.segdiff_steps=1000",
    "--config.train.val_slices=64",
)


@pytest.fixture(scope="module")
def found(repository, tmp_path_factory):
    """The checks of the reference, trained by the suite's own command in a process without the tests' slow XLA."""
    output = tmp_path_factory.mktemp("training") / "suite"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "entrust_jax.benchmark", "--suite=phantom", "--quick", f"--output={output}"]
    done = subprocess.run([*command, *SHRUNK], cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: one["value"] for name, one in json.loads((output / "summary.json").read_text())["checks"].items()}


def test_blobs_in_conflict_get_what_bayes_gives_them(found):
    assert found["G1"]["conflict"] <= 0.15 and found["G1"]["agree"] <= 0.1, found["G1"]
    assert found["G2"] > 0.75, found["G2"]  # neither the average of both readers, .63, nor .5


def test_hypotheses_are_whole_and_differ_as_much_as_they_should(found):
    assert found["G3"] >= 0.85, found["G3"]
    assert 0.6 <= found["G5"] <= 1.2, found["G5"]


def test_conflict_is_found_where_it_was_planted(found):
    assert min(found["G6"]["auroc_ignorance"], found["G6"]["auroc_boundary"]) > 0.85, found["G6"]
    assert found["G11"]["kappa"] == 0
