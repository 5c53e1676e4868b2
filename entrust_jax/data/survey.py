"""What a data set holds and what is wrong with it, case by case: for a person, before anything is trained."""

import hashlib
import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from entrust_jax.data import augment, dataset, layouts, nnunet, phantom_scene, pipeline, preprocess, resampling
from entrust_jax.data.cases import (
    ENDINGS,
    PICTURES,
    SOUGHT,
    Case,
    Mistake,
    ending_of,
    files_below,
    first_dicom,
    why_no_scan,
)
from entrust_jax.data.intensity import Rule, normalise, rules_of
from entrust_jax.data.preprocess import Volume
from entrust_jax.data.scans import load_scan
from entrust_jax.errors import UserError

CELLS = (3, 6, 6)  # of the body's box, in which a modality's mean and spread are compared between cases
LEAST_VOXELS = 20  # of a cell, below which it says nothing
LEAST_CASES = 8  # of a modality, below which there is no usual appearance
USUAL_CASES = 100  # at most, whose appearance is the usual one
SUSPICIOUS = 1.03  # usual distance over that of the best exchange: 1 of 61 glioma patients lies above it as they are
ODD = 10.0  # times the median spacing of a set, above which and below whose inverse a scan gets a word
SAMPLES = 12  # patches of a case, of which the one with most foreground shows the augmentation
FAR = 4.0  # deviations from the usual that count; more is no more
SHOWN = 5  # files, and folders, that are not read and have a line of their own
MOST_VALUES = 12  # of masks, in a line


class Print(NamedTuple):
    """A file's values, to be found again in other cases: `digest` is equal for equal voxels, however stored."""

    file: Path
    digest: str
    mask: bool


class Finding(NamedTuple):
    """One case: what was read, or why it could not be."""

    name: str
    patient: str
    present: tuple[str, ...]
    shape: tuple[int, int, int]  # D, H, W
    spacing: tuple[float, float, float]  # mm
    slices: int  # with a body
    counts: tuple[int, ...] | None  # labelled voxels of each class; None without a label
    appearance: Float[np.ndarray, "m m f"]  # of each scan, when read as each of the modalities
    prints: tuple[Print, ...]  # of scans with more than one value and of masks that are not empty
    warnings: tuple[str, ...]
    error: str = ""
    scan: str = ""  # the file of the reference
    drawn: tuple[int, ...] = ()  # class indices that any rater's mask holds
    values: tuple[float, ...] = ()  # of the mask files, as stored


class Glimpse(NamedTuple):
    """The slice of a case that shows most of its label, else its middle."""

    name: str
    number: int
    image: Float[np.ndarray, "m h w"]
    present: Bool[np.ndarray, " m"]
    label: Int[np.ndarray, "h w"] | None
    body: Bool[np.ndarray, "h w"]
    spacing: tuple[float, float, float]


class Sample(NamedTuple):
    """One training patch, in one of the ways in which training may change it."""

    title: str
    image: Float[np.ndarray, "m h w"]
    present: Bool[np.ndarray, " m"]
    label: Int[np.ndarray, "h w"]
    body: Bool[np.ndarray, "h w"]


def cases_of(data: Any) -> tuple[list[Case] | list[str], list[Mistake], tuple[str, ...]]:
    """What there is to look at, scans or the names of a few phantoms, and every mistake and note of the listing.

    Raises UserError where there is no data.
    """
    if data.layout != "phantom":
        return dataset.listing(data)
    return [phantom_scene.case_name(number) for number in range(min(16, sum(data.phantom.cases)))], [], ()


