"""From the scans of a case to arrays on one grid: its body, its intensities, its label, and what is doubtful."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32
from nibabel.affines import voxel_sizes

from entrust_jax.data.body import body_mask, coordinates
from entrust_jax.data.cases import JPEG, Case, ending_of
from entrust_jax.data.intensity import Rule, normalise, rules_of
from entrust_jax.data.registration import doubts
from entrust_jax.data.scans import Grid, apart, load_scan, resample, same_grid
from entrust_jax.errors import UserError

IGNORED = -1  # the class index of voxels that count neither in training nor in scores
SAME = 0.9999  # correlation of two scans above which one is a copy of the other
FLAT = 0.02  # standard deviation after a rule of intensity below which it cannot be the right one
AIR, FAT, BONE = -1000.0, -50.0, 1000.0  # Hounsfield units: of air, above those of fat, of dense bone
SINGLE = 1e-4  # range of normalised values below which they are one value, resampled and rounded
COVERED = 0.9  # share of the body below which a scan's field of view is worth a word
ROUNDING = 0.1  # voxels by which an affine may have been rounded on a label's way through other software
MOST_VALUES = 8  # of a mask that are named
JPEG_ERROR = 40  # the most by which compression may have changed a mask's value


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """One case on the grid of its reference scan, in canonical (RAS) orientation, axes [D, H, W] = (z, x, y).

    image: z-scores, or what its rule says, inside the body; 0 outside it and where a modality is missing or was not
      measured.
    label: class indices, -1 where the label file does not reach; None when there is none. Of several raters, what most
      of those who know the voxel say (`majority`): for pictures and counts alone.
    coordinates: position in the body's bounding box scaled to [-1, 1], order D, H, W.
    spacing: mm along D, H, W.
    reference: the scan whose geometry maps are written in (None for a phantom).
    warnings: one line each; things a person should know that do not stop anything.
    raters: the label of each of several raters, -1 where his file does not reach; None for one. Training and scores
      use these (`labels_of`).
    """

    name: str
    patient: str
    number: int
    image: Float32[np.ndarray, "m d h w"]
    present: Bool[np.ndarray, " m"]
    label: Int32[np.ndarray, "d h w"] | None
    body: Bool[np.ndarray, "d h w"]
    coordinates: Float32[np.ndarray, "d h w 3"]
    spacing: tuple[float, float, float]
    reference: Path | None
    warnings: tuple[str, ...] = ()
    raters: Int32[np.ndarray, "r d h w"] | None = None


def labels_of(volume: Volume) -> Int32[np.ndarray, "r d h w"]:
    """The label of every rater, of one or several; -1 where he does not know. Raises ValueError where there is none."""
    if volume.raters is not None:
        return volume.raters
    if volume.label is None:
        raise ValueError(f"{volume.name} has no label")
    return volume.label[None]


def shown(volume: Volume) -> Bool[np.ndarray, "m d"]:
    """Which modalities are there in each slice. One that has a single value all over the slice's body is not: the scan

    ends before the others, or was filled up. A slice with less than two voxels of body has what the case has.
    """
    found = np.repeat(volume.present[:, None], len(volume.body), axis=1)
    for z in np.flatnonzero(volume.body.sum(axis=(1, 2)) > 1):
        inside = volume.image[:, z][:, volume.body[z]]
        found[:, z] &= np.ptp(inside, axis=1) > SINGLE
    return found


def without(volume: Volume, modality: int) -> Volume:
    """The case as it would be if one modality had not been scanned; its body stays."""
    present, image = volume.present.copy(), volume.image.copy()
    present[modality], image[modality] = False, 0.0
    return dataclasses.replace(volume, present=present, image=image)


def majority(raters: Int32[np.ndarray, "r *s"], classes: int) -> Int32[np.ndarray, "*s"]:
    """The class that most raters give a voxel, of equals the lowest: half the raters make no lesion. -1 where nobody

    knows.
    """
    votes = np.stack([np.sum(raters == k, axis=0) for k in range(classes)])
    return np.where(votes.any(axis=0), np.argmax(votes, axis=0), IGNORED).astype(np.int32)


class UnknownLabelError(UserError):
    """A mask holds a value that the config does not know: the config is wrong, not the case."""


def read_image(path: Path, grid: Grid | None) -> tuple[Grid, np.ndarray, np.ndarray] | None:
    """One modality on a grid (its own when None): (its own grid, f32 [x, y, z], covered bool [x, y, z]); None for a

    constant image, which says nothing. Raises UserError for an image whose grid does not overlap the given one.
    """
    own, values = load_scan(path)
    if values.min() == values.max():
        return None
    if grid is None or same_grid(own, grid):
        return own, values.astype(np.float32), np.ones(values.shape, bool)
    return (own, *resample(values, own, grid, order=1))


def read_label(
    path: Path, grid: Grid, scans: Sequence[Grid], label_map: Iterable[tuple[float, int]], classes: Sequence[str]
) -> tuple[Int32[np.ndarray, "x y z"], list[str]]:
    """The mask's class indices on a grid (-1 where its file does not reach, or says so) and warnings.

    scans: the grids of the case's images, on any of which a mask may have been drawn. Raises UnknownLabelError for
    values that `label_map` lacks, UserError for a mask that is none or that seems to have lost its place: of the grid's
    shape with another affine, or over less than half of it.
    """
    own, values = load_scan(path)
    label = classes_of(path, values, tuple(label_map), classes)
    warnings = [*own.doubts]
    if not same_grid(own, grid):
        label, covered = resample(label, own, grid, order=0)
        label = np.where(covered, label, IGNORED)
        share, words = covered.mean(), [" x ".join(map(str, one.shape)) for one in (own, grid)]
        lost = share < 0.5
        said = f"shape {words[0]}, not {words[1]}"
        if own.shape == grid.shape:
            mm, voxels = apart(own, grid)
            lost |= voxels > ROUNDING
            said = f"the same shape, but voxels up to {mm:.3g} mm apart by the affines"
        said += "" if covered.all() else f"; {share:.0%} of it covered"
        if lost and not any(same_grid(own, scan) for scan in scans):
            raise UserError(
                f"{path}: lies on another grid than {grid.path} ({said}), so its place is in doubt; save the label with"
                " the affine of that scan, or resample it onto that scan"
            )
        beyond = "" if covered.all() else ", the rest counts as unlabelled"
        warnings.append(f"{path}: lies on another grid than {grid.path} ({said}); resampled by nearest voxel{beyond}")
    return label.astype(np.int32), warnings


def classes_of(
    path: Path, values: np.ndarray, label_map: Sequence[tuple[float, int]], classes: Sequence[str]
) -> Int32[np.ndarray, "x y z"]:
    """The class index of every voxel of a mask. Raises UserError for values that are no whole numbers and for a

    `label_map` that cannot be, UnknownLabelError for values that it lacks.
    """
    if odd := [value for value, _ in label_map if value != int(value)]:
        raise UserError(f"config.data.label_map has the value {odd[0]}; masks hold whole numbers, give those")
    table = {int(value): int(index) for value, index in label_map}
    keys = np.array(sorted(table))
    indices = np.array([table[key] for key in keys], np.int32)
    if indices.min() < IGNORED or indices.max() >= len(classes):
        raise UserError(
            f"config.data.label_map has classes {indices.min()} to {indices.max()}, config.data.classes has"
            f" {len(classes)}; mend either"
        )
    if ending_of(path.name, JPEG):
        values = restored(values, keys, path)
    # Masks stored as float, or scaled by the header, are whole numbers up to rounding.
    whole = np.rint(values)
    if (broken := np.abs(values - whole) > 1e-3).any():
        raise UserError(
            f"{path}: holds values between whole numbers ({_listed(values[broken])}), so it is no mask of classes; give"
            " the mask, or round or threshold it"
        )
    if (unknown := ~np.isin(whole, keys)).any():
        found = np.unique(whole[unknown])
        several = len(found) > 1
        mend = "(value, class index) for each" if several else f"({found[0]:g}, class index)"
        raise UnknownLabelError(
            f"{path}: label value{'s' * several} {_listed(found)} {'are' if several else 'is'} not in"
            f" config.data.label_map (it knows {sorted(table)}); add {mend} to config.data.label_map"
        )
    return indices[np.searchsorted(keys, whole.astype(np.int64))]


def _listed(values: np.ndarray) -> str:
    """The different ones among these values, the first few of many."""
    found = np.unique(values)
    more = f" and {len(found) - MOST_VALUES} more" if len(found) > MOST_VALUES else ""
    return ", ".join(f"{value:g}" for value in found[:MOST_VALUES]) + more


def restored(values: np.ndarray, keys: Int[np.ndarray, " k"], path: Path) -> np.ndarray:
    """A mask from a JPEG: each value within JPEG_ERROR of a known one as that, the others as they are.

    Raises UserError where known values lie too close to each other to be told apart.
    """
    if len(keys) > 1 and np.diff(keys).min() <= 2 * JPEG_ERROR:
        raise UserError(
            f"{path}: JPEG changes the values of a mask, and those of config.data.label_map ({keys.tolist()}) are too"
            " close to each other to be told apart after it; store masks as PNG or NIfTI"
        )
    nearest = keys[np.argmin(np.abs(values[..., None].astype(np.int64) - keys), axis=-1)]
    return np.where(np.abs(values.astype(np.int64) - nearest) <= JPEG_ERROR, nearest, values)


def _by_rule(name: str, rule: Rule | None) -> str:
    return "" if rule is None else f" when read by config.data.intensity.{name} = {rule}"


def copies(
    raw: Float[np.ndarray, "m *s"], present: Bool[np.ndarray, " m"], body: Bool[np.ndarray, "*s"]
) -> list[tuple[int, int]]:
    """Every two scans that are one and the same up to scale and rounding: one took the other's place."""
    there = np.flatnonzero(present).tolist()
    alike = np.atleast_2d(np.corrcoef(raw[there][:, body]))
    pairs = itertools.combinations(range(len(there)), 2)
    return [(there[i], there[j]) for i, j in pairs if alike[i, j] > SAME]


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """One case on the grid of its reference, axes [D, H, W], as its scanners measured it.

    values: as in the files, 0 where a modality is missing. covered: where each was measured. The rest as in `Volume`.
    """

    case: Case
    grid: Grid
    values: Float32[np.ndarray, "m d h w"]
    covered: Bool[np.ndarray, "m d h w"]
    present: Bool[np.ndarray, " m"]
    label: Int32[np.ndarray, "d h w"] | None
    raters: Int32[np.ndarray, "r d h w"] | None
    body: Bool[np.ndarray, "d h w"]
    warnings: tuple[str, ...]


