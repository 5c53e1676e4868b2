"""Guarantees that hold for a finite number of calibration patients: masks and intervals.

What is promised rests on one assumption: the next patient is exchangeable with the calibration patients, who had no
part in anything that is promised about. The network, its threshold and its checkpoint come from training and
validation patients alone, and so do the hypotheses, the delivered mask, its predicted Dice and the probability BEFORE
calibration. The calibrated probability does not: the ladder is chosen and fitted on the calibration patients, and the
usual remedy, out-of-fold predictions, is a good approximation without a theorem for the calibrator that is delivered.
So masks are level sets of the probability before calibration. Nothing has to be held back for that, every calibration
patient counts, and with two classes the sets are mostly the same: identity, temperature and isotonic maps, and vector
and Dirichlet ones in practice, keep the order of the voxels, and nested sets depend on nothing else.

The unit is the patient: slices and scans of one patient are not exchangeable draws. Levels and risks are shares in
[0, 1], volumes millilitres.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Bool, Float, Integer
from scipy.special import expit

from entrust_jax.metrics import overlap

# From the smallest mask to the full one; the last takes every voxel. In float32, as probabilities are.
THRESHOLDS = np.append(expit(np.linspace(14.0, -14.0, 561)), 0.0).astype(np.float32)
_EPS = 1e-9  # 1 / .1 must not need 11 patients
LEAST_FOR_MAP = 8  # patients from whom a map of the predicted Dice is learned

Found = dict[str, Any]


# ---- rules -------------------------------------------------------------------------------------------------------


def patients_for_risk(alpha: float) -> int:
    """The fewest patients with which `control_risk` can promise alpha: B / (n + 1) <= alpha with B = 1."""
    return math.ceil(1.0 / alpha - 1.0 - _EPS)


def patients_for_test(alpha: float, delta: float) -> int:
    """The fewest patients with which `learn_then_test` can promise alpha: (1 - alpha)^n <= delta, without any loss."""
    return math.ceil(math.log(delta) / math.log1p(-alpha) - _EPS)


def patients_for_quantile(coverage: float) -> int:
    """The fewest patients with which `residual_quantile` is finite: ceil((n + 1) coverage) <= n."""
    return math.ceil(coverage / (1.0 - coverage) - _EPS)


def control_risk(losses: Float[np.ndarray, "n g"], alpha: float) -> int | None:
    """The first of g nested sets, smallest first, with n/(n+1) mean loss + 1/(n+1) <= alpha.

    Conformal risk control (Angelopoulos et al. 2022, arXiv 2208.02814): losses in [0, 1], one row per patient, that do
    not rise along a row and are at most alpha at its end; then the expected loss of the next patient is at most alpha.
    None with fewer than `patients_for_risk` patients. Raises ValueError for a loss that rises.
    """
    if np.any(np.diff(losses, axis=1) > 1e-6):
        raise ValueError("a loss rises with the size of the set: conformal risk control does not hold for it")
    n = len(losses)
    if n < patients_for_risk(alpha):
        return None
    bound = (losses.sum(axis=0) + 1.0) / (n + 1)
    good = np.flatnonzero(bound <= alpha + _EPS)
    return int(good[0]) if len(good) else None


def hoeffding_bentkus(risk: Float[np.ndarray, " g"], n: int, alpha: float) -> Float[np.ndarray, " g"]:
    """p-values of "the true risk exceeds alpha" for mean losses in [0, 1] of n patients.

    min(exp(-n KL(min(r, alpha) || alpha)), e P(Bin(n, alpha) <= ceil(n r))) (Bates et al. 2021, arXiv 2101.02703).
    """
    r = np.minimum(np.asarray(risk, np.float64), alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(r > 0, r * np.log(r / alpha), 0.0)
        second = np.where(r < 1, (1 - r) * np.log((1 - r) / (1 - alpha)), 0.0)
    tail = math.e * scipy.stats.binom.cdf(np.ceil(n * np.asarray(risk, np.float64) - _EPS), n, alpha)
    return np.minimum(1.0, np.minimum(np.exp(-n * (first + second)), tail))


def learn_then_test(losses: Float[np.ndarray, "n g"], alpha: float, delta: float) -> int | None:
    """The last set along the sequence, safest first, before the first whose risk cannot be said to be below alpha.

    Learn then Test with a fixed sequence (Angelopoulos et al. 2021, arXiv 2110.01052): losses in [0, 1], one row per
    patient, in any shape along it. With probability 1 - delta over the calibration patients every set up to this one
    has a true risk of at most alpha. None where not even the first passes.
    """
    passed = hoeffding_bentkus(losses.mean(axis=0), len(losses), alpha) <= delta
    stop = len(passed) if passed.all() else int(np.argmin(passed))
    return stop - 1 if stop else None


def residual_quantile(scores: Float[np.ndarray, " n"], coverage: float) -> float | None:
    """The ceil((n + 1) coverage)-th smallest score, which the next patient's stays below with probability >= coverage.

    Split conformal prediction (Vovk et al. 2005). None with fewer than `patients_for_quantile` patients.
    """
    rank = math.ceil((len(scores) + 1) * coverage - _EPS)
    return float(np.sort(scores)[rank - 1]) if 0 < rank <= len(scores) else None


# ---- what one case shows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How far the prediction of one calibration case is off.

    missed: region -> share of its true voxels outside {p >= t}, for every t of THRESHOLDS (FNR); only regions that the
    case has. wrong: region -> share of {p >= t} outside the truth, NaN where {p >= t} is empty (FDR). dice:
    |true - predicted| Dice, None where none is predicted. volume: region -> how far the true volume's cube root lies
    outside that of the hypotheses' interval, negative inside. Against several raters each is the mean over them, but
    for the volume, which is compared with the raters' mean. predicted_dice, true_dice: the two themselves.
    """

    patient: str
    missed: dict[str, np.ndarray]
    wrong: dict[str, np.ndarray]
    dice: float | None
    volume: dict[str, float]
    predicted_dice: float | None = None
    true_dice: float | None = None


