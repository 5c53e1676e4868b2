"""From a volume to its trust maps: encode once, draw hypotheses, decide, probe, calibrate, explain.

Slices go through in chunks of one static size, split over the mesh; only slices in which the one-step prediction sees
any foreground are sampled and probed. Nothing recompiles per case as long as the padded in-plane size stays.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from entrust_jax.baselines.unet import UNet
from entrust_jax.data import pipeline
from entrust_jax.data.preprocess import Volume
from entrust_jax.enfuse.encoder import Evidence
from entrust_jax.layers import apply
from entrust_jax.model import Condition, EnTrust
from entrust_jax.segdiff import sampler as segdiff_sampler
from entrust_jax.segdiff.sampler import Sampler
from entrust_jax.trustmap import calibration, case, explanation, probing, statistics

ACTIVE = 0.005  # a slice is sampled when p_1 of foreground exceeds this somewhere in the body
CHUNK = 8  # slices per compiled call, rounded up to the number of devices
MEMBERS = 8  # hypotheses that are in memory at once within a call

Raw = dict[str, Any]
_DATA, _WHOLE = PartitionSpec("data"), PartitionSpec()


def sampler_of(config) -> Sampler:
    """The reverse chain of a config's `diffusion` section."""
    d = config.diffusion
    return Sampler(d.b, d.lambda_min, d.lambda_max, d.steps, d.sampler, d.eta_min)


def _availability(present: Array, space: tuple[int, ...]) -> Array:
    mu = present.astype(jnp.float32)
    return jnp.broadcast_to(mu.reshape(*mu.shape, *(1,) * len(space)), (*mu.shape, *space))


def _condition(model: EnTrust, params: Any, evidence: Evidence, present: Array) -> Condition:
    mu = _availability(present, evidence.logits.shape[2:-1])
    return apply(model, params, evidence, mu, method="fuse")


def _denoise(model: EnTrust, params: Any):
    return lambda x_t, log_snr, condition: apply(model, params, x_t, log_snr, condition, method="denoise")


@functools.partial(jax.jit, static_argnames=("model", "sampler", "mesh"))
def look(params: Any, batch: dict[str, Array], key: Array, *, model: EnTrust, sampler: Sampler, mesh: Mesh):
    """Encodes a chunk and predicts it in one step: (Evidence, maps by name, leading axis = slices)."""

    def local(params, batch, key):
        evidence = apply(model, params, batch["image"], batch["coordinates"], method="encode")
        condition = _condition(model, params, evidence, batch["present"])
        fused = condition.fused
        first = segdiff_sampler.one_step(
            _denoise(model, params), condition, batch["case"], key,
            sampler=sampler, shape=fused.kappa.shape[1:], classes=model.classes,
        )  # fmt: skip
        return evidence, {
            "one_step": first,
            "conflict": fused.kappa,
            "js": fused.js,
            "kappa_pairs": fused.kappa_pairs,
            "support": fused.support,
            "unimodal": fused.posterior,
        }

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(_WHOLE, _DATA, _WHOLE), out_specs=_DATA, check_vma=False
    )
    return split(params, batch, key)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "mesh", "hypotheses"))
def draw(
    params: Any,
    evidence: Evidence,
    present: Array,
    number: Array,
    key: Array,
    *,
    model: EnTrust,
    sampler: Sampler,
    mesh: Mesh,
    hypotheses: int,
):
    """N hypotheses of every slice of a chunk, reduced at once: (maps, labels u8 [b n *s])."""

    def local(params, evidence, present, number, key):
        condition = _condition(model, params, evidence, present)
        first, members = segdiff_sampler.sample(
            _denoise(model, params), condition, condition.fused.kappa, number, key,
            sampler=sampler, classes=model.classes, hypotheses=hypotheses, chunk=min(MEMBERS, hypotheses),
        )  # fmt: skip
        return statistics.statistics(members, first), jnp.argmax(members, axis=-1).astype(jnp.uint8)

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(_WHOLE, _DATA, _DATA, _DATA, _WHOLE), out_specs=_DATA, check_vma=False
    )
    return split(params, evidence, present, number, key)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "mesh"))
