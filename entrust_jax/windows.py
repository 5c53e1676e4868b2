"""From a 3-D scan to its trust maps through windows: what `inference.examine` is for slices.

The box of the body is cut out and covered by overlapping windows of one static size. Each is encoded once; those in
which the one-step prediction sees any foreground are sampled, all of them together (`segdiff.volume`), one hypothesis a
device at a time. Of a hypothesis only its labels (one byte a voxel) and its share in running sums are kept, so the peak
of memory depends on window and scan and hardly on how many there are.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from entrust_jax import inference
from entrust_jax.baselines.unet import UNet
from entrust_jax.data.preprocess import Volume
from entrust_jax.inference import ACTIVE, DRAWN, groups
from entrust_jax.layers import apply
from entrust_jax.model import Condition, EnTrust
from entrust_jax.runtime import memory
from entrust_jax.runtime.mesh import AXIS, batch_sharding, replicated
from entrust_jax.segdiff import sampler as segdiff_sampler
from entrust_jax.segdiff import volume as lattices
from entrust_jax.segdiff.sampler import Denoise, Sampler
from entrust_jax.trustmap import case, prediction, statistics
from entrust_jax.trustmap.prediction import STACKED, Raw

Size = tuple[int, ...]
_DATA, _WHOLE = PartitionSpec(AXIS), PartitionSpec()
AHEAD = (*STACKED, "members")  # maps with an axis before the voxels


class Frame(NamedTuple):
    """The box of a scan's body on a lattice of windows. low, size: the box in the scan; the lattice goes on beyond it,

    without a body. window, unit: of its windows, and the voxels of a voxel of the network's coarsest scale.
    """

    low: Size
    size: Size
    window: Size
    unit: Size
    scan: dict[str, np.ndarray]  # image [m *s], body [*s], coordinates [*s 3], present [m], case []


def frame(volume: Volume, window: Sequence[int], unit: Sequence[int]) -> Frame:
    """The box of a case's body, padded to whole windows."""
    hits = [np.flatnonzero(volume.body.any(axis=tuple(set(range(3)) - {axis}))) for axis in range(3)]
    low = tuple(int(hit[0]) for hit in hits)
    size = tuple(int(hit[-1]) + 1 - first for hit, first in zip(hits, low, strict=True))
    lattice = lattices.lattice_size(size, window, unit)
    box = tuple(slice(first, first + n) for first, n in zip(low, size, strict=True))
    more = [(0, whole - n) for whole, n in zip(lattice, size, strict=True)]
    scan = {
        "image": np.pad(volume.image[:, *box], [(0, 0), *more]),
        "body": np.pad(volume.body[box], more),
        "coordinates": np.pad(volume.coordinates[box], [*more, (0, 0)]),
        "present": np.asarray(volume.present),
        "case": np.asarray(volume.number, np.int32),
    }
    return Frame(low, size, tuple(window), tuple(unit), scan)


def place(values: np.ndarray, around: Frame, shape: Size, *, axis: int = 0, fill: Any = 0) -> np.ndarray:
    """A map on the lattice, back in the scan; `fill` (of the last axes' shape) where the body's box does not reach."""
    own = (slice(None),) * axis
    inside = values[own + tuple(slice(0, n) for n in around.size)]
    whole = np.empty((*values.shape[:axis], *shape, *values.shape[axis + 3 :]), values.dtype)
    whole[...] = fill
    whole[own + tuple(slice(a, a + n) for a, n in zip(around.low, around.size, strict=True))] = inside
    return whole


def cut(around: Frame, at: np.ndarray, values: np.ndarray, axis: int = 0) -> np.ndarray:
    """The windows at these first voxels of an array on the lattice, stacked before it."""
    own = (slice(None),) * axis
    return np.stack([values[own + _box(origin, around.window)] for origin in at])


def _box(origin: np.ndarray, window: Size) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(a) + n) for a, n in zip(origin, window, strict=True))


