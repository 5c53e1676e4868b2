"""The conflict suite: observers that are known to be right or wrong score so, and a shrunk run writes its files."""

import dataclasses
import json
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from entrust_jax import api
from entrust_jax.benchmark import conflict as suite
from entrust_jax.benchmark import conflict_figures as figures
from entrust_jax.benchmark.conflict import Observer, Said, Subject
from entrust_jax.data import dataset, injection, phantom_scene
from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.metrics import usefulness
from entrust_jax.runtime import mesh

SHAPE = (1, 48, 40)
HEAD = {key: {"value": 0.5, "ci95": [0.4, 0.6], "n": 9} for key in ("auroc", "ratio", "inner_auroc", "inner_ratio")}


@pytest.fixture(scope="module")
def config(repository):
    sys.path.insert(0, str(repository))
    from configs import phantom as file

    config = file.get_config().copy_and_resolve_references()
    config.update_from_flattened_dict(
        {
            "data.phantom.cases": (4, 4, 4, 4),
            "model.widths": (4, 4),
            "model.d_c": 4,
            "model.d_u": 4,
            "unet.widths": (4, 4),
            "diffusion.steps": 2,
            "diffusion.hypotheses": 2,
        }
    )
    return config


def scan(number):
    """A lesion at a place of its own, bright in both modalities."""
    rng = np.random.default_rng(number)
    _, h, w = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    body = np.hypot((h - 23.5) / 22, (w - 19.5) / 18) <= 1
    centre = [(14, 12), (32, 26), (14, 26), (32, 12)][number % 4]
    lesion = np.hypot(h - centre[0], w - centre[1]) <= 4
    image = (2.0 * lesion + 0.1 * rng.normal(size=(2, *SHAPE))) * body
    return Volume(
        name=f"P{number}", patient=f"P{number}", number=number, image=image.astype(np.float32),
        present=np.ones(2, bool), label=lesion.astype(np.int32), body=body, coordinates=coordinates(body),
        spacing=(1.0, 1.0, 1.0), reference=None,
    )  # fmt: skip


def right(volume, probed):
    """Diverges where the modalities differ; the one of the lower value argues against a lesion of either."""
    first, second = volume.image.astype(np.float64)
    gap = np.clip(np.abs(first - second) / 4, 0, 0.5) * volume.body
    label = ((first + second) / 2 > 1.4).astype(np.uint8)
    sign = np.where(label > 0, 1, -1)
    phi = np.stack([first - 1, second - 1]) * sign
    return Said({"disagreement": gap, "conflict": gap}, label, np.stack([first > 1, second > 1]), phi, gap)


def noise(volume, probed):
    rng = np.random.default_rng(zlib.crc32(volume.image.tobytes()))
    return Said({"disagreement": rng.random(SHAPE)}, np.zeros(SHAPE, np.uint8), phi=rng.normal(size=(2, *SHAPE)))


def constant(volume, probed):
    return Said({"disagreement": np.full(SHAPE, 0.3)}, np.zeros(SHAPE, np.uint8))


def nothing_else(volume, said):
    return {"deleted_top": 0.5, "deleted_other": 0.25, "randomised": 0.1}


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def results():
    observers = {"right": Observer(right, True), "noise": Observer(noise, True), "constant": Observer(constant, False)}
    found = []
    for number in range(12):
        part, changes = injection.prepared(scan(number), 1)
        found.append(suite.examine(Subject(part, changes, [{}, {}]), observers, "right", nothing_else))
    return found


@pytest.fixture(scope="module")
def summary(results):
    names = {name: list(results[0].rows[0]["methods"][name]) for name in ("right", "noise", "constant")}
    return figures.summarise(results, names, ("A", "B"))


def test_an_observer_that_follows_conflict_reaches_every_aim(summary):
    found = summary["measures"]["right: disagreement"]
    assert found["auroc"]["value"] > 0.95
    assert found["ratio"]["value"] > 3 and found["ratio"]["ci95"][0] > 2
    assert found["kendall_tau"]["value"] == pytest.approx(1.0)
    assert found["p_sign_flip"] < 0.01
    assert all(one["met"] for one in summary["aims"].values())
    assert summary["injections"] == 12 * 2 * 2