def measure(
    case: Case,
    *,
    modalities: Sequence[str],
    reference: str,
    label_map: Iterable[tuple[float, int]],
    classes: Sequence[str],
) -> Measured:
    """Reads a case onto the grid of its reference modality (the first present one when that is missing).

    Other modalities are resampled linearly through the affines, the label by nearest neighbour. A scan of one single
    value counts as missing. Raises UserError, naming the file, for anything that keeps one of the case's files from
    being used.
    """
    names = [name for name in modalities if name in case.images]
    if not names:
        raise UserError(f"{case.name}: none of {', '.join(modalities)} is there; give at least one modality")
    warnings: list[str] = []
    grid: Grid | None = None
    own: list[Grid] = []
    scans: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in sorted(names, key=lambda name: name != reference):
        read = read_image(case.images[name], grid)
        if read is None:
            warnings.append(f"{case.images[name]}: every voxel has the same value; counts as missing")
        else:
            scan, values, covered = read
            own.append(scan)
            grid = grid or scan
            scans[name] = values, covered
            warnings += scan.doubts
    if grid is None:
        raise UserError(
            f"{case.images[names[0]]}: every voxel has the same value, and no other scan of case {case.name} says more;"
            " export the scans again"
        )
    raw = np.zeros((len(modalities), *grid.shape), np.float32)
    field = np.zeros(raw.shape, bool)
    present = np.array([name in scans for name in modalities])
    for m in np.flatnonzero(present).tolist():
        raw[m], field[m] = scans.pop(modalities[m])
    label = raters = None
    if case.label is not None:
        label_map = tuple(label_map)
        drawn = [read_label(path, grid, own, label_map, classes) for path in (case.label, *case.raters)]
        labels = np.ascontiguousarray(np.moveaxis(np.stack([mask for mask, _ in drawn]), 3, 1))
        warnings += [line for _, about in drawn for line in about]
        if not (labels > 0).any():
            warnings.append(f"{case.label}: empty label (background only); kept as a case without a lesion")
        raters = labels if len(labels) > 1 else None
        label = labels[0] if raters is None else majority(raters, len(classes))
    raw = np.ascontiguousarray(np.moveaxis(raw, 3, 1))
    body = body_mask(raw, present)
    return Measured(case, grid, raw, np.moveaxis(field, 3, 1), present, label, raters, body, tuple(warnings))


