"""Is the decomposition real? What F_c, F_u, F_cf and kappa of a trained model carry, on phantoms it has not seen.

Features are those of the finest scale, inside the body. Measures: squared correlation (less its value under
independence), distance correlation (Szekely, Rizzo, Bakirov 2007) with a permutation test over cases, linear probes
fitted on one half of the cases and judged on the other, ranking of planted conflict, and the intervention that flips
what one reader shows of one blob. The choice of measures is ours.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Bool, Float, Integer
from scipy.ndimage import distance_transform_edt
from scipy.spatial.distance import cdist
from scipy.special import expit

from entrust_jax import api, networks
from entrust_jax.benchmark import acceptance
from entrust_jax.data import phantom, phantom_scene, pipeline
from entrust_jax.data.preprocess import Volume
from entrust_jax.enfuse import objective
from entrust_jax.layers import apply
from entrust_jax.metrics import usefulness
from entrust_jax.model import EnTrust

PIXELS = 16  # per case, in the distance correlation: its cost grows with the square of all of them
PERMUTATIONS = 99
RIDGE = 1e-2  # of the linear probes, on standardised features
RIM = 3.0  # pixels around a blob to which a network may smear what it sees there


class Parts(NamedTuple):
    """The parts of n phantoms at the finest scale [t, s] = [h, w] / factor, and the conflict at full resolution."""

    F_c: Float[np.ndarray, "n t s d"]
    F_cf: Float[np.ndarray, "n t s d"]
    c: Float[np.ndarray, "m n t s d"]
    u: Float[np.ndarray, "m n t s e"]
    inside: Bool[np.ndarray, "n t s"]
    kappa: Float[np.ndarray, "n h w"]
    js: Float[np.ndarray, "n h w"]


def parts_of(model: api.Trained, volumes: list[Volume]) -> Parts:
    """Encodes and fuses phantoms of one slice each, every modality there."""
    assert isinstance(model.network, EnTrust)
    stacked = pipeline.stacked_slices(volumes, multiple=networks.multiple(model.config))
    batch = {name: stacked[name] for name in ("image", "coordinates", "body")}
    everything = np.ones(batch["image"].shape, np.float32)
    evidence, fused = jax.device_get(_encode(model.network, jax.device_get(model.params), batch, everything))
    h, w = volumes[0].body.shape[1:]
    rows, columns = model.network.strides[0]
    body = batch["body"].astype(np.float32)
    n, height, width = body.shape
    inside = body.reshape(n, height // rows, rows, width // columns, columns).mean(axis=(2, 4)) > 0.5
    c, u = (np.moveaxis(x[0], 1, 0) for x in (evidence.c, evidence.u))
    kappa, js = ((x * body)[:, :h, :w] for x in (fused.kappa, fused.js))
    return Parts(fused.F_c[0], fused.F_cf[0], c, u, inside, kappa, js)


@functools.partial(jax.jit, static_argnames="network")
def _encode(network: EnTrust, params: Any, batch: dict[str, Array], availability: Array) -> Any:
    images = (batch[name] for name in ("image", "coordinates", "body"))
    evidence = apply(network, params, *images, method="encode")
    return evidence, apply(network, params, evidence, availability, method="fuse").fused


def measure(
    model: api.Trained,
    volumes: list[Volume],
    scenes: phantom_scene.Scene,
    spec: phantom.Spec,
    one_step: Float[np.ndarray, "n h w k"],
) -> dict[str, float]:
    """Every figure by name; `scenes` are the phantoms of `volumes`, `one_step` what the full model says of them."""
    parts = parts_of(model, volumes)
    found: dict[str, float] = {}
    for name, (y, z) in pairs(parts).items():
        found[f"R2 {name}"] = squared_correlation(y, z, parts.inside)
        both = parts.inside & np.roll(parts.inside, 1, axis=0)
        found[f"R2 {name}, z of another case"] = squared_correlation(y, np.roll(z, 1, axis=0), both)
        found[f"dCor {name}"], found[f"dCor {name}, p"] = distance_correlation(y, z, parts.inside)
    noise = np.random.default_rng(0).normal(size=parts.c.shape)
    for name, x in (("c", parts.c), ("u", parts.u), ("noise", noise)):
        found[f"modality from {name}"] = modality_probe(x, parts.inside)
    label = np.asarray(scenes.label)[:, 0] > 0
    for name, x in (("F_c", parts.F_c), ("u", np.concatenate(list(parts.u), axis=-1)), ("noise", noise[0])):
        found[f"Dice of a probe on {name}"] = label_probe(x, label, model.network.strides[0])
    half = len(label) // 2
    found["Dice of p_1"] = dice(one_step[half:, ..., 0] < 0.5, label[half:])
    rows, columns = model.network.strides[0]
    strength = np.linalg.norm(parts.F_cf, axis=-1).repeat(rows, 1).repeat(columns, 2)
    maps = {"kappa": parts.kappa, "F_cf norm": strength[:, : label.shape[1], : label.shape[2]], "JS": parts.js}
    for name, x in maps.items():
        found |= {f"AUROC {name}, conflict against {other}": v for other, v in ranking(x, scenes, spec).items()}
    return found | intervention(model, parts.kappa, scenes, spec, [volume.number for volume in volumes])


def dice(a: Bool[np.ndarray, "n h w"], b: Bool[np.ndarray, "n h w"]) -> float:
    """Dice of all the cases together."""
    return float(2 * np.sum(a & b) / max(a.sum() + b.sum(), 1))


def pairs(parts: Parts) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What should be independent, and (F_c, F_cf), which need not be: conflict lives in pathology, as F_c does."""
    c, u = np.moveaxis(parts.c, 0, -2), np.moveaxis(parts.u, 0, -2)
    found = {}
    for m in range(c.shape[-2]):
        found |= {
            f"(F_c, u_{m})": (parts.F_c, u[..., m, :]),
            f"(c_{m}, u_{m})": (c[..., m, :], u[..., m, :]),
            f"(u_{m}, F_cf)": (u[..., m, :], parts.F_cf),
        }
    found["(u_0, u_1)"] = (u[..., 0, :], u[..., 1, :])
    return found | {"(F_c, F_cf)": (parts.F_c, parts.F_cf)}


