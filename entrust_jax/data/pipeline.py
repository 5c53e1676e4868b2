"""Batches of patches: random access for training, whole volumes of slices for evaluation.

A patch of two sizes (H, W) is cut from an axial slice, one of three (D, H, W) from a volume. A row is what a patch is
cut from: a slice or a volume. The code is the same for both.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import grain
import numpy as np
from jaxtyping import Bool, Float, Int

from entrust_jax.data import augment as augmentation
from entrust_jax.data.preprocess import Volume, labels_of, shown
from entrust_jax.errors import UserError

Batch = dict[str, np.ndarray]

THREADS = 2  # that make batches beside the steps


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """What the sampler knows of the training rows (S with a body, F of them with foreground).

    volume, slice: where each row is (slice 0 for a whole volume). present: the modalities in it. low, high: first and
    last corner of a patch in it, along each axis. foreground: rows with foreground, grouped by volume; pixels: the
    lesion pixels inside the body of each of these, of any rater, in the frame of the corners; starts: where each group
    begins, and the end of the last.
    """

    volumes: tuple[Volume, ...]
    patch: tuple[int, ...]
    volume: Int[np.ndarray, " s"]
    slice: Int[np.ndarray, " s"]
    present: Bool[np.ndarray, "s m"]
    low: Int[np.ndarray, "s axes"]
    high: Int[np.ndarray, "s axes"]
    foreground: Int[np.ndarray, " f"]
    pixels: tuple[Int[np.ndarray, "_ axes"], ...]
    starts: Int[np.ndarray, " groups"]


def corners(body: Bool[np.ndarray, "*s"], patch: Sequence[int]) -> tuple[list[int], list[int]]:
    """First and last corner (inclusive, along each axis) of a patch that stays with the body.

    Where the body's box fits into the patch, the corners of the patches that hold all of it; elsewhere those
    of the patches inside the box. A row smaller than the patch has the one corner 0.
    """
    low, high = [], []
    for axis, size in enumerate(patch):
        hit = np.flatnonzero(body.any(axis=tuple(other for other in range(body.ndim) if other != axis)))
        first, last = int(hit[0]), int(hit[-1]) + 1 - size
        most = max(body.shape[axis] - size, 0)
        low.append(min(max(min(first, last), 0), most))
        high.append(min(max(max(first, last), 0), most))
    return low, high


def rows_of(values: np.ndarray, axes: int) -> np.ndarray:
    """An array [d h w] as rows for patches of so many axes: its slices, or the whole as one."""
    return values if axes == 2 else values[None]


def make_table(volumes: Sequence[Volume], patch: Sequence[int]) -> Table:
    """Lists the rows with a body. Raises UserError when there are none or a volume has no label."""
    rows: list[tuple[int, int]] = []
    boxes, present = [], []
    foreground: list[int] = []
    pixels = []
    starts = [0]
    for v, volume in enumerate(volumes):
        if volume.label is None:
            raise UserError(f"{volume.name}: has no label; training needs one for every case")
        bodies = rows_of(volume.body, len(patch))
        lesions = rows_of(np.any(labels_of(volume) > 0, axis=0) & volume.body, len(patch))
        there = shown(volume).T if len(patch) == 2 else volume.present[None]
        for d, body in enumerate(bodies):
            if not body.any():
                continue
            if lesions[d].any():
                foreground.append(len(rows))
                pixels.append(np.argwhere(lesions[d]).astype(np.int16))
            rows.append((v, d))
            present.append(there[d])
            boxes.append(corners(body, patch))
        if len(foreground) > starts[-1]:
            starts.append(len(foreground))
    if not rows:
        raise UserError("no training scan with a body; give config.data.dir a set with at least one readable case")
    index = np.array(rows)
    box = np.array(boxes)
    return Table(
        volumes=tuple(volumes),
        patch=tuple(int(size) for size in patch),
        volume=index[:, 0],
        slice=index[:, 1],
        present=np.array(present),
        low=box[:, 0],
        high=box[:, 1],
        foreground=np.array(foreground, int),
        pixels=tuple(pixels),
        starts=np.array(starts),
    )


def patch_weight(table: Table, row: int, corner: Int[np.ndarray, " axes"], share: float) -> float:
    """w = p / q of one patch: its population share over its sampling share.

    p: uniform over the S rows with a body, then over the row's n corners: p = 1 / (S n).
    q = share q_f + (1 - share) p, where q_f is the foreground sampler: one of the C cases with foreground,
    one of the F_c foreground rows of the case, one of its foreground pixels u, one of the n_u corners whose
    patch holds u: q_f = 1 / (C F_c) mean_u [patch holds u] / n_u.
    Then E_q[w] = 1, w <= 1 / (1 - share), and mean(w loss) estimates the plain mean of the loss over all
    patches, so that oversampling the foreground does not bend the probabilities that minimise a proper loss.
    Where a row has one corner this is p(row) / q(row). Mixture importance weights: Owen and Zhou 2000.
    """
    low, high = table.low[row], table.high[row]
    p = 1 / (len(table.volume) * float(np.prod(high - low + 1)))
    at = int(np.searchsorted(table.foreground, row))
    inside = 0.0
    if at < len(table.foreground) and table.foreground[at] == row:
        group = int(np.searchsorted(table.starts, at, side="right")) - 1
        slices = int(table.starts[group + 1] - table.starts[group])
        first, last = holders(foreground_pixels(table, row), low, high, table.patch)
        holds = ((first <= corner) & (corner <= last)).all(axis=1)
        density = float((holds / (last - first + 1).prod(axis=1)).mean())
        inside = density / ((len(table.starts) - 1) * slices)
    return p / (share * inside + (1 - share) * p)


def foreground_pixels(table: Table, row: int) -> Int[np.ndarray, "u axes"]:
    """The lesion pixels of a row with foreground."""
    return table.pixels[int(np.searchsorted(table.foreground, row))].astype(int)


def holders(
    pixels: Int[np.ndarray, "*u axes"],
    low: Int[np.ndarray, " axes"],
    high: Int[np.ndarray, " axes"],
    patch: tuple[int, ...],
) -> tuple[Int[np.ndarray, "*u axes"], Int[np.ndarray, "*u axes"]]:
    """First and last corner, of those in [low, high], whose patch holds each pixel."""
    return np.maximum(low, pixels - np.array(patch) + 1), np.minimum(high, pixels)


def fit(array: np.ndarray, corner: Int[np.ndarray, " axes"], patch: Sequence[int], axis: int, fill: int) -> np.ndarray:
    """The patch of an array whose axes from `axis` on are those of the patch; filled up where too small."""
    for k, (start, size) in enumerate(zip(corner, patch, strict=True)):
        at = axis + k
        array = array[(slice(None),) * at + (slice(int(start), int(start) + size),)]
        lack = size - array.shape[at]
        if lack > 0:
            width = [(0, 0)] * array.ndim
            width[at] = (lack // 2, lack - lack // 2)
            array = np.pad(array, width, constant_values=fill)
    return array


def example(
    index: int,
    *,
    table: Table,
    seed: int,
    share: float,
    augment: bool,
    kinds: augmentation.Settings | None = None,
    empty: Sequence[Float[np.ndarray, " m"]] = (),
) -> Batch:
    """Training example number `index`: a pure function of (seed, index).

    augment: mirrored and changed a little by `augmentation.augment`. kinds: what else happens, and before that; `empty`
    holds what each modality of each volume shows where there is no signal.
    """
    rng = np.random.default_rng([seed, index])
    # Example i is a foreground one when i * share passes an integer: exact in the long run and even within a
    # batch.
    if int((index + 1) * share) > int(index * share):
        group = rng.integers(len(table.starts) - 1)
        row = int(table.foreground[rng.integers(table.starts[group], table.starts[group + 1])])
        pixel = rng.choice(foreground_pixels(table, row), axis=0)
        first, last = holders(pixel, table.low[row], table.high[row], table.patch)
    else:
        row = int(rng.integers(len(table.volume)))
        first, last = table.low[row], table.high[row]
    corner = rng.integers(first, last + 1)
    v, d = int(table.volume[row]), int(table.slice[row])
    volume = table.volumes[v]
    labels = labels_of(volume)
    # The patch does not depend on the rater, so its weight holds. One label costs no draw.
    label = labels[int(rng.integers(len(labels))) if len(labels) > 1 else 0]
    axes = len(table.patch)
    whole: Batch = {
        "image": volume.image[:, d] if axes == 2 else volume.image,
        "present": table.present[row].copy(),
        "label": rows_of(label, axes)[d],
        "body": rows_of(volume.body, axes)[d],
        "coordinates": rows_of(volume.coordinates, axes)[d],
    }
    if kinds is not None:
        streams = augmentation.streams(seed, index)
        element = varied(whole, corner, table.patch, kinds, streams, empty[v], volume.spacing[-axes:])
    else:
        element = cut(whole, corner, table.patch)
    if augment:
        element = augmentation.augment(element, rng)
    element["weight"] = np.float32(patch_weight(table, row, corner, share))  # type: ignore[assignment]
    element["valid"] = np.bool_(True)  # type: ignore[assignment]
    element["case"] = np.int32(volume.number)  # type: ignore[assignment]
    element["slice"] = np.int32(d)  # type: ignore[assignment]
    return element


def cut(whole: Mapping[str, np.ndarray], corner: Int[np.ndarray, " axes"], patch: Sequence[int]) -> Batch:
    """The patch of a row at a corner; where the row ends, body is False and label -1."""
    return {
        **whole,
        "image": fit(whole["image"], corner, patch, 1, 0),
        "label": fit(whole["label"], corner, patch, 0, -1),
        "body": fit(whole["body"], corner, patch, 0, False),
        "coordinates": fit(whole["coordinates"], corner, patch, 0, 0),
    }


def varied(
    whole: Mapping[str, np.ndarray],
    corner: Int[np.ndarray, " axes"],
    patch: Sequence[int],
    kinds: augmentation.Settings,
    streams: augmentation.Streams,
    empty: Float[np.ndarray, " m"],
    spacing: Sequence[float],
) -> Batch:
    """The patch of a row at a corner, changed by config.data.augmentation: first where things are, then how they look.

    spacing: mm along the axes of the patch.
    """
    move = augmentation.draw_move(kinds, streams, whole["present"], spacing[-2:])
    lack = np.maximum(np.array(patch) - whole["body"].shape, 0)
    if move is None:
        element = cut(whole, corner, patch)
    elif len(patch) == 2:
        element = augmentation.moved(whole, move, corner - lack // 2, patch, empty)
    else:
        slab = cut(whole, corner * np.array([1, 0, 0]), (patch[0], *whole["body"].shape[1:]))
        element = augmentation.moved_slices(slab, move, (corner - lack // 2)[1:], patch[1:], empty)
    element["image"] = augmentation.appearance(element, kinds, streams, empty, spacing)
    return element


def training_dataset(
    volumes: Sequence[Volume],
    *,
    batch: int,
    patch: Sequence[int],
    seed: int,
    foreground_share: float = 0.5,
    augment: bool = False,
    kinds: augmentation.Settings | None = None,
) -> grain.MapDataset:
    """Endless training batches by random access: element [step] is a pure function of (seed, step).

    A share of the examples holds a foreground pixel (its case, row and pixel drawn in turn), the others are
    uniform over the rows with a body; `weight` undoes the difference (see `patch_weight`). Without any
    foreground all are uniform, with weight 1. Rows smaller than the patch are zero padded, there body is
    False and label -1. With `augment` they are augmented, also by the kinds given.
    Of several raters each example has one, drawn at random: the noisy mask and its target come from the same, and
    cross-entropy, linear in the label, is least at the mean over the raters, for the modalities' posteriors too.
    Raises UserError when there is nothing to draw from or the share is not in [0, 1).
    """
    if not 0 <= foreground_share < 1:
        raise UserError(f"config.data.foreground_share is {foreground_share}; set it to 0 or more and below 1")
    table = make_table(volumes, patch)
    share = foreground_share if len(table.foreground) else 0.0
    make = functools.partial(example, table=table, seed=seed, share=share, augment=augment)
    if augment and kinds is not None and any(kinds.rate.values()):
        empty = [augmentation.no_signal(volume.image, kinds.rules) for volume in volumes]
        make = functools.partial(make, kinds=kinds, empty=empty)
    # Far more examples than any run asks for; range() of Python costs nothing.
    return grain.MapDataset.range(2**40).map(make).batch(batch, drop_remainder=True)


def batch_at(dataset: grain.MapDataset, step: int) -> Batch:
    """The batch of one training step."""
    return cast(Batch, dataset[step])


def iterate(dataset: grain.MapDataset, start: int, *, threads: int = THREADS, buffer: int = 4) -> Iterator[Batch]:
    """Batches from step `start` on, made ahead by `threads` threads, at most `buffer` of them waiting."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    return iter(dataset[start:].to_iter_dataset(options))


