"""From scan files to arrays and back: canonical grid, body mask, maps in native geometry."""

import contextlib
import dataclasses
import gzip
import itertools
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import nibabel
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32
from nibabel import orientations
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import is_proxy
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError
from PIL import Image, ImageOps
from scipy import ndimage

from entrust_jax.data.body import body_mask, coordinates
from entrust_jax.data.cases import ENDINGS, JPEG, PICTURES, Case, dicom_mistake, ending_of, is_dicom
from entrust_jax.data.intensity import Rule, normalise, rules_of
from entrust_jax.data.registration import doubts
from entrust_jax.errors import UserError

IGNORED = -1  # the class index of voxels that count neither in training nor in scores
SAME = 0.9999  # correlation of two scans above which one is a copy of the other
FLAT = 0.02  # standard deviation after a rule of intensity below which it cannot be the right one
COVERED = 0.9  # share of the body below which a scan's field of view is worth a word
JPEG_ERROR = 40  # the most by which compression may have changed a mask's value
GREY = ("1", "L", "I;16", "I;16B", "I;16L", "I", "F")  # Pillow's names for pictures with one number a pixel
# What a damaged or foreign file raises somewhere inside nibabel, Pillow, gzip or numpy.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
    OverflowError,
    MemoryError,
    SyntaxError,
    Image.DecompressionBombError,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """One case on the grid of its reference scan, in canonical (RAS) orientation, axes [D, H, W] = (z, x, y).

    image: z-scores, or what its rule says, inside the body; 0 outside it and where a modality is missing.
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


def majority(raters: Int32[np.ndarray, "r *s"], classes: int) -> Int32[np.ndarray, "*s"]:
    """The class that most raters give a voxel, of equals the lowest: half the raters make no lesion. -1 where nobody

    knows.
    """
    votes = np.stack([np.sum(raters == k, axis=0) for k in range(classes)])
    return np.where(votes.any(axis=0), np.argmax(votes, axis=0), IGNORED).astype(np.int32)


class UnknownLabelError(UserError):
    """A mask holds a value that the config does not know: the config is wrong, not the case."""


class Grid(NamedTuple):
    """Where voxels lie: the shape [x, y, z] and the affine from voxel indices to mm, both canonical (RAS)."""

    path: Path
    shape: tuple[int, ...]
    affine: Float[np.ndarray, "4 4"]


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG or JPEG by its name."""
    return ending_of(path.name, PICTURES) is not None


def open_scan(path: Path) -> Any:
    """The nibabel image of a scan. A grey PNG or JPEG is one slice as radiologists show it, the patient's right on the

    left and his front above; it does not say how large a pixel is, and 1 mm is taken.
    Raises UserError for a picture in colour, one of UNREADABLE for what cannot be read.
    """
    if not is_picture(path):
        return nibabel.load(path)
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode == "LA":  # with transparency
            picture = picture.getchannel("L")
        if picture.mode not in GREY:
            raise UserError(f"{path}: is a picture in colour (mode {picture.mode}); convert it to grey")
        values = np.asarray(picture)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    # Axes to the patient's left, to his back, towards his head.
    return nibabel.Nifti1Image(np.ascontiguousarray(values.T[..., None]), np.diag([-1.0, -1.0, 1.0, 1.0]))


def load_scan(path: Path) -> tuple[Grid, np.ndarray]:
    """Reads one scan into canonical orientation: (grid, values [x, y, z], float32 unless stored as integers).

    Raises UserError naming the file when it cannot be read, is not one 3-D scan, has no usable geometry or
    holds NaN.
    """
    try:
        held = _held(path)
        with LoggingOutputSuppressor():  # its own lines about a bad header would stand before ours
            image = open_scan(path)
            _check_header(path, image, held)
            values = np.asanyarray(image.dataobj)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a .nii.gz scan") from None
    except UNREADABLE as error:
        if is_dicom(path):
            raise dicom_mistake(path) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: unreadable or truncated ({reason}); copy or download the file again") from None
    values, affine = values.reshape(values.shape[:3]), image.affine
    orientation = _orientation(path, affine)
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and said below
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{path}: contains NaN or infinite values; replace them or export the scan again")
    affine = affine @ orientations.inv_ornt_aff(orientation, values.shape)
    values = orientations.apply_orientation(values, orientation)
    return Grid(path, values.shape, affine), values


