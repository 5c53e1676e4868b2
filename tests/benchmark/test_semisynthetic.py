"""The semi-synthetic set is written so that a training can read it, and models known to be right or wrong score so."""

import json
import sys

import jax
import nibabel
import numpy as np
import pytest

from entrust_jax import api
from entrust_jax.baselines.unet import UNet
from entrust_jax.benchmark import conflict_figures
from entrust_jax.benchmark import semisynthetic as suite
from entrust_jax.data import dataset, injection, phantom, phantom_law
from entrust_jax.data import semisynthetic as law_of
from entrust_jax.errors import UserError
from entrust_jax.metrics import usefulness
from entrust_jax.runtime import mesh


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    for module in (suite, conflict_figures):
        monkeypatch.setattr(module, "RESAMPLES", 200)


@pytest.fixture(scope="module")
def glioma(repository, data_root):
    sys.path.insert(0, str(repository))
    from configs import glioma as file

    folder = data_root / "Dataset101_LowerGradeGlioma"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    config = file.get_config().copy_and_resolve_references().unlock()
    config.data.dir = str(folder)
    return config


@pytest.fixture(scope="module")
def made(glioma, tmp_path_factory):
    """(folder, law) of a set of two patients."""
    folder = tmp_path_factory.mktemp("set") / "semi"
    cases = dataset.find(glioma.data)[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite.dataset, "find", lambda data: cases)
        law = suite.make(glioma, folder, (0.95, 0.8, 0.7), 2)
    return folder, law


def test_a_set_can_be_read_as_a_manifest(made, glioma):
    folder, law = made
    assert law["cases"] and law["exact"] == suite.exact_law((0.95, 0.8, 0.7), glioma.diffusion.hypotheses)
    assert json.loads((folder / suite.LAW).read_text()) == law
    data = glioma.data.copy_and_resolve_references()
    data.layout, data.dir = "manifest", str(folder)
    found = dataset.find(data)
    assert {case.name for case in found} == set(law["cases"])
    assert len({case.patient for case in found}) == len(law["cases"]) / 2
    volumes, _ = dataset.read(data, [found[0].name], 0)
    marks = np.load(folder / found[0].name / suite.SITES)["sites"]
    assert marks.shape == volumes[0].body.shape
    for number, site in enumerate(law["cases"][found[0].name], 1):
        inside = marks == number
        assert inside.any() and np.all((volumes[0].label[inside] > 0) == site["truth"])


def pet_ct_mr(folder):
    """A folder of one thigh: PET in SUV, CT in Hounsfield units, T1, and a tumour that fills all slices but one."""
    rng, (x, y, z) = np.random.default_rng(0), np.mgrid[:48, :40, :6]
    body = np.hypot((x - 23.5) / 22, (y - 19.5) / 18) <= 1
    tumour = np.where(z < 5, body, np.hypot(x - 14, y - 12) <= 4)
    soft = rng.normal(size=body.shape)
    scans = {
        "PET": np.where(body, np.maximum(0.5 + 0.1 * soft, 0) + 20 * tumour, 0),
        "CT": np.where(body, 40 + 10 * soft + 30 * tumour - 200 * (soft > 1.5), -1000),  # with some fat
        "T1": np.where(body, 300 + 30 * soft + 150 * tumour, 0),
        "label": tumour & body,
    }
    rows = ["case,patient," + ",".join(scans), "STS_1,STS_1," + ",".join(f"{name}.nii.gz" for name in scans)]
    (folder / "manifest.csv").write_text(chr(10).join(rows))
    affine = np.diag([-1.0, 1.0, 3.0, 1.0])  # not the canonical orientation
    for name, values in scans.items():
        stored = values.astype(np.uint8 if name == "label" else np.float32)
        nibabel.save(nibabel.Nifti1Image(stored, affine), folder / f"{name}.nii.gz")


def test_intensities_with_a_unit_come_back_as_they_were_in_some_slices(repository, tmp_path):
    """CT came back constant, and a tumour that fills the thigh has no place beside it but in the last slice."""
    sys.path.insert(0, str(repository))
    from configs import sarcoma

    (tmp_path / "scans").mkdir()
    pet_ct_mr(tmp_path / "scans")
    config = sarcoma.get_config().copy_and_resolve_references()
    config.data.dir = str(tmp_path / "scans")
    with pytest.raises(UserError, match="take few --slices"):
        suite.make(config, tmp_path / "none", (0.9, 0.85, 0.8), 1)
    law = suite.make(config, tmp_path / "set", (0.9, 0.85, 0.8), 2, slices=1)
    ((before,), _), data = dataset.read(config.data, ["STS_1"], 0), config.data
    data.dir = str(tmp_path / "set")
    after, problems = dataset.read(data, list(law["cases"]), 0)
    assert len(after) == 2 and not problems
    for volume in after:
        assert volume.present.all() and volume.image.shape[1] == 1 and volume.spacing == before.spacing
        np.testing.assert_array_equal(volume.body, before.body[-1:])
        sites = np.load(tmp_path / "set" / volume.name / suite.SITES)["sites"]
        far = volume.body & ~injection.grown(sites > 0, injection.MARGIN + 1)
        np.testing.assert_allclose(volume.image[:2, far], before.image[:2, -1:][:, far], atol=1e-4)
        hot = [site["evidence"]["PET"] > 0 for site in law["cases"][volume.name]]
        assert [volume.image[0][sites == i].mean() > 4 for i in (1, 2)] == hot


