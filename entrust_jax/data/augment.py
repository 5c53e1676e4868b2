"""Random changes of one training patch that leave its label true.

A patch of a volume is changed slice by slice in the same way: patients turn, and modalities shift, in the plane, where
the voxels are fine. Through the planes of thick slices an interpolation would smear, and a shift be of a whole slice.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy import ndimage

from entrust_jax.data.intensity import Rule, rules_of
from entrust_jax.errors import UserError

KINDS = ("affine", "shift", "gamma", "bias", "ghosting", "noise")  # their places number the random streams
MOVES = KINDS[:2]  # change where things are; the others, how they look

# Strengths: where nnU-Net (Isensee et al. 2021) has the kind, its default; else TorchIO's (Perez-Garcia et al. 2021),
# weaker where it says so.
DEGREES, ZOOM = 10.0, 0.1  # at most; TorchIO, for a patient lies within a few degrees where nnU-Net turns all round
GAMMA = (0.7, 1.5)  # power; nnU-Net
FIELD = (0.1, 0.4)  # largest log gain of a coil; TorchIO's own coefficients add up to several times that
GHOSTS, GHOSTED = (4, 10), (0.4, 0.9)  # every how many-th line is weakened, by what share; TorchIO (.5 to 1)
CENTRE = 0.02  # share of the lines, in the middle of k-space, that stay as they are; TorchIO
NOISE = (0.05, 0.3)  # standard deviation in units of the image; nnU-Net's variance is up to .1
COUNTS = (0.03, 0.15)  # relative noise where an image is one unit: the liver in PET, OSEM
GRAIN = 6.0  # mm, full width at half maximum of that noise: what a PET scanner resolves
DARKEST = -4.0  # no z-score of "no signal" lies below it: `intensity.normalise` compresses what does


class Settings(NamedTuple):
    """What happens to a training slice beyond `augment`.

    rate: how often a kind happens: affine to a slice, shift to the modalities of a slice, the others to a modality.
    rules: how the intensities of each modality are read; None is no unit, which is taken for MR.
    reference: the modality on whose grid the label lies; it is never shifted.
    """

    rate: Mapping[str, float]
    rules: tuple[Rule | None, ...]
    reference: int


class Move(NamedTuple):
    """Voxel p of a patch shows voxel matrix (p - c) + c of the slice, c the patch's centre, and modality m shifts[m]

    beside it; in voxels along H and W.
    """

    matrix: Float[np.ndarray, "2 2"]
    shifts: Float[np.ndarray, "m 2"]


Streams = Callable[[str, int], np.random.Generator]  # of a kind in a modality


def flip(element: Mapping[str, np.ndarray], axis: int) -> dict[str, np.ndarray]:
    """Mirrors a patch along H (axis 0) or W (axis 1); its coordinates go on giving the position."""
    result = dict(element)
    at = element["body"].ndim - 2 + axis
    result["image"] = np.flip(element["image"], at + 1)
    for name in ("label", "body", "coordinates"):
        result[name] = np.flip(element[name], at)
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
    """One patch (image [M, *s], present [M], label, body [*s], coordinates [*s, 3]) changed at random.

    Mirrored left to right (H is x) half of the time, never front to back, which no patient is; then
    `intensity`.
    """
    result = flip(element, 0) if rng.random() < 0.5 else dict(element)
    result["image"] = intensity(result["image"], result["present"], result["body"], rng)
    return result


def settings_of(data: Any) -> Settings:
    """The settings of a config's data section. Raises UserError for an unknown kind or a rate outside [0, 1]."""
    rate = data.augmentation.to_dict()
    for kind, value in rate.items():
        if kind not in KINDS:
            raise UserError(f"config.data.augmentation: there is no kind {kind}; there are {', '.join(KINDS)}")
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise UserError(f"config.data.augmentation.{kind} is {value!r}; give how often it happens, from 0 to 1")
    modalities = tuple(data.modalities)
    rules = rules_of(data.intensity.to_dict(), modalities)
    return Settings(rate, rules, modalities.index(data.reference) if data.reference in modalities else 0)


def applies(kind: str, rule: Rule | None) -> bool:
    """Whether a modality can show this kind. CT and PET have no receive coil and no phase encoding, and a power would

    take away the unit that their rule keeps.
    """
    return rule is None or kind not in ("gamma", "bias", "ghosting")


def streams(seed: int, index: int) -> Streams:
    """Random streams of one training example, a kind and a modality each: neither other kinds, nor which modalities are

    there, nor other examples change a draw. They are apart from default_rng([seed, index]) too.
    """

    def stream(kind: str, m: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([seed, index], spawn_key=(KINDS.index(kind), m)))

    return stream


