"""The denoiser alone, on random conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax.layers import apply, pool
from entrust_jax.segdiff.denoiser import BOUND, Denoiser, Projection, Projections, bounded, seen_at
from entrust_jax.segdiff.schedule import alpha_sigma, decision_log_snr, diffuse, own_evidence

B, M, K, WIDTHS = 2, 3, 3, (4, 8)
DENOISER = Denoiser(K, WIDTHS, b=0.2, strides=((2, 2), (2, 2)), d_embedding=8)
PROJECTION = Projection(WIDTHS, 8)


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARTS = (
    tuple(some(B, n, n, 5, seed=n) for n in (4, 2)),
    tuple(some(B, M, n, n, 3, seed=n + 1) for n in (4, 2)),
    tuple(some(B, n, n, 5, seed=n + 2) for n in (4, 2)),
    np.float32([[1, 1, 1], [1, 0, 1]]),
    np.ones((B, 8, 8), np.float32),
)
X, LOG_SNR = some(B, 8, 8, K), np.float32([-12, 3])


def condition_of(seed: int = 0) -> Projections:
    a = tuple(some(B, n, n, w, seed=seed + n) for n, w in zip((4, 2), WIDTHS, strict=True))
    modulation = tuple(0.3 * some(B, n, n, w, seed=seed + n + 7) for n, w in zip((4, 2), WIDTHS, strict=True))
    return Projections(a, modulation, some(B, 8, seed=seed), np.ones((B, 8, 8), np.float32))


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(DENOISER.init, jax.random.key(0), X, LOG_SNR, condition_of())
    return jax.tree.map(lambda x: 0.5 * some(*x.shape), shapes)


@jax.jit
def denoise(params, x, log_snr, condition):
    return apply(DENOISER, params, x, log_snr, condition)


@jax.jit
def project(params, *parts):
    return apply(PROJECTION, params, *parts)


@pytest.mark.parametrize("space", [(8,), (8, 16), (8, 8, 4)])
@pytest.mark.parametrize("factor", [1, 2])
def test_shapes(space, factor):
    """As many spatial axes as the input has."""
    net = Denoiser(K, WIDTHS, b=0.1, strides=((factor,) * len(space), (2,) * len(space)))
    grids = [tuple(n // (factor * 2**s) for n in space) for s in range(2)]
    maps = tuple(jnp.zeros((B, *grid, w)) for grid, w in zip(grids, WIDTHS, strict=True))
    condition = Projections(maps, maps, jnp.zeros((B, 64)), jnp.ones((B, *space)))
    arrays = jnp.zeros((B, *space, K)), jnp.zeros(B), condition
    logits = jax.eval_shape(net.init_with_output, jax.random.key(0), *arrays)[0]
    assert logits.shape == (B, *space, K)
    assert logits.dtype == jnp.float32


def test_starts_at_the_background():
    """Background plus what each voxel's own value says: the last kernel is zero, its bias favours class 0."""
    init = jax.jit(DENOISER.init)(jax.random.key(0), X, LOG_SNR, condition_of())
    alpha2, sigma2 = 1 / (1 + np.exp(-LOG_SNR)), 1 / (1 + np.exp(LOG_SNR))
    own = (2 * np.sqrt(alpha2) * DENOISER.b / sigma2)[:, None, None, None] * X
    logits = denoise(init, X, LOG_SNR, condition_of())
    np.testing.assert_allclose(logits, np.array([3.0, 0, 0]) + own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [(1, 1), (2, 2), (8, 4)])
def test_a_scale_sees_what_its_voxels_say_together(factor):
    """Two uniform masks stand apart by 2 alpha b sqrt(n) / sigma of it: 5 where n values are decided."""
    n, b = int(np.prod(factor)), 0.2
    log_snr = decision_log_snr(n, b)[None]
    noise = jnp.asarray(some(1, 160, 160, 1))
    mask = jnp.ones_like(noise)
    low, high = (seen_at(diffuse(s * b * mask, log_snr, noise), log_snr, b, factor) for s in (-1, 1))
    high, low, alone = (np.asarray(x) for x in (high, low, seen_at(noise, jnp.full(1, -12.0), b, factor)))
    assert np.mean(high - low) / np.std(high) == pytest.approx(5, rel=0.05)
    assert np.mean(np.square(high)) == pytest.approx(1, rel=0.1)
    assert np.std(alone) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("deaf", "hears"), [(WIDTHS[0], True), (WIDTHS[0] + K, False)])
def test_a_coarse_scale_hears_of_a_mask_that_no_voxel_shows(params, deaf, hears):
    """Without scale 0's own input, and what it hands down, scale 1 still tells one noisy mask from another."""
    others = jax.tree.map(np.array, params)
    others["params"]["enter_0"]["Conv_0"]["kernel"][:] = 0
    others["params"]["enter_1"]["Conv_0"]["kernel"][..., :deaf, :] = 0
    noise = np.full(B, -12, np.float32)
    low, high = (denoise(others, s * 0.01 * np.ones_like(X), noise, condition_of()) for s in (-1, 1))
    assert (np.max(np.abs(high - low)) > 1e-3) == hears