def batch_of(around: Frame, at: np.ndarray) -> dict[str, np.ndarray]:
    """The batch of the windows at these first voxels."""
    scan, count = around.scan, len(at)
    return {
        "image": cut(around, at, scan["image"], axis=1),
        "present": np.repeat(scan["present"][None], count, axis=0),
        "body": cut(around, at, scan["body"]),
        "coordinates": cut(around, at, scan["coordinates"]),
        "case": np.full(count, scan["case"]),
    }


def pieces(volume: Volume, *, mesh: Mesh, window: Size, unit: Size) -> Iterator[dict[str, np.ndarray]]:
    """The windows of a case in groups; copies in the last one are not valid."""
    around = frame(volume, window, unit)
    for group, real in groups(lattices.origins(around.scan["body"], window, unit), mesh.size):
        yield batch_of(around, group) | {"valid": np.arange(len(group)) < real}


def join(around: Frame, parts: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]]) -> tuple[dict, np.ndarray]:
    """Gaussian-weighted means over the windows of maps (those in AHEAD with an axis before the voxels), and where

    some window lies. parts: first voxel of a window and its maps, one by one.
    """
    lattice = around.scan["body"].shape
    weight = lattices.gaussian(around.window)
    seen, total = np.zeros(lattice, np.float32), {}
    for origin, maps in parts:
        box = _box(origin, around.window)
        seen[box] += weight
        for name, value in maps.items():
            first = int(name in AHEAD)
            if name not in total:
                rest = value.shape[first + 3 :]
                total[name] = np.zeros((*value.shape[:first], *lattice, *rest), np.float32)
            total[name][(slice(None),) * first + box] += value * weight.reshape(
                *weight.shape, *(1,) * (value.ndim - first - 3)
            )
    least = np.maximum(seen, lattices.LEAST_WEIGHT)
    for name, value in total.items():
        value /= least.reshape(*lattice, *(1,) * (value.ndim - int(name in AHEAD) - 3))
    return total, seen > 0


@functools.partial(jax.jit, static_argnames=("model", "sampler", "mesh"))
def look(params: Any, batch: dict[str, Array], key: Array, *, model: EnTrust, sampler: Sampler, mesh: Mesh):
    """Encodes windows and predicts them in one step: (what the denoiser needs of them, maps by name)."""

    def local(params, batch, key):
        _, condition, maps = inference.look_at(params, batch, key, model=model, sampler=sampler)
        return condition.projections, maps

    split = jax.shard_map(local, mesh=mesh, in_specs=(_WHOLE, _DATA, _WHOLE), out_specs=_DATA, check_vma=False)
    return split(params, batch, key)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "mesh"))
def probe(params: Any, batch: dict[str, Array], label: Array, key: Array, *, model, sampler, mesh):
    """The probes of windows, encoded again: their evidence, all modalities of it, is too large to be kept."""

    def local(params, batch, label, key):
        # Of the look only the evidence is used: XLA leaves its one-step prediction out.
        evidence, _, _ = inference.look_at(params, batch, key, model=model, sampler=sampler)
        return inference.probe_at(params, evidence, batch, label, key, model=model, sampler=sampler)

    split = jax.shard_map(local, mesh=mesh, in_specs=(_WHOLE, *(_DATA,) * 2, _WHOLE), out_specs=_DATA, check_vma=False)
    return split(params, batch, label, key)


