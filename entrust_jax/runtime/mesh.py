"""The device mesh: one axis, `data`, over every device of every process, and the placements on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the single axis `data` over `devices` (of jax.devices(); default: all of all processes)."""
    devices = jax.devices() if devices is None else devices
    # Auto: make_mesh's default, Explicit, would want a sharding in the type of every intermediate value.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices, the others whole."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def round_to_devices(size: int, mesh: Mesh) -> int:
    """The smallest positive multiple of the mesh's device count that is at least `size`."""
    return max(1, -(-size // mesh.size)) * mesh.size


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the mesh, split along the leading axis.

    Args:
      batch: this process's share of the global batch; leading axes a multiple of its device count.

    Returns:
      Global arrays, leading axis = the sum over processes.

    Raises:
      ValueError: a leading axis that the devices cannot share equally.
    """
    sharding = batch_sharding(mesh)
    local = len(sharding.addressable_devices)
    for key, value in batch.items():
        if np.ndim(value) < 1 or len(value) % local:
            raise ValueError(
                f"batch[{key!r}] of shape {np.shape(value)} cannot be split over {local} devices: "
                "pad the leading axis (round_to_devices)"
            )
    return {key: jax.make_array_from_process_local_data(sharding, np.asarray(value)) for key, value in batch.items()}