def test_the_rim_is_left_out_of_the_inner_figures(results):
    """Samples that disagree about the outline alone say nothing away from it."""
    row = dict(results[0].rows[0])
    region = row["region"]
    rim = region & ~figures.inner(region)
    assert rim.any() and figures.inner(region).any()
    row["maps"] = {"x": {"u": (np.where(rim, 0.5, 0.1), np.full(SHAPE, 0.1))}}
    assert figures.inside(row, "x", "u") == {"auroc": 0.5, "one": pytest.approx(0.1), "all": pytest.approx(0.1)}
    one = np.zeros(SHAPE, bool)
    one[0, 20, 20] = True
    np.testing.assert_array_equal(figures.inner(one), one)


def test_noise_and_a_constant_score_chance_and_miss_the_aims(results, summary):
    noisy, still = (summary["measures"][f"{name}: disagreement"] for name in ("noise", "constant"))
    assert noisy["auroc"]["value"] == pytest.approx(0.5, abs=0.05) and still["auroc"]["value"] == 0.5
    assert noisy["ratio"]["value"] == pytest.approx(1.0, abs=0.1) and still["ratio"]["value"] == 1.0
    assert noisy["p_sign_flip"] > 0.01
    assert still["kendall_tau"]["value"] is None  # it was not asked at lower doses
    names = {"noise": ["disagreement"], "right": ["disagreement"]}
    assert not any(one["met"] for one in figures.summarise(results, names, ("A", "B"))["aims"].values())


def test_another_patients_map_says_nothing(summary):
    """The null: the region of one patient read from the maps of another scores chance, however good they are."""
    null = summary["measures"]["right: disagreement"]["null"]
    assert null["value"] == pytest.approx(0.5, abs=0.06)
    assert null["shifts"] == 11 and null["p"] == pytest.approx(1 / 12) and null["quantile"] == 1
    assert summary["measures"]["noise: disagreement"]["null"]["p"] > 0.1


def test_blame_falls_on_the_altered_modality_where_the_label_stands(results, summary):
    """One of two is not enough for a lesion here: an erasure is followed, a transplant is not."""
    assert summary["blame"]["chance"] == 0.5
    for result in results:
        for row in result.rows:
            assert row["moved"] == (row["kind"] == "erase") and row["moved_by_all"]
            assert row["blamed"] == (row["kind"] == "transplant")
    blame = summary["blame"]
    assert (blame["overruled"]["value"], blame["followed"]["value"], blame["all"]["value"]) == (1.0, 0.0, 0.5)


def test_blame_is_held_against_the_exact_posterior_injection_by_injection(results):
    """Where each of two readers is turned round once, even the reverse of Bayes has his rate of blame."""

    def found(blamed):
        rows = [{"exact": {"blamed": m == 1}, "blamed": blamed(m), "moved": False, "chance": 0.5} for m in (0, 1)]
        blame = figures.blame_figures([results[0]._replace(rows=rows)] * 3)
        met = [one["met"] for name, one in figures.aims(HEAD, {}, blame).items() if "blame" in name]
        return blame["all"]["value"], blame["as_exact"]["value"], blame["as_exact_by_chance"], *met

    assert found(lambda m: m == 1) == (0.5, 1.0, 0.5, True)
    assert found(lambda m: m == 0) == (0.5, 0.0, 0.5, False)


def test_every_baseline_must_be_below():
    close = {"value": 0.05, "ci95": [0.01, 0.09], "n": 9}
    wide, unknown = {"value": 0.1, "ci95": [-0.05, 0.3], "n": 9}, {"value": None, "ci95": None, "n": 0}

    def met(**above):
        return [one["met"] for name, one in figures.aims(HEAD, above, {}).items() if "baseline" in name]

    assert met(a=close) == [True]
    assert met(a=close, b=wide) == met(a=close, b=unknown) == [False]


