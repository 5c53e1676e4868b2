"""Overlap of label maps, from one confusion matrix per case."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer


def confusion(
    prediction: Integer[np.ndarray, "*s"], truth: Integer[np.ndarray, "*s"], classes: int
) -> Integer[np.ndarray, "k k"]:
    """Voxel counts [true class, predicted class]; voxels with a negative truth are ignored."""
    known = truth >= 0
    pairs = truth[known].astype(np.int64) * classes + prediction[known].astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def counts(matrix: Integer[np.ndarray, "k k"], members: Sequence[int]) -> tuple[int, int, int]:
    """(TP, FP, FN) of the region that is the union of the classes `members`."""
    inside = np.zeros(matrix.shape[0], bool)
    inside[list(members)] = True
    return (
        int(matrix[inside][:, inside].sum()),
        int(matrix[~inside][:, inside].sum()),
        int(matrix[inside][:, ~inside].sum()),
    )


def dice(matrix: Integer[np.ndarray, "k k"], members: Sequence[int]) -> float:
    """2TP / (2TP + FP + FN) of the union of `members`; NaN where truth and prediction are both empty
    (nnU-Net's convention: such cases are skipped and counted, not scored 1)."""
    tp, fp, fn = counts(matrix, members)
    size = 2 * tp + fp + fn
    return 2 * tp / size if size else float("nan")


def iou(matrix: Integer[np.ndarray, "k k"], members: Sequence[int], *, empty: float) -> float:
    """TP / (TP + FP + FN) of the union of `members`; `empty` is the value where both are empty (1 in the GED
    literature, NaN for reports)."""
    tp, fp, fn = counts(matrix, members)
    size = tp + fp + fn
    return tp / size if size else empty


def mean_dice(matrix: Integer[np.ndarray, "k k"], groups: Sequence[Sequence[int]]) -> float:
    """Mean of the Dice of several classes or regions, those that are empty in both left out; NaN if all
    are."""
    values = np.array([dice(matrix, members) for members in groups], np.float64)
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")


def mask_of(label: Integer[np.ndarray, "*s"], members: Sequence[int]) -> Bool[np.ndarray, "*s"]:
    """The mask of the union of the classes `members`."""
    return np.isin(label, list(members))


def volume_ml(mask: Bool[np.ndarray, "*s"], spacing: Sequence[float]) -> float:
    """Volume of a mask in millilitres; spacing in mm."""
    return float(np.count_nonzero(mask) * np.prod(spacing) / 1000.0)


def pairwise_dice(masks: Bool[np.ndarray, "n *s"]) -> Float[np.ndarray, "n n"]:
    """Dice between every two masks; NaN where both are empty."""
    flat = masks.reshape(masks.shape[0], -1)
    flat = flat[:, flat.any(axis=0)].astype(np.float64)  # float64: counts stay exact in the matrix product
    size = flat.sum(axis=1)
    both = size[:, None] + size[None, :]
    return np.where(both > 0, 2 * (flat @ flat.T) / np.maximum(both, 1), np.nan)
