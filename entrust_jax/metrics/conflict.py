"""Do the hypotheses diverge where the modalities conflict, beyond what entropy and borders explain? (ours)

Conflict, entropy and borders go together, so a plain comparison of divergence in and out of conflict proves
nothing. Voxels are therefore compared only within a stratum s of equal one-step entropy and equal distance
to the delivered label's border:

    effect = sum_s w_s (mean divergence of s in high conflict - mean divergence of s in low) / sum_s w_s
    w_s    = h_s l_s / (h_s + l_s)      h_s, l_s voxels of high and low conflict (none if s lacks either)

per patient, then the mean over patients. The null permutes conflict among the voxels of each stratum of
each case. Neighbouring voxels are correlated, so this null is narrower than the truth and its p is
optimistic: the sign-flip p over patients stands beside it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer

from entrust_jax.metrics import statistics

ENTROPY_EDGES = (0.01, 0.02, 0.05, *(round(0.1 + 0.05 * i, 2) for i in range(18)))  # share of log K
DISTANCE_EDGES = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)  # mm
HIGH_CONFLICT = 0.1


class Alignment(NamedTuple):
    """Sums of one case; those of a patient's cases add up. observed = (sum w, sum w mean_high, sum w
    mean_low); null[i] = the last two under permutation i."""

    observed: Float[np.ndarray, "3"]
    null: Float[np.ndarray, "p 2"]
    voxels: Integer[np.ndarray, "2"]


def strata(
    entropy: Float[np.ndarray, " n"],
    distance: Float[np.ndarray, " n"],
    entropy_edges: Sequence[float] = ENTROPY_EDGES,
    distance_edges: Sequence[float] = DISTANCE_EDGES,
) -> Integer[np.ndarray, " n"]:
    """Stratum of each voxel: (entropy bin) x (distance bin). Entropy as a share of log K, distance in mm
    (inf allowed)."""
    rows = np.searchsorted(np.asarray(entropy_edges), entropy, side="right")
    return rows * (len(distance_edges) + 1) + np.searchsorted(np.asarray(distance_edges), distance, side="right")


def alignment(
    divergence: Float[np.ndarray, " n"],
    high: Bool[np.ndarray, " n"],
    stratum: Integer[np.ndarray, " n"],
    *,
    permutations: int,
    seed: int,
) -> Alignment:
    """One case's sums over its voxels; `high` says which voxels are in conflict."""
    rng = np.random.default_rng(seed)
    observed, null, voxels = np.zeros(3), np.zeros((permutations, 2)), np.zeros(2, np.int64)
    order = np.argsort(stratum, kind="stable")
    cuts = np.flatnonzero(np.diff(stratum[order])) + 1
    for members in np.split(order, cuts):
        values, inside = divergence[members].astype(np.float64), high[members]
        h, n = int(inside.sum()), members.size
        if h == 0 or h == n:
            continue
        weight, total, top = h * (n - h) / n, values.sum(), values[inside].sum()
        observed += weight * np.array([1.0, top / h, (total - top) / (n - h)])
        # A random subset of h voxels is the complement of one of n - h: draw the smaller.
        few = min(h, n - h)
        drawn = _subset_sums(values, few, permutations, rng)
        tops = drawn if few == h else total - drawn
        null += weight * np.stack([tops / h, (total - tops) / (n - h)], axis=-1)
        voxels += np.array([h, n - h])
    return Alignment(observed, null, voxels)


def _subset_sums(
    values: Float[np.ndarray, " n"], size: int, draws: int, rng: np.random.Generator
) -> Float[np.ndarray, " {draws}"]:
    """Sums of `draws` random subsets of `size` values, drawn without replacement."""
    if values.size <= 1000:  # all at once: calling `choice` costs more than the extra random numbers
        order = np.argpartition(rng.random((draws, values.size)), size - 1, axis=1)[:, :size]
        return values[order].sum(axis=1)
    return np.array([values[rng.choice(values.size, size, replace=False, shuffle=False)].sum() for _ in range(draws)])


def add(first: Alignment, second: Alignment) -> Alignment:
    """The sums of two cases of one patient."""
    return Alignment(first.observed + second.observed, first.null + second.null, first.voxels + second.voxels)


def alignment_summary(patients: Sequence[Alignment], *, resamples: int = statistics.RESAMPLES) -> dict[str, Any]:
    """The pooled figure: effect (nats; mean over patients, with interval), ratio of the two
    stratum-standardised means, the permutation null's quantiles, its one-sided p (high conflict diverges
    more), and the sign-flip p over patients.

    Patients with no stratum that holds both kinds are left out; with none left, value and p are null.
    """
    used = [one for one in patients if one.observed[0] > 0]
    if not used:
        reason = "no stratum holds voxels of high and of low conflict"
        return {
            "value": None,
            "ci95": None,
            "n": 0,
            "ratio": None,
            "p_permutation": None,
            "p_sign_flip": None,
            "reason": reason,
        }
    high = np.array([one.observed[1] / one.observed[0] for one in used])
    low = np.array([one.observed[2] / one.observed[0] for one in used])
    effects = high - low
    null_high = np.mean([one.null[:, 0] / one.observed[0] for one in used], axis=0)
    null_low = np.mean([one.null[:, 1] / one.observed[0] for one in used], axis=0)
    null = null_high - null_low
    quantiles = np.quantile(null, [0.025, 0.5, 0.975])
    return {
        **statistics.figure(lambda w: statistics.weighted_mean(effects, w), len(used), resamples=resamples),
        "ratio": float(high.mean() / low.mean()) if low.mean() > 0 else None,
        "mean_high": float(high.mean()),
        "mean_low": float(low.mean()),
        "null": dict(zip(("q025", "median", "q975"), map(float, quantiles), strict=True)),
        "p_permutation": float((1 + np.sum(null >= effects.mean())) / (1 + null.size)),
        "p_sign_flip": statistics.sign_flip_p(effects),
        "permutations": int(null.size),
        "voxels_high": int(sum(one.voxels[0] for one in used)),
        "voxels_low": int(sum(one.voxels[1] for one in used)),
    }