def look(data: Any, case: Case | str, seed: int) -> tuple[Finding, Glimpse | None]:
    """Reads a case as training would. A case that cannot be read is a finding, not an exception."""
    modalities, classes = tuple(data.modalities), tuple(data.classes)
    if isinstance(case, str):
        (volume,), _ = dataset.read(data, [case], seed)
        own = np.stack([appearance(volume, image, volume.body) for image in volume.image])
        own[~volume.present] = np.nan
        looks = np.repeat(own[:, None], len(modalities), axis=1)  # z-scores, whichever it is read as
    else:
        options = dataset.reading(data)
        intensity, drop_copies = options.pop("intensity"), options.pop("drop_copies")
        try:
            measured = preprocess.measure(case, **options)
            volume = preprocess.normalised(
                measured, modalities=modalities, reference=data.reference, intensity=intensity, drop_copies=drop_copies
            )
            looks = appearances(measured, volume, rules_of(intensity, modalities))
        except UserError as error:
            nothing = np.full((len(modalities), len(modalities), 2 * int(np.prod(CELLS))), np.nan)
            return Finding(
                case.name, case.patient, tuple(case.images), (0, 0, 0), (0, 0, 0), 0, None, nothing, (), (), str(error)
            ), None
    counts = None
    said = list(volume.warnings)
    if volume.label is None:
        said.append(f"case {volume.name}: has no label; training leaves it out")
    else:
        counts = tuple(int(np.sum(volume.label == k)) for k in range(len(classes)))
    present = tuple(name for name, here in zip(modalities, volume.present, strict=True) if here)
    if lacking := [name for name in modalities if name not in present]:
        said.append(f"case {volume.name}: lacks {', '.join(lacking)}")
    prints, values = ((), ()) if isinstance(case, str) else prints_of(case, volume)
    finding = Finding(
        name=volume.name,
        patient=volume.patient,
        present=present,
        shape=(volume.body.shape[0], volume.body.shape[1], volume.body.shape[2]),
        spacing=volume.spacing,
        slices=int(volume.body.any(axis=(1, 2)).sum()),
        counts=counts,
        appearance=looks,
        prints=prints,
        warnings=tuple(said),
        scan=str(volume.reference or volume.name),
        drawn=() if volume.label is None else tuple(np.unique(preprocess.labels_of(volume)).tolist()),
        values=values,
    )
    return finding, glimpse(volume)


def prints_of(case: Case, volume: Volume) -> tuple[tuple[Print, ...], tuple[float, ...]]:
    """The prints of a case's files, and the values in its masks.

    Of the files and not of `volume`, where a missing modality changes the body and with it every z-score.
    """
    prints, values = [], set()
    for path in case.images.values():
        _, scan = load_scan(path)
        if scan.min() < scan.max():
            prints.append(Print(path, digest(scan), False))
    drawn = [path for path in (case.label, *case.raters) if path is not None]
    for path, label in zip(drawn, preprocess.labels_of(volume) if drawn else (), strict=True):
        _, mask = load_scan(path)
        values.update(np.unique(mask).tolist())
        if (label > 0).any():
            prints.append(Print(path, digest(mask), True))
    return tuple(prints), tuple(float(value) for value in sorted(values))


def digest(values: np.ndarray) -> str:
    """A hash of an array's shape and values, whatever their type."""
    found = hashlib.sha256(str(values.shape).encode())
    found.update(np.ascontiguousarray(values, np.float32).tobytes())
    return found.hexdigest()


