"""The phantom's pictures: where body and sites lie, what readers show of them, and whole cases with what an ideal
observer would believe, by the laws in `phantom`.
"""

import functools
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from nibabel.nifti1 import Nifti1Image

from entrust_jax.data import intensity, phantom, preprocess
from entrust_jax.data.body import coordinates
from entrust_jax.data.phantom import LAYERS, Spec
from entrust_jax.errors import UserError

# Brain appearance. Contrast of NCR, ED, ET where a reader says "lesion", and of the uniform patch where it
# says "none".
_LESION = {
    "T1": (-1.3, -0.9, -0.4),
    "T1ce": (-1.2, -0.5, 1.8),
    "T2": (1.7, 1.1, 0.6),
    "FLAIR": (-0.6, 1.5, 0.9),
}
_NONE = {"T1": 0.85, "T1ce": -0.85, "T2": -0.85, "FLAIR": -0.85}
_TISSUE = {  # CSF, grey matter, white matter
    "T1": (1.0, 2.6, 3.4),
    "T1ce": (1.0, 2.7, 3.4),
    "T2": (5.0, 3.4, 2.7),
    "FLAIR": (0.9, 3.2, 2.6),
}

_GAP = 1.0  # from the widest possible lesion to the middle of its ring
_RING = 0.5  # contrast of the ring
_CORE = 0.6  # radius of the core that tells the second class of lesion, as a share of the lesion's
_TEXTURE = 0.08  # standard deviation of the texture of the variants without a brain
_WAVES = 24  # plane waves in a smooth random field
_SCALE = 100.0  # intensity units of a contrast of 1, before the gain


class Scene(NamedTuple):
    """One phantom: what was drawn, and what an ideal observer of all its images would believe.

    conflict, ignorance, boundary are disjoint: pixels whose class hangs on delta belong to boundary alone;
    conflict is where a lesion is displayed at a site at which readers contradict each other, ignorance where
    at least one reader shows nothing and none contradicts.
    """

    image: Float[Array, "m d h w"]  # raw intensities, 0 outside the body
    label: Int[Array, "d h w"]
    body: Bool[Array, "d h w"]
    truth: Bool[Array, " j"] | Int[Array, " j"]  # z_j, an integer where lesions have classes
    evidence: Int[Array, "m j"]  # s_mj: +1 lesion (1, 2 its class), -1 none, 0 nothing shown
    posterior: Float[Array, " j"]  # P(z_j > 0 | all images)
    marginal: Float[Array, "d h w k"]  # P(y_u = k | all images)
    conflict: Bool[Array, "d h w"]
    ignorance: Bool[Array, "d h w"]
    boundary: Bool[Array, "d h w"]
    guilty: Bool[Array, "m j"]  # at conflict sites: the readers that contradict z_j
    site: Int[Array, "d h w"]  # index of the site within whose reach a pixel lies, -1 elsewhere
    distance: Float[Array, "d h w"]  # to the nearest site's centre
    belief: Float[Array, "j z"]  # P(z_j = z | all images)


# --- geometry -----------------------------------------------------------------------------------------------


