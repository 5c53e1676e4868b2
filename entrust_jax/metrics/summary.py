"""From one case's prediction to its scores, and from the scores of many cases to figures with intervals.

`score_case` reduces a prediction to a few scalars and sums, so that no volume outlives its case.
`summarise` and `compare` work on those alone. Cases of one patient are joined first (scalars averaged, sums
added): the patient is the unit of every interval.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

from entrust_jax.metrics import calibration, conflict, distribution, lesions, overlap, statistics, surface, usefulness

# mm. Below a voxel's size a tolerance asks for equal voxels; the sets here have voxels of 0.5 to 2 mm in plane, and
# outlines of two readers lie a millimetre or two apart (Nikolov et al. 2021, doi 10.2196/26151: organs in CT).
NSD_TOLERANCE = 2.0
# Figures of masks: per case and group, and the mean over the headline's groups.
GEOMETRY = (
    "dice", "hd95", "hd95_pooled", "hd95_area_weighted", "nsd", "nsd_voxels", "lesion_dice", "lesion_hd95", "lesion_f1",
)  # fmt: skip
COUNTS = ("lesions", "lesions_missed", "lesions_spurious")  # per case and group; in the table of cases alone
PERMUTATIONS = 500
RATER_METRICS = ("ged2", "hm_iou", "d_max", "ci_score")  # of hypotheses against several raters
TOWER_RANGE = (0.1, 0.9)
# What became of the guarantees (`conformal.apply`) on these patients.
GUARANTEED = ("outer_fnr", "outer_size", "inner_fdr", "inner_size", "dice_covered", "volume_covered")
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
    "aurc": "risk = 1 - dice per case, confidence = minus the mean error probability "
    "in the ROI; the mean of the n points",
    "predicted_dice_mae": "mean |predicted Dice - dice_by_class| (mean over the foreground classes, "
    "empty truth with empty prediction 1: what the prediction estimates)",
    "conformal": "per region, mean over patients: outer_fnr, share of the truth outside the outer mask, patients with "
    "the region only; inner_fdr, share of the inner mask outside the truth, 0 for an empty mask; outer_size and "
    "inner_size, the mask's voxels over the truth's; dice_covered and volume_covered, share of the patients (of one "
    "with several cases: of these) whose true Dice (dice_by_class) or volume lies in its interval",
    "referral": "mean dice of the patients that are left when the share `referred` with the largest mean error "
    "probability in the ROI goes to a person; the nearest whole number of patients, of equals the mean",
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
class Targets:
    """What is scored: class names (index 0 the background), regions (name -> class indices), modality names, and the
    rule of `lesions.RULES` by which lesions are."""

    classes: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    modalities: tuple[str, ...] = ()
    lesion_rule: str = "glioma"

    def foreground(self) -> list[int]:
        """Indices of the classes other than the background."""
        return list(range(1, len(self.classes)))

    def groups(self) -> dict[str, tuple[int, ...]]:
        """Every foreground class and region by name; a region named as a class replaces it."""
        return {**{self.classes[k]: (k,) for k in self.foreground()}, **dict(self.regions)}

    def headline(self) -> list[str]:
        """Names of the groups that the headline Dice and HD95 average."""
        return list(self.regions) or [self.classes[k] for k in self.foreground()]


@dataclass(frozen=True)
class Scores:
    """One case (or, joined, one patient): scalars that average, arrays that add up."""

    name: str
    patient: str
    values: dict[str, float]
    sums: dict[str, Float[np.ndarray, "..."]]
    alignment: conflict.Alignment | None = None
    entropy_source: str | None = None


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


def score_case(
    prediction: Mapping[str, Any],
    labels: Integer[np.ndarray, "r d h w"],
    body: Bool[np.ndarray, "d h w"],
    spacing: Sequence[float],
    roi: Bool[np.ndarray, "d h w"],
    targets: Targets,
    *,
    name: str,
    patient: str,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Scores:
    """Scores one case's prediction (a dict of arrays over the volume) against the label of its rater, or the labels of

    its raters, -1 where unknown. Of several raters each is the truth once; values and sums are the means over them.

    Needs label [D,H,W], probability and probability_raw [D,H,W,K] (after and before calibration),
    error_probability and entropy [D,H,W] and seconds; scores hypotheses [N,D,H,W], unimodal [M,D,H,W,K]
    with present [M], predicted_dice, gap with
    mean (p_bar [D,H,W,K]), divergence and conflict where they exist. Conflict is stratified by the entropy
    of one_step (p_1 [D,H,W,K]) if the prediction holds it, else by entropy. spacing in mm.
    """
    inside = roi & (labels >= 0).any(axis=0)
    entropy = usefulness.unit_entropy(prediction["entropy"], len(targets.classes))
    each = [_score_rater(prediction, label, body, spacing, roi, targets, entropy) for label in labels]
    values, sums = each[0]
    if len(labels) > 1:
        values = {key: _finite_mean([one[key] for one, _ in each]) for key in values}
        sums = {key: np.mean([one[key] for _, one in each], axis=0) for key in sums}
        values |= _rater_scores(prediction.get("hypotheses", prediction["label"][None]), labels, targets.foreground())
    values["uncertainty"] = usefulness.mean_inside(prediction["error_probability"], roi, body)
    values["seconds"] = float(prediction["seconds"])
    if prediction.get("predicted_dice") is not None:
        values["predicted_dice"] = float(prediction["predicted_dice"])
        values["predicted_dice_error"] = abs(values["predicted_dice"] - values["dice_by_class"])
    if prediction.get("conformal") is not None:
        values |= _coverage(prediction["conformal"], values)
    hypotheses = prediction.get("hypotheses")
    if hypotheses is not None:
        values["hypothesis_diversity"] = distribution.diversity(hypotheses, targets.foreground(), "u")
        values["hypothesis_dice"] = distribution.mean_pairwise_dice(hypotheses, targets.foreground())
        values["interslice_dice"] = distribution.interslice_dice(hypotheses)
        values["interslice_dice_truth"] = distribution.interslice_dice(np.maximum(labels, 0))
        values |= _within_hypotheses(prediction.get("regions", {}), values)
        if prediction.get("gap") is not None and prediction.get("mean") is not None:
            sums["tower"] = tower_sums(prediction["gap"], prediction["mean"], body, hypotheses.shape[0])
    aligned, source = None, None
    if prediction.get("conflict") is not None and prediction.get("divergence") is not None:
        source, share = "entropy of the mean", entropy
        if prediction.get("one_step") is not None:
            source = "one-step entropy"
            share = usefulness.unit_entropy(usefulness.entropy(prediction["one_step"]), len(targets.classes))
        box = surface.bounding_box(inside | (prediction["label"] > 0), margin=1)
        distance = surface.border_distance(prediction["label"][box], spacing)
        # Only where hypotheses were drawn: elsewhere they cannot differ, whatever the conflict.
        seen = inside & body & np.asarray(prediction.get("sampled", np.ones(len(body), bool)))[:, None, None]
        chosen = seen[box]
        aligned = conflict.alignment(
            prediction["divergence"][box][chosen],
            prediction["conflict"][box][chosen] > conflict.HIGH_CONFLICT,
            conflict.strata(share[box][chosen], distance[chosen]),
            permutations=permutations,
            seed=seed,
        )
        values["mean_conflict_body"] = usefulness.mean_inside(prediction["conflict"], body, body)
    return Scores(name, patient, values, sums, aligned, source)


def _score_rater(
    prediction: Mapping[str, Any],
    label: Integer[np.ndarray, "d h w"],
    body: Bool[np.ndarray, "d h w"],
    spacing: Sequence[float],
    roi: Bool[np.ndarray, "d h w"],
    targets: Targets,
    entropy: Float[np.ndarray, "d h w"],
) -> tuple[dict[str, float], dict[str, Float[np.ndarray, "..."]]]:
    """What depends on the truth, for one rater's; entropy as a share of its maximum."""
    known = label >= 0
    inside = roi & known
    # Unknown voxels count as background for masks, on both sides alike.
    truth, delivered = np.where(known, label, 0), np.where(known, prediction["label"], 0)
    values = _geometry(delivered, truth, spacing, targets)
    values["roi_voxels"] = float(inside.sum())
    sums: dict[str, np.ndarray] = {}
    for stage, key in (("before", "probability_raw"), ("after", "probability")):
        found = _probability_sums(prediction[key], label, inside, body)
        sums.update({f"{metric}/{stage}": value for metric, value in found.items()})
    wrong = delivered != truth
    sums["error"] = usefulness.score_histogram(prediction["error_probability"], wrong, inside)
    sums["entropy_error"] = usefulness.score_histogram(entropy, wrong, inside)
    if prediction.get("conformal") is not None:
        values |= _mask_risks(prediction["conformal"], truth, known, targets)
    if prediction.get("unimodal") is not None:
        for m in np.flatnonzero(prediction["present"]):
            dice = headline_dice(np.argmax(prediction["unimodal"][m], axis=-1), label, targets)
            values[f"unimodal_dice/{targets.modalities[m]}"] = dice
    return values, sums


