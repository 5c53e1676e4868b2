"""What each modality of a case looks like: the same whatever the chunks, each by itself, nothing of one that misses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import made_up
from entrust_jax import features, inference
from entrust_jax.data import pipeline
from entrust_jax.model import EnTrust
from entrust_jax.runtime.mesh import data_mesh
from entrust_jax.trustmap import ood

M, K, DEPTH, SIZE = 2, 3, 8, 16
MODEL = EnTrust(M, K, widths=(4, 8, 8), d_c=4, d_u=4, strides=((2, 2),) * 3, head_dropout=0.2, b=0.2)
KEY = jax.random.key(3)


@functools.cache
def params():
    batch = pipeline.evaluation_slices(made_up.slices(), multiple=SIZE)
    return made_up.parameters(MODEL.init, {"params": KEY, "dropout": KEY}, batch, KEY)


def describe(devices, case):
    mesh = data_mesh(jax.devices()[:devices])
    return features.describe(params(), case, inference.pieces(case, mesh=mesh, multiple=SIZE), model=MODEL, mesh=mesh)


def test_a_modality_is_described_alike_whatever_the_chunks_and_by_itself(monkeypatch):
    case = made_up.slices()
    found = describe(1, case)
    assert set(found) == set(ood.GROUPS)
    assert all(len(rows) == M and np.all(np.isfinite(rows).any(axis=1)) for rows in found.values())
    assert found["encoder"].shape == (M, 3 * (4 + 4) + 3) and np.all(np.isfinite(found["encoder"]))
    monkeypatch.setattr(inference, "CHUNK", 3)  # the last chunk is filled up with copies, which count nothing
    other = describe(2, case)
    for name, rows in found.items():
        np.testing.assert_allclose(rows, other[name], rtol=1e-4, atol=1e-5, err_msg=name)

    # By hand, at the first scale: the mean of c_m over the blocks of which more than half is body.
    batch = pipeline.evaluation_slices(case, multiple=SIZE)
    images = [jnp.asarray(batch[name]) for name in ("image", "coordinates", "body")]
    evidence = MODEL.apply(params(), *images, method="encode")
    inside = batch["body"].reshape(DEPTH, SIZE // 2, 2, SIZE // 2, 2).mean(axis=(2, 4)) > 0.5
    expected = np.moveaxis(np.asarray(evidence.c[0]), 1, 0)[:, inside].mean(axis=1)
    np.testing.assert_allclose(found["encoder"][:, :4], expected, rtol=1e-3, atol=1e-4)

    image = case.image.copy()
    image[1] *= 2
    changed = describe(2, dataclasses.replace(case, image=image))
    for name, rows in changed.items():  # but for what it takes two to see: redrawing from F_c, and the conflict
        own = slice(None, -3) if name == "encoder" else slice(None)
        np.testing.assert_allclose(rows[0, own], other[name][0, own], rtol=1e-4, atol=1e-5)
        assert not np.allclose(rows[1], other[name][1], equal_nan=True)


def test_a_missing_modality_is_not_described():
    found = describe(8, made_up.slices(present=(False, True)))
    for rows in found.values():
        assert np.all(np.isnan(rows[0])) and np.any(np.isfinite(rows[1]))
    assert np.isnan(found["encoder"][1, -1])  # no conflict with what is not there
