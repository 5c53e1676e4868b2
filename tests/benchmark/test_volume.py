"""The volume suite: its head is as large as a brain, and a planted seam cannot hide from it."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import made_up
from configs import phantom
from entrust_jax import api, model, networks
from entrust_jax.benchmark import volume
from entrust_jax.errors import UserError
from entrust_jax.runtime.mesh import data_mesh


def test_a_head_has_the_size_of_a_brain():
    head = volume.head((155, 240, 240), 1)
    sizes = [np.ptp(np.flatnonzero(head.body.any(axis=tuple({0, 1, 2} - {axis})))) + 1 for axis in range(3)]
    assert sizes == [139, 140, 176]  # an odd grid has its middle in a voxel
    small = volume.head((8, 20, 20), 2)
    assert small.image.shape == (2, 8, 20, 20) and not small.image[:, ~small.body].any()


def trained_with(patch, params=None, **sizes):
    """A working folder in memory, of the phantom's config with this patch."""
    config = phantom.get_config().copy_and_resolve_references().unlock()
    config.data.patch = patch
    config.model.update(sizes)
    if params is None:
        init = functools.partial(networks.init_params, config)
        params = made_up.parameters(init, jax.random.key(0)) if sizes else None
    return api.Trained(
        workdir=Path("w"), name="w", config=config, splits={}, spacing=(), network=model.build(config), params=params,
        mesh=data_mesh(jax.devices()[:1]), tau=0.5, rung="identity", calibration={},
    )  # fmt: skip


def head_of(shape):
    """A body that fills its scan, with a label."""
    label = np.zeros(shape, np.int32)
    label[:, 4:12, 6:20] = 1
    return dataclasses.replace(volume.head(shape, 2), body=np.ones(shape, bool), label=label)


def stay(labels):
    """What an `examine` says whose hypotheses [n d h w] are these wherever windows begin."""

    def examine(trained, case, probed):
        assert not probed
        more = [(n - m, 0) for n, m in zip(case.body.shape, labels.shape[1:], strict=True)]
        return {"hypotheses": np.pad(labels, [(0, 0), *more])}

    return examine


@pytest.fixture
def seams_of(monkeypatch):
    """seams_of(examine): what the suite says; windows of 8 x 16 x 16 voxels in a scan of 8 x 32 x 32."""
    trained = trained_with((8, 16, 16), {}, widths=(4, 8), strides=((1, 2, 2), (2, 2, 2)))

    def run(examine):
        monkeypatch.setattr(volume.api, "examine", examine)
        return volume.seams(trained, head_of((8, 32, 32)))

    return run


def test_a_planted_seam_is_found_and_noise_has_none(seams_of):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (8, 8, 32, 32)).astype(np.uint8)
    found = seams_of(stay(noise))
    assert found["windows"] == 9 and 0.95 < found["ratio"] < 1.05 and found["ratio_to_moved"] == 1
    # The label of head_of changes along no plane of the windows, and the hypotheses' ratio is not its business.
    assert found["ratio_of_the_label"] == 0
    smooth = np.zeros_like(noise)
    smooth[:, :, 16:] = 1  # where a window begins
    found = seams_of(stay(smooth))
    assert found["ratio"] is None and found["changes_across_seams"] > 0
    planted = noise.copy()
    planted[:, :, 16] = 1 - planted[:, :, 15]
    assert seams_of(stay(planted))["ratio"] > 1.1


def test_a_seam_goes_where_the_windows_go_and_a_border_stays(seams_of):
    def examine(trained, case, probed):
        found = np.random.default_rng(len(case.body)).integers(0, 2, (8, *case.body.shape)).astype(np.uint8)
        found[:, :, 16] = 1 - found[:, :, 15]  # before it windows begin, of the scan and of the one that is moved
        return {"hypotheses": found}

    assert seams_of(examine)["ratio_to_moved"] > 1.05
    blocks = np.random.default_rng(0).integers(0, 2, (64, 8, 8, 8)).astype(np.uint8).repeat(4, axis=2).repeat(4, axis=3)
    found = seams_of(stay(blocks))  # what changes before every coarsest voxel, 4 x 4 in a slice, is the network's
    assert found["ratio"] > 3 and found["ratio_to_moved"] == 1