def _mask_risks(
    promised: Mapping[str, Any],
    truth: Integer[np.ndarray, "d h w"],
    known: Bool[np.ndarray, "d h w"],
    targets: Targets,
) -> dict[str, float]:
    """Losses and sizes of the guaranteed masks; NaN where there is no truth to compare with."""
    values, groups = {}, targets.groups()
    for region, mask in promised["outer_mask"].items():
        true = overlap.mask_of(truth, groups[region])
        values[f"outer_fnr/{region}"] = _share(true & ~mask, true)
        values[f"outer_size/{region}"] = _share(mask & known, true)
    for region, mask in promised["inner_mask"].items():
        true = overlap.mask_of(truth, groups[region])
        values[f"inner_fdr/{region}"] = _share(mask & known & ~true, mask & known, empty=0.0)
        values[f"inner_size/{region}"] = _share(mask & known, true)
    return values


def _share(part: Bool[np.ndarray, "*s"], whole: Bool[np.ndarray, "*s"], empty: float = float("nan")) -> float:
    size = np.count_nonzero(whole)
    return np.count_nonzero(part) / size if size else empty


def _coverage(promised: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, float]:
    """Whether the true Dice and volumes (the raters' mean) lie in their intervals: 1 or 0."""
    found = {}
    if promised["dice"] is not None:
        low, high = promised["dice"]
        found["dice_covered"] = float(low - 1e-9 <= values["dice_by_class"] <= high + 1e-9)
    for region, (low, high) in promised["volume"].items():
        true = values[f"true_volume_ml/{region}"]
        found[f"volume_covered/{region}"] = float(low * (1 - 1e-9) - 1e-9 <= true <= high * (1 + 1e-9) + 1e-9)
    return found


