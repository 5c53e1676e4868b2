"""The ensemble's statistics against hand-worked values and their properties."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrust_jax.trustmap.statistics import entropy, js, statistics


def ensemble(seed: int, count: int, classes: int, sharpness: float) -> np.ndarray:
    logits = sharpness * np.random.default_rng(seed).normal(size=(1, count, 3, 4, classes))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)).astype(np.float32)


def test_two_certain_hypotheses_that_differ():
    hypotheses = jnp.asarray([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    maps = statistics(hypotheses, jnp.asarray([[[0.8, 0.2]]]))
    np.testing.assert_allclose(maps["mean"], [[[0.5, 0.5]]])
    for name, value in {
        "entropy": np.log(2),
        "within": 0.0,
        "divergence": np.log(2),
        "disagreement": 1.0,
        "gap": 0.3,
    }.items():
        np.testing.assert_allclose(maps[name], [[value]], atol=1e-6, err_msg=name)


def test_equal_unsure_hypotheses_have_no_divergence():
    maps = statistics(jnp.full((1, 6, 2, 2, 2), 0.5), jnp.full((1, 2, 2, 2), 0.5))
    np.testing.assert_allclose(maps["entropy"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(maps["divergence"], 0.0, atol=1e-6)
    np.testing.assert_allclose(maps["disagreement"], 0.0, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([2, 4]),
    st.sampled_from([0.1, 3.0, 60.0]),
)
def test_properties(seed: int, count: int, classes: int, sharpness: float):
    p = ensemble(seed, count, classes, sharpness)
    mean = p.mean(1)
    maps = {k: np.asarray(v) for k, v in statistics(jnp.asarray(p), jnp.asarray(mean)).items()}
    # before the clip at zero: the entropy in use is concave even where it is floored
    assert (maps["entropy"] - maps["within"] >= -2e-6).all()
    assert (maps["divergence"] >= 0).all()
    assert (maps["entropy"] <= np.log(classes) + 1e-5).all()
    np.testing.assert_allclose(maps["gap"], 0.0, atol=1e-6)
    winner = p.argmax(-1)[0]
    pairs = [(winner[i] != winner[j]) for i in range(count) for j in range(count) if i != j]
    expected = np.mean(pairs, axis=0) if pairs else np.zeros(winner.shape[1:])
    np.testing.assert_allclose(maps["disagreement"][0], expected, atol=1e-5)


def test_entropy_is_finite_and_js_is_in_bits():
    sure, other = jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0])
    assert float(entropy(sure)) == pytest.approx(0.0, abs=1e-6)
    assert float(js(sure, other)) == pytest.approx(1.0, abs=1e-5)
    assert float(js(sure, sure)) == 0.0
    # two readers at .95 and .05, by hand: ln 2 - H(.95) over ln 2
    assert float(js(jnp.asarray([0.95, 0.05]), jnp.asarray([0.05, 0.95]))) == pytest.approx(0.714, abs=1e-3)
