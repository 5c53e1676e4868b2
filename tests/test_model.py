"""EnTrust as a whole: what must be exactly zero, exactly equal or exactly unseen, on tiny random networks."""

import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from entrust_jax import api
from entrust_jax import model as entrust
from entrust_jax.enfuse import objective as enfuse_objective
from entrust_jax.enfuse.fusion import pool_maps
from entrust_jax.errors import UserError
from entrust_jax.layers import Strides, apply, cumulated
from entrust_jax.model import EnTrust
from entrust_jax.scores import case_mean, cross_entropy
from entrust_jax.segdiff import schedule

B, M, K, SIZE = 2, 3, 3, 16
LOW, HIGH = -12.0, 8.0


def network(modalities: int = M, strides: Strides = ((2, 2), (2, 2)), **options: Any) -> EnTrust:
    widths = (4, 8, 8)[: len(strides)]
    return EnTrust(modalities, K, widths, d_c=4, d_u=3, strides=strides, head_dropout=0.2, b=0.2, **options)


NETWORK = network()


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch_of(b: int = B, modalities: int = M, space: tuple[int, ...] = (SIZE, SIZE)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    body = np.ones((b, *space), bool)
    body[:, :2] = False
    return {
        "image": some(b, modalities, *space),
        "present": np.ones((b, modalities), bool),
        "label": rng.integers(0, K, size=(b, *space)).astype(np.int32),
        "body": body,
        "coordinates": rng.uniform(-1, 1, size=(b, *space, 3)).astype(np.float32),
        "weight": np.linspace(0.5, 1.5, b).astype(np.float32),
        "valid": np.ones(b, bool),
        "case": np.arange(b, dtype=np.int32),
        "slice": np.zeros(b, np.int32),
    }


def shapes_of(net: EnTrust, batch):
    key = jax.random.key(0)
    return jax.eval_shape(net.init, {"params": key, "dropout": key}, batch, key)


def random_params(net: EnTrust, batch: dict[str, np.ndarray]):
    """Random in every entry (nothing is closed by a zero initialisation), without compiling `init`."""
    return jax.tree.map(lambda x: 0.5 * some(*x.shape), shapes_of(net, batch))


@pytest.fixture(scope="module")
def params():
    return random_params(NETWORK, batch_of())


@functools.partial(jax.jit, static_argnames="net")
def encode(params, image, coordinates, body, net=NETWORK):
    return apply(net, params, image, coordinates, body, method="encode")


@functools.partial(jax.jit, static_argnames="net")
def fuse(params, evidence, availability, net=NETWORK):
    return apply(net, params, evidence, availability, method="fuse")


@functools.partial(jax.jit, static_argnames="net")
def denoise(params, x_t, log_snr, condition, net=NETWORK):
    return apply(net, params, x_t, log_snr, condition, method="denoise")


X, LOG_SNR = some(B, SIZE, SIZE, K, seed=5), np.float32([LOW, 2])
ONES = np.ones((B, M, SIZE, SIZE), np.float32)


def run(params, batch, availability):
    """(evidence, condition, logits)."""
    evidence = encode(params, batch["image"], batch["coordinates"], batch["body"])
    condition = fuse(params, evidence, availability)
    return evidence, condition, denoise(params, X, LOG_SNR, condition)


# Conflict features ------------------------------------------------------------------------------------------------


def tied(params):
    """One stem, e_m, a_m and W_u for all modalities."""
    p = dict(params["params"])
    encoder = dict(p["encoder"])
    encoder |= {f"stem_{m}": encoder["stem_0"] for m in range(M)}
    for name in ("modality", "unimodal_bias", *(f"specific_{s}" for s in range(2))):
        encoder[name] = np.broadcast_to(encoder[name][:1], encoder[name].shape)
    return {"params": p | {"encoder": encoder}}


def test_equal_encodings_have_no_conflict_features(params):
    batch = batch_of()
    batch["image"] = np.broadcast_to(batch["image"][:, :1], batch["image"].shape)
    same = run(tied(params), batch, ONES)[1]
    for x in (*same.fused.F_cf, *same.projections.modulation, same.fused.kappa):
        assert np.all(np.asarray(x) == 0)
    # The same images through encoders of their own, or other images through one: conflict.
    loose = run(params, batch, ONES)[1]
    other = run(tied(params), batch_of(), ONES)[1]
    assert all(np.any(np.asarray(x) != 0) for c in (loose, other) for x in c.fused.F_cf)


@pytest.mark.parametrize("there", [0, 2])
def test_a_single_modality_has_no_conflict_features(params, there):
    mu = np.zeros_like(ONES)
    mu[:, there] = 1
    condition = run(params, batch_of(), mu)[1]
    for x in (*condition.fused.F_cf, *condition.projections.modulation, condition.fused.kappa):
        assert np.all(np.asarray(x) == 0)


# Missing modalities -----------------------------------------------------------------------------------------------


def test_what_is_missing_is_not_seen_to_the_last_bit(params):
    mu = ONES.copy()
    mu[0, 1] = mu[1, 2] = mu[1, 0] = 0
    batch, garbage = batch_of(), batch_of()
    garbage["image"] = np.where(mu > 0, garbage["image"], 1e4 * some(*ONES.shape, seed=8))
    (evidence, one, logits), (other, two, garbage_logits) = run(params, batch, mu), run(params, garbage, mu)
    assert np.any(evidence.c[0] != other.c[0])
    for name in ("F_c", "F_u", "F_cf", "weights", "kappa", "kappa_pairs", "js", "present"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one.fused, name), getattr(two.fused, name))
    jax.tree.map(np.testing.assert_array_equal, one.projections, two.projections)
    np.testing.assert_array_equal(logits, garbage_logits)
    here = mu[:, :, 0, 0] > 0
    for name in ("posterior", "support"):  # these are by modality: what is there is as before
        a, b = (np.asarray(getattr(condition.fused, name)) for condition in (one, two))
        np.testing.assert_array_equal(a[here], b[here])