def probe(
    params: Any,
    evidence: Evidence,
    present: Array,
    label: Array,
    number: Array,
    key: Array,
    *,
    model: EnTrust,
    sampler: Sampler,
    mesh: Mesh,
) -> dict[str, Array]:
    """Asks the one-step predictor what it would say without each modality, subset and the conflict features."""

    def local(params, evidence, present, label, number, key):
        def one_step(availability, conflict_scale):
            condition = apply(model, params, evidence, availability, conflict_scale=conflict_scale, method="fuse")
            return segdiff_sampler.one_step(
                _denoise(model, params), condition, number, key,
                sampler=sampler, shape=availability.shape[2:], classes=model.classes,
            )  # fmt: skip

        fused = _condition(model, params, evidence, present).fused
        return probing.probe(one_step, present, fused.kappa, fused.weights, label)

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(_WHOLE, *(_DATA,) * 4, _WHOLE), out_specs=_DATA, check_vma=False
    )
    return split(params, evidence, present, label, number, key)


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def ensemble(params: Any, batch: dict[str, Array], *, model: UNet, mesh: Mesh) -> Array:
    """Probabilities of every stacked U-Net, [b n *s k]."""

    def local(params, batch):
        logits = jax.vmap(lambda p: apply(model, p, batch["image"], batch["present"]))(params)
        return jnp.moveaxis(jax.nn.softmax(logits, axis=-1), 0, 1)

    return jax.shard_map(local, mesh=mesh, in_specs=(_WHOLE, _DATA), out_specs=_DATA, check_vma=False)(params, batch)


def _padded(volume: Volume, multiple: int, slices: np.ndarray | None) -> dict[str, np.ndarray]:
    batch = pipeline.evaluation_slices(volume, multiple=multiple)
    return batch if slices is None else {name: value[slices] for name, value in batch.items()}


def _rows(parts: list[Any], count: int) -> Any:
    """Joins chunked results along the slices and drops the padding of the last chunk."""
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(y) for y in x])[:count], *parts)


