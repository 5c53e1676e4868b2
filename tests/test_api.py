"""Loading a working folder, and what is said of one that cannot be loaded."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from entrust_jax import api
from entrust_jax.errors import UserError
from entrust_jax.trustmap import ood, rungs

SPACE = (4, 48, 48)


@pytest.fixture(scope="module")
def ensemble(trained):
    return api.load(trained("deep_ensemble"))


@pytest.fixture
def folder(trained, tmp_path):
    """A trained folder that may be damaged."""
    return shutil.copytree(trained("deep_ensemble"), tmp_path / "run")


def test_a_folder_knows_how_it_was_trained(ensemble, trained):
    workdir = trained("deep_ensemble")
    assert ensemble.workdir == workdir and ensemble.name == "deep_ensemble"
    assert ensemble.config.method == "deep_ensemble" and ensemble.config.unet.members == 2
    assert ensemble.rung in rungs.RUNGS and 0 < ensemble.tau < 1
    leaves = api.jax.tree.leaves(ensemble.params)
    assert all(len(leaf) == 2 for leaf in leaves)  # members
    assert any(not np.array_equal(leaf[0], leaf[1]) for leaf in leaves)
    assert leaves[0].sharding.is_fully_replicated and len(leaves[0].devices()) == 8
    assert api.load(str(workdir)).splits == ensemble.splits


def test_thresholds_that_have_changed_since_a_training_are_told(folder, capsys):
    api.load(folder)
    assert "thresholds of doubt" not in capsys.readouterr().out
    meta = json.loads((folder / "calibration.json").read_text())
    meta["thresholds"] |= {"cause_conflict": 0.5, "gone": 1.0}
    (folder / "calibration.json").write_text(json.dumps(meta))
    api.load(folder)
    assert "cause_conflict 0.5 (now 0.1), gone 1 (now none)" in capsys.readouterr().out


def test_cases_of_a_split(ensemble):
    test, problems = api.read_cases(ensemble)
    assert [volume.name for volume in test] == ensemble.splits["test"] and problems == []
    everyone, _ = api.read_cases(ensemble, split="all")
    assert len(everyone) == 25 and len({volume.number for volume in everyone}) == 25
    assert ensemble.config.data.dir == ""


def test_a_map_of_the_predicted_dice_leaves_the_order_of_referral(ensemble):
    volume = api.read_cases(ensemble)[0][0]
    level = {"knots": [0.0, 1.0], "values": [0.25, 0.25]}  # it would tie every case
    promised = ensemble.conformal | {"dice_map": level, "dice": ensemble.conformal["dice"] | {"margin": None}}
    before, after = (
        api.predict_volume(dataclasses.replace(ensemble, conformal=one), volume) for one in (None, promised)
    )
    assert after["predicted_dice"] == after["trust"]["predicted_dice"] == 0.25 != before["predicted_dice"]
    assert after["trust"]["score"] == before["trust"]["score"] == before["predicted_dice"]


def test_a_folder_from_before_a_key_was_added_goes_on(ensemble, trained, tmp_path):
    values = json.loads((ensemble.workdir / "config.json").read_text())
    assert "patient_pattern" in values["data"]
    for section, added in api.ADDED.items():
        for key in added:
            del values[section][key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert json.loads(api.read_config(tmp_path).to_json()) == json.loads((ensemble.workdir / "config.json").read_text())
    del values["trust"]  # a whole section
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert json.loads(api.read_config(tmp_path).to_json()) == json.loads((ensemble.workdir / "config.json").read_text())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", None),  # of before there were formats
        (
            '{"format": 2, "commit": "abc"}',
            r"run: was trained by a later version.*format 2 .*abc.*train again",
        ),
        ('{"format": 0}', "an earlier version"),
        ("{", r"version\.json: is damaged"),
        ("[]", r"version\.json: is damaged"),
    ],
)
def test_a_folder_of_another_version_is_not_read_wrongly(folder, text, said):
    (folder / "version.json").write_text(text)
    if said is None:
        api.load(folder)
        return
    with pytest.raises(UserError, match=said):
        api.load(folder)


def test_an_entrust_of_before_is_refused_and_a_method_of_later_too(folder):
    config = json.loads((folder / "config.json").read_text())
    for method, said in (("entrust", "an earlier version.*format 1"), ("oracle", "method 'oracle'")):
        (folder / "config.json").write_text(json.dumps(config | {"method": method}))
        with pytest.raises(UserError, match=said):
            api.check_format(folder, method)
        with pytest.raises(UserError, match=said):
            api.load(folder)
    (folder / "version.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    assert api.load(folder).config.method == "deep_ensemble"  # of before there was such a file


@pytest.mark.parametrize("text", ["[]", "{}", '{"name": "x"}', "{"])
def test_a_config_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        api.read_config(tmp_path)


def test_the_phantom_has_no_folder(ensemble, tmp_path):
    with pytest.raises(UserError, match=r"built-in phantom.*leave --data_dir out"):
        api.read_cases(ensemble, str(tmp_path))


def test_a_prediction_is_a_function_of_the_volume(ensemble):
    (volume, *_), _ = api.read_cases(ensemble)
    one, two = api.predict_volume(ensemble, volume), api.predict_volume(ensemble, volume)
    assert one["hypotheses"].shape == (2, *SPACE) and one["probability"].shape == (*SPACE, 4)
    np.testing.assert_allclose(one["probability"].sum(-1), 1, atol=1e-4)
    assert {"conflict", "cause", "attribution"}.isdisjoint(one)
    assert set(one["regions"]) == {"WT", "TC", "ET"}
    for name in ("label", "probability", "probability_raw", "error_probability", "entropy", "divergence"):
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_fewer_slices_are_examined_for_calibration(ensemble):
    (volume, *_), _ = api.read_cases(ensemble)
    raw = api.examine(ensemble, volume, slices=2)
    assert len(raw["kept"]) == len(raw["mean"]) == 2 and np.sum(raw["slice_weight"]) == pytest.approx(4)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def add(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def widen(path):
    config = json.loads(path.read_text())
    config["unet"]["widths"] = [4, 8, 12]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: shutil.rmtree(run), ["config.json", "no such file", "train first"]),
        (lambda run: truncate(run / "config.json"), ["config.json", "damaged"]),
        (lambda run: (run / "calibration.json").unlink(), ["has not finished", "it goes on"]),
        (lambda run: (run / "calibration.npz").unlink(), ["has not finished"]),
        (lambda run: truncate(run / "calibration.json"), ["calibration", "damaged", "run train again"]),
        (lambda run: truncate(run / "calibration.npz"), ["calibration.npz", "damaged", "run train again"]),
        (lambda run: (run / "calibration.npz").write_bytes(b""), ["calibration.npz", "damaged"]),
        (lambda run: (run / "calibration.json").write_text("{}"), ["calibration", "damaged"]),
        (lambda run: add(run / "calibration.json", thresholds=["5"]), ["calibration", "damaged"]),
        (lambda run: truncate(run / "conformal.json"), ["conformal.json", "damaged", "remove it"]),
        (lambda run: (run / "conformal.json").write_text("{}"), ["conformal.json", "damaged"]),
        (lambda run: (run / "splits.json").unlink(), ["splits.json"]),
        (lambda run: truncate(run / "splits.json"), ["splits.json", "damaged"]),
        (lambda run: shutil.rmtree(run / "checkpoints" / "best"), ["checkpoints/best", "no checkpoint"]),
        (lambda run: [shutil.rmtree(p) for p in (run / "checkpoints" / "best").iterdir()], ["holds no checkpoint"]),
        (
            lambda run: [truncate(p) for p in (run / "checkpoints" / "best").rglob("d/*")],
            ["checkpoints/best", "damaged"],
        ),
        (lambda run: widen(run / "config.json"), ["checkpoints/best", "another config"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_folder_is_one_line(folder, damage, words):
    damage(folder)
    with pytest.raises(UserError) as error:
        api.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# What is usual in training's scans ------------------------------------------------------------------------------------


@pytest.fixture
def usual(tmp_path):
    """A folder that says what is usual of two modalities."""
    rng = np.random.default_rng(0)
    cases = [(f"p{i}", {name: rng.normal(size=(2, 5)) for name in ood.GROUPS}) for i in range(14)]
    laws, found = ood.fit(cases[:10], cases[10:])
    np.savez(tmp_path / "ood.npz", **ood.arrays_of(laws))
    (tmp_path / "ood.json").write_text(json.dumps(found))
    return tmp_path


def test_what_is_usual_is_read_and_a_folder_without_it_has_none(usual, tmp_path_factory):
    laws, found = api.read_usual(usual, 2)
    assert set(laws) == set(ood.GROUPS) and found["patients"] == 4
    assert api.read_usual(tmp_path_factory.mktemp("older"), 2) is None
    (usual / "ood.json").write_text(json.dumps(ood.NOTHING))
    (usual / "ood.npz").unlink()  # nothing was found, and that is said
    assert api.read_usual(usual, 2) == ({}, ood.NOTHING)


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: truncate(run / "ood.json"),
        lambda run: (run / "ood.json").write_text("{}"),
        lambda run: (run / "ood.json").write_text("[]"),
        lambda run: (run / "ood.json").write_text('{"note": "", "farthest": null, "patients": 3}'),
        lambda run: (run / "ood.npz").unlink(),
        lambda run: truncate(run / "ood.npz"),
        lambda run: (run / "ood.npz").write_bytes(b""),
        lambda run: np.savez(run / "ood.npz", a=np.zeros(2)),
    ],
)
def test_what_is_wrong_with_what_is_usual_is_one_line(usual, damage):
    damage(usual)
    with pytest.raises(UserError, match=r"ood\.npz .*remove ood\.json and run the same train command again") as error:
        api.read_usual(usual, 2)
    assert str(usual) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError):
        api.read_usual(usual, 3)  # of another number of modalities
