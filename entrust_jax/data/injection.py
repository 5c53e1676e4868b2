"""Conflict injected into scans: a change of known place and size in exactly one modality, and its matched controls.

A lesion is erased, or its appearance is transplanted to a healthy place. Both are one operation: the tissue of another
place of the same slices is moved in, noise and texture with it, and raised or lowered by a membrane (Laplace's
equation) so that it continues what lies around it: seamless cloning (Perez et al. 2003, doi 10.1145/882262.882269).
There is no seam to be found. A control is the same change in all modalities: it lies in the same place with the same
outline and contradicts nothing. A second one is a change of the same energy in the one modality that looks like no
lesion. The choice of places and controls is ours.

Axes [D, H, W] = (z, x, y), in-plane lengths in voxels.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Shaped
from scipy import ndimage, sparse
from scipy.sparse import linalg

from entrust_jax.data.preprocess import Volume

MARGIN = 2  # voxels round a lesion that are moved along: what the outline left out
RING = 2  # voxels round those, by which two places are compared
APART = 3  # voxels between a healthy place and any lesion
STRANGE = 9.0  # times the median difference from the mean of the tissue round a lesion: beyond, it is other tissue
STRIDE = 2  # of the search for a healthy place
SMALLEST = 12  # voxels of a lesion in the slices looked at, below which nothing is injected
GRAIN = 1.5  # voxels, standard deviation of the smoothing of the texture that looks like no lesion


class Move(NamedTuple):
    """Where a voxel goes within its slice: h -> h0 - h (flip) or h + h0, w -> w + w0."""

    flip: bool
    h: int
    w: int


class Injection(NamedTuple):
    """A change that can be made to a scan: what every modality would be after it, and where it is judged.

    changed differs from the scan in a margin round `region` too; a missing modality is unchanged.
    """

    kind: str
    region: Bool[np.ndarray, "d h w"]
    changed: Float32[np.ndarray, "m d h w"]


def inverse(move: Move) -> Move:
    """The way back."""
    return Move(True, move.h, -move.w) if move.flip else Move(False, -move.h, -move.w)


def carried(values: Shaped[np.ndarray, "*a h w"], move: Move) -> Shaped[np.ndarray, "*a h w"]:
    """Every voxel where the move takes it; 0 (False) where nothing comes from."""
    height, width = values.shape[-2:]
    rows = move.h - np.arange(height) if move.flip else np.arange(height) - move.h
    columns = np.arange(width) - move.w
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
    taken = values[..., np.clip(rows, 0, height - 1), :][..., np.clip(columns, 0, width - 1)]
    return np.where(inside, taken, np.zeros((), values.dtype))


def grown(mask: Bool[np.ndarray, "d h w"], voxels: int) -> Bool[np.ndarray, "d h w"]:
    """The mask and what lies within so many in-plane steps of it."""
    cross = ndimage.generate_binary_structure(3, 1)
    cross[[0, 2]] = False
    return ndimage.binary_dilation(mask, cross, iterations=voxels)


def find_move(volume: Volume, lesion: Bool[np.ndarray, "d h w"]) -> Move | None:
    """The move that takes a lesion to a healthy place of the same slices; None where there is none.

    Among mirrored and shifted places that lie in the body, apart from every lesion, the one whose tissue differs least
    (mean square over modalities) from the mean of the tissue round the lesion.
    """
    if volume.label is None or not lesion.any():
        return None
    healthy = volume.body & ~grown(volume.label > 0, APART)
    moved = grown(lesion, MARGIN) & volume.body
    if not (around(volume, lesion) & healthy).any():
        return None
    cost = np.where(healthy, strangeness(volume, lesion), np.inf)
    d, h, w = np.nonzero(moved)
    best, least = None, np.inf
    for move in _moves(volume.body, h, w):
        new_h, new_w = (move.h - h if move.flip else h + move.h), w + move.w
        value = float(cost[d, new_h, new_w].mean())
        if value < least:
            best, least = move, value
    return best


def around(volume: Volume, lesion: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """The tissue round a lesion and its margin, no lesion itself."""
    near = grown(lesion, MARGIN + RING) & ~grown(lesion, MARGIN) & volume.body
    return near if volume.label is None else near & (volume.label <= 0)


def strangeness(volume: Volume, lesion: Bool[np.ndarray, "d h w"]) -> Float[np.ndarray, "d h w"]:
    """How far a voxel is from the mean of the tissue round the lesion: squared, mean over the modalities."""
    image = volume.image[volume.present]
    level = image[:, around(volume, lesion)].mean(axis=1)
    return np.mean(np.square(image - level.reshape(-1, 1, 1, 1)), axis=0)


def _moves(body: Bool[np.ndarray, "d h w"], h: Int[np.ndarray, " n"], w: Int[np.ndarray, " n"]) -> list[Move]:
    """Shifts, plain and mirrored, that keep these voxels in the body's bounding box."""
    boxes = [np.flatnonzero(body.any(axis=(0, 3 - axis)))[[0, -1]] for axis in (1, 2)]
    (low_h, high_h), (low_w, high_w) = (box.tolist() for box in boxes)
    across = range(low_w - int(w.min()), high_w - int(w.max()) + 1, STRIDE)
    plain = range(low_h - int(h.min()), high_h - int(h.max()) + 1, STRIDE)
    mirrored = range(low_h + int(h.max()), high_h + int(h.min()) + 1, STRIDE)
    return [Move(flip, a, b) for flip, starts in ((True, mirrored), (False, plain)) for a in starts for b in across]


