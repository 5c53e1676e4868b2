"""The phantom suite: each ablation does what its name says, and a shrunk run goes from training to table."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax import api
from entrust_jax import model as entrust
from entrust_jax.benchmark import ablations, acceptance, references
from entrust_jax.benchmark import phantom as suite
from entrust_jax.data import phantom, phantom_scene, preprocess
from entrust_jax.enfuse import conflict
from entrust_jax.errors import UserError
from entrust_jax.layers import apply
from entrust_jax.segdiff import sampler

B, M, SIZE = 2, 2, 8


@pytest.fixture(scope="module")
def config(repository):
    sys.path.insert(0, str(repository))
    from configs import phantom as file

    config = file.get_config().copy_and_resolve_references()
    config.update_from_flattened_dict(
        {
            "data.phantom.cases": (8, 4, 8, 4),
            "model.widths": (4, 4),
            "model.d_c": 4,
            "model.d_u": 4,
            "diffusion.steps": 2,
            "train.batch": 8,
            "train.enfuse_steps": 2,
            "train.segdiff_steps": 2,
            "train.val_slices": 8,
            "train.calibration_slices": 1,
            "train.head_steps": 5,
        }
    )
    return config


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BATCH = {
    "image": some(B, M, SIZE, SIZE),
    "present": np.ones((B, M), bool),
    "label": np.random.default_rng(0).integers(0, 2, (B, SIZE, SIZE)).astype(np.int32),
    "body": np.ones((B, SIZE, SIZE), bool),
    "coordinates": some(B, SIZE, SIZE, 3, seed=2),
    "weight": np.ones(B, np.float32),
    "valid": np.ones(B, bool),
    "case": np.arange(B, dtype=np.int32),
    "slice": np.zeros(B, np.int32),
}


def fused_by(config, variant):
    """(condition, evidence) of random parameters under a variant's network, and those of the reference."""
    networks = [suite.own_network(config, ablations.ABLATIONS[v]) for v in (variant, ablations.REFERENCE)]
    key = jax.random.key(0)
    shapes = jax.eval_shape(networks[1].init, {"params": key, "dropout": key}, BATCH, key)
    leaves, tree = jax.tree.flatten(shapes)  # seed by seed: stems of one seed would be one, and hardly ever in conflict
    params = jax.tree.unflatten(tree, [0.5 * some(*x.shape, seed=i) for i, x in enumerate(leaves)])
    found = []
    for network in networks:
        evidence = apply(
            network, params, *(jnp.asarray(BATCH[n]) for n in ("image", "coordinates", "body")), method="encode"
        )
        found.append((apply(network, params, evidence, jnp.ones((B, M, SIZE, SIZE)), method="fuse"), evidence))
    return found


def test_ablations_are_chosen_by_name_and_the_reference_is_always_there():
    assert suite.chosen([]) == list(ablations.ABLATIONS)
    assert suite.chosen(["A12 global prior", "A0 mean fusion"]) == ["reference", "A12 global prior", "A0 mean fusion"]
    assert suite.chosen([ablations.REFERENCE]) == [ablations.REFERENCE]
    with pytest.raises(UserError, match="none called 'A99'; there are reference; A1 recycling"):
        suite.chosen(["A99"])


def test_mean_fusion_weighs_all_alike(config):
    (plain, _), (learned, _) = fused_by(config, "A0 mean fusion")
    np.testing.assert_allclose(plain.fused.weights, 1 / M, rtol=1e-6)
    assert np.ptp(learned.fused.weights) > 0.01


def test_without_conflict_features_the_map_itself_stays(config):
    (without, _), (with_, _) = fused_by(config, "A3 no conflict features")
    assert all(np.all(np.asarray(x) == 0) for x in without.fused.F_cf)
    assert any(np.any(np.asarray(x) != 0) for x in with_.fused.F_cf)
    np.testing.assert_array_equal(without.fused.kappa, with_.fused.kappa)


def test_the_global_prior_is_the_same_everywhere(config):
    (_, flat), (_, local) = fused_by(config, "A12 global prior")
    assert np.max(np.std(flat.prior_logits, axis=(1, 2))) < 1e-6
    assert np.max(np.std(local.prior_logits, axis=(1, 2))) > 1e-3
    rate = np.mean(jax.nn.softmax(local.prior_logits, axis=-1), axis=(1, 2))
    np.testing.assert_allclose(np.exp(flat.prior_logits)[:, 0, 0], rate, rtol=1e-4)


