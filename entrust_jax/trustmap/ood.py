"""Whether the scans of a case look like those of training, each modality by itself.

A modality is described by GROUPS of features (`entrust_jax.features.describe`): what the encoder says of it on average
over the body; the grain of the scan; and its look, which is its range of intensities, where in the body they lie, and
its grain. No class has a part in it. How far a group lies from the training patients' is the logarithm of a Mahalanobis
distance under a shrunk covariance. Of the look it counts how much farther that is than the distance from the nearest of
the other modalities: an unusual patient is far from all of them, an exchanged file is near another one. Each of these
numbers is put in the units in which training patients differ who are left out of the fit; the largest is the distance
of the modality, and the largest over the modalities that of the case: one number. It is made from training patients
alone and compared with that of n reference patients who had no part in the fit, so a patient like them lies beyond all
of them with probability at most 1 / (n + 1). With a test of each modality and group apart, and few patients, either too
many cases are flagged or none ever is.

Mahalanobis distances of features: Lee et al. 2018, arXiv 1807.03888, there per class; less the distance from another
law: Ren et al. 2021, arXiv 2106.09022. Groups, features and their maximum: ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

LEAST_PATIENTS = 8  # of a modality in training, below which nothing is usual
KNOWN = 0.5  # share of the training cases that must have a feature
FLOOR = 0.03  # of a deviation, in quadrature: features are of order 1, and one that is constant may yet move a little
LEAST_SHRINKAGE = 0.01
NEAR = float(np.log(1.5))  # log distance within which a scan lies among others; theirs are about 0
LEAST_SPREAD = 0.05  # of log distances, below which few patients agree by chance
LAGS = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32)  # voxels
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


# What counts of a group: how far it lies, or how much farther than from the nearest other modality; and what it is.
GROUPS = {
    "encoder": (False, "what the encoder sees of it"),
    "texture": (False, "its grain (noise, ghosts, sharpness, field of view)"),
    "look": (True, "its look"),
}

Features = Mapping[str, Float[np.ndarray, "m _"]]  # by group; NaN where a modality is missing or has no such feature
Found = dict[str, Any]

NOTHING: Found = {
    "patients": 0,
    "training": 0,
    "farthest": None,
    "note": "this model has no ood.json; run its train command again, which adds it in minutes",
}


# ---- what a scan shows without a network -------------------------------------------------------------------------


def texture(image: Float[np.ndarray, "d h w"], body: Bool[np.ndarray, "d h w"]) -> Float[np.ndarray, " f"]:
    """How fine the grain of a scan is: noise, ghosts, blur and another field of view change it.

    Logarithms of the mean squared difference between voxels of the body at LAGS along rows and columns (the variogram:
    a ghost repeats the body at one of them), and of the size of second differences along each and along both, of which
    noise has more than tissue (in them a neighbour outside the body counts as it is stored, as 0). NaN where the body
    is too small. Ours.
    """
    row = []
    for axis in (1, 2):
        for lag in LAGS:
            size = image.shape[axis]
            first, second = np.arange(max(size - lag, 0)), np.arange(lag, max(size, lag))
            both = body.take(first, axis) & body.take(second, axis)
            step = (image.take(second, axis) - image.take(first, axis))[both]
            row.append(_log(np.mean(step**2), 1e-6) if step.size else np.nan)
    ends = {axis: slice(1, image.shape[axis] - 1) for axis in (1, 2)}
    for axes in ((1,), (2,), (1, 2)):
        bent = image
        for axis in axes:
            bent = np.diff(bent, 2, axis=axis) if bent.shape[axis] > 2 else bent[:0]
        inside = body[tuple(ends[axis] if axis in axes else slice(None) for axis in range(3))]
        sizes = np.abs(bent[inside]) if bent.shape == inside.shape else np.zeros(0)
        row += [_log(of(sizes), 1e-3) if sizes.size else np.nan for of in (np.median, np.mean)]
    return np.array(row)


def spread(image: Float[np.ndarray, "d h w"], body: Bool[np.ndarray, "d h w"]) -> Float[np.ndarray, " f"]:
    """QUANTILES of a scan's intensities inside the body, and the share of it that shows nothing at all."""
    inside = image[body].astype(np.float64)
    if not inside.size:
        return np.full(len(QUANTILES) + 1, np.nan)
    return np.append(np.quantile(inside, QUANTILES), np.mean(inside == 0))


