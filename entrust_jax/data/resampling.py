"""The working grid: a spacing planned from the data, cases resampled to it, and maps carried back to the scan's grid.

A working grid has the axes and the field of view of the scan's own grid (their centres coincide) and exactly the
working spacing. Continuous maps are interpolated linearly along each axis, classes and masks are those of the nearest
voxel: that keeps the volume of small structures, which interpolated class shares above one half would shrink.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float, Num, Shaped
from nibabel import orientations
from nibabel.affines import voxel_sizes
from nibabel.imageglobals import LoggingOutputSuppressor
from scipy import ndimage

from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume
from entrust_jax.data.scans import UNREADABLE, in_mm, open_scan, smoothed
from entrust_jax.errors import UserError

PLANNED = ("median",)  # config.data.spacing that asks for a plan
ANISOTROPIC = 3.0  # nnU-Net's threshold, for spacings and for sizes
TIE = 1e-4  # voxels, or shares: half-way goes up, whatever the rounding of a scan's affine
FINEST = 16  # times finer than a scan: more is a slip of the pen, and a grid that no memory holds
LEAST_WEIGHT = 1e-3  # of the body around one of its voxels
SAME_SPACING = 1e-3  # relative difference below which an axis stays as it is


class Lattice(NamedTuple):
    """Where an array's voxels lie relative to the centre of its field of view: sizes and spacing (mm) of its axes."""

    sizes: tuple[int, ...]
    spacing: tuple[float, ...]


def asked_spacing(spacing: Any) -> tuple[Any, ...]:
    """config.data.spacing, checked: () for the scans' own, ("median",) for a plan, or millimetres along D, H, W, where

    0 leaves an axis as it is. Raises UserError for anything else.
    """
    asked = tuple(spacing) if isinstance(spacing, tuple | list) else (spacing,)
    numbers = [type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in asked]
    if asked not in ((), PLANNED) and not (len(asked) == 3 and all(numbers) and any(asked)):
        raise UserError(
            f"config.data.spacing is {spacing!r}; give () for the scans' own, ('median',) to plan it, or three "
            "millimetres (slice, row, column; 0 leaves an axis as it is)"
        )
    return asked if asked in ((), PLANNED) else tuple(float(value) for value in asked)


def in_words(spacing: Sequence[float]) -> str:
    """A working spacing for people."""
    return " x ".join(f"{step:.4g}" if step else "as scanned" for step in spacing) + " (mm along D H W)"


def plan(spacings: Float[np.ndarray, "n a"], sizes: Num[np.ndarray, "n a"]) -> tuple[float, ...]:
    """The spacing (mm) that nnU-Net plans at full resolution for scans of these spacings and sizes (voxels).

    The median along each axis. Where the coarsest axis has more than 3 times the largest median spacing of the others
    and, times 3, fewer voxels than any of them (medians again), its median would smear thin slices together: it takes
    the 10th percentile instead, but no less than the largest of the others (and 1e-5 mm). Isensee et al. 2021, doi
    10.1038/s41592-020-01008-z; the rule of nnU-Net 2's ExperimentPlanner.determine_fullres_target_spacing (Apache-2.0),
    written anew from its description. Ours: sizes are of whole scans, not of the box of what is not 0.
    """
    target, size = np.median(spacings, axis=0), np.median(sizes, axis=0)
    worst = int(np.argmax(target))
    others = np.arange(len(target)) != worst
    coarse = target[worst] > ANISOTROPIC * target[others].max(initial=0.0)
    if others.any() and coarse and size[worst] * ANISOTROPIC < size[others].min():
        least = float(target[others].max())
        fine = float(np.percentile(spacings[:, worst], 10))
        target[worst] = fine if fine >= least else least + 1e-5
    return tuple(float(value) for value in target)