def test_with_nothing_available_the_denoiser_still_answers(params):
    _, condition, logits = run(params, batch_of(), 0 * ONES)
    assert np.all(np.isfinite(logits))
    for x in (*condition.fused.F_c, *condition.fused.F_cf, condition.fused.kappa, condition.fused.js):
        assert np.all(np.asarray(x) == 0)
    other = batch_of()
    other["image"] = 3 * other["image"]
    np.testing.assert_array_equal(run(params, other, 0 * ONES)[2], logits)  # the null condition sees no image


# Caching ----------------------------------------------------------------------------------------------------------


def count(jaxpr, name: str) -> int:
    """How often a primitive occurs in a jaxpr and in those inside it."""
    inner = [
        getattr(value, "jaxpr", value)
        for equation in jaxpr.eqns
        for value in jax.tree.leaves(tuple(equation.params.values()))
        if hasattr(value, "jaxpr") or hasattr(value, "eqns")
    ]
    own = sum(equation.primitive.name == name for equation in jaxpr.eqns)
    return own + sum(count(value, name) for value in inner)


def test_a_denoising_step_repeats_none_of_the_encoding(params):
    batch = batch_of()
    evidence = encode(params, batch["image"], batch["coordinates"], batch["body"])
    condition = fuse(params, evidence, ONES)
    own = {"params": {"denoiser": params["params"]["denoiser"]}}
    step = jax.make_jaxpr(denoise)(own, X, LOG_SNR, condition)
    scales = len(NETWORK.widths)
    # Entry and two blocks a scale, one block a scale on the way up, the logits; 1x1 maps are matrix products.
    assert count(step.jaxpr, "conv_general_dilated") == 3 * scales + (scales - 1) + 1
    encoding = jax.make_jaxpr(encode)(params, batch["image"], batch["coordinates"], batch["body"])
    # Two a stem; entry but for the first scale, one block down a scale, one up: the counter does see convolutions.
    assert count(encoding.jaxpr, "conv_general_dilated") == 2 * M + (scales - 1) + scales + (scales - 1)
    # What is left of the parameters is enough, and the answer is that of the whole model.
    np.testing.assert_array_equal(denoise(own, X, LOG_SNR, condition), denoise(params, X, LOG_SNR, condition))