def glimpse(volume: Volume) -> Glimpse:
    """The slice with the largest labelled area, else the middle one of the body."""
    area = np.zeros(len(volume.body)) if volume.label is None else np.sum(volume.label > 0, axis=(1, 2))
    inside = np.flatnonzero(volume.body.any(axis=(1, 2)))
    middle = int(inside[len(inside) // 2]) if inside.size else len(volume.body) // 2
    z = int(np.argmax(area)) if area.any() else middle
    label = None if volume.label is None else volume.label[z].copy()  # a view would keep the whole volume
    image, body = volume.image[:, z].copy(), volume.body[z].copy()
    return Glimpse(volume.name, z, image, volume.present, label, body, volume.spacing)


def telling(findings: Sequence[Finding]) -> str | None:
    """The case that shows best what augmentation does: most modalities, then most labelled voxels. None: no label."""
    labelled = [finding for finding in findings if finding.counts is not None and not finding.error]
    best = max(labelled, key=lambda one: (len(one.present), sum(one.counts[1:]) if one.counts else 0), default=None)
    return None if best is None else best.name


def samples(data: Any, volume: Volume, seed: int) -> list[Sample]:
    """One training patch plain, under everything that augmentation does to it one by one, and under all at once.

    Made by the functions that make training's patches, with every kind that the config uses certain to happen: the
    patch of the most labelled voxels among the first few that training would draw from this case.
    """
    table = pipeline.make_table([volume], tuple(data.patch))
    share = data.foreground_share if len(table.foreground) else 0.0
    kinds = augment.settings_of(data)
    empty = [augment.no_signal(volume.image, kinds.rules)]

    def patch(index: int, mild: bool, *used: str) -> pipeline.Batch:
        chosen = kinds._replace(rate=dict.fromkeys(used, 1.0)) if used else None
        return pipeline.example(
            index, table=table, seed=seed, share=share, augment=mild, kinds=chosen, empty=empty
        )  # fmt: skip

    index = max(range(SAMPLES), key=lambda i: int((patch(i, False)["label"] > 0).sum()))
    used = [kind for kind in augment.KINDS if kinds.rate.get(kind, 0) > 0]
    plain = patch(index, False)
    shown = {"plain": plain, "mirrored\n(50 %)": augment.flip(plain, 0)}
    mild = augment.intensity(plain["image"], plain["present"], plain["body"], np.random.default_rng([seed, index]))
    shown["gain, offset, gamma,\nnoise, all mild (100 %)"] = plain | {"image": mild}
    shown |= {f"{kind}\n({100 * kinds.rate[kind]:.0f} %)": patch(index, False, kind) for kind in used}
    shown["all of it"] = patch(index, True, *used)
    if plain["label"].ndim == 3:  # a page is flat: the slice with most of the label
        z = int(np.argmax((plain["label"] > 0).sum(axis=(1, 2))))
        shown = {
            title: one | {"image": one["image"][:, z], "label": one["label"][z], "body": one["body"][z]}
            for title, one in shown.items()
        }
    return [Sample(title, *(one[k] for k in ("image", "present", "label", "body"))) for title, one in shown.items()]


def appearances(
    measured: preprocess.Measured, volume: Volume, rules: Sequence[Rule | None]
) -> Float[np.ndarray, "m m f"]:
    """The `appearance` of every scan, read by the rule of every modality; NaN where a scan is missing.

    A file in another's place is so read by that one's rule, from its own values: what a rule has clipped is gone.
    """
    found = np.full((len(rules), len(rules), 2 * int(np.prod(CELLS))), np.nan)
    for m in np.flatnonzero(measured.present).tolist():
        seen = measured.body & measured.covered[m]
        read = {
            rule: appearance(volume, normalise(measured.values[m : m + 1], np.array([True]), seen, (rule,))[0], seen)
            for rule in set(rules)
        }
        found[m] = [read[rule] for rule in rules]
    return found


def appearance(
    volume: Volume, image: Float[np.ndarray, "d h w"], seen: Bool[np.ndarray, "d h w"]
) -> Float[np.ndarray, " f"]:
    """Mean and standard deviation of an image, where it is seen, in each cell of the body's box; NaN where there is too

    little. Ours.
    """
    size = int(np.prod(CELLS))
    place = (volume.coordinates[seen] + 1) / 2 * np.array(CELLS)
    cell = np.ravel_multi_index(tuple(np.clip(place.astype(int), 0, np.array(CELLS) - 1).T), CELLS)
    values = image[seen].astype(np.float64)
    count = np.bincount(cell, minlength=size)
    mean = np.bincount(cell, values, minlength=size) / np.maximum(count, 1)
    square = np.bincount(cell, values**2, minlength=size) / np.maximum(count, 1)
    both = np.concatenate([mean, np.sqrt(np.maximum(square - mean**2, 0))])
    return np.where(np.tile(count > LEAST_VOXELS, 2), both, np.nan)


def exchanged(findings: Sequence[Finding], modalities: Sequence[str]) -> list[str]:
    """A line for every case whose modalities look more like each other's usual appearance than like their own.

    Usual: median and deviation over the other cases. A suspicion, for which a person should look at the picture. Of
    files exchanged by hand 157 of 174 are noticed on the glioma set (MR alone), with one line about 61 cases as they
    are, and 48 of 48 on the sarcoma set (PET, CT, MR), with none about 16.
    """
    seen = [finding for finding in findings if not finding.error]
    every = np.stack([finding.appearance for finding in seen]) if seen else np.zeros((0, *[len(modalities)] * 2, 0))
    as_named = np.stack([every[:, m, m] for m in range(len(modalities))], axis=1)
    lines = []
    for i, finding in enumerate(seen):
        rest = np.delete(as_named[:USUAL_CASES], i, axis=0) if i < USUAL_CASES else as_named[:USUAL_CASES]
        enough = np.sum(~np.all(np.isnan(rest), axis=2), axis=0) >= LEAST_CASES
        here = [m for m in range(len(modalities)) if enough[m] and not np.isnan(as_named[i, m]).all()]
        if len(here) < 2:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a cell that no case has
            usual = np.nanmedian(rest, axis=0)
            spread = 1.48 * np.nanmedian(np.abs(rest - usual), axis=0) + 0.1
            away = np.abs(every[i] - usual[None]) / spread[None]
            cost = np.nanmean(np.minimum(away, FAR), axis=2)  # [file, modality]
        orders = [*itertools.permutations(here)] if len(here) < 7 else _exchanges(here)
        best = min(orders, key=lambda order: sum(cost[a, b] for a, b in zip(here, order, strict=True)))
        own, other = (sum(cost[a, b] for a, b in zip(here, order, strict=True)) for order in (here, best))
        if own > SUSPICIOUS * other:
            pairs = [f"{modalities[a]} looks like {modalities[b]}" for a, b in zip(here, best, strict=True) if a != b]
            lines.append(f"case {finding.name}: {', '.join(pairs)}; see whether the files were exchanged")
    few = [name for name in modalities if 0 < sum(name in one.present for one in seen) <= LEAST_CASES]
    if len(modalities) > 1 and few:
        lines.append(f"too few cases to notice exchanged files of {', '.join(few)}: that takes {LEAST_CASES + 1}")
    return lines


def _exchanges(here: list[int]) -> list[tuple[int, ...]]:
    """As they are, and every exchange of two."""
    orders = [tuple(here)]
    for a, b in itertools.combinations(range(len(here)), 2):
        order = list(here)
        order[a], order[b] = order[b], order[a]
        orders.append(tuple(order))
    return orders


def odd_spacings(findings: Sequence[Finding]) -> list[str]:
    """A line for every case whose voxels are many times coarser or finer along an axis than the set's median.

    A header in another unit, or a scan of another kind; a plan of the working spacing counts it as well.
    """
    read = [finding for finding in findings if not finding.error]
    lines = []
    for finding in read if len(read) > 2 else []:  # of two neither is usual
        median = np.median([one.spacing for one in read], axis=0)
        times = np.array(finding.spacing) / median
        if np.any(times > ODD) or np.any(times < 1 / ODD):
            own, usual = (" x ".join(f"{mm:.3g}" for mm in spacing) for spacing in (finding.spacing, median.tolist()))
            lines.append(
                f"{finding.scan}: has voxels of {own} mm, the set's median is {usual} (D H W); see whether its header"
                " is in another unit"
            )
    return lines


def repeated(findings: Sequence[Finding]) -> list[str]:
    """A line for every two cases that hold the same scan or mask: on both sides of a split it would leak."""
    first: dict[str, tuple[str, Path]] = {}
    lines = []
    for finding in findings:
        same: dict[str, list[tuple[Print, Path]]] = {}
        for own in finding.prints:
            name, file = first.setdefault(own.digest, (finding.name, own.file))
            if name != finding.name:
                same.setdefault(name, []).append((own, file))
        for name, pairs in same.items():
            own, file = pairs[0]
            what, mend = ("mask", "see whose it is") if own.mask else ("scan", "remove one of the cases")
            more = f" ({len(pairs) - 1} more too)" if len(pairs) > 1 else ""
            lines.append(
                f"case {finding.name}: {own.file} holds the same {what} as {file} of case {name}{more}; {mend}"
            )
    return lines


def unused(data: Any, cases: Sequence[Case], mistakes: Sequence[Mistake] = ()) -> list[str]:
    """A line for every scan that is taken for nothing: a modality's name may be misspelt; and one for every folder in

    which nothing is taken though it holds scans, readable or not: a whole case may be missing.

    Files that a mistake is about have their line already.
    """
    taken = {os.path.realpath(path) for case in cases for path in layouts.files_of(case)}
    taken |= {os.path.realpath(path) for mistake in mistakes for path in mistake.files}
    place = Path(data.dir)
    place = place if place.is_dir() else place.parent
    pictures = PICTURES if any(path.lower().endswith(PICTURES) for path in taken) else ()
    left: list[Path] = []
    used = {place}
    for folder, files in itertools.groupby(files_below(place), key=lambda path: path.parent):
        every = list(files)
        scans = [path for path in every if ending_of(path.name, (*SOUGHT, *pictures))]
        scans = scans or [path for path in [first_dicom(every[:1])] if path is not None]  # a series is like its first
        more = [path for path in scans if os.path.realpath(path) not in taken]
        if len(more) < len(scans):
            used |= {folder, *folder.parents}
        left += more
    beside = [path for path in left if path.parent in used and ending_of(path.name, (*ENDINGS, *pictures))]
    missing: dict[Path, list[Path]] = {}
    for path in left:
        if path.parent not in used:
            top = next(folder for folder in reversed(path.parents) if folder not in used and place in folder.parents)
            missing.setdefault(top, []).append(path)
    missing = {top: own for top, own in missing.items() if data.layout != "nnunet" or top.name not in nnunet.TEST}
    said = [f"{path}: is not read: no modality of the config, and no label of a case" for path in beside]
    expected, _ = layouts.LAYOUTS[data.layout]
    mend = "give it a row" if data.layout == "manifest" else f"name it as the layout {data.layout} does ({expected})"
    gone = []
    for top, own in sorted(missing.items(), key=lambda item: (len(item[0].parts), item[0])):
        why = why_no_scan(own[0])
        shown = f"{own[0].relative_to(top)}; if it is a case, {mend}" if why is None else f"{own[0].name}, which {why}"
        many = "scans" if len(own) > 1 else "scan"
        gone.append(f"{top}: nothing in it is read, though it holds {len(own)} {many}, such as {shown}")
    return _first_of(gone, "folders") + _first_of(said, "files")


def _first_of(lines: Sequence[str], what: str) -> list[str]:
    """The first few lines, and how many more such there are."""
    return [*lines[:SHOWN], *([f"... and {len(lines) - SHOWN} more such {what}"] if len(lines) > SHOWN else [])]


def impossible(findings: Sequence[Finding], modalities: Sequence[str], parts: Mapping[str, Sequence[str]]) -> list[str]:
    """Why no training could come of these cases; `parts` of the split, by name."""
    read = {finding.name: finding for finding in findings if not finding.error}
    lines = []
    labelled = [finding for finding in read.values() if finding.counts is not None]
    if labelled and not any(set(modalities) <= set(finding.present) for finding in labelled):
        lines.append("no labelled case has every modality; set config.data.modalities to those that occur together")
    for part, names in parts.items():
        if not any(name in read and read[name].counts is not None for name in names):
            lines.append(f"the part {part} of the split has no readable case with a label; add labels or cases")
    trained = [finding for finding in labelled if finding.name in parts.get("train", ())]
    if labelled and not any(_has_foreground(finding) for finding in labelled):
        lines.append(
            f"no mask in config.data.dir holds anything but background ({values_in_words(labelled)}), so nothing can be"
            " learnt; give the masks, or say in config.data.label_map what their values mean"
        )
    elif trained and not any(_has_foreground(finding) for finding in trained):
        lines.append(
            "no mask in the part train of the split holds anything but background, so nothing can be learnt; add cases"
            " with a lesion, or change config.data.split.seed"
        )
    return lines


def _has_foreground(finding: Finding) -> bool:
    return any(index > 0 for index in finding.drawn)


def values_in_words(findings: Sequence[Finding]) -> str:
    """Which values the masks of these cases hold."""
    values = sorted({value for finding in findings for value in finding.values})
    more = ", ..." if len(values) > MOST_VALUES else ""
    return f"label values seen: {', '.join(f'{value:g}' for value in values[:MOST_VALUES])}{more}"


def absent(findings: Sequence[Finding], classes: Sequence[str]) -> list[str]:
    """A line for every class, but the background, of which no mask holds a voxel; none where no mask holds anything."""
    labelled = [finding for finding in findings if finding.counts is not None]
    there = {index for finding in labelled for index in finding.drawn if index > 0}
    lost = [name for index, name in enumerate(classes) if index and index not in there] if there else []
    said = "not a voxel in any mask"
    return [f"class {name}: {said} ({values_in_words(labelled)}); see config.data.label_map" for name in lost]


def epoch(
    findings: Sequence[Finding], names: Sequence[str], spacing: Sequence[float], patch: Sequence[int] = (1, 1)
) -> int:
    """Slices with a body of the labelled cases `names` on the working grid, by their share of the scan; for patches of

    three sizes as many of them as cover these slices whole.
    """
    total = 0.0
    for one in findings:
        if one.name in names and one.counts is not None and not one.error:
            depth, *plane = resampling.working(resampling.Lattice(one.shape, one.spacing), spacing, one.scan).sizes
            slices = one.slices * depth / one.shape[0]
            sizes = (slices, *plane)
            covered = [-(-size // own) for size, own in zip(sizes, patch, strict=True)] if len(patch) == 3 else [slices]
            total += float(np.prod(covered))
    return round(total)


def summary(findings: Sequence[Finding], modalities: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """What was found, in numbers; medians and ranges over the cases that could be read."""
    read = [finding for finding in findings if not finding.error]

    def span(values: Sequence[Sequence[float]]) -> dict[str, list[float]]:
        if not values:
            return {}
        every = {"least": np.min, "median": np.median, "most": np.max}
        return {word: np.round(of(np.array(values, float), axis=0), 3).tolist() for word, of in every.items()}

    labelled = [finding.counts for finding in read if finding.counts is not None]
    return {
        "cases": len(findings),
        "patients": len({finding.patient for finding in findings}),
        "unreadable": len(findings) - len(read),
        "modalities": {name: sum(name in finding.present for finding in read) for name in modalities},
        "size": span([finding.shape for finding in read]),
        "spacing": span([finding.spacing for finding in read]),
        "labels": {
            name: {"cases": sum(own[k] > 0 for own in labelled), "voxels": sum(own[k] for own in labelled)}
            for k, name in enumerate(classes)
        },
    }
