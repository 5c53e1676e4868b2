"""Augmentation: the label stays true, the draw is the generator's, nothing leaks outside the body."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from scipy import ndimage

from entrust_jax.data import augment, pipeline
from entrust_jax.data.body import coordinates
from entrust_jax.errors import UserError


@pytest.fixture
def element():
    rng = np.random.default_rng(0)
    body = np.zeros((12, 10), bool)
    body[2:9, 1:9] = True
    image = rng.normal(size=(3, 12, 10)).astype(np.float32) * body
    image[1] = 0
    grid = np.stack(np.meshgrid([0.3], np.linspace(-1, 1, 12), np.linspace(-1, 1, 10), indexing="ij"), -1)[0]
    return {
        "image": image,
        "present": np.array([True, False, True]),
        "label": (rng.random((12, 10)) < 0.2).astype(np.int32),
        "body": body,
        "coordinates": grid.astype(np.float32),
    }


@pytest.mark.parametrize("axis", [0, 1])
def test_flip_moves_everything_together(element, axis):
    flipped = augment.flip(element, axis)
    np.testing.assert_array_equal(flipped["image"], np.flip(element["image"], axis + 1))
    np.testing.assert_array_equal(flipped["label"], np.flip(element["label"], axis))
    np.testing.assert_array_equal(flipped["body"], np.flip(element["body"], axis))
    # This grid is symmetric, so a position after the flip is the position before it.
    np.testing.assert_allclose(flipped["coordinates"], element["coordinates"], atol=1e-6)
    twice = augment.flip(flipped, axis)
    for name in element:
        np.testing.assert_array_equal(twice[name], element[name])


def test_flip_of_asymmetric_coordinates_negates_one_component(element):
    element["coordinates"] = np.random.default_rng(1).normal(size=(12, 10, 3)).astype(np.float32)
    flipped = augment.flip(element, 0)["coordinates"]
    np.testing.assert_array_equal(flipped, element["coordinates"][::-1] * np.float32([1, -1, 1]))


def test_intensity_keeps_background_missing_and_order_of_magnitude(element):
    before = {k: v.copy() for k, v in element.items()}
    args = (element["image"], element["present"], element["body"])
    out = augment.intensity(*args, np.random.default_rng(3))
    np.testing.assert_array_equal(element["image"], before["image"])
    assert out.dtype == np.float32 and np.isfinite(out).all()
    assert not out[:, ~element["body"]].any() and not out[1].any()
    for m in (0, 2):
        inside, original = out[m][element["body"]], element["image"][m][element["body"]]
        assert 0.01 < np.abs(inside - original).mean() < 0.6
        assert np.corrcoef(inside, original)[0, 1] > 0.95
    # The same generator gives the same draw; modalities are changed independently of each other.
    np.testing.assert_array_equal(out, augment.intensity(*args, np.random.default_rng(3)))
    other = augment.intensity(args[0], np.array([False, False, True]), args[2], np.random.default_rng(3))
    np.testing.assert_array_equal(other[2], out[2])


def test_augment_flips_about_half_of_the_time(element):
    flips = 0
    for seed in range(200):
        out = augment.augment(element, np.random.default_rng(seed))
        flipped = not np.array_equal(out["label"], element["label"])
        np.testing.assert_array_equal(out["label"], np.flip(element["label"], 0) if flipped else element["label"])
        np.testing.assert_array_equal(out["body"], np.flip(element["body"], 0) if flipped else element["body"])
        assert not out["image"][:, ~out["body"]].any()
        flips += flipped
    assert 70 < flips < 130


SIZE = (64, 56)
EMPTY = -2.5


def ellipse(size=SIZE, centre=(32, 28), half=(24, 18)):
    h, w = np.indices(size)
    return ((h - centre[0]) / half[0]) ** 2 + ((w - centre[1]) / half[1]) ** 2 <= 1


@pytest.fixture
def plane():
    """A slice of PET, CT and two of MR, of which the first covers a part of it and the second is missing."""
    rng = np.random.default_rng(0)
    body = ellipse()
    smooth = ndimage.gaussian_filter(rng.normal(size=(4, *SIZE)), (0, 2, 2)) * 5
    image = np.clip(smooth, -2, 2).astype(np.float32)
    image[0] = np.abs(image[0])
    image[3] = 0
    image[2][:, :20] = 0
    return {
        "image": image * body,
        "present": np.array([True, True, True, False]),
        "label": ellipse(half=(8, 5)).astype(np.int32),
        "body": body,
        "coordinates": coordinates(body[None])[0],
    }


RULES = (("scale", 2.5), ("window", -160.0, 240.0), None, None)
NONE = np.array([0.0, -2.0, EMPTY, EMPTY])


def only(*kinds, reference=2):
    return augment.Settings(dict.fromkeys(kinds, 1.0), RULES, reference)


def changed(plane, kinds, seed=0, spacing=(1.0, 1.0), patch=SIZE):
    """As training does it: where things are, then how they look."""
    return pipeline.varied(
        plane, np.zeros(2, int), patch, kinds, augment.streams(seed, 5), NONE, spacing
    )  # fmt: skip


@pytest.mark.parametrize("kind", augment.KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_a_kind_changes_what_it_should_and_nothing_else(plane, kind, seed):
    before = {name: values.copy() for name, values in plane.items()}
    out = changed(plane, only(kind), seed)
    for name, values in plane.items():
        np.testing.assert_array_equal(values, before[name])  # the slice itself is everyone's
    if kind != "affine":
        for name in ("label", "body"):
            np.testing.assert_array_equal(out[name], plane[name])
        np.testing.assert_allclose(out["coordinates"], plane["coordinates"], atol=1e-5)
    # What is missing, outside the body or beyond a field of view stays 0.
    assert out["image"].dtype == np.float32 and np.isfinite(out["image"]).all()
    assert not out["image"][3].any() and not out["image"][:, ~out["body"]].any()
    if kind not in augment.MOVES:
        assert not out["image"][2][:, :20].any()
    differs = [not np.array_equal(a, b) for a, b in zip(out["image"], plane["image"], strict=True)]
    # CT and PET have no coil and no phase encoding; the reference modality is not shifted.
    assert differs[:3] == {
        "affine": [True, True, True], "shift": [True, True, False], "noise": [True, True, True],
    }.get(kind, [False, False, True])  # fmt: skip


def test_draws_do_not_depend_on_other_kinds_or_on_what_is_there(plane):
    every = augment.KINDS[2:]
    together = changed(plane, only(*every))["image"][2]
    step = changed(plane, only("gamma", "bias"))
    rest = pipeline.varied(step, np.zeros(2, int), SIZE, only("ghosting", "noise"), augment.streams(0, 5), NONE, (1, 1))
    np.testing.assert_array_equal(together, rest["image"][2])
    np.testing.assert_array_equal(together, changed(plane, only(*every))["image"][2])
    alone = plane | {"present": np.array([False, False, True, False])}
    np.testing.assert_array_equal(together, changed(alone, only(*every))["image"][2])
    assert not np.array_equal(together, changed(plane, only(*every), seed=1)["image"][2])
    one, other = (augment.streams(0, 5)(kind, m).random() for kind, m in (("affine", 0), ("affine", 1)))
    assert len({one, other, np.random.default_rng([0, 5]).random()}) == 3


def test_a_kind_happens_as_often_as_it_is_told(plane):
    """Of the MR alone, so that each draw counts once; hits of two kinds are independent."""
    plane = plane | {"present": np.array([False, False, True, False])}
    hits = {"noise": [], "bias": [], "ghosting": []}
    for seed in range(120):
        for kind, rate in (("noise", 0.25), ("bias", 0.5), ("ghosting", 0.0)):
            out = changed(plane, augment.Settings({kind: rate}, RULES, 2), seed)
            hits[kind].append(not np.array_equal(out["image"][2], plane["image"][2]))
    noise, bias, ghosting = (np.array(own) for own in hits.values())
    assert 16 < noise.sum() < 45 and 43 < bias.sum() < 77 and not ghosting.any()
    assert 5 < (noise & bias).sum() < 26


@example(274, (1.0, 1.0))
@given(st.integers(0, 10**6), st.sampled_from([(1.0, 1.0), (0.8, 3.2)]))
@settings(max_examples=25, deadline=None)
def test_image_label_and_body_move_together(seed, spacing):
    body, label = ellipse(), ellipse(half=(9, 9), centre=(30, 31)).astype(np.int32)
    image = np.where(body, np.where(label == 1, 3.0, -1.0), 0)[None].astype(np.float32)
    plane = {
        "image": image, "present": np.array([True]), "label": label, "body": body,
        "coordinates": coordinates(body[None])[0],
    }  # fmt: skip
    kinds = augment.Settings({"affine": 1.0}, (None,), 0)
    move = augment.draw_move(kinds, augment.streams(seed, 0), plane["present"], spacing)
    out = augment.moved(plane, move, np.zeros(2, int), SIZE, np.array([EMPTY]))
    bright = out["image"][0] > 1
    assert 2 * (bright & (out["label"] == 1)).sum() / (bright.sum() + (out["label"] == 1).sum()) > 0.95
    # The edge of the body is tissue, not a mixture with the 0 outside.
    values = out["image"][0][out["body"]]
    assert values.min() >= -1 - 1e-5 and values.max() <= 3 + 1e-5
    assert not out["image"][0][~out["body"]].any()
    # Small: at most 10 % and 10 degrees, in millimetres.
    scale = np.diag(spacing)
    inside = np.linalg.svd(scale @ move.matrix @ np.linalg.inv(scale), compute_uv=False)
    assert inside.min() >= 1 / 1.1 - 1e-9 and inside.max() <= 1 / 0.9 + 1e-9
    # Interpolated grey values show the smallest move; a label's nearest voxels may all stay (seed 274).
    assert not np.array_equal(out["image"], image)
    # Positions are what the moved scan would be given, up to the roundness of voxels.
    fresh = coordinates(out["body"][None])[0]
    if spacing[0] == spacing[1]:
        assert np.abs(fresh[..., 1:] - out["coordinates"][..., 1:])[out["body"]].max() < 2.5 / 18


def test_beyond_the_slice_nothing_is_labelled(plane):
    move = augment.Move(np.eye(2), np.zeros((4, 2)))
    out = augment.moved(plane, move, np.array([-8, 6]), (80, 64), NONE)
    still = pipeline.cut(plane, np.array([0, 6]), (80, 64))
    np.testing.assert_array_equal(out["image"][:, 8:72, :50], plane["image"][:, :, 6:])
    np.testing.assert_array_equal(out["label"][8:72, :50], plane["label"][:, 6:])
    assert (out["label"][:8] == -1).all() and (out["label"][72:] == -1).all() and (out["label"][:, 50:] == -1).all()
    assert out["body"].sum() == plane["body"][:, 6:].sum() and out["label"].dtype == still["label"].dtype
    np.testing.assert_allclose(out["coordinates"][8:72, :50], plane["coordinates"][:, 6:], atol=1e-5)


def test_what_a_patch_lacks_is_taken_from_the_slice():
    """A turned patch from the middle of a slice has no empty corners."""
    body = np.ones((60, 60), bool)
    plane = {
        "image": np.ones((1, 60, 60), np.float32), "present": np.array([True]), "label": np.zeros((60, 60), np.int32),
        "body": body, "coordinates": coordinates(body[None])[0],
    }  # fmt: skip
    turn = np.deg2rad(10)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) / 0.9
    out = augment.moved(plane, augment.Move(matrix, np.zeros((1, 2))), np.array([10, 10]), (40, 40), np.array([EMPTY]))
    assert out["body"].all() and (out["label"] == 0).all()
    np.testing.assert_allclose(out["image"], 1, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_shifts_are_relative_and_at_most_a_voxel(seed, reference):
    present = np.array([True, False, True, True])
    kinds = augment.Settings({"shift": 1.0}, (None,) * 4, reference)
    move = augment.draw_move(kinds, augment.streams(seed, 1), present, (1.0, 1.0))
    assert np.array_equal(move.matrix, np.eye(2))
    apart = np.linalg.norm(move.shifts[:, None] - move.shifts[None], axis=-1)
    assert apart.max() <= 1 and np.sort(apart, axis=1)[:, 1].min() > 0
    still = reference if present[reference] else 0
    assert not move.shifts[still].any()


def test_a_shifted_image_is_the_image_elsewhere(plane):
    h, w = np.indices(SIZE)
    ramp = (0.05 * h + 0.02 * w - 1).astype(np.float32)
    plane = plane | {"image": np.stack([ramp] * 4) * plane["body"], "present": np.ones(4, bool)}
    shifts = np.array([[0.0, 0.0], [0.6, -0.3], [-0.2, 0.9], [1.0, 0.0]])
    out = augment.moved(plane, augment.Move(np.eye(2), shifts), np.zeros(2, int), SIZE, NONE)
    core = ndimage.binary_erosion(plane["body"], iterations=2)
    for m, (a, b) in enumerate(shifts):
        np.testing.assert_allclose((out["image"][m] - ramp)[core], 0.05 * a + 0.02 * b, atol=1e-5)
    np.testing.assert_array_equal(out["image"][0], plane["image"][0])
    # Where the body has no voxel to show any more there is no signal, not the mean of the tissue.
    edge = plane["body"] & ~np.roll(plane["body"], -1, axis=0)
    np.testing.assert_allclose(out["image"][3][edge], NONE[3])


def test_gamma_is_another_contrast_of_the_same_moments(plane):
    inside = plane["body"]
    z = np.where(inside, np.maximum(plane["image"][1], EMPTY), 0).astype(np.float32)
    powers = []
    for seed in range(40):
        out = augment.gamma(z, inside, EMPTY, np.random.default_rng(seed))
        a, b = z[inside].astype(float), out[inside].astype(float)
        np.testing.assert_allclose([b.mean(), b.std()], [a.mean(), a.std()], atol=1e-4)
        assert (np.diff(b[np.argsort(a)]) >= -1e-6).all()
        signal = (a - EMPTY) / (a - EMPTY).max()
        fit = [np.corrcoef(signal**power, b)[0, 1] for power in np.linspace(0.6, 1.6, 101)]
        powers.append(np.linspace(0.6, 1.6, 101)[int(np.argmax(fit))])
        assert max(fit) > 1 - 1e-6
    assert 0.69 <= min(powers) < 0.8 and 1.3 < max(powers) <= 1.51 and 10 < (np.array(powers) < 1).sum() < 30
    flat = np.where(inside, 1.0, 0).astype(np.float32)
    np.testing.assert_array_equal(augment.gamma(flat, inside, EMPTY, np.random.default_rng(0)), flat)


def test_a_bias_field_is_a_smooth_factor_of_the_signal(plane):
    inside, z = plane["body"], plane["image"][1]
    h, w = (plane["coordinates"][..., k][inside].astype(float) for k in (1, 2))
    cubic = np.stack([h**i * w**j for i in range(4) for j in range(4) if i + j <= 3], axis=1)
    for seed in range(20):
        out = augment.bias(z, inside, EMPTY, plane["coordinates"], np.random.default_rng(seed))
        field = np.log((out[inside] - EMPTY) / (z[inside] - EMPTY)).astype(float)
        weights, *_ = np.linalg.lstsq(cubic, field, rcond=None)
        assert np.abs(cubic @ weights - field).max() < 1e-4
        assert 0.08 < np.abs(field).max() < 0.42 and abs(field.mean()) < 0.05
        assert not out[~inside].any()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("every", [4, 7])
def test_ghosts_have_their_period_in_fourier_space(axis, every):
    size = (84, 56)
    signal = (5 + np.random.default_rng(1).random(size)).astype(np.float32)
    out = augment.ghosts(signal, axis, every, 0.6)
    before, after = (np.abs(np.fft.fft(x, axis=axis)) for x in (signal, out))
    line = np.abs(np.fft.fftfreq(size[axis], 1 / size[axis]).round().astype(int))
    weak = (line % every == 0) & (line > 1)
    ratio = np.moveaxis(after / before, axis, 0)
    np.testing.assert_allclose(ratio[weak], 0.4, atol=1e-3)
    np.testing.assert_allclose(ratio[~weak], 1, atol=1e-3)
    np.testing.assert_allclose(out.mean(), signal.mean(), rtol=1e-6)
    # In the image: copies of a bright line, one n-th of the field of view apart, along this axis alone.
    signal = np.ones(size, np.float32)
    np.moveaxis(signal, axis, 0)[10] = 5
    trace = np.moveaxis(augment.ghosts(signal, axis, every, 0.6) - signal, axis, 0)
    np.testing.assert_allclose(trace, trace[:, :1].repeat(trace.shape[1], 1), atol=1e-6)
    strongest = np.argsort(np.abs(trace[:, 0]))[-every:]
    assert set((strongest - 10) % (size[axis] // every)) == {0}


def test_noise_is_that_of_the_scanner():
    inside = np.ones((128, 128), bool)
    bright, dark = np.full(inside.shape, 3, np.float32), np.full(inside.shape, EMPTY, np.float32)
    for seed in range(4):
        rng = lambda seed=seed: np.random.default_rng(seed)  # noqa: E731
        strong = augment.noise(bright, inside, EMPTY, None, (1, 1), rng())
        deviation = strong.std()
        assert 0.045 < deviation < 0.31 and abs(strong.mean() - 3) < 0.03
        # Rician: where there is no signal the magnitude of noise is left, Rayleigh with mean sigma sqrt(pi / 2).
        faint = augment.noise(dark, inside, EMPTY, None, (1, 1), rng()) - EMPTY
        assert faint.min() >= 0
        np.testing.assert_allclose(faint.mean(), deviation * np.sqrt(np.pi / 2), rtol=0.05)
        ct = np.where(np.arange(128) < 64, 2.0, 0.1).astype(np.float32) * np.ones((128, 1), np.float32)
        out = augment.noise(ct, inside, -2, RULES[1], (1, 1), rng())
        np.testing.assert_array_equal(out[:, :64], 2)
        assert np.abs(out).max() <= 2 and 0.045 < out[:, 64:].std() < 0.31
        # PET: relative to the root of the uptake, grains of millimetres, none where nothing is.
        pet = np.repeat(np.array([0, 1, 4], np.float32), [32, 48, 48]) * np.ones((128, 1), np.float32)
        out = augment.noise(pet, inside, 0, RULES[0], (1, 1), rng())
        assert out.min() >= 0 and not out[:, :32].any()
        np.testing.assert_allclose(out[:, 80:].std() / out[:, 32:80].std(), 2, rtol=0.5)
        grains = out[:, 32:80] - out[:, 32:80].mean()
        assert (grains[1:] * grains[:-1]).mean() / grains.var() > 0.9


def test_no_signal_is_known_for_units_and_the_darkest_voxel_without():
    image = np.array([[0, 3.0], [-2, 2], [-1.7, 2], [-6, 1]], np.float32)
    np.testing.assert_allclose(augment.no_signal(image, RULES), [0, -2, -1.7, -4], rtol=1e-6)


def data(**changes):
    values = {"modalities": ("CT", "T1"), "reference": "T1", "intensity": {"CT": ("window", -160.0, 240.0)}}
    return ConfigDict(values | {"augmentation": dict.fromkeys(augment.KINDS, 0.0) | changes})


def test_settings_come_from_the_config():
    got = augment.settings_of(data(noise=0.1, shift=1))
    assert got.rate["noise"] == 0.1 and got.rate["shift"] == 1 and got.reference == 1
    assert got.rules == (("window", -160.0, 240.0), None)
    with pytest.raises(UserError, match=r"config\.data\.augmentation: there is no kind fog; there are affine, "):
        augment.settings_of(data(fog=0.1))
    for value in (-0.1, 1.1, float("nan"), True, "often"):
        with pytest.raises(UserError, match=r"config\.data\.augmentation\.noise is .* from 0 to 1"):
            augment.settings_of(data(noise=value))
