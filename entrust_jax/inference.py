"""From a volume to its maps: encode once, draw hypotheses, decide, probe. `trustmap.prediction` goes on from there.

Slices go through in chunks of one static size, split over the mesh; only slices in which the one-step prediction sees
any foreground are sampled and probed. Nothing recompiles per case as long as the padded in-plane size stays.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from entrust_jax.baselines.unet import UNet, over_members
from entrust_jax.data import pipeline
from entrust_jax.data.preprocess import Volume
from entrust_jax.enfuse.encoder import Evidence
from entrust_jax.layers import apply
from entrust_jax.model import Condition, EnTrust
from entrust_jax.runtime.mesh import round_to_devices
from entrust_jax.segdiff import sampler as segdiff_sampler
from entrust_jax.segdiff.sampler import Sampler
from entrust_jax.trustmap import case, prediction, probing, statistics
from entrust_jax.trustmap.prediction import STACKED, Raw

ACTIVE = 0.005  # a slice is sampled when p_1 of foreground exceeds this somewhere in the body
CHUNK = 8  # slices per compiled call, at most, before rounding up to the number of devices
OUTSIDE = 10.0  # logit of background outside the body, and minus that of every other class
MEMBERS = 8  # hypotheses that are in memory at once within a call
DRAWN = ("mean", "entropy", "within", "divergence", "disagreement", "gap")  # maps that the hypotheses make

_DATA, _WHOLE = PartitionSpec("data"), PartitionSpec()


def sampler_of(config) -> Sampler:
    """The reverse chain of a config's `diffusion` section."""
    d = config.diffusion
    return Sampler(d.b, d.lambda_min, d.lambda_max, d.steps, d.sampler, d.eta_min)


def _availability(present: Array, space: tuple[int, ...]) -> Array:
    mu = present.astype(jnp.float32)
    return jnp.broadcast_to(mu.reshape(*mu.shape, *(1,) * len(space)), (*mu.shape, *space))


def condition_of(model: EnTrust, params: Any, evidence: Evidence, present: Array) -> Condition:
    """What the denoiser sees of a batch in which these modalities are there, bool [b m]."""
    mu = _availability(present, evidence.logits.shape[2:-1])
    return apply(model, params, evidence, mu, method="fuse")


def in_body(logits: Array, body: Array) -> Array:
    """Background outside the body, where no loss teaches a network what to say."""
    nothing = jnp.full(logits.shape[-1], -OUTSIDE).at[0].set(OUTSIDE)
    return jnp.where(body[..., None], logits, nothing.reshape((1,) * (logits.ndim - 1) + (-1,)))


def _denoise(model: EnTrust, params: Any, body: Array):
    """The denoiser as the sampler calls it. Masks are background outside the body, as they are in training: what the

    network makes up there would come back through its convolutions at the next step.
    """
    return lambda x_t, log_snr, condition: in_body(
        apply(model, params, x_t, log_snr, condition, method="denoise"), body
    )


def look_at(
    params: Any, batch: dict[str, Array], key: Array, *, model: EnTrust, sampler: Sampler
) -> tuple[Evidence, Condition, dict[str, Array]]:
    """Encodes a batch and predicts it in one step, on one device: (evidence, condition, maps by name)."""
    evidence = apply(model, params, batch["image"], batch["coordinates"], batch["body"], method="encode")
    condition = condition_of(model, params, evidence, batch["present"])
    fused = condition.fused
    first = segdiff_sampler.one_step(
        _denoise(model, params, batch["body"]), condition, batch["case"], key,
        sampler=sampler, shape=fused.kappa.shape[1:], classes=model.classes,
    )  # fmt: skip
    maps = {
        "one_step": first,
        "conflict": fused.kappa,
        "js": fused.js,
        "kappa_pairs": fused.kappa_pairs,
        "support": fused.support,
        "unimodal": fused.posterior,
    }
    return evidence, condition, maps


@functools.partial(jax.jit, static_argnames=("model", "sampler", "mesh"))
def look(params: Any, batch: dict[str, Array], key: Array, *, model: EnTrust, sampler: Sampler, mesh: Mesh):
    """Encodes a chunk and predicts it in one step: (Evidence, maps by name, leading axis = slices)."""

    def local(params, batch, key):
        evidence, _, maps = look_at(params, batch, key, model=model, sampler=sampler)
        return evidence, maps

    split = jax.shard_map(local, mesh=mesh, in_specs=(_WHOLE, _DATA, _WHOLE), out_specs=_DATA, check_vma=False)
    return split(params, batch, key)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "mesh", "hypotheses"))
