"""What the networks see of intensities: z-scores inside the body, or values with a unit by their rule."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32

from entrust_jax.errors import UserError

Rule = tuple[str, *tuple[float, ...]]  # how a modality's intensities are read; see `normalise`
AIR = -1000.0  # Hounsfield units


def normalise(
    image: Float[np.ndarray, "m *s"],
    present: Bool[np.ndarray, " m"],
    body: Bool[np.ndarray, "*s"],
    rules: Sequence[Rule | None] = (),
) -> Float32[np.ndarray, "m *s"]:
    """What the networks see of each modality inside the body; 0 outside it and for missing modalities.

    By default z-scores (`z_scores`), for intensities without a unit, as of MR. rules: one a modality, for those with
    one: ("window", low, high) clips to the window and maps it to [-2, 2] (CT in Hounsfield units); ("scale", unit)
    divides by the unit (PET in SUV), so that a value means the same in every patient. Beyond |z| = 4 the value goes
    on as 4 + log(1 + |z| - 4): slow growth without the ties of a hard clip, since a PET lesion lies at z > 10 and must
    keep its order. Ours.
    """
    result = np.zeros(image.shape, np.float32)
    for m in np.flatnonzero(present).tolist():
        inside = image[m][body].astype(np.float32)
        if inside.size == 0:
            continue
        rule = rules[m] if m < len(rules) else None
        if rule is None:
            z = z_scores(inside)
        elif rule[0] == "window":
            low, high = rule[1:]
            z = 4 * (np.clip(inside, low, high) - low) / (high - low) - 2
        else:
            z = inside / rule[1]
        size = np.abs(z)
        z = np.where(size > 4, np.sign(z) * (4 + np.log1p(np.maximum(size - 4, 0))), z)
        result[m][body] = z.astype(np.float32)
    return result


def stored(
    image: Float[np.ndarray, "m *s"], body: Bool[np.ndarray, "*s"], rules: Sequence[Rule | None] = ()
) -> Float32[np.ndarray, "m *s"]:
    """What a scanner would have stored for `normalise` to read this image: its inverse, with air outside the body.

    Values without a unit become whole numbers round 1000, 100 a standard deviation, and positive: the body stays what
    is brighter than the air around it.
    """
    size = np.abs(image)
    z = np.where(size > 4, np.sign(image) * (4 + np.expm1(np.maximum(size - 4, 0))), image)
    result = np.zeros(image.shape, np.float32)
    for m in range(len(image)):
        rule = rules[m] if m < len(rules) else None
        if rule is None:
            result[m] = np.where(body, np.maximum(np.rint(1000 + 100 * z[m]), 1), 0)
        elif rule[0] == "window":
            low, high = rule[1:]
            result[m] = np.where(body, low + (z[m] + 2) / 4 * (high - low), AIR)
        else:
            result[m] = np.where(body, z[m] * rule[1], 0)
    return result


def z_scores(inside: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Mean 0 and standard deviation 1 of the values clipped to their .5 and 99.5 percentiles, so that a few hot voxels

    do not set the scale.
    """
    low, high = np.percentile(inside, (0.5, 99.5))
    clipped = np.clip(inside, low, high)
    scale = float(clipped.std(dtype=np.float64))
    if scale <= 1e-6 * max(1.0, abs(float(high))):
        # Nearly all equal (a sparse map): the percentiles carry no scale, the plain moments do.
        clipped = inside
        scale = float(inside.std(dtype=np.float64))
    return (inside - clipped.mean(dtype=np.float64)) / (scale if scale > 0 else 1.0)


def rules_of(intensity: Mapping[str, Sequence[Any]], modalities: Sequence[str]) -> tuple[Rule | None, ...]:
    """The rule of each modality from config.data.intensity, {"CT": ("window", -160, 240), "PET": ("scale", 2.5)}.

    Raises UserError for an unknown modality or rule, an empty window, a unit that is not positive.
    """
    for name, rule in intensity.items():
        known = isinstance(rule, tuple | list) and [*rule[:1], len(rule)] in (["window", 3], ["scale", 2])
        numbers = known and all(type(value) in (int, float) and np.isfinite(value) for value in rule[1:])
        if name not in modalities:
            raise UserError(f"config.data.intensity: there is no modality {name}; there are {', '.join(modalities)}")
        if not numbers or (rule[1] >= rule[2] if rule[0] == "window" else rule[1] <= 0):
            raise UserError(
                f"config.data.intensity.{name} is {rule!r}; give ('window', low, high), ('scale', unit) or leave it out"
            )
    return tuple(tuple(intensity[name]) if name in intensity else None for name in modalities)
