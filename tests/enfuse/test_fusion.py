"""Fusion of given evidence: exact zeros without conflict, exact ignorance of what is missing, no gradient to kappa."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax.enfuse.encoder import Evidence
from entrust_jax.enfuse.fusion import Auxiliary, Fusion, masked_softmax, pool_maps
from entrust_jax.layers import apply

B, M, K, SIZE = 2, 3, 2, 8
FUSION = Fusion(d_f=4, strides=((1, 1), (2, 2)))
ONES = np.ones((B, M, SIZE, SIZE), np.float32)


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def evidence_of(seed: int = 0, sharpness: float = 2.0) -> Evidence:
    """Random evidence at two scales, the prior near .5."""
    grids = (SIZE, SIZE // 2)
    return Evidence(
        c=tuple(some(B, M, n, n, 4, seed=seed + n) for n in grids),
        u=tuple(some(B, M, n, n, 3, seed=seed + n + 1) for n in grids),
        reliability=tuple(some(B, M, n, n, seed=seed + n + 2) for n in grids),
        logits=sharpness * some(B, M, SIZE, SIZE, K, seed=seed + 3),
        prior_logits=0.1 * some(B, SIZE, SIZE, K, seed=seed + 4),
        body=np.ones((B, SIZE, SIZE), np.float32),
    )


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(FUSION.init, jax.random.key(0), evidence_of(), ONES)
    return jax.tree.map(lambda x: some(*x.shape), shapes)


@jax.jit
def fuse(params, evidence, availability, rho=0.0, conflict_scale=None):
    scale = jnp.ones(B) if conflict_scale is None else conflict_scale
    return apply(FUSION, params, evidence, availability, rho=rho, conflict_scale=scale)


def with_modality(evidence: Evidence, to: int, of: Evidence, source: int) -> Evidence:
    """The evidence with modality `to` replaced by modality `source` of another."""

    def put(a, b):
        a = np.array(a)
        a[:, to] = b[:, source]
        return a

    replaced = {name: getattr(evidence, name) for name in ("c", "u", "reliability", "logits")}
    other = {name: getattr(of, name) for name in replaced}
    return evidence.replace(**jax.tree.map(put, replaced, other))


def test_the_equations(params):
    """Weights, F_c, F_u and the input of psi in numpy at scale 0; psi is bias-free, gated by g."""
    evidence, mu = evidence_of(), ONES.copy()
    mu[1, 2] = 0
    fused = fuse(params, evidence, mu)
    e = mu * np.exp(evidence.reliability[0])
    w = e / e.sum(1, keepdims=True)
    np.testing.assert_allclose(fused.weights, w, atol=1e-5)
    F_c = (w[..., None] * evidence.c[0]).sum(1)
    np.testing.assert_allclose(fused.F_c[0], F_c, atol=1e-5)
    np.testing.assert_allclose(fused.F_u[0], mu[..., None] * evidence.u[0], atol=1e-6)
    np.testing.assert_array_equal(fused.present, [[1, 1, 1], [1, 1, 0]])
    s, d = np.asarray(fused.support), {}
    for p, (i, j) in enumerate(itertools.combinations(range(M), 2)):
        d = s[:, i] - s[:, j]
        kappa = mu[:, i] * mu[:, j] * np.maximum(0, (np.sum(d**2, -1) - np.sum(d, -1) ** 2) / 2)
        np.testing.assert_allclose(fused.kappa_pairs[:, p], kappa, atol=1e-5)
    np.testing.assert_allclose(fused.kappa, np.max(fused.kappa_pairs, axis=1), atol=1e-6)
    assert np.mean(fused.kappa > 0.2) > 0.2  # the evidence does conflict: the zeros below are no accident
    assert all(np.any(np.abs(x) > 0.01) for x in fused.F_cf)


def test_equal_evidence_has_no_conflict_features(params):
    same = evidence_of()
    for m in (1, 2):
        same = with_modality(same, m, same, 0)
    fused = fuse(params, same, ONES)
    for x in (*fused.F_cf, fused.kappa, fused.kappa_pairs):
        assert np.all(np.asarray(x) == 0)
    np.testing.assert_allclose(fused.F_c[0], same.c[0][:, 0], atol=1e-5)
    opened = fuse(params, same, ONES, rho=1.0)  # psi(0) = 0: nothing even where the gate is forced open
    assert all(np.all(np.abs(x) < 1e-4) for x in opened.F_cf)


@pytest.mark.parametrize("there", range(M))
def test_a_single_modality_has_no_conflict_features(params, there):
    mu = np.zeros_like(ONES)
    mu[:, there] = 1
    fused = fuse(params, evidence_of(), mu)
    for x in (*fused.F_cf, fused.kappa, fused.kappa_pairs, fused.js):
        assert np.all(np.asarray(x) == 0)
    np.testing.assert_allclose(fused.F_c[0], evidence_of().c[0][:, there], atol=1e-5)


def test_a_missing_modality_changes_no_bit(params):
    mu = ONES.copy()
    mu[:, 1] = 0
    evidence = evidence_of()
    garbage = jax.tree.map(lambda x: np.full_like(x, 1e4) * np.sign(some(*x.shape, seed=9)), evidence)
    one, two = fuse(params, evidence, mu), fuse(params, with_modality(evidence, 1, garbage, 1), mu)
    for name in ("F_c", "F_u", "F_cf", "weights", "kappa", "kappa_pairs", "js", "present"):
        for a, b in zip(jax.tree.leaves(getattr(one, name)), jax.tree.leaves(getattr(two, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    full = fuse(params, evidence, ONES)
    assert np.any(full.F_c[0] != one.F_c[0])


def test_nothing_available(params):
    fused = fuse(params, evidence_of(), 0 * ONES)
    for x in jax.tree.leaves((fused.F_c, fused.F_u, fused.F_cf, fused.weights, fused.kappa, fused.js, fused.present)):
        assert np.all(np.asarray(x) == 0)


def test_silencing_a_region_is_a_local_subset(params):
    evidence, mu, without = evidence_of(), ONES.copy(), ONES.copy()
    mu[:, 1, :4, :4] = 0
    without[:, 1] = 0
    local, none, full = fuse(params, evidence, mu), fuse(params, evidence, without), fuse(params, evidence, ONES)
    for scale, n in enumerate((4, 2)):
        np.testing.assert_array_equal(local.F_c[scale][:, :n, :n], none.F_c[scale][:, :n, :n])
        np.testing.assert_array_equal(local.F_c[scale][:, n:], full.F_c[scale][:, n:])
    np.testing.assert_array_equal(local.kappa[:, :4, :4], none.kappa[:, :4, :4])
    np.testing.assert_array_equal(local.kappa[:, 4:], full.kappa[:, 4:])
    np.testing.assert_array_equal(local.present, 1.0)


def test_conflict_features_live_where_conflict_is(params):
    """The other modalities repeat modality 0 but in one voxel: F_cf is zero wherever kappa is, at every scale."""
    evidence = evidence_of()
    for m in (1, 2):
        evidence = with_modality(evidence, m, evidence, 0)
    logits = np.array(evidence.logits)
    logits[:, :, 5, 2] = [[-3, 3], [3, -3], [3, -3]]
    fused = fuse(params, evidence.replace(logits=logits), ONES)
    for scale, x in enumerate(fused.F_cf):
        found = np.any(np.asarray(x) != 0, axis=-1)
        assert found[:, 5 // 2**scale, 2 // 2**scale].all()
        assert found.sum() == B


def test_conflict_scale_removes_the_conflict_pathway_of_a_case(params):
    evidence = evidence_of()
    full, one = fuse(params, evidence, ONES), fuse(params, evidence, ONES, conflict_scale=np.float32([0, 1]))
    for a, b in zip(full.F_cf, one.F_cf, strict=True):
        assert np.all(np.asarray(b)[0] == 0)
        np.testing.assert_array_equal(a[1], b[1])
    for name in ("F_c", "F_u", "kappa", "weights"):
        for a, b in zip(jax.tree.leaves(getattr(full, name)), jax.tree.leaves(getattr(one, name)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_no_gradient_flows_into_posteriors_or_prior(params):
    """Else the features' loss would turn kappa into a hidden channel and it would stop meaning disagreement."""

    def use(evidence):
        fused = fuse(params, evidence, ONES)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves((fused.F_c, fused.F_u, fused.F_cf, fused.kappa, fused.js)))

    gradient = jax.jit(jax.grad(use))(evidence_of())
    assert np.all(np.asarray(gradient.logits) == 0)
    assert np.all(np.asarray(gradient.prior_logits) == 0)
    assert all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves((gradient.c, gradient.u, gradient.reliability)))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