def loss_terms(config, variant):
    """The terms of stage 1's loss of random parameters under a variant's network."""
    network, key = suite.own_network(config, ablations.ABLATIONS[variant]), jax.random.key(0)
    shapes = jax.eval_shape(network.init, {"params": key, "dropout": key}, BATCH, key)
    params = jax.tree.map(lambda x: 0.5 * some(*x.shape), shapes)
    return entrust.enfuse_loss(network, params, jax.tree.map(jnp.asarray, BATCH), key, jnp.float32(1.0))[1]


def test_without_independence_only_that_term_is_gone_and_the_domain_term_adds_to_it_alone(config):
    plain, without, more = (
        loss_terms(config, name) for name in (ablations.REFERENCE, "A4 no independence", "domain term")
    )
    assert without["xcov"] == 0 < plain["xcov"] < more["xcov"] <= plain["xcov"] + 1
    for other in ("uni", "con", "align", "var", "rec", "prior"):
        np.testing.assert_allclose(without[other], plain[other], rtol=1e-5)
        np.testing.assert_allclose(more[other], plain[other], rtol=1e-5)


def test_modality_identity_is_what_the_mean_content_of_a_case_tells_of_its_modality():
    b, m, d = 12, 2, 3
    c, mask = some(b, m, 4, 4, d), np.random.default_rng(1).uniform(size=(b, 4, 4)) < 0.7
    c[:, 1, ..., 0] += 2  # one channel tells
    c = np.where(mask[:, None, ..., None], c, 50 * some(b, m, 4, 4, d, seed=1))  # air does not count
    present = np.ones((b, m), np.float32)
    means = np.einsum("bmtsd,bts->bmd", c, mask) / mask.sum(axis=(1, 2))[:, None, None]
    one_hot = np.tile(np.eye(m), (b, 1))
    expected = float(np.mean(np.corrcoef(means.reshape(-1, d).T, one_hot.T)[:d, d:] ** 2))
    identity = jax.jit(ablations.modality_identity)
    np.testing.assert_allclose(identity(c, mask, present), expected, rtol=1e-4)
    assert expected > 0.25
    np.testing.assert_allclose(identity(np.repeat(c[:, :1], m, axis=1), mask, present), 0, atol=1e-6)
    there = present.copy()
    there[3:, 1] = 0  # what is missing does not count
    garbage = np.where(there[..., None, None, None] > 0, c, 1e3).astype(np.float32)
    np.testing.assert_allclose(identity(garbage, mask, there), identity(c, mask, there), rtol=1e-4)
    assert identity(c[:, :1], mask, present[:, :1]) == 0  # a single modality has nothing to hide


def test_without_own_evidence_nothing_of_the_noisy_mask_is_copied(config):
    networks = [suite.own_network(config, ablations.ABLATIONS[v]) for v in ("no own evidence", ablations.REFERENCE)]
    key = jax.random.key(0)
    shapes = jax.eval_shape(networks[1].init, {"params": key, "dropout": key}, BATCH, key)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)  # a network that says nothing by itself,
    (layer,) = params["params"]["denoiser"]["reach"].values()
    layer["bias"] += 1  # and takes each block for one structure
    evidence = apply(
        networks[1], params, *(jnp.asarray(BATCH[n]) for n in ("image", "coordinates", "body")), method="encode"
    )
    condition = apply(networks[1], params, evidence, jnp.ones((B, M, SIZE, SIZE)), method="fuse")
    x, level = jnp.asarray(some(B, SIZE, SIZE, 2, seed=5)), jnp.array([4.0, 4.0])
    silent, copying = (apply(network, params, x, level, condition, method="denoise") for network in networks)
    np.testing.assert_allclose(silent, 0, atol=1e-4)
    assert np.ptp(copying) > 1


def test_recycled_masks_know_nothing_of_the_truth():
    one, two = (jnp.where(some(B, 4, 4, 2, seed=s) > 0, 0.2, -0.2) for s in (1, 2))
    eps, level = jnp.asarray(some(B, 4, 4, 2, seed=3)), jnp.array([-12.0, 6.0])  # a share of every batch is pure noise

    def denoise(x, log_snr):
        assert np.all(np.asarray(log_snr) == -12)
        return 3 * x

    first, second = (ablations.recycled(denoise, x0, level, eps) for x0 in (one, two))
    np.testing.assert_array_equal(first, second)
    level = jnp.array([0.0, 6.0])
    truth = [entrust.noisy_truth(denoise, x0, level, eps) for x0 in (one, two)]
    assert np.any(np.abs(truth[0] - truth[1]) > 0.1)


