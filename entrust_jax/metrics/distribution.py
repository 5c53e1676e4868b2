"""Distances between sets of segmentations: hypotheses against the raters of one case.

References: GED, Szekely and Rizzo 2013 and Kohl et al. 2018 (arXiv 1806.05034); HM-IoU, Kohl et al. 2019 (arXiv
1905.13077); D_max and the collective insight score, Rahman et al. 2023 (arXiv 2304.04745).
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Integer
from scipy.optimize import linear_sum_assignment

from entrust_jax.metrics.overlap import pairwise_dice

Estimator = Literal["v", "u"]


def class_iou(
    first: Integer[np.ndarray, "n *s"], second: Integer[np.ndarray, "m *s"], classes: Sequence[int], empty: float = 1.0
) -> Float[np.ndarray, "k n m"]:
    """IoU of each class between every map of the first set and every map of the second; `empty` for two empty masks."""
    ours, theirs = first.reshape(first.shape[0], -1), second.reshape(second.shape[0], -1)
    found = []
    for k in classes:
        a, b = ours == k, theirs == k
        used = a.any(axis=0) | b.any(axis=0)  # almost all voxels are empty in every mask
        x, y = a[:, used].astype(np.float64), b[:, used].astype(np.float64)
        shared = x @ y.T
        union = x.sum(axis=1)[:, None] + y.sum(axis=1)[None, :] - shared
        found.append(np.where(union > 0, shared / np.maximum(union, 1), empty))
    return np.stack(found)


def pairwise_distance(
    first: Integer[np.ndarray, "n *s"], second: Integer[np.ndarray, "m *s"], classes: Sequence[int], empty: float = 1.0
) -> Float[np.ndarray, "n m"]:
    """d = 1 - IoU between every map of the first set and every map of the second, averaged over `classes`
    (give the foreground classes).

    empty: the IoU of two empty masks. 1 is the convention of PHiSeg, SSN and CCDM; NaN leaves such pairs out (Kohl et
    al. 2018), here and in the figures made from the matrix; 0 is what a small number in the denominator makes of it.
    """
    distance = 1 - class_iou(first, second, classes, empty)
    known = np.isfinite(distance)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, distance, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def pairwise_class_dice(
    first: Integer[np.ndarray, "n *s"], second: Integer[np.ndarray, "m *s"], classes: Sequence[int]
) -> Float[np.ndarray, "k n m"]:
    """Dice of each class between every map of the first set and every map of the second, both empty 1."""
    iou = class_iou(first, second, classes)
    return 2 * iou / (1 + iou)


def interslice_dice(labels: Integer[np.ndarray, "n d h w"]) -> float:
    """How coherent label maps are along D: Dice of the foreground of neighbouring slices, of which one has some, mean

    over pairs, then over maps that have foreground; NaN where none has. Hypotheses of slices that do not know of each
    other have less of it than the truth: to be compared. Ours.
    """
    found = []
    for one in labels > 0:
        size = one.sum(axis=(1, 2), dtype=np.float64)
        shared = (one[1:] & one[:-1]).sum(axis=(1, 2), dtype=np.float64)
        total = size[1:] + size[:-1]
        if total.any():
            found.append(np.mean(2 * shared[total > 0] / total[total > 0]))
    return float(np.mean(found)) if found else float("nan")


def _mean(distance: Float[np.ndarray, "..."]) -> float:
    known = distance[np.isfinite(distance)]
    return float(known.mean()) if known.size else float("nan")


def mean_self_distance(distance: Float[np.ndarray, "n n"], estimator: Estimator) -> float:
    """E d(X, X') of one set from its own distance matrix.

    `v` averages all n^2 entries (the zero diagonal included: the plug-in estimate); `u` averages the pairs
    of different members, is unbiased and so comparable between sets of different size; NaN for a single
    member. Pairs without a distance (NaN) are left out.
    """
    if estimator == "v":
        return _mean(distance)
    if estimator == "u":
        return _mean(distance[~np.eye(distance.shape[0], dtype=bool)])
    raise ValueError(f"unknown estimator {estimator!r}")


def ged_squared(
    between: Float[np.ndarray, "n r"],
    samples: Float[np.ndarray, "n n"],
    raters: Float[np.ndarray, "r r"],
    estimator: Estimator = "v",
) -> float:
    """Squared generalised energy distance 2 E d(X, Y) - E d(X, X') - E d(Y, Y') (Szekely & Rizzo 2013; for
    segmentations Kohl et al. 2018) from distance matrices of samples X and raters Y. `u` can be
    negative; `v` depends on the number of samples."""
    return 2 * _mean(between) - mean_self_distance(samples, estimator) - mean_self_distance(raters, estimator)


def hm_iou(between: Float[np.ndarray, "n r"]) -> float:
    """Mean IoU = 1 - d of the best one-to-one matching of samples to raters, both sets repeated to lcm(N, R) members
    (Kohl et al. 2019)."""
    n, r = between.shape
    count = math.lcm(n, r)
    repeated = np.repeat(np.repeat(1 - between, count // n, axis=0), count // r, axis=1)
    return float(repeated[linear_sum_assignment(repeated, maximize=True)].mean())


def d_max(dice: Float[np.ndarray, "n r"]) -> float:
    """Mean over the raters of the Dice of the sample that is nearest to each (Rahman et al. 2023)."""
    return float(dice.max(axis=0).mean())


def _combined_sensitivity(samples: Integer[np.ndarray, "n *s"], raters: Integer[np.ndarray, "r *s"], k: int) -> float:
    """The share of what any rater marks that any sample marks; 1 where no rater marks anything."""
    ours, theirs = (samples == k).any(axis=0), (raters == k).any(axis=0)
    return float((ours & theirs).sum() / theirs.sum()) if theirs.any() else 1.0


def _spread(dice: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "2"]:
    """Smallest and largest 1 - Dice between different members of a set; 0 for a single one."""
    others = 1 - dice[~np.eye(dice.shape[0], dtype=bool)]
    return np.array([others.min(), others.max()]) if others.size else np.zeros(2)


def ci_score(
    samples: Integer[np.ndarray, "n *s"], raters: Integer[np.ndarray, "r *s"], classes: Sequence[int]
) -> float:
    """Collective insight (Rahman et al. 2023), in [0, 1]: per class, then the mean over `classes`, the harmonic mean of

        S_c    combined sensitivity: of the union of the raters' masks, the share in the union of the samples'
        D_max  per rater the Dice of the nearest sample, both empty 1
        D_a    diversity agreement, 1 - (|min_x - min_y| + |max_x - max_y|) / 2 of the pairwise 1 - Dice of the
               samples x and of the raters y

    The paper's code is not public. Its formula, three times the product over the sum, is no harmonic mean; here it is
    one. What D_a compares, 1 - Dice where the paper has a variance, is our choice.
    """
    between, within, among = (
        pairwise_class_dice(*pair, classes) for pair in ((samples, raters), (samples, samples), (raters, raters))
    )
    scores = []
    for i, k in enumerate(classes):
        agreement = 1 - float(np.abs(_spread(within[i]) - _spread(among[i])).mean())
        parts = (_combined_sensitivity(samples, raters, k), d_max(between[i]), agreement)
        scores.append(len(parts) / sum(1 / part for part in parts) if min(parts) > 0 else 0.0)
    return float(np.mean(scores))


def diversity(hypotheses: Integer[np.ndarray, "n *s"], classes: Sequence[int], estimator: Estimator = "u") -> float:
    """E d(X, X') of the hypotheses with d = 1 - IoU averaged over `classes`."""
    return mean_self_distance(pairwise_distance(hypotheses, hypotheses, classes), estimator)


def mean_pairwise_dice(hypotheses: Integer[np.ndarray, "n *s"], classes: Sequence[int]) -> float:
    """Mean Dice over the pairs of different hypotheses and over `classes`; pairs that are both empty are
    left out, NaN if none is left."""
    pairs = np.triu_indices(hypotheses.shape[0], 1)
    values = np.concatenate([pairwise_dice(hypotheses == k)[pairs] for k in classes])
    known = np.isfinite(values)
    return float(values[known].mean()) if known.any() else float("nan")