def first_look(
    params: Any, volume: Volume, key: Array, *, model: EnTrust, sampler: Sampler, mesh: Mesh, multiple: int
) -> tuple[Evidence, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Evidence and one-step maps of all slices (numpy, padded in plane), and the padded batch."""
    batch = _padded(volume, multiple, None)
    size = -(-CHUNK // mesh.size) * mesh.size
    parts = [
        look(params, piece, key, model=model, sampler=sampler, mesh=mesh) for piece in pipeline.chunks(batch, size)
    ]
    evidence, maps = _rows(parts, len(batch["valid"]))
    return evidence, maps, batch


def active_slices(one_step: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Bool [d]: slices whose one-step foreground probability exceeds ACTIVE somewhere in the body."""
    foreground = (1 - one_step[..., 0]) * body
    return np.max(foreground, axis=tuple(range(1, foreground.ndim))) > ACTIVE


def examine(
    params: Any,
    volume: Volume,
    key: Array,
    *,
    model: EnTrust,
    sampler: Sampler,
    mesh: Mesh,
    hypotheses: int,
    multiple: int,
    slices: int | None = None,
) -> Raw:
    """Everything that EnTrust says of one case before calibration; maps [d h w ...] over the whole volume.

    With `slices`, at most so many slices are kept, three quarters of them active ones (calibration): the maps then
    cover `kept` only, and `slice_weight` says how many slices each of them stands for.
    """
    evidence, maps, batch = first_look(
        params, volume, key, model=model, sampler=sampler, mesh=mesh, multiple=multiple
    )
    active = active_slices(maps["one_step"], batch["body"])
    kept = np.arange(len(active))
    weight = np.ones(len(active), np.float32)
    if slices is not None:
        kept, weight = _thin(active, np.any(batch["body"], axis=(1, 2)), slices)
        evidence, maps = jax.tree.map(lambda x: x[kept], (evidence, maps))
        batch = {name: value[kept] for name, value in batch.items()}
        active = active[kept]
    maps |= _as_one_hypothesis(maps["one_step"])
    labels = np.repeat(np.argmax(maps["one_step"], axis=-1).astype(np.uint8)[None], hypotheses, axis=0)
    chosen = np.flatnonzero(active)
    static = {"model": model, "sampler": sampler, "mesh": mesh}
    size = -(-CHUNK // mesh.size) * mesh.size
    for rows, real in _groups(chosen, size):
        part = jax.tree.map(lambda x, rows=rows: x[rows], evidence)
        drawn, members = draw(
            params, part, batch["present"][rows], batch["case"][rows], key, hypotheses=hypotheses, **static
        )
        for name in ("mean", "entropy", "within", "divergence", "disagreement", "gap"):
            maps[name][rows[:real]] = np.asarray(drawn[name])[:real]
        labels[:, rows[:real]] = np.moveaxis(np.asarray(members)[:real], 1, 0)

    label, decision = case.dice_bayes(maps["mean"], labels)
    modalities, classes = model.modalities, model.classes
    shape = label.shape
    maps["delta_conflict"] = np.zeros(shape, np.float32)
    maps["conflict_uncertainty"] = np.zeros(shape, np.float32)
    maps["attribution"] = np.zeros((shape[0], modalities, *shape[1:]), np.float32)
    maps["delta_modality"] = np.zeros((shape[0], modalities, *shape[1:]), np.float32)
    maps["counterfactual"] = np.repeat(label[:, None], modalities, axis=1)
    for rows, real in _groups(chosen, size):
        part = jax.tree.map(lambda x, rows=rows: x[rows], evidence)
        found = probe(
            params, part, batch["present"][rows], label[rows].astype(np.int32), batch["case"][rows], key, **static
        )
        found = {name: np.asarray(value)[:real] for name, value in found.items()}
        found["counterfactual"] = np.argmax(found["counterfactual"], axis=-1).astype(np.uint8)
        for name, value in found.items():
            maps[name][rows[:real]] = value
    for name in ("kappa_pairs", "support", "unimodal", "attribution", "delta_modality", "counterfactual"):
        maps[name] = np.moveaxis(maps[name], 1, 0)
    del classes
    return _crop(maps, volume) | {
        "hypotheses": _crop_one(labels, volume),
        "label": _crop_one(label[None], volume)[0],
        "predicted_dice": decision["predicted_dice"],
        "kept": kept,
        "slice_weight": weight,
    }


def examine_unet(
    params: Any, volume: Volume, *, model: UNet, mesh: Mesh, multiple: int, tau: float, slices: int | None = None
) -> Raw:
    """As `examine`, for a U-Net or a deep ensemble of them: members take the place of hypotheses."""
    batch = _padded(volume, multiple, None)
    size = -(-CHUNK // mesh.size) * mesh.size
    parts = [ensemble(params, piece, model=model, mesh=mesh) for piece in pipeline.chunks(batch, size)]
    members = _rows(parts, len(batch["valid"]))
    mean = members.mean(axis=1)
    kept, weight = np.arange(len(mean)), np.ones(len(mean), np.float32)
    if slices is not None:
        kept, weight = _thin(active_slices(mean, batch["body"]), np.any(batch["body"], axis=(1, 2)), slices)
        members, mean = members[kept], mean[kept]
    if members.shape[1] == 1:
        found = _as_one_hypothesis(mean)
        maps = {"one_step": mean, "mean": found["mean"], "entropy": found["entropy"]}
        label = case.threshold_action(mean, tau)
        return _crop(maps, volume) | {
            "label": _crop_one(label[None], volume)[0],
            "predicted_dice": _expected_dice(mean, label),
            "kept": kept,
            "slice_weight": weight,
        }
    found = jax.tree.map(np.asarray, statistics.statistics(jnp.asarray(members), jnp.asarray(mean)))
    labels = np.moveaxis(np.argmax(members, axis=-1).astype(np.uint8), 1, 0)
    label = case.threshold_action(mean, tau)
    maps = {"one_step": mean} | {
        name: found[name] for name in ("mean", "entropy", "within", "divergence", "disagreement")
    }
    return _crop(maps, volume) | {
        "hypotheses": _crop_one(labels, volume),
        "label": _crop_one(label[None], volume)[0],
        "predicted_dice": _expected_dice(mean, label),
        "kept": kept,
        "slice_weight": weight,
    }


def _expected_dice(p: np.ndarray, label: np.ndarray) -> float:
    """Mean over foreground classes of 2 sum p y / (sum p + sum y): what marginals alone can say of the Dice."""
    scores = []
    for k in range(1, p.shape[-1]):
        mask = label == k
        size = float(p[..., k].sum() + mask.sum())
        scores.append(2 * float(p[..., k][mask].sum()) / size if size > 0 else 1.0)
    return float(np.mean(scores))


def _as_one_hypothesis(p: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of slices that are not sampled: their hypotheses are their one-step prediction."""
    entropy = np.asarray(statistics.entropy(jnp.asarray(p)))
    zero = np.zeros_like(entropy)
    return {
        "mean": p.copy(),
        "entropy": entropy.copy(),
        "within": entropy.copy(),
        "divergence": zero,
        "disagreement": zero.copy(),
        "gap": zero.copy(),
    }


def _thin(active: np.ndarray, body: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced slices, up to 3/4 `count` active and the rest others with a body, and how many each stands for."""
    kept, weight = [], []
    others = np.flatnonzero(~active & body)
    chosen = np.flatnonzero(active)
    quota = min(len(chosen), max(count - len(others), (3 * count) // 4))
    for group, size in ((chosen, quota), (others, min(len(others), count - quota))):
        if size > 0:
            index = np.round(np.linspace(0, len(group) - 1, size)).astype(int)
            kept.append(group[index])
            weight.append(np.full(size, len(group) / size, np.float32))
    rows, weights = np.concatenate(kept), np.concatenate(weight)
    order = np.argsort(rows)
    return rows[order], weights[order]


def _groups(rows: np.ndarray, size: int):
    """Groups of exactly `size` rows (the last filled up with copies) and how many of each are real."""
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        yield np.concatenate([group, np.repeat(group[-1:], size - len(group))]), len(group)


def _crop_one(array: np.ndarray, volume: Volume) -> np.ndarray:
    """Takes the in-plane padding off an array [c d h w]."""
    _, height, width = volume.body.shape
    return array[:, :, :height, :width]


def _crop(maps: dict[str, np.ndarray], volume: Volume) -> dict[str, np.ndarray]:
    stacked = ("kappa_pairs", "support", "unimodal", "attribution", "delta_modality", "counterfactual")
    return {
        name: _crop_one(value, volume) if name in stacked else pipeline.crop(value, volume)
        for name, value in maps.items()
    }


def calibrated(raw: Raw, present: np.ndarray, chosen: str, params: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """(p before calibration, p_cal, e) of an examined case under a fitted rung of the ladder."""
    inputs, _ = calibration.features(raw, raw["label"], present)
    one_step, mean = calibration.log_probability(raw["one_step"]), calibration.log_probability(raw["mean"])
    before, _ = calibration.apply("identity", {}, inputs, one_step, mean, raw["label"])
    return before, *calibration.apply(chosen, params, inputs, one_step, mean, raw["label"])


def finish(
    raw: Raw,
    volume: Volume,
    *,
    chosen: str,
    params: dict[str, np.ndarray],
    modalities: tuple[str, ...],
    classes: tuple[str, ...],
    regions: dict[str, tuple[int, ...]],
    started: float,
) -> dict[str, Any]:
    """Calibrates, explains and sums up an examined case: the prediction that report and metrics read."""
    before, p_cal, e = calibrated(raw, volume.present, chosen, params)
    e = e * volume.body
    border = calibration.signed_distance(raw["label"])
    out = {name: value for name, value in raw.items() if name not in ("kept", "slice_weight")}
    out |= {"present": volume.present, "probability_raw": before, "probability": p_cal, "error_probability": e}
    evidence: dict[str, Any] = {}
    if "conflict" in raw:
        out["cause"] = explanation.cause(e, raw["conflict"], raw["support"], border, volume.body, volume.present)
        evidence = {
            "cause": out["cause"],
            "conflict_pairs": raw["kappa_pairs"],
            "support": raw["support"],
            "attribution": raw["attribution"],
            "counterfactual": raw["counterfactual"],
        }
    found = explanation.records(
        e, raw["label"], volume.spacing, modalities, classes, volume.present, **evidence
    )
    out["records"] = [record | {"sentence": explanation.sentence(record)} for record in found]
    voxel_ml = float(np.prod(volume.spacing)) / 1000
    out["regions"] = case.volumes(raw.get("hypotheses", raw["label"][None]), regions, voxel_ml)
    out["seconds"] = time.perf_counter() - started
    return out
