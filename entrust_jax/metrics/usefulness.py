"""Is the uncertainty useful: does it find the voxels that are wrong, and the cases to refer to a human
reader.

Pooled voxel figures come from histograms [bin, 2] of (right, wrong) voxels that add up over cases. The
histogram's bins are narrow in the logit of the score, so that the many near-zero scores are told apart; the
figures depend on ranks only, so no other property of the bins matters.
"""

import numpy as np
from jaxtyping import Bool, Float, Shaped

SCORE_BINS = 4096
_EDGE = 1e-6


def auroc(score: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """P(score of a positive > score of a negative) + half the ties; NaN unless both kinds exist."""
    return auroc_from_histogram(_tied_histogram(score, positive))


def average_precision(score: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """AUPRC as average precision, sum over the distinct thresholds of (recall step) x precision (no
    interpolation between points, tied scores enter together); NaN without positives. Chance level is the
    prevalence."""
    return average_precision_from_histogram(_tied_histogram(score, positive))


def _tied_histogram(score: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "bins 2"]:
    _, index = np.unique(score, return_inverse=True)
    return np.stack([np.bincount(index, ~positive), np.bincount(index, positive)], axis=-1).astype(np.float64)


def score_histogram(
    score: Float[np.ndarray, "*s"],
    positive: Bool[np.ndarray, "*s"],
    mask: Bool[np.ndarray, "*s"],
    bins: int = SCORE_BINS,
) -> Float[np.ndarray, "{bins} 2"]:
    """Counts of (negative, positive) voxels of the mask per bin of the score, which must lie in [0, 1]:
    equal width in log(s / (1 - s)) with s clipped to [1e-6, 1 - 1e-6]. ValueError on NaN."""
    if np.isnan(score[mask]).any():
        raise ValueError("the score is NaN inside the mask")
    s = np.clip(score[mask].astype(np.float64), _EDGE, 1 - _EDGE)
    limit = np.log((1 - _EDGE) / _EDGE)
    index = np.clip(((np.log(s / (1 - s)) + limit) / (2 * limit) * bins).astype(np.int64), 0, bins - 1)
    hit = positive[mask]
    return np.stack([np.bincount(index, ~hit, bins), np.bincount(index, hit, bins)], axis=-1).astype(np.float64)


def auroc_from_histogram(histogram: Float[np.ndarray, "bins 2"]) -> float:
    """AUROC of scores known up to their bin (ascending); voxels of one bin count as tied."""
    negative, positive = histogram[:, 0], histogram[:, 1]
    pairs = negative.sum() * positive.sum()
    if pairs == 0:
        return float("nan")
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs)


def average_precision_from_histogram(histogram: Float[np.ndarray, "bins 2"]) -> float:
    """Average precision of scores known up to their bin (ascending); voxels of one bin enter together."""
    descending = histogram[::-1]
    hits, flagged = np.cumsum(descending[:, 1]), np.cumsum(descending.sum(axis=-1))
    if hits.size == 0 or hits[-1] == 0:
        return float("nan")
    precision = hits / np.maximum(flagged, 1)
    return float((descending[:, 1] * precision).sum() / hits[-1])


def prevalence_from_histogram(histogram: Float[np.ndarray, "bins 2"]) -> float:
    """Share of positives: the average precision of a score without information; NaN for an empty
    histogram."""
    total = histogram.sum()
    return float(histogram[:, 1].sum() / total) if total else float("nan")


def risk_coverage(
    risk: Float[np.ndarray, " n"], confidence: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(coverage i/n, mean risk of the i most confident cases), i = 1..n. Cases of equal confidence each
    carry their group's mean risk: the expectation over the order of the tied (Geifman & El-Yaniv 2017)."""
    order = np.argsort(-confidence, kind="stable")
    _, group = np.unique(-confidence[order], return_inverse=True)
    mean = np.bincount(group, risk[order]) / np.bincount(group)
    steps = np.arange(1, risk.size + 1)
    return steps / risk.size, np.cumsum(mean[group]) / steps


def aurc(risk: Float[np.ndarray, " n"], confidence: Float[np.ndarray, " n"]) -> float:
    """Area under the risk-coverage curve: the mean of its n points; NaN for no case."""
    return float(risk_coverage(risk, confidence)[1].mean()) if risk.size else float("nan")


def excess_aurc(risk: Float[np.ndarray, " n"], confidence: Float[np.ndarray, " n"]) -> float:
    """AURC less the AURC of the best possible order (cases sorted by their true risk)."""
    return aurc(risk, confidence) - aurc(risk, -risk)


def places(score: Float[np.ndarray, " n"], uncertainty: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Place of every case from the one to refer first, 0, upwards: by the trust score, of equal ones the most uncertain
    first; equal in both, they share a place. NaN where either is. A confidence for `risk_coverage`."""
    keys = np.stack([score, -uncertainty], axis=1)
    known = np.isfinite(keys).all(axis=1)
    found = np.full(len(keys), np.nan)
    found[known] = np.unique(keys[known], axis=0, return_inverse=True)[1].reshape(-1)
    return found


def referral_curve(
    quality: Float[np.ndarray, " n"], uncertainty: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(share of cases referred, mean quality of the rest) with the most uncertain cases referred first;
    from 0 referred to all but one."""
    coverage, kept = risk_coverage(quality, -uncertainty)
    return (1 - coverage)[::-1], kept[::-1]


def entropy(probability: Float[np.ndarray, "*s k"]) -> Float[np.ndarray, "*s"]:
    """-sum_k p_k log p_k in nats, p floored at 1e-6 inside the logarithm."""
    return -(probability * np.log(np.maximum(probability, _EDGE))).sum(axis=-1)


def unit_entropy(entropy: Float[np.ndarray, "*s"], classes: int) -> Float[np.ndarray, "*s"]:
    """Entropy in nats divided by its maximum log K, clipped to [0, 1]."""
    return np.clip(entropy / np.log(classes), 0.0, 1.0).astype(np.float64)


def mean_inside(
    values: Shaped[np.ndarray, "*s"], mask: Bool[np.ndarray, "*s"], otherwise: Bool[np.ndarray, "*s"]
) -> float:
    """Mean over `mask`, or over `otherwise` when that is empty; NaN when both are."""
    chosen = mask if mask.any() else otherwise
    return float(values[chosen].mean(dtype=np.float64)) if chosen.any() else float("nan")