def test_the_cached_condition_equals_the_recomputed_one(params):
    @jax.jit
    def at_once(params, image, coordinates, body, availability, x, log_snr):
        evidence = apply(NETWORK, params, image, coordinates, body, method="encode")
        condition = apply(NETWORK, params, evidence, availability, method="fuse")
        return apply(NETWORK, params, x, log_snr, condition, method="denoise")

    batch = batch_of()
    _, condition, logits = run(params, batch, ONES)
    recomputed = at_once(params, batch["image"], batch["coordinates"], batch["body"], ONES, X, LOG_SNR)
    np.testing.assert_allclose(recomputed, logits, rtol=1e-4, atol=1e-4)
    again = denoise(params, X[::-1], LOG_SNR, condition)  # another step from the same cache
    assert np.any(np.abs(again - logits) > 1e-2)


# Locality ---------------------------------------------------------------------------------------------------------


FLAT_VOXELS = ((1, 2, 2), (1, 2, 2), (2, 2, 2))  # as planned for slices four times as thick as pixels are wide


@pytest.mark.parametrize("strides", [((1, 1), (2, 2), (2, 2)), ((2, 2),) * 3, FLAT_VOXELS], ids=["1", "2", "volume"])
def test_padding_a_case_changes_nothing(strides):
    """Norms are voxel by voxel and features of air are the zeros that convolutions pad with: up to the last rounding.

    What is in the air around the body, values of the image excepted, does not matter either: noise, coordinates.
    """
    net, pad = network(strides=strides), cumulated(strides)[-1]
    batch = batch_of(1, M, {2: (4 * pad[0], 3 * pad[1]), 3: (4, 16, 16)}[len(pad)])
    batch["body"][..., -3:] = False
    batch["image"] *= batch["body"][:, None]
    params = random_params(net, batch)

    def out(left: int, right: int):
        space = tuple((left * n, right * n) for n in pad)

        def padded(value, seed=0):
            wide = np.pad(value, ((0, 0), *space, (0, 0)))
            here = np.pad(np.ones(value.shape[1:-1], bool), space)[None, ..., None]
            return np.where(here, wide, some(*wide.shape, seed=seed)).astype(np.float32)

        image = np.pad(batch["image"], ((0, 0), (0, 0), *space))
        body = np.pad(batch["body"], ((0, 0), *space))
        x = padded(some(1, *batch["body"].shape[1:], K, seed=3), seed=left)
        evidence = encode(params, image, padded(batch["coordinates"]), body, net=net)
        condition = fuse(params, evidence, np.ones_like(image), net=net)
        logits = denoise(params, x, LOG_SNR[1:], condition, net=net)
        fused = condition.fused
        return logits[body], fused.kappa[body], np.moveaxis(fused.posterior, 1, -1)[body]

    for plain, around in zip(out(0, 0), out(1, 2), strict=True):
        np.testing.assert_allclose(plain, around, rtol=1e-4, atol=1e-4)
        assert np.std(plain) > 1e-3


# Volumes ----------------------------------------------------------------------------------------------------------

VOLUME = jax.tree.map(jnp.asarray, batch_of(2, 2, (4, 8, 8)))
STRIDES = ((1, 2, 2), (2, 2, 2))
FIGURES = ("diffusion", "uni", "con", "rec", "align", "var", "xcov")


def test_volumes_are_learnt_by_every_part():
    net = network(2, STRIDES)
    params = random_params(net, VOLUME)

    def second(p):
        return entrust.segdiff_loss(net, p, VOLUME, jax.random.key(2), low=LOW, high=HIGH, draws=1)

    (loss, figures), gradient = jax.jit(jax.value_and_grad(second, has_aux=True))(params)
    assert np.isfinite(loss)
    assert all(np.isfinite(figures[name]) and figures[name] > 0 for name in FIGURES), figures
    found = jax.tree.leaves_with_path(gradient)
    assert all(np.all(np.isfinite(x)) for _, x in found)
    still = [jax.tree_util.keystr(path) for path, x in found if not np.any(np.asarray(x))]
    assert still and all("'prior'" in name for name in still), still  # stage 2a leaves the prior, and it alone
    parts = gradient["params"]
    for block in (parts["encoder"]["trunk"]["block_0"]["Conv_0"], parts["denoiser"]["logits"]):
        kernel = np.asarray(block["Conv_0"]["kernel"])
        assert kernel.shape[:3] == (3, 3, 3)
        assert np.all(np.any(kernel != 0, axis=(1, 2, 3, 4)))  # the slices above and below are seen

    def first(prior):  # what stage 1 moves besides
        p = {"params": params["params"] | {"encoder": params["params"]["encoder"] | {"prior": prior}}}
        return entrust.enfuse_loss(net, p, VOLUME, jax.random.key(1), jnp.float32(0.5))[0]

    loss, gradient = jax.jit(jax.value_and_grad(first))(params["params"]["encoder"]["prior"])
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(x)) and np.any(x != 0) for x in jax.tree.leaves(gradient))


