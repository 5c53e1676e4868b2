"""A scan's file: its values in canonical orientation, where its voxels lie, and a map written in its geometry."""

import contextlib
import gzip
import itertools
import math
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import nibabel
import numpy as np
from jaxtyping import Bool, Float, Float32
from nibabel import orientations
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.arrayproxy import is_proxy
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError
from PIL import Image, ImageOps
from scipy import ndimage

from entrust_jax.data.cases import ENDINGS, PICTURES, dicom_mistake, ending_of, is_dicom
from entrust_jax.errors import UserError

UNITS = {1: ("metres", 1e3), 3: ("microns", 1e-3)}  # NIfTI's codes of what is not mm, in words and in mm
PLAUSIBLE = (0.05, 50.0)  # mm: voxels below and above are no patient's
COARSER = 1.51  # voxels: sampling an image at points of longer steps aliases; not 1.5, a ratio that affines round
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


class Grid(NamedTuple):
    """Where voxels lie: the shape [x, y, z] and the affine from voxel indices to mm, both canonical (RAS).

    doubts: one line each; what the file's header leaves open or contradicts (`doubts_of`).
    """

    path: Path
    shape: tuple[int, ...]
    affine: Float[np.ndarray, "4 4"]
    doubts: tuple[str, ...] = ()


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
        _check_kind(path)
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
        if (name := _name_by_content(path)) is not None:
            raise UserError(f"{path}: is a NIfTI file under a wrong name; rename it to {name}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: unreadable or truncated ({reason}); copy or download the file again") from None
    values, affine = values.reshape(values.shape[:3]), in_mm(image)
    orientation = _orientation(path, affine)
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and said below
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{path}: contains NaN or infinite values; replace them or export the scan again")
    affine = affine @ orientations.inv_ornt_aff(orientation, values.shape)
    values = orientations.apply_orientation(values, orientation)
    return Grid(path, values.shape, affine, tuple(f"{path}: {line}" for line in doubts_of(image))), values


def unit_of(image: Any) -> tuple[str, float]:
    """The unit of length in a scan's header, in words and in mm. What says nothing is in mm, as elsewhere."""
    return UNITS.get(int(image.header["xyzt_units"]) & 7, ("mm", 1.0))


def in_mm(image: Any) -> Float[np.ndarray, "4 4"]:
    """The affine from a scan's voxel indices to mm, by the unit in its header; for a file's axes as they are stored."""
    affine = np.array(image.affine, float)
    affine[:3] *= unit_of(image)[1]
    return affine


def doubts_of(image: Any) -> list[str]:
    """What a scan's header leaves open or contradicts of where its voxels lie, one clause each.

    image: of a usable affine (`load_scan` refuses others).
    """
    said = []
    size = voxel_sizes(in_mm(image))
    words = " x ".join(f"{mm:.3g}" for mm in size)
    unit, mm = unit_of(image)
    if mm != 1.0:
        said.append(f"its header is in {unit}: voxels of {words} mm are taken")
    if size.min() < PLAUSIBLE[0] or size.max() > PLAUSIBLE[1]:
        said.append(
            f"has voxels of {words} mm, which no scan of a patient has; mend the spacing or the unit in its header"
        )
    codes = int(image.header["sform_code"]), int(image.header["qform_code"])
    if codes == (0, 0):
        said.append(
            "does not say how it is oriented (sform_code and qform_code are 0): its axes are taken to run to the"
            " patient's left, front and head; see whether they do"
        )
    elif all(codes):
        try:
            other = image.header.get_qform()
        except (HeaderDataError, ValueError, np.linalg.LinAlgError):
            return [*said, "its qform is no rotation; its sform is used"]
        shape = tuple(image.shape[:3])
        distance, voxels = apart(Grid(Path(), shape, other), Grid(Path(), shape, image.affine))
        if not voxels <= 1:
            said.append(
                f"its qform and its sform place voxels up to {distance * mm:.3g} mm apart; the sform is used, see"
                " whether it is right"
            )
    return said