def evaluation_slices(volume: Volume, *, multiple: int) -> Batch:
    """All D axial slices of a volume as one batch, H and W padded at their ends to a multiple of `multiple`.

    Padding has body False and label -1; without a label all of it is -1. `crop` takes the padding off again.
    """
    depth, height, width = volume.body.shape
    more = [(0, 0), (0, -height % multiple), (0, -width % multiple)]
    label = np.full(volume.body.shape, -1, np.int32) if volume.label is None else volume.label
    return {
        "image": np.moveaxis(np.pad(volume.image, [(0, 0), *more]), 1, 0),
        "present": shown(volume).T.copy(),
        "label": np.pad(label, more, constant_values=-1),
        "body": np.pad(volume.body, more),
        "coordinates": np.pad(volume.coordinates, [*more, (0, 0)]),
        "weight": np.ones(depth, np.float32),
        "valid": np.ones(depth, bool),
        "case": np.full(depth, volume.number, np.int32),
        "slice": np.arange(depth, dtype=np.int32),
    }


def stacked_slices(volumes: Sequence[Volume], *, multiple: int) -> Batch:
    """`evaluation_slices` of volumes of one in-plane size, one after the other in one batch."""
    slices = [evaluation_slices(volume, multiple=multiple) for volume in volumes]
    return {name: np.concatenate([one[name] for one in slices]) for name in slices[0]}


def crop(array: np.ndarray, volume: Volume) -> np.ndarray:
    """Undoes the padding of `evaluation_slices` for an array [D, Hp, Wp, ...]."""
    _, height, width = volume.body.shape
    return array[:, :height, :width]


def chunks(batch: Mapping[str, np.ndarray], size: int) -> Iterator[Batch]:
    """Pieces of exactly `size` slices; the last is filled up with copies: valid False, weight 0, label -1.

    Copies, not zeros: a slice without a body would bring in divisions by zero.
    """
    count = len(batch["valid"])
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        piece = {name: values[rows] for name, values in batch.items()}
        extra = np.arange(start, start + size) >= count
        piece["valid"] = piece["valid"] & ~extra
        piece["weight"] = np.where(extra, 0, piece["weight"]).astype(np.float32)
        piece["label"][extra] = -1
        yield piece