def _within_hypotheses(regions: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, float]:
    """Whether each region's true volume lies within the 5th to the 95th percentile of the hypotheses': 1 or 0."""
    found = {}
    for region, one in regions.items():
        if one["interval"] is not None:
            low, high = one["interval"]
            true = values[f"true_volume_ml/{region}"]
            found[f"hypotheses_cover_volume/{region}"] = float(low - 1e-9 <= true <= high + 1e-9)
    return found


def _rater_scores(
    hypotheses: Integer[np.ndarray, "n d h w"], raters: Integer[np.ndarray, "r d h w"], classes: Sequence[int]
) -> dict[str, float]:
    """How the set of hypotheses fits the set of raters, and the sizes of both."""
    known = (raters >= 0).all(axis=0)
    ours, theirs = np.where(known, hypotheses, 0), np.where(known, raters, 0)
    between, within, among = (
        distribution.pairwise_distance(*pair, classes) for pair in ((ours, theirs), (ours, ours), (theirs, theirs))
    )
    dice = distribution.pairwise_class_dice(ours, theirs, classes)
    return {
        "ged2": distribution.ged_squared(between, within, among, "v"),
        "hm_iou": distribution.hm_iou(between),
        "d_max": float(np.mean([distribution.d_max(one) for one in dice])),
        "ci_score": distribution.ci_score(ours, theirs, classes),
        "diversity": distribution.mean_self_distance(within, "u"),
        "rater_diversity": distribution.mean_self_distance(among, "u"),
        "hypotheses": float(len(ours)),
        "raters": float(len(theirs)),
    }