def no_signal(image: Float32[np.ndarray, "m *s"], rules: Sequence[Rule | None]) -> Float[np.ndarray, " m"]:
    """What each modality of a whole scan shows where there is no signal, in the image's own units.

    The lower end of a CT window and 0 of PET; for z-scores the darkest voxel, but not below -4: skull, air in sinuses
    and flowing blood are in every body. image less this is the intensity before the z-score, up to a factor. Ours.
    """
    darkest = image.reshape(len(image), -1).min(axis=1).clip(DARKEST, 0).astype(np.float64)
    known = {"window": -2.0, "scale": 0.0}
    return np.array([known[rule[0]] if rule else dark for rule, dark in zip(rules, darkest, strict=True)])


def measured(image: Float32[np.ndarray, "*s"], body: Bool[np.ndarray, "*s"]) -> Bool[np.ndarray, "*s"]:
    """Where in the body a modality says something: beyond its field of view it is 0, and has to stay so.

    A single 0 between other values is a value.
    """
    seen = image != 0
    if seen[body].all():
        return body
    return body & (seen | ndimage.binary_closing(seen, np.ones((1,) * (seen.ndim - 2) + (3, 3), bool)))


def draw_move(
    settings: Settings,
    stream: Streams,
    present: Bool[np.ndarray, " m"],
    spacing: Sequence[float],
) -> Move | None:
    """Rotation, zoom and relative shifts of one slice; None when it stays as it is. spacing: mm along H and W.

    Rotation by U(-10, 10) degrees and zoom by U(.9, 1.1) along each axis, in millimetres. Shifts: a point of a disc
    1 voxel across for every modality, less the point of the reference (the first one present where that is missing,
    on whose grid the case then lies): no two modalities are more than a voxel apart, and label and reference stay
    together.
    """
    matrix, shifts = np.eye(2), np.zeros((len(present), 2))
    rng = stream("affine", 0)
    turned = rng.random() < settings.rate.get("affine", 0)
    if turned:
        angle, zoom = np.deg2rad(rng.uniform(-DEGREES, DEGREES)), rng.uniform(1 - ZOOM, 1 + ZOOM, 2)
        cosine, sine = np.cos(angle), np.sin(angle)
        scale = np.array(spacing, float)
        matrix = np.array([[cosine, -sine], [sine, cosine]]) / zoom * scale / scale[:, None]
    rng = stream("shift", 0)
    shifted = rng.random() < settings.rate.get("shift", 0)
    if shifted:
        radius, angle = 0.5 * np.sqrt(rng.random(len(present))), rng.uniform(0, 2 * np.pi, len(present))
        points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        anchor = settings.reference if present[settings.reference] else int(np.argmax(present))
        shifts = points - points[anchor]
    return Move(matrix, shifts) if turned or shifted else None


