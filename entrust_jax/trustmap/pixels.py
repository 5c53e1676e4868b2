"""What calibrators see of the pixels of a prediction: log-probabilities, distances to the border, the head's features;
and which pixels they are fitted on.
"""

from collections.abc import Sequence

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, Integer

FLOOR = 1e-6
DISTANCE_CAP = 10.0
UNCERTAIN_ENTROPY = 0.05
BOUNDARY_BAND = 2.0


def log_probability(probability: Float[np.ndarray, "*s k"]) -> Float[np.ndarray, "*s k"]:
    """log max(p, 1e-6) in float32, as CalibrationSet and `rungs.apply` take it."""
    return np.log(np.maximum(probability, FLOOR)).astype(np.float32)


def signed_distance(label: Integer[np.ndarray, "n h w"]) -> Float[np.ndarray, "n h w"]:
    """Distance in pixels to the nearest border between two classes in the same slice, negative in the
    foreground.

    The border runs between pixels, so the pixels along it have .5. A slice of a single class has h + w
    everywhere.
    """
    result = np.empty(label.shape, np.float32)
    for index, plane in enumerate(label):
        distance = np.full(plane.shape, float(sum(plane.shape)))
        found = np.unique(plane)
        if len(found) > 1:
            # the nearest pixel of another class lies across the border, whichever class it is
            masks = [plane == k for k in found]
            depth = [np.asarray(scipy.ndimage.distance_transform_edt(mask)) for mask in masks]
            distance = np.sum(depth, axis=0) - 0.5
        result[index] = np.where(plane > 0, -distance, distance)
    return result


def signed_distance_mm(label: Integer[np.ndarray, "d h w"], spacing: Sequence[float]) -> Float[np.ndarray, "d h w"]:
    """Distance in mm to the nearest border between two classes in the volume, negative in the foreground.

    From a voxel's centre to that of the nearest voxel of another class, less half the finest spacing, for the border
    runs between them. A volume of a single class has its extent everywhere.
    """
    found = np.unique(label)
    if len(found) == 1:
        distance = np.full(label.shape, np.dot(label.shape, spacing), np.float32)
    else:
        distance = np.full(label.shape, -min(spacing) / 2, np.float32)
        for k in found:  # a voxel is inside one class alone; one transform at a time, for they are large
            distance += np.asarray(scipy.ndimage.distance_transform_edt(label == k, sampling=spacing))
    return np.where(label > 0, -distance, distance)


def importance_weights(
    entropy: Float[np.ndarray, "n h w"],
    boundary_distance: Float[np.ndarray, "n h w"],
    body: Bool[np.ndarray, "n h w"],
    rng: np.random.Generator,
    per_slice: int = 1024,
) -> Float[np.ndarray, "n h w"]:
    """Weights 1/q of a random sample of the body's pixels and 0 elsewhere; their expectation is 1 in the
    body.

    On average per_slice * n pixels are drawn: half of them from those with entropy > .05 or within 2 pixels
    of the delivered border, half from the rest; a group smaller than its half is taken whole.
    """
    interesting = body & ((entropy > UNCERTAIN_ENTROPY) | (np.abs(boundary_distance) <= BOUNDARY_BAND))
    probability = np.zeros(body.shape)
    for group in (interesting, body & ~interesting):
        size = int(group.sum())
        if size:
            probability[group] = min(1.0, per_slice * len(body) / 2 / size)
    drawn = rng.random(body.shape) < probability
    return np.where(drawn, 1.0 / np.maximum(probability, 1e-12), 0.0).astype(np.float32)


def features(
    maps: dict[str, np.ndarray], present: Bool[np.ndarray, "m"]
) -> tuple[Float[np.ndarray, "n h w f"], tuple[str, ...]]:
    """The head's inputs phi(u) of one scan (n slices) and their names, from the maps that the method has.

    maps: border [n h w], and any of mean, one_step [n h w k] probabilities; entropy, divergence, within, conflict, js,
    delta_conflict, gap [n h w]; delta_modality [m n h w]; others are ignored. min(|border|, 10)/10, border the signed
    distance to that of the delivered mask in voxels, and the availability of each modality always follow. The order is
    fixed, so equal sets of maps give equal columns.
    """
    names, columns = [], []
    for name in ("mean", "one_step"):
        if name in maps:
            names += [f"log_{name}_{k}" for k in range(maps[name].shape[-1])]
            columns += list(np.moveaxis(log_probability(maps[name]), -1, 0))
    for name in ("entropy", "divergence", "within", "conflict", "js", "delta_conflict", "gap"):
        if name in maps:
            names.append(name)
            columns.append(maps[name])
    if "delta_modality" in maps:
        names += [f"delta_modality_{m}" for m in range(len(maps["delta_modality"]))]
        columns += list(maps["delta_modality"])
    names.append("border_distance")
    columns.append(np.minimum(np.abs(maps["border"]), DISTANCE_CAP) / DISTANCE_CAP)
    for m, here in enumerate(present):
        names.append(f"present_{m}")
        columns.append(np.full(maps["border"].shape, float(here)))
    return np.stack([np.asarray(c, np.float32) for c in columns], axis=-1), tuple(names)
