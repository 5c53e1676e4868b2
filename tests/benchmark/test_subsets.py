"""The subsets suite: what is taken away is gone, and each row is of the cases that have its modalities."""

import dataclasses
import json
import types

import jax
import numpy as np

from entrust_jax import api
from entrust_jax.benchmark import subsets
from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume
from entrust_jax.metrics import scoring
from entrust_jax.model import EnTrust
from entrust_jax.runtime.mesh import data_mesh

NAMES = ("T1", "FLAIR", "T1ce")
TARGETS = scoring.Targets(("background", "lesion"), {"lesion": (1,)}, NAMES)


def volume(number: int) -> Volume:
    rng = np.random.default_rng(number)
    body = np.ones((4, 12, 12), bool)
    label = np.zeros(body.shape, np.int32)
    label[1:3, 3:9, 3:9] = 1
    image = rng.normal(size=(3, *body.shape)).astype(np.float32)
    return Volume(
        name=f"c{number}", patient=f"c{number}", number=number, image=image, present=np.ones(3, bool), label=label,
        body=body, coordinates=coordinates(body), spacing=(3.0, 1.0, 1.0), reference=None,
    )  # fmt: skip


def without(case: Volume, name: str) -> Volume:
    there = np.array([one != name for one in NAMES])
    return dataclasses.replace(case, present=there, image=case.image * there[:, None, None, None])


def test_every_subset_once_the_largest_first():
    found = subsets.subsets(NAMES)
    assert len(found) == len({frozenset(one) for one in found}) == 7
    assert found[0] == NAMES and found[1] == ("T1", "FLAIR") and found[-1] == ("T1ce",)


def test_what_is_taken_away_is_gone_and_the_rest_is_as_it_was():
    case = volume(0)
    kept = subsets.only(case, NAMES, ("FLAIR",))
    assert kept is not None and kept.present.tolist() == [False, True, False]
    np.testing.assert_array_equal(kept.image[1], case.image[1])
    assert not kept.image[[0, 2]].any() and case.image.any(axis=(1, 2, 3)).all()
    assert subsets.only(without(case, "FLAIR"), NAMES, ("FLAIR", "T1")) is None


def test_rows_are_of_the_cases_that_have_the_modalities_and_know_a_worse_calibration(tmp_path, monkeypatch):
    """A made-up model that is right with FLAIR, and without it as sure of the whole box around the lesion."""
    asked = []

    def predict(trained, case, probed):
        asked.append(probed)
        p = np.full((*case.body.shape, 2), [0.99, 0.01])
        lesion = case.label > 0
        if not case.present[1]:
            lesion = np.zeros_like(lesion)
            lesion[1:3, 2:10, 2:10] = True
        p[lesion] = [0.01, 0.99]
        label = np.argmax(p, axis=-1).astype(np.uint8)
        hedged = 0.5 * p + 0.25
        zero = np.zeros(case.body.shape)
        return {
            "label": label, "probability": hedged, "probability_raw": p, "error_probability": zero + 0.25,
            "entropy": zero + 0.5, "seconds": 1.0, "trust": {"score": 0.75},
            "conformal": {
                "dice": None, "volume": {}, "outer_mask": {"lesion": lesion}, "inner_mask": {},
            },
        }  # fmt: skip

    monkeypatch.setattr(api, "predict_volume", predict)
    data = types.SimpleNamespace(modalities=NAMES)
    trained = api.Trained(
        workdir=tmp_path, name="w", config=types.SimpleNamespace(data=data), splits={}, spacing=(),
        params=None, tau=0.5,
        network=EnTrust(3, 2, widths=(4, 8), d_c=4, d_u=4, strides=((2, 2), (2, 2)), head_dropout=0.2, b=0.2),
        rung="head", calibration={}, mesh=data_mesh(jax.devices()[:1]),
    )  # fmt: skip
    cases = [volume(0), volume(1), without(volume(2), "T1ce")]
    subsets.run(trained, cases, TARGETS, tmp_path / "out", {"command": "c"})
    found = json.loads((tmp_path / "out" / "subsets.json").read_text())
    assert found["command"] == "c" and all(asked)  # the learned head needs the probes
    rows = found["subsets"]
    assert {name: one["dice"]["n"] for name, one in rows.items()} == {
        "T1 + FLAIR + T1ce": 2, "T1 + FLAIR": 3, "T1 + T1ce": 2, "FLAIR + T1ce": 2, "T1": 3, "FLAIR": 3, "T1ce": 2,
    }  # fmt: skip
    assert all((one["dice"]["value"] == 1) == ("FLAIR" in name) for name, one in rows.items())
    with_it, without_it = rows["T1 + FLAIR"]["ece_classwise_roi"], rows["T1"]["ece_classwise_roi"]
    assert with_it["before"]["value"] < 0.02 < 0.1 < without_it["before"]["value"]
    assert with_it["after"]["value"] > 0.2  # hedged without need
    text = (tmp_path / "out" / "subsets.md").read_text().splitlines()
    assert text[2].startswith("| T1 + FLAIR + T1ce | 2 | 1.000 | ") and len([x for x in text if x[:2] == "| "]) == 9
    # No lesion outside the outer mask, which is as large as it or not; no inner one given, and no interval.
    assert all(x.split(" | ")[-5] == "0.000" and x.endswith(" | - | - | - |") for x in text[2:9])
    assert [float(x.split(" | ")[-4]) == 1 for x in text[2:9]] == ["FLAIR" in x for x in text[2:9]]
