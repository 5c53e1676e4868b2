"""Augmentation: the label stays true, the draw is the generator's, nothing leaks outside the body."""

import numpy as np
import pytest

from entrust_jax.data import augment


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
        np.testing.assert_array_equal(
            out["label"], np.flip(element["label"], 0) if flipped else element["label"]
        )
        np.testing.assert_array_equal(
            out["body"], np.flip(element["body"], 0) if flipped else element["body"]
        )
        assert not out["image"][:, ~out["body"]].any()
        flips += flipped
    assert 70 < flips < 130
