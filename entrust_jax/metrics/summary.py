"""From the scores of many cases to figures with intervals.

Cases of one patient are joined first (scalars averaged, sums added): the patient is the unit of every interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from entrust_jax.metrics import calibration, conflict, lesions, statistics, usefulness
from entrust_jax.metrics.scoring import GEOMETRY, NSD_TOLERANCE, Scores, Targets

COUNTS = ("lesions", "lesions_missed", "lesions_spurious")  # per case and group; in the table of cases alone
RATER_METRICS = ("ged2", "hm_iou", "d_max", "ci_score")  # of hypotheses against several raters
# What became of the guarantees (`conformal.apply`) on these patients.
GUARANTEED = ("outer_fnr", "outer_size", "inner_fdr", "inner_size", "dice_covered", "volume_covered")
AREAS = ("aurc_referral", "aurc")  # under risk-coverage curves: beside them stand a random and the best order
REFERRED = (0.0, 0.1, 0.2, 0.3, 0.5)  # shares of the patients that a person looks at

CONVENTIONS = {
    "patients": "cases of one patient are joined before anything else; intervals resample "
    "patients (BCa, 2000 resamples; recentred percentiles where resampling shifts the figure, as with ECE)",
    "dice": "per case in 3-D; mean over the regions (over the foreground classes "
    "where the config names no region); empty truth with empty prediction is "
    "left out and counted in empty",
    "unimodal_dice": "dice of each modality's own posterior p_m, its likeliest class, over the cases that have it",
    "location_dice": "dice of the mean mask of the training cases in the body's box, which knows the place alone; its "
    "threshold is the best one on those cases",
    "hd95": "mm, voxel-centre surface distances, face neighbours; max_of_directed = "
    "MONAI, pooled = MedPy; area_weighted = DeepMind's surface-distance (elements between voxels, by area; the larger "
    "of the two directed); an empty mask on either side is left out and "
    "counted in empty; a case of one slice has a contour in place of a surface, here and in what follows",
    "nsd": "normalised surface Dice: share of both surfaces within tolerance_mm of the other one; area_weighted = "
    "DeepMind's surface-distance and MONAI with use_subvoxels, voxels (nsd_voxels) = MONAI; 0 where one mask is empty, "
    "both empty left out and counted in empty; where the header's spacing is nominal, so is the tolerance",
    "lesion_dice": "BraTS 2023: the truth grown by `dilation` voxels (18 neighbours), what touches then is one lesion; "
    "every piece of the prediction (26 neighbours) that meets it is its own; mean over the lesions above floor_mm3 and "
    "the pieces without a lesion, missed lesions and such pieces 0; neither lesion nor piece: 1 (lesion_hd95 "
    "0). Voxels without a label are background on both sides, and may part a lesion",
    "lesion_hd95": "mm, the same with hd95 area_weighted; missed lesions and pieces without a lesion 374 mm",
    "lesion_f1": "2 found / (2 found + missed + spurious) of the same lesions and pieces, per case",
    "roi": "union over the compared methods of {foreground probability > .05}, "
    "dilated by 5 voxels (square, in plane); knows neither the truth nor the "
    "body mask",
    "ece_classwise": "mean over all classes of sum_b n_b/n |accuracy - confidence|, 15 "
    "equal-width bins, pooled over patients",
    "ece_classwise_roi_per_patient": "the same per patient, then the mean; even the exact posterior is not 0 here",
    "ece_top_label": "largest probability, 15 equal-width bins, pooled over patients",
    "nll": "nats per voxel in the ROI (nll_body: in the body), p floored at 1e-6, pooled over patients",
    "brier": "sum over classes, in [0, 2], in the ROI (brier_body: in the body), pooled over patients",
    "error_auroc": "does the error probability rank the delivered label's wrong voxels above "
    "its right ones, ROI, voxels pooled over patients, ties half; entropy_*: "
    "the same with the predictive entropy",
    "error_auprc": "average precision of the same; chance is the prevalence beside it",
    "aurc_referral": "area under risk-coverage: the mean of its n points, risk = 1 - dice per case, cases in the order "
    "of referral.csv: by the trust score (the predicted Dice before the calibration patients correct it, for a method "
    "without one 1 - mean error probability; 0 where nothing was found), of equal ones those with the larger mean "
    "error probability in the ROI first. random: 1 - mean dice, the area without an order; oracle: that in the order "
    "of the true dice; excess_*: the area less the oracle's. A case without a dice has no risk, so an empty label "
    "counts here only where it is wrong",
    "aurc": "the same, confidence = minus the mean error probability in the ROI",
    "predicted_dice_mae": "mean |predicted Dice - dice_by_class| (mean over the foreground classes, "
    "empty truth with empty prediction 1: what the prediction estimates)",
    "predicted_dice_spearman": "rank correlation of the same two over three patients or more; ties share a rank",
    "conformal": "per region, mean over patients: outer_fnr, share of the truth outside the outer mask, patients with "
    "the region only; inner_fdr, share of the inner mask outside the truth, 0 for an empty mask; outer_size and "
    "inner_size, the mask's voxels over the truth's; dice_covered and volume_covered, share of the patients (of one "
    "with several cases: of these) whose true Dice (dice_by_class) or volume lies in its interval",
    "referral": "mean dice of the patients that are left when the share `referred` that comes first in the order of "
    "referral goes to a person; the nearest whole number of patients, of equals the mean",
    "hypothesis_diversity": "E d(X, X'), d = 1 - IoU averaged over the foreground classes, empty with "
    "empty IoU 1, unbiased over pairs (comparable between numbers of "
    "hypotheses)",
    "hypothesis_dice": "mean Dice over pairs of hypotheses and foreground classes, both empty left out",
    "interslice_dice": "Dice of the foreground of neighbouring slices within a hypothesis, of pairs with some; "
    "interslice_dice_truth: the same of the truth. hypotheses_cover_volume: share of patients whose true volume lies "
    "within the 5th to 95th percentile of the hypotheses' (90 % if they were calibrated)",
    "raters": "of several raters every figure is the mean over them, each being the truth once, in calibration too; a "
    "voxel that some rater does not know is background on both sides in ged2 to rater_diversity, which only cases of "
    "several raters have; a method that draws no hypotheses has one there, the delivered label",
    "ged2": "squared generalised energy distance 2 E d(X, Y) - E d(X, X') - E d(Y, Y'), d = 1 - IoU averaged over the "
    "foreground classes, empty with empty IoU 1, V-statistic over N hypotheses X and R raters Y (N and R beside it); "
    "depends on N: compared at equal N only",
    "hm_iou": "mean IoU of the best one-to-one matching of hypotheses to raters, both repeated to lcm(N, R); empty "
    "with empty 1; compared at equal N only",
    "d_max": "mean over raters of the best hypothesis's Dice, mean over the foreground classes, empty with empty 1; "
    "grows with N: compared at equal N only",
    "ci_score": "collective insight: harmonic mean of combined sensitivity (1 where no rater marks anything), d_max "
    "and diversity agreement in pairwise 1 - Dice (a single hypothesis has spread 0), per foreground class, then their "
    "mean; compared at equal N only",
    "diversity": "hypothesis_diversity over the cases of several raters; rater_diversity: the same of their raters, "
    "unbiased over pairs too",
    "tower": "mean |p_1 - p_bar|_1 / 2 (gap) where .1 < foreground share of p_bar < .9, "
    "against 1/2 sum_k .92 sqrt(p_k (1 - p_k) / N) + .02 "
    "(bound)",
    "conflict_alignment": "divergence (nats) of voxels with conflict > .1 less that of the others "
    "within strata of equal one-step entropy and border distance (mm), in the body and ROI of "
    "the slices for which hypotheses were drawn; the "
    "permutation null takes voxels as exchangeable within a stratum, "
    "p_sign_flip takes patients",
}


@dataclass(frozen=True)
class Quantity:
    """A statistic with its per-patient data [n, ...]. `valid`: patients that contribute; `paired`: a single
    patient has a value of its own."""

    data: Shaped[np.ndarray, "n ..."]
    valid: Bool[np.ndarray, " n"]
    reduce: Callable[[np.ndarray, np.ndarray], float]
    paired: bool = True

    def each(self) -> Float[np.ndarray, " n"]:
        """The value of every patient alone, NaN where it has none."""
        return np.array([self.reduce(row[None], np.ones(1)) for row in self.data], np.float64)

    def statistic(self, chosen: Bool[np.ndarray, " n"]) -> statistics.Statistic:
        """The statistic over the chosen patients, as a function of their weights."""
        data = self.data[chosen]
        return lambda weights: self.reduce(data, weights)


def join_patients(cases: Sequence[Scores]) -> list[Scores]:
    """One Scores per patient, in the order of first appearance: finite scalars averaged, sums and
    alignments added."""
    members: dict[str, list[Scores]] = {}
    for case in cases:
        members.setdefault(case.patient, []).append(case)
    joined = []
    for patient, own in members.items():
        keys = dict.fromkeys(key for case in own for key in case.values)
        values = {key: statistics.finite_mean([case.values.get(key, np.nan) for case in own]) for key in keys}
        sums = {key: np.sum([case.sums[key] for case in own], axis=0) for key in own[0].sums}
        aligned = own[0].alignment
        for case in own[1:]:
            if aligned is not None and case.alignment is not None:
                aligned = conflict.add(aligned, case.alignment)
        joined.append(Scores(patient, patient, values, sums, aligned, own[0].entropy_source))
    return joined


def quantities(patients: Sequence[Scores]) -> dict[str, Quantity]:
    """Every statistic by name over joined patients; only those whose ingredients the method has."""
    found: dict[str, Quantity] = {}
    renamed = {"predicted_dice_error": "predicted_dice_mae", "seconds": "seconds_per_case"}
    skipped = ("uncertainty", "trust", "predicted_dice", "roi_voxels", "volume_ml", "true_volume_ml", "hypotheses")
    skipped += ("raters", *COUNTS)
    for key in dict.fromkeys(key for one in patients for key in one.values):
        if key.partition("/")[0] not in skipped:
            data = np.array([one.values.get(key, np.nan) for one in patients], np.float64)
            found[renamed.get(key, key)] = Quantity(data, np.isfinite(data), statistics.weighted_mean)
    for stage in ("before", "after"):
        for name, source in (
            ("ece_classwise_roi", "bins_roi"),
            ("ece_classwise_body", "bins_body"),
            ("ece_top_label_roi", "top_roi"),
        ):
            found[f"{name}/{stage}"] = _pooled(patients, f"{source}/{stage}", calibration.classwise_ece)
        alone = found[f"ece_classwise_roi/{stage}"].each()
        found[f"ece_classwise_roi_per_patient/{stage}"] = Quantity(alone, np.isfinite(alone), statistics.weighted_mean)
        for name in ("nll", "nll_body", "brier", "brier_body"):
            found[f"{name}/{stage}"] = _pooled(patients, f"{name}/{stage}", _ratio)
    for prefix, source in (("error", "error"), ("entropy", "entropy_error")):
        found[f"{prefix}_auroc"] = _pooled(patients, source, usefulness.auroc_from_histogram)
        found[f"{prefix}_auprc"] = _pooled(patients, source, usefulness.average_precision_from_histogram)
    found["error_prevalence"] = _pooled(patients, "error", usefulness.prevalence_from_histogram)
    cases = risk_and_confidence(patients)
    ranked = np.asarray(np.isfinite(cases).all(axis=1))
    for column, order in ((1, "_referral"), (2, "")):
        for name, area in (("aurc", usefulness.aurc), ("excess_aurc", usefulness.excess_aurc)):
            found[f"{name}{order}"] = Quantity(cases[:, [0, column]], ranked, _repeated(area), paired=False)
    if any("predicted_dice" in one.values for one in patients):
        keys = ("predicted_dice", "dice_by_class")
        pairs = np.array([[one.values.get(key, np.nan) for key in keys] for one in patients], np.float64)
        known = np.asarray(np.isfinite(pairs).all(axis=1))
        found["predicted_dice_spearman"] = Quantity(pairs, known, _repeated(_spearman), paired=False)
    if "tower" in patients[0].sums:
        found["tower_gap"] = _pooled(patients, "tower", lambda sums: _ratio(sums[[0, 2]]))
        found["tower_bound"] = _pooled(patients, "tower", lambda sums: _ratio(sums[[1, 2]]))
    return found


def _pooled(patients: Sequence[Scores], key: str, reduce: Callable[[np.ndarray], float]) -> Quantity:
    data = np.stack([one.sums[key] for one in patients])
    valid = np.asarray(data.reshape(len(patients), -1).any(axis=1))
    return Quantity(data, valid, lambda rows, weights: reduce(np.tensordot(weights, rows, 1)))


def _ratio(sums: Float[np.ndarray, "2"]) -> float:
    return float(sums[0] / sums[1]) if sums[1] > 0 else float("nan")


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    return conflict.partial_spearman(x, y, [])


def _repeated(area: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    def reduce(rows: np.ndarray, weights: np.ndarray) -> float:
        drawn = np.repeat(rows, weights.astype(np.int64), axis=0)
        return area(drawn[:, 0], drawn[:, 1])

    return reduce


def risk_and_confidence(patients: Sequence[Scores]) -> Float[np.ndarray, "n 3"]:
    """(1 - Dice, place in the order of referral, minus the mean error probability) per patient, NaN where undefined."""
    dice, score, error = np.array(
        [[one.values[key] for key in ("dice", "trust", "uncertainty")] for one in patients], np.float64
    ).T
    return np.stack([1 - dice, usefulness.places(score, error), -error], axis=1)


def order_bounds(patients: Sequence[Scores]) -> dict[str, float]:
    """What an AURC stands beside: {"random", "oracle"}, the areas that cases in no order, and in that of their true

    Dice, would have; {} where no patient has a Dice. An order whose area is above the random one's is worth less than
    none.
    """
    cases = risk_and_confidence(patients)
    risk = cases[np.isfinite(cases).all(axis=1), 0]
    return {"random": float(risk.mean()), "oracle": usefulness.aurc(risk, -risk)} if risk.size else {}


def case_row(case: Scores) -> dict[str, Any]:
    """One case as a flat row for a table; undefined values are NaN."""
    alone = {key: q.each()[0] for key, q in quantities([case]).items() if q.paired}
    row = {"case": case.name, "patient": case.patient, **case.values, **alone}
    for longer, shorter in (("predicted_dice_mae", "predicted_dice_error"), ("seconds_per_case", "seconds")):
        row.pop(longer, None)  # the same number under its name for one case
        row.setdefault(shorter, float("nan"))
    return row


def summarise(cases: Sequence[Scores], targets: Targets, *, resamples: int = statistics.RESAMPLES) -> dict[str, Any]:
    """Every figure of one method: {"<metric>": {"value", "ci95", "n"[, "reason"]}}, with {"before",
    "after"} where calibration matters, {"<class or region>": figure} under dice_by_group and the
    like."""
    patients = join_patients(cases)
    table = quantities(patients)
    done = {
        key: statistics.figure(q.statistic(q.valid), int(q.valid.sum()), resamples=resamples)
        for key, q in table.items()
    }
    rule = lesions.RULES[targets.lesion_rule]
    ruled = {"rule": targets.lesion_rule, "dilation": rule.dilation, "floor_mm3": rule.floor}
    conventions: dict[str, dict[str, Any]] = {
        "dice": {"mean_over": targets.headline()},
        "hd95": {"convention": "max_of_directed", "unit": "mm"},
        "hd95_pooled": {"convention": "pooled", "unit": "mm"},
        "hd95_area_weighted": {"convention": "area_weighted", "unit": "mm"},
        "nsd": {"convention": "area_weighted", "tolerance_mm": NSD_TOLERANCE},
        "nsd_voxels": {"convention": "voxels", "tolerance_mm": NSD_TOLERANCE},
        "lesion_dice": ruled,
        "lesion_hd95": {**ruled, "unit": "mm"},
        "lesion_f1": ruled,
    }
    summary: dict[str, Any] = {}
    for metric in GEOMETRY:
        empty = sum(not np.isfinite(case.values[metric]) for case in cases)
        summary[metric] = {**done[metric], "empty": empty, **conventions[metric]}
        summary[f"{metric}_by_group"] = {group: done[f"{metric}/{group}"] for group in targets.groups()}
    for key, value in done.items():
        metric, _, stage = key.partition("/")
        if stage in ("before", "after") and metric not in GEOMETRY:
            summary.setdefault(metric, {})[stage] = value
    for key in ("error_auroc", "entropy_auroc", "excess_aurc_referral", "excess_aurc"):
        summary[key] = done[key]
    for key in AREAS:
        summary[key] = {**done[key], **order_bounds(patients)}
    for key in ("error_auprc", "entropy_auprc"):
        summary[key] = {**done[key], "prevalence": done["error_prevalence"]["value"]}
    for key in (
        "location_dice",
        "predicted_dice_mae",
        "predicted_dice_spearman",
        "hypothesis_diversity",
        "hypothesis_dice",
        "interslice_dice",
        "interslice_dice_truth",
        "diversity",
        "rater_diversity",
        "mean_conflict_body",
        "seconds_per_case",
    ):
        if key in done:
            summary[key] = done[key]
    for key in done:
        metric, _, region = key.partition("/")
        if metric in GUARANTEED:
            one = summary.setdefault("conformal", {}).setdefault(metric, {})
            one |= {region: done[key]} if region else done[key]
    covered = {key.partition("/")[2]: one for key, one in done.items() if key.startswith("hypotheses_cover_volume/")}
    if covered:
        summary["hypotheses_cover_volume"] = covered
    summary["referral"] = referral(patients)
    if "ged2" in done:
        summary |= {key: {**done[key], **set_sizes(cases)} for key in RATER_METRICS}
    alone = {key.partition("/")[2]: one for key, one in done.items() if key.startswith("unimodal_dice/")}
    if alone:
        summary["unimodal_dice"] = alone
    if "tower_gap" in done:
        gap, bound = done["tower_gap"], done["tower_bound"]
        holds = None if gap["value"] is None else gap["value"] <= bound["value"]
        summary["tower"] = {"gap": gap, "bound": bound, "holds": holds}
    aligned = [one.alignment for one in patients if one.alignment is not None]
    if aligned:
        found = conflict.alignment_summary(aligned, resamples=resamples)
        summary["conflict_alignment"] = {
            **found,
            "stratified_by": [patients[0].entropy_source, "border distance"],
        }
    return summary


def referral(patients: Sequence[Scores]) -> dict[str, list[float]]:
    """The referral curve at the shares of REFERRED: {"referred", "dice"}; of patients that have a Dice."""
    cases = risk_and_confidence(patients)
    cases = cases[np.isfinite(cases).all(axis=1)]
    if not len(cases):
        return {"referred": [], "dice": []}
    shares, dice = usefulness.referral_curve(1 - cases[:, 0], -cases[:, 1])
    nearest = [int(np.argmin(np.abs(shares - share))) for share in REFERRED]
    return {"referred": [float(shares[i]) for i in nearest], "dice": [float(dice[i]) for i in nearest]}


def set_sizes(cases: Sequence[Scores]) -> dict[str, Any]:
    """N and R of the cases with several raters: {"hypotheses": N, "raters": [fewest, most]}; {} where there is none."""
    sizes = [(one.values["hypotheses"], one.values["raters"]) for one in cases if "raters" in one.values]
    if not sizes:
        return {}
    (hypotheses, *_), raters = zip(*sizes, strict=True)
    return {"hypotheses": int(hypotheses), "raters": [int(min(raters)), int(max(raters))]}


def reliability_bins(cases: Sequence[Scores], stage: str) -> Float[np.ndarray, "bins 3"]:
    """ROI bins pooled over the cases and added over the foreground classes, for the reliability picture."""
    return np.sum([case.sums[f"bins_roi/{stage}"] for case in cases], axis=0)[1:].sum(axis=0)