def test_masked_softmax():
    r = np.array([[[0.0], [np.log(3.0)], [1e30]], [[0.0], [5.0], [-5.0]]], np.float32)
    mu = np.array([[[1.0], [1.0], [0.0]], [[0.0], [0.0], [0.0]]], np.float32)
    w = jax.jit(masked_softmax)(r, mu)
    np.testing.assert_allclose(w[..., 0], [[0.25, 0.75, 0], [0, 0, 0]], atol=1e-6)


def test_pool_maps():
    x = some(2, 3, 4, 6)
    expected = x.reshape(2, 3, 2, 2, 3, 2)
    np.testing.assert_allclose(pool_maps(jnp.asarray(x), (2, 2)), expected.mean(axis=(3, 5)), atol=1e-6)
    np.testing.assert_allclose(pool_maps(jnp.asarray(x), (2, 2), jnp.max), expected.max(axis=(3, 5)))
    assert pool_maps(jnp.zeros((2, 0, 4, 6)), (2, 2)).shape == (2, 0, 2, 3)


@pytest.mark.parametrize("factor", [1, 2])
def test_auxiliary_shapes(factor):
    evidence = evidence_of()
    shapes = jax.eval_shape(fuse, jax.eval_shape(FUSION.init, jax.random.key(0), evidence, ONES), evidence, ONES)
    cross = jnp.zeros((B, M, 4, 4, 4)), jnp.zeros((B, M, 4, 4, 3))
    head = Auxiliary(K, ((factor,) * 2, (2, 2)))
    logits, image = jax.eval_shape(head.init_with_output, jax.random.key(0), shapes, *cross)[0]
    assert logits.shape == (B, SIZE * factor, SIZE * factor, K)
    assert image.shape == (B, M, 4, 4)