def _held(path: Path) -> int:
    """Bytes that a file holds, unpacked. A packed one is read to its end, for nibabel stops before the checksum: a

    damaged file would pass with wrong values.
    """
    if path.suffix.lower() != ".gz":
        return path.stat().st_size
    held = 0
    with gzip.open(path) as stream:
        while part := stream.read(1 << 22):
            held += len(part)
    return held


def _check_header(path: Path, image: Any, held: int) -> None:
    """Raises UserError for what cannot be one number a voxel of a 3-D scan, before anything is read or allocated."""
    shape, dtype = tuple(int(size) for size in image.shape), image.get_data_dtype()
    if dtype.kind not in "buif":
        raise UserError(f"{path}: holds {dtype}, not one number per voxel; convert it to a scalar scan")
    if min(shape, default=0) < 1:
        raise UserError(f"{path}: has an empty axis (shape {shape}); export the scan again")
    if len(shape) < 3 or math.prod(shape[3:]) > 1:
        mend = "give it a third axis of 1" if len(shape) < 3 else "split it into 3-D files"
        raise UserError(f"{path}: has shape {shape}, expected one 3-D scan; {mend}")
    if is_proxy(image.dataobj) and ending_of(path.name, ENDINGS):  # pictures are in memory, other formats in two files
        promised = image.dataobj.offset + math.prod(shape) * dtype.itemsize
        if promised > held:
            raise UserError(
                f"{path}: unreadable or truncated (its header promises {promised} bytes, the file holds {held}); copy"
                " or download the file again"
            )


