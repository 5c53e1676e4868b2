"""Distances by hand, an unbiased sample of pixels, and columns for the maps that there are."""

import numpy as np
import pytest

from entrust_jax.trustmap import pixels


def test_signed_distance_by_hand():
    label = np.zeros((2, 1, 7), np.uint8)
    label[0, 0, 2:5] = [1, 1, 2]
    expected = [1.5, 0.5, -0.5, -0.5, -0.5, 0.5, 1.5]
    np.testing.assert_allclose(pixels.signed_distance(label)[0, 0], expected)
    np.testing.assert_allclose(pixels.signed_distance(label)[1], 8.0)


def test_signed_distance_in_mm_goes_through_the_slices():
    label = np.zeros((5, 1, 9), np.uint8)
    label[2, 0, 3:6] = 1
    found = pixels.signed_distance_mm(label, (3.0, 1.0, 1.0))
    np.testing.assert_allclose(found[2, 0], [2.5, 1.5, 0.5, -0.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_allclose(found[:, 0, 4], [5.5, 2.5, -1.5, 2.5, 5.5])
    np.testing.assert_allclose(found[1, 0, 2], np.sqrt(9 + 1) - 0.5, rtol=1e-6)
    np.testing.assert_allclose(pixels.signed_distance_mm(0 * label, (3.0, 1.0, 1.0)), 5 * 3 + 1 + 9)


def test_importance_weights_are_unbiased_and_prefer_the_uncertain():
    rng = np.random.default_rng(0)
    entropy = np.zeros((4, 64, 64))
    entropy[:, :8, :8] = 0.5
    body = np.ones(entropy.shape, bool)
    body[:, -8:] = False
    distance = np.full(entropy.shape, 30.0)
    draws = [pixels.importance_weights(entropy, distance, body, rng, per_slice=64) for _ in range(60)]
    assert all((w[~body] == 0).all() for w in draws)
    uncertain = entropy > 0
    assert np.mean([(w[uncertain] > 0).sum() for w in draws]) == pytest.approx(4 * 32, rel=0.1)
    assert np.mean([(w[~uncertain] > 0).sum() for w in draws]) == pytest.approx(4 * 32, rel=0.1)
    assert np.mean([w.sum() for w in draws]) == pytest.approx(body.sum(), rel=0.05)


def test_features_hold_what_the_method_has():
    p = np.full((2, 8, 8, 2), 0.5)
    delivered = np.zeros((2, 8, 8), np.uint8)
    columns, names = pixels.features(
        {"one_step": p, "entropy": p[..., 0], "border": pixels.signed_distance(delivered)}, np.array([True, False])
    )
    assert names == (
        "log_one_step_0",
        "log_one_step_1",
        "entropy",
        "border_distance",
        "present_0",
        "present_1",
    )
    np.testing.assert_allclose(columns[0, 0, 0], [np.log(0.5), np.log(0.5), 0.5, 1.0, 1.0, 0.0], rtol=1e-6)
    scalar = np.zeros((2, 8, 8))
    maps = {"one_step": p, "mean": p} | dict.fromkeys(
        ("entropy", "divergence", "within", "conflict", "js", "delta_conflict", "gap"), scalar
    )
    maps |= {"delta_modality": np.zeros((2, 2, 8, 8))}
    columns, names = pixels.features(maps | {"border": pixels.signed_distance(delivered)}, np.array([True, True]))
    assert columns.shape[-1] == len(names) == 2 + 2 + 7 + 2 + 1 + 2
