"""From maps to one answer for a scan: the delivered mask, its predicted Dice, volumes with intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from scipy import ndimage

from entrust_jax.metrics import calibration, usefulness
from entrust_jax.trustmap.explanation import REVIEW_THRESHOLD

CONTESTED = 0.2  # conflict from which a voxel counts as contested

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))


def threshold_action(probability: Float[np.ndarray, "*s k"], tau: float) -> UInt8[np.ndarray, "*s"]:
    """Exclusive label map at threshold tau: the likeliest foreground class where 1 - p_0 > tau, background
    elsewhere.

    The threshold that maximises expected Dice is Dice*/2, below .5 for ambiguous objects (Lipton et al. 2014,
    arXiv 1402.1892).
    """
    winner = 1 + np.argmax(probability[..., 1:], axis=-1)
    return np.where(1.0 - probability[..., 0] > tau, winner, 0).astype(np.uint8)


def _pairwise_dice(
    a: UInt8[np.ndarray, "c v"], b: UInt8[np.ndarray, "n v"], classes: int
) -> tuple[Float[np.ndarray, "c n j"], np.ndarray]:
    """Dice per foreground class of every pair of label maps, 1 where both lack the class, and where that is
    so.
    """
    dice, empty = [], []
    for k in range(1, classes):
        x, y = (a == k).astype(np.float32), (b == k).astype(np.float32)
        total = x.sum(1, dtype=np.float64)[:, None] + y.sum(1, dtype=np.float64)[None, :]
        empty.append(total == 0)
        dice.append(np.where(total == 0, 1.0, 2.0 * (x @ y.T).astype(np.float64) / np.maximum(total, 1.0)))
    return np.stack(dice, axis=-1), np.stack(empty, axis=-1)


def dice_bayes(
    mean: Float[np.ndarray, "d h w k"],
    labels: UInt8[np.ndarray, "n d h w"],
    thresholds: Sequence[float] = THRESHOLDS,
) -> tuple[UInt8[np.ndarray, "d h w"], dict]:
    """The mask with the highest expected Dice under the hypotheses, and a Dice prediction that it did not
    choose itself.

    Candidates are `threshold_action(mean, tau)` for every tau and the N hypotheses y_n; the utility of a
    candidate is the mean over hypotheses, and over foreground classes, of its Dice (1 where both lack the
    class). The even half of the hypotheses chooses and the odd half predicts, since choosing and scoring on
    the same N is optimistic; a hypothesis is never compared with itself. With one hypothesis the choice is
    the mean's at tau = .5 and nothing is predicted.

    Returns the mask and a dict:
        predicted_dice           float, mean foreground-class Dice; None with one hypothesis
        predicted_dice_by_class  K - 1 floats, the same for each foreground class
        empty_by_class           K - 1 floats, share of the pairs where both lack the class (their Dice counts
                                 1); (dice - empty) / (1 - empty) is the prediction that skips them
        choice                   "threshold 0.35" or "hypothesis 3"
        action                   the same as a number: .35 (float, a threshold) or 3 (int, a hypothesis)
        utility                  expected Dice of the choice by the half that chose, optimistic
    """
    count, classes = labels.shape[0], mean.shape[-1]
    if count < 2:
        nothing = {
            "predicted_dice": None,
            "predicted_dice_by_class": None,
            "empty_by_class": None,
            "utility": None,
        }
        return threshold_action(mean, 0.5), {**nothing, "choice": "threshold 0.5", "action": 0.5}
    # voxels that are background in every candidate change no Dice
    somewhere = (labels > 0).any(0) | (1.0 - mean[..., 0] > min(thresholds, default=1.0))
    inside, votes = mean[somewhere], labels[:, somewhere]
    actions = [threshold_action(inside, tau) for tau in thresholds]
    candidates = np.concatenate([np.stack(actions), votes]) if actions else votes
    dice, empty = _pairwise_dice(candidates, votes, classes)
    other = np.ones((len(candidates), count), bool)
    other[len(actions) + np.arange(count), np.arange(count)] = False
    chooses = np.arange(count) % 2 == 0

    def average(value: np.ndarray, half: np.ndarray) -> np.ndarray:
        use = (other & half[None, :]).astype(np.float64)
        return np.einsum("cn,cnj->cj", use, value) / np.maximum(use.sum(1), 1.0)[:, None]

    utility = average(dice, chooses).mean(1)
    # with two or three hypotheses a candidate may have no other judge in its half
    utility[(other & chooses[None, :]).sum(1) == 0] = -1.0
    judged = (other & ~chooses[None, :]).sum(1) > 0
    best = int(np.argmax(np.where(judged, utility, -2.0)))
    result = np.zeros(labels.shape[1:], np.uint8)
    result[somewhere] = candidates[best]
    by_class = average(dice, ~chooses)[best]
    action = float(thresholds[best]) if best < len(actions) else best - len(actions)
    choice = f"threshold {thresholds[best]:g}" if best < len(actions) else f"hypothesis {best - len(actions)}"
    return result, {
        "predicted_dice": float(by_class.mean()),
        "predicted_dice_by_class": [float(v) for v in by_class],
        "empty_by_class": [float(v) for v in average(empty.astype(np.float64), ~chooses)[best]],
        "choice": choice,
        "action": action,
        "utility": float(utility[best]),
    }


def choose_threshold(
    cases: Sequence[tuple[Float[np.ndarray, "..."], Integer[np.ndarray, "..."]]],
    taus: Sequence[float] = THRESHOLDS,
) -> tuple[float, Float[np.ndarray, "t"]]:
    """The global tau whose `threshold_action` has the best Dice on labelled validation cases.

    cases: pairs (probability [*s k], label [*s], or [r *s] of r raters, with -1 = ignored). Per case the mean over
    raters and foreground classes of the Dice, 1 where both lack the class; then the mean over cases. Of equal taus
    the one nearest .5 is taken, so that validation cases that decide nothing change nothing.

    Returns tau and the mean Dice of each tau.
    """
    if not cases:
        raise ValueError("a threshold cannot be chosen without a validation case")
    score = np.zeros(len(taus))
    for probability, label in cases:
        labels = label if label.ndim == probability.ndim else label[None]
        for one in labels:
            use = one >= 0
            truth, inside = one[use].astype(np.uint8)[None], probability[use]
            actions = np.stack([threshold_action(inside, tau) for tau in taus])
            dice = _pairwise_dice(actions, truth, probability.shape[-1])[0].mean((1, 2))
            score += dice / (len(labels) * len(cases))
    best = [tau for tau, value in zip(taus, score, strict=True) if value >= score.max() - 1e-9]
    return float(min(best, key=lambda tau: abs(tau - 0.5))), score


def volumes(
    labels: UInt8[np.ndarray, "n d h w"], regions: Mapping[str, Sequence[int]], voxel_ml: float
) -> dict[str, dict]:
    """Volume in ml of each region (a union of classes): the mean over the hypotheses and their [5, 95]
    percentiles.

    The interval comes from whole hypotheses, whose pixels belong together; marginal probabilities cannot give
    it. It is None for a single map.
    """
    result = {}
    for name, classes in regions.items():
        ml = np.array([np.isin(map_, list(classes)).sum() for map_ in labels]) * float(voxel_ml)
        interval = [float(v) for v in np.percentile(ml, [5, 95])] if len(ml) > 1 else None
        result[name] = {"volume_ml": float(ml.mean()), "interval": interval}
    return result


def trust(
    error: Float[np.ndarray, "d h w"],
    probability: Float[np.ndarray, "d h w k"],
    label: UInt8[np.ndarray, "d h w"],
    body: Bool[np.ndarray, "d h w"],
    voxel_ml: float,
    predicted_dice: float | None,
    conflict: Float[np.ndarray, "d h w"] | None = None,
    gap: Float[np.ndarray, "d h w"] | None = None,
) -> dict[str, float | None]:
    """How far a whole result can be trusted: one score, and what else speaks for or against it (ours).

    score               the predicted Dice, 1 - mean_error for a method without one. 0 where nothing was found: a label
                        without foreground is not trusted before a person has looked, for all hypotheses being empty
                        gives a predicted Dice of 1 by convention (empty with empty), and a missed lesion cannot be
                        seen in the result. The least trusted case is the first to refer, of equal scores the one with
                        the larger mean_error: the order of referral.csv and of evaluate's risk-coverage curve.
    nothing_found       whether the delivered label has no foreground
    predicted_dice      as given
    mean_error          mean error probability where the foreground is likelier than 5 %, dilated by 5 voxels (in the
                        body where that is nowhere)
    contested_ml        volume with conflict above .2; None without a conflict map
    largest_doubtful_ml largest connected part of {error > .2}
    gap                 mean |p_1 - p_bar|_1 / 2 in the same place as mean_error; None without one
    """
    near = calibration.region_of_interest([probability[..., 0]])
    mean_error = usefulness.mean_inside(error, near, body)
    nothing = not label.any()
    parts, count = ndimage.label(error > REVIEW_THRESHOLD)  # type: ignore[misc]
    largest = int(np.bincount(parts.ravel())[1:].max()) if count else 0
    return {
        "score": 0.0 if nothing else 1.0 - mean_error if predicted_dice is None else predicted_dice,
        "nothing_found": nothing,
        "predicted_dice": predicted_dice,
        "mean_error": mean_error,
        "contested_ml": None if conflict is None else float((conflict > CONTESTED).sum() * voxel_ml),
        "largest_doubtful_ml": largest * voxel_ml,
        "gap": None if gap is None else usefulness.mean_inside(gap, near, body),
    }