def plan_strides(
    spacing: Sequence[float], patch: Sequence[int], scales: int, fold: int = 1
) -> tuple[tuple[int, ...], ...]:
    """By how much every scale of a network is coarser than the one before, along each axis; first the space-to-depth.

    An axis is made coarser (2 times; `fold` times by the space-to-depth) while its spacing at that scale is below twice
    the finest there, so that voxels come to be cubes, and while the patch stays whole along it and at least 4 voxels
    long: nnU-Net's rule (Isensee et al. 2021), written anew, with its limits on sizes. spacing: mm; patch: voxels.
    """
    step, size, strides = np.array(spacing, float), np.array(patch), []
    for scale in range(scales):
        factor = fold if scale == 0 else 2
        can = (size % factor == 0) & (size // factor >= 4)
        finest = step[can].min(initial=np.inf)  # an axis that cannot be coarser holds no other up
        own = np.where(can & (step < 2 * finest), factor, 1)
        strides.append(tuple(own.tolist()))
        step, size = step * own, size // own
    return tuple(strides)


def header_lattice(path: Path) -> Lattice | None:
    """The canonical lattice [D, H, W] of a scan from its header alone; None where it has none (reading says why)."""
    try:
        with LoggingOutputSuppressor():
            image = open_scan(path)
        order = orientations.io_orientation(image.affine)[:, 0].argsort()
        sizes, spacing = np.array(image.shape[:3])[order], voxel_sizes(in_mm(image))[order]
    except (UserError, *UNREADABLE, IndexError, np.linalg.LinAlgError):
        return None
    if not (np.all(np.isfinite(spacing)) and np.all(spacing > 0)):
        return None
    (x, y, z), (dx, dy, dz) = sizes.tolist(), spacing.tolist()
    return Lattice((z, x, y), (dz, dx, dy))


def working(own: Lattice, spacing: Sequence[float], scan: Path | str) -> Lattice:
    """The lattice of this spacing over the field of view of `own`, to half a voxel; 0 leaves an axis as it is.

    Raises UserError, naming the scan, for one that is more than `FINEST` times as fine as the scan.
    """
    sizes, steps = [], []
    for size, step, wanted in zip(own.sizes, own.spacing, spacing or (0.0,) * len(own.sizes), strict=True):
        if 0 < wanted < step / FINEST:
            raise UserError(
                f"{scan}: has {step:.3g} mm where config.data.spacing asks for {wanted:g} mm: nothing so fine was"
                " measured; give more, mend its header or leave it out"
            )
        stays = wanted == 0 or abs(wanted / step - 1) < SAME_SPACING
        sizes.append(size if stays else max(1, round(size * step / wanted)))
        steps.append(step if stays else float(wanted))
    return Lattice(tuple(sizes), tuple(steps))


def moved(values: Shaped[np.ndarray, "..."], source: Lattice, target: Lattice, *, first: int = 0) -> np.ndarray:
    """An array on one lattice at the voxel centres of another of the same centre (scipy.ndimage.affine_transform).

    first: the array's axis that is the lattice's first one. Floats are interpolated linearly (float32), whole numbers
    and masks taken from the nearest voxel; beyond the outermost centres the border's values go on.
    """
    if source == target:
        return values
    linear, count = values.dtype.kind == "f", len(source.sizes)
    axes, last = range(first, first + count), range(-count, 0)
    step = np.divide(target.spacing, source.spacing)
    start = (np.array(source.sizes) - 1) / 2 - (np.array(target.sizes) - 1) / 2 * step
    channels = np.moveaxis(values, axes, last)
    found = np.empty((*channels.shape[:-count], *target.sizes), np.float32 if linear else values.dtype)
    for index in np.ndindex(channels.shape[:-count]):
        ndimage.affine_transform(
            channels[index],
            step,
            cast(Any, start if linear else start + TIE),
            output=found[index],
            output_shape=target.sizes,
            order=int(linear),
            mode="nearest",
        )
    return np.ascontiguousarray(np.moveaxis(found, last, axes))


def lattice_of(volume: Volume) -> Lattice:
    """The lattice of a volume's own grid."""
    return Lattice(volume.body.shape, volume.spacing)


def at_spacing(volume: Volume, spacing: Sequence[float]) -> Volume:
    """A case on its working grid; the case itself where that is its own grid, or `spacing` is ().

    Inside the body an image is the mean of the neighbours that lie in the body, by their linear weights: the zeros
    outside do not bleed in. Onto much coarser voxels it is smoothed first (`scans.smoothed`), in the body alone too. A
    body that falls between the voxels becomes the whole grid, as `body.body_mask` has it. Ours.
    """
    own = lattice_of(volume)
    target = working(own, spacing, volume.reference or volume.name)
    if target == own:
        return volume
    coarser = np.divide(target.spacing, own.spacing)
    inside = volume.body.astype(np.float32)
    body = moved(inside, own, target) >= 0.5 - TIE
    image = moved(np.stack([smoothed(one, coarser) for one in volume.image]), own, target, first=1)
    if body.any():
        weight = moved(smoothed(inside, coarser), own, target)
        image = image * body / np.maximum(weight, LEAST_WEIGHT)
    else:
        body = np.ones_like(body)
    d, h, w = target.spacing
    return dataclasses.replace(
        volume,
        image=image,
        label=None if volume.label is None else moved(volume.label, own, target),
        raters=None if volume.raters is None else moved(volume.raters, own, target, first=1),
        body=body,
        coordinates=coordinates(body),
        spacing=(d, h, w),
    )