def moved(
    plane: Mapping[str, np.ndarray],
    move: Move,
    origin: Int[np.ndarray, " 2"],
    patch: Sequence[int],
    empty: Float[np.ndarray, " m"],
) -> dict[str, np.ndarray]:
    """The patch at `origin` (voxels along H and W, may be negative) of a whole slice, moved: one interpolation.

    Taken from the slice, not from a patch of it, so that corners turn in what is there. Images linearly, over measured
    voxels only (outside the body they hold 0, which is no intensity); where a shift brings in what lies outside the
    body they show `empty`, `no_signal`. Label and body by the nearest voxel; beyond the slice -1 and False.
    """
    shape = (int(patch[0]), int(patch[1]))
    middle = (np.array(shape) - 1) / 2
    offset = origin + middle - move.matrix @ middle
    straight = not (move.matrix[0, 1] or move.matrix[1, 0])
    matrix = np.diag(move.matrix) if straight else move.matrix  # scipy is faster where axes stay axes

    def sample(values: np.ndarray, order: int, shift: Any = 0.0) -> np.ndarray:
        at = offset + shift
        return ndimage.affine_transform(values, matrix, at, shape, order=order, mode="grid-constant", prefilter=False)

    whole = plane["body"]
    both = sample(2 * (plane["label"] + 1) + whole, 0)  # beyond the slice 0
    body = both % 2 == 1
    image = np.zeros((len(plane["image"]), *shape), np.float32)
    common = sample(whole.astype(np.float32), 1)
    for m in np.flatnonzero(plane["present"]).tolist():
        inside, shift = measured(plane["image"][m], whole), move.shifts[m]
        same = inside is whole and not shift.any()
        share = common if same else sample(inside.astype(np.float32), 1, shift)
        total = sample(np.where(inside, plane["image"][m], np.float32(0)), 1, shift)
        values = np.where(share > 1e-3, total / np.maximum(share, np.float32(1e-3)), np.float32(empty[m]))
        image[m] = values * body
        if inside is not whole:
            image[m][sample((whole & ~inside).astype(np.uint8), 0, shift) > 0] = 0
    return {
        **plane,
        "image": image,
        "label": (both // 2 - 1).astype(np.int32),
        "body": body,
        "coordinates": moved_coordinates(plane["coordinates"], move.matrix, offset, shape),
    }


def moved_slices(
    slab: Mapping[str, np.ndarray],
    move: Move,
    origin: Int[np.ndarray, " 2"],
    patch: Sequence[int],
    empty: Float[np.ndarray, " m"],
) -> dict[str, np.ndarray]:
    """`moved` of every slice of a slab (image [M, D, H, W]) alike; patch: sizes along H and W."""
    planes = [
        {name: slab[name][d] for name in ("label", "body", "coordinates")}
        | {"image": slab["image"][:, d], "present": slab["present"]}
        for d in range(len(slab["body"]))
    ]
    found = [moved(plane, move, origin, patch, empty) for plane in planes]
    stacked = {name: np.stack([one[name] for one in found]) for name in ("label", "body", "coordinates")}
    return {**slab, **stacked, "image": np.stack([one["image"] for one in found], axis=1)}


def moved_coordinates(
    coordinates: Float32[np.ndarray, "h w 3"],
    matrix: Float[np.ndarray, "2 2"],
    offset: Float[np.ndarray, " 2"],
    shape: tuple[int, int],
) -> Float32[np.ndarray, "a b 3"]:
    """Positions in the box of the moved body: as after a flip they are those that the moved scan would be given.

    They do not turn with the body, for a box lies along the axes; its size is that of an ellipse in the old box.
    """
    result = np.empty((*shape, 3), np.float32)
    result[..., 0] = coordinates[0, 0, 0]  # the same all over an axial slice
    last = np.array(coordinates.shape[:2]) - 1
    start = coordinates[0, 0, 1:].astype(float)
    step = (coordinates[-1, -1, 1:] - start) / np.maximum(last, 1)
    thick = step > 0  # a box one voxel thick gives 0 everywhere
    half = np.where(thick, 1 / np.where(thick, step, 1), 0.5)
    back = np.linalg.inv(matrix)
    centre = back @ (np.where(thick, -start * half, last / 2) - offset)
    half = np.sqrt(np.square(back * half).sum(axis=1))
    for axis, size in enumerate(shape):
        line = thick[axis] * (np.arange(size) - centre[axis]) / half[axis]
        result[..., axis + 1] = line[:, None] if axis == 0 else line
    return result


def gamma(
    z: Float32[np.ndarray, "*s"],
    inside: Bool[np.ndarray, "*s"],
    empty: float,
    rng: np.random.Generator,
) -> Float32[np.ndarray, "*s"]:
    """Another contrast: the signal z - empty, over its largest value, to a power; mean and deviation are kept.

    Half of the powers are in [.7, 1], half in [1, 1.5], as nnU-Net draws them, which keeps the moments too: a z-score
    of the changed scan would give them back.
    """
    power = rng.uniform(*((GAMMA[0], 1) if rng.random() < 0.5 else (1, GAMMA[1])))
    values = z[inside].astype(np.float64)
    top = values.max() - empty
    if top <= 0 or values.std() == 0:
        return z
    changed = (np.maximum(values - empty, 0) / top) ** power
    if changed.std() == 0:
        return z
    result = z.copy()
    result[inside] = (changed - changed.mean()) / changed.std() * values.std() + values.mean()
    return result


def bias(
    z: Float32[np.ndarray, "*s"],
    inside: Bool[np.ndarray, "*s"],
    empty: float,
    coordinates: Float32[np.ndarray, "*s 3"],
    rng: np.random.Generator,
) -> Float32[np.ndarray, "*s"]:
    """A coil's uneven reception: the signal z - empty times exp of a cubic polynomial of the place in the body.

    The model is that of Van Leemput et al. 1999, which TorchIO draws from too. See `log_field`. Along D it is even.
    """
    middle = coordinates if coordinates.ndim == 3 else coordinates[len(coordinates) // 2]
    field = log_field(middle, rng)
    return np.where(inside, empty + (z - empty) * np.exp(field), z).astype(np.float32)


def log_field(coordinates: Float32[np.ndarray, "h w 3"], rng: np.random.Generator) -> Float[np.ndarray, "h w"]:
    """The logarithm of a bias field: mean 0, and U(.1, .4) where it is largest, over the ellipse in the body's box."""
    cubic = np.add.outer(np.arange(4), np.arange(4)) <= 3
    weights = rng.uniform(-1, 1, (4, 4)) * cubic
    line = np.linspace(-1, 1, 33)
    ellipse = np.add.outer(line**2, line**2) <= 1
    body = np.polynomial.polynomial.polygrid2d(line, line, weights)[ellipse]
    # A coordinate changes along its own axis alone. Outside the body, where nothing counts, the polynomial would run
    # away.
    rows, columns = (size // 2 for size in coordinates.shape[:2])
    places = np.clip(coordinates[:, columns, 1], -1.2, 1.2), np.clip(coordinates[rows, :, 2], -1.2, 1.2)
    field = np.polynomial.polynomial.polygrid2d(*places, weights)
    return (field - body.mean()) * (rng.uniform(*FIELD) / np.abs(body - body.mean()).max())


def ghosting(
    z: Float32[np.ndarray, "*s"],
    inside: Bool[np.ndarray, "*s"],
    empty: float,
    rng: np.random.Generator,
) -> Float32[np.ndarray, "*s"]:
    """Faint copies of the body along the phase encoding, as breath and pulse leave them (see `ghosts`)."""
    axis, every = z.ndim - 2 + int(rng.integers(2)), int(rng.integers(GHOSTS[0], GHOSTS[1] + 1))
    signal = ghosts(np.where(inside, z - np.float32(empty), np.float32(0)), axis, every, rng.uniform(*GHOSTED))
    return np.where(inside, empty + signal, z).astype(np.float32)


def ghosts(signal: Float32[np.ndarray, "*s"], axis: int, every: int, share: float) -> Float[np.ndarray, "*s"]:
    """The magnitude image when every n-th line of k-space along an axis has lost a share of its strength.

    Copies of the signal appear at 1/n of the field of view. The middle of k-space stays, and with it the brightness, as
    in TorchIO.
    """
    size = signal.shape[axis]
    line = np.arange(size // 2 + 1)  # of a real image the other half is the same
    weak = (line % every == 0) & (line > CENTRE / 2 * size)
    factor = np.where(weak, 1 - share, 1.0)
    spectrum = np.fft.rfft(signal, axis=axis) * factor.reshape([-1 if i == axis else 1 for i in range(signal.ndim)])
    return np.abs(np.fft.irfft(spectrum, n=size, axis=axis))


def noise(
    z: Float32[np.ndarray, "*s"],
    inside: Bool[np.ndarray, "*s"],
    empty: float,
    rule: Rule | None,
    spacing: Sequence[float],
    rng: np.random.Generator,
) -> Float32[np.ndarray, "*s"]:
    """The noise of the scanner. spacing: mm along the axes of the patch.

    MR: Rician, |z - empty + n + i n'|, Gudbjartsson and Patz 1995. CT: Gaussian within the window; what is clipped
    stays at its end. PET: deviation as the square root of the uptake, correlated over 6 mm, never below 0.
    """
    if rule is not None and rule[0] == "scale":
        grain = GRAIN / 2.355 / np.array(spacing, float)
        field = ndimage.gaussian_filter(rng.normal(size=z.shape), grain, mode="wrap")
        field *= rng.uniform(*COUNTS) / max(float(field.std()), 1e-12)
        result = np.maximum(z + field * np.sqrt(np.maximum(z, 0)), 0)
    else:
        one, two = rng.uniform(*NOISE) * rng.normal(size=(2, *z.shape))
        if rule is None:
            result = empty + np.hypot(z - empty + one, two)
        else:
            result = np.where(np.abs(z) < 2 - 1e-3, np.clip(z + one, -2, 2), z)
    return np.where(inside, result, z).astype(np.float32)


def appearance(
    element: Mapping[str, np.ndarray],
    settings: Settings,
    stream: Streams,
    empty: Float[np.ndarray, " m"],
    spacing: Sequence[float],
) -> Float32[np.ndarray, "m *s"]:
    """The images of a patch after gamma, bias field, ghosting and noise, each modality on its own, in this order: first

    the tissue, then the scanner. Nothing changes outside the body, beyond a field of view or in a missing modality.
    """
    image = element["image"].copy()
    for m in np.flatnonzero(element["present"]).tolist():
        rule = settings.rules[m]
        inside = measured(image[m], element["body"])
        if not inside.any():
            continue
        for kind in KINDS:
            rate = settings.rate.get(kind, 0)
            if kind in MOVES or rate == 0 or not applies(kind, rule):
                continue
            rng = stream(kind, m)
            if rng.random() >= rate:
                continue
            z, none = image[m], float(empty[m])
            if kind == "gamma":
                image[m] = gamma(z, inside, none, rng)
            elif kind == "bias":
                image[m] = bias(z, inside, none, element["coordinates"], rng)
            elif kind == "ghosting":
                image[m] = ghosting(z, inside, none, rng)
            else:
                image[m] = noise(z, inside, none, rule, spacing, rng)
    return image