def test_dice_is_added_to_the_cross_entropy():
    logits, label = 50 * jnp.array([[[[1.0, 0.0], [0.0, 1.0]]]]), jnp.array([[[0, 1]]])
    weight = jnp.array([[[1.0, 4.0]]])
    assert ablations.with_dice(logits, label, weight)[0] == pytest.approx(0, abs=1e-5)
    wrong = ablations.with_dice(-0.02 * logits, label, weight)[0]
    assert wrong > entrust.weighted_ce(-0.02 * logits, label, weight)[0] + 0.1


def test_divergence_takes_the_place_of_conflict(config):
    (other, _), (plain, _) = fused_by(config, "A7 divergence as conflict")
    np.testing.assert_array_equal(other.fused.kappa, plain.fused.js)
    assert np.any(np.abs(np.asarray(plain.fused.kappa) - plain.fused.js) > 1e-3)


def test_foreign_conflict_features_are_those_of_the_case_before(config):
    (foreign, _), (own, _) = fused_by(config, "A11 foreign conflict features")
    for theirs, mine in zip(foreign.fused.F_cf, own.fused.F_cf, strict=True):
        np.testing.assert_array_equal(theirs, np.roll(mine, 1, axis=0))
    assert np.any(np.asarray(foreign.projections.a[0]) != own.projections.a[0])


def test_without_dropout_everything_that_is_there_is_seen():
    present = jnp.array([[True, False], [True, True]])
    seen, scale = ablations.keep_all(jax.random.key(0), present, (3, 3), jnp.array([True, True]))
    np.testing.assert_array_equal(seen, np.broadcast_to(present[..., None, None], (2, 2, 3, 3)))
    np.testing.assert_array_equal(scale, 1)


@pytest.mark.parametrize("method", ["ddim", "dpmpp2m"])
def test_noise_is_hot_in_conflict_and_only_while_asked(method):
    chain = sampler.Sampler(b=0.2, lambda_min=-12.0, lambda_max=6.0, steps=1, method=method)
    conflict = jnp.array([[[9.0, 0.0], [9.0, 0.0]]])  # on the left

    def draw():  # a denoiser that shows its input, to see the noise it is given
        return sampler.sample(
            lambda x, *_: x, None, conflict, jnp.array([3]), jax.random.key(0),
            sampler=chain, classes=2, hypotheses=3,
        )  # fmt: skip

    (first, plain), logit = draw(), lambda p: np.log(p[..., 0] / p[..., 1])
    with ablations.hot_noise():
        same, hot = draw()
    ratio = logit(hot) / logit(plain)
    np.testing.assert_allclose(ratio[..., 0], ablations.HOT, rtol=1e-3)
    np.testing.assert_allclose(ratio[..., 1], 1, rtol=1e-3)
    np.testing.assert_array_equal(first, same)  # the one-step prediction stays
    np.testing.assert_array_equal(draw()[1], plain)


