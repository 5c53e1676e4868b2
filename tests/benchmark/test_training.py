"""A training small enough for every change finds the phantom's posterior, as the suite's full trainings do."""

import sys

import numpy as np
import pytest

from entrust_jax.benchmark import ablations, acceptance
from entrust_jax.benchmark import phantom as suite
from entrust_jax.data import dataset, phantom

SHRUNK = {
    "data.phantom.cases": (2048, 64, 16, 4),
    "data.phantom.size": (24, 24),
    "data.phantom.sites": 1,
    "data.patch": (24, 24),
    "model.widths": (12, 16, 16),
    "train.batch": 16,
    "train.enfuse_steps": 250,
    "train.segdiff_steps": 600,
    "train.eval_every": 200,
    "train.val_slices": 64,
    "train.calibration_slices": 1,
    "train.head_steps": 20,
}


@pytest.fixture(scope="module")
def seen(repository, tmp_path_factory):
    sys.path.insert(0, str(repository))
    from configs import phantom as file

    config = file.get_config().copy_and_resolve_references()
    config.update_from_flattened_dict(SHRUNK)
    reference = ablations.ABLATIONS[ablations.REFERENCE]
    own = suite.own_config(config, reference, "shrunk", 0)
    model = suite.trained(own, reference, tmp_path_factory.mktemp("training") / "reference")
    spec, numbers = dataset.phantom_spec(own.data), range(suite.FIRST, suite.FIRST + 256)
    scenes = phantom.scenes(spec, numbers, 0)
    return suite.observe(model, phantom.volumes(spec, numbers, 0), 16), scenes, acceptance.blobs(scenes, spec), spec


def test_blobs_in_conflict_get_what_bayes_gives_them(seen):
    said, _, found, spec = seen
    value = acceptance.g1_marginals(said, found)["value"]
    assert value["conflict"] <= 0.15 and value["agree"] <= 0.1, value
    strong = acceptance.g2_strong_reader(said, found, spec)
    assert strong is not None and strong["value"] > 0.75, strong  # neither the average of both, .63, nor .5


def test_hypotheses_are_whole_and_differ_as_much_as_they_should(seen):
    said, scenes, found, _ = seen
    assert acceptance.coherence(said.hypotheses, found) >= 0.85
    assert 0.6 <= acceptance.diversity(said.hypotheses, scenes) <= 1.2


def test_conflict_is_found_where_it_was_planted(seen):
    said, scenes, found, _ = seen
    value = acceptance.g6_enrichment(said, scenes, found)["value"]
    assert min(value["auroc_ignorance"], value["auroc_boundary"]) > 0.85, value
    assert np.all(said.kappa >= 0) and np.all(said.kappa <= 1)
