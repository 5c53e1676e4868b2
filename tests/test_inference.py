"""From a volume to its maps: the same whatever the chunks and the devices, cheap where there is nothing, never NaN."""

import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import made_up
from entrust_jax import inference
from entrust_jax.baselines.unet import UNet
from entrust_jax.data.body import coordinates
from entrust_jax.model import EnTrust
from entrust_jax.runtime.mesh import data_mesh
from entrust_jax.segdiff import sampler as segdiff_sampler
from entrust_jax.segdiff.sampler import Sampler
from entrust_jax.trustmap import explanation, prediction
from entrust_jax.trustmap.case import threshold_action

M, K, N, DEPTH, SIZE = 2, 3, 3, 8, 16
MODEL = EnTrust(M, K, widths=(4, 8, 8), d_c=4, d_u=4, strides=((2, 2),) * 3, head_dropout=0.2, b=0.2)
SAMPLER = Sampler(0.2, -12.0, 7.0, 3)
KEY = jax.random.key(3)


@functools.cache
def params():
    batch = inference.pipeline.evaluation_slices(made_up.slices(), multiple=SIZE)
    return made_up.parameters(MODEL.init, {"params": KEY, "dropout": KEY}, batch, KEY)


def examine(devices, case=None, **options):
    return inference.examine(
        params(), case or made_up.slices(), KEY, model=MODEL, sampler=SAMPLER, mesh=data_mesh(jax.devices()[:devices]),
        hypotheses=N, multiple=SIZE, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def raw():
    """The whole volume on one device, in one chunk."""
    return examine(1)


def agree(ours, theirs):
    """Equal up to float error; labels may flip only where two classes are within it."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        assert a.shape == b.shape, name
        if a.dtype == np.uint8:
            assert np.mean(a != b) < 2e-3, name
        else:
            np.testing.assert_allclose(a, b, atol=2e-3, err_msg=name)


def test_hypotheses_are_worth_comparing(raw):
    assert raw["hypotheses"].shape == (N, DEPTH, SIZE - 1, SIZE - 3)
    assert len(np.unique(raw["hypotheses"])) == K
    assert np.mean(raw["hypotheses"][0] != raw["hypotheses"][1]) > 0.05
    assert np.mean(raw["divergence"]) > 1e-3 and np.mean(raw["conflict"] > 0.1) > 0.01


@pytest.mark.parametrize(("devices", "chunk"), [(2, 3), (8, 8)])
def test_chunks_and_devices_change_nothing(raw, monkeypatch, devices, chunk):
    monkeypatch.setattr(inference, "CHUNK", chunk)  # 3 on two devices: chunks of 4
    agree(examine(devices), raw)


@pytest.mark.parametrize(
    ("slices", "devices", "size"), [(1, 1, 1), (1, 2, 2), (2, 1, 2), (5, 1, 8), (155, 1, 8), (5, 8, 8), (1, 8, 8)]
)
def test_short_scans_are_not_filled_up_to_a_whole_chunk(slices, devices, size):
    assert inference.chunk_size(slices, data_mesh(jax.devices()[:devices])) == size


UNET = UNet(K, widths=(4, 8), strides=((2, 2),) * 2)


@functools.cache
def stacked(members):
    """Parameters of so many U-Nets."""
    batch = inference.pipeline.evaluation_slices(made_up.slices(), multiple=SIZE)
    one = made_up.parameters(UNET.init, KEY, batch["image"], batch["present"], batch["body"])
    return jax.tree.map(lambda x: np.stack([x * (1 + 0.1 * i) for i in range(members)]), one)


def examine_unet(devices, members=1, key=KEY, case=None, **network):
    return inference.examine_unet(
        stacked(members), case or made_up.slices(), key, model=dataclasses.replace(UNET, **network),
        mesh=data_mesh(jax.devices()[:devices]), multiple=SIZE, tau=0.5,
    )  # fmt: skip


def test_passes_with_dropout_take_the_place_of_members():
    found = examine_unet(1, members=2, dropout=0.3, passes=3)
    assert found["hypotheses"].shape == (6, DEPTH, SIZE - 1, SIZE - 3)
    assert np.mean(found["divergence"]) > 1e-3 and found["disagreement"].any()
    np.testing.assert_allclose(found["mean"].sum(axis=-1), 1, atol=1e-5)
    alone = examine_unet(1, dropout=0.3, passes=3)
    np.testing.assert_array_equal(alone["hypotheses"], found["hypotheses"][:3])  # the first member's
    assert len(np.unique(alone["hypotheses"], axis=0)) == 3
    more = examine_unet(1, dropout=0.3, passes=5)
    np.testing.assert_array_equal(more["hypotheses"][:3], alone["hypotheses"])
    other = examine_unet(1, key=jax.random.key(4), dropout=0.3, passes=3)
    renamed = examine_unet(1, case=dataclasses.replace(made_up.slices(), number=9), dropout=0.3, passes=3)
    for one in (other, renamed):
        assert np.mean(one["mean"] != alone["mean"]) > 0.1


@pytest.mark.parametrize(("devices", "chunk"), [(1, 2), (2, 3), (8, 8)])
def test_chunks_and_devices_do_not_change_the_passes(monkeypatch, devices, chunk):
    whole = examine_unet(1, dropout=0.3, passes=3)
    monkeypatch.setattr(inference, "CHUNK", chunk)
    agree(examine_unet(devices, dropout=0.3, passes=3), whole)


def test_without_dropout_there_is_one_pass_and_nothing_is_drawn():
    one, other = examine_unet(1), examine_unet(1, key=jax.random.key(4), passes=5)
    assert one.keys() == other.keys() and "hypotheses" not in one
    np.testing.assert_array_equal(one["mean"], other["mean"])


def test_slices_without_foreground_are_not_sampled(raw, monkeypatch):
    seen = np.max((1 - raw["one_step"][..., 0]) * made_up.slices().body, axis=(1, 2))
    monkeypatch.setattr(inference, "ACTIVE", float(np.median(seen)))
    found = examine(8)
    active = seen > np.median(seen)
    assert active.sum() == DEPTH // 2
    for name in ("divergence", "disagreement", "gap", "delta_conflict", "conflict_uncertainty"):
        assert not found[name][~active].any(), name
    for name in ("attribution", "delta_modality"):
        assert not found[name][:, ~active].any(), name
    np.testing.assert_array_equal(found["mean"][~active], found["one_step"][~active])
    alone = np.argmax(found["one_step"][~active], axis=-1)
    assert all(np.array_equal(member, alone) for member in found["hypotheses"][:, ~active])
    # The others are what they were, in another chunk.
    np.testing.assert_allclose(found["divergence"][active], raw["divergence"][active], atol=2e-3)
    np.testing.assert_allclose(found["mean"][active], raw["mean"][active], atol=2e-3)


def test_thinned_slices_are_those_of_the_whole(raw):
    found = examine(8, slices=3)
    kept = found["kept"]
    assert len(kept) == 3 and np.sum(found["slice_weight"]) == pytest.approx(DEPTH)
    np.testing.assert_allclose(found["mean"], raw["mean"][kept], atol=2e-3)
    np.testing.assert_allclose(found["conflict"], raw["conflict"][kept], atol=1e-4)
    assert found["attribution"].shape == (M, 3, SIZE - 1, SIZE - 3)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["active", "body", "air"]), min_size=1, max_size=40), st.integers(2, 12))
def test_thinning_stands_for_every_slice_of_the_body(kinds, count):
    active = np.array([kind == "active" for kind in kinds])
    body = np.array([kind != "air" for kind in kinds])
    assume(body.any())
    rows, weight = inference.keep(active, body[:, None, None], count)
    assert len(rows) == min(count, body.sum()) and np.all(np.diff(rows) > 0)
    assert np.all(body[rows]) and np.all(weight >= 1)
    assert np.sum(weight) == pytest.approx(body.sum())
    assert np.sum(weight[active[rows]]) == pytest.approx(active.sum())
    if active.any():
        assert active[rows].any()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_modality_leaves_everything_finite(raw, missing):
    case = made_up.slices(tuple(m != missing for m in range(M)))
    found = examine(8, case)
    for name, value in found.items():
        assert np.all(np.isfinite(np.asarray(value, np.float64))), name
    assert not found["conflict"].any() and not found["kappa_pairs"].any()  # nobody left to disagree with
    np.testing.assert_allclose(found["attribution"][missing], 0, atol=1e-6)
    assert np.abs(found["mean"] - raw["mean"]).max() > 0.01  # it had something to say
    done = finish(found, case)
    assert all(np.isfinite(done[name]).all() for name in ("probability", "error_probability"))
    assert all(record["missing"] == [("A", "B")[missing]] for record in done["records"])


def finish(found, case, scan=None, volumetric=False):
    return prediction.finish(
        found, case, scan=scan or case, chosen="identity", params={}, modalities=("A", "B"),
        classes=("background", "core", "rim"), regions={"all": (1, 2), "core": (1,)},
        volumetric=volumetric, started=time.perf_counter(),
    )  # fmt: skip


def on_grid(case, body, spacing):
    """The case on a grid of its own, without a picture."""
    image = np.zeros((M, *body.shape), np.float32)
    return dataclasses.replace(case, image=image, body=body, coordinates=coordinates(body), spacing=spacing)


@pytest.mark.parametrize("action", [0.35, 2])
def test_what_was_said_on_a_working_grid_is_carried_to_the_scan(raw, action):
    """The scan has other voxels over the same field of view: every map comes on its grid, and they agree there."""
    examined = made_up.slices()
    shape = (12, 2 * (SIZE - 1), SIZE - 3)
    body = np.zeros(shape, bool)
    body[:, 4:] = True
    scan = on_grid(examined, body, (2.0, 0.5, 1.0))
    here = finish(dict(raw) | {"action": action}, examined)
    there = finish(dict(raw) | {"action": action}, examined, scan)
    assert here.keys() == there.keys()
    for name, value in here.items():
        if isinstance(value, np.ndarray) and value.ndim > 2:
            moved = tuple({DEPTH: 12, SIZE - 1: 2 * (SIZE - 1)}.get(size, size) for size in value.shape)
            assert there[name].shape == moved and there[name].dtype == value.dtype, name
    assert there["sampled"].shape == (12,)
    np.testing.assert_allclose(there["probability"].sum(-1), 1, atol=1e-4)
    if isinstance(action, float):
        expected = threshold_action(there["mean"], action)
    else:
        expected = there["hypotheses"][action]
    np.testing.assert_array_equal(there["label"], expected)
    # The identity calibrator adds nothing: the label is wrong with what is left of its own probability.
    own = np.take_along_axis(there["probability"], there["label"][..., None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(there["error_probability"], (1 - own) * body, atol=1e-4)
    ml = [one["regions"]["all"]["volume_ml"] for one in (here, there)]
    assert abs(ml[1] - ml[0]) < 0.05 * np.prod(shape) * 1e-3


def test_a_model_of_one_modality_has_no_conflict_and_gives_all_credit_to_it():
    case = made_up.slices()
    case = dataclasses.replace(
        case, image=case.image[:1, :3], present=np.array([True]), body=case.body[:3], coordinates=case.coordinates[:3]
    )
    model = dataclasses.replace(MODEL, modalities=1, parent=None)
    batch = inference.pipeline.evaluation_slices(case, multiple=SIZE)
    own = made_up.parameters(model.init, {"params": KEY, "dropout": KEY}, batch, KEY)
    found = inference.examine(
        own, case, KEY, model=model, sampler=SAMPLER, mesh=data_mesh(jax.devices()[:1]), hypotheses=N, multiple=SIZE
    )
    assert found["kappa_pairs"].shape[0] == 0 and not found["conflict"].any() and not found["delta_conflict"].any()
    assert found["attribution"].shape == (1, *case.body.shape) and np.abs(found["attribution"]).max() > 0
    done = prediction.finish(
        found, case, chosen="identity", params={}, modalities=("CT",), classes=("background", "core", "rim"),
        regions={"all": (1, 2)}, volumetric=False, started=time.perf_counter(), scan=case,
    )  # fmt: skip
    assert all(np.isfinite(done[name]).all() for name in ("probability", "error_probability"))
    assert not np.isin(done["cause"], [1, 2]).any()  # neither a missing input nor a conflict
    assert all(record["sentence"] and record["pair"] is None for record in done["records"])


def test_a_prediction_has_all_its_maps(raw):
    done, space = finish(dict(raw), made_up.slices()), (DEPTH, SIZE - 1, SIZE - 3)
    assert done["label"].dtype == done["cause"].dtype == done["hypotheses"].dtype == np.uint8
    for name in ("probability", "probability_raw"):
        assert done[name].shape == (*space, K)
        np.testing.assert_allclose(done[name].sum(-1), 1, atol=1e-4)
    maps = ("entropy", "divergence", "within", "disagreement", "gap", "conflict", "js", "delta_conflict")
    for name in (*maps, "conflict_uncertainty", "error_probability"):
        assert done[name].shape == space and done[name].dtype == np.float32, name
    for name in ("attribution", "delta_modality", "counterfactual"):
        assert done[name].shape == (M, *space), name
    assert done["support"].shape == done["unimodal"].shape == (M, *space, K)
    assert done["kappa_pairs"].shape == (1, *space)
    np.testing.assert_allclose(done["entropy"], done["within"] + done["divergence"], atol=1e-4)  # TU = WU + HU
    body = made_up.slices().body
    assert not done["error_probability"][~body].any() and done["error_probability"][body].any()
    assert not done["cause"][~body].any()
    assert set(done["regions"]) == {"all", "core"} and 0 <= done["predicted_dice"] <= 1
    assert done["seconds"] >= 0 and all(record["sentence"] for record in done["records"])


def test_a_scan_that_ends_is_neither_heard_nor_blamed_where_it_ends(raw):
    """As of windows of volumes, which see it as it is: made-up conflict with a scan that ends before slice 1."""
    case, image = made_up.slices(), made_up.slices().image.copy()
    image[1, 1:] = -0.5 * case.body[1:]
    loud = dict(raw) | {
        "conflict": np.full_like(raw["conflict"], 0.5),
        "kappa_pairs": np.full_like(raw["kappa_pairs"], 0.5),
        "support": np.zeros_like(raw["support"]),
        "label": np.zeros_like(raw["label"]),  # no outline that could be the cause
        "border": np.full_like(raw["border"], 99),
    }
    done = finish(loud, dataclasses.replace(case, image=image))
    assert done["conflict"][0][case.body[0]].min() == 0.5 and not done["conflict"][1:].any()
    assert {explanation.CAUSES[c] for c in np.unique(done["cause"][0])} == {"none", "conflict"}
    assert {explanation.CAUSES[c] for c in np.unique(done["cause"][1:])} == {"none", "missing input"}


@pytest.mark.parametrize("volumetric", [False, True])
def test_in_a_volume_an_outline_is_as_near_as_its_millimetres(raw, volumetric):
    """Something sure ends below slice 3; slices lie 3 mm apart, pixels 1 mm. Every scan contradicts another."""
    case, label = made_up.slices(), np.zeros_like(raw["label"])
    label[:3, 5:12, 4:10] = 1
    p = np.where(label[..., None] == 1, [0.01, 0.98, 0.01], [0.7, 0.2, 0.1]).astype(np.float32)
    doubtful = dict(raw) | {
        "label": label, "one_step": p, "mean": p, "support": np.zeros_like(raw["support"]),
        "conflict": np.full_like(raw["conflict"], 0.5), "kappa_pairs": np.full_like(raw["kappa_pairs"], 0.5),
        "border": prediction.border(label, case.spacing, volumetric),
    }  # fmt: skip
    given = finish(doubtful, case, volumetric=volumetric)["cause"]
    np.testing.assert_array_equal(given[2, 8, 10:13], explanation.BOUNDARY)
    assert not given[2, 6:11, 5:9].any()
    assert given[3, 8, 7] == (explanation.BOUNDARY if volumetric else explanation.CONFLICT)
    assert given[4, 8, 7] == explanation.CONFLICT  # 6 mm: more than 5 pixels


def test_without_probing_the_mask_and_its_probabilities_are_the_same(raw, monkeypatch):
    monkeypatch.setattr(inference, "probe", None)
    found = examine(1, probed=False)
    for name in ("label", "hypotheses", "mean", "one_step", "entropy", "gap"):
        np.testing.assert_allclose(found[name], raw[name], atol=1e-6, err_msg=name)
    assert found["predicted_dice"] == raw["predicted_dice"]
    done, whole = finish(found, made_up.slices()), finish(dict(raw), made_up.slices())
    np.testing.assert_allclose(done["probability_raw"], whole["probability_raw"], atol=1e-6)
    assert done["trust"] == pytest.approx(whole["trust"]) and 0 < done["trust"]["score"] < 1
    assert whole["trust"]["contested_ml"] >= 0 and whole["trust"]["gap"] > 0


def test_nothing_is_found_outside_the_body(raw):
    case = made_up.slices()
    outside = ~case.body
    assert outside.any()
    assert not raw["label"][outside].any() and not raw["hypotheses"][:, outside].any()
    assert raw["one_step"][outside][..., 0].min() > 0.999 and raw["divergence"][outside].max() < 1e-3


# What the devices do ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chunk(raw):
    """A chunk of eight slices, encoded: (evidence, batch)."""
    evidence, _, batch = inference.first_look(
        params(), made_up.slices(), KEY, model=MODEL, sampler=SAMPLER, mesh=data_mesh(jax.devices()[:1]), multiple=SIZE
    )
    return jax.tree.map(jnp.asarray, (evidence, batch))


def lowered(devices, chunk):
    mesh = data_mesh(jax.devices()[:devices])
    return inference.draw.lower(params(), *chunk, KEY, model=MODEL, sampler=SAMPLER, mesh=mesh, hypotheses=N)


def test_eight_devices_do_an_eighth_each(chunk):
    one, eight = (lowered(devices, chunk).compile() for devices in (1, 8))
    flops = [compiled.cost_analysis()["flops"] for compiled in (one, eight)]
    # What does not depend on the slices, such as the embedding of the noise level, is done by every device.
    assert flops[0] / 8 <= flops[1] < 1.3 * flops[0] / 8
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", eight.as_text())


def inside(equation):
    """The jaxprs inside an equation: of calls, of the bodies of loops."""
    values = jax.tree.leaves(tuple(equation.params.values()))
    return [getattr(value, "jaxpr", value) for value in values if hasattr(value, "jaxpr") or hasattr(value, "eqns")]


def count(jaxpr, primitive):
    """How often a primitive stands in a jaxpr, inner ones included; bodies of loops count once."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == primitive
        found += sum(count(inner, primitive) for inner in inside(equation))
    return found


def chains(jaxpr, length):
    """The bodies of the loops of so many steps."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == length:
            yield equation.params["jaxpr"].jaxpr
        for inner in inside(equation):
            yield from chains(inner, length)


def test_a_step_of_the_chain_runs_the_denoiser_and_nothing_else(chunk):
    evidence, batch = chunk
    present, number = batch["present"], batch["case"]
    fuse = functools.partial(inference.condition_of, MODEL, params())
    noisy, log_snr = jnp.zeros((len(number), SIZE, SIZE, K)), jnp.zeros(len(number))
    denoise = inference._denoise(MODEL, params(), batch["body"])
    once = jax.make_jaxpr(denoise)(noisy, log_snr, jax.eval_shape(fuse, evidence, present))
    convolutions = count(once.jaxpr, "conv_general_dilated")
    mesh = data_mesh(jax.devices()[:1])
    options = {"model": MODEL, "sampler": SAMPLER, "mesh": mesh, "hypotheses": N}
    whole = jax.make_jaxpr(functools.partial(inference.draw, **options))(params(), *chunk, KEY)
    (body,) = chains(whole.jaxpr, SAMPLER.steps)
    assert count(body, "conv_general_dilated") == convolutions > 5
    # The chain once, the one-step estimate once, the fusion once: no encoder, nothing a second time.
    total = 2 * convolutions + count(jax.make_jaxpr(fuse)(evidence, present).jaxpr, "conv_general_dilated")
    assert count(whole.jaxpr, "conv_general_dilated") == total


def test_pmap_of_the_sampler_draws_the_same_hypotheses(chunk, raw):
    def one_device(evidence, batch):
        condition = inference.condition_of(MODEL, params(), evidence, batch["present"])
        denoise = inference._denoise(MODEL, params(), batch["body"])
        return segdiff_sampler.sample(
            denoise, condition, condition.fused.kappa, batch["case"], KEY, sampler=SAMPLER, classes=K, hypotheses=N
        )[1]

    spread = jax.tree.map(lambda x: jnp.reshape(x, (8, 1, *x.shape[1:])), chunk)
    members = np.asarray(jax.pmap(one_device)(*spread))[:, 0, :, : SIZE - 1, : SIZE - 3]
    assert members.shape == (8, N, SIZE - 1, SIZE - 3, K)
    labels = np.moveaxis(np.argmax(members, axis=-1), 1, 0)
    assert np.mean(labels != raw["hypotheses"]) < 2e-3
