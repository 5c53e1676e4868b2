"""In words: where a prediction is likely wrong, why, which scan argues against it and what would follow."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt8
from scipy import ndimage

NONE, MISSING_INPUT, CONFLICT, IGNORANCE, BOUNDARY, OTHER = range(6)
CAUSES = ("none", "missing input", "conflict", "ignorance", "boundary", "other")
CONFLICT_THRESHOLD = 0.1
SUPPORT_THRESHOLD = 0.1
BOUNDARY_VOXELS = 2.0
OUTLINE_REACH = 10.0
CORE = 0.5  # of the way to the innermost voxel: what lies deeper is a thing's core, not its outline
OUTLINE_VOXELS = CORE * OUTLINE_REACH
CORE_TO_RIM = 0.5  # of the mean e: a thing whose core is no more doubtful than that is likelier there than its outline
BLAME_NATS = 0.1  # what a scan argues against the label before a sentence says so
ERROR_FLOOR = 0.05
REVIEW_THRESHOLD = 0.2  # error probability from which a voxel is up for review
MINIMUM_VOXELS = 5
# As report.json states them of a prediction, and train in the working folder, before any test case is seen.
THRESHOLDS = {
    "review_error_probability": REVIEW_THRESHOLD,
    "review_minimum_voxels": MINIMUM_VOXELS,
    "cause_error_probability": ERROR_FLOOR,
    "cause_conflict": CONFLICT_THRESHOLD,
    "cause_support": SUPPORT_THRESHOLD,
    "cause_boundary_voxels": BOUNDARY_VOXELS,
    "cause_outline_voxels": OUTLINE_VOXELS,
    "cause_outline_reach_voxels": OUTLINE_REACH,
    "cause_core": CORE,
    "cause_core_to_rim": CORE_TO_RIM,
    "blame_nats": BLAME_NATS,
}


def outline_distances(
    error_probability: Float[np.ndarray, "d h w"],
    label: UInt8[np.ndarray, "d h w"],
    body: Bool[np.ndarray, "d h w"],
    sampling: Sequence[float] | None,
) -> tuple[Float32[np.ndarray, "d h w"], Float32[np.ndarray, "d h w"]]:
    """Ways to the outline of the nearest thing that is surely there, and of the nearest that is likelier there than its
    outline is right. A thing is a 3-D component (26 neighbours) of one class of the delivered mask; 1 beside its
    outline, infinite without one and far outside, where no cause asks (beyond 10). Ours.

    Surely there: a voxel of it in the body is almost surely right (e <= .05). Where its innermost voxel lies n < 10
    voxels from its outline, ways inside are 10 / n times as far: in the core of something small the doubt is of the
    thing, not of its outline. Likelier there, which includes the former: the mean e of what lies deeper in it than
    half of n is at most half of that within 2 voxels of its outline.

    sampling: length of a voxel along D, H, W, in those of its shortest edge, as all ways are; None: the ways stay in
    their slice, in pixels.
    """
    surely, likelier = (np.full(label.shape, np.inf, np.float32) for _ in range(2))
    for k in range(1, int(label.max()) + 1):
        numbered = np.zeros(label.shape, np.int32)
        ndimage.label(label == k, structure=np.ones((3, 3, 3)), output=numbered)
        count = int(numbered.max()) + 1
        if count == 1:
            continue
        depth = _ways_to(label != k, label == k, sampling)
        innermost = np.zeros(count, np.float32)
        inside = (numbered > 0) & np.isfinite(depth)
        np.maximum.at(innermost, numbered[inside], depth[inside])
        core, rim = (
            _mean_by(numbered, error_probability, body & part, count)
            for part in (depth > CORE * innermost[numbered], depth <= BOUNDARY_VOXELS)
        )
        sure = np.bincount(numbered[body & (error_probability <= ERROR_FLOOR)], minlength=count) > 0
        likely = sure | (core <= CORE_TO_RIM * rim)
        sure[0] = likely[0] = False  # what lies around the things
        stretch = np.maximum(1, OUTLINE_REACH / np.maximum(innermost, 1))[numbered]
        for found, ways, within in ((sure, surely, depth * stretch), (likely, likelier, depth)):
            if found.any():
                there = found[numbered]
                np.minimum(ways, np.where(there, within, _ways_to(there, there, sampling)), out=ways)
    return surely, likelier


def _mean_by(
    numbered: Int32[np.ndarray, "*s"], values: Float[np.ndarray, "*s"], counted: Bool[np.ndarray, "*s"], count: int
) -> Float[np.ndarray, " count"]:
    """The mean over the voxels of each number that are counted; nan where none is."""
    numbers = numbered[counted]
    total = np.bincount(numbers, minlength=count).astype(float)
    return np.bincount(numbers, values[counted], minlength=count) / np.where(total > 0, total, np.nan)


def _ways_to(
    target: Bool[np.ndarray, "d h w"], thing: Bool[np.ndarray, "d h w"], sampling: Sequence[float] | None
) -> Float32[np.ndarray, "d h w"]:
    """Way to the nearest voxel of `target`, near a thing; infinite farther from it, and where there is no target."""
    ways = np.full(thing.shape, np.inf, np.float32)
    for part in [slice(None)] if sampling is not None else np.flatnonzero(thing.any(axis=(1, 2))):
        near = _around(thing[part], sampling or (1.0, 1.0))
        if target[part][near].any():
            ways[part][near] = ndimage.distance_transform_edt(~target[part][near], sampling)
    return ways


def _around(mask: Bool[np.ndarray, "*s"], sampling: Sequence[float]) -> tuple[slice, ...]:
    """The box of a mask and what lies within OUTLINE_REACH of it: transforms of a whole scan would be slow."""
    box = []
    for axis, step in enumerate(sampling):
        hit = np.flatnonzero(mask.any(axis=tuple(set(range(mask.ndim)) - {axis})))
        more = int(OUTLINE_REACH / step) + 1
        box.append(slice(max(int(hit[0]) - more, 0), int(hit[-1]) + 1 + more))
    return tuple(box)


def cause(
    error_probability: Float[np.ndarray, "d h w"],
    conflict: Float[np.ndarray, "d h w"],
    support: Float[np.ndarray, "m d h w k"],
    surely: Float[np.ndarray, "d h w"],
    likelier: Float[np.ndarray, "d h w"],
    boundary_distance: Float[np.ndarray, "d h w"],
    body: Bool[np.ndarray, "d h w"],
    shown: Bool[np.ndarray, "m d"],
) -> UInt8[np.ndarray, "d h w"]:
    """The first cause that applies to each voxel of the body that may well be wrong, e > .05; 0 elsewhere
    (ours). In this order, with their codes:

        4 boundary       within 5 voxels of the outline of something that is surely there, and in something small no
                         deeper than half of the way to its innermost voxel (`outline_distances`)
        1 missing input  no modality that is there supports any class (every s_mk <= .1), and one is not there
        2 conflict       kappa > .1
        3 ignorance      as 1, with every modality there
        4 boundary       within 10 voxels of the outline of something that is likelier there than its outline is right,
                         or within 2 of the delivered mask's border (`boundary_distance`, signed or not)
        5 other

    surely, likelier: the ways to such outlines (`outline_distances`).
    shown: the modalities that are there, slice by slice (`preprocess.shown`). Scans that draw one outline a little
    differently contradict each other along it: that is a doubt of the outline, hence the first rule; where the thing
    itself is in doubt nothing of it is sure. A voxel that is almost surely right needs no reason and gets 0, as does
    all outside the body.
    """
    there = shown[:, :, None, None]
    silent = np.all((support.max(axis=-1) <= SUPPORT_THRESHOLD) | ~there, axis=0)
    conditions = [
        surely <= OUTLINE_VOXELS,
        silent & ~there.all(axis=0),
        conflict > CONFLICT_THRESHOLD,
        silent,
        (likelier <= OUTLINE_REACH) | (np.abs(boundary_distance) <= BOUNDARY_VOXELS),
    ]
    codes = np.select(conditions, [BOUNDARY, MISSING_INPUT, CONFLICT, IGNORANCE, BOUNDARY], OTHER)
    return np.where(body & (error_probability > ERROR_FLOOR), codes, NONE).astype(np.uint8)


def _values(values: np.ndarray, inside: tuple, seen: np.ndarray) -> np.ndarray:
    """A map at those voxels of a component, `inside` being its index arrays, that are `seen`."""
    return values[tuple(axis[seen] for axis in inside)]


def _evidence(inside: tuple, conflict_pairs, support, unimodal, modalities, classes, seen) -> dict:
    """The dominant pair and the votes in one component. Every scan counts in the slices that show it, `seen` [m n]."""
    pairs = []
    for value, (m, n) in zip(conflict_pairs, combinations(range(len(modalities)), 2), strict=True):
        both = seen[m] & seen[n]
        if both.any():
            own = _values(value, inside, both)
            pairs.append((float(own.mean()), float(own.max()), modalities[m], modalities[n]))
    strongest = max(pairs, default=None)
    votes = {}
    for m, name in enumerate(modalities):
        if seen[m].any():
            strength, posterior = (_values(each[m], inside, seen[m]).mean(axis=0) for each in (support, unimodal))
            k, alone = int(strength.argmax()), int(posterior.argmax())
            votes[name] = {
                "class": classes[k] if strength[k] > SUPPORT_THRESHOLD else None,
                "strength": float(strength[k]),
                "alone": classes[alone],
                "probability": float(posterior[alone]),
            }
    pair = None
    if strongest is not None and strongest[1] > CONFLICT_THRESHOLD:
        pair = {
            "modalities": list(strongest[2:]),
            "mean_conflict": strongest[0],
            "max_conflict": strongest[1],
        }
    return {"pair": pair, "votes": votes}


def _missing(inside: tuple, cause: np.ndarray | None, shown: np.ndarray) -> np.ndarray:
    """Bool [m]: the modalities whose absence is the cause in some of a component, else those absent from most of it."""
    if cause is not None and (lacking := cause[inside] == MISSING_INPUT).any():
        return np.logical_not(np.all(shown[:, inside[0][lacking]], axis=1))
    return np.mean(shown[:, inside[0]], axis=1) < 0.5


def components(
    error_probability: Float[np.ndarray, "d h w"], cause: UInt8[np.ndarray, "d h w"] | None = None
) -> Int32[np.ndarray, "d h w"]:
    """The 3-D components (26 neighbours) of {e > REVIEW_THRESHOLD}, numbered from 1; 0 elsewhere.

    Where causes are known, doubt of an outline and other doubt are components apart: else one that lies inside a lesion
    would be lost in the band around it.
    """
    doubtful = error_probability > REVIEW_THRESHOLD
    parts = [doubtful] if cause is None else [doubtful & (cause != BOUNDARY), doubtful & (cause == BOUNDARY)]
    found, count = np.zeros(doubtful.shape, np.int32), 0
    for part in parts:
        numbered = np.zeros(doubtful.shape, np.int32)
        ndimage.label(part, structure=np.ones((3, 3, 3)), output=numbered)
        found += np.where(numbered > 0, numbered + count, 0)
        count += int(numbered.max())
    return found


def records(
    error_probability: Float[np.ndarray, "d h w"],
    label: UInt8[np.ndarray, "d h w"],
    spacing: Sequence[float],
    modalities: Sequence[str],
    classes: Sequence[str],
    shown: Bool[np.ndarray, "m d"],
    cause: UInt8[np.ndarray, "d h w"] | None = None,
    conflict_pairs: Float[np.ndarray, "p d h w"] | None = None,
    support: Float[np.ndarray, "m d h w k"] | None = None,
    unimodal: Float[np.ndarray, "m d h w k"] | None = None,
    attribution: Float[np.ndarray, "m d h w"] | None = None,
    counterfactual: UInt8[np.ndarray, "m d h w"] | None = None,
    conflict_uncertainty: Float[np.ndarray, "d h w"] | None = None,
    largest: int = 10,
) -> list[dict]:
    """One record per component of at least 5 voxels (`components`), the `largest` ones, most expected errors first.

    Arguments after `shown` that a method lacks are None (conflict_pairs, support and unimodal come together), and the
    parts of the record made from them are missing. Pairs are in the order of itertools.combinations; spacing
    is in mm; what is said of a modality is said of the region's slices that show it.

    Keys: index; place {"slice", "row", "column"} (the component's voxel nearest to its centre of error, array
    indices D, H, W); voxels, volume_ml; expected_error_ml (sum of e times the voxel's volume); mean_error,
    max_error; delivered (the commonest class of the mask there), delivered_ml (its foreground there); missing
    (modalities that are absent from most of it, with the cause missing input from any of it); cause and
    cause_shares; pair (the pair with the largest mean kappa, None when kappa stays below .1); votes {modality:
    {"class", what it supports beyond the base rate of the place, or None, "strength", its mean support, "alone",
    what it would say if it were the only scan, "probability", its mean posterior of that}}; attribution {modality:
    mean phi, nats}; blame (argmin phi over the present, None with fewer than two); counterfactual {modality:
    {"region_ml", "total_ml"}}: foreground in the component and in the scan if only that modality were right.
    conflict_uncertainty: its mean, nats (`probing.probe`); sentence: the record in words (`sentence`).
    Everything is plain Python, ready for JSON.
    """
    numbered = components(error_probability, cause)
    count = int(numbered.max())
    if count == 0:
        return []
    numbers = np.arange(1, count + 1)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    mass = ndimage.sum_labels(error_probability, numbered, numbers)
    order = [i for i in np.argsort(-mass, kind="stable") if sizes[i] >= MINIMUM_VOXELS][:largest]
    boxes = ndimage.find_objects(numbered)
    voxel_ml = float(np.prod(spacing)) / 1000.0
    total_ml = None if counterfactual is None else (counterfactual > 0).sum((1, 2, 3)) * voxel_ml

    result = []
    for index, i in enumerate(order):
        local = np.nonzero(numbered[boxes[i]] == i + 1)
        inside = tuple(axis + box.start for axis, box in zip(local, boxes[i], strict=True))
        e = error_probability[inside].astype(np.float64)
        position = np.stack(inside, axis=1)
        centre = (e[:, None] * position).sum(0) / e.sum()
        distance = (((position - centre[None]) * np.asarray(spacing)[None]) ** 2).sum(1)
        place = position[int(distance.argmin())]
        seen = shown[:, inside[0]]
        there = np.any(seen, axis=1)
        delivered = label[inside]
        record = {
            "index": index,
            "place": {"slice": int(place[0]), "row": int(place[1]), "column": int(place[2])},
            "voxels": int(sizes[i]),
            "volume_ml": float(sizes[i] * voxel_ml),
            "expected_error_ml": float(e.sum() * voxel_ml),
            "mean_error": float(e.mean()),
            "max_error": float(e.max()),
            "delivered": classes[int(np.bincount(delivered).argmax())],
            "delivered_ml": float((delivered > 0).sum() * voxel_ml),
            "missing": [modalities[m] for m in np.flatnonzero(_missing(inside, cause, shown)).tolist()],
        }
        if cause is not None:
            shares = np.bincount(cause[inside], minlength=len(CAUSES)) / sizes[i]
            record["cause"] = CAUSES[int(shares[1:].argmax()) + 1] if shares[1:].any() else CAUSES[NONE]
            record["cause_shares"] = {CAUSES[c]: float(shares[c]) for c in np.flatnonzero(shares)}
        if conflict_pairs is not None and support is not None and unimodal is not None:
            record |= _evidence(inside, conflict_pairs, support, unimodal, modalities, classes, seen)
        if attribution is not None:
            phi_of = record["attribution"] = {
                modalities[m]: float(_values(attribution[m], inside, seen[m]).mean())
                for m in np.flatnonzero(there).tolist()
            }
            several = len(phi_of) > 1
            record["blame"] = min(phi_of, key=lambda name: phi_of[name]) if several else None
        if counterfactual is not None and total_ml is not None:
            region_ml = [float((c[inside] > 0).sum() * voxel_ml) for c in counterfactual]
            record["counterfactual"] = {
                name: {"region_ml": region_ml[m], "total_ml": float(total_ml[m])}
                for m, name in enumerate(modalities)
                if there[m]
            }
        if conflict_uncertainty is not None:
            record["conflict_uncertainty"] = float(conflict_uncertainty[inside].mean())
        result.append(record | {"sentence": sentence(record)})
    return result


def _join(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _vote(name: str, vote: dict) -> str:
    if not vote["class"]:
        return f"{name} says no more than the place"
    more = "" if vote["class"] == vote["alone"] else f"; more for {vote['class']} than the place"
    return f"{name} says {vote['alone']} ({vote['probability']:.2f}{more})"


def _reason(record: dict) -> str:
    votes = record.get("votes", {})
    says = "alone, " + _join([_vote(name, vote) for name, vote in votes.items()]) if votes else ""
    kind = record.get("cause", "none")
    if kind == "missing input":
        verb = "is" if len(record["missing"]) == 1 else "are"
        others = " and the other scans show nothing clear" if votes else ""
        return f"{_join(record['missing'])} {verb} missing here{others}"
    if kind == "conflict":
        between = f"{_join(record['pair']['modalities'])} contradict each other" if record.get("pair") else ""
        return ": ".join(part for part in (between or "the scans contradict each other", says) if part)
    if kind == "ignorance":
        return "no scan shows anything clear here"
    if kind == "boundary":
        return "the border of the mask is uncertain" + (f": {says}" if says else "")
    return "no single cause stands out" + (f": {says}" if says else "")


def sentence(record: dict) -> str:
    """A record of `records` in plain words; says only what the record holds."""
    place = record["place"]
    text = [
        f"Slice {place['slice']} near row {place['row']}, column {place['column']}: "
        f"{record['volume_ml']:.2f} ml, delivered as {record['delivered']}, is wrong with a probability of "
        f"{100 * record['mean_error']:.0f} % on average and {100 * record['max_error']:.0f} % at most."
    ]
    if "cause" in record:
        text.append(f"Reason: {_reason(record)}.")
    guilty = record.get("blame")
    if guilty is not None and record["attribution"][guilty] <= -BLAME_NATS:
        text.append(f"{guilty} argues most against the delivered label ({record['attribution'][guilty]:+.2f} nats).")
    outcomes = record.get("counterfactual", {})
    if len(outcomes) > 1 and record.get("cause") == "conflict":
        parts = [f"{value['region_ml']:.2f} ml if only {name} is right" for name, value in outcomes.items()]
        text.append(f"Foreground here: {record['delivered_ml']:.2f} ml as delivered, {_join(parts)}.")
    return " ".join(text)
