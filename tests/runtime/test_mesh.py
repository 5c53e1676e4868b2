"""Placement on eight devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from entrust_jax.runtime import mesh as meshes


def test_a_batch_is_split_over_all_devices():
    mesh = meshes.data_mesh()
    assert mesh.size == 8 and mesh.axis_names == ("data",) and mesh.axis_types == (AxisType.Auto,)
    batch = {"image": np.arange(48, dtype=np.float32).reshape(16, 3), "valid": np.ones(16, bool)}
    placed = meshes.shard_batch(batch, mesh)
    for key, value in batch.items():
        np.testing.assert_array_equal(placed[key], value)
        assert len(placed[key].addressable_shards) == 8
        for i, shard in enumerate(placed[key].addressable_shards):
            np.testing.assert_array_equal(shard.data, value[2 * i : 2 * i + 2])
    total = jax.jit(lambda b: b["image"].sum(), out_shardings=meshes.replicated(mesh))(placed)
    assert total.is_fully_replicated and float(total) == batch["image"].sum()


def test_a_mesh_over_some_devices():
    mesh = meshes.data_mesh(jax.devices()[:2])
    placed = meshes.shard_batch({"case": np.arange(4, dtype=np.int32)}, mesh)
    assert placed["case"].sharding == meshes.batch_sharding(mesh)
    assert {shard.device for shard in placed["case"].addressable_shards} == set(jax.devices()[:2])


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(ValueError, match=r"batch\['image'\].*8 devices"):
        meshes.shard_batch({"image": np.zeros((9, 2), np.float32)}, meshes.data_mesh())
    with pytest.raises(ValueError, match="cannot be split"):
        meshes.shard_batch({"image": np.zeros((), np.float32)}, meshes.data_mesh())


@pytest.mark.parametrize(("size", "rounded"), [(0, 8), (1, 8), (8, 8), (9, 16)])
def test_round_to_devices(size, rounded):
    assert meshes.round_to_devices(size, meshes.data_mesh()) == rounded
