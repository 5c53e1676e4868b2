"""Distances between sets of segmentations."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Integer

from entrust_jax.metrics.overlap import pairwise_dice

Estimator = Literal["v", "u"]


def pairwise_distance(
    first: Integer[np.ndarray, "n *s"], second: Integer[np.ndarray, "m *s"], classes: Sequence[int]
) -> Float[np.ndarray, "n m"]:
    """d = 1 - IoU between every map of the first set and every map of the second, averaged over `classes`
    (give the foreground classes); two empty masks have IoU 1 (the convention of PHiSeg, SSN and CCDM)."""
    ours, theirs = first.reshape(first.shape[0], -1), second.reshape(second.shape[0], -1)
    total = np.zeros((first.shape[0], second.shape[0]))
    for k in classes:
        a, b = ours == k, theirs == k
        used = a.any(axis=0) | b.any(axis=0)  # almost all voxels are empty in every mask
        x, y = a[:, used].astype(np.float64), b[:, used].astype(np.float64)
        shared = x @ y.T
        union = x.sum(axis=1)[:, None] + y.sum(axis=1)[None, :] - shared
        total += 1 - np.where(union > 0, shared / np.maximum(union, 1), 1.0)
    return total / len(classes)


def mean_self_distance(distance: Float[np.ndarray, "n n"], estimator: Estimator) -> float:
    """E d(X, X') of one set from its own distance matrix.

    `v` averages all n^2 entries (the zero diagonal included: the plug-in estimate); `u` averages the pairs
    of different members, is unbiased and so comparable between sets of different size; NaN for a single
    member.
    """
    n = distance.shape[0]
    if estimator == "v":
        return float(distance.mean())
    if estimator == "u":
        return float((distance.sum() - np.trace(distance)) / (n * (n - 1))) if n > 1 else float("nan")
    raise ValueError(f"unknown estimator {estimator!r}")


def ged_squared(
    between: Float[np.ndarray, "n r"],
    samples: Float[np.ndarray, "n n"],
    raters: Float[np.ndarray, "r r"],
    estimator: Estimator = "v",
) -> float:
    """Squared generalised energy distance 2 E d(X, Y) - E d(X, X') - E d(Y, Y') (Szekely & Rizzo 2013; for
    segmentations Kohl et al. 2018) from distance matrices of samples X and raters Y. `u` can be
    negative."""
    return float(2 * between.mean()) - mean_self_distance(samples, estimator) - mean_self_distance(raters, estimator)


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