def _log(value: Any, floor: float) -> float:
    return float(np.log(float(value) + floor))


# ---- the laws of training scans ----------------------------------------------------------------------------------


class Normal(NamedTuple):
    """A normal law of features. Their covariance in units of `scale`, shrunk to (1 - rho) S + rho mu I, has `variances`

    along the orthonormal `directions` in which the cases differ, and `rest` across them.
    """

    mean: Float[np.ndarray, " f"]
    scale: Float[np.ndarray, " f"]
    directions: Float[np.ndarray, "r f"]
    variances: Float[np.ndarray, " r"]
    rest: Float[np.ndarray, ""]


class Usual(NamedTuple):
    """What is usual of a group: a law of each modality, over the features that are `known` of it, and the `centre` and

    `spread` of what left-out training patients score. None, and NaN, for a modality that too few of them have.
    """

    known: Bool[np.ndarray, "m g"]
    laws: tuple[Normal | None, ...]
    centre: Float[np.ndarray, " m"]
    spread: Float[np.ndarray, " m"]


def shrinkage(z: Float[np.ndarray, "n f"]) -> float:
    """Weight of mu I beside the covariance S of centred rows (Ledoit and Wolf 2004, J. Multivariate Anal. 88, 365).

    min(b^2, d^2) / d^2 with d^2 = |S - mu I|^2 and b^2 = sum_i |z_i z_i' - S|^2 / n^2, from the inner products of the
    rows: features outnumber cases.
    """
    n, f = z.shape
    gram = z @ z.T
    square = float(np.sum(gram**2)) / n**2
    apart = square - float(np.trace(gram) / n) ** 2 / f
    noise = (float(np.sum(np.diag(gram) ** 2)) / n - square) / n
    return min(max(noise, 0.0) / apart, 1.0) if apart > 1e-12 * square else 1.0


def fit_normal(x: Float[np.ndarray, "n f"]) -> Normal:
    """The law of complete rows; also of rows that are equal, and of a single one."""
    mean, scale = x.mean(axis=0), np.hypot(x.std(axis=0), FLOOR)
    z = (x - mean) / scale
    n, f = z.shape
    rho = max(shrinkage(z), LEAST_SHRINKAGE)
    mu = max(float(np.sum(z**2)) / (n * f), FLOOR)
    _, sizes, directions = np.linalg.svd(z, full_matrices=False)
    keep = sizes > 1e-6
    rest = rho * mu
    return Normal(mean, scale, directions[keep], (1 - rho) * sizes[keep] ** 2 / n + rest, np.asarray(rest))


def log_distance(law: Normal, x: Float[np.ndarray, " f"]) -> float:
    """Logarithm of the Mahalanobis distance over the square root of the number of features. A feature that is NaN has

    the law's mean.
    """
    z = np.where(np.isfinite(x), x - law.mean, 0.0) / law.scale
    along = law.directions @ z
    across = max(float(z @ z - along @ along), 0.0)
    square = (float(np.sum(along**2 / law.variances)) + across / float(law.rest)) / len(z)
    return 0.5 * float(np.log(square + 1e-6))


def usual(x: Float[np.ndarray, "n m g"], patients: Sequence[str], relative: bool) -> Usual:
    """What is usual of a group of features of n training cases of these patients.

    relative: what counts is how much farther a modality lies from its own law than from the nearest of the others';
    then features count that are known of every modality.
    """
    names, number = np.unique(np.array(patients, dtype=str), return_inverse=True)
    modalities = x.shape[1]
    there = np.asarray(np.isfinite(x).any(axis=2))
    enough = np.array([len(np.unique(number[there[:, m]])) >= LEAST_PATIENTS for m in range(modalities)])
    known = np.stack([_share_known(x[there[:, m], m]) >= KNOWN for m in range(modalities)]) & enough[:, None]
    if relative and enough.any():
        known = enough[:, None] & known[enough].all(axis=0)
    enough &= known.any(axis=1)

    def laws(kept: np.ndarray) -> tuple[Normal | None, ...]:
        return tuple(_law(x[kept & there[:, m], m][:, known[m]]) if enough[m] else None for m in range(modalities))

    nothing = np.zeros(modalities)
    left: list[np.ndarray] = []
    for patient in range(len(names)) if enough.any() else ():
        without = Usual(known, laws(number != patient), nothing, nothing + 1)
        left.append(_greatest([scores(without, row, relative) for row in x[number == patient]]))
    if not left:
        return Usual(known, (None,) * modalities, nothing + np.nan, nothing + np.nan)
    each = np.stack(left)
    centre = np.array([_median(column) for column in each.T])
    spread = 1.4826 * np.array([_median(column) for column in np.abs(each - centre).T])
    return Usual(known, laws(np.ones(len(x), bool)), centre, np.maximum(spread, LEAST_SPREAD))


