"""The volume suite: minutes and memory of one 3-D scan with all its hypotheses and probes, and what seams cost.

`measure` needs no training: weights are random, so every window is sampled, the dearest case. `seams` asks a trained
network whether windows leave a trace in its hypotheses, and `agreement` whether their joined estimates are those of the
network on the whole body at once.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from entrust_jax import api, footprint, inference, model, networks, windows
from entrust_jax.baselines import unet
from entrust_jax.data import resampling
from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.runtime import memory, mesh
from entrust_jax.segdiff import schedule
from entrust_jax.segdiff import volume as lattices
from entrust_jax.trustmap import prediction

GIGABYTE = 2**30
CLOSE = 1e-2  # of D, which lies in [-b, b]; where b is below .1, a tenth of b, .05 of the probability


def head(shape: tuple[int, int, int], modalities: int) -> Volume:
    """Noise in an ellipsoid as large as a brain: 140 x 140 x 176 mm of a grid of 1 mm, where that fits in."""
    square = np.zeros(shape)
    for axis, (n, radius) in enumerate(zip(shape, (70, 70, 88), strict=True)):
        at = (np.arange(n) - (n - 1) / 2) / min(radius, n / 2)
        square += np.square(at).reshape([-1 if i == axis else 1 for i in range(3)])
    body = square <= 1
    image = np.random.default_rng(0).normal(size=(modalities, *shape)).astype(np.float32) * body
    return Volume(
        name="head", patient="head", number=0, image=image, present=np.ones(modalities, bool), label=None, body=body,
        coordinates=coordinates(body), spacing=(1.0, 1.0, 1.0), reference=None,
    )  # fmt: skip


def measure(config: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Seconds and peak memory of predicting one scan of this shape with the config's network; run once a process.

    From the scan in memory to maps, reasons and volumes, without a calibrator. The second run has everything compiled.
    estimate: what `footprint.estimate` says before it.
    """
    network, devices = model.build(config), mesh.data_mesh()
    params = jax.jit(lambda: api.init_params(config, jax.random.key(0)), out_shardings=mesh.replicated(devices))()
    volume = head(shape, len(config.data.modalities))
    resting = memory.peak()
    estimate = footprint.estimate(
        params, volume, scan=volume, model=network, sampler=inference.sampler_of(config), mesh=devices,
        hypotheses=config.diffusion.hypotheses, **api.extent(config),
    )  # fmt: skip
    print(footprint.in_words(estimate), flush=True)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        found = prediction.finish(
            api.examine_with(config, network, params, devices, 0.5, volume), volume,
            scan=volume, chosen="identity", params={}, modalities=tuple(config.data.modalities),
            classes=tuple(config.data.classes), regions=dict(config.data.regions), volumetric=True, started=began,
        )  # fmt: skip
        seconds.append(found["seconds"])
        del found
    return {
        "config": config.name,
        "shape": list(shape),
        "body_voxels": int(volume.body.sum()),
        "modalities": len(config.data.modalities),
        "classes": len(config.data.classes),
        "widths": list(config.model.widths),
        "strides": [list(factors) for factors in network.strides],
        "compute": config.model.compute,
        "hypotheses": config.diffusion.hypotheses,
        "steps": config.diffusion.steps,
        "device": f"{devices.size} x {jax.devices()[0].device_kind}",
        "windows": estimate["windows"],
        "window": list(estimate["window"]),
        "seconds_with_compilation": seconds[0],
        "seconds": seconds[1],
        "resting_gb": resting / GIGABYTE,
        "estimated_gb": (resting + estimate["bytes"]) / GIGABYTE,
        "peak_gb": memory.peak() / GIGABYTE,
    }


def with_windows(trained: api.Trained, sizes: Sequence[str]) -> api.Trained:
    """The same model, seeing a scan through windows of these sizes along D, H, W; its own for none.

    Raises UserError for other sizes than multiples of the network's coarsest voxel, and for a model of slices.
    """
    if not networks.volumetric(trained.config):
        raise UserError(f"{trained.workdir}: holds a model of slices, which has no windows; name one of volumes")
    if not sizes:
        return trained
    unit = networks.coarsest(trained.config)
    whole = [one.isdecimal() and int(one) > 0 for one in sizes]
    if len(sizes) != 3 or not all(whole) or np.any(np.mod([int(one) for one in sizes], unit)):
        words = " x ".join(map(str, unit))
        raise UserError(f"--window={','.join(sizes)}: give multiples of {words}, the network's coarsest voxel")
    config = trained.config.copy_and_resolve_references()
    config.data.window = tuple(map(int, sizes))
    return dataclasses.replace(trained, config=config)