@functools.lru_cache(maxsize=4)  # a program holds memory; scans of one set come to few lattices
def program(
    model: Any, sampler: Sampler, mesh: Mesh, window: Size, lattice: Size, windows: int, shapes: Any
) -> jax.stages.Compiled:
    """`draw`, compiled for a lattice of this size with room for so many windows. shapes: of parameters and key."""
    whole, split = replicated(mesh), batch_sharding(mesh)
    params, key = jax.tree.unflatten(shapes[0], shapes[1])

    def of(shape: Size, dtype: Any = jnp.float32, sharding: NamedSharding = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    m, k, n = model.modalities, model.classes, mesh.size
    batch = {
        "image": of((windows, m, *window)),
        "present": of((windows, m), jnp.bool_),
        "body": of((windows, *window), jnp.bool_),
        "coordinates": of((windows, *window, 3)),
        "case": of((windows,), jnp.int32),
    }
    found = jax.eval_shape(
        lambda *a: inference.look_at(*a, model=model, sampler=sampler)[1].projections, params, batch, key
    )
    conditions = jax.tree.map(lambda x: of(x.shape, x.dtype), found)
    sums = {"p": (n, *lattice, k), "entropy": (n, *lattice), "votes": (n, *lattice, k)}
    local = functools.partial(draw, model=model, sampler=sampler, window=window)
    specs = (*(_WHOLE,) * 7, _DATA, _DATA, _WHOLE, _WHOLE)
    over = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=_DATA, check_vma=False)
    return (
        jax.jit(over, donate_argnums=7)
        .lower(
            jax.tree.map(lambda x: of(x.shape, x.dtype), params), conditions, of((1, *lattice, k)), of((1, *lattice)),
            of((windows, len(window)), jnp.int32), of((), jnp.int32), of((1,), jnp.int32),
            {name: of(shape, jnp.float32, split) for name, shape in sums.items()}, of((n,), jnp.int32, split),
            of((), jnp.int32), of(key.shape, key.dtype),
        )
        .compile()
    )  # fmt: skip


def denoiser(model: EnTrust, params: Any) -> Denoise:
    """The denoiser of windows, whose condition is what `look` returns of them."""

    def denoise(x_t: Array, log_snr: Array, projections: Any) -> Array:
        condition = Condition(fused=None, projections=projections)  # type: ignore[arg-type]
        logits = apply(model, params, x_t, log_snr, condition, method="denoise")
        return inference.in_body(logits, projections.body > 0)

    return denoise


def draw(
    params: Any,
    conditions: Any,
    first: Array,
    conflict: Array,
    at: Array,
    count: Array,
    case: Array,
    sums: dict[str, Array],
    number: Array,
    wanted: Array,
    key: Array,
    *,
    model: EnTrust,
    sampler: Sampler,
    window: Size,
) -> tuple[dict[str, Array], Array]:
    """One more hypothesis of a scan, on one device: (running sums with it, its labels u8 [1 *s]).

    conditions: of `count` windows whose first voxels are `at`; the rest fill up. first, conflict: one-step
    probabilities [1 *s k] and kappa [1 *s] of the scan. number [1]: the hypothesis' number; those from `wanted` on are
    drawn to no use.
    """

    denoise = lattices.joined(denoiser(model, params), first, at, count, window)
    p = segdiff_sampler.hypothesis(
        denoise, conditions, conflict, case, key, number[0], sampler=sampler, classes=model.classes
    )
    use = (number[0] < wanted).astype(jnp.float32)
    winner = jnp.argmax(p, axis=-1)
    more = {"p": p, "entropy": statistics.entropy(p), "votes": jax.nn.one_hot(winner, model.classes)}
    return jax.tree.map(lambda total, one: total + use * one, sums, more), winner.astype(jnp.uint8)


def program_for(params: Any, around: Frame, windows: int, key: Array, *, model: EnTrust, sampler: Sampler, mesh: Mesh):
    """`program` for so many windows of a scan, and the room that it has for them: few programs, whatever the number."""
    room = 1 << max(windows - 1, 0).bit_length()
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, key)))
    lattice = around.scan["body"].shape
    network: Any = model  # flax makes it hashable, which its type does not say
    return program(network, sampler, mesh, around.window, lattice, room, (tree, tuple(leaves))), room


def first_look(
    params: Any, around: Frame, key: Array, *, model: EnTrust, sampler: Sampler, mesh: Mesh
) -> tuple[np.ndarray, list[Any], dict[str, np.ndarray]]:
    """(first voxels of the windows that touch the body, what the denoiser needs of each, one-step maps of the scan)."""
    at = lattices.origins(around.scan["body"], around.window, around.unit)
    conditions: list[Any] = []

    def parts():
        for group, real in groups(at, mesh.size):
            projections, maps = look(params, batch_of(around, group), key, model=model, sampler=sampler, mesh=mesh)
            projections, maps = jax.tree.map(np.asarray, (projections, maps))
            for i, origin in enumerate(group[:real]):
                conditions.append(jax.tree.map(lambda x, i=i: x[i].copy(), projections))
                yield origin, {name: value[i] for name, value in maps.items()}

    maps, _ = join(around, parts())
    # Windows reach beyond the box, and between them there may be air: background, as in every window.
    air = maps["one_step"].sum(axis=-1) == 0
    for name in ("one_step", "unimodal"):
        maps[name][..., air, 0] = 1
    return at, conditions, maps