def _share_known(x: Float[np.ndarray, "n g"]) -> Float[np.ndarray, " g"]:
    return np.isfinite(x).mean(axis=0) if len(x) else np.zeros(x.shape[1])


def _law(x: Float[np.ndarray, "n f"]) -> Normal:
    seen = np.isfinite(x)
    mean = np.where(seen, x, 0.0).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    return fit_normal(np.where(seen, x, mean))


def _median(x: Float[np.ndarray, " n"]) -> float:
    x = x[np.isfinite(x)]
    return float(np.median(x)) if x.size else float("nan")


def _greatest(rows: Sequence[Float[np.ndarray, " m"]]) -> Float[np.ndarray, " m"]:
    """The largest of each column, NaN where there is none."""
    every = np.stack(rows)
    return np.where(np.isfinite(every).any(axis=0), np.where(np.isfinite(every), every, -np.inf).max(axis=0), np.nan)


def scores(usual: Usual, x: Float[np.ndarray, "m g"], relative: bool) -> Float[np.ndarray, " m"]:
    """How much farther each modality of a case lies than left-out training patients do, in their spreads: of the log

    distance, or with `relative` of what it exceeds the smallest from another modality by. NaN where a modality is
    missing or nothing is usual of it, and with `relative` where there is no other.
    """
    found = np.full(len(x), np.nan)
    for m, law in enumerate(usual.laws):
        row = x[m][usual.known[m]]
        if law is None or not np.isfinite(row).any():
            continue
        found[m] = log_distance(law, row)
        if relative:
            others = [log_distance(other, row) for n, other in enumerate(usual.laws) if n != m and other is not None]
            found[m] = found[m] - min(others) if others else np.nan
    return (found - usual.centre) / usual.spread


def taken_for(usual: Usual, x: Float[np.ndarray, "m g"], m: int) -> int | None:
    """The other modality of a relative group among whose scans modality m of a case lies, nearer than among its own;

    None where it is far from all of them.
    """
    row = x[m][usual.known[m]]
    away = {n: log_distance(law, row) for n, law in enumerate(usual.laws) if law is not None}
    other = min(away, key=lambda n: away[n])
    return other if other != m and away[other] < NEAR else None


def compared(laws: Mapping[str, Usual], features: Features) -> Float[np.ndarray, "g m"]:
    """The scores of a case, by group and modality."""
    return np.stack([scores(own, features[name].astype(np.float64), GROUPS[name][0]) for name, own in laws.items()])


def farthest(found: Float[np.ndarray, "g m"]) -> float:
    """The distance of a case: the largest of its scores; NaN where there is none."""
    return float(np.max(found[np.isfinite(found)])) if np.isfinite(found).any() else float("nan")


# ---- against the reference patients ------------------------------------------------------------------------------


def fit(
    training: Sequence[tuple[str, Features]], reference: Sequence[tuple[str, Features]], *, note: str = ""
) -> tuple[dict[str, Usual], Found]:
    """What is usual of each group, from (patient, features) of training cases, and what ood.json says of the reference

    patients: how many there are, and the distance of the farthest (a patient's is that of his farthest scan). `note`
    says why there is nothing to compare with.
    """
    laws: dict[str, Usual] = {}
    people: dict[str, float] = {}
    if not note and training:
        patients = [patient for patient, _ in training]
        for name, (relative, _) in GROUPS.items():
            x = np.stack([own[name] for _, own in training]).astype(np.float64)
            laws[name] = usual(x, patients, relative)
        for patient, own in reference:
            here = farthest(compared(laws, own))
            if np.isfinite(here):
                people[patient] = max(here, people.get(patient, here))
        if not any(law for own in laws.values() for law in own.laws):
            note = f"no modality has {LEAST_PATIENTS} training patients"
        elif not people:
            note = "there is no patient who had no part in training"
    if note or not training:
        return {}, NOTHING | {"note": note or "there are no training patients"}
    count = len(set(patients))
    return laws, {"patients": len(people), "training": count, "farthest": max(people.values()), "note": ""}


