"""The terms of EnFuse's objective against numpy, and the laws of what dropout draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from entrust_jax.enfuse import objective

RNG = np.random.default_rng(0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


xcov = jax.jit(objective.xcov)
xcov_gradient = jax.jit(jax.value_and_grad(objective.xcov, argnums=(0, 1)))


def mean_r2(y: np.ndarray, z: np.ndarray) -> float:
    return float(np.mean(np.corrcoef(y.T, z.T)[: y.shape[1], y.shape[1] :] ** 2))


# Independence -----------------------------------------------------------------------------------------------------


def test_xcov_is_the_mean_squared_correlation_of_the_samples_in_the_mask():
    y, z = normal(64, 3), normal(64, 2, seed=1)
    z = z + y[:, :2] + 3
    mask = (RNG.uniform(size=64) < 0.6).astype(np.float32)
    inside = mask > 0
    np.testing.assert_allclose(xcov(y, z, mask), mean_r2(y[inside], z[inside]), rtol=1e-4)
    np.testing.assert_allclose(xcov(y, y[:, :1], np.ones(64, np.float32)), mean_r2(y, y[:, :1]), rtol=1e-4)
    garbage = np.where(inside[:, None], y, 1e3).astype(np.float32)
    np.testing.assert_allclose(xcov(garbage, z, mask), xcov(y, z, mask), rtol=1e-4)


def test_xcov_is_free_of_scale_and_shift_and_so_is_its_gradient():
    y, z = normal(64, 3), normal(64, 2, seed=1)
    z = z + y[:, :2]
    one = np.ones(64, np.float32)
    scale = np.array([[0.3, 5.0, 40.0]], np.float32)
    np.testing.assert_allclose(xcov(y * scale - 7, 0.5 * z + 3, one), xcov(y, z, one), rtol=1e-3)
    # Shrinking the features must not pay: the gradient has no component along them.
    _, (gradient, _) = xcov_gradient(y, z, one)
    along = np.sum(np.asarray(gradient) * y, axis=0)
    size = np.linalg.norm(gradient, axis=0) * np.linalg.norm(y, axis=0)
    assert np.all(np.abs(along) < 1e-4 * size)
    assert np.all(size > 1e-3)


def test_xcov_of_a_known_mixture():
    """y = A z + e: R^2_ij = A_ij^2 / (sum_j A_ij^2 + var e)."""
    mix, noise, n = np.array([[1.0, 0.5], [0.0, 2.0], [0.2, 0.0]]), 0.7, 40000
    z = normal(n, 2)
    y = z @ mix.T + noise * normal(n, 3, seed=1)
    expected = np.mean(mix**2 / ((mix**2).sum(1, keepdims=True) + noise**2))
    np.testing.assert_allclose(xcov(y.astype(np.float32), z, np.ones(n, np.float32)), expected, rtol=0.02)


@pytest.mark.parametrize("n", [32, 128])
def test_xcov_of_independent_data_is_one_over_n_minus_one(n):
    y, z = normal(400, n, 4), normal(400, n, 4, seed=1)
    values = jax.jit(jax.vmap(objective.xcov, in_axes=(0, 0, None)))(y, z, np.ones(n, np.float32))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 1 / (n - 1)) < 4 * error
    assert error < 0.05 / n


def test_xcov_is_the_same_on_one_and_on_eight_devices():
    assert len(jax.devices()) == 8
    y, z = normal(64, 3), normal(64, 2, seed=1)
    z = z + y[:, :2]
    mask = (RNG.uniform(size=64) < 0.8).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    sharded = [jax.device_put(x, split) for x in (y, z, mask)]
    assert len(sharded[0].addressable_shards) == 8
    for one, eight in zip(
        jax.tree.leaves(xcov_gradient(y, z, mask)), jax.tree.leaves(xcov_gradient(*sharded)), strict=True
    ):
        np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [np.ones(16, np.float32), np.zeros(16, np.float32)])
def test_xcov_has_finite_gradients_without_variance(mask):
    value, gradient = xcov_gradient(np.ones((16, 2), np.float32), normal(16, 3), mask)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in gradient)


def test_centring_per_case_takes_offsets_between_cases_out():
    x, mask = normal(3, 10, 2), (RNG.uniform(size=(3, 10)) < 0.7).astype(np.float32)
    offset = np.array([[[5.0]], [[-3.0]], [[40.0]]], np.float32)
    centre = jax.jit(objective.centred_per_case)
    centred = np.asarray(centre(x, mask))
    np.testing.assert_allclose((centred * mask[..., None]).sum(1), 0, atol=1e-5)
    np.testing.assert_allclose(centre(x + offset, mask), centred, atol=1e-4)


def two_centrings(y: np.ndarray, z: np.ndarray, mask: np.ndarray) -> float:
    """Mean of the pooled and the per-case squared correlations, in numpy."""
    keep = mask > 0
    pooled = mean_r2(y[keep], z[keep])
    within = [np.concatenate([x[b][k] - x[b][k].mean(0) for b, k in enumerate(keep) if k.any()]) for x in (y, z)]
    ys, zs = within
    return (pooled + mean_r2(ys, zs)) / 2


def test_independence_weighs_the_pairs():
    m, b, n = 3, 2, 16
    F_c, F_cf = normal(b, n, 4), normal(b, n, 4, seed=1)
    c, u = normal(m, b, n, 4, seed=2), normal(m, b, n, 2, seed=3)
    mask = (np.arange(n)[None] < np.array([[12], [16]])).astype(np.float32)
    present = np.array([[1, 1], [1, 1], [1, 0]], np.float32)
    masks = mask[None] * present[..., None]
    values = []
    for i in range(m):
        values.append(1.0 * two_centrings(F_c, u[i], masks[i]))
        values.append(1.0 * two_centrings(c[i], u[i], masks[i]))
        values.append(0.5 * two_centrings(u[i], F_cf, masks[i]))
    values.append(0.25 * two_centrings(F_c, F_cf, mask))
    for i, j in itertools.combinations(range(m), 2):
        values.append(0.25 * two_centrings(u[i], u[j], masks[i] * masks[j]))
    got = jax.jit(objective.independence)(F_c, F_cf, c, u, mask, present)
    np.testing.assert_allclose(got, np.mean(values), rtol=1e-4)


def test_independence_of_a_single_modality():
    x = normal(1, 2, 16, 2)
    mask, present = np.ones((2, 16), np.float32), np.ones((1, 2), np.float32)
    got = jax.jit(objective.independence)(x[0], x[0] ** 2, x, x, mask, present)
    assert np.isfinite(got)
    assert got > 0.25  # F_c = u: dependent


# Anti-collapse, alignment, grounding ------------------------------------------------------------------------------


def test_the_variance_hinge():
    x = normal(500, 3) * np.array([[0.2, 1.5, 0.0]], np.float32) + 5
    mask = np.ones(500, np.float32)
    mask[400:] = 0
    x[400:] = 1e3
    hinge = jax.jit(objective.variance_hinge)
    got = hinge(x, mask)
    np.testing.assert_allclose(got, [1 - np.std(x[:400, 0]), 0, 0.99], atol=2e-3)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(hinge(x, mask))))(x)
    assert np.all(np.isfinite(gradient))


def test_alignment_acts_only_where_there_is_no_conflict():
    m, b, n, d = 3, 2, 5, 4
    c = normal(m, b, n, d)
    kappa = RNG.uniform(size=(3, b, n)).astype(np.float32)
    kappa[:, :, 0] = 1.0
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]], np.float32)
    present = np.array([[1, 1], [1, 1], [0, 1]], np.float32)
    top = bottom = 0.0
    for p, (i, j) in enumerate(itertools.combinations(range(m), 2)):
        w = (present[i] * present[j])[:, None] * mask
        top += np.sum(w * (1 - kappa[p]) * np.sqrt(np.mean((c[i] - c[j]) ** 2, axis=-1) + 1e-3))
        bottom += w.sum()
    value, (by_c, by_kappa) = jax.jit(jax.value_and_grad(objective.alignment, argnums=(0, 1)))(c, kappa, mask, present)
    np.testing.assert_allclose(value, top / bottom, rtol=1e-5)
    assert np.all(np.asarray(by_kappa) == 0)  # no reward for raising the conflict
    assert np.all(np.asarray(by_c)[:, :, 0] == 0)
    assert np.any(np.asarray(by_c)[:, :, 1] != 0)


def test_alignment_of_equal_or_single_modalities():
    c, none = normal(2, 1, 4, 3), np.zeros((1, 1, 4), np.float32)
    one, there = np.ones((1, 4), np.float32), np.ones((2, 1), np.float32)
    gradient = jax.jit(jax.grad(objective.alignment))(np.stack([c[0], c[0]]), none, one, there)
    assert np.all(np.isfinite(gradient))
    assert float(jax.jit(objective.alignment)(c[:1], none[:0], one, there[:1])) == 0.0


def test_unimodal_is_the_mean_over_the_modalities_that_are_there():
    logits, label = normal(3, 2, 4, 2), np.array([[0, 1, 1, -1], [1, 0, 0, 0], [1, 1, 1, 1]], np.int32)
    body = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]], np.float32)
    present = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    weight = np.array([0.5, 2.0, 1.0], np.float32)
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    ce = -np.take_along_axis(log_p, np.maximum(label, 0)[:, None, :, None], axis=-1)[..., 0] * (label >= 0)[:, None]
    per = (ce * body[:, None]).sum(-1) / body.sum(-1)[:, None]
    expected = (0.5 * per[0, 0] + 2.0 * per[1].mean() + 0.0) / 3
    got, gradient = jax.jit(jax.value_and_grad(objective.unimodal))(logits, label, body, present, weight)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert np.all(np.asarray(gradient)[0, 1] == 0)
    assert np.all(np.asarray(gradient)[2] == 0)


def test_total_weighs_its_terms():
    terms = {name: jnp.float32(10.0**-i) for i, name in enumerate(objective.WEIGHTS)}
    expected = sum(objective.WEIGHTS[name] * 10.0**-i for i, name in enumerate(objective.WEIGHTS))
    np.testing.assert_allclose(objective.total(terms), expected, rtol=1e-6)
    without = objective.total(terms, xcov_ramp=0.0)
    np.testing.assert_allclose(without, expected - objective.WEIGHTS["xcov"] * terms["xcov"], rtol=1e-6)


# What dropout draws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", [(1, 1, 1), (1, 0, 1), (0, 1, 0)])
def test_modality_dropout_is_uniform_over_non_empty_subsets(present):
    n = 20000
    here = np.array(present, bool)
    drawn = np.asarray(jax.jit(objective.modality_dropout)(jax.random.key(1), np.broadcast_to(here, (n, 3))))
    assert not np.any(drawn & ~here)
    assert np.all(drawn.any(axis=1))
    subsets = [s for s in itertools.product([False, True], repeat=3) if any(s) and not np.any(np.array(s) & ~here)]
    for subset in subsets:
        p = 0.5 / len(subsets) + 0.5 * (subset == tuple(here.tolist()))
        count = np.sum(np.all(drawn == np.array(subset), axis=1))
        assert abs(count - n * p) <= 4.5 * np.sqrt(n * p * (1 - p))


def test_modality_dropout_of_nothing_is_nothing():
    drawn = jax.jit(objective.modality_dropout)(jax.random.key(1), np.zeros((20000, 3), bool))
    assert not np.any(drawn)


def test_availability_draws_every_condition_that_probing_asks_about():
    n, space = 4000, (8, 8)
    present = np.ones((n, 3), bool)
    present[: n // 2, 2] = False
    null = np.arange(n) % 10 == 0
    draw = jax.jit(objective.availability_dropout, static_argnames="space")
    mu, scale = map(np.asarray, draw(jax.random.key(0), present, space=space, null=null))
    assert mu.shape == (n, 3, *space)
    assert set(np.unique(mu)) == {0.0, 1.0}
    assert np.all(mu[null] == 0)
    assert np.all(mu[: n // 2, 2] == 0)
    share = np.mean(scale == 0)
    assert set(np.unique(scale)) == {0.0, 1.0}
    assert abs(share - 0.1) < 4.5 * np.sqrt(0.09 / n)
    partial = np.any(mu != mu[:, :, :1, :1], axis=(2, 3))
    assert np.all(partial.sum(axis=1) <= 1)  # one modality loses one region
    assert 0.02 < np.mean(partial.any(axis=1)) < 0.1
    whole = mu.max(axis=(2, 3))[~null]
    assert np.mean(np.all(whole == present[~null], axis=1)) > 0.5