def normalised(
    measured: Measured,
    *,
    modalities: Sequence[str],
    reference: str,
    intensity: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    drop_copies: bool = False,
) -> Volume:
    """A case as the networks see it, with a warning for all that its values make doubtful.

    A modality with one single value inside the body counts as missing, with `drop_copies` also one that is a copy of
    another. Raises UserError where none is left.
    """
    case, grid, body, label = measured.case, measured.grid, measured.body, measured.label
    warnings, present = [*measured.warnings], measured.present.copy()
    rules = rules_of(intensity, modalities)
    files = [f"{case.images.get(name)}" for name in modalities]
    image = np.zeros_like(measured.values)
    for m in np.flatnonzero(present).tolist():
        # What lies beyond a smaller field of view was not measured: it stays out of the moments and at 0.
        seen = body & measured.covered[m]
        image[m] = normalise(measured.values[m : m + 1], np.array([True]), seen, rules[m : m + 1])[0]
        share = measured.covered[m][body].mean() if body.any() else 1.0
        if share < COVERED:
            warnings.append(
                f"{files[m]}: covers only {share:.0%} of the body on {grid.path}; where it does not, it says nothing"
            )
        inside = image[m][seen]
        if not inside.size or inside.min() == inside.max():
            image[m] = 0.0
            present[m] = False
            warnings.append(
                f"{files[m]}: has one single value inside the body on the grid of {grid.path}"
                f"{_by_rule(modalities[m], rules[m])}; counts as missing"
            )
        elif rules[m] is not None and inside.std() < FLAT:
            warnings.append(
                f"{files[m]}: hardly varies inside the body{_by_rule(modalities[m], rules[m])};"
                " see whether its values have the unit that the rule expects"
            )
        if (said := unfit(measured.values[m][seen], rules[m])) is not None:
            warnings.append(
                f"{files[m]}: {said}, which does not go with config.data.intensity.{modalities[m]} = {rules[m]}; see"
                " whether it is the right file, and its unit"
            )
    if not present.any():
        raise UserError(f"{grid.path}: no scan of case {case.name} says anything inside the body; export them again")
    x, y, z = voxel_sizes(grid.affine).tolist()
    for first, second in copies(measured.values, present, body):
        said = f"{files[first]} and {files[second]} are the same scan voxel for voxel; one took the other's place"
        if drop_copies:
            lost = first if modalities[second] == reference else second
            present[lost], image[lost] = False, 0.0
            said += f"; {modalities[lost]} counts as missing"
        warnings.append(said)
    warnings += doubts(measured.values, measured.covered, present, files.index(f"{grid.path}"), (z, x, y), files)
    if label is not None and (label > 0).any() and (label[body] > 0).sum() < 0.5 * (label > 0).sum():
        warnings.append(f"{case.label}: most of what it labels lies outside the body; see whether it fits the scans")
    return Volume(
        name=case.name,
        patient=case.patient,
        number=case.number,
        image=image,
        present=present,
        label=label,
        body=body,
        coordinates=coordinates(body),
        spacing=(z, x, y),
        reference=grid.path,
        warnings=tuple(warnings),
        raters=measured.raters,
    )