def compare(laws: Mapping[str, Usual], found: Found, features: Features, modalities: Sequence[str]) -> Found:
    """A case against the reference patients.

    Returns
        unlike      names of the modalities that lie beyond the farthest of the reference patients
        distance    of the case, None where nothing could be compared
        farthest    of the reference patients; patients: how many they are; note: why there are none
        modalities  name -> distance (None: not compared), group: in which it is farthest, times: its Mahalanobis
                    distance there over the one with which it would be as far as the farthest reference patient, like:
                    the modality whose scans it lies among, where it is unlike by its look
    """
    record: Found = {"unlike": [], "distance": None} | {key: found[key] for key in ("farthest", "patients", "note")}
    record["modalities"] = {}
    if found["note"]:
        return record
    every = compared(laws, features)
    whole = farthest(every)
    record["distance"] = whole if np.isfinite(whole) else None
    names = [*laws]
    for m, name in enumerate(modalities):
        own = farthest(every[:, m : m + 1])
        if not np.isfinite(own):
            record["modalities"][name] = dict.fromkeys(("distance", "group", "times", "like"))
            continue
        group, like = names[int(np.nanargmax(every[:, m]))], None
        if own > found["farthest"]:
            record["unlike"].append(name)
            if GROUPS[group][0]:
                other = taken_for(laws[group], features[group].astype(np.float64), m)
                like = None if other is None else modalities[other]
        times = float(np.exp((own - found["farthest"]) * laws[group].spread[m]))
        record["modalities"][name] = {"distance": own, "group": group, "times": times, "like": like}
    return record


def sentences(record: Found) -> list[str]:
    """A line for every modality that is unlike training's, the farthest first."""
    own, n = record["modalities"], record["patients"]
    lines = []
    for name in sorted(record["unlike"], key=lambda name: -own[name]["distance"]):
        one = own[name]
        what = f"it looks like {one['like']}" if one["like"] else f"by {GROUPS[one['group']][1]}"
        lines.append(
            f"{name} does not look like the {name} scans of training: {what} (distance {one['times']:.2g} times that "
            f"of the farthest of {n} reference patients); see whether the right file was given"
        )
    return lines


# ---- as arrays ---------------------------------------------------------------------------------------------------


def arrays_of(laws: Mapping[str, Usual]) -> dict[str, np.ndarray]:
    """The laws as named arrays, float64."""
    arrays = {}
    for group, own in laws.items():
        arrays |= {f"{group}/known": own.known, f"{group}/centre": own.centre, f"{group}/spread": own.spread}
        for m, law in enumerate(own.laws):
            for name, value in law._asdict().items() if law else ():
                arrays[f"{group}/{m}/{name}"] = value
    return arrays


def laws_of(arrays: Mapping[str, np.ndarray], modalities: int) -> dict[str, Usual]:
    """`arrays_of` undone. Raises KeyError or ValueError where arrays are missing or do not fit each other."""
    laws = {}
    for group in GROUPS:
        known, centre, spread = (np.asarray(arrays[f"{group}/{name}"]) for name in ("known", "centre", "spread"))
        if not (len(known) == len(centre) == len(spread) == modalities):
            raise ValueError(f"{group} is of {len(known)} modalities")
        each: list[Normal | None] = []
        for m in range(modalities):
            if f"{group}/{m}/mean" not in arrays:
                each.append(None)
                continue
            law = Normal(*(np.asarray(arrays[f"{group}/{m}/{name}"]) for name in Normal._fields))
            size = int(known[m].sum())
            if not (len(law.mean) == len(law.scale) == law.directions.shape[1] == size):
                raise ValueError(f"{group} of modality {m} has another number of features")
            each.append(law)
        laws[group] = Usual(known, tuple(each), centre, spread)
    return laws