def region_probability(probability: Float[np.ndarray, "*s k"], members: Sequence[int]) -> Float[np.ndarray, "*s"]:
    """Probability of a union of classes, in float32."""
    return probability[..., list(members)].sum(axis=-1).astype(np.float32)


def false_negative_curve(p: Float[np.ndarray, "*s"], truth: Bool[np.ndarray, "*s"]) -> Float[np.ndarray, " g"] | None:
    """Share of the truth outside {p >= t} for every t of THRESHOLDS; None where there is no truth to miss."""
    inside = np.sort(p[truth])
    return np.searchsorted(inside, THRESHOLDS, side="left") / len(inside) if len(inside) else None


def false_discovery_curve(
    p: Float[np.ndarray, "*s"], truth: Bool[np.ndarray, "*s"], known: Bool[np.ndarray, "*s"]
) -> Float[np.ndarray, " g"]:
    """Share of the known voxels of {p >= t} outside the truth for every t of THRESHOLDS; NaN where it is empty."""

    def count(values: np.ndarray) -> np.ndarray:
        return len(values) - np.searchsorted(np.sort(values), THRESHOLDS, side="left")

    marked, false = count(p[known]), count(p[known & ~truth])
    return np.where(marked > 0, false / np.maximum(marked, 1), np.nan)


def observe(
    patient: str,
    probability: Float[np.ndarray, "d h w k"],
    delivered: Integer[np.ndarray, "d h w"],
    labels: Integer[np.ndarray, "r d h w"],
    regions: Mapping[str, Sequence[int]],
    *,
    predicted_dice: float | None,
    volumes: Mapping[str, Mapping[str, Any]],
    voxel_ml: float,
) -> Case:
    """One labelled case: probability before calibration, the delivered mask, the raters' labels (-1 = unknown).

    volumes: `case.volumes` of the hypotheses.
    """
    missed, wrong, volume = {}, {}, {}
    known = labels >= 0
    for name, members in regions.items():
        p = region_probability(probability, members)
        truth = np.isin(labels, list(members))
        curves = [false_negative_curve(p, one) for one in truth]
        curves = [curve for curve in curves if curve is not None]
        if curves:
            missed[name] = np.mean(curves, axis=0)
        each = [false_discovery_curve(p, one, seen) for one, seen in zip(truth, known, strict=True)]
        wrong[name] = np.mean(each, axis=0)
        low, high = _roots(volumes[name])
        true = math.cbrt(truth.sum() / len(truth) * voxel_ml)
        volume[name] = max(low - true, true - high)
    true_dice = float(np.mean([_dice(delivered, label, probability.shape[-1]) for label in labels]))
    error = None if predicted_dice is None else abs(true_dice - predicted_dice)
    return Case(patient, missed, wrong, error, volume, predicted_dice, true_dice)


