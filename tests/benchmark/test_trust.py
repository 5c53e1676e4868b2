"""The trust suite: what it does to a scan, what it counts, and that it would see a promise that is not kept."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from entrust_jax import api
from entrust_jax.benchmark import trust
from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.model import EnTrust
from entrust_jax.runtime.mesh import data_mesh
from entrust_jax.trustmap import conformal, ood

GRID = len(conformal.THRESHOLDS)
LEVELS = {"fnr": 0.1, "fdr": 0.1, "coverage": 0.9}


def volume(number=0, modalities=3) -> Volume:
    rng = np.random.default_rng(number)
    body = np.ones((4, 20, 18), bool)
    body[:, :2] = False
    image = rng.normal(size=(modalities, *body.shape)).astype(np.float32) * body
    return Volume(
        name=f"c{number}", patient=f"c{number}", number=number, image=image, present=np.ones(modalities, bool),
        label=None, body=body, coordinates=coordinates(body), spacing=(3.0, 1.0, 1.0), reference=None,
    )  # fmt: skip


def faults(case, modalities=("T1", "FLAIR", "T1ce"), rules=(None, None, None)):
    found: dict[str, list[trust.Spoilt]] = {}
    for one in trust.spoilt(case, modalities, rules):
        found.setdefault(one.kind, []).append(one)
    return found


def test_faults_touch_one_scan_and_are_what_they_say():
    case = volume()
    found = faults(case)
    assert {kind: len(own) for kind, own in found.items()} == {
        "exchanged": 3, "replaced": 6, "ghosting": 3, "noise": 3, "cropped": 3, "native": 1,
    }  # fmt: skip
    for kind, own in found.items():
        for one in own:
            changed = np.flatnonzero(np.any(one.volume.image != case.image, axis=(1, 2, 3)))
            assert tuple(changed) == one.modalities, kind
            assert np.all(one.volume.image[:, ~case.body] == 0) and np.all(np.isfinite(one.volume.image))
            if kind not in ("exchanged", "replaced"):
                inside = one.volume.image[one.modalities[0]]
                inside = inside[inside != 0]
                assert abs(inside.mean()) < 0.1 and abs(inside.std() - 1) < 0.1  # as a file would be read
    for one in found["exchanged"]:
        np.testing.assert_array_equal(one.volume.image[list(one.modalities)], case.image[list(one.modalities)[::-1]])
    for one in found["cropped"]:
        share = np.mean(one.volume.image[one.modalities[0]][case.body] == 0)
        assert 0.2 < share < 0.45
    (native,) = found["native"]
    inside = [row[case.body] for row in (native.volume.image[2], case.image[0])]
    assert native.modalities == (2,) and np.corrcoef(*inside)[0, 1] > 0.3
    for one, again in zip(found["noise"], faults(case)["noise"], strict=True):
        np.testing.assert_array_equal(one.volume.image, again.volume.image)


def test_scans_with_a_unit_are_not_exchanged_and_missing_ones_not_touched():
    case = dataclasses.replace(volume(), present=np.array([True, True, False]))
    found = faults(case, ("PET", "CT", "T1"), (("scale", 2.5), ("window", -100, 200), None))
    assert set(found) == {"noise", "cropped", "blurred"}
    assert {m for own in found.values() for one in own for m in one.modalities} == {0, 1}


def test_the_auroc_is_that_of_pairs_of_patients():
    rng = np.random.default_rng(0)
    clean = [(i, float(x)) for i, x in enumerate(rng.integers(0, 6, 12))]
    faulty = [(i, float(x)) for i, x in enumerate(rng.integers(2, 9, 12))]
    pairs = [(b > a) + 0.5 * (a == b) for _, a in clean for _, b in faulty]
    found = trust.auroc(clean, faulty, 12)
    assert found["value"] == pytest.approx(np.mean(pairs)) and found["n"] == 12
    assert found["ci95"][0] < found["value"] < found["ci95"][1]
    twice = [*faulty, *faulty]  # more faults of a patient do not make more patients
    assert trust.auroc(clean, twice, 12)["value"] == pytest.approx(found["value"])
    assert trust.auroc(clean, [], 12)["value"] is None


def case_of(i, rng):
    worth = rng.random()
    steps = (np.arange(GRID) < worth * (GRID - 1)).astype(float)
    predicted = rng.uniform(0.5, 0.9)
    true = float(np.clip(predicted - 0.3 + 0.02 * rng.normal(), 0, 1))
    return conformal.Case(
        f"p{i}", {"r": steps}, {"r": 1 - steps}, abs(true - predicted), {"r": rng.normal()}, predicted, true
    )


def test_promises_hold_over_divisions_and_a_broken_one_is_seen(monkeypatch):
    rng = np.random.default_rng(1)
    cases = [case_of(i, rng) for i in range(80)]
    found = trust.resplit(cases, ("r",), LEVELS, 40, times=60)
    assert {"outer r", "inner r", "dice", "volume r"} <= set(found) and found["test"] == 40
    for name in ("outer r", "inner r", "dice", "volume r"):
        assert found[name]["holds"] and found[name]["refused"] == 0, name
    assert found["inner r"]["divisions_above"] <= 0.1 and found["dice"]["divisions_above"] is None
    assert found["dice"]["mean"] > 0.85 and found["outer r"]["mean"] > 0.03

    monkeypatch.setattr(conformal, "residual_quantile", lambda scores, coverage: float(np.quantile(scores, 0.7)))
    monkeypatch.setattr(conformal, "control_risk", lambda losses, alpha: GRID // 2)
    monkeypatch.setattr(conformal, "learn_then_test", lambda losses, alpha, delta: GRID // 2)
    broken = trust.resplit(cases, ("r",), LEVELS, 40, times=60)
    for name in ("outer r", "inner r", "dice", "volume r"):
        assert not broken[name]["holds"], name
    assert broken["inner r"]["divisions_above"] > 0.5


def test_a_patient_with_many_cases_counts_once():
    a, b = (case_of(i, np.random.default_rng(i)) for i in range(2))
    values = [(a, 1.0), (a, 1.0), (a, 0.0), (b, 1.0)]
    assert trust.by_patient(values, np.mean) == pytest.approx((2 / 3 + 1) / 2)
    assert trust.by_patient(values, np.min) == 0.5 and np.isnan(trust.by_patient([], np.mean))
    told = conformal.fit([case_of(i, np.random.default_rng(i)) for i in range(40)], ("r",), **LEVELS)
    once, thrice = trust.outcome(told, [a, b]), trust.outcome(told, [a, a, a, b])
    assert once == pytest.approx(thrice)


def test_too_few_patients_are_counted_as_refusals():
    rng = np.random.default_rng(2)
    found = trust.resplit([case_of(i, rng) for i in range(10)], ("r",), LEVELS, 5, times=7)
    assert all(found[name]["refused"] == 7 and found[name]["mean"] is None for name in ("outer r", "inner r", "dice"))


def test_a_predicted_dice_that_is_off_is_mended_and_a_good_one_left_alone():
    rng = np.random.default_rng(3)
    own, others = ([case_of(i, rng) for i in range(first, first + 20)] for first in (0, 20))
    found = trust.predicted_dice(conformal.fit(own, ("r",), **LEVELS), own, others)
    assert found["map"]["reason"] == "" and found["delivered"] == found["under_the_map"]
    assert found["delivered"]["mean_error"]["value"] < 0.1 < 0.25 < found["as_it_is"]["mean_error"]["value"]
    assert found["delivered"]["spearman"] > 0.8 and found["delivered"]["n"] == 20
    good = [dataclasses.replace(one, true_dice=one.predicted_dice) for one in own]
    told = conformal.fit(good, ("r",), **LEVELS)
    found = trust.predicted_dice(told, good, good)
    assert "no better" in found["map"]["reason"] and found["delivered"] == found["as_it_is"]
    twice = trust.predicted_dice(told, good, [*good, *good])  # the patient is the unit
    assert twice["as_it_is"] == found["as_it_is"] and twice["as_it_is"]["n"] == 20


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A working folder by hand: noise is far, an exchange farther, the rest near."""
    data = types.SimpleNamespace(
        modalities=("A", "B"), regions={"r": (1,)}, layout="nnunet", intensity=types.SimpleNamespace(to_dict=dict)
    )
    config = types.SimpleNamespace(
        method="entrust", name="unit", data=data, trust=types.SimpleNamespace(to_dict=lambda: LEVELS), seed=0
    )
    cases = {"test": [volume(i, 2) for i in range(12)], "calibration": [volume(i, 2) for i in range(12, 40)]}
    clean = {one.number: one.image for own in cases.values() for one in own}

    def compare(trained, case):
        away = np.abs(case.image - clean[case.number]).mean(axis=(1, 2, 3))
        own = {
            name: {"distance": float(x), "group": "look", "times": 2.0, "like": None}
            for name, x in zip(data.modalities, away, strict=True)
        }
        unlike = [name for name, one in own.items() if one["distance"] > 0.3]
        return {"patients": 9, "note": "", "distance": float(away.max()), "unlike": unlike, "modalities": own}

    rng = np.random.default_rng(4)
    monkeypatch.setattr(trust.api, "compare_volume", compare)
    monkeypatch.setattr(trust.api, "observe_volume", lambda trained, case: case_of(case.number, rng))
    monkeypatch.setattr(trust.api, "read_cases", lambda trained, split="test": (cases[split], []))
    return api.Trained(
        workdir=tmp_path, name="unit", config=config, splits={}, spacing=(), params=None, tau=0.5, rung="identity",
        network=EnTrust(2, 2, widths=(4, 8), d_c=4, d_u=4, strides=((2, 2), (2, 2)), head_dropout=0.2, b=0.2),
        calibration={},
        mesh=data_mesh(jax.devices()[:1]), usual=({}, {"note": ""}),
    )  # fmt: skip


