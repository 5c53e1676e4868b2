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
from jaxtyping import Bool, Float, Integer, Shaped
from scipy import stats

from entrust_jax.metrics import statistics, usefulness

ENTROPY_EDGES = (0.01, 0.02, 0.05, *(round(0.1 + 0.05 * i, 2) for i in range(18)))  # share of log K
DISTANCE_EDGES = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)  # mm
HIGH_CONFLICT = 0.1


class Alignment(NamedTuple):
    """Sums of one case; those of a patient's cases add up. profile = (sum w, sum w mean_high, sum w
    mean_low) by entropy bin; null[i] = the last two, over all strata, under permutation i."""

    profile: Float[np.ndarray, "bins 3"]
    null: Float[np.ndarray, "p 2"]
    voxels: Integer[np.ndarray, "2"]

    @property
    def observed(self) -> Float[np.ndarray, "3"]:
        """The profile's sums over all strata."""
        return self.profile.sum(axis=0)


def strata(entropy: Float[np.ndarray, " n"], distance: Float[np.ndarray, " n"]) -> Integer[np.ndarray, " n"]:
    """Stratum of each voxel: (entropy bin) x (distance bin). Entropy as a share of log K, distance in mm
    (inf allowed)."""
    rows = np.searchsorted(np.asarray(ENTROPY_EDGES), entropy, side="right")
    return rows * (len(DISTANCE_EDGES) + 1) + np.searchsorted(np.asarray(DISTANCE_EDGES), distance, side="right")


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
    profile = np.zeros((len(ENTROPY_EDGES) + 1, 3))
    null, voxels = np.zeros((permutations, 2)), np.zeros(2, np.int64)
    order = np.argsort(stratum, kind="stable")
    cuts = np.flatnonzero(np.diff(stratum[order])) + 1
    for members in np.split(order, cuts):
        values, inside = divergence[members].astype(np.float64), high[members]
        h, n = int(inside.sum()), members.size
        if h == 0 or h == n:
            continue
        weight, total, top = h * (n - h) / n, values.sum(), values[inside].sum()
        row = stratum[members[0]] // (len(DISTANCE_EDGES) + 1)
        profile[row] += weight * np.array([1.0, top / h, (total - top) / (n - h)])
        # A random subset of h voxels is the complement of one of n - h: draw the smaller.
        few = min(h, n - h)
        drawn = _subset_sums(values, few, permutations, rng)
        tops = drawn if few == h else total - drawn
        null += weight * np.stack([tops / h, (total - tops) / (n - h)], axis=-1)
        voxels += np.array([h, n - h])
    return Alignment(profile, null, voxels)


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
    return Alignment(first.profile + second.profile, first.null + second.null, first.voxels + second.voxels)


def _comparable(patients: Sequence[Alignment]) -> list[Alignment]:
    return [one for one in patients if one.observed[0] > 0]


def effects_and_null(patients: Sequence[Alignment]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " p"]]:
    """The effect of every comparable patient, and the mean effect under every permutation (nats)."""
    used = _comparable(patients)
    effects = np.array([(one.observed[1] - one.observed[2]) / one.observed[0] for one in used])
    null = np.mean([(one.null[:, 0] - one.null[:, 1]) / one.observed[0] for one in used], axis=0)
    return effects, null


def divergence_profile(patients: Sequence[Alignment]) -> Float[np.ndarray, "bins 4"]:
    """By entropy bin: its middle (share of log K), mean divergence in high and in low conflict (nats; NaN without

    both), weight. Within a bin the two are standardised to the same border distances; patients count by their weight.
    """
    edges = np.array([0.0, *ENTROPY_EDGES, 1.0])
    sums = np.sum([one.profile for one in patients], axis=0)
    weight = np.where(sums[:, 0] > 0, sums[:, 0], np.nan)
    return np.stack([(edges[1:] + edges[:-1]) / 2, sums[:, 1] / weight, sums[:, 2] / weight, sums[:, 0]], axis=1)


