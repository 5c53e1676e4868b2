"""Shapley axioms, and probes of a fused posterior that is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax.trustmap import probing
from entrust_jax.trustmap.statistics import entropy

SHAPE = (4, 5)


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
def test_shapley_is_efficient_and_symmetric(modalities: int):
    rng = np.random.default_rng(modalities)
    values = rng.normal(size=(2**modalities, 3)).astype(np.float32)
    phi = np.asarray(probing.shapley(jnp.asarray(values)))
    np.testing.assert_allclose(phi.sum(0), values[-1] - values[0], atol=1e-5)
    sizes = probing.subsets(modalities).sum(1).astype(int)
    by_size = rng.normal(size=(modalities + 1,)).astype(np.float32)
    equal = np.asarray(probing.shapley(jnp.asarray(by_size[sizes][:, None])))
    np.testing.assert_allclose(equal, np.broadcast_to(equal[:1], equal.shape), atol=1e-6)


def test_shapley_equals_the_average_over_orders():
    values = np.random.default_rng(0).normal(size=8).astype(np.float32)
    expected = np.zeros(3)
    orders = [(a, b, c) for a in range(3) for b in range(3) for c in range(3) if len({a, b, c}) == 3]
    for order in orders:
        seen = 0
        for m in order:
            expected[m] += (values[seen | 1 << m] - values[seen]) / len(orders)
            seen |= 1 << m
    np.testing.assert_allclose(probing.shapley(jnp.asarray(values)), expected, atol=1e-5)


def test_shapley_refuses_a_broken_game():
    with pytest.raises(ValueError, match="2\\^M values"):
        probing.shapley(jnp.zeros(3))


def readers(evidence: np.ndarray):
    """Independent readers with log-odds `evidence` [b m *s]: p = sigmoid(available evidence + .5 scale)."""
    calls = []

    def one_step(availability, conflict_scale):
        calls.append(availability.shape)
        total = jnp.sum(availability * evidence, axis=1) + 0.5 * conflict_scale[:, None, None]
        return jax.nn.softmax(jnp.stack([jnp.zeros_like(total), total], -1), axis=-1)

    return one_step, calls


def case(log_odds: list[float], present: list[bool], conflict: float):
    evidence = np.broadcast_to(np.array(log_odds, np.float32)[None, :, None, None], (2, len(log_odds), *SHAPE))
    kappa = np.zeros((2, *SHAPE), np.float32)
    kappa[:, 1:3, 1:3] = conflict
    weights = np.abs(evidence)
    return evidence, jnp.asarray([present, present]), jnp.asarray(kappa), jnp.asarray(weights)


def test_probes_of_two_opposed_readers():
    strong, weak = float(np.log(0.95 / 0.05)), -float(np.log(0.7 / 0.3))
    evidence, present, kappa, weights = case([strong, weak], [True, True], 0.6)
    one_step, calls = readers(evidence)
    label = jnp.ones((2, *SHAPE), jnp.int32)
    out = jax.jit(lambda *a: probing.probe(one_step, *a, classes=2))(present, kappa, weights, label)
    # one call site, whatever the number of probes
    assert len(calls) == 1
    everything = jax.nn.sigmoid(strong + weak + 0.5)
    phi = np.asarray(out["attribution"])
    np.testing.assert_allclose(phi.sum(1), np.log(everything) - np.log(jax.nn.sigmoid(0.5)), atol=1e-5)
    np.testing.assert_array_equal(probing.blame(out["attribution"], present), 1)
    assert (phi[:, 0] > 0).all() and (phi[:, 1] < 0).all()
    # local probes act inside the conflict only
    inside = np.asarray(kappa) > 0
    alone = np.asarray(out["counterfactual"])[..., 1]
    leak = float(np.exp(-6.0))
    np.testing.assert_allclose(alone[:, 0][inside], jax.nn.sigmoid(strong + leak * weak + 0.5), rtol=1e-5)
    np.testing.assert_allclose(alone[:, 1][inside], jax.nn.sigmoid(leak * strong + weak + 0.5), rtol=1e-5)
    np.testing.assert_allclose(alone[:, :, 0, 0], everything, rtol=1e-5)
    delta = np.moveaxis(np.asarray(out["delta_modality"]), 1, -1)
    assert (delta[inside] > 1e-3).all() and (delta[~inside] == 0).all()
    assert (np.asarray(out["delta_conflict"]) > 0).all()
    # the strong reader alone is surer than both together
    removed = entropy(jnp.asarray([1 - everything, everything])) - entropy(
        jnp.asarray([1 - alone[0, 0, 1, 1], alone[0, 0, 1, 1]])
    )
    uncertainty = np.asarray(out["conflict_uncertainty"])
    np.testing.assert_allclose(uncertainty[inside], float(removed), atol=1e-5)
    np.testing.assert_allclose(uncertainty[~inside], 0.0, atol=1e-6)


def test_absent_modality_is_a_dummy_and_equal_readers_share_equally():
    evidence, present, kappa, weights = case([1.5, 1.5, -4.0], [True, True, False], 0.4)
    one_step, _ = readers(evidence)
    label = jnp.zeros((2, *SHAPE), jnp.int32)
    # the absent reader has the largest weight, and must not be trusted for it
    out = jax.jit(lambda *a: probing.probe(one_step, *a, classes=2))(present, kappa, weights, label)
    phi = np.asarray(out["attribution"])
    assert (phi[:, 2] == 0).all()
    np.testing.assert_allclose(phi[:, 0], phi[:, 1], atol=1e-6)
    assert (np.asarray(out["delta_modality"])[:, 2] == 0).all()
    full = jax.nn.sigmoid(3.5)
    np.testing.assert_allclose(np.asarray(out["counterfactual"])[:, 2, ..., 1], full, rtol=1e-5)
    np.testing.assert_allclose(out["conflict_uncertainty"], 0.0, atol=1e-6)
    assert set(np.unique(probing.blame(out["attribution"], present))) <= {0, 1}


def test_four_readers_and_one_lie():
    odds = float(np.log(9.0))
    evidence, present, kappa, weights = case([odds, odds, -odds, odds], [True] * 4, 0.6)
    one_step, _ = readers(evidence)
    label = jnp.ones((2, *SHAPE), jnp.int32)
    out = probing.probe(one_step, present, kappa, weights, label, classes=2)
    np.testing.assert_array_equal(probing.blame(out["attribution"], present), 2)
