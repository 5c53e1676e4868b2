"""From one case's prediction to its scores: a few scalars and sums, so that no volume outlives its case."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from entrust_jax.metrics import calibration, conflict, distribution, lesions, overlap, statistics, surface, usefulness

# mm. Below a voxel's size a tolerance asks for equal voxels; the sets here have voxels of 0.5 to 2 mm in plane, and
# outlines of two readers lie a millimetre or two apart (Nikolov et al. 2021, doi 10.2196/26151: organs in CT).
NSD_TOLERANCE = 2.0
# Figures of masks: per case and group, and the mean over the headline's groups.
GEOMETRY = (
    "dice", "hd95", "hd95_pooled", "hd95_area_weighted", "nsd", "nsd_voxels", "lesion_dice", "lesion_hd95", "lesion_f1",
)  # fmt: skip
PERMUTATIONS = 500
TOWER_RANGE = (0.1, 0.9)


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
    error_probability and entropy [D,H,W], trust with its score, and seconds; scores hypotheses [N,D,H,W],
    unimodal [M,D,H,W,K] with present [M], predicted_dice, gap with
    mean (p_bar [D,H,W,K]), divergence and conflict where they exist. Conflict is stratified by the entropy
    of one_step (p_1 [D,H,W,K]) if the prediction holds it, else by entropy. spacing in mm.
    """
    inside = roi & (labels >= 0).any(axis=0)
    entropy = usefulness.unit_entropy(prediction["entropy"], len(targets.classes))
    each = [_score_rater(prediction, label, body, spacing, roi, targets, entropy) for label in labels]
    values, sums = each[0]
    if len(labels) > 1:
        values = {key: statistics.finite_mean([one[key] for one, _ in each]) for key in values}
        sums = {key: np.mean([one[key] for _, one in each], axis=0) for key in sums}
        values |= _rater_scores(prediction.get("hypotheses", prediction["label"][None]), labels, targets.foreground())
    values["uncertainty"] = usefulness.mean_inside(prediction["error_probability"], roi, body)
    values["trust"] = float(prediction["trust"]["score"])
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
        values[metric] = statistics.finite_mean([values[f"{metric}/{group}"] for group in targets.headline()])
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
    return statistics.finite_mean([overlap.dice(matrix, targets.groups()[group]) for group in targets.headline()])


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
