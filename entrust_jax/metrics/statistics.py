"""Figures with intervals. The patient is the unit.

A statistic is a function of patient weights (non-negative whole numbers, one per patient): a mean of
patient values, or a ratio of pooled sums. Resampling patients and leaving one out are then both a choice of
weights, and a pooled figure is bootstrapped as exactly as a mean.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

MINIMUM_PATIENTS = 10
RESAMPLES = 2000

Statistic = Callable[[Float[np.ndarray, " n"]], float]


def bootstrap_interval(
    statistic: Statistic, n: int, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[list[float] | None, str | None]:
    """BCa interval over n patients (Efron 1987): ([low, high], None), or (None, why there is none).

    A statistic that resampling itself moves (ECE grows with the noise of a resample) breaks BCa: its
    correction leaves the bulk of the draws, and the interval can miss the value. Where the value lies in the
    outer tenths of the draws, the interval is therefore the draws' percentiles, recentred at the value.

    Below 10 patients there is no interval: its coverage would be far below the level that it names. Falls
    back to the percentile interval where the jackknife gives no acceleration (a constant statistic).
    """
    if n < MINIMUM_PATIENTS:
        return None, f"{n} patients: fewer than {MINIMUM_PATIENTS}"
    value = statistic(np.ones(n))
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    draws = np.array([statistic(w) for w in weights])
    draws = np.sort(draws[np.isfinite(draws)])
    if not np.isfinite(value) or draws.size < 0.9 * resamples:
        return None, "undefined in more than a tenth of the resamples"
    share = (np.sum(draws < value) + 0.5 * np.sum(draws == value)) / draws.size
    tails = [(1 - level) / 2, (1 + level) / 2]
    if not 0.1 <= share <= 0.9:
        low, high = np.quantile(draws, tails) + value - np.median(draws)
        return [float(low), float(high)], None
    bias = stats.norm.ppf(share)
    left_out = np.array([statistic(1.0 - np.eye(n)[i]) for i in range(n)])
    pull = (
        left_out[np.isfinite(left_out)].mean() - left_out[np.isfinite(left_out)]
        if np.isfinite(left_out).any()
        else np.zeros(1)
    )
    spread = np.sum(pull**2)
    acceleration = np.sum(pull**3) / (6 * spread**1.5) if spread > 0 else 0.0
    z = bias + stats.norm.ppf(tails)
    low, high = np.quantile(draws, stats.norm.cdf(bias + z / (1 - acceleration * z)))
    return [float(low), float(high)], None


def figure(statistic: Statistic, n: int, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """{"value", "ci95", "n"} of a statistic over n patients, with "reason" where the interval or the value
    is null."""
    value = statistic(np.ones(n)) if n else float("nan")
    if not np.isfinite(value):
        return {
            "value": None,
            "ci95": None,
            "n": n,
            "reason": "undefined: no patient has it" if not n else "undefined",
        }
    interval, reason = bootstrap_interval(statistic, n, resamples=resamples, seed=seed)
    result: dict[str, Any] = {"value": float(value), "ci95": interval, "n": n}
    return result if reason is None else {**result, "reason": reason}


def finite_mean(values: Sequence[float]) -> float:
    """Mean of the values that are finite; NaN where none is."""
    array = np.asarray(values, np.float64)
    finite = array[np.isfinite(array)]
    return float(finite.mean()) if finite.size else float("nan")


def weighted_mean(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> float:
    """Mean of patient values; NaN when all weights are zero."""
    total = weights.sum()
    return float(values @ weights / total) if total > 0 else float("nan")


def pooled_ratio(sums: Float[np.ndarray, "n 2"], weights: Float[np.ndarray, " n"]) -> float:
    """sum of numerators / sum of counts over the patients; NaN for no count."""
    top, count = weights @ sums
    return float(top / count) if count > 0 else float("nan")


def paired_test(differences: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """Wilcoxon signed-rank test of paired patient differences with Pratt's treatment of zeros, two-sided.

    Returns p and the matched-pairs rank-biserial correlation (the sum of the positive ranks less the
    negative ones over the sum of all ranks of non-zero differences, zeros ranked as Pratt does); both null
    below two differences or when all are zero.
    """
    d = differences[np.isfinite(differences)]
    if d.size < 2 or not np.any(d):
        return {"p": None, "rank_biserial": None, "n": int(d.size)}
    ranks = stats.rankdata(np.abs(d))
    used = ranks[d != 0].sum()
    result: Any = stats.wilcoxon(d, zero_method="pratt", method="auto")
    return {
        "p": float(result.pvalue),
        "rank_biserial": float((ranks[d > 0].sum() - ranks[d < 0].sum()) / used),
        "n": int(d.size),
    }


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment over the p-values that exist."""
    known = [(p, i) for i, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for rank, (p, i) in enumerate(sorted(known)):
        running = max(running, min(1.0, p * (len(known) - rank)))
        adjusted[i] = running
    return adjusted


def sign_flip_p(effects: Float[np.ndarray, " n"], *, draws: int = 10_000, seed: int = 0) -> float:
    """One-sided p of mean(effects) > 0 when every patient's sign is exchangeable: exact up to 12 patients,
    sampled above.

    Its floor is 2^-n: few patients cannot give a small p, whatever the number of their voxels.
    """
    n = effects.size
    if n == 0:
        return float("nan")
    if n <= 12:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)[None, :]) & 1)
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, n))
        extra = 1
    # A tolerance: the identity among the flips must count as reaching its own mean despite rounding.
    reached = np.sum(signs @ effects >= effects.sum() - 1e-12 * np.abs(effects).sum())
    return float((reached + extra) / (signs.shape[0] + extra))