def test_a_block_says_what_its_voxels_say_together_and_no_more_than_it_may():
    """The log odds of a mask that is one or the other as a whole, while they are small; BOUND of them where not."""
    x, log_snr, b = jnp.asarray(some(1, 4, 4, 2)), jnp.full(1, -3.0), 0.05
    mask = np.broadcast_to([-b, b], x.shape)  # foreground; background is its negative
    alpha, sigma = (np.asarray(v).item() for v in alpha_sigma(log_snr))
    fit = [-0.5 * np.sum(np.square(np.asarray(x) - alpha * sign * mask)) / sigma**2 for sign in (-1, 1)]
    own = own_evidence(x, log_snr, b)
    said = bounded(pool(own, (4, 4), jnp.sum))
    assert said.shape == (1, 1, 1, 2)
    # Two channels, each of which says half of it: what a voxel adds to the logits of foreground and background.
    assert (said[0, 0, 0, 1] - said[0, 0, 0, 0]).item() == pytest.approx(fit[1] - fit[0], rel=0.02)
    assert np.max(np.abs(bounded(pool(1000 * own, (4, 4), jnp.sum)))) <= BOUND


def test_the_reach_decides_how_far_a_neighbour_is_heard(params):
    """A voxel's logits move with another's noisy value as far as the reach of the scale in which both are one."""
    others = jax.tree.map(np.zeros_like, params)
    moved = np.zeros_like(X)
    moved[0, 0, 0, 1] = 0.5
    # Share of the block that each voxel hears, along an axis; scale 1 is carried up linearly, zero beyond the border.
    heard = {0: [1, 1, 0, 0, 0, 0, 0, 0], 1: [0.75, 0.75, 0.75, 0.75, 0.25, 0.25, 0, 0]}
    for s, share in heard.items():
        (layer,) = others["params"]["reach"].values()
        layer["bias"][:] = np.eye(2)[s]
        noise = np.full(B, -3, np.float32)
        with_, without = (np.asarray(denoise(others, x, noise, condition_of())) for x in (moved, np.zeros_like(X)))
        change = (with_ - without)[0, ..., 1]
        own = np.asarray(own_evidence(jnp.asarray(moved[:1]), jnp.asarray(noise[:1]), DENOISER.b))[0, 0, 0, 1]
        expected = np.outer(share, share) * BOUND * np.tanh(own / BOUND)
        expected[0, 0] += own
        np.testing.assert_allclose(change, expected, atol=1e-5, err_msg=str(s))


def test_conflict_does_not_modulate_at_the_start(params):
    """Gf is zero at initialisation; the path is open to learning: other gains change the logits."""
    projections = project(jax.jit(PROJECTION.init)(jax.random.key(0), *PARTS), *PARTS)
    for modulation in projections.modulation:
        assert np.all(np.asarray(modulation) == 0)
    assert any(np.any(np.asarray(a) != 0) for a in projections.a)
    condition = condition_of()
    still = condition.replace(modulation=tuple(np.zeros_like(x) for x in condition.modulation))
    assert np.any(np.abs(denoise(params, X, LOG_SNR, condition) - denoise(params, X, LOG_SNR, still)) > 1e-3)


def test_projections_are_linear_in_the_parts():
    """a = W_c F_c + b + W_u sum_m P_m F_u,m + W_f F_cf, G = Gf F_cf, in numpy."""
    shapes = jax.eval_shape(PROJECTION.init, jax.random.key(0), *PARTS)
    params = jax.tree.map(lambda x: some(*x.shape), shapes)
    got = project(params, *PARTS)
    F_c, F_u, F_cf, present, _ = PARTS
    p = params["params"]
    for s in range(2):
        dense = {name: p[f"{name}_{s}"]["Dense_0"] for name in ("consensus", "cue", "conflict", "gain")}
        specific = sum(F_u[s][:, m] @ p[f"specific_{s}"][m] for m in range(M))
        a = F_c[s] @ dense["consensus"]["kernel"] + dense["consensus"]["bias"]
        a = a + specific @ dense["cue"]["kernel"] + F_cf[s] @ dense["conflict"]["kernel"]
        np.testing.assert_allclose(got.a[s], a, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(got.modulation[s], F_cf[s] @ dense["gain"]["kernel"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(got.embedding, present @ p["modality"], atol=1e-5)


def test_cases_are_independent_and_every_input_matters(params):
    condition, other = condition_of(), condition_of(seed=50)
    before = np.asarray(denoise(params, X, LOG_SNR, condition))
    second = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), condition, other)
    changes = {
        "x": denoise(params, np.concatenate([X[:1], X[:1]]), LOG_SNR, condition),
        "log_snr": denoise(params, X, np.float32([-12, 4]), condition),
        "a": denoise(params, X, LOG_SNR, condition.replace(a=second.a)),
        "modulation": denoise(params, X, LOG_SNR, condition.replace(modulation=second.modulation)),
        "embedding": denoise(params, X, LOG_SNR, condition.replace(embedding=second.embedding)),
    }
    for name, after in changes.items():
        np.testing.assert_array_equal(after[0], before[0], err_msg=name)
        assert np.max(np.abs(after[1] - before[1])) > 1e-3, name


def test_noise_in_air_is_not_seen(params):
    condition = condition_of()
    body = np.array(condition.body)
    body[:, :, 5:] = 0
    condition = condition.replace(body=body)
    other = np.where(body[..., None] > 0, X, 100 * some(*X.shape, seed=3)).astype(np.float32)
    before, after = denoise(params, X, LOG_SNR, condition), denoise(params, other, LOG_SNR, condition)
    np.testing.assert_array_equal(before[:, :, :5], after[:, :, :5])