def alignment_summary(patients: Sequence[Alignment], *, resamples: int = statistics.RESAMPLES) -> dict[str, Any]:
    """The pooled figure: effect (nats; mean over patients, with interval), ratio of the two
    stratum-standardised means, the permutation null's quantiles, its one-sided p (high conflict diverges
    more), and the sign-flip p over patients.

    Patients with no stratum that holds both kinds are left out; with none left, value and p are null.
    """
    used = _comparable(patients)
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
    high, low = (np.array([one.observed[i] / one.observed[0] for one in used]) for i in (1, 2))
    effects, null = effects_and_null(used)
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


def site_auroc(
    score: Float[np.ndarray, " n"],
    positive: Bool[np.ndarray, " n"],
    patient: Shaped[np.ndarray, " n"],
    *,
    resamples: int = statistics.RESAMPLES,
) -> dict[str, Any]:
    """P(score of a positive site > score of another) + half the ties over the sites of all patients, those without a

    score left out; the interval resamples whole patients.
    """
    known = np.isfinite(score)
    _, rank = np.unique(score[known], return_inverse=True)
    names, owner = np.unique(patient[known], return_inverse=True)
    counts = np.zeros((len(names), rank.max(initial=-1) + 1, 2))
    np.add.at(counts, (owner, rank, positive[known].astype(int)), 1)

    def of(weights: Float[np.ndarray, " p"]) -> float:
        return usefulness.auroc_from_histogram(np.tensordot(weights, counts, 1))

    return statistics.figure(of, len(names), resamples=resamples)


def shift_null(own: Float[np.ndarray, " n"], read: Float[np.ndarray, "n n"]) -> dict[str, Any]:
    """Is a figure of patients more when it is read from their own maps than from others'? The null of cyclic shifts.

        T_k = mean_i read[i, (i + k) mod n],   k = 1 .. n - 1        p = (1 + #{k : T_k >= mean own}) / (1 + #{k})

    own[i]: of patient i from his own maps; read[i, j]: from those of patient j; NaN where there is none. All shifts are
    taken: p is exact where nothing is missing, and never below 1/n. Returns the mean of T ("value"), its outer 5 %
    ("quantiles"), the share of shifts below the own figure ("quantile", ties half), p, and the number of shifts; null
    without any.
    """
    n = len(own)
    rows = np.arange(n)
    drawn = np.array([statistics.finite_mean(read[rows, (rows + k) % n].tolist()) for k in range(1, n)])
    drawn, observed = drawn[np.isfinite(drawn)], statistics.finite_mean(own.tolist())
    if not drawn.size or not np.isfinite(observed):
        return {"value": None, "quantiles": None, "quantile": None, "p": None, "shifts": 0}
    return {
        "value": float(drawn.mean()),
        "quantiles": np.quantile(drawn, (0.025, 0.975)).tolist(),
        "quantile": float(np.mean(drawn < observed) + np.mean(drawn == observed) / 2),
        "p": float((1 + np.sum(drawn >= observed)) / (1 + drawn.size)),
        "shifts": int(drawn.size),
    }


def kendall(doses: Sequence[float], values: Sequence[float]) -> float:
    """Kendall's tau-b of a response to a dose; 0 for one that does not respond at all, NaN for values that are none."""
    if not np.isfinite(values).all():
        return float("nan")
    if np.ptp(values) == 0:
        return 0.0
    result: Any = stats.kendalltau(doses, values)
    return float(result.statistic)


def partial_spearman(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], given: Sequence[Float[np.ndarray, " n"]]
) -> float:
    """Rank correlation of x and y given others: the correlation of what is left of their ranks after linear regression

    on the others' ranks (Kendall 1942). NaN where either is constant, or nothing is left of it.
    """
    if len(x) < 3 + len(given):
        return float("nan")
    ranks = [stats.rankdata(value) - (len(x) + 1) / 2 for value in (x, y, *given)]
    base = np.stack([np.ones(len(x)), *ranks[2:]], axis=1)
    left = [own - base @ np.linalg.lstsq(base, own, rcond=None)[0] for own in ranks[:2]]
    size = [float(np.sqrt(np.mean(rest**2))) for rest in left]
    if min(size) < 1e-6 * len(x):
        return float("nan")
    return float(np.mean(left[0] * left[1]) / (size[0] * size[1]))
