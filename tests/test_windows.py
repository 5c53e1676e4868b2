"""A 3-D scan through windows: the same maps as slices have, whatever the devices, and none of them invented."""

import functools

import jax
import numpy as np
import pytest

import made_up
from entrust_jax import footprint, inference, windows
from entrust_jax.baselines.unet import UNet
from entrust_jax.data.preprocess import Volume
from entrust_jax.model import EnTrust
from entrust_jax.runtime.mesh import data_mesh
from entrust_jax.segdiff.sampler import Sampler

M, K, N = 2, 3, 3
WINDOW, UNIT = (4, 8, 8), (4, 4, 4)
MODEL = EnTrust(M, K, widths=(4, 8), d_c=4, d_u=4, strides=((2, 2, 2), (2, 2, 2)), head_dropout=0.2, b=0.2)
SAMPLER = Sampler(0.2, -12.0, 7.0, 3)
KEY = jax.random.key(3)


def volume() -> Volume:
    """Its body leaves a margin on every side and fills no whole number of windows."""
    body = np.zeros((9, 14, 15), bool)
    body[1:8, 2:13, 1:12] = True
    return made_up.volume(body)


@functools.cache
def params():
    around = windows.frame(volume(), WINDOW, UNIT)
    batch = windows.batch_of(around, np.zeros((1, 3), int))
    label = np.zeros((1, *WINDOW), np.int32)
    batch |= {"label": label, "weight": np.ones(1, np.float32), "valid": np.ones(1, bool)}
    return made_up.parameters(MODEL.init, {"params": KEY, "dropout": KEY}, batch, KEY)


