"""Distances from training's scans: false alarms as said, the spoilt scan is named, few and odd cases do no harm."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from entrust_jax.trustmap import ood

MODALITIES = ("T1", "FLAIR", "T1ce")
SIZES = {"encoder": 30, "texture": 6, "look": 12}
PLACES = {"T1": 0.0, "FLAIR": 3.0, "T1ce": -3.0}  # of the look of each, so that one can be taken for another


def features(rng, moved=None):
    """Features of a case whose directions are correlated; moved: (group, modality, by how much)."""
    found = {}
    for group, size in SIZES.items():
        mixing = np.random.default_rng(7).normal(size=(size, size)) / np.sqrt(size)
        rows = rng.normal(size=(len(MODALITIES), size)) @ mixing
        if group == "look":
            rows += np.array([[PLACES[name]] for name in MODALITIES])
        found[group] = rows
    if moved:
        group, m, by = moved
        found[group][m] += by
    return found


def people(rng, count, **options):
    return [(f"p{i}", features(rng, **options)) for i in range(count)]


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    return ood.fit(people(rng, 30), people(rng, 20))


def compare(fitted, own):
    return ood.compare(*fitted, own, MODALITIES)


@pytest.fixture(scope="module")
def alike():
    """Distances of patients like those of training."""
    rng = np.random.default_rng(1)
    laws, _ = ood.fit(people(rng, 20), people(rng, 1))
    return np.array([ood.farthest(ood.compared(laws, features(rng))) for _ in range(1000)])


@pytest.mark.parametrize("references", [1, 4, 9])
def test_as_many_false_alarms_as_said(alike, references):
    groups = alike.reshape(-1, 1 + references)
    beyond = groups[:, 0] > groups[:, 1:].max(axis=1)
    expected = 1 / (references + 1)
    assert abs(beyond.mean() - expected) < 3 * np.sqrt(expected * (1 - expected) / len(beyond))


def test_the_distance_that_is_compared_is_the_one_that_is_told(fitted):
    _, found = fitted
    rng = np.random.default_rng(0)
    people(rng, 30)
    own = [compare(fitted, one) for _, one in people(rng, 20)]
    assert max(one["distance"] for one in own) == pytest.approx(found["farthest"])
    assert not any(one["unlike"] for one in own) and found["patients"] == 20 and found["training"] == 30


@pytest.mark.parametrize("m", range(3))
@pytest.mark.parametrize("group", ["encoder", "texture"])
def test_a_spoilt_scan_is_flagged_and_named(fitted, group, m):
    record = compare(fitted, features(np.random.default_rng(1), moved=(group, m, 6.0)))
    assert record["unlike"] == [MODALITIES[m]]
    own = record["modalities"][MODALITIES[m]]
    assert own["group"] == group and own["like"] is None and own["times"] > 1
    (line,) = ood.sentences(record)
    assert line.startswith(f"{MODALITIES[m]} does not look like the {MODALITIES[m]} scans of training")
    assert "20 reference patients" in line and "\n" not in line


def test_exchanged_files_are_told_by_what_they_look_like(fitted):
    own = features(np.random.default_rng(2))
    own["look"] = own["look"][[1, 0, 2]]
    record = compare(fitted, own)
    assert set(record["unlike"]) == {"T1", "FLAIR"}
    assert (record["modalities"]["T1"]["like"], record["modalities"]["FLAIR"]["like"]) == ("FLAIR", "T1")
    assert "T1 does not look like the T1 scans of training: it looks like FLAIR" in "\n".join(ood.sentences(record))


def test_an_odd_scan_is_not_taken_for_another_modality(fitted):
    """Far from every modality's look: that is said, but no exchange."""
    odd = features(np.random.default_rng(3))
    odd["look"][0, :2] += 9.0, -9.0
    record = compare(fitted, odd)
    assert min(ood.log_distance(law, odd["look"][0]) for law in fitted[0]["look"].laws) > np.log(2)
    assert record["unlike"] == ["T1"] and record["modalities"]["T1"]["like"] is None
    assert "by its look" in ood.sentences(record)[0]