def _grid(spec: Spec) -> np.ndarray:
    """Voxel positions [D, H, W, 3] relative to the middle of the volume."""
    shape = (spec.depth, *spec.size)
    axes = [np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


def _place(key: PRNGKeyArray, spec: Spec):
    """(unit position [D, H, W, 3], nearest site [D, H, W], distance to it) of a body and its sites, both
    jittered."""
    draws = jax.random.uniform(key, (2 + spec.sites, 3), minval=-1.0, maxval=1.0)
    moving = jnp.asarray([float(spec.depth > 1), 1.0, 1.0])  # a single slice stays in the middle plane
    semi = jnp.asarray(phantom.semi_axes(spec), jnp.float32) * (1 + 0.04 * draws[0])
    offset = jnp.asarray(_grid(spec)) - (moving * draws[1])[None, None, None]
    unit = offset / semi[None, None, None]
    centres = phantom.mean_centres(spec, semi) + spec.jitter * moving[None] * draws[2:]
    distances = jnp.linalg.norm(offset[None] - centres[:, None, None, None], axis=-1)
    return unit, jnp.argmin(distances, axis=0), jnp.min(distances, axis=0)


# --- appearance ---------------------------------------------------------------------------------------------


def _waves(draws: Float[Array, "waves 5"], wavelength: float | Float[Array, ""], spec: Spec) -> Float[Array, "d h w"]:
    """A smooth field of mean 0 and standard deviation 1: plane waves of one length in random directions.

    draws: five standard normal numbers per wave, three for its direction and two for its phase.
    """
    direction = draws[:, :3] * jnp.asarray([[float(spec.depth > 1), 1.0, 1.0]])
    direction = direction / jnp.linalg.norm(direction, axis=1, keepdims=True)
    phase = jnp.arctan2(draws[:, 3], draws[:, 4])
    angle = jnp.tensordot(jnp.asarray(_grid(spec)), 2 * jnp.pi / wavelength * direction.T, axes=1)
    return jnp.sum(jnp.cos(angle + phase[None, None, None]), axis=-1) * math.sqrt(2 / draws.shape[0])


def _soft(inside: Float[Array, "*s"], width: float) -> Float[Array, "*s"]:
    """1 where `inside` is positive, 0 where negative, over an edge of about `width`."""
    return jax.nn.sigmoid(4 / width * inside)


def _tissue(key: PRNGKeyArray, unit, distance, spec: Spec) -> Float[Array, "3 d h w"]:
    """Shares of CSF, grey and white matter: a folded cortex, sulci, a thalamus on each side and two
    ventricles.

    Around the sites there is white matter, so that the evidence lies on an even ground.
    """
    draws = jax.random.normal(key, (2 * _WAVES + 1, 5))
    norm = jnp.linalg.norm(unit, axis=-1)
    z, x, y = unit[..., 0], jnp.abs(unit[..., 1]), unit[..., 2]
    folds = _waves(draws[:_WAVES], min(spec.size) / 9, spec)
    sulci = _waves(draws[_WAVES : 2 * _WAVES], min(spec.size) / 11, spec)
    grey = _soft(norm - 0.8 - 0.07 * folds, 0.12)
    thalamus = ((x - 0.2) / 0.11) ** 2 + ((y + 0.12) / 0.17) ** 2 + (z / 0.4) ** 2
    grey = jnp.maximum(grey, 0.8 * _soft(1 - thalamus, 0.6))
    fluid = 0.9 * _soft(norm - 0.96, 0.05) + 0.75 * _soft(norm - 0.8, 0.1) * _soft(sulci - 1.1, 0.8)
    fissure = _soft(0.025 - x, 0.04) * _soft(jnp.abs(y) - 0.5, 0.1)
    wide = 1 + 0.1 * jnp.clip(draws[-1, 0], -2, 2)
    bend = x - 0.1 - 0.4 * (y - 0.05) ** 2
    ventricle = (bend / (0.085 * wide)) ** 2 + ((y - 0.03) / 0.4) ** 2 + (z / 0.5) ** 2
    fluid = jnp.maximum(jnp.maximum(fluid, 0.8 * fissure), _soft(1 - ventricle, 0.5))
    away = _soft(distance - (phantom.reach(spec) + _GAP + 2), 2.0)
    fluid = jnp.clip(fluid, 0, 1) * away
    grey = grey * away * (1 - fluid)
    return jnp.stack([fluid, grey, 1 - fluid - grey])


def _display(evidence: Int[Array, "m j"], site, distance, spec: Spec) -> Float[Array, "m d h w"]:
    """Contrast that the readers add: their evidence within `radius` of each site, and the ring around it."""
    inside = _soft(spec.radius - distance, 1.0)
    ring = _RING * jnp.exp(-jnp.square((distance - phantom.reach(spec) - _GAP) / 0.7))
    shown = evidence[:, jnp.maximum(site, 0)] * inside[None]
    if spec.variant == "class":
        # Told by its pattern, not by its strength, which normalisation to unit variance would hide.
        hollow = inside * (1 - 2 * _soft(_CORE * spec.radius - distance, 1.0))
        shown = jnp.where(evidence[:, jnp.maximum(site, 0)] == 2, hollow[None], shown)
    if spec.variant != "brain":
        polarity = jnp.asarray([(-1.0) ** m for m in range(len(spec.modalities))])[:, None, None, None]
        return polarity * (shown + ring[None])
    contrast = []
    for m, name in enumerate(spec.modalities):
        layer = 0.0
        edge = -1.0
        for share, index in LAYERS["brain"]:
            within = _soft(share * spec.radius - distance, 1.0) * _soft(distance - edge, 1.0)
            layer = layer + _LESION[name][index - 1] * within
            edge = share * spec.radius
        lesion = jnp.maximum(shown[m], 0) * layer
        contrast.append(lesion + jnp.maximum(-shown[m], 0) * _NONE[name] - ring)
    return jnp.stack(contrast)


def _render(key: PRNGKeyArray, contrast, unit, distance, body, spec: Spec) -> Float[Array, "m d h w"]:
    """Raw intensities: tissue and contrast, times gain and bias field, plus texture and noise, 0 outside the
    body."""
    for_tissue, for_fields, for_noise = jax.random.split(key, 3)
    count = len(spec.modalities)
    # Few draws, each for all modalities: the random number generator is what takes long to compile.
    fields = jax.random.normal(for_fields, (count, _WAVES + 5, 5))
    texture = 0.0 if spec.variant == "brain" else _TEXTURE
    value = contrast + math.sqrt(1 / spec.snr**2 - texture**2) * jax.random.normal(for_noise, contrast.shape)
    if spec.variant == "brain":
        levels = jnp.asarray([_TISSUE[name] for name in spec.modalities])
        value = value + jnp.tensordot(levels, _tissue(for_tissue, unit, distance, spec), axes=1)
    else:
        lengths = 3.0 + 2 * jnp.arange(count)
        value = value + 3.0 + texture * jax.vmap(lambda f, n: _waves(f[5:], n, spec))(fields, lengths)
    gain = _SCALE * (1 + 0.5 * jnp.arange(count)) * jnp.exp(0.2 * fields[:, 0, 0])
    bias = jnp.exp(0.05 * jax.vmap(lambda f: _waves(f[1:5], 2.0 * max(spec.size), spec))(fields))
    return jnp.where(body[None], gain[:, None, None, None] * bias * jnp.maximum(value, 0.1), 0.0)


# --- scenes -------------------------------------------------------------------------------------------------


def scene(key: PRNGKeyArray, spec: Spec, flip: tuple[int, int] | None = None) -> Scene:
    """Draws one phantom with its exact posterior. Pure; jit with spec and flip static.

    flip: (m, j), the reader that shows the opposite at one site: an intervention, all else being as it was drawn.
    """
    for_place, for_evidence, for_delta, for_image = jax.random.split(key, 4)
    unit, nearest, distance = _place(for_place, spec)
    body = jnp.linalg.norm(unit, axis=-1) <= 1
    site = jnp.where(distance <= phantom.reach(spec), nearest, -1)
    truth, evidence = phantom.draw_evidence(for_evidence, spec)
    if flip is not None:
        evidence = evidence.at[flip].multiply(-1)
    delta = jnp.asarray(spec.boundary)[jax.random.randint(for_delta, (spec.sites,), 0, len(spec.boundary))]
    label = phantom.lesion_classes(distance, delta[nearest], spec) * truth[nearest]
    present = jnp.ones(len(spec.modalities), bool)
    beliefs = phantom.belief(evidence, present, spec)
    chance = phantom.occupancy(distance, spec)
    boundary = jnp.any((chance > 0) & (chance < 1), axis=-1)
    core = (distance <= spec.radius) & ~boundary
    contradicted = phantom.opposed(evidence, present)
    return Scene(
        image=_render(for_image, _display(evidence, nearest, distance, spec), unit, distance, body, spec),
        label=label,
        body=body,
        truth=truth,
        evidence=evidence,
        posterior=beliefs[:, 1:].sum(-1),
        marginal=phantom.marginal(site, distance, beliefs, spec),
        conflict=core & contradicted[nearest],
        ignorance=core & phantom.silent(evidence, present)[nearest],
        boundary=boundary,
        guilty=contradicted[None] & phantom.wrong(evidence, truth),
        site=site,
        distance=distance,
        belief=beliefs,
    )


@functools.partial(jax.jit, static_argnames="spec")
def _scenes(numbers: Int[Array, " n"], seed: Int[Array, ""], spec: Spec) -> Scene:
    key = jax.random.key(seed)
    # One after the other: random numbers under vmapped keys take three times as long to compile.
    return jax.lax.map(lambda number: scene(jax.random.fold_in(key, number), spec), numbers)


@functools.partial(jax.jit, static_argnames=("spec", "flip"))
def _images(numbers: Int[Array, " n"], seed: Int[Array, ""], spec: Spec, flip: tuple[int, int] | None = None):
    def one(number):
        drawn = scene(jax.random.fold_in(jax.random.key(seed), number), spec, flip)
        return drawn.image, drawn.label, drawn.body  # the rest is not computed

    return jax.lax.map(one, numbers)


def scenes(spec: Spec, numbers: Iterable[int], seed: int) -> Scene:
    """The phantoms with these numbers, every field with a leading axis. A number and a seed always give the
    same one."""
    return _scenes(jnp.asarray(list(numbers), jnp.int32), jnp.int32(seed), spec)


def case_name(number: int) -> str:
    """Name, and patient, of a phantom."""
    return f"PHANTOM_{number:05d}"


def volumes(
    spec: Spec, numbers: Iterable[int], seed: int, chunk: int = 16, flip: tuple[int, int] | None = None
) -> list[preprocess.Volume]:
    """The phantoms with these numbers as normalised volumes, made `chunk` at a time by one compiled
    program; `flip` as in `scene`."""
    wanted = list(numbers)
    result = []
    for start in range(0, len(wanted), chunk):
        part = wanted[start : start + chunk]
        padded = np.resize(np.asarray(part, np.int32), chunk)  # one shape, one compilation
        image, label, body = (np.asarray(a) for a in _images(jnp.asarray(padded), jnp.int32(seed), spec, flip))
        result += [_volume(n, image[i], label[i], body[i]) for i, n in enumerate(part)]
    return result


def _volume(number: int, image: np.ndarray, label: np.ndarray, body: np.ndarray) -> preprocess.Volume:
    present = np.ones(image.shape[0], bool)
    return preprocess.Volume(
        name=case_name(number),
        patient=case_name(number),
        number=number,
        image=intensity.normalise(image, present, body),
        present=present,
        label=label.astype(np.int32),
        body=body,
        coordinates=coordinates(body),
        spacing=(1.0, 1.0, 1.0),
        reference=None,
    )


def export(
    folder: Path,
    spec: Spec,
    number: int,
    seed: int,
    modalities: Sequence[str],
    label_map: Sequence[tuple[int, int]],
) -> Path:
    """Writes one phantom as a BraTS folder, NAME/NAME_t1.nii.gz ... NAME_seg.nii.gz, 1 mm, RAS; returns
    NAME's path.

    modalities: the ones to write (leaving one out makes it a missing modality); label_map: (file value, class
    index) pairs, the first value of a class being the one written. An existing folder of that name is
    replaced. Raises UserError for a modality that the phantom does not have or a class without a file value.
    """
    if unknown := [m for m in modalities if m not in spec.modalities]:
        raise UserError(f"phantom: no modality {unknown[0]!r}; it has {', '.join(spec.modalities)}")
    values = {}
    for value, index in label_map:
        values.setdefault(index, value)
    if absent := [name for index, name in enumerate(spec.classes) if index not in values]:
        raise UserError(f"data.label_map: no file value for the class {absent[0]}; add one")
    image, label, _ = (np.asarray(a)[0] for a in _images(jnp.asarray([number], jnp.int32), jnp.int32(seed), spec))
    affine = np.eye(4)
    affine[:3, 3] = [-(n - 1) / 2 for n in (*spec.size, spec.depth)]
    name = case_name(number)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as draft:
        ready = Path(draft) / name
        ready.mkdir()
        for m in modalities:
            array = np.moveaxis(image[spec.modalities.index(m)], 0, 2)
            _write(ready / f"{name}_{m.lower()}.nii.gz", array.astype(np.float32), affine)
        lookup = np.asarray([values[index] for index in range(len(spec.classes))], np.uint8)
        _write(ready / f"{name}_seg.nii.gz", np.moveaxis(lookup[label], 0, 2), affine)
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        os.replace(ready, folder / name)
    return folder / name


def _write(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    scan = Nifti1Image(array, affine)
    scan.header.set_xyzt_units("mm")
    scan.to_filename(path)