# What saves memory: on slices, which compile faster ---------------------------------------------------------------

SLICES = jax.tree.map(jnp.asarray, batch_of(2, 2, (8, 8)))


@functools.cache
def learnt(axes, **options):
    """(loss of stage 2a, its gradient in the denoiser: that in the rest costs much to compile)."""
    batch, strides = (SLICES, ((2, 2), (2, 2))) if axes == 2 else (VOLUME, STRIDES)
    net, params = network(2, strides, **options), random_params(network(2, strides), batch)["params"]

    def loss(denoiser):
        p = {"params": params | {"denoiser": denoiser}}
        return entrust.segdiff_loss(net, p, batch, jax.random.key(2), low=LOW, high=HIGH, draws=1)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params["denoiser"])
    return float(value), gradient


@pytest.mark.parametrize("axes", [2, 3])
def test_blocks_computed_again_give_the_same_gradient(axes):
    (plain, one), (again, two) = learnt(axes), learnt(axes, remat=True)
    np.testing.assert_allclose(plain, again, rtol=1e-5)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(np.abs(a)))


@pytest.mark.parametrize("axes", [2, 3])
def test_bfloat16_computes_nearly_the_same(axes):
    (plain, one), (half, two) = learnt(axes), learnt(axes, compute="bfloat16")
    np.testing.assert_allclose(half, plain, rtol=0.03)
    assert plain != half
    assert jax.tree.map(lambda x: (x.shape, x.dtype), one) == jax.tree.map(lambda x: (x.shape, x.dtype), two)
    flat = [jnp.concatenate([x.ravel() for x in jax.tree.leaves(found)]) for found in (one, two)]
    assert jnp.vdot(*flat) / (jnp.linalg.norm(flat[0]) * jnp.linalg.norm(flat[1])) > 0.98


def test_what_bfloat16_touches():
    """Features are bfloat16; logits, posteriors, weights and conflict float32, and so are the parameters."""

    def shapes(compute):
        net = network(2, STRIDES, compute=compute)
        params = shapes_of(net, VOLUME)
        images = (jnp.asarray(VOLUME[name]) for name in ("image", "coordinates", "body"))
        evidence = jax.eval_shape(functools.partial(encode, net=net), params, *images)
        condition = jax.eval_shape(functools.partial(fuse, net=net), params, evidence, jnp.ones(VOLUME["image"].shape))
        x = jnp.zeros((*VOLUME["label"].shape, K))
        logits = jax.eval_shape(functools.partial(denoise, net=net), params, x, jnp.asarray(LOG_SNR), condition)
        return params, evidence, condition, logits

    plain, half = shapes("float32"), shapes("bfloat16")
    assert jax.tree.structure(plain) == jax.tree.structure(half)
    assert jax.tree.map(lambda x: x.shape, plain) == jax.tree.map(lambda x: x.shape, half)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((plain, half[0], half[3])))
    _, evidence, condition, _ = half
    fused, cached = condition.fused, condition.projections
    features = (evidence.c, evidence.u, fused.F_c, fused.F_u, fused.F_cf, cached.a, cached.modulation)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(features))
    exact = (evidence.logits, evidence.reliability, evidence.prior_logits, fused.weights, fused.posterior, fused.kappa)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((exact, fused.kappa_pairs, fused.js, cached.embedding)))


# What a config says -----------------------------------------------------------------------------------------------


def config_of(**model):
    values = {"widths": (4, 8), "d_c": 4, "d_u": 3, "space_to_depth": 2, "head_dropout": 0.2} | api.ADDED["model"]
    return ConfigDict(
        {
            "method": "entrust",
            "data": {"patch": (8, 16, 16), "modalities": ("A", "B"), "classes": ("a", "b")},
            "model": values | model,
            "unet": {"widths": (4, 8, 8)},
            "diffusion": {"b": 0.1},
        }
    )