def unfit(inside: Float[np.ndarray, " n"], rule: Rule | None) -> str | None:
    """Why values inside the body cannot be what a rule of intensity is for; None where they can.

    ("scale", ...) is for PET, which counts and is never negative; a window that begins below fat is for CT in
    Hounsfield units, in which fat and air lie below 0, nothing lies below air, and half a body is not denser than bone.
    """
    if rule is None or not inside.size:
        return None
    kind, (first, *_) = rule[0], rule[1:]
    low, middle = np.percentile(inside, (1, 50)).tolist()
    if kind == "scale":
        return f"is negative inside the body (down to {low:.4g})" if low < -0.1 * first else None
    if first <= FAT and low >= 0:
        return "is nowhere below 0 inside the body, as fat and air are on CT"
    if first <= FAT and (low < 1.1 * AIR or middle > BONE):
        return f"has values from {low:.4g}, half of them above {middle:.4g}, inside the body, as no CT has"
    return None


def read_volume(
    case: Case,
    *,
    modalities: Sequence[str],
    reference: str,
    label_map: Iterable[tuple[float, int]],
    classes: Sequence[str],
    intensity: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    drop_copies: bool = False,
) -> Volume:
    """Reads a case as the networks see it: `measure`, then `normalised`. Raises UserError as both do."""
    measured = measure(case, modalities=modalities, reference=reference, label_map=label_map, classes=classes)
    return normalised(
        measured, modalities=modalities, reference=reference, intensity=intensity, drop_copies=drop_copies
    )


def read_volumes(
    cases: Iterable[Case],
    *,
    modalities: Sequence[str],
    reference: str,
    label_map: Iterable[tuple[float, int]],
    classes: Sequence[str],
    intensity: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    drop_copies: bool = False,
) -> tuple[list[Volume], list[str]]:
    """Reads every case with a label that can be read: (volumes, a line per case left out and per warning).

    Raises UnknownLabelError: leaving out the cases with a value that the config forgot would bias the set unseen.
    """
    volumes, problems = [], []
    label_map = tuple(label_map)
    for case in cases:
        if case.label is None:
            problems.append(f"{next(iter(case.images.values()))}: case {case.name} has no label file and is left out")
            continue
        try:
            volume = read_volume(
                case,
                modalities=modalities,
                reference=reference,
                label_map=label_map,
                classes=classes,
                intensity=intensity,
                drop_copies=drop_copies,
            )
        except UnknownLabelError:
            raise
        except UserError as error:
            problems.append(f"{error} (case {case.name} is left out)")
        else:
            volumes.append(volume)
            problems.extend(volume.warnings)
    return volumes, problems
