"""About how much memory a 3-D scan takes, said before it is predicted."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from entrust_jax import inference, windows
from entrust_jax.data.preprocess import Volume
from entrust_jax.model import EnTrust
from entrust_jax.segdiff import volume as lattices
from entrust_jax.segdiff.sampler import Sampler
from entrust_jax.windows import Size

DISTANCES = 76  # bytes a voxel while distances to the border are measured: indices and offsets along three axes
# What the process holds for a byte that is counted: a group's output stays while the next one is made, and what is not
# large leaves holes in the heap. Measured once each on CPU: 1.25 with windows of 96, 1.29 with windows of 64
# (docs/evidence). An estimate that is too low costs a user his run.
HOLES = 1.35


def estimate(
    params: Any,
    volume: Volume,
    *,
    model: EnTrust,
    sampler: Sampler,
    mesh: Mesh,
    hypotheses: int,
    window: Size,
    unit: Size,
    scan: Volume,
) -> dict[str, Any]:
    """About how much memory predicting a scan takes, beside the parameters and the scan, in bytes (ours).

    The most that is held at once in one of six stages: the looks at windows, the hypotheses, the probes, the maps'
    way back into the scan, what `prediction.finish` makes of them on the grid that the network sees, and their way onto
    the scan's own grid where that is another; HOLES of it in all. Of the programs, what the compiler reserves on all
    devices. All windows that touch the body are taken to be sampled. volume: the case on the grid that the network
    sees; scan: on its own.
    """
    around, static = windows.frame(volume, window, unit), {"model": model, "sampler": sampler, "mesh": mesh}
    at, key = lattices.origins(around.scan["body"], window, unit), jax.random.key(0)
    count = len(at)
    call, room = windows.program_for(params, around, count, key, **static)
    group = next(inference.groups(at, mesh.size))[0]
    batch, label = windows.batch_of(around, group), np.zeros((len(group), *window), np.int32)
    device = {
        "looks": windows.look.lower(params, batch, key, **static).compile(),
        "hypotheses": call,
        "probes": windows.probe.lower(params, batch, label, key, **static).compile(),
    }
    reserved = {name: mesh.size * _reserved(one) for name, one in device.items()}
    found = jax.eval_shape(lambda *a: inference.look_at(*a, model=model, sampler=sampler)[1], params, batch, key)
    condition = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found.projections)) // len(group)

    m, k, n = model.modalities, model.classes, hypotheses
    lattice, seen, own = around.scan["body"].size, volume.body.size, scan.body.size
    looked = 4 * (k + 2 * m * k + m * (m - 1) // 2 + 2)  # bytes a voxel of the maps of `look_at`,
    drawn = 4 * (k + 5) + n + 1  # of `sample` and the label,
    asked = 4 * (2 * m + 2) + m  # of the probes,
    joining = 4 * (2 * m + 2 + m * k)  # and of these while they are joined
    held = 4 * (m + 3) * lattice  # the image and coordinates
    maps = looked + drawn + asked
    stages = {
        "looks": held + reserved["looks"] + looked * (lattice + batch["body"].size) + condition * count,
        "hypotheses": held + reserved["hypotheses"] + (looked + n) * lattice + condition * (count + room),
        "probes": held + reserved["probes"] + (maps + joining) * lattice,
        "way back": held + (n + 1) * lattice + (maps + DISTANCES) * seen,
        "finish": (maps + 12 * k) * seen,
        "own grid": 0 if scan is volume else (maps + 12 * k) * seen + (maps + 12 * k + DISTANCES) * own,
    }
    return {
        "bytes": int(HOLES * max(stages.values())),
        "stages": stages,
        "windows": count,
        "window": tuple(window),
        "hypotheses": hypotheses,
    }


def _reserved(program: jax.stages.Compiled) -> int:
    """Bytes on one device while a program runs."""
    found: Any = program.memory_analysis()
    reserved = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return reserved - found.alias_size_in_bytes


def in_words(found: dict[str, Any]) -> str:
    """The estimate of `estimate` for people."""
    size = " x ".join(map(str, found["window"]))
    return (
        f"{found['windows']} windows of {size} voxels, {found['hypotheses']} hypotheses: about "
        f"{found['bytes'] / 1e9:.1f} GB of memory more than now"
    )