def _dice(delivered: np.ndarray, label: np.ndarray, classes: int) -> float:
    """Mean over the foreground classes, 1 where both lack the class: what is predicted (`case.dice_bayes`)."""
    matrix = overlap.confusion(delivered, label, classes)
    return float(np.mean(np.nan_to_num([overlap.dice(matrix, (k,)) for k in range(1, classes)], nan=1.0)))


def _roots(volume: Mapping[str, Any]) -> tuple[float, float]:
    """Cube roots of the ends of the hypotheses' interval, or of the volume where there is one mask only.

    The cube root is in proportion to the diameter, so one margin serves small and large lesions alike. Ours.
    """
    low, high = volume["interval"] or (volume["volume_ml"],) * 2
    return math.cbrt(low), math.cbrt(high)


# ---- calibration patients to guarantees --------------------------------------------------------------------------


def fit(
    cases: Sequence[Case], regions: Sequence[str], *, fnr: float, fdr: float, coverage: float, note: str = ""
) -> Found:
    """Thresholds and margins from the calibration cases, as conformal.json holds them.

    outer: per region the largest threshold whose mask misses at most a share `fnr` of the region, on average over the
    next patients that have it (`control_risk`; a patient without the region can miss nothing and would dilute the
    promise). inner: per region the smallest threshold of whose mask at most a share `fdr` lies outside the region, on
    average over the next patients, with probability `coverage` over the calibration patients (`learn_then_test`;
    never below the outer threshold). dice, volume: margins that contain the truth of the next patient with
    probability `coverage` (`residual_quantile`; conformalised quantiles, Romano et al. 2019, arXiv 1905.03222, for
    volumes). A patient's loss is the mean over his cases, his residual the largest of them.

    Every entry has `patients`, the number it rests on, and `needed`, the fewest that could do; where there are too
    few, or nothing passes, the value is None and `reason` says why. `note` refuses everything, for that reason.
    """
    people: dict[str, list[Case]] = {}
    for case in [] if note else cases:
        people.setdefault(case.patient, []).append(case)
    each = list(people.values())
    found: Found = {
        "levels": {"fnr": fnr, "fdr": fdr, "coverage": coverage},
        "patients": len(each),
        "note": note,
        "outer": {name: _outer(each, name, fnr) for name in regions},
    }
    return found | {
        "inner": {name: _inner(each, name, fdr, 1.0 - coverage, found["outer"][name]["threshold"]) for name in regions},
        "dice": _margin([[case.dice for case in own if case.dice is not None] for own in each], coverage),
        "volume": {name: _margin([[case.volume[name] for case in own] for own in each], coverage) for name in regions},
        "dice_map": dice_map(each),
    }


def _outer(people: Sequence[Sequence[Case]], region: str, alpha: float) -> Found:
    curves = [[case.missed[region] for case in own if region in case.missed] for own in people]
    losses = np.array([np.mean(own, axis=0) for own in curves if own]).reshape(-1, len(THRESHOLDS))
    index, needed = control_risk(losses, alpha), patients_for_risk(alpha)
    if index is None:
        return _refusal("threshold", len(losses), needed, "with this region")
    return {
        "threshold": float(THRESHOLDS[index]), "patients": len(losses), "needed": needed, "reason": "",
        "risk": float(losses[:, index].mean()),
    }  # fmt: skip


def _inner(people: Sequence[Sequence[Case]], region: str, alpha: float, delta: float, outer: float | None) -> Found:
    needed, count = patients_for_test(alpha, delta), len(people)
    if count < needed:
        return _refusal("threshold", count, needed)
    curves = [np.array([case.wrong[region] for case in own]) for own in people]
    losses = np.array([np.nan_to_num(own, nan=0.0).mean(axis=0) for own in curves])
    index = learn_then_test(losses, alpha, delta)
    if index is not None and outer is not None:  # a set before the last one has passed, too
        index = min(index, int(np.flatnonzero(np.float32(outer) <= THRESHOLDS)[-1]))
    if index is None or not any(np.isfinite(own[:, index]).any() for own in curves):
        reason = "no mask that marks anything passes the test on these patients"
        return {"threshold": None, "patients": count, "needed": needed, "reason": reason}
    return {
        "threshold": float(THRESHOLDS[index]), "patients": count, "needed": needed, "reason": "",
        "risk": float(losses[:, index].mean()),
    }  # fmt: skip