def test_hypotheses_that_change_are_counted(results):
    for result in results:
        for row in result.rows:
            assert row["hypotheses_moved"] == 0.5  # one of the two follows each modality


def test_without_a_region_there_is_no_result():
    volume = scan(0)
    assert not figures.placed(np.zeros(SHAPE, bool), volume.body, volume.body).any()
    region = volume.label > 0
    np.testing.assert_array_equal(figures.placed(region, volume.body, volume.body), region)


def test_the_exact_figures_of_a_planted_lie(config):
    """Readers .95 and .7 agree; turning one round: the likeliest truth stays with the reliable one (METHOD E.4)."""
    spec = dataset.phantom_spec(config.data)
    found = suite.exact(np.array([1, 1]), 1, spec)
    together = (0.95 * 0.7) / (0.95 * 0.7 + 0.05 * 0.3)
    apart = (0.95 * 0.3) / (0.95 * 0.3 + 0.05 * 0.7)
    expected = [2 * p * (1 - p) for p in (apart, apart, together)]
    np.testing.assert_allclose(found["disagreement"], expected, atol=1e-5)
    assert found["blamed"].tolist() == [1, 1]  # the weak reader, whichever of them was turned round


@pytest.mark.parametrize("draws", [2, 16])
def test_the_best_auroc_of_some_draws_is_what_drawing_them_gives(draws):
    rng = np.random.default_rng(0)
    shares = [rng.binomial(draws, p, 20_000) / draws for p in (0.89, 0.98)]
    score = np.concatenate([s * (1 - s) for s in shares])
    drawn = usefulness.auroc(score, np.arange(len(score)) < 20_000)
    likely, sure = np.array([0.89]), np.array([0.98])
    assert suite.best_auroc(likely, sure, draws) == pytest.approx(drawn, abs=0.01)
    assert suite.best_auroc(likely, likely, draws) == pytest.approx(0.5)
    both = suite.best_auroc(np.array([0.89, 0.98]), sure, draws)
    assert both == pytest.approx((suite.best_auroc(likely, sure, draws) + 0.5) / 2)


def test_a_phantom_with_one_reader_turned_round_is_the_phantom_drawn_so(config):
    spec = dataset.phantom_spec(config.data)
    numbers = range(6)
    flipped = phantom_scene.volumes(spec, numbers, 0, flip=(1, 0))
    found = list(suite.phantoms(spec, numbers, 0))
    seen = 0
    for subject, other in zip(found, flipped, strict=True):
        for change in subject.injections:
            if change.kind == "site 0":
                one = injection.altered(subject.volume, change, np.array([False, True]))
                np.testing.assert_allclose(one.image, other.image, atol=1e-5)
                seen += 1
    assert seen > 0


def test_mirroring_twice_is_nothing_and_a_contrast_keeps_the_moments():
    volume = scan(1)
    twice = suite.mirrored(suite.mirrored(volume))
    np.testing.assert_array_equal(twice.image, volume.image)
    np.testing.assert_allclose(twice.coordinates, volume.coordinates)
    np.testing.assert_allclose(suite.mirrored(volume).coordinates, coordinates(suite.mirrored(volume).body), atol=1e-6)
    changed = suite.contrasted(volume, 0.8)
    for m in range(2):
        inside, before = changed.image[m][volume.body], volume.image[m][volume.body]
        assert inside.mean() == pytest.approx(before.mean(), abs=1e-5)
        assert inside.std() == pytest.approx(before.std(), rel=1e-4)
        assert np.abs(inside - before).max() > 0.05
    assert not changed.image[:, ~volume.body].any()