def _check_kind(path: Path) -> None:
    """Raises UserError for a folder and for a file of another kind, before anything of it is read.

    Other formats that nibabel knows (MGH, Analyze and NIfTI pairs, bzip2) do not hold their header against the size of
    the file: a few bytes of one that is damaged would allocate gigabytes.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the scan in it, a .nii.gz file")
    if path.is_file() and not path.name.lower().endswith((*ENDINGS, *PICTURES)):
        if is_dicom(path):
            raise dicom_mistake(path)
        raise UserError(
            f"{path}: is no .nii.gz or .nii file by its name, nor a PNG or JPEG; convert it to .nii.gz, as with 3D"
            " Slicer, SimpleITK or nibabel"
        )


def _name_by_content(path: Path) -> str | None:
    """The name that a NIfTI file must have to be read, where its content is packed and its name says plain, or the

    other way round.
    """
    try:
        with path.open("rb") as file:
            start = file.read(352)
    except OSError:
        return None
    packed, ending = start[:2] == b"\x1f\x8b", path.suffix.lower()
    if packed and ending == ".nii":
        return f"{path.name}.gz"
    plain = start[344:347] == b"n+1" or start[4:7] == b"n+2"  # where NIfTI-1 and -2 have their magic words
    return path.stem if plain and ending == ".gz" else None


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
    if is_proxy(image.dataobj):  # pictures are in memory
        promised = image.dataobj.offset + math.prod(shape) * dtype.itemsize
        if promised > held:
            raise UserError(
                f"{path}: unreadable or truncated (its header promises {promised} bytes, the file holds {held}); copy"
                " or download the file again"
            )


def _orientation(path: Path, affine: Float[np.ndarray, "4 4"]) -> np.ndarray:
    """Which axis of a scan runs along which of the patient's. Raises UserError for an affine (in mm) that does not say,

    and for voxels of a size that arithmetic cannot hold.
    """
    with np.errstate(all="ignore"):
        size = voxel_sizes(affine)
        usable = bool(np.isfinite(affine).all() and np.all((size > 1e-6) & (size < 1e6)))
        usable = usable and abs(np.linalg.det(affine[:3, :3] / size)) > 1e-9
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


def apart(a: Grid, b: Grid) -> tuple[float, float]:
    """How far the voxels of one number lie from each other on two grids of one shape, at most: (mm, voxels of b)."""
    corners = np.array(list(itertools.product(*((0, size - 1) for size in a.shape))))
    here, there = (apply_affine(grid.affine, corners) for grid in (a, b))
    voxels = apply_affine(np.linalg.inv(b.affine), here) - corners
    return float(np.linalg.norm(here - there, axis=1).max()), float(np.abs(voxels).max())


def smoothed(values: Float32[np.ndarray, "*s"], coarser: Float[np.ndarray, " a"]) -> Float32[np.ndarray, "*s"]:
    """An image that is to be sampled with steps of so many of its voxels, without the detail that would alias.

    Along axes whose step is longer than `COARSER` voxels by a Gaussian of (step - 1) / 2 voxels' standard deviation, as
    scikit-image's `resize` has it (anti_aliasing_sigma); the others stay as they are.
    """
    sigma = np.where(coarser > COARSER, (coarser - 1) / 2, 0.0)
    return ndimage.gaussian_filter(values, sigma, mode="nearest") if sigma.any() else values


def resample(
    values: np.ndarray, source: Grid, target: Grid, *, order: int
) -> tuple[np.ndarray, Bool[np.ndarray, "x y z"]]:
    """Values of one grid at the voxel centres of another, and which of these centres the first grid covers.

    order: 1 linear (images, `smoothed` where the other grid is much coarser), 0 nearest (labels). Voxels that are not
    covered have the lowest value, so that they look like background. Raises UserError when none is covered.
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
    lowest = values.min()
    if order > 0:
        # How far a step of the other grid reaches along each axis of this one, whatever the turn between them.
        values = smoothed(values.astype(np.float32), np.linalg.norm(linear, axis=1))
    result = ndimage.affine_transform(values, linear, offset, target.shape, order=order, mode="nearest")
    return np.where(covered, result, lowest), covered


def write_grid(path: Path, reference: Path, start: int, count: int) -> None:
    """Writes an empty map on so many axial slices of a scan from `start` on: the reference of maps of these alone."""
    whole: Any = nibabel.as_closest_canonical(open_scan(reference))
    part = whole.slicer[:, :, start : start + count]
    units = part.header if isinstance(part, nibabel.Nifti1Image) else None
    empty = nibabel.Nifti1Image(np.zeros(part.shape, np.uint8), part.affine, units)
    empty.set_data_dtype(np.uint8)
    nibabel.save(empty, path)


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
    header: Any = scan.header.copy()
    header.extensions.clear()
    header.set_data_shape(values.shape)
    header.set_data_dtype(values.dtype)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b""
    output = type(scan)(values, scan.affine, header)
    path = Path(path)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        nibabel.save(output, beside)
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