def test_a_folder_with_other_files_is_left_alone(glioma, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="other files"):
        suite.make(glioma, tmp_path, (0.9, 0.8, 0.7), 1)
    assert (tmp_path / "mine.txt").read_text() == "x"


@pytest.mark.parametrize(("asked", "said"), [(["a"], "a"), ([".9"], "values"), ([".9", "1"], "below 1")])
def test_reliabilities_of_a_person(asked, said):
    with pytest.raises(UserError, match=said):
        suite.reliabilities(asked, ("A", "B"), 16)
    assert suite.reliabilities([".9", ".6"], ("A", "B"), 16) == (0.9, 0.6)
    with pytest.raises(UserError, match="contradicts nothing"):
        suite.reliabilities([], ("A",), 16)


@pytest.mark.parametrize(("count", "ends"), [(2, (0.9, 0.8)), (3, (0.9, 0.8)), (4, (0.8, 0.7))])
def test_the_exact_law_reaches_the_aim_with_default_reliabilities(count, ends):
    chosen = suite.reliabilities([], tuple("ABCD"[:count]), 16)
    assert (chosen[0], chosen[-1]) == pytest.approx(ends)
    assert suite.exact_law(chosen, 16)["auroc"] >= suite.AIMS["auroc"]
    assert suite.exact_law(tuple(np.linspace(0.95, 0.7, count)), 16)["auroc"] < suite.AIMS["auroc"]


def test_the_exact_law_is_what_drawing_from_it_gives():
    """Sites and hypotheses drawn from the law, nothing enumerated."""
    rho, rng = (0.9, 0.85, 0.8), np.random.default_rng(0)
    truth = np.where(rng.random(20_000) < 0.5, 1, -1)
    said = np.where(rng.random((len(truth), 3)) < rho, 1, -1) * truth[:, None]
    votes = rng.binomial(16, law_of.posterior(said, rho))
    unlike = votes * (16 - votes) / (16 * 15 / 2)
    kinds = np.array([law_of.kind(one) for one in said])
    one, all_ = unlike[kinds == "conflict"], unlike[kinds == "agree"]
    found = suite.exact_law(rho, 16)
    both = np.concatenate([one, all_])
    assert usefulness.auroc(both, np.arange(len(both)) < len(one)) == pytest.approx(found["auroc"], abs=0.01)
    assert one.mean() / all_.mean() == pytest.approx(found["ratio"], rel=0.1)


RHO = (0.95, 0.7)