def one_step(params: Any, volume: Volume, key: Array, *, window: Size, unit: Size, **static: Any) -> np.ndarray:
    """p_1 of a scan, [d h w k]."""
    around = frame(volume, window, unit)
    _, _, maps = first_look(params, around, key, **static)
    return place(maps["one_step"], around, volume.body.shape, fill=np.eye(maps["one_step"].shape[-1])[0])


def active_windows(one_step: np.ndarray, around: Frame, at: np.ndarray) -> np.ndarray:
    """Bool [windows]: those in which the one-step foreground probability exceeds ACTIVE somewhere in the body."""
    foreground = ((1 - one_step[..., 0]) > ACTIVE) & around.scan["body"]
    return np.array([foreground[_box(origin, around.window)].any() for origin in at], bool)


def sample(
    params: Any,
    around: Frame,
    at: np.ndarray,
    conditions: list[Any],
    maps: dict[str, np.ndarray],
    key: Array,
    *,
    model: EnTrust,
    sampler: Sampler,
    mesh: Mesh,
    hypotheses: int,
    windows: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """N hypotheses of the scan in these windows, elsewhere the one-step prediction: (their statistics, labels u8

    [n *s]). windows: how many the scan has; there is room for all of them, so that what `footprint.estimate` compiled
    is what runs, and fewer programs serve more scans.
    """
    lattice = around.scan["body"].shape
    if not len(at):
        labels = np.argmax(maps["one_step"], axis=-1).astype(np.uint8)
        return inference.as_one_hypothesis(maps["one_step"]), np.repeat(labels[None], hypotheses, axis=0)
    call, room = program_for(params, around, windows, key, model=model, sampler=sampler, mesh=mesh)
    whole, split = replicated(mesh), batch_sharding(mesh)

    def filled(rows: Sequence[Any] | np.ndarray) -> Array:
        return jax.device_put(np.stack([*rows, *[rows[-1]] * (room - len(rows))]), whole)

    k, n = model.classes, mesh.size
    fixed = (
        params,
        jax.tree.map(lambda *rows: filled(rows), *conditions),
        *jax.device_put((maps["one_step"][None], maps["conflict"][None]), whole),
        filled(at),
        *jax.device_put((np.int32(len(at)), np.asarray(around.scan["case"])[None]), whole),
    )
    sums = {
        "p": jnp.zeros((n, *lattice, k)), "entropy": jnp.zeros((n, *lattice)), "votes": jnp.zeros((n, *lattice, k)),
    }  # fmt: skip
    sums = jax.device_put(sums, split)
    labels = np.empty((hypotheses, *lattice), np.uint8)
    for start in range(0, hypotheses, n):
        numbers = jax.device_put(np.arange(start, start + n, dtype=np.int32), split)
        sums, drawn = call(*fixed, sums, numbers, jax.device_put(np.int32(hypotheses), whole), key)
        labels[start : start + n] = np.asarray(drawn)[: hypotheses - start]
    totals = {name: np.asarray(value).sum(axis=0) for name, value in sums.items()}
    found = statistics.of_sums(jax.tree.map(jnp.asarray, totals), hypotheses, jnp.asarray(maps["one_step"]))
    return {name: np.asarray(found[name]) for name in DRAWN}, labels


def examine(
    params: Any,
    volume: Volume,
    key: Array,
    *,
    model: EnTrust,
    sampler: Sampler,
    mesh: Mesh,
    hypotheses: int,
    window: Size,
    unit: Size,
    slices: int | None = None,
    probed: bool = True,
) -> Raw:
    """`inference.examine` for a network on D H W: the same maps of the same scan, and its `slices` for calibration.

    window: what the network sees at once. unit: voxels along each axis of one voxel of the network's coarsest scale.
    """
    static = {"model": model, "sampler": sampler, "mesh": mesh}
    memory.give_back()  # of the scan before
    around = frame(volume, window, unit)
    at, conditions, maps = first_look(params, around, key, **static)
    active = active_windows(maps["one_step"], around, at)
    chosen, needed = at[active], [one for one, here in zip(conditions, active, strict=True) if here]
    del conditions
    memory.give_back()
    drawn, labels = sample(
        params, around, chosen, needed, maps, key, hypotheses=hypotheses, windows=len(at), **static
    )  # fmt: skip
    del needed
    memory.give_back()
    maps |= drawn
    del drawn
    label, decision = case.dice_bayes(maps["mean"], labels)

    unasked = {
        name: np.moveaxis(value, 1, 0) if name in AHEAD else value
        for name, value in inference.unprobed(label, model.modalities).items()
    }
    if probed and len(chosen):
        whole = label.astype(np.int32)

        def asked() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
            for group, real in groups(chosen, mesh.size):
                batch, delivered = batch_of(around, group), cut(around, group, whole)
                found = jax.tree.map(np.asarray, probe(params, batch, delivered, key, **static))
                for i, origin in enumerate(group[:real]):
                    yield origin, {name: value[i] for name, value in found.items()}

        found, seen = join(around, asked())
        found["counterfactual"] = np.argmax(found["counterfactual"], axis=-1).astype(np.uint8)
        for name, value in unasked.items():  # what no window asked about stays as it is
            value[...] = np.where(seen, found[name], value)
        del found, whole
    maps |= unasked
    del unasked
    memory.give_back()
    shape, background = volume.body.shape, np.eye(model.classes, dtype=np.float32)[0]
    raw: Raw = {}
    for name in list(maps):  # one by one, so that no map but the labels is held twice
        value = maps.pop(name)
        raw[name] = place(value, around, shape, axis=int(name in AHEAD), fill=_fill(name, value, background))
    raw |= {"hypotheses": place(labels, around, shape, axis=1), "label": place(label, around, shape)}
    return thinned(raw, volume, slices) | {
        "predicted_dice": decision["predicted_dice"],
        "action": decision["action"],
    }


def _fill(name: str, value: np.ndarray, background: np.ndarray) -> Any:
    """What a map says where nothing was looked at: certain background."""
    return background if name in ("one_step", "mean", "unimodal") else np.zeros((), value.dtype)


def thinned(raw: Raw, volume: Volume, slices: int | None) -> Raw:
    """Of the maps of a whole scan those slices that calibration wants (`inference.keep`), or all."""
    active = inference.active_slices(raw["one_step"], volume.body)
    kept, weight = inference.keep(active, volume.body, slices)
    raw = raw | {"border": prediction.border(raw["label"], volume.spacing, True)}
    if slices is not None:
        raw = {name: value.take(kept, axis=int(name in (*AHEAD, "hypotheses"))) for name, value in raw.items()}
    return raw | {"sampled": active[kept], "kept": kept, "slice_weight": weight}


def examine_unet(
    params: Any,
    volume: Volume,
    key: Array,
    *,
    model: UNet,
    mesh: Mesh,
    window: Size,
    unit: Size,
    tau: float,
    slices: int | None = None,
) -> Raw:
    """As `examine`, for a U-Net or a deep ensemble of them on D H W."""
    around = frame(volume, window, unit)
    at = lattices.origins(around.scan["body"], around.window, around.unit)

    def parts():
        for group, real in groups(at, mesh.size):
            found = np.asarray(inference.ensemble(params, batch_of(around, group), key, model=model, mesh=mesh))
            for i, origin in enumerate(group[:real]):
                yield origin, {"members": found[i]}

    found, seen = join(around, parts())
    members = found["members"]
    members[:, ~seen, 0] = 1
    background = np.eye(members.shape[-1], dtype=np.float32)[0]
    members = place(members, around, volume.body.shape, axis=1, fill=background)
    raw = inference.of_members(np.moveaxis(members, 0, 1), tau)
    predicted = inference.expected_dice(raw["mean"], raw["label"])
    return thinned(raw, volume, slices) | {"predicted_dice": predicted, "action": float(tau)}