def trace_of_windows(trained: api.Trained, volume: Volume) -> dict[str, Any]:
    """What windows leave to be seen in one scan: `seams` and `agreement`, on the working grid.

    Raises UserError for a U-Net, which has no hypotheses, and as `agreement` does.
    """
    network = trained.network
    if isinstance(network, unet.UNet):
        raise UserError(f"{trained.workdir}: holds a U-Net; seams are those of EnTrust's hypotheses")
    volume = resampling.at_spacing(volume, trained.spacing)
    return {
        "case": volume.name,
        "window": list(networks.extent(trained.config)["window"]),
        **seams(trained, volume),
        "agreement": list(agreement(trained, network, volume)),
    }


def seams(trained: api.Trained, volume: Volume) -> dict[str, Any]:
    """Labels that change across seams, planes where some window begins or ends, beside those that change elsewhere.

    ratio: neighbours of different labels across these planes over as many as there would be at the rate of all other
    planes of the same axis, in the body, over all hypotheses (aim: at most 1.2). By axis, for slices lie farther apart
    than the voxels in them. The planes are those of all windows that touch the body, sampled or not. What the place of
    the planes alone does is in it, as in ratio_of_the_label, the same of the case's own label, which no window has
    seen; so is what the network does before every coarsest voxel, for there windows begin. ratio_to_moved has neither:
    labels that change across these planes over those that do when windows begin a coarsest voxel elsewhere (`moved`),
    and the other way round; planes of both lattices are left out. None where nothing changes in the denominator, or
    most of the planes in the body are of both lattices, as with windows of one or two coarsest voxels.
    """
    unit = networks.coarsest(trained.config)
    labels, ends, count = hypotheses(trained, volume)
    others, elsewhere, _ = hypotheses(trained, moved(volume, unit))
    elsewhere = [{plane - n for plane in planes} for planes, n in zip(elsewhere, unit, strict=True)]
    others = others[:, *(slice(n, None) for n in unit)]
    truth = labels[:0] if volume.label is None else volume.label[None]
    seen, again, own = (changes(one, volume.body) for one in (labels, others, truth))
    (across, expected), (own_across, own_expected) = (beside_others(one, ends) for one in (seen, own))
    here, there = ([one - two for one, two in zip(*two, strict=True)] for two in ((ends, elsewhere), (elsewhere, ends)))
    at_seams, without = (at_planes(a, here) + at_planes(b, there) for a, b in ((seen, again), (again, seen)))
    apart = 2 * in_body(seen, here) >= max(in_body(seen, ends), 1)
    return {
        "windows": count,
        "changes_across_seams": across,
        "expected": expected,
        "ratio": across / expected if expected else None,
        "ratio_of_the_label": own_across / own_expected if own_expected else None,
        "ratio_to_moved": at_seams / without if apart and without else None,
    }


def hypotheses(trained: api.Trained, volume: Volume) -> tuple[np.ndarray, list[set[int]], int]:
    """Labels [n d h w], the voxels along each axis before which some window begins or ends, and how many there are."""
    around = windows.frame(volume, **networks.extent(trained.config))
    at = lattices.origins(around.scan["body"], around.window, around.unit)
    ends = [{low + plane for plane in planes} for low, planes in zip(around.low, borders(around, at), strict=True)]
    return api.examine(trained, volume, probed=False)["hypotheses"], ends, len(at)


def moved(volume: Volume, by: Sequence[int]) -> Volume:
    """The same scan with `by` more voxels before it, whose windows begin as many earlier: one of air counts as body."""
    more = [(n, 0) for n in by]
    body = np.pad(volume.body, more)
    body[tuple(int(np.flatnonzero(volume.body.any(axis=tuple({0, 1, 2} - {axis})))[0]) for axis in range(3))] = True
    return dataclasses.replace(
        volume,
        image=np.pad(volume.image, [(0, 0), *more]),
        body=body,
        coordinates=np.pad(volume.coordinates, [*more, (0, 0)]),
        label=None if volume.label is None else np.pad(volume.label, more),
    )


def changes(labels: np.ndarray, body: np.ndarray) -> list[np.ndarray]:
    """Along each axis for every voxel but the first: neighbours in the body with different labels [n d h w] across the

    plane before it, in one of n on average, and all neighbours there, [size - 1, 2].
    """
    found = []
    for axis in range(3):
        inside, *each = (np.moveaxis(x, axis, 0) for x in (body, *labels))
        both = inside[1:] & inside[:-1]
        changed = sum(((one[1:] != one[:-1]) & both).sum(axis=(1, 2)) for one in each) / max(len(each), 1)
        found.append(np.stack(np.broadcast_arrays(changed, both.sum(axis=(1, 2))), axis=-1).astype(float))
    return found


def rows_at(counted: Sequence[np.ndarray], planes: Sequence[set[int]]) -> np.ndarray:
    """The rows of `changes` at these planes of each axis, as far as they lie in the scan, [planes 2]."""
    return np.concatenate(
        [rows[sorted(at - 1 for at in some if 0 < at <= len(rows))] for rows, some in zip(counted, planes, strict=True)]
    )