def test_a_missing_modality_is_not_compared(fitted):
    own = features(np.random.default_rng(4), moved=("texture", 2, 6.0))
    for rows in own.values():
        rows[0] = np.nan
    record = compare(fitted, own)
    assert record["unlike"] == ["T1ce"] and record["modalities"]["T1"]["distance"] is None
    for rows in own.values():
        rows[:] = np.nan
    nothing = compare(fitted, own)
    assert nothing["distance"] is None and nothing["unlike"] == [] and ood.sentences(nothing) == []


def test_scans_of_a_patient_are_left_out_together_and_count_once():
    rng = np.random.default_rng(5)
    twins = [(f"p{i // 2}", one) for i, (_, one) in enumerate(people(rng, 24))]
    laws, found = ood.fit(twins, twins[:6])
    assert found["patients"] == 3 and found["training"] == 12
    copies = [(f"p{i}", one) for i, (_, one) in enumerate(twins[::2]) for _ in range(2)]
    alone = [(f"p{i}", one) for i, (_, one) in enumerate(twins[::2])]
    again, once = (ood.fit(own, twins[1:2])[0]["texture"].centre for own in (copies, alone))
    assert np.all(again > once - 0.3)  # a copy left in would make every left-out distance small
    assert np.all(np.isfinite(laws["look"].spread))


def test_too_few_patients_and_none_at_all_are_said():
    rng = np.random.default_rng(6)
    for training, reference, word in (
        (people(rng, ood.LEAST_PATIENTS - 1), people(rng, 3), "8 training patients"),
        (people(rng, 12), [], "no patient who had no part"),
        ([], people(rng, 3), "no training patients"),
    ):
        laws, found = ood.fit(training, reference)
        assert laws == {} and found["patients"] == 0 and word in found["note"]
        record = ood.compare(laws, found, {}, MODALITIES)
        assert record["unlike"] == [] and record["distance"] is None and record["note"] == found["note"]
    laws, found = ood.fit(people(rng, 12), people(rng, 3), note="all had a part")
    assert laws == {} and found["note"] == "all had a part"


def test_a_modality_that_few_have_is_not_compared_and_one_alone_has_no_other():
    rng = np.random.default_rng(8)
    training = people(rng, 14)
    for _, own in training[5:]:
        for rows in own.values():
            rows[1] = np.nan
    laws, found = ood.fit(training, people(rng, 3))
    record = ood.compare(laws, found, features(rng, moved=("texture", 1, 9.0)), MODALITIES)
    assert record["modalities"]["FLAIR"]["distance"] is None and "FLAIR" not in record["unlike"]
    single = [(name, {group: rows[:1] for group, rows in own.items()}) for name, own in people(rng, 14)]
    laws, found = ood.fit(single[:10], single[10:])
    far = {group: rows[:1] for group, rows in features(rng, moved=("texture", 0, 9.0)).items()}
    assert ood.compare(laws, found, far, ("CT",))["unlike"] == ["CT"]


# The law --------------------------------------------------------------------------------------------------------------


def test_the_shrinkage_is_that_of_ledoit_and_wolf():
    rng = np.random.default_rng(9)
    x = rng.normal(size=(12, 5)) * np.arange(1, 6)
    x -= x.mean(axis=0)
    s = x.T @ x / len(x)
    mu = np.trace(s) / 5
    apart = np.sum((s - mu * np.eye(5)) ** 2)
    noise = sum(np.sum((np.outer(row, row) - s) ** 2) for row in x) / len(x) ** 2
    assert ood.shrinkage(x) == pytest.approx(min(noise, apart) / apart)
    wide = rng.normal(size=(10, 400))
    assert ood.shrinkage(wide - wide.mean(axis=0)) > 0.7  # nothing but noise