def test_a_run_goes_from_training_to_table_and_repeats_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "STEPS", (2, 16))
    learnt = conflict.pair_conflict

    def planted(s, availability):  # two steps teach none
        kappa, contested = learnt(s, availability)
        first, second = conflict.pairs(s.shape[1]).T
        return kappa + 0.3 * availability[:, first] * availability[:, second], contested

    monkeypatch.setattr(conflict, "pair_conflict", planted)
    names = [ablations.REFERENCE, "A5 head sees entropy alone", "A8 temperature by conflict"]
    summary = suite.run(config, tmp_path, names, 1, 6)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert set(written["checks"]) == {*(f"G{i}" for i in range(1, 12)), "T12"}
    for one in written["checks"].values():
        assert {"value", "threshold", "pass"} <= set(one)
    assert not written["checks"]["G1"]["pass"]  # nothing can be learnt in two steps
    assert written["checks"]["G11"]["value"]["kappa"] == 0
    assert len(written["fakes"]) == 6 and set(written["ablations"]) == set(names)
    maps = [np.load(tmp_path / "runs" / f"{suite.short(name)}_0" / "seen.npz") for name in (names[0], names[2])]
    np.testing.assert_array_equal(maps[0]["one_step"], maps[1]["one_step"])  # a temperature is of the hypotheses alone
    assert np.any(maps[0]["hypotheses"] != maps[1]["hypotheses"])  # and was not lost to a program compiled before
    for own in written["steps"][ablations.REFERENCE].values():
        assert list(own) == [str(s) for s in suite.STEPS]
    assert "kappa changes elsewhere" in written["parts"][ablations.REFERENCE]
    text = (tmp_path / "phantom.md").read_text()
    assert "| G11 |" in text and "every pixel drawn by itself" in text and "dCor" in text
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("blobs", "conflict", "diversity"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    again = suite.run(config, tmp_path, names, 1, 6)
    assert again["checks"]["G5"] == summary["checks"]["G5"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before


def test_a_check_passes_when_every_seed_does_and_ablations_are_compared_seed_by_seed():
    good = {
        "G3": {"value": 0.95, "threshold": 0.9, "pass": True, "to_the_rim": 0.9},
        "G1": {"value": {"a": 1.0}, "threshold": {}, "pass": True},
    }
    bad = good | {"G3": {"value": 0.85, "threshold": 0.9, "pass": False, "to_the_rim": 0.8}}
    one, two = "A1 recycling", "A0 mean fusion"
    found = suite.summarise({ablations.REFERENCE: [good, bad], one: [bad, bad], two: [good]}, {})
    assert found["checks"]["G3"] == {
        "value": pytest.approx(0.9),
        "threshold": 0.9,
        "pass": False,
        "seeds": [0.95, 0.85],
        "to_the_rim": [0.9, 0.8],
    }
    assert found["checks"]["G1"]["value"] == {"a": 1.0} and found["checks"]["G1"]["pass"]
    figure = found["ablations"][one]["figures"]["G3"]
    assert figure["difference"] == pytest.approx(-0.05) and figure["spread"] == 0 and figure["n"] == 2
    assert figure["difference_spread"] == pytest.approx(np.std([-0.1, 0.0], ddof=1))
    assert found["ablations"][one]["fails"] == ["G3"]
    single = found["ablations"][two]["figures"]["G3"]  # the reference of its own seed, not the mean over seeds
    assert single["difference"] == 0 and single["spread"] is None and single["n"] == 1


def test_the_planted_fakes_are_found_out():
    spec = phantom.Spec(size=(32, 32), sites=2, radius=4.0, jitter=0.5, reliability=(0.95, 0.7), ignorance=(0.1, 0.1))
    failed = suite.fakes(spec, range(300), 16)
    assert failed["none (the exact observer)"] == failed["none (the exact observer), lesions rare"] == []
    assert "G3" in failed["every pixel drawn by itself"]
    assert "G7" in failed["thresholds of one marginal map"]
    assert {"G2", "G4"} <= set(failed["temperature by conflict"])
    assert failed["Jensen-Shannon divergence as conflict, lesions rare"] == ["G6"]


def test_a_finished_run_is_not_taken_for_another(config, tmp_path):
    asked = {"config": json.loads(config.to_json()), "cases": 6, "hypotheses": 24}
    suite.claim(tmp_path / "run", asked)
    suite.claim(tmp_path / "run", asked)
    older = json.loads(json.dumps(asked))
    for section, added in api.ADDED.items():  # keys that were added since, at their neutral values
        for key in added:
            del older["config"][section][key]
    (tmp_path / "run" / "asked.json").write_text(json.dumps(older))
    suite.claim(tmp_path / "run", asked)
    with pytest.raises(UserError, match="was made with another config"):
        suite.claim(tmp_path / "run", asked | {"cases": 7})


def test_what_the_suite_cannot_judge_is_refused_before_anything_is_trained(config, tmp_path):
    other = config.copy_and_resolve_references()
    other.data.phantom.depth = 2
    with pytest.raises(UserError, match="no phantom of one slice"):
        suite.check(other, tmp_path, [ablations.REFERENCE])
    single = config.copy_and_resolve_references()
    single.data.modalities = ("A",)
    with pytest.raises(UserError, match="has one reader"):
        suite.check(single, tmp_path, [ablations.REFERENCE])
    (tmp_path / "summary.json").write_text(json.dumps({"ablations": {"reference": 0, "A1 recycling": 0}}))
    with pytest.raises(UserError, match="would lose"):
        suite.check(config, tmp_path, [ablations.REFERENCE])
    suite.check(config, tmp_path, [*ablations.ABLATIONS])


def test_without_a_modality_nothing_of_it_is_left(config):
    spec = suite.dataset.phantom_spec(config.data)
    volume = phantom_scene.volumes(spec, [0], 0)[0]
    alone = preprocess.without(volume, 1)
    assert list(alone.present) == [True, False]
    assert np.all(alone.image[1] == 0) and np.any(volume.image[1] != 0)
    found = acceptance.blobs(phantom_scene.scenes(spec, range(4), 0), spec)
    assert references.readers(phantom_scene.scenes(spec, range(4), 0), spec).shape == (4, 4, found.posterior.shape[1])
