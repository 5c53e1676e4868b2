"""Calibration of voxel probabilities, as sums that add up over cases.

Every figure names three axes: which probability (`class_bins`: marginal per class; `top_label_bins`: the
largest), the binning (equal width, [lower, upper), the last bin closed) and what is pooled (the caller's
mask and the caller's sum over cases). Bins are arrays [..., bin, 3] of (voxels, sum of confidence, sum of
correctness): adding them pools exactly.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped
from scipy import ndimage

BINS = 15
ROI_FOREGROUND, ROI_RADIUS = 0.05, 5  # of the region of interest: foreground probability, and voxels of dilation
FLOOR = 1e-6  # a probability of exactly zero on the true class costs 13.8 nats, not infinity

Reduction = Literal["expected", "average", "maximum"]


def region_of_interest(backgrounds: Sequence[Float[np.ndarray, "*s"]]) -> Bool[np.ndarray, "*s"]:
    """Where any of the compared methods gives foreground more than .05, dilated by 5 voxels.

    `backgrounds` holds each method's calibrated background probability. The dilation is by a square (Chebyshev
    distance) in the plane of the last two axes. The truth plays no part (a region that knows it rewards
    over-confidence), nor does the body mask.
    """
    inside = np.zeros(backgrounds[0].shape, bool)
    for background in backgrounds:
        inside |= background < 1 - ROI_FOREGROUND
    grown = inside.view(np.uint8)
    for axis in (-2, -1):
        grown = ndimage.maximum_filter1d(grown, 2 * ROI_RADIUS + 1, axis=axis, mode="constant", cval=0)
    return grown.astype(bool)


def class_bins(
    probability: Float[np.ndarray, "*s k"],
    label: Integer[np.ndarray, "*s"],
    weight: Shaped[np.ndarray, "*s"],
    n_bins: int = BINS,
) -> Float[np.ndarray, "k {n_bins} 3"]:
    """Bins of every class's marginal probability against [label == class]. `weight` is a mask or weights
    per voxel; zero weight and negative labels are left out."""
    chosen = (weight > 0) & (label >= 0)
    p, y, w = probability[chosen], label[chosen], weight[chosen].astype(np.float64)
    return np.stack([_bins(p[:, k], y == k, w, n_bins) for k in range(probability.shape[-1])])


def top_label_bins(
    probability: Float[np.ndarray, "*s k"],
    label: Integer[np.ndarray, "*s"],
    weight: Shaped[np.ndarray, "*s"],
    n_bins: int = BINS,
) -> Float[np.ndarray, "1 {n_bins} 3"]:
    """Bins of the largest probability against [its class is the label]; otherwise as `class_bins`."""
    chosen = (weight > 0) & (label >= 0)
    p, y, w = probability[chosen], label[chosen], weight[chosen].astype(np.float64)
    return _bins(p.max(axis=-1), p.argmax(axis=-1) == y, w, n_bins)[None]


def _bins(
    confidence: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
    n_bins: int,
) -> Float[np.ndarray, "bins 3"]:
    index = np.clip((confidence * n_bins).astype(np.int64), 0, n_bins - 1)
    return np.stack(
        [
            np.bincount(index, weight, n_bins),
            np.bincount(index, weight * confidence, n_bins),
            np.bincount(index, weight * correct, n_bins),
        ],
        axis=-1,
    ).astype(np.float64)  # numpy's bincount of nothing is of whole numbers


def ece_from_bins(bins: Float[np.ndarray, "k bins 3"], reduction: Reduction = "expected") -> Float[np.ndarray, " k"]:
    """Calibration error per class; NaN where a class has no voxels.

    `expected`: sum_b n_b / n |accuracy_b - confidence_b|; `average`: the mean of the gaps of the non-empty
    bins; `maximum`: the largest of them.
    """
    count = bins[..., 0]
    filled = count > 0
    gap = np.abs(bins[..., 2] - bins[..., 1]) / np.where(filled, count, 1.0)
    total = count.sum(axis=-1)
    if reduction == "expected":
        value = (gap * count).sum(axis=-1) / np.where(total > 0, total, 1.0)
    elif reduction == "average":
        value = (gap * filled).sum(axis=-1) / np.maximum(filled.sum(axis=-1), 1)
    elif reduction == "maximum":
        value = gap.max(axis=-1, initial=0.0, where=filled)
    else:
        raise ValueError(f"unknown reduction {reduction!r}")
    return np.where(total > 0, value, np.nan)


def classwise_ece(bins: Float[np.ndarray, "k bins 3"]) -> float:
    """Mean over all classes, the background included, of the expected calibration error."""
    return float(ece_from_bins(bins).mean())


def nll(
    probability: Float[np.ndarray, "*s k"], label: Integer[np.ndarray, "*s"], mask: Bool[np.ndarray, "*s"]
) -> tuple[float, float]:
    """(sum of -log p[label] in nats with p floored at 1e-6, voxels) over the mask's labelled voxels."""
    chosen = mask & (label >= 0)
    p = np.take_along_axis(probability[chosen], label[chosen][:, None].astype(np.int64), axis=-1)
    return float(-np.log(np.maximum(p.astype(np.float64), FLOOR)).sum()), float(p.shape[0])


def brier(
    probability: Float[np.ndarray, "*s k"], label: Integer[np.ndarray, "*s"], mask: Bool[np.ndarray, "*s"]
) -> tuple[float, float]:
    """(sum of sum_k (p_k - [label = k])^2, voxels): the multi-class score in [0, 2] (twice the binary
    one)."""
    chosen = mask & (label >= 0)
    p, y = probability[chosen].astype(np.float64), label[chosen][:, None].astype(np.int64)
    true = np.take_along_axis(p, y, axis=-1)[:, 0]
    return float((p**2).sum() - 2 * true.sum() + p.shape[0]), float(p.shape[0])
