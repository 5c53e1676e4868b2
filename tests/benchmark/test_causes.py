"""The causes suite: what a phantom plants, and agreement that chance cannot reach."""

import json
import types

import jax
import numpy as np
import pytest

from entrust_jax import api
from entrust_jax.benchmark import causes
from entrust_jax.data import phantom, phantom_scene
from entrust_jax.errors import UserError
from entrust_jax.model import EnTrust
from entrust_jax.runtime.mesh import data_mesh
from entrust_jax.trustmap import explanation

SPEC = phantom.Spec(
    modalities=("A", "B"), size=(48, 48), sites=3, prior=0.5, reliability=(0.8, 0.7), ignorance=(0.5, 0.5), radius=5.0
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes():
    return phantom_scene.scenes(SPEC, range(24), 0)


def one(scenes, i):
    return phantom_scene.Scene(*(np.asarray(field)[i] for field in scenes))


def made_up_model(folder, method, layout):
    config = types.SimpleNamespace(method=method, seed=0, data=types.SimpleNamespace(layout=layout))
    return api.Trained(
        workdir=folder, name="w", config=config, splits={}, spacing=(), params=None, tau=0.5,
        network=EnTrust(2, 2, widths=(4, 8), d_c=4, d_u=4, strides=((2, 2), (2, 2)), head_dropout=0.2, b=0.2),
        rung="identity", calibration={}, mesh=data_mesh(jax.devices()[:1]),
    )  # fmt: skip


def test_a_phantom_plants_what_its_readers_do(scenes):
    seen = set()
    for i in range(24):
        scene = one(scenes, i)
        exact = causes.planted(scene)
        assert (np.isin(exact, (explanation.BOUNDARY, causes.BOTH)) == scene.boundary).all()
        for j, (a, b) in enumerate(scene.evidence.T):
            inside = exact[(scene.site == j) & ~scene.boundary]
            rim = set(exact[(scene.site == j) & scene.boundary].tolist())
            assert rim == {causes.BOTH if a * b < 0 else explanation.BOUNDARY}
            expected = explanation.CONFLICT if a * b < 0 else explanation.IGNORANCE if a == b == 0 else 0
            assert set(inside.tolist()) <= {0, expected}
            seen |= set(inside.tolist())
        assert not exact[scene.site < 0].any()
    assert seen == {0, explanation.CONFLICT, explanation.IGNORANCE}


def test_agreement_is_one_where_all_is_right_and_chance_where_causes_are_dealt_out():
    rng = np.random.default_rng(0)
    shape = (1, 100, 100)
    exact = rng.choice([0, *causes.PLANTED], size=shape, p=[0.4, 0.3, 0.1, 0.2]).astype(np.uint8)
    right = np.where(exact == 0, explanation.OTHER, exact).astype(np.uint8)
    found = causes.agreement(np.stack([causes.voxels(exact, right)] * 10))
    assert found["agreement"]["value"] == 1 and found["recall ignorance"]["value"] == 1
    np.testing.assert_allclose(found["chance"]["value"], 0.5**2 + (1 / 6) ** 2 + (1 / 3) ** 2, atol=0.02)
    dealt = rng.permuted(right.ravel()).reshape(shape)
    found = causes.agreement(np.stack([causes.voxels(exact, dealt)] * 10))
    assert abs(found["above_chance"]["value"]) < 0.02
    nothing = causes.agreement(np.stack([causes.voxels(exact, 0 * right)]))
    assert nothing["agreement"]["value"] is None


def test_a_region_has_the_cause_of_most_of_its_voxels():
    exact, error = np.zeros((1, 10, 10), np.uint8), np.zeros((1, 10, 10), np.float32)
    error[0, 1:4, 1:4], error[0, 6:9, 6:9] = 0.5, 0.5
    exact[0, 1:3, 1:4] = explanation.CONFLICT
    records = [
        {"place": {"slice": 0, "row": r, "column": r}, "cause": cause}
        for r, cause in ((2, "conflict"), (7, "boundary"))
    ]
    given = np.where(np.arange(10)[:, None] < 5, explanation.CONFLICT, explanation.BOUNDARY)
    given = np.where(error > 0, given, 0).astype(np.uint8)
    found = causes.regions(exact, {"error_probability": error, "cause": given, "records": records})
    assert found[explanation.CONFLICT, explanation.CONFLICT] == 1 and found[0, explanation.BOUNDARY] == 1
    assert found.sum() == 2


def test_the_suite_asks_every_case_and_writes_what_it_finds(tmp_path, monkeypatch, scenes):
    """A made-up model that gives the planted causes, but for boundaries, which it calls conflict."""

    def predict(trained, volume):
        exact = causes.planted(one(scenes, volume.number))
        given = np.where(np.isin(exact, (explanation.BOUNDARY, causes.BOTH)), explanation.CONFLICT, exact)
        return {"cause": given.astype(np.uint8), "error_probability": 0.1 * (given > 0), "records": []}

    monkeypatch.setattr(api, "predict_volume", predict)
    monkeypatch.setattr(api, "read_cases", lambda trained: (phantom_scene.volumes(SPEC, range(12), 0), []))
    monkeypatch.setattr(causes.dataset, "phantom_spec", lambda data: SPEC)
    causes.run(made_up_model(tmp_path, "entrust", "phantom"), 11, tmp_path / "out", {"command": "c"})
    found = json.loads((tmp_path / "out" / "causes.json").read_text())
    assert found["cases"] == 11 and found["command"] == "c"
    voxels = found["voxels"]
    assert voxels["recall conflict"]["value"] == voxels["recall ignorance"]["value"] == 1
    assert voxels["recall boundary"]["value"] == 0 and voxels["precision conflict"]["value"] < 1
    assert found["regions"]["agreement"]["value"] is None
    assert sum(voxels["counts"][causes.BOTH]) > 0
    assert "| above chance | " in (tmp_path / "out" / "causes.md").read_text()


@pytest.mark.parametrize(
    ("method", "layout", "said"), [("unet", "phantom", "gives no reasons"), ("entrust", "nnunet", "--suite=regions")]
)
def test_a_model_without_reasons_and_cases_without_causes_are_refused(tmp_path, method, layout, said):
    with pytest.raises(UserError, match=said):
        causes.check(made_up_model(tmp_path, method, layout))