def test_strides_follow_the_patch_and_the_scales_of_the_method():
    config = config_of()
    assert entrust.strides_of(config) == ((2, 2, 2), (2, 2, 2))
    config.data.patch = (16, 16)
    config.model.space_to_depth = 1
    assert entrust.strides_of(config) == ((1, 1), (2, 2))
    config.method = "unet"
    assert entrust.strides_of(config) == ((1, 1), (2, 2), (2, 2))
    asked = ConfigDict(json.loads(config_of(strides=((1, 2, 2), (2, 4, 4))).to_json()))  # lists, as a working folder's
    assert entrust.build(asked).strides == ((1, 2, 2), (2, 4, 4))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("strides", ((1, 2, 2),), "each of 2 scales"),
        ("strides", ((1, 2, 2), (2, 2)), "each of 3 axes"),
        ("strides", (2, 2), "one factor for each"),
        ("strides", ((1, 2, 2), (1, 3, 3)), "1 or a power of 2"),
        ("strides", ((1, 2, 2), (0, 2, 2)), "1 or a power of 2"),
        ("compute", "float16", "float32, bfloat16"),
    ],
)
def test_a_network_that_cannot_be_built_says_which_key_is_wrong(key, value, said):
    with pytest.raises(UserError, match=rf"^config\.model\.{key} is .*{said}"):
        entrust.build(config_of(**{key: value}))


# The objectives ---------------------------------------------------------------------------------------------------

TERMS = ("diffusion", "uni", "con", "rec", "prior", "xcov", "align", "var", "loss")


@jax.jit
def figures_and_gradients(params, batch, key):
    """Every term of stage 2a's loss, and its gradient: (values, trees with a leading axis of terms)."""

    def figures(p):
        found = entrust.segdiff_loss(NETWORK, p, batch, key, low=LOW, high=HIGH, draws=2)[1]
        return jnp.stack([found[name] for name in TERMS])

    values, pull = jax.vjp(figures, params)
    return values, jax.vmap(lambda row: pull(row)[0])(jnp.eye(len(TERMS)))


def moved(gradient, term: str, *path: str) -> bool:
    """Whether a term has any gradient in the parameters under a path. TERMS count the leading axis of the leaves."""
    tree = functools.reduce(lambda node, name: node[name], path, gradient["params"])
    return any(np.any(np.asarray(x)[TERMS.index(term)] != 0) for x in jax.tree.leaves(tree))


def test_gradient_firewall(params):
    """Only L_uni moves the unimodal heads, only L_pi the prior: else kappa would become a hidden channel."""
    batch = batch_of()
    found = [figures_and_gradients(params, batch, jax.random.key(i)) for i in range(4)]  # dropout hides other parts
    assert np.all(np.isfinite([values for values, _ in found]))
    gradient = jax.tree.map(lambda *x: sum(np.abs(y) for y in x), *(each for _, each in found))
    for term in TERMS:
        for name in ("unimodal", "unimodal_bias"):
            assert moved(gradient, term, "encoder", name) == (term in ("uni", "loss")), (term, name)
        assert moved(gradient, term, "encoder", "prior") == (term == "prior"), term
    # The paths that must be open are: else the zeros above would prove nothing.
    for path in (("encoder", "stem_1"), ("encoder", "trunk"), ("encoder", "specific_0"), ("encoder", "reliability_0")):
        assert moved(gradient, "diffusion", *path), path
    for path in (("fusion", "psi_0_in"), ("fusion", "psi_1_out"), ("projection",), ("denoiser", "logits")):
        assert moved(gradient, "diffusion", *path), path
    assert moved(gradient, "uni", "encoder", "trunk")
    assert not moved(gradient, "uni", "fusion")
    assert not any(moved(gradient, term, "denoiser") for term in TERMS if term not in ("diffusion", "loss"))
    assert moved(gradient, "rec", "auxiliary", "reconstruct_in")
    assert moved(gradient, "con", "auxiliary", "consensus")