def _margin(residuals: Sequence[Sequence[float]], coverage: float) -> Found:
    scores = np.array([max(own) for own in residuals if own], np.float64)
    margin, needed = residual_quantile(scores, coverage), patients_for_quantile(coverage)
    if residuals and not len(scores):
        return {"margin": None, "patients": 0, "needed": needed, "reason": "the method predicts none"}
    if margin is None:
        return _refusal("margin", len(scores), needed)
    return {"margin": margin, "patients": len(scores), "needed": needed, "reason": ""}


def dice_map(people: Sequence[Sequence[Case]]) -> Found:
    """A rising map from the predicted Dice to the true one, from each patient's cases, or why there is none.

    It is used where patients who were left out of it have a smaller mean error with it than without, by more than a
    standard error of the difference; else the predicted Dice stays as it is. knots, values: the map between them is
    linear, beyond them constant; None where there is none. Isotonic regression (Barlow et al. 1972); the choice: ours.
    """
    pairs = [np.array([(one.predicted_dice, one.true_dice) for one in own if one.predicted_dice is not None])
             for own in people]  # fmt: skip
    pairs = [own.astype(np.float64).reshape(-1, 2) for own in pairs if len(own)]
    found: Found = {"knots": None, "values": None, "patients": len(pairs)}
    if len(pairs) < LEAST_FOR_MAP:
        return found | {"reason": f"it needs {LEAST_FOR_MAP} calibration patients, there are {len(pairs)}"}
    before, after = [], []
    for i, own in enumerate(pairs):
        curve = isotonic(np.concatenate(pairs[:i] + pairs[i + 1 :]))
        before.append(np.mean(np.abs(own[:, 0] - own[:, 1])))
        after.append(np.mean(np.abs(np.interp(own[:, 0], *curve) - own[:, 1])))
    gain = np.array(before) - np.array(after)
    found |= {"error": float(np.mean(before)), "error_with_map": float(np.mean(after))}
    if gain.mean() <= gain.std(ddof=1) / math.sqrt(len(gain)):
        return found | {"reason": "left-out patients are predicted no better with one"}
    knots, values = isotonic(np.concatenate(pairs))
    return found | {"knots": knots.tolist(), "values": values.tolist(), "reason": ""}