def _orientation(path: Path, affine: Any) -> np.ndarray:
    """Which axis of a scan runs along which of the patient's. Raises UserError for an affine that does not say."""
    usable = affine is not None and np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) >= 1e-9
    orientation = orientations.io_orientation(affine) if usable else np.full((3, 2), np.nan)
    if np.isnan(orientation).any():  # two axes run the same way, as far as floats can tell
        raise UserError(
            f"{path}: its affine is singular or not finite, so its place in space is unknown;"
            " mend the header or export the scan again"
        )
    return orientation


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether two grids are one, up to a thousandth of a millimetre per voxel step.

    Raises UserError for a picture of another size than what it goes with: it has no place in space to be found by.
    """
    if a.shape != b.shape and (is_picture(a.path) or is_picture(b.path)):
        sizes = (" x ".join(map(str, grid.shape)) for grid in (a, b))
        raise UserError(
            f"{a.path}: has {next(sizes)} voxels, {b.path} {next(sizes)}; pictures have no place in space, so all files"
            " of a case must have one size"
        )
    return a.shape == b.shape and np.allclose(a.affine, b.affine, rtol=0, atol=1e-3)


def resample(
    values: np.ndarray, source: Grid, target: Grid, *, order: int
) -> tuple[np.ndarray, Bool[np.ndarray, "x y z"]]:
    """Values of one grid at the voxel centres of another, and which of these centres the first grid covers.

    order: 1 linear (images), 0 nearest (labels). Voxels that are not covered have the lowest value, so that
    they look like background. Raises UserError when none is covered.
    """
    matrix = np.linalg.inv(source.affine) @ target.affine
    linear, offset = matrix[:3, :3], cast(Any, matrix[:3, 3])
    # grid-constant at order 0 reaches half a voxel beyond the outer centres: the true extent of the source.
    covered = ndimage.affine_transform(
        np.ones(values.shape, np.uint8),
        linear,
        offset,
        target.shape,
        order=0,
        mode="grid-constant",
        cval=0,
    ).astype(bool)
    if not covered.any():
        raise UserError(
            f"{source.path}: its grid does not overlap that of the reference {target.path};"
            " register the scans to each other or leave this one out"
        )
    if order > 0:
        values = values.astype(np.float32)
    result = ndimage.affine_transform(values, linear, offset, target.shape, order=order, mode="nearest")
    return np.where(covered, result, values.min()), covered


def read_image(path: Path, grid: Grid | None) -> tuple[Grid, np.ndarray, np.ndarray] | None:
    """One modality on a grid (its own when None): (grid, f32 [x, y, z], covered bool [x, y, z]); None for a constant

    image, which says nothing. Raises UserError for an image whose grid does not overlap the given one.
    """
    own, values = load_scan(path)
    if values.min() == values.max():
        return None
    if grid is None or same_grid(own, grid):
        return grid or own, values.astype(np.float32), np.ones(values.shape, bool)
    return (grid, *resample(values, own, grid, order=1))


def read_label(
    path: Path, grid: Grid, label_map: Iterable[tuple[int, int]], classes: Sequence[str]
) -> tuple[Int32[np.ndarray, "x y z"], list[str]]:
    """The mask's class indices on a grid (-1 where its file does not reach, or says so) and warnings.

    Raises UnknownLabelError for a value that `label_map` lacks, UserError for a mask that misses the grid.
    """
    own, values = load_scan(path)
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
    unknown = ~np.isin(whole, keys) | (np.abs(values - whole) > 1e-3)
    if unknown.any():
        value = values[unknown][0]
        raise UnknownLabelError(
            f"{path}: label value {value:g} is not in config.data.label_map (it knows {sorted(table)});"
            f" add ({value:g}, class index) to config.data.label_map"
        )
    label = indices[np.searchsorted(keys, whole.astype(np.int64))]
    warnings: list[str] = []
    if not same_grid(own, grid):
        label, covered = resample(label, own, grid, order=0)
        if not covered.all():
            label = np.where(covered, label, IGNORED)
            warnings.append(f"{path}: covers only {covered.mean():.0%} of {grid.path}; the rest counts as unlabelled")
    return label.astype(np.int32), warnings


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


def read_volume(
    case: Case,
    *,
    modalities: Sequence[str],
    reference: str,
    label_map: Iterable[tuple[int, int]],
    classes: Sequence[str],
    intensity: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    drop_copies: bool = False,
) -> Volume:
    """Reads a case onto the grid of its reference modality (the first present one when that is missing).

    Other modalities are resampled linearly through the affines, the label by nearest neighbour. A modality with one
    single value counts as missing, with `drop_copies` also one that is a copy of another; one that hardly overlaps or
    seems to lie beside the reference gets a warning. Raises UserError, naming the file, for anything else that keeps
    one of the case's files from being used.
    """
    names = [name for name in modalities if name in case.images]
    if not names:
        raise UserError(f"{case.name}: none of {', '.join(modalities)} is there; give at least one modality")
    warnings: list[str] = []
    grid: Grid | None = None
    scans: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in sorted(names, key=lambda name: name != reference):
        read = read_image(case.images[name], grid)
        if read is None:
            warnings.append(f"{case.images[name]}: every voxel has the same value; counts as missing")
        else:
            grid, values, covered = read
            scans[name] = values, covered
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
        drawn = [read_label(path, grid, label_map, classes) for path in (case.label, *case.raters)]
        labels = np.ascontiguousarray(np.moveaxis(np.stack([own for own, _ in drawn]), 3, 1))
        warnings += [line for _, about in drawn for line in about]
        if not (labels > 0).any():
            warnings.append(f"{case.label}: empty label (background only); kept as a case without a lesion")
        raters = labels if len(labels) > 1 else None
        label = labels[0] if raters is None else majority(raters, len(classes))
    raw = np.ascontiguousarray(np.moveaxis(raw, 3, 1))
    field = np.moveaxis(field, 3, 1)
    body = body_mask(raw, present)
    rules = rules_of(intensity, modalities)
    image = np.zeros_like(raw)
    for m in np.flatnonzero(present).tolist():
        # What lies beyond a smaller field of view was not measured: it stays out of the moments and at 0.
        image[m] = normalise(raw[m : m + 1], np.array([True]), body & field[m], rules[m : m + 1])[0]
        share = field[m][body].mean() if body.any() else 1.0
        if share < COVERED:
            warnings.append(
                f"{case.images[modalities[m]]}: covers only {share:.0%} of the body on {grid.path}; "
                "where it does not, it says nothing"
            )
        inside = image[m][body & field[m]]
        if not inside.size or inside.min() == inside.max():
            image[m] = 0.0
            present[m] = False
            warnings.append(
                f"{case.images[modalities[m]]}: has one single value inside the body on the grid of {grid.path}"
                f"{_by_rule(modalities[m], rules[m])}; counts as missing"
            )
        elif rules[m] is not None and inside.std() < FLAT:
            warnings.append(
                f"{case.images[modalities[m]]}: hardly varies inside the body{_by_rule(modalities[m], rules[m])};"
                " see whether its values have the unit that the rule expects"
            )
    if not present.any():
        raise UserError(f"{grid.path}: no scan of case {case.name} says anything inside the body; export them again")
    x, y, z = voxel_sizes(grid.affine).tolist()
    files = [f"{case.images.get(name)}" for name in modalities]
    for first, second in copies(raw, present, body):
        said = f"{files[first]} and {files[second]} are the same scan voxel for voxel; one took the other's place"
        if drop_copies:
            lost = first if modalities[second] == reference else second
            present[lost], image[lost] = False, 0.0
            said += f"; {modalities[lost]} counts as missing"
        warnings.append(said)
    warnings += doubts(raw, field, present, files.index(f"{grid.path}"), (z, x, y), files)
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
        raters=raters,
    )


def read_volumes(
    cases: Iterable[Case],
    *,
    modalities: Sequence[str],
    reference: str,
    label_map: Iterable[tuple[int, int]],
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


def write_grid(path: Path, reference: Path, start: int, count: int) -> None:
    """Writes an empty map on so many axial slices of a scan from `start` on: the reference of maps of these alone."""
    whole: Any = nibabel.as_closest_canonical(open_scan(reference))
    part = whole.slicer[:, :, start : start + count]
    nibabel.save(nibabel.Nifti1Image(np.zeros(part.shape, np.uint8), part.affine), path)


def write_map(path: Path, array: np.ndarray, reference: Path, dtype: Any, *, channel_axis: int | None = None) -> None:
    """Writes a canonical map [D, H, W] as NIfTI in the reference scan's own geometry, whole or not at all.

    array: [D, H, W], or with channels first (channel_axis=0) or last (channel_axis=-1); they become the
    fourth axis of the file.
    dtype: the stored type; values are stored as they are, without scaling.
    The reference's orientation, affine (bit for bit), sform and qform codes and units are kept; its intensity
    scaling, display range and header extensions (which may name the patient) are not.
    Raises ValueError when the shape is not the reference's, OSError when the folder cannot be written.
    """
    if channel_axis not in (None, 0, -1):
        raise ValueError(f"channel_axis is {channel_axis}, expected None, 0 or -1")
    if array.ndim != (3 if channel_axis is None else 4):
        raise ValueError(f"an array of shape {array.shape} does not go with channel_axis={channel_axis}")
    scan = open_scan(reference)
    if channel_axis == 0:
        array = np.moveaxis(array, 0, -1)
    canonical = np.moveaxis(array, 0, 2)
    native = orientations.io_orientation(scan.affine)
    inverse = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), native)
    values = orientations.apply_orientation(canonical, inverse)
    if values.shape[:3] != scan.shape[:3]:
        raise ValueError(f"the map has shape {values.shape[:3]}, {reference} has {scan.shape[:3]}")
    values = np.ascontiguousarray(values, dtype=np.dtype(dtype))
    if isinstance(scan, nibabel.Nifti1Image):
        header: Any = scan.header.copy()
        header.extensions.clear()
        header.set_data_shape(values.shape)
        header.set_data_dtype(values.dtype)
        header.set_slope_inter(1, 0)
        header.set_intent("none")
        header["cal_min"] = header["cal_max"] = 0
        header["descrip"] = b""
        output = type(scan)(values, scan.affine, header)
    else:
        output = nibabel.Nifti1Image(values, scan.affine)
    path = Path(path)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        nibabel.save(output, beside)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