def cloned(
    target: Float[np.ndarray, "m h w"],
    donor: Float[np.ndarray, "m h w"],
    region: Bool[np.ndarray, "h w"],
    known: Bool[np.ndarray, "h w"],
) -> Float32[np.ndarray, "m h w"]:
    """The target with the donor inside the region, plus the membrane that makes it continue the target.

    known: voxels outside the region at which target and donor are both tissue; their difference, smoothed by a voxel
    since it holds the noise of both, is what the membrane is fixed to. Where the region borders on anything else, bone
    or air, the membrane is free (Neumann).
    """
    known = known & ~region
    weight = ndimage.gaussian_filter(known.astype(np.float64), 1.0)
    gap = np.stack([ndimage.gaussian_filter((t - n) * known, 1.0) for t, n in zip(target, donor, strict=True)])
    gap = gap / np.maximum(weight, 1e-6)
    index = np.full(region.shape, -1)
    index[region] = np.arange(region.sum())
    count, rows, columns = int(region.sum()), [], []
    diagonal, right = np.full(count, 1e-9), np.zeros((count, len(target)))  # a part that borders on nothing gets 0
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        beside, fixed = np.roll(index, -step, axis), np.roll(known, -step, axis)
        edge = [slice(None), slice(None)]
        edge[axis] = slice(-1, None) if step == 1 else slice(0, 1)
        beside[tuple(edge)], fixed[tuple(edge)] = -1, False  # np.roll goes round
        inside = region & (beside >= 0)
        rows.append(index[inside])
        columns.append(beside[inside])
        np.add.at(diagonal, index[inside], 1.0)
        border = region & fixed
        np.add.at(diagonal, index[border], 1.0)
        np.add.at(right, index[border], np.roll(gap, -step, axis + 1)[:, border].T)
    row, column = np.concatenate(rows), np.concatenate(columns)
    matrix = sparse.coo_matrix((np.full(len(row), -1.0), (row, column)), shape=(count, count))
    membrane = linalg.splu(sparse.csc_matrix(matrix + sparse.diags(diagonal))).solve(right)
    result = target.astype(np.float32).copy()
    result[:, region] = donor[:, region] + membrane.T
    return result


def _clone(
    volume: Volume, lesion: Bool[np.ndarray, "d h w"], move: Move, region: Bool[np.ndarray, "d h w"]
) -> Float32[np.ndarray, "m d h w"]:
    """Every modality with what the move brings into the region."""
    near = around(volume, lesion)
    if not near.any():
        return volume.image.copy()
    strange = strangeness(volume, lesion)
    tissue = volume.body & (strange <= STRANGE * np.median(strange[near]))
    donor, inside, known = (carried(one, move) for one in (volume.image, volume.body, tissue))
    result, there = volume.image.copy(), volume.present
    for d in np.flatnonzero(region.any(axis=(1, 2))):
        result[there, d] = cloned(volume.image[there, d], donor[there, d], region[d] & inside[d], tissue[d] & known[d])
    return result


