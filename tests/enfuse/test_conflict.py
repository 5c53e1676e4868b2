"""Conflict is opposing evidence: nothing else raises it, and the base rate plays no part."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from entrust_jax.enfuse import conflict


@jax.jit
def measures(posterior, prior, availability):
    """(kappa of pairs [b p n], contested [b n k], js [b n]) of posteriors [b m n k]."""
    s = conflict.support(posterior, prior)
    return *conflict.pair_conflict(s, availability), conflict.jensen_shannon(posterior, availability)


def of(posterior: np.ndarray, prior: np.ndarray, availability: np.ndarray | None = None):
    """`measures` of posteriors [m k] at one voxel, in numpy: (kappa of pairs [p], contested [k], js)."""
    mu = np.ones(len(posterior)) if availability is None else availability
    found = measures(*(np.float32(x) for x in (posterior[None, :, None], prior[None, None], mu[None, :, None])))
    return tuple(np.asarray(x).reshape(-1) if x.size > 1 else float(x.reshape(())) for x in found)


def binary(*p: float) -> np.ndarray:
    return np.stack([1 - np.array(p), np.array(p)], axis=-1)


@pytest.mark.parametrize(
    ("p1", "p2", "pi", "kappa", "js"),
    [
        (0.95, 0.95, 0.5, 0.0, 0.0),
        (0.70, 0.90, 0.5, 0.0, 0.047),
        (0.95, 0.50, 0.5, 0.0, 0.205),  # ignorance: JS fires, conflict must not
        (0.95, 0.10, 0.1, 0.0, 0.620),
        (0.95, 0.05, 0.5, 0.810, 0.714),
        (0.95, 0.05, 0.1, 0.353, 0.714),
        (0.95, 0.01, 0.5, 0.882, 0.815),
        (0.95, 0.01, 0.1, 0.824, 0.815),
        (0.80, 0.20, 0.5, 0.360, 0.278),
        (0.80, 0.20, 0.1, 0.0, 0.278),  # at base rate .1, saying .2 supports the lesion
    ],
)
def test_table(p1, p2, pi, kappa, js):
    got_kappa, _, got_js = of(binary(p1, p2), binary(pi)[0])
    assert got_kappa == pytest.approx(kappa, abs=1e-3)
    assert got_js == pytest.approx(js, abs=1e-3)


@pytest.mark.parametrize(("rho1", "rho2", "kappa"), [(0.95, 0.7, 0.36), (0.9, 0.9, 0.64), (0.9, 0.8, 0.48)])
@pytest.mark.parametrize("pi", [0.5, 0.1, 0.02])
def test_readers_of_fixed_reliability_conflict_alike_at_every_base_rate(rho1, rho2, kappa, pi):
    posterior = expit(logit(pi) + np.array([logit(rho1), -logit(rho2)]))
    assert of(binary(*posterior), binary(pi)[0])[0] == pytest.approx(kappa, abs=1e-3)


@pytest.mark.parametrize(("p1", "p2"), [(0.9, 0.2), (0.95, 0.3)])
def test_the_base_rate_must_be_positional(p1, p2):
    """At a site where half the candidates are lesions, the global frequency takes "probably not" for support."""
    assert of(binary(p1, p2), binary(0.5)[0])[0] > 0.3
    assert of(binary(p1, p2), binary(0.05)[0])[0] == 0.0


def posteriors(modalities: int):
    """A random problem: (posteriors [m k], prior [k])."""

    def build(k, seed, sharpness):
        rng = np.random.default_rng(seed)
        prior = rng.dirichlet(np.full(k, 2.0)) * 0.95 + 0.05 / k
        return rng.dirichlet(np.full(k, sharpness), size=modalities) * (1 - 1e-4) + 1e-4 / k, prior

    return st.builds(build, st.integers(2, 5), st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 1.0, 5.0]))


@settings(max_examples=60, deadline=None)
@given(posteriors(2))
def test_axioms(problem):
    posterior, prior = problem
    kappa, contested, _ = of(posterior, prior)
    assert 0 <= kappa <= 1 + 1e-6
    assert np.all(contested >= 0)
    swapped = of(posterior[::-1], prior)
    assert swapped[0] == pytest.approx(kappa, abs=1e-6)
    np.testing.assert_allclose(swapped[1], contested, atol=1e-6)
    assert of(np.stack([posterior[0]] * 2), prior)[0] == 0.0
    assert of(np.stack([posterior[0], prior]), prior)[0] == pytest.approx(0.0, abs=1e-6)
    for mu in ([1, 0], [0, 1], [0, 0]):
        alone = of(posterior, prior, np.array(mu))
        assert alone[0] == 0.0
        assert np.all(alone[1] == 0.0)
    order = np.random.default_rng(0).permutation(len(prior))
    relabelled = of(posterior[:, order], prior[order])
    assert relabelled[0] == pytest.approx(kappa, abs=1e-5)
    np.testing.assert_allclose(relabelled[1], contested[order], atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(posteriors(2))
def test_against_the_definition(problem):
    """Numpy in float64, by sums over pairs of classes."""
    posterior, prior = problem
    k = len(prior)
    q = posterior / prior
    q = q / q.sum(axis=-1, keepdims=True)
    s = np.maximum(0, (q - 1 / k) / (1 - 1 / k))
    d = s[0] - s[1]
    expected = max(0.0, -sum(d[i] * d[j] for i, j in itertools.combinations(range(k), 2)))
    kappa, contested, _ = of(posterior, prior)
    assert kappa == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(
        contested, [max(0.0, -d[i] * sum(d[j] for j in range(k) if j != i)) for i in range(k)], atol=1e-5
    )


def test_two_classes_give_dempsters_conflict_mass():
    support = jax.jit(conflict.support)
    p = np.random.default_rng(0).uniform(0.01, 0.99, size=(20, 2))
    for one in p:
        kappa, contested, _ = of(binary(*one), binary(0.3)[0])
        s = np.asarray(support(np.float32(binary(*one))[None, :, None], np.float32([[[0.7, 0.3]]])))[0, :, 0]
        assert kappa == pytest.approx(s[0, 0] * s[1, 1] + s[0, 1] * s[1, 0], abs=1e-6)
        np.testing.assert_allclose(contested, kappa, atol=1e-6)


def test_certain_contradiction_is_one():
    assert of(binary(0.0, 1.0), binary(0.5)[0])[0] == pytest.approx(1.0, abs=1e-6)
    three = np.array([[1.0, 0, 0], [0, 0, 1.0]])
    kappa, contested, _ = of(three, np.full(3, 1 / 3))
    assert kappa == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(contested, [1, 0, 1], atol=1e-6)


def test_the_strongest_pair_counts_and_a_missing_modality_does_not():
    posterior = binary(0.9, 0.2, 0.5)
    kappa, _, js = of(posterior, binary(0.5)[0])
    np.testing.assert_allclose(kappa, [0.48, 0, 0], atol=1e-5)  # pairs (0, 1), (0, 2), (1, 2)
    np.testing.assert_array_equal(conflict.pairs(3), [[0, 1], [0, 2], [1, 2]])
    assert float(conflict.strongest(jnp.asarray(kappa)[None, :, None])[0, 0]) == pytest.approx(0.48, abs=1e-5)
    # JS of what is available does not see the one that is not.
    some = of(binary(0.9, 0.01, 0.5), binary(0.5)[0], np.array([1, 0, 1]))
    np.testing.assert_array_equal(some[0], 0.0)
    assert some[2] == pytest.approx(of(binary(0.9, 0.5), binary(0.5)[0])[2], abs=1e-6)
    assert js != pytest.approx(some[2], abs=1e-2)


def test_one_modality_has_no_pairs():
    assert conflict.pairs(1).shape == (0, 2)
    posterior = np.full((1, 1, 4, 2), 0.5, np.float32)
    kappa, contested, js = measures(posterior, posterior[:, 0], np.ones((1, 1, 4), np.float32))
    assert kappa.shape == (1, 0, 4)
    np.testing.assert_array_equal(jax.jit(conflict.strongest)(kappa), np.zeros((1, 4)))
    np.testing.assert_array_equal(contested, np.zeros((1, 4, 2)))
    np.testing.assert_array_equal(js, np.zeros((1, 4)))


def test_gate():
    kappa = jnp.array([0.0, conflict.TAU, 1.0])
    np.testing.assert_allclose(conflict.gate(kappa), [0, 1 - 1 / np.e, 1], atol=1e-4)
    assert float(conflict.gate(kappa)[0]) == 0.0
    np.testing.assert_array_equal(conflict.gate(kappa, 1.0), 1.0)
    np.testing.assert_allclose(conflict.gate(kappa, 0.5), 0.5 + 0.5 * conflict.gate(kappa), rtol=1e-6)


def test_entropy_at_the_corners():
    p = jnp.array([[1.0, 0.0], [0.5, 0.5]])
    np.testing.assert_allclose(conflict.entropy(p), [0, np.log(2)], atol=1e-6)
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(conflict.entropy(x))))(p)))