def untrained(config, method, dropout=0.0):
    """A working folder's contents without the training."""
    own = config.copy_and_resolve_references()
    own.method, own.unet.dropout, own.unet.passes = method, dropout, 3
    params = jax.jit(lambda: api.init_params(own, jax.random.key(0)))()
    # A last layer of zeros says the same of every scan.
    params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32), params)
    return api.Trained(
        workdir=Path("nowhere"), name=method, config=own, splits={}, spacing=(), network=api.network_of(own),
        params=params, mesh=mesh.data_mesh(jax.devices()[:1]), tau=0.5, rung="identity", calibration={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def methods(config):
    return {name: untrained(config, name) for name in ("entrust", "unet")} | {"MC": untrained(config, "unet", 0.2)}


def test_a_run_writes_its_figures_for_networks_too(methods, config, tmp_path):
    spec = dataset.phantom_spec(config.data)
    wanted = [s for s in suite.phantoms(spec, range(6), 0) if s.injections][:1]
    none = wanted[0]._replace(injections=[], exact=[])
    found = suite.run(methods, iter([none, *wanted]), tmp_path, {"command": "x"})
    written = json.loads((tmp_path / "conflict.json").read_text())
    assert written["left_out"] == [none.volume.name]
    samples = ("disagreement", "divergence", "entropy")
    assert set(written["measures"]) == {
        *(f"{name}: {one}" for name in ("entrust", "unet, augmented at test time", "MC") for one in samples),
        *("entrust: one-step entropy", "entrust: conflict", "unet: entropy"),
    }
    assert written["measures"]["MC: divergence"]["line"][0] > 0
    assert len(written["rows"]) == written["injections"] == found["injections"]
    assert "| aim | value | met |" in (tmp_path / "conflict.md").read_text()
    assert (tmp_path / "conflict.png").stat().st_size > 10_000


def test_as_many_hypotheses_and_passes_as_asked_for(methods):
    assert len(suite.ask(methods["MC"], scan(0), False).hypotheses) == 3
    assert len(suite.ask(api.with_hypotheses(methods["MC"], 5), scan(0), False).hypotheses) == 5
    more = api.with_hypotheses(methods["entrust"], 5)
    assert (more.config.diffusion.hypotheses, methods["entrust"].config.diffusion.hypotheses) == (5, 2)
    assert more.network == methods["entrust"].network


def test_mistakes_of_a_person(methods, config, tmp_path):
    swapped = {"unet": methods["unet"], "entrust": methods["entrust"]}
    with pytest.raises(UserError, match="no EnTrust"):
        suite.check(swapped)
    suite.check(methods)
    with pytest.raises(UserError, match="no case has a lesion"):
        suite.run(methods, iter([]), tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_shuffled_parameters_keep_their_values_and_lose_their_places(methods):
    params = methods["entrust"].params
    other = suite.shuffled(params, 0)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.sort(np.ravel(a)), np.sort(np.ravel(b)))
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True))


def test_deletion_and_shuffled_weights_tell_reasons_that_are_true(methods, monkeypatch):
    """A model that sees the first modality alone: without it the label goes, without the other one it stays."""
    volume = scan(0)
    fields = np.random.default_rng(0).normal(size=(8, *SHAPE))

    def ask(trained, volume, probed):
        phi = np.stack([np.tensordot(trained.params["weight"], fields, 1) + 0.5, np.zeros(SHAPE)])
        return Said({}, (volume.image[0] > 1).astype(np.uint8), phi=phi if probed else None)

    monkeypatch.setattr(suite, "ask", ask)
    model = dataclasses.replace(methods["entrust"], params={"weight": np.eye(8)[0]})
    found = suite.faithfulness(model, volume, ask(model, volume, True))
    assert (found["deleted_top"], found["deleted_other"]) == (1.0, 0.0)
    assert found["randomised"] < 0.3  # 1 for weights in their places
    same = dataclasses.replace(model, params={"weight": np.full(8, 0.1)})
    assert suite.faithfulness(same, volume, ask(same, volume, True))["randomised"] == pytest.approx(1)


def test_cases_are_chosen_evenly():
    volumes = [scan(i) for i in range(5)]
    assert [v.number for v in suite.selected(volumes, 3)] == [0, 2, 4]
    assert len(suite.selected(volumes, 0)) == len(suite.selected(volumes, 9)) == 5