def _geometry(
    delivered: Integer[np.ndarray, "d h w"],
    truth: Integer[np.ndarray, "d h w"],
    spacing: Sequence[float],
    targets: Targets,
) -> dict[str, float]:
    matrix = overlap.confusion(delivered, truth, len(targets.classes))
    values: dict[str, float] = {}
    for group, members in targets.groups().items():
        ours, theirs = overlap.mask_of(delivered, members), overlap.mask_of(truth, members)
        values[f"dice/{group}"] = overlap.dice(matrix, members)
        values[f"volume_ml/{group}"] = overlap.volume_ml(ours, spacing)
        values[f"true_volume_ml/{group}"] = overlap.volume_ml(theirs, spacing)
        found = _surfaces(ours, theirs, spacing, lesions.RULES[targets.lesion_rule])
        values |= {f"{metric}/{group}": value for metric, value in found.items()}
    by_class = [values[f"dice/{targets.classes[k]}"] for k in targets.foreground()]
    values["dice_by_class"] = float(np.mean(np.nan_to_num(by_class, nan=1.0)))
    for metric in GEOMETRY:
        values[metric] = _finite_mean([values[f"{metric}/{group}"] for group in targets.headline()])
    return values


def _surfaces(
    ours: Bool[np.ndarray, "d h w"], theirs: Bool[np.ndarray, "d h w"], spacing: Sequence[float], rule: lesions.Rule
) -> dict[str, float]:
    """What is measured in mm between two masks. The caps of a single slice would be surface that cannot be wrong, so
    that slice is taken as a picture."""
    if len(ours) == 1:
        return _measured(ours[0], theirs[0], spacing[1:], rule, spacing[0])
    return _measured(ours, theirs, spacing, rule)


def _measured(
    ours: Bool[np.ndarray, "*s"],
    theirs: Bool[np.ndarray, "*s"],
    spacing: Sequence[float],
    rule: lesions.Rule,
    thickness: float = 1.0,
) -> dict[str, float]:
    nsd = 0.0 if ours.any() or theirs.any() else float("nan")  # of an empty mask, as in surface.nsd
    found = dict.fromkeys(("hd95", "hd95_pooled", "hd95_area_weighted"), float("nan")) | {"nsd": nsd, "nsd_voxels": nsd}
    if ours.any() and theirs.any():
        voxels = surface.surface_distances(ours, theirs, spacing)
        elements, areas = surface.element_distances(ours, theirs, spacing)
        once = np.ones(len(voxels[0])), np.ones(len(voxels[1]))
        found = {
            "hd95": surface.percentile95(*voxels, "max_of_directed"),
            "hd95_pooled": surface.percentile95(*voxels, "pooled"),
            "hd95_area_weighted": surface.area_percentile95(elements, areas),
            "nsd": surface.share_within(elements, areas, NSD_TOLERANCE),
            "nsd_voxels": surface.share_within(voxels, once, NSD_TOLERANCE),
        }
    return found | lesions.scores(ours, theirs, spacing, rule, thickness)


def headline_dice(delivered: Integer[np.ndarray, "*s"], label: Integer[np.ndarray, "*s"], targets: Targets) -> float:
    """Mean Dice over the headline's groups; unknown voxels (-1) count as background on both sides."""
    known = label >= 0
    matrix = overlap.confusion(np.where(known, delivered, 0), np.where(known, label, 0), len(targets.classes))
    return _finite_mean([overlap.dice(matrix, targets.groups()[group]) for group in targets.headline()])


def _probability_sums(
    probability: Float[np.ndarray, "d h w k"],
    label: Integer[np.ndarray, "d h w"],
    inside: Bool[np.ndarray, "d h w"],
    body: Bool[np.ndarray, "d h w"],
) -> dict[str, Float[np.ndarray, "..."]]:
    return {
        "bins_roi": calibration.class_bins(probability, label, inside),
        "bins_body": calibration.class_bins(probability, label, body),
        "top_roi": calibration.top_label_bins(probability, label, inside),
        "nll": np.array(calibration.nll(probability, label, inside)),
        "nll_body": np.array(calibration.nll(probability, label, body)),
        "brier": np.array(calibration.brier(probability, label, inside)),
        "brier_body": np.array(calibration.brier(probability, label, body)),
    }