def at_planes(counted: Sequence[np.ndarray], planes: Sequence[set[int]]) -> float:
    """Neighbours with different labels across these planes."""
    return float(rows_at(counted, planes)[:, 0].sum())


def in_body(counted: Sequence[np.ndarray], planes: Sequence[set[int]]) -> int:
    """How many of these planes lie between two voxels of the body."""
    return int(np.count_nonzero(rows_at(counted, planes)[:, 1]))


def beside_others(counted: Sequence[np.ndarray], planes: Sequence[set[int]]) -> tuple[float, float]:
    """Neighbours with different labels across these planes, and how many there would be at the other planes' rate."""
    expected = 0.0
    for rows, some in zip(counted, planes, strict=True):
        here = np.isin(np.arange(1, len(rows) + 1), list(some))
        (_, pairs), (changed, others) = rows[here].sum(axis=0), rows[~here].sum(axis=0)
        expected += pairs * changed / max(others, 1)
    return at_planes(counted, planes), float(expected)


def borders(around: windows.Frame, at: np.ndarray) -> list[set[int]]:
    """Along each axis of the lattice, the voxels before which some window begins or ends."""
    return [{int(o[axis]) + end for o in at for end in (0, around.window[axis])} for axis in range(3)]


def agreement(trained: api.Trained, network: model.EnTrust, volume: Volume) -> Iterator[dict[str, Any]]:
    """How far D, joined over windows, lies from D of the network on the body's box at once, at every noise level of the

    sampler: x_t is made from the case's own label, the same for both. difference: mean over the body of the largest
    |difference| over the classes; away: the same over voxels at least an eighth of a window from every plane where some
    window begins or ends; close: share of these where it is at most CLOSE, or b / 10 if that is less (ours). Raises
    UserError for a case without a label.
    """
    config = trained.config
    static: Any = {"model": network, "sampler": inference.sampler_of(config), "mesh": trained.mesh}
    key, label = jax.random.key(config.seed), volume.label
    if label is None:
        raise UserError(f"{volume.name}: has no label, from which noisy masks could be made")
    parts = windows.frame(volume, **networks.extent(config))
    one = tuple(max(w, -(-n // u) * u) for w, n, u in zip(parts.window, parts.size, parts.unit, strict=True))
    whole = windows.frame(volume, one, parts.unit)
    inside = tuple(slice(0, n) for n in parts.size)
    near = np.zeros(parts.size, bool)
    at = lattices.origins(parts.scan["body"], parts.window, parts.unit)
    for axis, planes in enumerate(borders(parts, at)):
        for plane in planes:
            reach = parts.window[axis] // 8
            near[(slice(None),) * axis + (slice(max(plane - reach, 0), max(plane + reach, 0)),)] = True

    clean = np.zeros([max(sizes) for sizes in zip(parts.scan["body"].shape, one, strict=True)], np.int32)
    box = tuple(slice(low, low + n) for low, n in zip(parts.low, parts.size, strict=True))
    clean[inside] = label[box]
    x0 = schedule.scale_onehot(jnp.asarray(clean)[None], network.classes, config.diffusion.b)
    noise = jax.random.normal(key, x0.shape)

    def estimator(around: windows.Frame):
        """x_t, log SNR -> D in the box."""
        origins, conditions, maps = windows.first_look(trained.params, around, key, **static)
        stacked = jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *conditions)
        size = tuple(slice(0, n) for n in around.scan["body"].shape)

        @jax.jit
        def p(params, x_t, log_snr, stacked, first):
            denoise = windows.denoiser(network, params)
            joined = lattices.joined(denoise, first, jnp.asarray(origins), jnp.asarray(len(origins)), around.window)
            return jnp.exp(joined(x_t, log_snr, stacked)[0][inside])

        first = jnp.asarray(maps["one_step"])[None]
        b = config.diffusion.b
        return lambda x_t, log_snr: b * (2 * np.asarray(p(trained.params, x_t[:, *size], log_snr, stacked, first)) - 1)

    through_windows, at_once = estimator(parts), estimator(whole)
    body, limit = volume.body[box], min(CLOSE, config.diffusion.b / 10)
    for level in schedule.grid(config.diffusion.steps, config.diffusion.lambda_min, config.diffusion.lambda_max)[:-1]:
        log_snr = jnp.full((1,), level, jnp.float32)
        x_t = schedule.diffuse(x0, log_snr, noise)
        difference = np.abs(through_windows(x_t, log_snr) - at_once(x_t, log_snr)).max(-1)
        away = difference[body & ~near]
        yield {
            "log_snr": float(level),
            "difference": float(difference[body].mean()),
            "away": float(away.mean()) if away.size else None,
            "close": float(np.mean(away <= limit)) if away.size else None,
        }
