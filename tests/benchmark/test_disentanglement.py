"""The measures of the decomposition tell what depends from what does not, on features whose answer is known."""

import numpy as np
import pytest

from entrust_jax.benchmark import disentanglement
from entrust_jax.data import phantom, phantom_scene

CASES, SIDE = 24, 12
INSIDE = np.ones((CASES, SIDE, SIDE), bool)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_squared_correlation_is_free_of_bias_and_finds_a_known_mixture():
    y, z = noise(CASES, SIDE, SIDE, 4), noise(CASES, SIDE, SIDE, 3, seed=1)
    assert abs(disentanglement.squared_correlation(y, z, INSIDE)) < 3e-4
    mixed = z + y[..., :3]  # R = 1 / sqrt(2) for three of twelve pairs
    assert disentanglement.squared_correlation(y, mixed, INSIDE) == pytest.approx(0.5 * 3 / 12, abs=0.01)
    offset = 5 * noise(CASES, 1, 1, 1, seed=2)
    assert abs(disentanglement.squared_correlation(y + offset, z + offset, INSIDE)) < 3e-4  # between cases, not within


def test_distance_correlation_sees_what_correlation_does_not():
    x = noise(CASES, SIDE, SIDE, 2)
    value, p = disentanglement.distance_correlation(x, x, INSIDE)
    assert value == pytest.approx(1, abs=1e-4) and p == pytest.approx(1 / (1 + disentanglement.PERMUTATIONS))
    square = np.square(x) + 0.1 * noise(CASES, SIDE, SIDE, 2, seed=3)
    assert disentanglement.squared_correlation(x, square, INSIDE) < 0.01
    assert disentanglement.distance_correlation(x, square, INSIDE)[1] <= 0.01
    other = noise(CASES, SIDE, SIDE, 2, seed=4)
    assert disentanglement.distance_correlation(x, other, INSIDE)[1] > 0.05


def test_the_modality_probe_is_at_chance_for_equal_features_and_sure_for_different_ones():
    same = noise(2, 80, SIDE, SIDE, 4)
    inside = np.ones((80, SIDE, SIDE), bool)
    assert disentanglement.modality_probe(same, inside) < 0.7
    shifted = same + np.array([-1.0, 1.0]).reshape(2, 1, 1, 1, 1)
    assert disentanglement.modality_probe(shifted, inside) == 1


def test_the_label_probe_reads_the_pixels_of_a_cell_apart():
    label = np.random.default_rng(0).random((CASES, 2 * SIDE, 2 * SIDE)) < 0.3
    cells = label.reshape(CASES, SIDE, 2, SIDE, 2).transpose(0, 1, 3, 2, 4).reshape(CASES, SIDE, SIDE, 4)
    assert disentanglement.label_probe(cells.astype(np.float32), label, (2, 2)) > 0.99
    assert disentanglement.label_probe(noise(CASES, SIDE, SIDE, 4), label, (2, 2)) < 0.3


def test_flipping_a_reader_changes_its_image_at_that_blob_alone():
    spec = phantom.Spec(size=(32, 32), sites=2, radius=4.0, jitter=0.5)
    before, after = (phantom_scene.volumes(spec, range(6), 0, flip=flip) for flip in (None, (1, 0)))
    scenes = phantom_scene.scenes(spec, range(6), 0)
    for i, (one, two) in enumerate(zip(before, after, strict=True)):
        np.testing.assert_allclose(one.image[0], two.image[0], atol=1e-5)
        np.testing.assert_array_equal(one.label, two.label)
        change = np.abs(one.image[1] - two.image[1])[0]
        near = np.asarray(scenes.site)[i, 0] == 0
        shown = np.asarray(scenes.evidence)[i, 1, 0] != 0
        assert (change[near].mean() > 10 * change[~near].mean()) == shown