def squared_correlation(
    y: Float[np.ndarray, "n t s d"], z: Float[np.ndarray, "n t s e"], inside: Bool[np.ndarray, "n t s"]
) -> float:
    """Mean R_ij^2 over channels with each case's mean taken off, less 1 / (n - B): its mean under independence."""
    mask = inside.reshape(len(inside), -1).astype(np.float32)
    a, b = (objective.centred_per_case(jnp.asarray(x.reshape(*mask.shape, -1)), jnp.asarray(mask)) for x in (y, z))
    found = objective.xcov(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), jnp.asarray(mask.ravel()))
    return float(found - 1 / (mask.sum() - len(mask)))


def distance_correlation(
    y: Float[np.ndarray, "n t s d"], z: Float[np.ndarray, "n t s e"], inside: Bool[np.ndarray, "n t s"]
) -> tuple[float, float]:
    """dCor of PIXELS random pixels of every case, and the share of permutations of the cases that reach it."""
    rng = np.random.default_rng(0)
    masks = inside.reshape(len(inside), -1)
    rows = [(i, rng.permutation(np.flatnonzero(mask))[:PIXELS]) for i, mask in enumerate(masks)]
    flat = [x.reshape(len(inside), -1, x.shape[-1]) for x in (y, z)]
    a, b = (_centred_distances(np.concatenate([x[i, where] for i, where in rows])) for x in flat)
    scale = np.sqrt(np.mean(a * a) * np.mean(b * b))
    seen = np.mean(a * b)
    blocks = np.arange(len(a)).reshape(len(rows), PIXELS)
    null = []
    for _ in range(PERMUTATIONS):
        order = blocks[rng.permutation(len(rows))].ravel()
        null.append(np.mean(a * b[np.ix_(order, order)]))
    p = (1 + np.sum(np.array(null) >= seen)) / (1 + PERMUTATIONS)
    return float(np.sqrt(max(seen, 0) / scale)), float(p)