@pytest.mark.parametrize("there", [0, 1])
def test_losses_are_finite_with_one_or_no_modality(params, there):
    batch = batch_of()
    batch["present"] = np.arange(M)[None].repeat(B, axis=0) < there
    batch["label"][1] = -1  # and with a case that has no label
    values, gradient = figures_and_gradients(params, batch, jax.random.key(1))
    assert np.all(np.isfinite(values))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
    if not there:
        assert values[TERMS.index("uni")] == 0


@jax.jit
def stage_1(params, batch, progress):
    return entrust.enfuse_loss(NETWORK, params, batch, jax.random.key(3), progress)


def test_stage_1_ramps_independence_in_and_closes_the_gate(params):
    batch = batch_of()
    found = {progress: stage_1(params, batch, progress) for progress in (0.0, 0.1, 1.0)}
    for progress, (loss, figures) in found.items():
        terms = {name: float(figures[name]) for name in enfuse_objective.WEIGHTS}
        ramp = {"xcov": min(1.0, progress / entrust.XCOV_SHARE)}
        expected = sum(enfuse_objective.WEIGHTS[n] * ramp.get(n, 1.0) * v for n, v in terms.items())
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert found[0.0][1]["xcov"] != found[1.0][1]["xcov"]  # F_cf is part of it, and rho opens its gate
    for name in ("uni", "con", "prior", "rec"):
        np.testing.assert_allclose(found[0.0][1][name], found[1.0][1][name], rtol=1e-5)


def test_labels_outside_the_body_and_padding_slots_do_not_count(params):
    batch, other = batch_of(), batch_of()
    batch["valid"] = other["valid"] = np.array([True, False])
    other["label"] = np.where(other["body"], other["label"], 2 - other["label"])
    other["label"][1] = 0
    other["weight"] = np.float32([batch["weight"][0], 100])
    one, two = stage_1(params, batch, 1.0)[1], stage_1(params, other, 1.0)[1]
    for name in ("uni", "con", "prior", "rec", "xcov", "align", "var"):
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


@pytest.mark.parametrize(("modalities", "space"), [(1, (8, 8, 8)), (2, (8, 8, 8)), (1, (16,))])
def test_losses_take_any_number_of_axes_and_modalities(modalities, space):
    net = network(modalities, ((1,) * len(space), (2,) * len(space)))
    batch = jax.tree.map(jnp.asarray, batch_of(2, modalities, space))
    params = shapes_of(net, batch)
    loss = functools.partial(entrust.segdiff_loss, net, low=LOW, high=HIGH, draws=2)
    first, _ = jax.eval_shape(functools.partial(entrust.enfuse_loss, net), params, batch, jax.random.key(0), 0.5)
    second, figures = jax.eval_shape(loss, params, batch, jax.random.key(0))
    assert first.shape == second.shape == ()
    assert figures["ce_sum"].shape == figures["ce_count"].shape