def draw(
    params: Any,
    evidence: Evidence,
    batch: dict[str, Array],
    key: Array,
    *,
    model: EnTrust,
    sampler: Sampler,
    mesh: Mesh,
    hypotheses: int,
):
    """N hypotheses of every slice of a chunk, reduced at once: (maps, labels u8 [b n *s])."""

    def local(params, evidence, batch, key):
        condition = condition_of(model, params, evidence, batch["present"])
        first, members = segdiff_sampler.sample(
            _denoise(model, params, batch["body"]), condition, condition.fused.kappa, batch["case"], key,
            sampler=sampler, classes=model.classes, hypotheses=hypotheses, chunk=min(MEMBERS, hypotheses),
        )  # fmt: skip
        return statistics.statistics(members, first), jnp.argmax(members, axis=-1).astype(jnp.uint8)

    split = jax.shard_map(local, mesh=mesh, in_specs=(_WHOLE, _DATA, _DATA, _WHOLE), out_specs=_DATA, check_vma=False)
    return split(params, evidence, batch, key)


def probe_at(
    params: Any,
    evidence: Evidence,
    batch: dict[str, Array],
    label: Array,
    key: Array,
    *,
    model: EnTrust,
    sampler: Sampler,
) -> dict[str, Array]:
    """`probing.probe` of a batch whose delivered mask is `label`, on one device."""

    def one_step(availability, conflict_scale):
        condition = apply(model, params, evidence, availability, conflict_scale=conflict_scale, method="fuse")
        return segdiff_sampler.one_step(
            _denoise(model, params, batch["body"]), condition, batch["case"], key,
            sampler=sampler, shape=availability.shape[2:], classes=model.classes,
        )  # fmt: skip

    fused = condition_of(model, params, evidence, batch["present"]).fused
    return probing.probe(one_step, batch["present"], fused.kappa, fused.weights, label, model.classes)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "mesh"))
def probe(
    params: Any,
    evidence: Evidence,
    batch: dict[str, Array],
    label: Array,
    key: Array,
    *,
    model: EnTrust,
    sampler: Sampler,
    mesh: Mesh,
) -> dict[str, Array]:
    """Asks the one-step predictor what it would say without each modality, subset and the conflict features."""

    local = functools.partial(probe_at, model=model, sampler=sampler)
    split = jax.shard_map(local, mesh=mesh, in_specs=(_WHOLE, *(_DATA,) * 3, _WHOLE), out_specs=_DATA, check_vma=False)
    return split(params, evidence, batch, label, key)


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def ensemble(params: Any, batch: dict[str, Array], key: Array, *, model: UNet, mesh: Mesh) -> Array:
    """Probabilities of every stacked U-Net, [b n *s k]; with dropout those of all its passes, n = members x passes.

    Pass j of member i draws from `key` folded with i, the case and j: the same whatever is in the batch.
    """

    def passed(params, batch, key, number):
        fold = jax.random.fold_in
        noise = jax.vmap(lambda case: fold(fold(key, case), number))(batch["case"])
        return apply(model, params, batch["image"], batch["present"], batch["body"], noise)

    def local(params, batch, key):
        if model.dropout:
            own = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(jax.tree.leaves(params)[0])))
            each = over_members(lambda p, k: jax.lax.map(lambda j: passed(p, batch, k, j), jnp.arange(model.passes)))
            logits = jnp.concatenate(each(params, own))
        else:
            logits = over_members(lambda p: apply(model, p, batch["image"], batch["present"], batch["body"]))(params)
        return jnp.moveaxis(jax.nn.softmax(in_body(logits, batch["body"][None]), axis=-1), 0, 1)

    split = jax.shard_map(local, mesh=mesh, in_specs=(_WHOLE, _DATA, _WHOLE), out_specs=_DATA, check_vma=False)
    return split(params, batch, key)


def chunk_size(slices: int, mesh: Mesh) -> int:
    """Slices of a compiled call: the least power of two that holds a scan of so many, at most CHUNK, rounded up to the

    devices. So a scan of one slice is not drawn eight times, and scans of any length come to few shapes.
    """
    return round_to_devices(min(CHUNK, 1 << (slices - 1).bit_length()), mesh)