def test_the_distance_is_that_of_the_shrunk_covariance():
    rng = np.random.default_rng(10)
    x = rng.normal(size=(15, 40)) @ rng.normal(size=(40, 40))
    law, row = ood.fit_normal(x), rng.normal(size=40)
    z = (x - x.mean(axis=0)) / np.hypot(x.std(axis=0), ood.FLOOR)
    rho, s = ood.shrinkage(z), z.T @ z / len(z)
    covariance = (1 - rho) * s + rho * np.trace(s) / 40 * np.eye(40)
    away = (row - law.mean) / law.scale
    expected = np.sqrt(away @ np.linalg.solve(covariance, away) / 40)
    assert np.exp(ood.log_distance(law, row)) == pytest.approx(expected, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.float64, (9, 3, 4), elements=st.floats(-5, 5) | st.just(np.nan)), st.booleans())
def test_nothing_makes_it_stumble(x, relative):
    """Constant features, equal cases, singular covariances, features and modalities that are not there."""
    found = ood.usual(x, [f"p{i}" for i in range(9)], relative)
    for row in (x[0], np.zeros((3, 4)), np.full((3, 4), np.nan)):
        scores = ood.scores(found, row, relative)
        assert not np.any(np.isinf(scores))
        for m, law in enumerate(found.laws):
            assert law is not None or np.isnan(scores[m])


def test_what_is_kept_comes_back(fitted, tmp_path):
    laws, found = fitted
    np.savez(tmp_path / "ood.npz", **ood.arrays_of(laws))
    with np.load(tmp_path / "ood.npz") as file:
        held = {name: file[name] for name in file.files}
    again = ood.laws_of(held, 3), json.loads(json.dumps(found))
    own = features(np.random.default_rng(11), moved=("texture", 1, 6.0))
    assert compare(again, own) == compare(fitted, own)
    with pytest.raises(ValueError, match="modalities"):
        ood.laws_of(held, 2)
    del held["look/1/scale"]
    with pytest.raises(KeyError):
        ood.laws_of(held, 3)


# What a scan shows ----------------------------------------------------------------------------------------------------


def test_grain_shows_noise_ghosts_and_sharpness():
    rng = np.random.default_rng(12)
    z = np.cumsum(np.cumsum(rng.normal(size=(3, 48, 40)), axis=1), axis=2)
    z = (z - z.mean()) / z.std()
    body = np.ones(z.shape, bool)
    body[:, :4] = False
    plain = ood.texture(z, body)
    assert np.all(np.isfinite(plain)) and len(plain) == 2 * len(ood.LAGS) + 6
    noisy = ood.texture(z + rng.normal(0, 0.3, z.shape), body)
    assert np.all(noisy[-6:] > plain[-6:] + 0.4) and noisy[0] > plain[0]
    ghost = ood.texture(0.5 * z + 0.5 * np.roll(z, 12, axis=1), body)
    at = ood.LAGS.index(12)
    assert ghost[at] - plain[at] < ghost[0] - plain[0]  # likest itself where the ghost lies
    np.testing.assert_allclose(ood.texture(z, body)[:24], ood.texture(np.where(body, z, 9.0), body)[:24])
    thin = ood.texture(z[:, :2, :2], body[:, 4:6, :2])
    assert len(thin) == len(plain) and np.isfinite(thin[0]) and np.isnan(thin[-1])


def test_the_spread_of_intensities_and_what_is_not_measured():
    z = np.zeros((2, 10, 10))
    z[:, :5] = np.linspace(1, 2, 100).reshape(2, 5, 10)
    body = np.ones(z.shape, bool)
    found = ood.spread(z, body)
    assert found[-1] == 0.5 and found[len(ood.QUANTILES) // 2] <= 1 and found[-2] == pytest.approx(np.quantile(z, 0.99))
    assert np.all(np.isnan(ood.spread(z, ~body)))