def tower_sums(
    gap: Float[np.ndarray, "*s"],
    probability: Float[np.ndarray, "*s k"],
    body: Bool[np.ndarray, "*s"],
    hypotheses: int,
) -> Float[np.ndarray, "3"]:
    """(sum of the gap, sum of its bound, voxels) where .1 < foreground probability < .9.

    The denoiser's one-step estimate p_1 and the mean p_bar over N independent hypotheses estimate the same
    marginal (tower property), so |p_1 - p_bar|_1 / 2 stays below 1/2 sum_k .92 sqrt(p_k (1 - p_k) / N) +
    .02 on average if network and sampler are right.
    """
    foreground = 1 - probability[..., 0]
    chosen = body & (foreground > TOWER_RANGE[0]) & (foreground < TOWER_RANGE[1])
    p = probability[chosen].astype(np.float64)
    bound = 0.5 * (0.92 * np.sqrt(np.clip(p * (1 - p), 0, None) / hypotheses)).sum(axis=-1) + 0.02
    return np.array([gap[chosen].sum(dtype=np.float64), bound.sum(), float(p.shape[0])])


def _finite_mean(values: Sequence[float]) -> float:
    array = np.asarray(values, np.float64)
    finite = array[np.isfinite(array)]
    return float(finite.mean()) if finite.size else float("nan")


def join_patients(cases: Sequence[Scores]) -> list[Scores]:
    """One Scores per patient, in the order of first appearance: finite scalars averaged, sums and
    alignments added."""
    members: dict[str, list[Scores]] = {}
    for case in cases:
        members.setdefault(case.patient, []).append(case)
    joined = []
    for patient, own in members.items():
        keys = dict.fromkeys(key for case in own for key in case.values)
        values = {key: _finite_mean([case.values.get(key, np.nan) for case in own]) for key in keys}
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
    skipped = ("uncertainty", "predicted_dice", "roi_voxels", "volume_ml", "true_volume_ml", "hypotheses", "raters")
    skipped += COUNTS
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
    pairs = risk_and_confidence(patients)
    for name, area in (("aurc", usefulness.aurc), ("excess_aurc", usefulness.excess_aurc)):
        found[name] = Quantity(pairs, np.asarray(np.isfinite(pairs).all(axis=1)), _repeated(area), paired=False)
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