def isotonic(pairs: Float[np.ndarray, "n 2"]) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Knots and values of the rising map nearest to (x, y) pairs; pairs of one x count as their mean."""
    knots, place, count = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    y = np.bincount(place, pairs[:, 1]) / count
    return knots, np.asarray(scipy.optimize.isotonic_regression(y, weights=count.astype(np.float64)).x)


def corrected_dice(found: Found | None, predicted: float | None, interval: tuple[float, float] | None) -> float | None:
    """The predicted Dice under `dice_map`, within its guaranteed interval, which is about the one before the map."""
    curve = (found or {}).get("dice_map") or {}
    if predicted is None or curve.get("knots") is None:
        return predicted
    value = float(np.interp(predicted, curve["knots"], curve["values"]))
    return value if interval is None else float(np.clip(value, *interval))


def _refusal(key: str, count: int, needed: int, which: str = "") -> Found:
    reason = f"needs {needed} calibration patients {which}".strip() + f", there are {count}"
    return {key: None, "patients": count, "needed": needed, "reason": reason}


# ---- guarantees to a new case ------------------------------------------------------------------------------------

NO_GUARANTEE = "No guarantee: this model has no conformal.json; run its train command again, which adds it in minutes."


def apply(
    found: Found | None,
    probability: Float[np.ndarray, "d h w k"],
    regions: Mapping[str, Sequence[int]],
    *,
    predicted_dice: float | None,
    volumes: Mapping[str, Mapping[str, Any]],
) -> Found:
    """What `fit` found (None: nothing was fitted), for a new case.

    probability: before calibration. Returns
        outer_mask, inner_mask  region -> bool [d h w], regions with a guarantee only
        dice                    (low, high) in [0, 1], or None
        volume                  region -> (low, high) in ml, where there is one
        statements              what is guaranteed, and what is not and why, a sentence each
    """
    if found is None:
        return {"outer_mask": {}, "inner_mask": {}, "dice": None, "volume": {}, "statements": [NO_GUARANTEE]}
    masks: dict[str, dict[str, np.ndarray]] = {"outer": {}, "inner": {}}
    for name, members in regions.items():
        p = region_probability(probability, members)
        for kind, own in masks.items():
            threshold = found[kind][name]["threshold"]
            if threshold is not None:
                own[name] = p >= np.float32(threshold)
    dice, margin = None, found["dice"]["margin"]
    if margin is not None and predicted_dice is not None:
        dice = (max(0.0, predicted_dice - margin), min(1.0, predicted_dice + margin))
    volume = {
        name: volume_interval(volumes[name], found["volume"][name]["margin"])
        for name in regions
        if found["volume"][name]["margin"] is not None
    }
    named = {f"{kind}_mask": own for kind, own in masks.items()}
    return {**named, "dice": dice, "volume": volume, "statements": statements(found, dice, volume)}


def unlike_calibration(found: Found | None, modalities: Sequence[str], hypotheses: int) -> list[str]:
    """Why a case is not one of those that `found` speaks of, as far as one knows: reasons for `doubted`.

    modalities: those that the case has; hypotheses: as many as are drawn of it. Compared with `made_with`, what the
    calibration cases had; nothing is known of a conformal.json without it.
    """
    reasons, made = [], (found or {}).get("made_with")
    if made and sorted(modalities) not in [sorted(own) for own in made["modalities"]]:
        reasons.append(f"no calibration patient had {' + '.join(modalities)} and nothing else")
    if made and hypotheses != made["hypotheses"]:
        reasons.append(f"{hypotheses} hypotheses are drawn of it, {made['hypotheses']} were of calibration cases")
    return reasons


def doubted(promised: Found, reasons: Sequence[str]) -> Found:
    """What `apply` returns, with the reasons why it is not promised of this case said before all else."""
    given = any(promised[key] for key in ("outer_mask", "inner_mask", "dice", "volume"))
    lines = [f"Not promised for this case is what follows: {reason}." for reason in reasons] if given else []
    return promised | {"statements": [*lines, *promised["statements"]]}


def volume_interval(volume: Mapping[str, Any], margin: float) -> tuple[float, float]:
    """Interval in ml of one of `case.volumes`, widened (or narrowed) by the margin in cube roots."""
    low, high = _roots(volume)
    low, high = low - margin, high + margin
    if low > high:  # narrowed to nothing: a point covers no less
        low = high = (low + high) / 2
    return max(low, 0.0) ** 3, max(high, 0.0) ** 3


def statements(
    found: Found, dice: tuple[float, float] | None = None, volume: Mapping[str, tuple[float, float]] | None = None
) -> list[str]:
    """What is guaranteed and what is not, a sentence each, with the number of patients it rests on.

    dice, volume: the intervals of a case (`apply`); without both, of cases in general.
    """
    if found["note"]:
        return [f"No guarantee: {found['note']}."]
    fnr, fdr, coverage = (f"{100 * found['levels'][name]:g} %" for name in ("fnr", "fdr", "coverage"))
    lines = []
    for name, one in found["outer"].items():
        lines.append(
            f"No outer mask of {name} at {fnr} missed: it {one['reason']}."
            if one["threshold"] is None
            else f"The outer mask of {name} misses at most {fnr} of it on average over patients who have it and are "
            f"like the {one['patients']} calibration patients that this rests on."
        )
    for name, one in found["inner"].items():
        lines.append(
            f"No inner mask of {name} at {fdr} false: {_of(one)}."
            if one["threshold"] is None
            else f"At most {fdr} of the inner mask of {name} is false on average over patients like the "
            f"{one['patients']} calibration patients that this rests on, an empty mask counted as not false; so it is "
            f"for {coverage} of such calibrations."
        )
    entries = {"Dice": (found["dice"], dice)}
    entries |= {f"volume of {name}": (one, (volume or {}).get(name)) for name, one in found["volume"].items()}
    for name, (one, interval) in entries.items():
        if one["margin"] is None:
            lines.append(f"No {coverage} interval of the {name}: {_of(one)}.")
        elif dice is None and volume is None:  # of no case
            lines.append(
                f"Intervals of the {name} hold for {coverage} of patients like the {one['patients']} calibration "
                "patients that this rests on."
            )
        elif interval is not None:
            unit = "" if name == "Dice" else " ml"
            lines.append(
                f"The true {name} lies between {interval[0]:.3g} and {interval[1]:.3g}{unit}: such an interval holds "
                f"for {coverage} of patients like the {one['patients']} calibration patients that this rests on."
            )
    return lines


def _of(entry: Found) -> str:
    return f"it {entry['reason']}" if entry["reason"].startswith("needs") else entry["reason"]
