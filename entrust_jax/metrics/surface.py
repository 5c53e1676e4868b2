"""Distances between the surfaces of two masks, in millimetres."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped
from scipy import ndimage

HD95Convention = Literal["max_of_directed", "pooled"]


def bounding_box(mask: Bool[np.ndarray, "*s"], margin: int = 0) -> tuple[slice, ...]:
    """The smallest box that holds the mask, grown by `margin` voxels and clipped to the array; the whole
    array when the mask is empty."""
    box = []
    for axis, size in enumerate(mask.shape):
        line = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(max(int(line[0]) - margin, 0), int(line[-1]) + 1 + margin) if line.size else slice(0, size))
    return tuple(box)


def surface(mask: Bool[np.ndarray, "*s"]) -> Bool[np.ndarray, "*s"]:
    """Voxels of the mask with a face neighbour outside it; the array's edge counts as outside (as MedPy and
    MONAI)."""
    return mask & np.logical_not(ndimage.binary_erosion(mask))


def surface_distances(
    prediction: Bool[np.ndarray, "*s"], truth: Bool[np.ndarray, "*s"], spacing: Sequence[float]
) -> tuple[Float[np.ndarray, " a"], Float[np.ndarray, " b"]]:
    """Distances in mm from each surface voxel of the prediction to the truth's surface, and the other way
    round.

    Both masks must be non-empty (ValueError). Voxel-centre distances, one per surface voxel, not
    area-weighted.
    """
    if not prediction.any() or not truth.any():
        raise ValueError("surface distances need two non-empty masks")
    # Every surface voxel lies in the union's box, and a voxel on the box's edge has no neighbour of its
    # mask beyond it.
    box = bounding_box(prediction | truth)
    ours, theirs = surface(prediction[box]), surface(truth[box])
    to_theirs = ndimage.distance_transform_edt(~theirs, sampling=tuple(spacing))
    to_ours = ndimage.distance_transform_edt(~ours, sampling=tuple(spacing))
    return np.asarray(to_theirs)[ours], np.asarray(to_ours)[theirs]


def hd95(
    prediction: Bool[np.ndarray, "*s"],
    truth: Bool[np.ndarray, "*s"],
    spacing: Sequence[float],
    convention: HD95Convention,
) -> float:
    """95th percentile of the surface distances, mm; NaN if either mask is empty.

    `max_of_directed`: the larger of the two directed percentiles (MONAI). `pooled`: the percentile of both
    directions' distances together (MedPy). The percentile interpolates linearly (numpy's default).
    """
    if not prediction.any() or not truth.any():
        return float("nan")
    return percentile95(*surface_distances(prediction, truth, spacing), convention)


def percentile95(
    forward: Float[np.ndarray, " a"], backward: Float[np.ndarray, " b"], convention: HD95Convention
) -> float:
    """HD95 from the two directed sets of distances of `surface_distances`; conventions as in `hd95`."""
    if convention == "max_of_directed":
        return float(max(np.percentile(forward, 95), np.percentile(backward, 95)))
    if convention == "pooled":
        return float(np.percentile(np.concatenate([forward, backward]), 95))
    raise ValueError(f"unknown HD95 convention {convention!r}")


def border_distance(label: Integer[np.ndarray, "*s"], spacing: Sequence[float]) -> Float[np.ndarray, "*s"]:
    """Distance in mm from each voxel to the nearest voxel that touches (by a face) a voxel of another
    class; inf everywhere if the map has one class only."""
    border = np.zeros(label.shape, bool)
    for axis in range(label.ndim):
        change = np.diff(label.astype(np.int32), axis=axis) != 0
        lower, upper = _halves(border, axis)
        lower |= change
        upper |= change
    if not border.any():
        return np.full(label.shape, np.inf)
    return np.asarray(ndimage.distance_transform_edt(~border, sampling=tuple(spacing)))


def _halves(array: Shaped[np.ndarray, "..."], axis: int) -> tuple[Shaped[np.ndarray, "..."], Shaped[np.ndarray, "..."]]:
    lines = [slice(None)] * array.ndim
    first, second = list(lines), list(lines)
    first[axis], second[axis] = slice(0, -1), slice(1, None)
    return array[tuple(first)], array[tuple(second)]
