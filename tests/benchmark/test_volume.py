"""The volume suite: its head is as large as a brain, and a planted seam cannot hide from it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import phantom
from entrust_jax import api, model
from entrust_jax.benchmark import volume
from entrust_jax.runtime.mesh import data_mesh


def test_a_head_has_the_size_of_a_brain():
    head = volume.head((155, 240, 240), 1)
    sizes = [np.ptp(np.flatnonzero(head.body.any(axis=tuple({0, 1, 2} - {axis})))) + 1 for axis in range(3)]
    assert sizes == [139, 140, 176]  # an odd grid has its middle in a voxel
    small = volume.head((8, 20, 20), 2)
    assert small.image.shape == (2, 8, 20, 20) and not small.image[:, ~small.body].any()


@pytest.fixture
def seams_of(monkeypatch):
    """seams_of(hypotheses): what the suite says of them; windows of 8 x 16 x 16 voxels in a scan of 8 x 32 x 32."""
    config = phantom.get_config().copy_and_resolve_references().unlock()
    config.data.patch = (8, 16, 16)
    head = dataclasses.replace(volume.head((8, 32, 32), 2), body=np.ones((8, 32, 32), bool))
    trained = api.Trained(
        workdir=Path("w"), name="w", config=config, splits={}, spacing=(), network=model.build(config), params=None,
        mesh=data_mesh(jax.devices()[:1]), tau=0.5, rung="identity", calibration={}, meta={},
    )  # fmt: skip

    def run(hypotheses):
        monkeypatch.setattr(volume.api, "examine", lambda *_, **__: {"hypotheses": hypotheses})
        return volume.seams(trained, head)

    return run


def test_a_planted_seam_is_found_and_noise_has_none(seams_of):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (8, 8, 32, 32)).astype(np.uint8)
    found = seams_of(noise)
    assert found["windows"] == 9 and 0.95 < found["ratio"] < 1.05
    smooth = np.zeros_like(noise)
    smooth[:, :, 16:] = 1  # where a window begins
    assert seams_of(smooth)["ratio"] is None and seams_of(smooth)["flips_across_seams"] > 0
    planted = noise.copy()
    planted[:, :, 16] = 1 - planted[:, :, 15]
    assert seams_of(planted)["ratio"] > 1.1