def _centred_distances(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
    spread = x.std(axis=0)
    x = (x - x.mean(axis=0)) / np.where(spread > 1e-8, spread, 1.0)
    d = cdist(x, x).astype(np.float32)
    return d - d.mean(axis=0) - d.mean(axis=1, keepdims=True) + d.mean()


def logistic(x: Float[np.ndarray, "n d"], y: Bool[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ridge logistic regression: (centre, scale, weights with the bias last)."""
    centre, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-8)
    rows = np.hstack([(x - centre) / scale, np.ones((len(x), 1))])
    sign = np.where(y, 1.0, -1.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (rows @ w)
        gradient = rows.T @ (-sign * expit(-margin)) / len(rows)
        penalty = RIDGE * np.append(w[:-1], 0)
        return float(np.mean(np.logaddexp(0, -margin)) + penalty @ w / 2), gradient + penalty

    return centre, scale, scipy.optimize.minimize(loss, np.zeros(rows.shape[1]), jac=True, method="L-BFGS-B").x


def predict(probe: tuple[np.ndarray, np.ndarray, np.ndarray], x: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n"]:
    """The log odds that a probe gives."""
    centre, scale, w = probe
    return ((x - centre) / scale) @ w[:-1] + w[-1]


def modality_probe(x: Float[np.ndarray, "m n t s d"], inside: Bool[np.ndarray, "n t s"]) -> float:
    """How often a linear probe tells the first modality from the second by features averaged over the body."""
    weight = inside / inside.sum(axis=(1, 2), keepdims=True)
    means = np.einsum("mntsd,nts->mnd", x[:2], weight)
    half = means.shape[1] // 2
    truth = np.repeat([False, True], half)
    probe = logistic(means[:, :half].reshape(-1, means.shape[-1]), truth)
    said = predict(probe, means[:, half : 2 * half]) > 0
    return float(np.mean(said == np.array([[False], [True]])))


def label_probe(x: Float[np.ndarray, "n t s d"], label: Bool[np.ndarray, "n h w"], factor: tuple[int, ...]) -> float:
    """Dice over the second half of the cases of linear probes (one for each pixel of a feature's cell)."""
    half = len(x) // 2
    rows, columns = factor
    said = np.zeros((len(x), x.shape[1] * rows, x.shape[2] * columns), bool)
    truth = np.zeros_like(said)
    truth[:, : label.shape[1], : label.shape[2]] = label
    for i in range(rows):
        for j in range(columns):
            cell = truth[:, i::rows, j::columns]
            probe = logistic(x[:half].reshape(-1, x.shape[-1]), cell[:half].ravel())
            said[:, i::rows, j::columns] = predict(probe, x) > 0
    return dice(said[half:], truth[half:])


def ranking(x: Float[np.ndarray, "n h w"], scenes: phantom_scene.Scene, spec: phantom.Spec) -> dict[str, float]:
    """AUROC of a map for conflict cores against ignored cores, calm boundaries and agreed cores."""
    masks = acceptance.regions(scenes, acceptance.blobs(scenes, spec))
    conflict = masks["conflict"]
    return {
        name: usefulness.auroc(x[conflict | other], conflict[conflict | other])
        for name, other in masks.items()
        if name != "conflict"
    }


def intervention(
    model: api.Trained,
    before: Float[np.ndarray, "n h w"],
    scenes: phantom_scene.Scene,
    spec: phantom.Spec,
    numbers: list[int],
) -> dict[str, float]:
    """Flips what the second reader shows of the first blob: mean change of kappa in its core, and away from it.

    before: kappa of the phantoms with these numbers as they are.
    """
    change = np.abs(
        parts_of(model, phantom_scene.volumes(spec, numbers, model.config.seed, flip=(1, 0))).kappa - before
    )
    site, distance = np.asarray(scenes.site)[:, 0], np.asarray(scenes.distance)[:, 0]
    shown = np.asarray(scenes.evidence)[:, :, 0].all(axis=1)  # a reader who shows nothing has nothing to flip
    body = np.asarray(scenes.body)[:, 0]
    near = (distance <= spec.radius + max(spec.boundary) + RIM) & (_nearest(site) == 0)
    core = (distance <= spec.radius + min(spec.boundary)) & (site == 0)
    return {
        "kappa changes in the flipped blob": float(change[shown][core[shown]].mean()),
        "kappa changes elsewhere": float(change[shown][(body & ~near)[shown]].mean()),
    }


def _nearest(site: Integer[np.ndarray, "n h w"]) -> Integer[np.ndarray, "n h w"]:
    """The site of each pixel, also of those just beyond its reach: that of the nearest pixel within reach."""
    found = np.empty_like(site)
    for i, one in enumerate(site):
        index = distance_transform_edt(one < 0, return_distances=False, return_indices=True)
        found[i] = one[tuple(np.asarray(index))]
    return found
