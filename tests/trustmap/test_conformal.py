"""Guarantees on exchangeable patients: they hold over many draws, and versions that look alike do not."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from entrust_jax.metrics import overlap
from entrust_jax.trustmap import case as case_level
from entrust_jax.trustmap import conformal

GRID = len(conformal.THRESHOLDS)
LEVELS = {"fnr": 0.1, "fdr": 0.1, "coverage": 0.9}
DRAWS = 400


def steps(worth):
    """Losses [n GRID] of patients who miss everything until the set is large enough for them, worth [n] in [0, 1]."""
    return (np.arange(GRID)[None, :] < np.asarray(worth)[:, None] * (GRID - 1)).astype(float)


def above(values, level):
    """How many standard errors the mean of the values lies above the level."""
    return (np.mean(values) - level) / (np.std(values, ddof=1) / np.sqrt(len(values)))


def without_correction(losses, alpha):
    return int(np.flatnonzero(losses.mean(axis=0) <= alpha)[0])


@pytest.mark.parametrize(("rule", "holds"), [(conformal.control_risk, True), (without_correction, False)])
def test_the_mean_false_negative_rate_of_the_next_patient_is_controlled(rule, holds):
    rng = np.random.default_rng(0)
    alpha, found = 0.1, []
    for _ in range(DRAWS):
        index = rule(steps(rng.random(20)), alpha)
        found.append(1 - index / (GRID - 1))  # P(worth > index), the exact risk of this index
    assert (above(found, alpha) < 2) == holds
    # Tight: with 20 patients one may miss, and the risk is that of the second largest of 20.
    assert not holds or np.mean(found) == pytest.approx(2 / 21, abs=0.01)


@pytest.mark.parametrize("unit", ["patient", "slice"])
def test_slices_of_a_patient_are_not_patients(unit):
    rng = np.random.default_rng(1)
    alpha, found = 0.15, []
    for _ in range(DRAWS // 2):
        curves = steps(rng.random(10))
        cases = [
            conformal.Case(f"{i}" if unit == "patient" else f"{i}/{k}", {"r": curve}, {"r": curve}, 0.0, {"r": 0.0})
            for i, curve in enumerate(curves)
            for k in range(5)
        ]
        one = conformal.fit(cases, ("r",), fnr=alpha, fdr=0.5, coverage=0.5)["outer"]["r"]
        assert one["patients"] == (10 if unit == "patient" else 50)
        index = np.flatnonzero(np.float32(one["threshold"]) == conformal.THRESHOLDS)[0]
        found.append(1 - index / (GRID - 1))
    assert (above(found, alpha) < 2) == (unit == "patient")


def test_a_larger_level_gives_a_smaller_set_and_a_rising_loss_is_refused():
    losses = steps(np.random.default_rng(2).random(50))
    chosen = [conformal.control_risk(losses, alpha) for alpha in (0.02, 0.05, 0.1, 0.2, 0.5, 0.9)]
    assert chosen == sorted(chosen, reverse=True) and len(set(chosen)) == len(chosen)
    assert conformal.control_risk(steps(np.ones(50)), 0.02) == GRID - 1  # the full set, which misses nothing
    with pytest.raises(ValueError, match="rises"):
        conformal.control_risk(losses[:, ::-1], 0.1)


@pytest.mark.parametrize(
    ("needed", "works"),
    [
        (conformal.patients_for_risk, lambda n, a: conformal.control_risk(np.zeros((n, 2)), a) is not None),
        (conformal.patients_for_quantile, lambda n, a: conformal.residual_quantile(np.zeros(n), 1 - a) is not None),
        (
            lambda a: conformal.patients_for_test(a, 0.1),
            lambda n, a: conformal.learn_then_test(np.zeros((n, 2)), a, 0.1) is not None,
        ),
    ],
)
@pytest.mark.parametrize("alpha", [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 1 / 3])
def test_the_patients_needed_are_the_fewest_that_do(needed, works, alpha):
    n = needed(1 - alpha if needed is conformal.patients_for_quantile else alpha)
    assert works(n, alpha) and not works(n - 1, alpha)


def test_five_per_cent_need_nineteen_patients():
    assert conformal.patients_for_risk(0.05) == 19 and conformal.patients_for_risk(0.1) == 9
    assert conformal.patients_for_quantile(0.9) == 9 and conformal.patients_for_quantile(0.95) == 19
    assert conformal.patients_for_test(0.1, 0.1) == 22


@pytest.mark.parametrize("n", [5, 22, 60])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_p_values_are_valid_and_right_without_a_loss(n, alpha):
    hits = np.arange(n + 1)
    p = conformal.hoeffding_bentkus(hits / n, n, alpha)
    chance = scipy.stats.binom.pmf(hits, n, alpha)
    for level in np.linspace(0.01, 0.99, 99):  # exactly, for losses of 0 and 1 whose mean is alpha
        assert chance[p <= level].sum() <= level + 1e-12
    assert p[0] == pytest.approx((1 - alpha) ** n) and np.all(np.diff(p) >= 0) and p[-1] == 1
    # By hand, KL and the tail: 3 of 60 at alpha = .3.
    r, a = 0.05, 0.3
    kl = r * math.log(r / a) + (1 - r) * math.log((1 - r) / (1 - a))
    expected = min(math.exp(-60 * kl), math.e * scipy.stats.binom.cdf(3, 60, a))
    assert conformal.hoeffding_bentkus(np.array([r]), 60, a)[0] == pytest.approx(expected)


def last_below(losses, alpha, delta):
    del delta
    return int(np.flatnonzero(losses.mean(axis=0) <= alpha)[-1])


@pytest.mark.parametrize(("rule", "holds"), [(conformal.learn_then_test, True), (last_below, False)])
def test_a_risk_in_any_shape_is_below_its_level_as_often_as_said(rule, holds):
    rng = np.random.default_rng(3)
    where = np.linspace(0, 1, 200)
    risk = 0.35 * where + 0.03 * np.sin(40 * where) * where  # not monotone
    alpha, delta, above_it, chosen = 0.1, 0.1, [], []
    for _ in range(DRAWS):
        index = rule((rng.random((80, 1)) < risk[None, :]).astype(float), alpha, delta)
        above_it.append(float(risk[index] > alpha))
        chosen.append(risk[index])
    assert (above(above_it, delta) < 2) == holds
    assert np.mean(chosen) > 0.03  # not by choosing nothing


@pytest.mark.parametrize("rule", [conformal.residual_quantile, lambda s, c: float(np.quantile(s, c))])
def test_intervals_cover(rule):
    rng = np.random.default_rng(4)
    found = [1 - rule(rng.random(12), 0.9) for _ in range(4 * DRAWS)]  # the exact share that is not covered
    assert (above(found, 0.1) < 2) == (rule is conformal.residual_quantile)


# What a case shows ----------------------------------------------------------------------------------------------------

PROBABILITIES = arrays.arrays(np.float32, 24, elements=st.floats(0, 1, width=32))


@settings(max_examples=50, deadline=None)
@given(PROBABILITIES, arrays.arrays(np.bool_, 24), arrays.arrays(np.bool_, 24))
def test_curves_are_the_shares_of_masks(p, truth, known):
    missed = conformal.false_negative_curve(p, truth & known)
    wrong = conformal.false_discovery_curve(p, truth & known, known)
    assert (missed is None) == (not np.any(truth & known))
    for i in range(0, GRID, 40):
        mask = p >= conformal.THRESHOLDS[i]
        if missed is not None:
            assert missed[i] == pytest.approx(1 - np.sum(mask & truth & known) / np.sum(truth & known))
        if np.any(mask & known):
            assert wrong[i] == pytest.approx(np.sum(mask & ~truth & known) / np.sum(mask & known))
        else:
            assert np.isnan(wrong[i])
    assert missed is None or (missed[-1] == 0 and np.all(np.diff(missed) <= 0))


SHAPE, REGIONS = (2, 16, 16), {"whole": (1, 2), "core": (2,)}


def scene(rng, core=True):
    """Probabilities, hypotheses and the truth of a case: a disc seen through a shift of its logits."""
    z, y, x = np.indices(SHAPE)
    distance = np.hypot(y - rng.uniform(6, 10), x - rng.uniform(6, 10)) + 0 * z
    radius, shift = rng.uniform(3, 6), rng.normal(0, 0.8)

    def label(r):
        return np.where(distance < r - 2 if core else False, 2, np.where(distance < r, 1, 0))

    p = [1 / (1 + np.exp(1.5 * (distance - r - shift))) for r in (radius, radius - 2 if core else -20)]
    probability = np.stack([1 - p[0], p[0] - np.minimum(p[0], p[1]), np.minimum(p[0], p[1])], -1).astype(np.float32)
    hypotheses = np.stack([label(radius + shift + e) for e in rng.normal(0, 0.3, 4)]).astype(np.uint8)
    return probability, hypotheses, label(radius).astype(np.int32)


def told(patient, probability, hypotheses, labels, voxel_ml=0.5):
    found = case_level.volumes(hypotheses, REGIONS, voxel_ml)
    return conformal.observe(
        patient, probability, hypotheses[0], labels, REGIONS,
        predicted_dice=0.8, volumes=found, voxel_ml=voxel_ml,
    )  # fmt: skip


def test_what_is_promised_is_kept_on_new_patients():
    rng = np.random.default_rng(5)
    missed, false, dice, volume, sizes = [], [], [], [], []
    for _ in range(10):
        cases = [told(f"p{i}", *(one := scene(rng))[:2], one[2][None]) for i in range(40)]
        found = json.loads(json.dumps(conformal.fit(cases, tuple(REGIONS), **LEVELS)))  # as conformal.json holds it
        for _ in range(20):
            probability, hypotheses, label = scene(rng)
            own = case_level.volumes(hypotheses, REGIONS, 0.5)
            answer = conformal.apply(found, probability, REGIONS, predicted_dice=0.8, volumes=own)
            matrix = overlap.confusion(hypotheses[0], label, 3)
            true = np.mean([overlap.dice(matrix, (k,)) for k in (1, 2)])
            for name, members in REGIONS.items():
                truth = np.isin(label, members)
                outer, inner = answer["outer_mask"][name], answer["inner_mask"][name]
                assert not np.any(inner & ~outer)
                if name == "whole":
                    missed.append(np.mean(~outer[truth]))
                    false.append(np.mean(~truth[inner]) if inner.any() else 0.0)
                    sizes.append(outer.sum() / truth.sum())
                    low, high = answer["volume"][name]
                    volume.append(float(low - 1e-9 <= truth.sum() * 0.5 <= high + 1e-9))
            low, high = answer["dice"]
            dice.append(float(low - 1e-9 <= true <= high + 1e-9))
    assert above(missed, 0.1) < 2 and above(false, 0.1) < 2
    assert above(-np.array(dice), -0.9) < 2 and above(-np.array(volume), -0.9) < 2
    assert np.mean(sizes) < 2 and np.mean(volume) < 0.99  # not by promising everything


def test_a_patient_counts_once_and_only_those_who_have_a_region_can_miss_it():
    rng = np.random.default_rng(6)
    cases = [told(f"p{i // 2}", *(one := scene(rng, core=i % 4 < 2))[:2], one[2][None]) for i in range(40)]
    found = conformal.fit(cases, tuple(REGIONS), **LEVELS)
    assert found["patients"] == 20 and found["outer"]["whole"]["patients"] == 20
    assert found["outer"]["core"]["patients"] == 10 and found["outer"]["core"]["threshold"] is not None
    assert found["dice"]["patients"] == found["volume"]["core"]["patients"] == 20
    assert {case.patient for case in cases if "core" not in case.missed} == {f"p{i}" for i in range(1, 20, 2)}


def test_several_raters_are_averaged_and_unknown_voxels_do_not_count():
    rng = np.random.default_rng(7)
    probability, hypotheses, label = scene(rng)
    other = np.roll(label, 2, axis=1)
    both = told("p", probability, hypotheses, np.stack([label, other]))
    alone = [told("p", probability, hypotheses, one[None]) for one in (label, other)]
    for kind in ("missed", "wrong"):
        expected = np.mean([getattr(one, kind)["whole"] for one in alone], axis=0)
        np.testing.assert_allclose(getattr(both, kind)["whole"], expected)
    unknown = np.where(label == 0, -1, label)
    found = told("p", probability, hypotheses, unknown[None])
    np.testing.assert_allclose(found.missed["whole"], alone[0].missed["whole"])
    assert np.nanmax(found.wrong["whole"]) == 0


def test_too_few_patients_are_told_and_nothing_is_promised():
    rng = np.random.default_rng(8)
    cases = [told(f"p{i}", *(one := scene(rng))[:2], one[2][None]) for i in range(8)]
    found = conformal.fit(cases, tuple(REGIONS), **LEVELS)
    for kind, needed in (("outer", 9), ("inner", 22)):
        for one in found[kind].values():
            assert one["threshold"] is None and (one["patients"], one["needed"]) == (8, needed)
            assert f"needs {needed} calibration patients" in one["reason"] and "there are 8" in one["reason"]
    probability, hypotheses, _ = scene(rng)
    own = case_level.volumes(hypotheses, REGIONS, 0.5)
    answer = conformal.apply(found, probability, REGIONS, predicted_dice=0.8, volumes=own)
    assert answer["outer_mask"] == answer["inner_mask"] == answer["volume"] == {} and answer["dice"] is None
    assert len(answer["statements"]) == 7 and all(line.startswith("No ") for line in answer["statements"])
    nothing = conformal.apply(None, probability, REGIONS, predicted_dice=0.8, volumes=own)
    assert nothing["outer_mask"] == {} and nothing["statements"] == [conformal.NO_GUARANTEE]
    trained_on = conformal.fit(cases, tuple(REGIONS), **LEVELS, note="they were trained on")
    assert trained_on["patients"] == 0 and trained_on["outer"]["whole"]["threshold"] is None
    assert conformal.statements(trained_on) == ["No guarantee: they were trained on."]


def test_a_case_unlike_the_calibration_patients_is_told_that_nothing_is_promised():
    rng = np.random.default_rng(9)
    cases = [told(f"p{i}", *(one := scene(rng))[:2], one[2][None]) for i in range(40)]
    found = conformal.fit(cases, tuple(REGIONS), **LEVELS)
    assert conformal.unlike_calibration(found, ["A"], 3) == []  # a file that does not say what it was made with
    found |= {"made_with": {"hypotheses": 16, "modalities": [["A", "B"], ["B"]]}}
    assert conformal.unlike_calibration(found, ["B", "A"], 16) == []
    assert conformal.unlike_calibration(None, ["A"], 3) == []
    alone, fewer = conformal.unlike_calibration(found, ["A"], 4)
    assert "had A and nothing else" in alone and "4 hypotheses" in fewer and "16 were" in fewer

    probability, hypotheses, _ = scene(rng)
    own = case_level.volumes(hypotheses, REGIONS, 0.5)
    promised = conformal.apply(found, probability, REGIONS, predicted_dice=0.8, volumes=own)
    assert conformal.doubted(promised, []) == promised
    lines = conformal.doubted(promised, [alone])["statements"]
    assert lines[0].startswith("Not promised for this case") and lines[1:] == promised["statements"]
    nothing = conformal.apply(None, probability, REGIONS, predicted_dice=0.8, volumes=own)
    assert conformal.doubted(nothing, [alone]) == nothing


def test_what_is_promised_is_said_with_the_patients_it_rests_on():
    rng = np.random.default_rng(9)
    cases = [told(f"p{i}", *(one := scene(rng))[:2], one[2][None]) for i in range(30)]
    found = conformal.fit(cases, ("whole",), **LEVELS)
    probability, hypotheses, _ = scene(rng)
    own = case_level.volumes(hypotheses, REGIONS, 0.5)
    regions = {"whole": (1, 2)}
    lines = conformal.apply(found, probability, regions, predicted_dice=0.8, volumes=own)["statements"]
    assert len(lines) == 4 and all("30 calibration patients" in line for line in lines)
    assert lines[0].startswith("The outer mask of whole misses at most 10 % of it on average")
    assert "Dice lies between" in lines[2] and " ml: such an interval holds for 90 % of patients" in lines[3]
    for_any = conformal.statements(found)
    assert for_any[:2] == lines[:2] and for_any[2].startswith("Intervals of the Dice hold for 90 % of patients")
    no_dice = [conformal.Case(one.patient, one.missed, one.wrong, None, one.volume) for one in cases]
    found = conformal.fit(no_dice, ("whole",), **LEVELS)
    assert conformal.statements(found)[2] == "No 90 % interval of the Dice: the method predicts none."


def dice_cases(true_of, count=20):
    rng = np.random.default_rng(10)
    cases = []
    for i, predicted in enumerate(rng.uniform(0.4, 0.95, count)):
        true = true_of(predicted, rng)
        off = abs(true - predicted)
        cases.append(conformal.Case(f"p{i}", {}, {"r": np.zeros(GRID)}, off, {"r": 0.0}, predicted, true))
    return cases


def test_a_predicted_dice_is_corrected_only_where_left_out_patients_gain():
    too_high = conformal.fit(dice_cases(lambda p, rng: p - 0.3 + rng.normal(0, 0.02)), ("r",), **LEVELS)
    too_high = json.loads(json.dumps(too_high))
    curve = too_high["dice_map"]
    assert curve["reason"] == "" and curve["error_with_map"] < 0.1 < 0.25 < curve["error"]
    assert np.all(np.diff(curve["values"]) >= 0) and curve["patients"] == 20
    values = [conformal.corrected_dice(too_high, p, None) for p in (0.0, 0.6, 1.0)]
    assert values[0] == min(curve["values"]) and values[1] == pytest.approx(0.3, abs=0.06) and values[2] < 0.7
    assert conformal.corrected_dice(too_high, 0.6, (0.5, 0.7)) == 0.5  # within what is guaranteed
    right = conformal.fit(dice_cases(lambda p, rng: p + rng.normal(0, 0.05)), ("r",), **LEVELS)
    few = conformal.fit(dice_cases(lambda p, rng: p - 0.3, count=7), ("r",), **LEVELS)
    assert "no better" in right["dice_map"]["reason"] and "needs 8" in few["dice_map"]["reason"]
    for found in (right, few, None, {}):
        assert conformal.corrected_dice(found, 0.6, None) == 0.6
    assert conformal.corrected_dice(too_high, None, None) is None


def test_a_mask_that_is_always_wrong_has_no_inner_part():
    wrong = np.where(np.arange(GRID) < 5, np.nan, 1.0)
    cases = [conformal.Case(str(i), {}, {"r": wrong}, 0.0, {"r": 0.0}) for i in range(40)]
    found = conformal.fit(cases, ("r",), **LEVELS)
    assert found["inner"]["r"]["threshold"] is None and "no mask that marks anything" in found["inner"]["r"]["reason"]
    assert found["outer"]["r"]["patients"] == 0 and "with this region, there are 0" in found["outer"]["r"]["reason"]


def test_a_volume_interval_never_crosses_itself():
    single = {"volume_ml": 8.0, "interval": None}
    assert conformal.volume_interval(single, 1.0) == pytest.approx((1.0, 27.0))
    assert conformal.volume_interval(single, 3.0) == pytest.approx((0.0, 125.0))
    assert conformal.volume_interval({"volume_ml": 9.0, "interval": [1.0, 27.0]}, -0.5) == pytest.approx(
        (1.5**3, 2.5**3)
    )
    assert conformal.volume_interval({"volume_ml": 9.0, "interval": [1.0, 27.0]}, -5.0) == pytest.approx((8.0, 8.0))
