"""The encoder: every modality by itself, in one space; a prior that sees no image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax.enfuse.encoder import PRIOR_FLOOR, Encoder, base_rate
from entrust_jax.layers import apply

M, K = 3, 2
ENCODER = Encoder(modalities=M, classes=K, widths=(4, 8), strides=((2, 2), (2, 2)), d_c=4, d_u=3, d_e=5)


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGE, COORDINATES = some(2, M, 8, 8), np.tanh(some(2, 8, 8, 3))
BODY = jnp.ones((2, 8, 8))


@pytest.fixture(scope="module")
def params():
    """Random in every entry, so that no path is closed by a zero initialisation."""
    shapes = jax.eval_shape(ENCODER.init, jax.random.key(0), IMAGE, COORDINATES, BODY)
    return jax.tree.map(lambda x: 0.5 * some(*x.shape), shapes)


@jax.jit
def encode(params, image, coordinates, body=BODY):
    return apply(ENCODER, params, image, coordinates, body)


@pytest.mark.parametrize("space", [(8,), (8, 12), (4, 8, 8)])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("modalities", [1, 3])
def test_shapes(space, factor, modalities):
    n = len(space)
    net = Encoder(modalities, K, (4, 8), ((factor,) * n, (2,) * n), d_c=4, d_u=3)
    arrays = jnp.zeros((2, modalities, *space)), jnp.zeros((2, *space, 3)), jnp.ones((2, *space))
    evidence = jax.eval_shape(net.init_with_output, jax.random.key(0), *arrays)[0]
    for s in range(2):
        grid = tuple(size // (factor * 2**s) for size in space)
        assert evidence.c[s].shape == (2, modalities, *grid, 4)
        assert evidence.u[s].shape == (2, modalities, *grid, 3)
        assert evidence.reliability[s].shape == (2, modalities, *grid)
    assert evidence.logits.shape == (2, modalities, *space, K)
    assert evidence.prior_logits.shape == (2, *space, K)


def test_a_modality_does_not_see_the_others(params):
    other = IMAGE.copy()
    other[:, 1] = 100 * some(2, 8, 8, seed=1)
    before, after = encode(params, IMAGE, COORDINATES), encode(params, other, COORDINATES)
    for a, b in zip(
        jax.tree.leaves((before.c, before.u, before.reliability, before.logits)),
        jax.tree.leaves((after.c, after.u, after.reliability, after.logits)),
        strict=True,
    ):
        np.testing.assert_array_equal(a[:, [0, 2]], b[:, [0, 2]])
        assert np.any(a[:, 1] != b[:, 1])


def test_a_case_does_not_see_the_others(params):
    other = IMAGE.copy()
    other[1] = 7.0
    before, after = encode(params, IMAGE, COORDINATES), encode(params, other, COORDINATES)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_the_consensus_has_one_scale(params):
    """LN: no modality can speak louder than another, whatever its intensities."""
    for image in (IMAGE, 1e3 * IMAGE):
        for c in encode(params, image, COORDINATES).c:
            np.testing.assert_allclose(np.mean(c, axis=-1), 0, atol=1e-5)
            np.testing.assert_allclose(np.mean(np.square(c), axis=-1), 1, atol=2e-2)


def test_the_prior_sees_places_not_images(params):
    one = encode(params, IMAGE, COORDINATES)
    np.testing.assert_array_equal(encode(params, IMAGE[::-1], COORDINATES).prior_logits, one.prior_logits)
    moved = encode(params, IMAGE, COORDINATES[::-1])
    np.testing.assert_array_equal(moved.prior_logits, one.prior_logits[::-1])
    assert np.any(np.abs(moved.prior_logits - one.prior_logits) > 1e-3)
    np.testing.assert_array_equal(moved.logits, one.logits)


def test_tied_encodings_of_equal_images_are_equal(params):
    """With one stem, e_m, a_m and W_u for all, nothing else tells the modalities apart."""
    tied = dict(params["params"])
    tied |= {f"stem_{m}": tied["stem_0"] for m in range(M)}
    for name in ("modality", "unimodal_bias", "specific_0", "specific_1"):
        tied[name] = np.broadcast_to(tied[name][:1], tied[name].shape)
    image = np.broadcast_to(IMAGE[:, :1], IMAGE.shape)
    evidence = encode({"params": tied}, image, COORDINATES)
    for x in jax.tree.leaves((evidence.c, evidence.u, evidence.reliability, evidence.logits)):
        np.testing.assert_array_equal(x, np.broadcast_to(x[:, :1], x.shape))
    loose = encode(params, image, COORDINATES)
    assert np.any(loose.c[0][:, 0] != loose.c[0][:, 1])


def test_the_base_rate_is_floored_and_frozen():
    logits = jnp.array([[20.0, 0.0, -20.0], [0.0, 0.0, 0.0]])
    p, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(base_rate(x)[:, 2])))(logits)
    assert np.all(np.asarray(gradient) == 0)
    rate = np.asarray(jax.jit(base_rate)(logits))
    np.testing.assert_allclose(rate.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(rate[1], 1 / 3, rtol=1e-6)
    assert rate.min() > 0.99 * PRIOR_FLOOR
    assert p == pytest.approx(rate[:, 2].sum())


def test_head_dropout_acts_in_training_alone(params):
    train = jax.jit(lambda p, x, u, key: apply(ENCODER, p, x, u, BODY, train=True, rngs={"dropout": key}))
    one, two = (train(params, IMAGE, COORDINATES, jax.random.key(i)) for i in range(2))
    assert np.any(one.logits != two.logits)
    for name in ("c", "u"):  # on the heads, not on what the fusion joins
        for a, b in zip(getattr(one, name), getattr(encode(params, IMAGE, COORDINATES), name), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_air_has_no_features_and_is_not_seen(params):
    body = BODY.at[:, :, 4:].set(0)
    image = IMAGE * body[:, None]
    evidence = encode(params, image, COORDINATES, body)
    cut = encode(params, image[..., :4], COORDINATES[:, :, :4], BODY[:, :, :4])
    for s in range(2):
        edge = 4 // (2 * 2**s)
        for whole, part in ((evidence.c[s], cut.c[s]), (evidence.u[s], cut.u[s])):
            assert np.all(np.asarray(whole)[:, :, :, edge:] == 0)
            np.testing.assert_allclose(np.asarray(whole)[:, :, :, :edge], part, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(evidence.logits[..., :4, :], cut.logits, rtol=1e-4, atol=1e-5)


def test_what_a_scan_says_shows_nothing_of_the_blocks_that_were_folded(params):
    even = jnp.ones((1, M, 96, 96)), jnp.zeros((1, 96, 96, 3)), jnp.ones((1, 96, 96))
    logits = np.asarray(encode(params, *even).logits)[:, :, 44:52, 44:52]  # far from the border
    assert np.ptp(logits, axis=(2, 3)).max() < 1e-4 and np.ptp(logits) > 0.1
