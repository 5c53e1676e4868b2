"""Random changes of one training slice that leave its label true."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float32


def flip(element: Mapping[str, np.ndarray], axis: int) -> dict[str, np.ndarray]:
    """Mirrors a slice along H (axis 0) or W (axis 1); its coordinates go on giving the position."""
    result = dict(element)
    result["image"] = np.flip(element["image"], axis + 1)
    for name in ("label", "body", "coordinates"):
        result[name] = np.flip(element[name], axis)
    # Component 0 of a coordinate is D, which a flip within the slice leaves alone.
    sign = np.ones(element["coordinates"].shape[-1], np.float32)
    sign[axis + 1] = -1
    result["coordinates"] = result["coordinates"] * sign
    return result


def intensity(
    image: Float32[np.ndarray, "m *s"],
    present: Bool[np.ndarray, " m"],
    body: Bool[np.ndarray, "*s"],
    rng: np.random.Generator,
) -> Float32[np.ndarray, "m *s"]:
    """Gamma, gain, offset and noise, drawn for every modality on its own, inside the body only.

    z -> gain * gamma(z) + offset + noise with log gain ~ N(0, .1), offset ~ N(0, .1), noise of a standard
    deviation drawn from U(0, .1); gamma maps the modality's range in the slice to [0, 1], raises it to a
    power with log power ~ N(0, .15) and maps back. Draws do not depend on which modalities are present. Ours.
    """
    result = image.copy()
    for m in range(image.shape[0]):
        power, gain = np.exp(rng.normal(0, (0.15, 0.1)))
        offset, deviation = rng.normal(0, 0.1), rng.uniform(0, 0.1)
        noise = rng.normal(0, 1, image.shape[1:])
        inside = image[m][body]
        if not present[m] or inside.size == 0:
            continue
        low, high = float(inside.min()), float(inside.max())
        width = max(high - low, 1e-6)
        inside = low + width * ((inside - low) / width) ** power
        result[m][body] = gain * inside + offset + deviation * noise[body]
    return result


def augment(element: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One slice (image [M, H, W], present [M], label, body [H, W], coordinates [H, W, 3]) changed at random.

    Mirrored left to right (H is x) half of the time, never front to back, which no patient is; then
    `intensity`.
    """
    result = flip(element, 0) if rng.random() < 0.5 else dict(element)
    result["image"] = intensity(result["image"], result["present"], result["body"], rng)
    return result