def erased(volume: Volume, lesion: Bool[np.ndarray, "d h w"], move: Move) -> Injection:
    """The lesion replaced by the healthy tissue at the other end of the move; judged where the lesion was."""
    region = grown(lesion, MARGIN) & volume.body
    return Injection("erase", lesion & volume.body, _clone(volume, lesion, inverse(move), region))


def transplanted(volume: Volume, lesion: Bool[np.ndarray, "d h w"], move: Move) -> Injection:
    """The lesion's appearance at the healthy place that the move takes it to; judged there."""
    region = carried(grown(lesion, MARGIN) & volume.body, move) & volume.body
    place = carried(lesion & volume.body, move) & volume.body
    return Injection("transplant", place, _clone(volume, lesion, move, region))


def unrelated(volume: Volume, injection: Injection, seed: int) -> Injection:
    """The control of equal energy: in each modality a smooth random texture of mean 0 in the place of the change, with

    the sum of squares of the change itself.
    """
    rng = np.random.default_rng(seed)
    change = injection.changed - volume.image
    where = np.any(change != 0, axis=0) & grown(injection.region, MARGIN) & volume.body
    texture = np.zeros_like(change)
    for m in np.flatnonzero(volume.present):
        smooth = ndimage.gaussian_filter(rng.normal(size=where.shape), (0, GRAIN, GRAIN))
        # Fading out at the rim, and without mean: neither an edge nor a brightness.
        window = ndimage.gaussian_filter(where.astype(np.float64), (0, 1, 1)) * where
        if not window.any():
            continue
        smooth = window * (smooth - np.sum(window * smooth) / window.sum())
        texture[m] = smooth * np.sqrt(np.sum(np.square(change[m][where])) / np.sum(np.square(smooth)))
    return Injection("unrelated", injection.region, volume.image + texture)


def altered(volume: Volume, injection: Injection, chosen: Bool[np.ndarray, " m"], dose: float = 1.0) -> Volume:
    """The scan with a share `dose` of the change made in the chosen modalities; dose 0 changes nothing.

    Raises ValueError for a dose outside [0, 1].
    """
    if not 0 <= dose <= 1:
        raise ValueError(f"dose {dose} is not within [0, 1]")
    step = dose * chosen.reshape(-1, 1, 1, 1) * (injection.changed - volume.image)
    return dataclasses.replace(volume, image=(volume.image + step).astype(np.float32))


def cut(volume: Volume, start: int, count: int) -> Volume:
    """These slices of a case, as a case of its own; places in the body stay as they are in the whole."""
    part = slice(start, start + count)
    return dataclasses.replace(
        volume,
        image=volume.image[:, part],
        label=None if volume.label is None else volume.label[part],
        raters=None if volume.raters is None else volume.raters[:, part],
        body=volume.body[part],
        coordinates=volume.coordinates[part],
    )


def find_run(volume: Volume, slices: int) -> tuple[int, Volume, Move] | None:
    """(first slice, the slices as a case, the move of their lesion) of a run of so many slices: that with the largest

    lesion that has a healthy place; None where none has a lesion of SMALLEST voxels and such a place.
    """
    if volume.label is None:
        return None
    area = np.sum((volume.label > 0) & volume.body, axis=(1, 2))
    count = min(slices, len(area))
    sums = np.convolve(area, np.ones(count, int), mode="valid")
    for start in np.argsort(-sums, kind="stable"):
        if sums[start] < SMALLEST:
            break
        part = cut(volume, int(start), count)
        move = find_move(part, lesion_of(part))
        if move is not None:
            return int(start), part, move
    return None


def lesion_of(volume: Volume) -> Bool[np.ndarray, "d h w"]:
    """Where a labelled case has a lesion of any class."""
    assert volume.label is not None
    return (volume.label > 0) & volume.body


def prepared(volume: Volume, slices: int) -> tuple[Volume, list[Injection]]:
    """(the slices that `find_run` finds in a case, the erasure and the transplant of their lesion); without them the

    case itself and no injections.
    """
    found = find_run(volume, slices)
    if found is None:
        return volume, []
    _, part, move = found
    return part, [change(part, lesion_of(part), move) for change in (erased, transplanted)]