def _repeated(area: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    def reduce(rows: np.ndarray, weights: np.ndarray) -> float:
        drawn = np.repeat(rows, weights.astype(np.int64), axis=0)
        return area(drawn[:, 0], drawn[:, 1])

    return reduce


def risk_and_confidence(patients: Sequence[Scores]) -> Float[np.ndarray, "n 2"]:
    """(1 - Dice, minus the mean error probability) per patient, NaN where undefined."""
    return np.array([(1 - one.values["dice"], -one.values["uncertainty"]) for one in patients], np.float64)


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
    for key in ("error_auroc", "entropy_auroc", "aurc", "excess_aurc"):
        summary[key] = done[key]
    for key in ("error_auprc", "entropy_auprc"):
        summary[key] = {**done[key], "prevalence": done["error_prevalence"]["value"]}
    for key in (
        "location_dice",
        "predicted_dice_mae",
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
    pairs = risk_and_confidence(patients)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if not len(pairs):
        return {"referred": [], "dice": []}
    shares, dice = usefulness.referral_curve(1 - pairs[:, 0], -pairs[:, 1])
    nearest = [int(np.argmin(np.abs(shares - share))) for share in REFERRED]
    return {"referred": [float(shares[i]) for i in nearest], "dice": [float(dice[i]) for i in nearest]}


def set_sizes(cases: Sequence[Scores]) -> dict[str, Any]:
    """N and R of the cases with several raters: {"hypotheses": N, "raters": [fewest, most]}; {} where there is none."""
    sizes = [(one.values["hypotheses"], one.values["raters"]) for one in cases if "raters" in one.values]
    if not sizes:
        return {}
    (hypotheses, *_), raters = zip(*sizes, strict=True)
    return {"hypotheses": int(hypotheses), "raters": [int(min(raters)), int(max(raters))]}


COMPARED = {  # metric -> +1 where more is better, -1 where less is, 0 where neither
    "dice": 1,
    "location_dice": 0,
    "hd95": -1,
    "nsd": 1,
    "lesion_dice": 1,
    "lesion_f1": 1,
    "ece_classwise_roi/before": -1,
    "ece_classwise_roi/after": -1,
    "ece_classwise_body/after": -1,
    "nll/after": -1,
    "brier/after": -1,
    "error_auroc": 1,
    "error_auprc": 1,
    "aurc": -1,
    "predicted_dice_mae": -1,
    "hypothesis_diversity": 0,
    "hypothesis_dice": 0,
    "interslice_dice": 0,
    "interslice_dice_truth": 0,
    "ged2": -1,
    "hm_iou": 1,
    "d_max": 1,
    "ci_score": 1,
    "diversity": 0,
    "rater_diversity": 0,
    "seconds_per_case": -1,
}


def compare(methods: Mapping[str, Sequence[Scores]], *, resamples: int = statistics.RESAMPLES) -> dict[str, Any]:
    """Every method against the first, on the same patients.

    {"reference", "figures": {method: {metric: figure}}, "differences": {method: {metric: {"value", "ci95",
    "n", "p", "p_holm", "rank_biserial"}}}} where a difference is method less reference over the patients
    that both score, its interval from resampling those patients for both at once, p from the Wilcoxon test
    of per-patient differences (Holm over the metrics). Figures against several raters carry N and R, and have a
    difference at equal N only. Raises ValueError unless all methods scored the same cases.
    """
    reference, *others = methods
    cases = {name: [(case.name, case.patient) for case in scores] for name, scores in methods.items()}
    if any(cases[name] != cases[reference] for name in others):
        raise ValueError("methods scored different cases")
    tables = {name: quantities(join_patients(scores)) for name, scores in methods.items()}
    sizes = {name: set_sizes(scores) for name, scores in methods.items()}
    figures = {
        name: {
            metric: statistics.figure(
                table[metric].statistic(table[metric].valid),
                int(table[metric].valid.sum()),
                resamples=resamples,
            )
            | (sizes[name] if metric in RATER_METRICS else {})
            for metric in COMPARED
            if metric in table
        }
        for name, table in tables.items()
    }
    differences = {}
    for name in others:
        shared = [metric for metric in COMPARED if metric in tables[name] and metric in tables[reference]]
        if sizes[name] != sizes[reference]:
            shared = [metric for metric in shared if metric not in RATER_METRICS]
        rows = {metric: _difference(tables[name][metric], tables[reference][metric], resamples) for metric in shared}
        for metric, p in zip(shared, statistics.holm([rows[metric]["p"] for metric in shared]), strict=True):
            rows[metric]["p_holm"] = p
        differences[name] = rows
    return {"reference": reference, "figures": figures, "differences": differences}


def _difference(ours: Quantity, theirs: Quantity, resamples: int) -> dict[str, Any]:
    both = ours.valid & theirs.valid
    first, second = ours.statistic(both), theirs.statistic(both)
    found = statistics.figure(lambda w: first(w) - second(w), int(both.sum()), resamples=resamples)
    tested = ours.paired and theirs.paired
    result = (
        statistics.paired_test((ours.each() - theirs.each())[both]) if tested else {"p": None, "rank_biserial": None}
    )
    return {**found, "p": result["p"], "rank_biserial": result["rank_biserial"]}


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table: a row per metric, value with interval and difference to the first
    method."""
    reference, figures, differences = (
        comparison["reference"],
        comparison["figures"],
        comparison["differences"],
    )
    heads = ["metric", reference]
    for name in differences:
        heads += [name, f"{name} - {reference}", "p (Holm)"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for metric, better in COMPARED.items():
        if not any(metric in one for one in figures.values()):
            continue
        arrow = {1: " (higher is better)", -1: " (lower is better)", 0: ""}[better]
        row = [metric.replace("/", ", ") + arrow, _cell(figures[reference].get(metric))]
        for name, rows in differences.items():
            p = rows.get(metric, {}).get("p_holm")
            row += [
                _cell(figures[name].get(metric)),
                _cell(rows.get(metric), sign="+"),
                "–" if p is None else f"{p:.3g}",
            ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _cell(figure: Mapping[str, Any] | None, sign: str = "") -> str:
    if figure is None or figure["value"] is None:
        return "–"
    text = f"{figure['value']:{sign}.4g}"
    if figure["ci95"] is not None:
        text += f" [{figure['ci95'][0]:{sign}.4g}, {figure['ci95'][1]:{sign}.4g}]"
    more = f", N={figure['hypotheses']}" if "hypotheses" in figure else ""
    return text + f" (n={figure['n']}{more})"


def reliability_bins(cases: Sequence[Scores], stage: str) -> Float[np.ndarray, "bins 3"]:
    """ROI bins pooled over the cases and added over the foreground classes, for the reliability picture."""
    return np.sum([case.sums[f"bins_roi/{stage}"] for case in cases], axis=0)[1:].sum(axis=0)