def examine(devices, hypotheses=N, **options):
    return windows.examine(
        params(), volume(), KEY, model=MODEL, sampler=SAMPLER, mesh=data_mesh(jax.devices()[:devices]),
        hypotheses=hypotheses, window=WINDOW, unit=UNIT, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def raw():
    return examine(1)


def test_the_maps_are_those_of_slices(raw):
    """Names, types and axes, so that all that follows is one code for both."""
    flat = EnTrust(M, K, widths=(4, 8), d_c=4, d_u=4, strides=((2, 2), (2, 2)), head_dropout=0.2, b=0.2)
    case = volume()
    batch = inference.pipeline.evaluation_slices(case, multiple=16)
    some = made_up.parameters(flat.init, {"params": KEY, "dropout": KEY}, batch, KEY)
    of_slices = inference.examine(
        some, case, KEY, model=flat, sampler=SAMPLER, mesh=data_mesh(jax.devices()[:1]), hypotheses=N,
        multiple=16,
    )  # fmt: skip
    assert raw.keys() == of_slices.keys()
    for name, value in of_slices.items():
        if isinstance(value, np.ndarray):
            assert raw[name].shape == value.shape and raw[name].dtype == value.dtype, name


def test_nothing_is_said_of_air_and_everything_of_the_body(raw):
    body = volume().body
    for name in ("one_step", "mean"):
        np.testing.assert_allclose(raw[name].sum(-1), 1, atol=1e-5)
        assert np.all(raw[name][~body, 0] > 0.999)
    assert np.all(raw["label"][~body] == 0) and np.all(raw["hypotheses"][:, ~body] == 0)
    assert np.all(raw["disagreement"][~body] == 0)
    assert np.mean(raw["divergence"][body]) > 1e-3 and np.mean(raw["conflict"][body] > 0.01) > 0.01
    assert all(np.isfinite(value).all() for value in raw.values() if isinstance(value, np.ndarray))
    # The attribution of an average over windows adds up to a finite change, and somewhere it says something.
    assert np.abs(raw["attribution"][:, body]).max() > 1e-3


def test_statistics_are_those_of_the_labels_they_came_from(raw):
    """The running sums hold what was drawn: shares of votes, hence disagreement, follow from the kept labels."""
    votes = np.stack([(raw["hypotheses"] == k).mean(0) for k in range(K)], -1)
    expected = N / (N - 1) * (1 - np.square(votes).sum(-1))
    np.testing.assert_allclose(raw["disagreement"], expected, atol=1e-5)


def test_more_devices_and_more_hypotheses_change_none_of_the_first(raw):
    """Two devices draw hypotheses side by side; three of them leave one draw to no use."""
    both = examine(2)
    for name in ("one_step", "mean", "within", "divergence", "conflict", "attribution"):
        np.testing.assert_allclose(both[name], raw[name], atol=2e-3, err_msg=name)
    assert np.mean(both["hypotheses"] != raw["hypotheses"]) < 2e-3
    more = examine(2, hypotheses=5, probed=False)
    assert np.mean(more["hypotheses"][:N] != raw["hypotheses"]) < 2e-3


def test_calibration_gets_slices_of_the_whole(raw):
    """The border of a slice is that in the volume, not in the slice."""
    some = examine(1, slices=3)
    kept = some["kept"]
    assert len(kept) == 3 and some["label"].shape[0] == 3
    np.testing.assert_array_equal(some["label"], raw["label"][kept])
    np.testing.assert_array_equal(some["border"], raw["border"][kept])
    np.testing.assert_array_equal(some["hypotheses"], raw["hypotheses"][:, kept])


def test_windows_without_foreground_are_not_sampled(monkeypatch):
    monkeypatch.setattr(windows, "ACTIVE", 2.0)
    quiet = examine(1)
    assert np.all(quiet["disagreement"] == 0) and np.all(quiet["attribution"] == 0)
    np.testing.assert_array_equal(quiet["mean"], quiet["one_step"])


def test_a_scan_smaller_than_a_window_comes_back_to_its_place():
    around = windows.frame(volume(), (16, 16, 16), UNIT)
    assert around.scan["body"].shape == (16, 16, 16)
    whole = windows.place(around.scan["image"], around, volume().body.shape, axis=1, fill=7)
    box = np.zeros(volume().body.shape, bool)
    box[1:8, 2:13, 1:12] = True
    np.testing.assert_array_equal(whole, np.where(box, volume().image, 7))


def test_a_baseline_sees_a_volume_through_the_same_windows():
    """Members' probabilities joined; what no window sees is background."""
    network = UNet(K, widths=(4, 8), strides=((2, 2, 2), (2, 2, 2)))
    batch = windows.batch_of(windows.frame(volume(), WINDOW, UNIT), np.zeros((1, 3), int))
    arrays = (batch["image"], batch["present"], batch["body"])
    shapes = jax.eval_shape(network.init, KEY, *arrays)
    rng = np.random.default_rng(1)
    stacked = jax.tree.map(lambda leaf: (0.4 * rng.normal(size=(2, *leaf.shape))).astype(np.float32), shapes)
    found = windows.examine_unet(
        stacked, volume(), KEY, model=network, mesh=data_mesh(jax.devices()[:1]), window=WINDOW, unit=UNIT, tau=0.3
    )
    body = volume().body
    np.testing.assert_allclose(found["mean"].sum(-1), 1, atol=1e-5)
    assert np.all(found["mean"][~body, 0] > 0.999) and found["hypotheses"].shape == (2, *body.shape)
    assert np.mean(found["divergence"][body]) > 1e-4 and len(np.unique(found["label"])) > 1


def test_all_windows_of_a_scan_are_seen_by_the_same_passes():
    """A pass is one network: what it says of a window does not depend on the windows beside it."""
    network = UNet(K, widths=(4, 8), strides=((2, 2, 2), (2, 2, 2)), dropout=0.3, passes=3)
    around = windows.frame(volume(), WINDOW, UNIT)
    at = windows.lattices.origins(around.scan["body"], WINDOW, UNIT)[:2]
    both = windows.batch_of(around, at)
    stacked = made_up.parameters(network.init, KEY, both["image"], both["present"], both["body"])
    stacked = jax.tree.map(lambda leaf: leaf[None], stacked)
    one = data_mesh(jax.devices()[:1])

    def say(batch):
        return np.asarray(inference.ensemble(stacked, batch, KEY, model=network, mesh=one))

    together = say(both)
    assert together.shape == (2, 3, *WINDOW, K) and np.std(together, axis=1).max() > 0.05
    for i in range(2):
        alone = say(windows.batch_of(around, at[i : i + 1]))
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-5)
    found = windows.examine_unet(stacked, volume(), KEY, model=network, mesh=one, window=WINDOW, unit=UNIT, tau=0.3)
    assert found["hypotheses"].shape == (3, *volume().body.shape)


def test_memory_is_said_beforehand_and_hardly_grows_with_hypotheses(raw):
    """Of one more hypothesis its labels stay: a byte a voxel, on the lattice or in the scan."""
    options = {"model": MODEL, "sampler": SAMPLER, "mesh": data_mesh(jax.devices()[:1]), "window": WINDOW, "unit": UNIT}
    case = volume()
    few, many = (footprint.estimate(params(), case, scan=case, hypotheses=n, **options) for n in (4, 16))
    most = max(windows.frame(case, WINDOW, UNIT).scan["body"].size, case.body.size)
    assert 0 <= many["bytes"] - few["bytes"] <= 12 * footprint.HOLES * most + 1
    kept = sum(value.nbytes for value in raw.values() if isinstance(value, np.ndarray))
    assert few["stages"]["way back"] > kept and few["bytes"] >= max(few["stages"].values())
    assert footprint.in_words(few).startswith(f"{few['windows']} windows of 4 x 8 x 8 voxels, 4 hypotheses: about ")
    # Where the network sees a coarser grid than the scan's, the maps' way onto that counts.
    fine = made_up.volume(np.repeat(np.repeat(case.body, 4, axis=1), 4, axis=2))
    other = footprint.estimate(params(), case, scan=fine, hypotheses=4, **options)
    assert few["stages"]["own grid"] == 0 < other["stages"]["own grid"] == max(other["stages"].values())
    assert other["stages"]["own grid"] > 16 * kept