def test_a_folder_is_measured(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(trust.api, "load", lambda workdir: folder)
    monkeypatch.setattr(trust, "RESPLITS", 3)
    trust.run(tmp_path, tmp_path / "out", 5, 64, {"command": "python -m it"})
    found = json.loads((tmp_path / "out" / "trust.json").read_text())
    unlike = found["unlike_training"]
    assert unlike["faults"]["exchanged"]["auroc"]["value"] == 1 and unlike["false_alarms"]["value"] == 0
    assert unlike["faults"]["noise"]["right_scan_is_farthest"]["value"] == 1
    assert unlike["false_alarms"]["expected_of_patients_like_the_reference"] == pytest.approx(0.1)
    assert set(unlike["faults"]["exchanged"]["by_scan"]) == {"A/B"} and found["command"] == "python -m it"
    assert found["guarantees"]["calibration"] == 28 and found["guarantees"]["test"] == 12
    text = (tmp_path / "out" / "trust.md").read_text()
    assert "| exchanged | 12 | 1.000 [1.000, 1.000]" in text and "| outer r | 0.1 |" in text


def test_a_folder_that_cannot_be_measured_is_one_line(folder, monkeypatch):
    with pytest.raises(UserError, match=r"no ood\.json"):
        list(trust.measure(dataclasses.replace(folder, usual=None), 5, 5))
    monkeypatch.setattr(trust.api, "compare_volume", lambda trained, case: ood.NOTHING | {"distance": None})
    with pytest.raises(UserError, match="cannot be compared"):
        list(trust.measure(folder, 5, 5))
    folder.config.method = "unet"
    with pytest.raises(UserError, match="needs entrust"):
        list(trust.measure(folder, 5, 5))