@pytest.mark.parametrize("phase", [(0, 0), (2, 3)])
def test_samples_of_all_scales_lie_on_one_lattice(phase):
    """A map that is constant on the blocks of the strided scale gives the same samples whatever the scale and phase."""
    n = 2**entrust.STRIDED_SCALE
    blocks = some(2, 16 // n, 16 // n, 3)
    finest = np.repeat(np.repeat(blocks, n, axis=1), n, axis=2)
    expected = blocks.reshape(2, -1, 3)
    for scale in range(4):
        x = finest.reshape(2, 16 // 2**scale, 2**scale, 16 // 2**scale, 2**scale, 3).mean(axis=(2, 4))
        got = entrust._samples(jnp.asarray(x), (2**scale,) * 2, (n, n), jnp.array(phase))
        assert got.shape == expected.shape
        if scale <= entrust.STRIDED_SCALE:
            np.testing.assert_allclose(got, expected, rtol=1e-5)
    whole = jnp.arange(16.0)[None, :, None, None] * 100 + jnp.arange(16.0)[None, None, :, None]
    first = 100 * phase[0] + phase[1]
    np.testing.assert_array_equal(
        entrust._samples(whole, (1, 1), (n, n), jnp.array(phase))[0, :5, 0],
        [first, first + 4, first + 8, first + 12, first + 400],
    )


def test_the_lattice_of_flat_voxels_is_denser_along_depth():
    whole = sum(
        n * jnp.arange(float(size)).reshape(shape)
        for n, size, shape in ((100, 4, (1, 4, 1, 1, 1)), (10, 8, (1, 1, 8, 1, 1)), (1, 8, (1, 1, 1, 8, 1)))
    )
    lattice, phase = (2, 4, 4), jnp.array([1, 2, 3])
    got = entrust._samples(jnp.asarray(whole), (1, 1, 1), lattice, phase)[0, :, 0]
    np.testing.assert_array_equal(got, [123, 127, 163, 167, 323, 327, 363, 367])
    coarse = whole[:, ::2, ::4, ::4]  # a scale of (2, 4, 4), and one below it, whose voxels are repeated
    np.testing.assert_array_equal(entrust._samples(coarse, lattice, lattice, phase)[0, :, 0], coarse.reshape(-1))
    below = entrust._samples(coarse[:, :, ::2, ::2], (2, 8, 8), lattice, phase)[0, :, 0]
    np.testing.assert_array_equal(below, [0, 0, 0, 0, 200, 200, 200, 200])


def test_independence_is_asked_of_every_voxel(params):
    """What a part does off a fixed lattice of voxels is seen by the objective too: its phase moves with the key."""
    batch = jax.tree.map(jnp.asarray, batch_of(4))
    evidence = encode(params, batch["image"], batch["coordinates"], batch["body"])
    fused = fuse(params, evidence, np.ones((4, M, SIZE, SIZE), np.float32)).fused
    body = batch["body"].astype(jnp.float32)
    nothing = jax.tree.map(jnp.zeros_like, (evidence.c, evidence.u, fused.F_c))

    @jax.jit
    def seen(key, signal):
        """xcov of parts of the finest scale that are equal to each other, the others being zero."""
        c, u, F_c = nothing
        same = [jnp.broadcast_to(signal[:, None, ..., None], x.shape) for x in (c[0], u[0])]
        parts = dataclasses.replace(evidence, c=(same[0], *c[1:]), u=(same[1], *u[1:]))
        shared = dataclasses.replace(fused, F_c=(same[0][:, 0], *F_c[1:]))
        return entrust._part_terms(key, parts, shared, body, NETWORK.strides)["xcov"]

    for i, j in ((0, 0), (0, 1), (1, 1)):
        signal = np.zeros((4, SIZE // 2, SIZE // 2), np.float32)
        signal[:, i::2, j::2] = np.arange(1.0, 5.0)[:, None, None]  # elsewhere there is nothing
        assert max(float(seen(jax.random.key(draw), signal)) for draw in range(60)) > 0.05


def test_cross_reconstruction_swaps_in_another_available_consensus(params):
    batch, mu = batch_of(8), np.ones((8, M, SIZE, SIZE), np.float32)
    mu[:4, 1] = 0
    evidence = encode(params, batch["image"], batch["coordinates"], batch["body"])
    fused = fuse(params, evidence, mu).fused
    cross = jax.jit(entrust._cross_consensus, static_argnums=3)
    kappa = np.asarray(pool_maps(fused.kappa_pairs, (4, 4)))
    pair = {frozenset(p): i for i, p in enumerate(itertools.combinations(range(M), 2))}
    swaps = plain = 0
    for seed in range(4):
        cbar, weight = map(np.asarray, cross(jax.random.key(seed), evidence, fused, NETWORK.strides))
        for b, m in itertools.product(range(8), range(M)):
            if np.array_equal(cbar[b, m], fused.F_c[1][b]):
                assert np.all(weight[b, m] == 1)
                plain += 1
                continue
            (n,) = [n for n in range(M) if np.array_equal(cbar[b, m], evidence.c[1][b, n])]
            assert n != m
            assert fused.present[b, n] == 1
            np.testing.assert_allclose(weight[b, m], 1 - kappa[b, pair[frozenset((m, n))]], atol=1e-6)
            swaps += 1
    assert 0.25 < swaps / (swaps + plain) < 0.75


def test_reconstruction_error_by_hand():
    image, redrawn = some(1, 2, 8, 8), some(1, 2, 4, 4, seed=1)
    body, weight = np.ones((1, 8, 8), np.float32), np.full((1, 2, 4, 4), 0.5, np.float32)
    body[:, :4] = 0
    weight[:, :, 3] = 1.0
    present = np.float32([[1, 0]])
    target = image.reshape(1, 2, 4, 2, 4, 2).mean(axis=(3, 5))
    error = np.abs(redrawn - target)[0, 0]
    expected = (0.5 * error[2].sum() + error[3].sum()) / (0.5 * 4 + 4)
    got = jax.jit(entrust._reconstruction, static_argnums=5)(redrawn, image, weight, body, present, ((1, 1), (2, 2)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


# Validation -------------------------------------------------------------------------------------------------------


def test_validation_figures_belong_to_their_cases(params):
    """They do not change with the batch, see what is available, and are plain cross-entropies in the body."""
    check = jax.jit(functools.partial(entrust.validate, NETWORK))
    levels, key = np.float32([LOW, 0.0]), jax.random.key(0)
    batch = batch_of()
    batch["present"] = np.array([[True, True, False], [True, True, True]])
    ce, unimodal, kappa = check(params, batch, levels, key)
    turned = check(params, {name: value[::-1] for name, value in batch.items()}, levels, key)
    for a, b in zip((ce, unimodal, kappa), turned, strict=True):
        np.testing.assert_allclose(a, np.flip(b, axis=-1), rtol=1e-5)
    evidence = encode(params, batch["image"], batch["coordinates"], batch["body"])
    mu = ONES * batch["present"][..., None, None]
    body = batch["body"].astype(np.float32)
    score = jax.jit(lambda logits, label, body: case_mean(cross_entropy(logits, label), body))
    expected = [
        np.mean([score(evidence.logits[:, m], batch["label"], body)[b] for m in range(M) if batch["present"][b, m]])
        for b in range(B)
    ]
    np.testing.assert_allclose(unimodal, expected, rtol=1e-4)
    fused = fuse(params, evidence, mu).fused
    np.testing.assert_allclose(kappa, (np.asarray(fused.kappa) * body).sum((1, 2)) / body.sum((1, 2)), rtol=1e-4)
    # With the last layer as initialised the denoiser's cross-entropy is known.
    p = params["params"]
    last = p["denoiser"]["logits"]["Conv_0"]
    start = {"logits": {"Conv_0": {"kernel": 0 * last["kernel"], "bias": np.tile(np.float32([3, 0, 0]), 4)}}}
    start["reach"] = jax.tree.map(np.zeros_like, p["denoiser"]["reach"])
    found = check({"params": p | {"denoiser": p["denoiser"] | start}}, batch, levels, key)[0]

    @jax.jit
    def known(label, case, level):
        x0 = schedule.scale_onehot(label, K, NETWORK.b)
        x_t = schedule.diffuse(x0, level, entrust.noise_of_cases(key, case, x0.shape[1:]))
        background = jnp.array([3.0, 0, 0]).reshape(1, 1, 1, K)
        return score(background + schedule.own_evidence(x_t, level, NETWORK.b), label, body)

    for level, values in zip(levels, found, strict=True):
        np.testing.assert_allclose(values, known(batch["label"], batch["case"], np.full(B, level)), rtol=1e-4)


def test_noise_is_that_of_the_case():
    noise = jax.jit(entrust.noise_of_cases, static_argnums=2)
    one, two = noise(jax.random.key(0), np.int32([3, 7]), (4, 2)), noise(jax.random.key(0), np.int32([7, 9]), (4, 2))
    np.testing.assert_array_equal(one[1], two[0])
    assert np.all(np.asarray(one[0]) != np.asarray(one[1]))


# One modality -------------------------------------------------------------------------------------------------------


def test_a_single_modality_trains_without_conflict():
    net, batch = network(modalities=1), batch_of(modalities=1)

    @jax.jit
    def step(params, batch):  # stage 2a, whose loss holds all terms of stage 1
        loss = functools.partial(entrust.segdiff_loss, net, batch=batch, key=jax.random.key(2), draws=2)
        return jax.value_and_grad(functools.partial(loss, low=LOW, high=HIGH), has_aux=True)(params)

    (value, figures), gradient = step(random_params(net, batch), batch)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert figures["align"] == 0 and figures["kappa_sum"] == 0 and figures["kappa_count"] > 0
    for name in ("encoder", "auxiliary", "denoiser"):
        assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["params"][name])), name
