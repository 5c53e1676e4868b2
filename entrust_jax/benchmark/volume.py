"""The volume suite: minutes and memory of one 3-D scan with all its hypotheses and probes, and what seams cost.

`measure` needs no training: weights are random, so every window is sampled, the dearest case, and neither time nor
memory depends on their values. `seams` asks a trained network whether windows leave a trace.
"""

import time
from typing import Any

import jax
import numpy as np

from entrust_jax import api, inference, model, windows
from entrust_jax.baselines import unet
from entrust_jax.data import resampling
from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.runtime import memory, mesh
from entrust_jax.segdiff import volume as lattices

GIGABYTE = 2**30


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
    estimate: what `windows.estimate` says before it.
    """
    network, devices = model.build(config), mesh.data_mesh()
    params = jax.jit(lambda: api.init_params(config, jax.random.key(0)), out_shardings=mesh.replicated(devices))()
    volume = head(shape, len(config.data.modalities))
    resting = memory.peak()
    estimate = windows.estimate(
        params, volume, model=network, sampler=inference.sampler_of(config), mesh=devices,
        hypotheses=config.diffusion.hypotheses, **api.extent(config),
    )  # fmt: skip
    print(windows.in_words(estimate), flush=True)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        found = inference.finish(
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
        "window": list(config.data.patch),
        "seconds_with_compilation": seconds[0],
        "seconds": seconds[1],
        "resting_gb": resting / GIGABYTE,
        "estimated_gb": (resting + estimate["bytes"]) / GIGABYTE,
        "peak_gb": memory.peak() / GIGABYTE,
    }


def seams(trained: api.Trained, volume: Volume) -> dict[str, Any]:
    """How windows show in one scan: labels that change across seams beside those that change elsewhere.

    ratio: share of neighbours of different labels across the planes where some window begins or ends over that across
    all other planes, in the body, over all hypotheses (aim: at most 1.2).
    """
    if isinstance(trained.network, unet.UNet):
        raise UserError(f"{trained.workdir}: holds a U-Net; seams are those of EnTrust's hypotheses")
    volume = resampling.at_spacing(volume, trained.spacing)
    around = windows.frame(volume, **api.extent(trained.config))
    at = lattices.origins(around.scan["body"], around.window, around.unit)
    raw = api.examine(trained, volume, probed=False)
    labels = raw["hypotheses"]
    across, elsewhere = np.zeros(2), np.zeros(2)
    for axis in range(3):
        ends = {int(o[axis]) + around.low[axis] for o in at} | {
            int(o[axis]) + around.window[axis] + around.low[axis] for o in at
        }
        pairs = [np.moveaxis(x, axis, 0) for x in (volume.body, *labels)]
        body = pairs[0][1:] & pairs[0][:-1]
        for plane in range(len(body)):
            changed = sum(int((one[plane] != one[plane + 1])[body[plane]].sum()) for one in pairs[1:])
            total = across if plane + 1 in ends else elsewhere
            total += (changed, int(body[plane].sum()) * len(labels))
    rates = across[0] / max(across[1], 1), elsewhere[0] / max(elsewhere[1], 1)
    return {
        "case": volume.name,
        "windows": len(at),
        "flips_across_seams": rates[0],
        "flips_elsewhere": rates[1],
        "ratio": rates[0] / rates[1] if rates[1] else None,
    }