def _rows(parts: list[Any], count: int) -> Any:
    """Joins chunked results along the slices and drops the padding of the last chunk."""
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(y) for y in x])[:count], *parts)


def first_look(
    params: Any, volume: Volume, key: Array, *, model: EnTrust, sampler: Sampler, mesh: Mesh, multiple: int
) -> tuple[Evidence, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Evidence and one-step maps of all slices (numpy, padded in plane), and the padded batch."""
    batch = pipeline.evaluation_slices(volume, multiple=multiple)
    size = chunk_size(len(batch["valid"]), mesh)
    parts = [
        look(params, piece, key, model=model, sampler=sampler, mesh=mesh) for piece in pipeline.chunks(batch, size)
    ]
    evidence, maps = _rows(parts, len(batch["valid"]))
    return evidence, maps, batch


def one_step(params: Any, volume: Volume, key: Array, *, multiple: int, **static: Any) -> np.ndarray:
    """p_1 of a scan, [d h w k]."""
    _, maps, _ = first_look(params, volume, key, multiple=multiple, **static)
    return pipeline.crop(maps["one_step"], volume)


def pieces(volume: Volume, *, mesh: Mesh, multiple: int) -> Iterator[dict[str, np.ndarray]]:
    """The slices of a case in chunks; copies in the last one are not valid."""
    batch = pipeline.evaluation_slices(volume, multiple=multiple)
    yield from pipeline.chunks(batch, chunk_size(len(batch["valid"]), mesh))


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
    probed: bool = True,
) -> Raw:
    """Everything that EnTrust says of one case before calibration; maps [d h w ...] over the whole volume.

    Without `probed` nothing is asked for the reasons, which takes almost half of the time; the mask, its hypotheses and
    probabilities are the same.

    With `slices`, at most so many slices are kept, three quarters of them active ones (calibration): the maps then
    cover `kept` only, and `slice_weight` says how many slices each of them stands for.
    """
    evidence, maps, batch = first_look(params, volume, key, model=model, sampler=sampler, mesh=mesh, multiple=multiple)
    active = active_slices(maps["one_step"], batch["body"])
    kept, weight = keep(active, batch["body"], slices)
    if slices is not None:
        evidence, maps, batch = jax.tree.map(lambda x: x[kept], (evidence, maps, batch))
    chosen = np.flatnonzero(active[kept])
    static = {"model": model, "sampler": sampler, "mesh": mesh}
    size = chunk_size(len(volume.body), mesh)

    def of(rows: np.ndarray) -> tuple[Evidence, dict[str, np.ndarray]]:
        return jax.tree.map(lambda x: x[rows], (evidence, batch))

    maps |= as_one_hypothesis(maps["one_step"])
    labels = np.repeat(np.argmax(maps["one_step"], axis=-1).astype(np.uint8)[None], hypotheses, axis=0)
    for rows, real in groups(chosen, size):
        drawn, members = draw(params, *of(rows), key, hypotheses=hypotheses, **static)
        for name in DRAWN:
            maps[name][rows[:real]] = np.asarray(drawn[name])[:real]
        labels[:, rows[:real]] = np.moveaxis(np.asarray(members)[:real], 1, 0)

    # The decision needs the whole volume, and the probes ask about the decision: a second pass over the same evidence.
    label, decision = case.dice_bayes(maps["mean"], labels)
    maps |= unprobed(label, model.modalities)
    for rows, real in groups(chosen if probed else chosen[:0], size):
        found = probe(params, *of(rows), label[rows].astype(np.int32), key, **static)
        found = {name: np.asarray(value)[:real] for name, value in found.items()}
        found["counterfactual"] = np.argmax(found["counterfactual"], axis=-1).astype(np.uint8)
        for name, value in found.items():
            maps[name][rows[:real]] = value
    for name in STACKED:
        maps[name] = np.moveaxis(maps[name], 1, 0)
    raw = _crop(maps | {"hypotheses": labels, "label": label}, volume)
    return raw | {
        "border": prediction.border(raw["label"], volume.spacing, volumetric=False),
        "predicted_dice": decision["predicted_dice"],
        "action": decision["action"],
        "sampled": active[kept],
        "kept": kept,
        "slice_weight": weight,
    }


def examine_unet(
    params: Any,
    volume: Volume,
    key: Array,
    *,
    model: UNet,
    mesh: Mesh,
    multiple: int,
    tau: float,
    slices: int | None = None,
) -> Raw:
    """As `examine`, for a U-Net or a deep ensemble of them: members, or passes, take the place of hypotheses."""
    batch = pipeline.evaluation_slices(volume, multiple=multiple)
    size = chunk_size(len(batch["valid"]), mesh)
    parts = [ensemble(params, piece, key, model=model, mesh=mesh) for piece in pipeline.chunks(batch, size)]
    members = _rows(parts, len(batch["valid"]))
    kept, weight = keep(active_slices(members.mean(axis=1), batch["body"]), batch["body"], slices)
    members = members[kept]
    raw = _crop(of_members(members, tau), volume)
    return raw | {
        "border": prediction.border(raw["label"], volume.spacing, volumetric=False),
        "predicted_dice": expected_dice(raw["mean"], raw["label"]),
        "action": float(tau),
        "kept": kept,
        "slice_weight": weight,
    }


def of_members(members: np.ndarray, tau: float) -> dict[str, np.ndarray]:
    """The maps of the members' probabilities [d n h w k], cut at the threshold of stage 3."""
    mean = members.mean(axis=1)
    maps = {"one_step": mean, "mean": mean, "label": case.threshold_action(mean, tau)}
    if members.shape[1] == 1:
        return maps | {"entropy": np.asarray(statistics.entropy(jnp.asarray(mean)))}
    found = statistics.statistics(jnp.asarray(members), jnp.asarray(mean))
    maps |= {name: np.asarray(found[name]) for name in ("entropy", "within", "divergence", "disagreement")}
    return maps | {"hypotheses": np.moveaxis(np.argmax(members, axis=-1).astype(np.uint8), 1, 0)}


def unprobed(label: np.ndarray, modalities: int) -> dict[str, np.ndarray]:
    """What probing says of slices that it does not visit: nothing depends on anything, nobody would change the mask."""
    d, *plane = label.shape
    zero = np.zeros((d, *plane), np.float32)
    by_modality = np.zeros((d, modalities, *plane), np.float32)
    return {
        "delta_conflict": zero,
        "conflict_uncertainty": zero.copy(),
        "attribution": by_modality,
        "delta_modality": by_modality.copy(),
        "counterfactual": np.repeat(label[:, None], modalities, axis=1),
    }


def expected_dice(p: np.ndarray, label: np.ndarray) -> float:
    """Mean over foreground classes of 2 sum p y / (sum p + sum y): what marginals alone can say of the Dice."""
    scores = []
    for k in range(1, p.shape[-1]):
        mask = label == k
        size = float(p[..., k].sum() + mask.sum())
        scores.append(2 * float(p[..., k][mask].sum()) / size if size > 0 else 1.0)
    return float(np.mean(scores))


def as_one_hypothesis(p: np.ndarray) -> dict[str, np.ndarray]:
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


def keep(active: np.ndarray, body: np.ndarray, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """All slices, or `count` evenly spaced ones, 3/4 of them active and the rest others with a body.

    Returns their indices and how many slices each of them stands for.
    """
    if count is None:
        return np.arange(len(active)), np.ones(len(active), np.float32)
    chosen = np.flatnonzero(active)
    others = np.flatnonzero(~active & np.any(body, axis=tuple(range(1, body.ndim))))
    quota = min(len(chosen), max(1, count - len(others), (3 * count) // 4))
    kept, weight = [], []
    for group, size in ((chosen, quota), (others, min(len(others), count - quota))):
        if size > 0:
            kept.append(group[np.round(np.linspace(0, len(group) - 1, size)).astype(int)])
            weight.append(np.full(size, len(group) / size, np.float32))
    rows, weights = np.concatenate(kept), np.concatenate(weight)
    order = np.argsort(rows)
    return rows[order], weights[order]


def groups(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Groups of exactly `size` rows (the last filled up with copies) and how many of each are real."""
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        yield np.concatenate([group, np.repeat(group[-1:], size - len(group), axis=0)]), len(group)


def _crop(maps: dict[str, np.ndarray], volume: Volume) -> dict[str, np.ndarray]:
    """Takes the in-plane padding off maps [d h w ...], and off those with a leading axis of their own."""
    _, height, width = volume.body.shape
    leading = (*STACKED, "hypotheses")
    return {
        name: value[:, :, :height, :width] if name in leading else value[:, :height, :width]
        for name, value in maps.items()
    }
