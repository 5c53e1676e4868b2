"""The U-Net baselines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax.baselines import unet
from entrust_jax.enfuse.objective import modality_dropout
from entrust_jax.layers import apply

B, M, K, SIZE = 2, 3, 3, 8
NETWORK = unet.UNet(K, widths=(4, 8), strides=((2, 2), (2, 2)))


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch_of() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    body = np.ones((B, SIZE, SIZE), bool)
    body[:, 0] = False
    return {
        "image": some(B, M, SIZE, SIZE),
        "present": np.ones((B, M), bool),
        "label": rng.integers(0, K, size=(B, SIZE, SIZE)).astype(np.int32),
        "body": body,
        "weight": np.float32([0.5, 1.5]),
        "valid": np.ones(B, bool),
    }


@pytest.fixture(scope="module")
def params():
    batch = batch_of()
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0), batch["image"], batch["present"], batch["body"])
    return jax.tree.map(lambda x: 0.5 * some(*x.shape), shapes)


BODY = jnp.asarray(batch_of()["body"])


@jax.jit
def predict(params, image, present):
    return apply(NETWORK, params, image, present, BODY)


@functools.partial(jax.jit, static_argnames="dice")
def loss(params, batch, key, dice=0.0):
    return unet.loss(NETWORK, params, batch, key, dice=dice)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("space", [(8, 16), (4, 8, 8)])
def test_shapes(space, factor):
    net = unet.UNet(K, (4, 8), ((factor,) * len(space), (2,) * len(space)))
    arrays = jnp.zeros((B, M, *space)), jnp.ones((B, M), bool), jnp.ones((B, *space), bool)
    logits = jax.eval_shape(net.init_with_output, jax.random.key(0), *arrays)[0]
    assert logits.shape == (B, *space, K)


def test_volumes_and_what_saves_memory_on_them():
    """Anisotropic strides; remat gives the same gradient, bfloat16 nearly the same loss, of the same parameters."""
    batch = batch_of() | {name: some(B, *extra, 2, 8, 8) for name, extra in (("image", (M,)), ("body", ()))}
    batch["body"] = batch["body"] > -2
    batch["label"] = (batch["image"][:, 0] > 0).astype(np.int32)
    batch = jax.tree.map(jnp.asarray, batch)

    def step(**options):
        net = unet.UNet(K, (4, 8), ((1, 2, 2), (1, 2, 2)), **options)
        shapes = jax.eval_shape(net.init, jax.random.key(0), batch["image"], batch["present"], batch["body"])
        params = jax.tree.map(lambda x: 0.3 * some(*x.shape), shapes)
        return jax.jit(jax.value_and_grad(lambda p: unet.loss(net, p, batch, jax.random.key(1), dice=0.5)[0]))(params)

    (value, gradient), (again, same), (half, nearly) = step(), step(remat=True), step(compute="bfloat16")
    np.testing.assert_allclose(again, value, rtol=1e-5)
    np.testing.assert_allclose(half, value, rtol=0.03)
    assert half != value
    assert jax.tree.structure(gradient) == jax.tree.structure(same) == jax.tree.structure(nearly)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        assert np.all(np.isfinite(a)) and np.any(a != 0)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(np.abs(a)))


def test_a_missing_modality_is_not_seen_but_known_to_be_missing(params):
    image = some(B, M, SIZE, SIZE)
    garbage, zero = image.copy(), image.copy()
    garbage[:, 1], zero[:, 1] = 1e4, 0
    absent = np.array([[True, False, True]] * B)
    missing = predict(params, image, absent)
    np.testing.assert_array_equal(predict(params, garbage, absent), missing)
    assert np.any(np.abs(missing - predict(params, zero, ~absent | absent)) > 1e-3)


def test_training_drops_modalities(params):
    """The loss is the cross-entropy under the subsets that `modality_dropout` draws, and these differ with the key."""
    batch = batch_of()
    body = batch["body"]
    seen = []
    for seed in range(4):
        key = jax.random.key(seed)
        present = jax.jit(modality_dropout)(key, batch["present"])
        log_p = np.asarray(jax.nn.log_softmax(predict(params, batch["image"], present), axis=-1))
        ce = -np.take_along_axis(log_p, batch["label"][..., None], axis=-1)[..., 0]
        per_case = (ce * body).sum((1, 2)) / body.sum((1, 2))
        value, figures = loss(params, batch, key)
        np.testing.assert_allclose(value, np.mean(batch["weight"] * per_case), rtol=1e-4)
        assert figures["ce"] == value
        seen.append(float(value))
    assert len(set(seen)) > 1


def drawn(function, *arguments) -> int:
    """How many arrays of random bits a function draws."""
    return str(jax.make_jaxpr(function)(*arguments)).count("random_bits[")


def test_without_dropout_training_draws_what_it_drew_before_there_was_any(params):
    """Nothing but the modalities that are left out: so older trainings are repeated to the bit."""
    batch, key = batch_of(), jax.random.key(0)
    alone = drawn(modality_dropout, key, batch["present"])
    assert drawn(functools.partial(unet.loss, NETWORK, dice=0.0), params, batch, key) == alone > 0
    noisy = dataclasses.replace(NETWORK, dropout=0.2)
    assert drawn(functools.partial(unet.loss, noisy, dice=0.0), params, batch, key) > alone


def test_training_drops_channels(params):
    """Of the same parameters, and where there is one modality so that nothing else is left to chance."""
    batch = batch_of() | {"present": np.array([[True, False, False]] * B)}
    keys = [jax.random.key(seed) for seed in range(3)]
    assert len({float(loss(params, batch, key)[0]) for key in keys}) == 1
    noisy = functools.partial(unet.loss, dataclasses.replace(NETWORK, dropout=0.3), dice=0.0)
    step = jax.jit(jax.value_and_grad(lambda p, b, k: noisy(p, b, k)[0]))
    found = [step(params, batch, key) for key in keys]
    assert len({float(value) for value, _ in found}) == 3
    assert all(np.all(np.isfinite(leaf)) for _, gradient in found for leaf in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(found[0][0], step(params, batch, keys[0])[0])


def test_whole_channels_of_a_case_are_left_out():
    keys = jax.random.split(jax.random.key(0), 64)
    h = jnp.ones((64, 3, 4, 50))
    found = np.asarray(unet.dropped(h, keys, 0, 0.2))
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.8)}
    assert np.all(found == found[:, :1, :1]) and len(np.unique(found[:, 0, 0], axis=0)) == 64
    assert found.mean() == pytest.approx(1, abs=0.02)
    assert np.any(found != unet.dropped(h, keys, 1, 0.2))  # another place in the network
    np.testing.assert_array_equal(unet.dropped(h[3:5], keys[3:5], 0, 0.2), found[3:5])
    np.testing.assert_array_equal(unet.dropped(h, None, 0, 0.2), h)


def test_padding_and_unlabelled_slots_do_not_count(params):
    batch, other = batch_of(), batch_of()
    batch["valid"] = other["valid"] = np.array([True, False])
    other["label"][1] = -1
    other["image"][1] = 50
    key = jax.random.key(0)
    np.testing.assert_array_equal(loss(params, batch, key)[0], loss(params, other, key)[0])
    other["valid"] = np.array([True, True])
    np.testing.assert_array_equal(loss(params, batch, key)[0], loss(params, other, key)[0])


def test_validation_keeps_all_modalities(params):
    batch = batch_of()
    value = jax.jit(functools.partial(unet.validate, NETWORK))(params, batch)
    log_p = np.asarray(jax.nn.log_softmax(predict(params, batch["image"], batch["present"]), axis=-1))
    ce = -np.take_along_axis(log_p, batch["label"][..., None], axis=-1)[..., 0] * batch["body"]
    np.testing.assert_allclose(value, ce.sum((1, 2)) / batch["body"].sum((1, 2)), rtol=1e-4)


def test_members_under_vmap_are_those_run_one_by_one():
    batch = batch_of()
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.jit(jax.vmap(NETWORK.init, in_axes=(0, None, None, None)))(
        keys, batch["image"], batch["present"], batch["body"]
    )
    for kernel in (stacked["params"][f"enter_{s}"]["Conv_0"]["kernel"] for s in range(2)):
        assert np.min(np.std(kernel, axis=0)) > 0  # each starts elsewhere
    stacked = jax.tree.map(lambda x: x + 0.3 * some(*x.shape, seed=1), stacked)  # the last kernel starts at zero
    together = jax.jit(jax.vmap(predict, in_axes=(0, None, None)))(stacked, batch["image"], batch["present"])
    for i in range(3):
        member = jax.tree.map(lambda x, i=i: x[i], stacked)
        alone = predict(member, batch["image"], batch["present"])
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)
    assert np.mean(np.std(together, axis=0)) > 0.01


def test_soft_dice_by_hand():
    p = np.float32([[[0.5, 0.5, 0.0], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]]])
    label, inside = np.int32([[0, 2, 1, 1]]), np.float32([[1, 1, 1, 0]])
    logits = np.log(np.maximum(p, 1e-12))
    # Class 1: overlap .8, sizes 1.5 + 1. Class 2: overlap .6, sizes .7 + 1. Background does not enter.
    expected = 1 - np.mean([(2 * 0.8 + 1) / (2.5 + 1), (2 * 0.6 + 1) / (1.7 + 1)])
    dice = jax.jit(unet.soft_dice)
    np.testing.assert_allclose(dice(logits, label, inside), [expected], rtol=1e-5)
    perfect = 50 * np.eye(K, dtype=np.float32)[label]
    np.testing.assert_allclose(dice(perfect, label, inside), [0.0], atol=1e-6)


def test_dice_is_added_at_its_weight(params):
    batch, key = batch_of(), jax.random.key(1)
    present = jax.jit(modality_dropout)(key, batch["present"])
    logits = predict(params, batch["image"], present)
    dice = jax.jit(unet.soft_dice)(logits, batch["label"], batch["body"].astype(np.float32))
    value, figures = loss(params, batch, key, dice=0.5)
    np.testing.assert_allclose(value - figures["ce"], 0.5 * np.mean(batch["weight"] * dice), rtol=1e-3)


def test_members_run_one_by_one_on_a_cpu_and_by_vmap_elsewhere(monkeypatch):
    """The same numbers either way, gradients included, and no convolution with a kernel per member on a CPU."""
    batch = jax.tree.map(jnp.asarray, batch_of())
    keys = jax.random.split(jax.random.key(0), 3)
    init = jax.vmap(lambda k: NETWORK.init(k, *(jnp.asarray(batch[n]) for n in ("image", "present", "body"))))
    stacked = jax.tree.map(lambda x: x + 0.3 * some(*x.shape, seed=1), jax.jit(init)(keys))

    def make():
        step = jax.value_and_grad(lambda p, k: unet.loss(NETWORK, p, batch, k, dice=0.5)[0])
        return unet.over_members(step)

    alone = make()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    together = make()
    for one, two in zip(*(jax.tree.leaves(jax.jit(f)(stacked, keys)) for f in (alone, together)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)
    groups = [
        [e.params["feature_group_count"] for e in convolutions(jax.make_jaxpr(f)(stacked, keys).jaxpr)]
        for f in (alone, together)
    ]
    assert set(groups[0]) == {1}
    assert len(groups[0]) == 3 * len(groups[1])


def convolutions(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield equation
        for value in jax.tree.leaves(tuple(equation.params.values())):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from convolutions(getattr(value, "jaxpr", value))