def test_windows_of_two_voxels_of_the_coarsest_scale_can_not_be_moved(monkeypatch):
    """They begin and end before every one of them, wherever the first is."""
    noise = np.random.default_rng(0).integers(0, 2, (4, 8, 32, 32)).astype(np.uint8)
    monkeypatch.setattr(volume.api, "examine", stay(noise))
    trained = trained_with((4, 8, 8), {}, widths=(4, 8), strides=((1, 2, 2), (2, 2, 2)))
    assert volume.seams(trained, head_of((8, 32, 32)))["ratio_to_moved"] is None


def test_a_moved_scan_is_the_same_scan():
    head = volume.head((8, 20, 20), 2)
    other = volume.moved(head, (2, 4, 4))
    around, before = (volume.windows.frame(one, (8, 16, 16), (2, 4, 4)) for one in (other, head))
    assert around.low == before.low and all(a > b for a, b in zip(around.size, before.size, strict=True))
    np.testing.assert_array_equal(other.image[:, 2:, 4:, 4:], head.image)
    assert other.body.sum() == head.body.sum() + 1
    np.testing.assert_array_equal(other.body[2:, 4:, 4:], head.body)


def test_slices_that_lie_farther_apart_are_no_seam(monkeypatch):
    """Windows end along D alone, where labels change more: every plane of D alike."""
    noise = np.random.default_rng(0).integers(0, 2, (8, 32, 16, 16)).astype(np.uint8)
    noise[:] = noise[:, :, :1, :1]  # constant in each slice, drawn slice by slice
    monkeypatch.setattr(volume.api, "examine", stay(noise))
    found = volume.seams(trained_with((16, 16, 16)), head_of((32, 16, 16)))
    assert found["windows"] == 3 and 0.6 < found["ratio"] < 1.5


def test_windows_agree_with_the_whole_where_they_see_as_much():
    """One window that holds the body says the same to rounding, whatever the patch was; small ones do not."""
    sizes = {"widths": (4, 8), "d_c": 4, "d_u": 4, "strides": ((1, 2, 2), (2, 2, 2))}
    head = head_of((4, 16, 32))
    trained = trained_with((4, 16, 32), **sizes)
    same = list(volume.agreement(trained, trained.network, head))
    assert len(same) == trained.config.diffusion.steps and same[0]["log_snr"] == trained.config.diffusion.lambda_min
    assert max(row["difference"] for row in same) < 1e-5
    trained = trained_with((4, 16, 16), trained.params, **sizes)
    apart = list(volume.agreement(trained, trained.network, head))
    assert max(row["difference"] for row in apart) > 1e-4
    trained.config.data.window = (4, 16, 32)
    assert max(row["difference"] for row in volume.agreement(trained, trained.network, head)) < 1e-5
    assert all(row["away"] >= 0 and 0 <= row["close"] <= 1 for row in apart)


def test_other_windows_are_asked_for_by_size():
    trained = trained_with((4, 16, 16), widths=(4, 8), d_c=4, d_u=4, strides=((1, 2, 2), (2, 2, 2)))
    other = volume.with_windows(trained, ["4", "16", "32"])
    assert networks.extent(other.config)["window"] == (4, 16, 32) and networks.extent(trained.config)["window"][2] == 16
    assert volume.with_windows(trained, []) is trained
    for sizes in (["4", "16"], ["4", "16", "17"], ["4", "16", "x"], ["0", "16", "16"], ["4", "-16", "16"]):
        with pytest.raises(UserError, match=r"--window=.*multiples of 2 x 4 x 4"):
            volume.with_windows(trained, sizes)


@pytest.mark.parametrize("sizes", [[], ["4", "16", "16"]])
def test_slices_have_no_windows(sizes):
    with pytest.raises(UserError, match="holds a model of slices"):
        volume.with_windows(trained_with((16, 16)), sizes)
