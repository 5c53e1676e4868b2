"""What a network says of a case, calibrated and carried to the grid of its scan."""

import dataclasses

import jax
import numpy as np
import pytest

import made_up
from entrust_jax.data.body import coordinates
from entrust_jax.trustmap import pixels, prediction, rungs

M, K, N = 2, 3, 3


def test_a_head_that_moves_the_error_moves_it_on_the_scan_too():
    """What the calibrator adds to the logit of e goes along with the label that it is about."""
    examined = made_up.slices()
    depth, height, width = examined.body.shape
    body = np.ones((depth, 2 * height, width), bool)
    image = np.zeros((M, *body.shape), np.float32)
    scan = dataclasses.replace(examined, image=image, body=body, coordinates=coordinates(body), spacing=(3.0, 0.5, 1.0))
    p = np.full((depth, height, width, K), (0.2, 0.7, 0.1), np.float32)
    label = np.ones(p.shape[:-1], np.uint8)
    error = np.full(label.shape, 1 / (1 + np.exp(-(np.log(0.3 / 0.7) - 0.5))), np.float32)
    said = {"probability": p, "mean": p, "label": label, "error_probability": error, "action": 0.5}
    np.testing.assert_allclose(prediction.carried(said, examined, scan)["error_probability"], error[0, 0, 0], atol=1e-5)
    said["action"] = 0.9  # background now, of which p_cal has .2
    found = prediction.carried(said, examined, scan)
    assert not found["label"].any()
    expected = 1 / (1 + np.exp(-(np.log(0.8 / 0.2) - 0.5)))
    np.testing.assert_allclose(found["error_probability"], expected, atol=1e-5)


@pytest.mark.parametrize("chosen", ["identity", "temperature", "head"])
def test_a_scan_is_calibrated_by_parts_as_it_would_be_whole(chosen):
    rng = np.random.default_rng(0)
    space, present = (rungs.SLICES + 3, 6, 5), np.array([True, False])
    scalar = ("entropy", "divergence", "within", "conflict", "js", "delta_conflict", "gap", "border")
    raw = {name: rng.random(space).astype(np.float32) for name in scalar}
    raw |= {name: rng.dirichlet(np.ones(K), space).astype(np.float32) for name in ("one_step", "mean")}
    raw |= {"delta_modality": rng.random((M, *space)).astype(np.float32), "label": rng.integers(0, K, space)}
    raw |= {"hypotheses": rng.integers(0, K, (N, *space)), "sampled": np.ones(space[0], bool), "action": 0.5}
    inputs, names = pixels.features(raw, present)
    start = {} if chosen == "identity" else rungs.initial(chosen, K, len(names), jax.random.key(0))
    noisy = {name: np.asarray(value + 0.3 * rng.normal(size=value.shape)) for name, value in start.items()}
    noisy |= {"center": np.zeros(len(names), np.float32), "scale": np.ones(len(names), np.float32)}
    before, after, error = prediction.calibrated(raw, present, chosen, noisy)
    one_step, mean = (pixels.log_probability(raw[name]) for name in ("one_step", "mean"))
    expected = rungs.apply(chosen, noisy, inputs, one_step, mean, raw["label"])
    plain, _ = rungs.apply("identity", {}, inputs, one_step, mean, raw["label"])
    for found, wanted in zip((before, after, error), (plain, *expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert (np.abs(after - before).max() > 1e-3) == (chosen != "identity")
