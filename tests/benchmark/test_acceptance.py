"""The acceptance checks have power: the exact observer passes all of them, each fake fails those that it should."""

import dataclasses

import numpy as np
import pytest

from entrust_jax.benchmark import acceptance, references
from entrust_jax.benchmark import phantom as suite
from entrust_jax.data import phantom, phantom_law, phantom_scene
from entrust_jax.errors import UserError
from entrust_jax.metrics import distribution

SPEC = phantom.Spec(size=(48, 48), sites=3, radius=4.5, reliability=(0.95, 0.7), ignorance=(0.1, 0.1))
SCENES, HYPOTHESES = 240, 24


def expected_distance(scenes):
    """E d(Y, Y') of each phantom's exact law."""
    rows = zip(np.asarray(scenes.belief), np.asarray(scenes.site), np.asarray(scenes.distance), strict=True)
    return np.array([phantom_law.mean_distance(phantom_law.exact_law(*row, SPEC)) for row in rows])


def test_the_fakes_draw_from_the_exact_law(world):
    """`references.draw` is there for speed; it must be the law that `phantom_law` knows in closed form."""
    scenes, _, _, expected = world
    drawn = references.draw(np.random.default_rng(7), scenes, np.asarray(scenes.posterior), SPEC, 16)
    found = [distribution.mean_self_distance(distribution.pairwise_distance(y, y, (1,)), "u") for y in drawn]
    difference = np.array(found) - expected
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))


@pytest.fixture(scope="module")
def world():
    scenes = phantom_scene.scenes(SPEC, range(SCENES), 3)
    found = acceptance.blobs(scenes, SPEC)
    seen = references.exact(scenes, SPEC, HYPOTHESES, 0)
    return scenes, found, seen, expected_distance(scenes)


def checks(world, seen):
    scenes = world[0]
    single = references.readers(scenes, SPEC)[:, 1]
    alone = acceptance.Alone(references.marginals(scenes, single, SPEC), 0 * seen.kappa)
    return suite.checks(seen, alone, scenes, SPEC)


def failed(world, seen):
    return {name for name, one in checks(world, seen).items() if not one["pass"]}


def test_the_exact_observer_passes_every_check(world):
    assert failed(world, world[2]) == set()


def test_conflict_taken_for_entropy_fails(world):
    scenes, found, seen, _ = world
    assert {"G2", "G4", "G8"} <= failed(world, references.hot_in_conflict(seen, scenes, SPEC, found, 1))


def test_pixels_drawn_one_by_one_fail(world):
    seen = world[2]
    fake = references.pixel_noise(seen, 1)
    assert "G3" in failed(world, fake)
    assert not {"G1", "G5"} & failed(world, fake)  # marginals and pixel diversity cannot tell


def test_thresholds_of_one_map_fail_by_their_correlation_alone(world):
    seen = world[2]
    assert failed(world, references.thresholds_of_one_map(seen, 1)) == {"G7"}


def test_divergence_of_the_readers_taken_for_conflict_fails_where_lesions_are_rare():
    """At a base rate of .5 a certain reader beside a silent one diverges less than two that contradict each other;

    where the base rate is low it diverges more, and only kappa tells the two apart.
    """
    rare = phantom.Spec(**(dataclasses.asdict(SPEC) | {"prior": 0.3, "ignorance": (0.05, 0.4)}))
    scenes = phantom_scene.scenes(rare, range(SCENES), 3)
    found, seen = acceptance.blobs(scenes, rare), references.exact(scenes, rare, HYPOTHESES, 0)
    fake = references.divergence_as_conflict(seen, scenes, rare)
    auroc = [acceptance.g6_enrichment(one, scenes, found)["value"]["auroc_ignorance"] for one in (seen, fake)]
    assert auroc[0] >= acceptance.THRESHOLDS["G6"]["auroc"] > auroc[1]


def test_a_wrong_single_reader_or_a_left_over_conflict_fails_g11(world):
    scenes, found, seen, _ = world
    single = references.readers(scenes, SPEC)[:, 1]
    assert not acceptance.g11_missing(acceptance.Alone(seen.one_step, seen.kappa), found, single)["pass"]