def rows(belief, seed=0, count=240, draws=16):
    """Sites drawn from the law of readers .95 and .7, and what a model believes and draws of them."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        truth = bool(rng.random() < 0.5)
        said = np.where(rng.random(2) < np.array(RHO), 1, -1) * (1 if truth else -1)
        kind = law_of.kind(said)
        if kind == "unseen":
            continue
        exact = float(law_of.posterior(said, RHO))
        votes = rng.binomial(draws, belief(said, exact))
        phi = said * (exact - 0.5) * np.array([2.9, 0.8])  # the sign of Bayes' for or against the answer, and his order
        found.append(
            {"patient": f"P{i % 12}", "kind": kind, "evidence": said.tolist(), "truth": truth, "posterior": exact,
             "belief": belief(said, exact), "disagreement": 2 * votes * (draws - votes) / (draws * (draws - 1)),
             "divergence": np.nan, "entropy": np.nan, "one-step entropy": np.nan,
             "conflict": float(kind == "conflict"), "phi": phi.tolist(), "hypotheses": draws}
        )  # fmt: skip
    return found


LAW = {"reliability": dict(zip("AB", RHO, strict=True))}


def test_bayes_is_without_error_and_short_cuts_are_not():
    right = suite.judged(rows(lambda said, exact: exact), LAW)
    assert right["error where they agree"]["value"] == right["error where they conflict"]["value"] == 0
    assert right["belief on Bayes' side in conflict"]["value"] == pytest.approx(0.891, abs=1e-3)
    assert right["belief on Bayes' side in conflict"] == right["its exact value"]
    assert right["error of the mean of readers where they conflict"]["value"] > 0.2
    assert right["error of one half where they conflict"]["value"] > 0.35
    doubtful = suite.judged(rows(lambda said, exact: 0.5 if said.min() < 0 else exact), LAW)
    assert doubtful["error where they conflict"] == doubtful["error of one half where they conflict"]
    assert doubtful["error where they agree"]["value"] == 0
    assert "| error where they conflict | 0.391" in suite.table(doubtful)


def test_draws_from_the_exact_law_follow_conflict_as_well_as_the_exact_law():
    found = suite.judged(rows(lambda said, exact: exact, count=1200), LAW)
    law = suite.exact_law(RHO, 16)
    for name, key, slack in (("AUROC", "auroc", 0.03), ("ratio", "ratio", 0.4)):
        exact = found["exact AUROC of disagreement" if key == "auroc" else "its exact ratio"]["value"]
        low, high = found[f"{name} of disagreement"]["ci95"]
        assert low < exact < high
        assert exact == pytest.approx(law[key], abs=slack)
    assert found["AUROC of kappa"]["value"] == found["kappa where they conflict"]["value"] == 1
    assert found["AUROC of entropy"]["value"] is None


def test_draws_that_do_not_heed_conflict_do_not_follow_it():
    found = suite.judged(rows(lambda said, exact: 0.9, count=600), LAW)
    assert found["AUROC of disagreement"]["value"] == pytest.approx(0.5, abs=0.05)
    assert found["ratio of disagreement"]["value"] == pytest.approx(1, abs=0.1)


def test_blame_is_held_against_that_of_bayes():
    """Of readers .95 and .7 Bayes blames the weak one: wrong, given that they differ, in .891 of the cases."""
    drawn = rows(lambda said, exact: exact, count=1200)
    found = suite.judged(drawn, LAW)
    rate = found["blame is right in conflict"]
    assert rate == found["its exact rate"] and rate["value"] == pytest.approx(0.891, abs=0.03)
    assert found["its rate by chance"]["value"] == pytest.approx(0.5)
    turned = suite.judged([row | {"phi": row["phi"][::-1]} for row in drawn], LAW)
    assert turned["blame is right in conflict"]["value"] == pytest.approx(1 - rate["value"])
    silent = suite.judged([row | {"phi": None} for row in drawn], LAW)
    assert silent["blame is right in conflict"]["value"] is None


def test_what_each_modality_contributes_is_what_the_phantom_says():
    spec = phantom.Spec(
        size=(48, 48), depth=1, modalities=("A", "B", "C"), sites=2, prior=0.5, reliability=(0.9, 0.8, 0.7),
        ignorance=(0.1, 0.1, 0.1), radius=4.0, jitter=0.5, variant="binary",
    )  # fmt: skip
    for said in ((1, 1, -1), (-1, 1, 1), (-1, -1, 1), (1, 0, -1)):
        expected = phantom_law.contributions(np.array(said)[:, None], np.array(said) != 0, spec)[:, 0]
        np.testing.assert_allclose(suite.contributions(np.array(said), spec.reliability), expected, atol=1e-4)


def test_a_model_that_knows_the_posterior_is_judged_without_error(made, glioma, monkeypatch):
    """Sites are found where they are: a model that believes the exact value there, and nothing elsewhere, is right."""
    folder, law = made
    data = glioma.data.copy_and_resolve_references()
    data.layout, data.dir = "manifest", str(folder)
    volumes, _ = dataset.read(data, list(law["cases"]), 0)

    def examine(trained, volume):
        marks = np.load(folder / volume.name / suite.SITES)["sites"]
        p = np.zeros(marks.shape, np.float32)
        for number, site in enumerate(law["cases"][volume.name], 1):
            p[marks == number] = site["posterior"]
        phi = np.stack([p * (m == 1) for m in range(3)])
        said = {"one_step": np.stack([1 - p, p], axis=-1), "label": (p > 0.5).astype(np.uint8), "attribution": phi}
        return said | {"conflict": p / 2}

    monkeypatch.setattr(suite.api, "examine", examine)
    model = api.Trained(
        workdir=folder, name="exact", config=glioma, splits={}, spacing=(), network=UNet(2, (4,), ((1, 1),)), params={},
        mesh=mesh.data_mesh(jax.devices()[:1]), tau=0.5, rung="identity", calibration={},
    )  # fmt: skip
    found, rows = suite.evaluate(model, volumes, law, folder)
    seen = [site for sites in law["cases"].values() for site in sites if site["kind"] != "unseen"]
    assert len(rows) == len(seen) == sum(found["sites"].values())
    for row in rows:
        p = row["posterior"]
        assert (row["belief"], row["conflict"]) == pytest.approx((p, p / 2), abs=1e-5)
        assert row["phi"] == pytest.approx([0, p, 0], abs=1e-5) and np.isnan(row["disagreement"])
    with pytest.raises(UserError, match="does not know case"):
        suite.evaluate(model, volumes[:1], law | {"cases": {}}, folder)


def test_a_folder_without_the_law_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"has no posterior\.json"):
        suite.read_law(tmp_path)


def test_the_core_of_a_site_is_inside_it():
    mask = np.zeros((1, 9, 9), bool)
    mask[0, 2:7, 2:7] = True
    assert suite.core(mask).sum() == 9
    thin = np.zeros((1, 9, 9), bool)
    thin[0, 4] = True
    np.testing.assert_array_equal(suite.core(thin), thin)
