"""The blocks that networks share: folds of space are exact inverses, norms are local, modulation is by voxel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax import layers


def some(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("space", [(6,), (4, 6), (2, 4, 6)])
@pytest.mark.parametrize("factor", [1, 2])
def test_space_to_depth_and_back(space, factor):
    x = some(2, *space, 3)
    folded = layers.space_to_depth(jnp.asarray(x), (factor,) * len(space))
    assert folded.shape == (2, *(s // factor for s in space), 3 * factor ** len(space))
    np.testing.assert_array_equal(layers.depth_to_space(folded, (factor,) * len(space)), x)


def test_a_block_of_voxels_becomes_the_channels_of_one():
    x = some(1, 4, 4, 3)
    folded = layers.space_to_depth(jnp.asarray(x), (2, 2))
    np.testing.assert_array_equal(folded[0, 1, 0], x[0, 2:4, 0:2].reshape(-1))


def test_every_axis_has_a_factor_of_its_own():
    x = some(2, 3, 4, 8, 5)
    factor = (1, 2, 4)
    folded = layers.space_to_depth(jnp.asarray(x), factor)
    np.testing.assert_array_equal(folded[1, 2, 1, 0], x[1, 2, 2:4, 0:4].reshape(-1))
    np.testing.assert_array_equal(layers.depth_to_space(folded, factor), x)
    pooled = layers.pool(jnp.asarray(x), factor)
    np.testing.assert_allclose(pooled, x.reshape(2, 3, 2, 2, 2, 4, 5).mean(axis=(3, 5)), rtol=1e-5, atol=1e-6)
    wide = layers.upsample(pooled, factor)
    np.testing.assert_array_equal(wide, np.asarray(pooled).repeat(2, axis=2).repeat(4, axis=3))
    assert layers.cumulated(((1, 2, 2), (1, 2, 4), (2, 1, 2))) == ((1, 2, 2), (1, 4, 8), (2, 4, 16))


def test_linear_upsampling_leaves_an_axis_of_factor_1_alone():
    x = jnp.asarray(some(2, 3, 4, 6, 2))
    got = np.asarray(layers.upsample_linear(x, (1, 2, 4)))
    for i in range(3):
        plane = layers.upsample_linear(layers.upsample_linear(x[:, i], (2, 2)), (1, 2))
        np.testing.assert_allclose(got[:, i], plane, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_pool_reduces_blocks(reduce):
    x = some(2, 4, 6, 3)
    expected = getattr(x.reshape(2, 2, 2, 3, 2, 3), reduce)(axis=(2, 4))
    np.testing.assert_allclose(layers.pool(jnp.asarray(x), (2, 2), getattr(jnp, reduce)), expected, rtol=1e-6)
    np.testing.assert_array_equal(layers.pool(jnp.asarray(x), (1, 1)), x)


@pytest.mark.parametrize("space", [(3,), (2, 3), (2, 1, 3)])
def test_upsample_repeats_and_pool_undoes_it(space):
    x = some(2, *space, 2)
    y = layers.upsample(jnp.asarray(x), (2,) * len(space))
    expected = x
    for axis in range(1, x.ndim - 1):
        expected = np.repeat(expected, 2, axis=axis)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(layers.pool(y, (2,) * len(space)), x, rtol=1e-6)


def test_norms_see_the_channels_of_one_voxel():
    x = some(2, 3, 4, 8)
    rms, normal = jax.jit(layers.rms_norm)(x), jax.jit(layers.layer_norm)(x)
    np.testing.assert_allclose(rms, x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)), rtol=1e-4)
    np.testing.assert_allclose(np.mean(normal, axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(normal, axis=-1), 1, rtol=1e-4)
    one = jax.jit(layers.layer_norm)(x[:1, 1:2, 2:3])
    np.testing.assert_allclose(one, normal[:1, 1:2, 2:3], rtol=1e-6)


def test_norms_have_finite_gradients_at_a_constant_voxel():
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layers.layer_norm(x) ** 2)))(np.ones((1, 2, 4), np.float32))
    assert np.all(np.isfinite(gradient))


def test_norms_of_bfloat16_have_the_statistics_of_float32():
    x = jnp.asarray(300 + some(4, 64), jnp.bfloat16)  # in bfloat16 the mean would be off by more than the spread
    got = layers.layer_norm(x)
    assert got.dtype == jnp.bfloat16 and layers.rms_norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), layers.layer_norm(x.astype(jnp.float32)), rtol=0.01, atol=0.01)


def test_the_embedding_tells_log_snrs_apart():
    levels = np.linspace(-12.0, 8.5, 42, dtype=np.float32)
    e = np.asarray(jax.jit(layers.embed_log_snr, static_argnums=1)(levels, 32))
    assert e.shape == (42, 32)
    assert np.max(np.abs(e)) <= 1 + 1e-6
    distance = np.linalg.norm(e[:, None] - e[None], axis=-1) + 10 * np.eye(42)
    assert distance.min() > 0.5


def test_background_bias_favours_class_0_at_every_voxel_of_a_folded_grid():
    bias = layers.background_bias(3, copies=4)(jax.random.key(0), (12,))
    logits = layers.depth_to_space(jnp.broadcast_to(bias[None, None, None], (1, 2, 2, 12)), (2, 2))
    np.testing.assert_array_equal(logits, np.broadcast_to([3.0, 0.0, 0.0], (1, 4, 4, 3)))


@pytest.mark.parametrize("space", [(5,), (4, 5), (3, 4, 5)])
def test_a_convolution_takes_as_many_axes_as_its_input(space):
    x = some(1, *space, 2)
    for size in (1, 3):
        conv = layers.Conv(4, size)
        shape = jax.eval_shape(conv.init_with_output, jax.random.key(0), x)[0].shape
        assert shape == (1, *space, 4)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_cpu_sums_over_depth_what_others_convolve_in_volume(use_bias, monkeypatch):
    """The same parameters, values and gradients."""
    x, conv = jnp.asarray(some(2, 5, 6, 4, 3)), layers.Conv(4, use_bias=use_bias)
    shapes = jax.eval_shape(conv.init, jax.random.key(0), x)
    params = jax.tree.map(lambda p: 0.2 * jnp.asarray(some(*p.shape)), shapes)

    def run():  # a new function each time: how a convolution is written down is decided when it is traced
        def loss(p, x):
            y = layers.apply(conv, p, x)
            return jnp.sum(jnp.sin(y)), y

        traced = jax.make_jaxpr(loss)(params, x)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x), traced.jaxpr

    one, by_taps = run()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    two, in_volume = run()
    assert jax.tree.map(jnp.shape, jax.eval_shape(conv.init, jax.random.key(0), x)) == jax.tree.map(jnp.shape, shapes)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(np.abs(b)))
    ranks = [
        [e.outvars[0].aval.ndim for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
        for jaxpr in (by_taps, in_volume)
    ]
    assert ranks == [[4, 4, 4], [5]]


def test_a_block_is_modulated_by_gain_and_shift():
    """h + conv(silu(norm(h) (1 + gamma + spatial) + beta)): a spatial factor of -1 without shift leaves h as it is."""
    h, e, body = jnp.asarray(some(2, 4, 4, 3)), jnp.asarray(some(2, 5)), jnp.ones((2, 4, 4, 1))
    block = layers.Block()
    run = jax.jit(lambda params, spatial: layers.apply(block, params, h, body, e, spatial))
    params = jax.jit(lambda: block.init(jax.random.key(0), h, body, e))()
    zero = run(params, jnp.zeros(h.shape))
    np.testing.assert_allclose(zero, run(params, None), atol=1e-6)
    assert np.max(np.abs(zero - h)) > 0.1
    still = {"params": params["params"] | {"film": jax.tree.map(np.zeros_like, params["params"]["film"])}}
    np.testing.assert_allclose(run(still, -jnp.ones(h.shape)), h, atol=1e-6)
    one = jnp.zeros(h.shape).at[0, 0, 0].set(2.0)
    changed = np.any(np.abs(np.asarray(run(params, one) - zero)) > 1e-6, axis=-1)
    assert changed[0, :2, :2].all()
    assert changed.sum() == 4  # the voxel and its neighbours under the 3x3 kernel


def test_a_block_is_zero_in_air_and_sees_nothing_there():
    h, body = jnp.asarray(some(1, 6, 6, 3)), jnp.ones((1, 6, 6, 1)).at[:, :, 4:].set(0)
    block = layers.Block()
    params = jax.jit(lambda: block.init(jax.random.key(0), h * body, body))()
    params = jax.tree.map(lambda x: x + 0.3 * some(*x.shape), params)  # the shift starts at zero
    whole = np.asarray(layers.apply(block, params, h * body, body))
    assert np.all(whole[:, :, 4:] == 0)
    assert np.all(np.any(whole[:, :, :4] != 0, axis=-1))
    cropped = layers.apply(block, params, h[:, :, :4], body[:, :, :4])  # the border of the image in place of the air
    np.testing.assert_allclose(whole[:, :, :4], cropped, atol=1e-6)


@pytest.mark.parametrize("space", [(5,), (4, 6), (3, 4, 2)])
def test_linear_upsampling_is_the_resize_of_a_zero_padded_image(space):
    x = some(2, *space, 3)
    got = layers.upsample_linear(jnp.asarray(x), (2,) * len(space))
    assert got.shape == (2, *(2 * n for n in space), 3)
    padded = np.pad(x, [(0, 0), *((1, 1),) * len(space), (0, 0)])
    wide = jax.image.resize(padded, (2, *(2 * (n + 2) for n in space), 3), "linear")
    np.testing.assert_allclose(got, wide[(slice(None), *(slice(2, -2),) * len(space))], atol=1e-5)


def test_a_coarse_voxel_is_body_if_any_of_its_voxels_is():
    body = np.zeros((1, 8, 8), np.float32)
    body[0, 3, 4] = 1
    masks = layers.body_at_scales(jnp.asarray(body), ((2, 2),) * 3)
    assert [mask.shape for mask in masks] == [(1, 4, 4, 1), (1, 2, 2, 1), (1, 1, 1, 1)]
    for mask, place in zip(masks, ((1, 2), (0, 1), (0, 0)), strict=True):
        assert np.argwhere(np.asarray(mask)[0, ..., 0]).tolist() == [list(place)]


@pytest.mark.parametrize("factor", [(2, 2), (1, 2, 2), (4,)])
def test_smoothing_takes_away_what_repeats_with_the_blocks_and_leaves_a_slope(factor):
    space = tuple(8 * f for f in factor)
    inner = (slice(None), *(slice(f, -f) if f > 1 else slice(None) for f in factor))
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(1, *factor, 1)).astype(np.float32)
    for axis, f in enumerate(factor, 1):  # it differs along folded axes alone
        pattern = pattern.mean(axis=axis, keepdims=True) if f == 1 else pattern
    smoothed = layers.smooth(jnp.asarray(np.tile(pattern, (1, *(8,) * len(factor), 1))), factor)[inner]
    np.testing.assert_allclose(smoothed, pattern.mean(), atol=1e-6)
    slope = np.broadcast_to(np.arange(space[-1], dtype=np.float32)[:, None], (1, *space, 1))
    np.testing.assert_allclose(layers.smooth(jnp.asarray(slope), factor)[inner], slope[inner], atol=1e-5)