def test_blaming_the_honest_reader_fails(world):
    _, found, seen, _ = world
    turned = acceptance.g9_blame(seen._replace(attribution=-seen.attribution), found, SPEC)
    assert not turned["pass"] and turned["rate"] < 0.5


def test_hypotheses_that_belie_the_one_step_prediction_fail_the_tower(world):
    """T12. Half of the hypotheses empty: whole blobs, but too few of them."""
    seen = world[2]
    emptied = seen.hypotheses * (np.arange(HYPOTHESES) % 2).astype(np.uint8)[None, :, None, None]
    few = acceptance.t12_tower(seen._replace(hypotheses=emptied))
    honest = acceptance.t12_tower(seen)
    assert honest["pass"] and honest["value"] > 0.6  # a bound that honest hypotheses come near to
    assert not few["pass"]


def test_four_readers_of_whom_one_lies():
    """G9: the exact observer blames the liar; a model that blames at random, or the honest, does not."""
    four = phantom.Spec(
        modalities=("A", "B", "C", "D"), size=(32, 32), sites=2, radius=4.0, jitter=0.5,
        reliability=(0.9,) * 4, ignorance=(0.1,) * 4,
    )  # fmt: skip
    scenes = phantom_scene.scenes(four, range(100), 3)
    found, seen = acceptance.blobs(scenes, four), references.exact(scenes, four, HYPOTHESES, 0)
    honest = acceptance.g9_blame(seen, found, four)
    assert honest["pass"] and honest["rate"]["one_liar"] > 0.9
    assert honest["exact"]["one_liar"] == pytest.approx(phantom_law.blame_rate(four, liars=1))
    noise = np.random.default_rng(0).normal(size=seen.attribution.shape)
    for fake in (-seen.attribution, noise):
        assert not acceptance.g9_blame(seen._replace(attribution=fake), found, four)["pass"]
    rest = references.readers(scenes, four)[:, ~suite.SECOND]
    alone = acceptance.Alone(references.marginals(scenes, rest, four), seen.kappa)
    without = acceptance.g11_missing(alone, found, rest)
    assert without["pass"] and "kappa" not in without["value"]  # the three that are left can contradict each other
    assert not acceptance.g11_missing(acceptance.Alone(seen.one_step[::-1], seen.kappa), found, rest)["pass"]
    assert acceptance.g2_strong_reader(seen, found, four) is None


def test_without_a_stronger_reader_g2_has_no_meaning(world):
    _, found, seen, _ = world
    equal = phantom.Spec(size=(48, 48), sites=3, radius=4.5, reliability=(0.9, 0.9))
    assert acceptance.g2_strong_reader(seen, found, equal) is None


def test_blobs_and_their_cores(world):
    scenes, found, _, _ = world
    site = np.asarray(scenes.site)[:, 0]
    for j in range(SPEC.sites):
        assert np.all(site[found.core[:, j]] == j)
    assert 16 <= found.core.sum(axis=(2, 3)).min() <= found.core.sum(axis=(2, 3)).max() <= 21  # discs of radius 2.5
    # In a core the label is the truth of its blob.
    label = np.asarray(scenes.label)[:, 0]
    np.testing.assert_allclose(acceptance.over_cores(label.astype(np.float32), found.core), found.truth, atol=1e-9)
    masks = {acceptance.CONFLICT: scenes.conflict, acceptance.IGNORANCE: scenes.ignorance}
    whole = acceptance.blobs(scenes, SPEC, margin=0.0)
    for kind, mask in masks.items():
        to_the_rim, ours = (np.any(x.core & (x.kind == kind)[..., None, None], axis=1) for x in (whole, found))
        np.testing.assert_array_equal(to_the_rim, np.asarray(mask)[:, 0])
        assert np.all(to_the_rim[ours]) and 0.3 < ours.sum() / to_the_rim.sum() < 0.7


def test_blobs_without_a_core_are_refused():
    small = dataclasses.replace(SPEC, radius=2.5)
    with pytest.raises(UserError, match=r"radius 2\.5 leaves blobs without a core"):
        acceptance.blobs(phantom_scene.scenes(small, range(2), 3), small)
