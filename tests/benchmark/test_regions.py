"""The regions suite, of made-up predictions: what is picked, what is said of it beside the truth, what is written."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

import made_up
from configs import phantom
from entrust_jax import api, networks
from entrust_jax.benchmark import regions
from entrust_jax.errors import UserError
from entrust_jax.report import regions as pictures
from entrust_jax.runtime.mesh import data_mesh
from entrust_jax.trustmap import explanation

SHAPE = (4, 24, 20)
MODALITIES, CLASSES = ("A", "B"), ("background", "lesion")
# Of each cause one region, smaller from cause to cause: 2 x 4 x 4, 1 x 4 x 4, 1 x 4 x 3 and 1 x 3 x 3 voxels of 3 mm^3.
PLACES = {
    "conflict": (slice(0, 2), slice(2, 6), slice(2, 6)),
    "ignorance": (slice(3, 4), slice(2, 6), slice(10, 14)),
    "boundary": (slice(3, 4), slice(10, 14), slice(2, 5)),
    "other": (slice(0, 1), slice(16, 19), slice(12, 15)),
}


def case(name, missing=False):
    """A volume and what is predicted of it; of the conflict half of the voxels are wrong, of the ignorance all."""
    volume = made_up.volume(np.ones(SHAPE, bool), (True, not missing))
    delivered, true = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.int32)
    delivered[PLACES["conflict"]] = 1
    true[0, 2:6, 2:6] = 1
    true[PLACES["ignorance"]] = 1
    error = np.full(SHAPE, 0.01, np.float32)
    for place in PLACES.values():
        error[place] = 0.4
    error[0, 2:6, 2:6] = 0.8
    codes = np.zeros(SHAPE, np.uint8)
    for cause, place in PLACES.items():
        codes[place] = explanation.MISSING_INPUT if missing else explanation.CAUSES.index(cause)
    kappa = np.where(codes == explanation.CONFLICT, 0.5, 0).astype(np.float32)
    attribution = np.zeros((2, *SHAPE), np.float32)
    attribution[1] = -0.25
    prediction = {
        "label": delivered, "error_probability": error, "conflict": kappa, "cause": codes, "kappa_pairs": kappa[None],
        "support": np.full((2, *SHAPE, 2), 0.3, np.float32), "unimodal": np.full((2, *SHAPE, 2), 0.5, np.float32),
        "attribution": attribution,
        "counterfactual": np.stack([delivered, 0 * delivered]), "conflict_uncertainty": 0.1 * kappa,
    }  # fmt: skip
    return dataclasses.replace(volume, name=name, patient=name, label=true), prediction


def regions_of(name, **options):
    return regions.regions_of(*case(name, **options), MODALITIES, CLASSES, "B")


def trained_folder(name, tests, **changes):
    """A working folder in memory, of the phantom's config."""
    config = phantom.get_config().copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(
        {"data.modalities": MODALITIES, "data.reference": "B", "data.classes": CLASSES} | changes
    )
    splits = {"train": [], "val": ["v"], "calibration": [], "test": tests}
    return api.Trained(
        workdir=Path(name), name=name, config=config, splits=splits, spacing=(),
        network=networks.network_of(config), params=None, mesh=data_mesh(jax.devices()[:1]), tau=0.5,
        rung="identity", calibration={},
    )  # fmt: skip


def test_the_truth_of_a_region_is_that_of_its_own_voxels():
    found = {one.record["cause"]: one for one in regions_of("x")}
    assert list(found) == ["conflict", "ignorance", "boundary", "other"]
    truth = found["conflict"].truth
    np.testing.assert_allclose(truth, (32 * 0.003, 16 * 0.003, 0.003 * (16 * 0.8 + 16 * 0.4)), rtol=1e-6)
    assert [regions.share_wrong(one) for one in found.values()] == pytest.approx([0.5, 1, 0, 0])


def test_voxels_without_a_label_do_not_count_and_raters_are_averaged():
    volume, prediction = case("x")
    assert volume.label is not None
    unknown = volume.label.copy()
    unknown[0] = -1  # the right half of the conflict, the sure one
    first = regions.regions_of(dataclasses.replace(volume, label=unknown), prediction, MODALITIES, CLASSES, "B")[0]
    np.testing.assert_allclose(first.truth, (16 * 0.003, 16 * 0.003, 16 * 0.003 * 0.4), rtol=1e-6)
    nowhere = dataclasses.replace(volume, label=np.full(SHAPE, -1, np.int32))
    last = regions.regions_of(nowhere, prediction, MODALITIES, CLASSES, "B")
    assert {regions.share_wrong(one) for one in last} == {None}
    assert regions.by_cause(last)["all"]["share_wrong"] is None
    raters = np.stack([volume.label, np.zeros(SHAPE, np.int32)])
    two = regions.regions_of(dataclasses.replace(volume, raters=raters), prediction, MODALITIES, CLASSES, "B")
    assert regions.share_wrong(two[0]) == pytest.approx(0.75) and regions.share_wrong(two[1]) == pytest.approx(0.5)


def test_the_sight_shows_the_region_in_its_own_slice():
    volume, prediction = case("x")
    for one in regions.regions_of(volume, prediction, MODALITIES, CLASSES, "B"):
        place, sight = PLACES[one.record["cause"]], one.sight
        assert sight is not None
        plane = np.zeros(SHAPE, bool)
        plane[place] = True
        z = one.record["place"]["slice"]
        np.testing.assert_array_equal(sight.region, plane[z])
        np.testing.assert_array_equal(sight.maps["error_probability"], prediction["error_probability"][z])
        assert sight.region[sight.near.rows, sight.near.columns].sum() == sight.region.sum()
        assert sight.view.extent == (0, 24, 0, 20) and sight.near.extent[1] < 24  # voxels of 1 x 1 mm in plane
        assert sight.base == 1  # the reference
    assert {one.sight.base for one in regions_of("x", missing=True) if one.sight} == {0}


def test_causes_take_turns_the_largest_first_and_no_patient_more_than_three_times():
    many = [one for name in ("a", "b", "c") for one in regions_of(name)]
    many += [one for name in ("m", "n") for one in regions_of(name, missing=True)]
    chosen = regions.pick(many)
    assert [(one.case, one.record["cause"]) for one in chosen] == [
        ("m", "missing input"), ("a", "conflict"), ("a", "ignorance"), ("a", "boundary"), ("b", "other"),
        ("n", "missing input"), ("b", "conflict"), ("b", "ignorance"), ("c", "boundary"), ("c", "other"),
    ]  # fmt: skip
    assert [one.record["index"] for one in chosen if one.record["cause"] == "missing input"] == [0, 0]
    assert regions.pick(many[::-1]) == chosen  # whatever the order of the folders
    assert len(regions.pick(regions_of("a"))) == 3
    again = [dataclasses.replace(one, case="scan 2") for one in regions_of("a")]
    assert len(regions.pick([*regions_of("a"), *again])) == 3  # a patient, not a case
    assert all(one.sight is not None for one in chosen)


def test_only_what_can_be_picked_keeps_a_picture():
    volume, prediction = case("x")
    prediction["cause"] = np.where(prediction["cause"] > 0, explanation.OTHER, 0).astype(np.uint8)
    found = regions.regions_of(volume, prediction, MODALITIES, CLASSES, "B")
    assert [one.sight is not None for one in found] == [True, True, True, False]


def test_sums_are_over_all_regions_weighted_by_volume():
    found = regions.by_cause([*regions_of("a"), *regions_of("b")])
    assert list(found) == ["conflict", "ignorance", "boundary", "other", "all"]
    assert found["conflict"] == {
        "regions": 2, "patients": 2, "volume_ml": pytest.approx(0.192), "mean_error": pytest.approx(0.6),
        "share_wrong": pytest.approx(0.5),
    }  # fmt: skip
    assert found["all"]["regions"] == 8
    assert found["all"]["share_wrong"] == pytest.approx((16 + 16) / (32 + 16 + 12 + 9))


def test_the_sheet_the_table_and_the_records_are_written(tmp_path, monkeypatch):
    made = {"a": case("a"), "v": case("v", missing=True), "z": case("z")}
    made["z"][1]["error_probability"] = np.full(SHAPE, 0.01, np.float32)
    drawn = []
    original = pictures.sheet
    monkeypatch.setattr(pictures, "sheet", lambda *arguments: drawn.append(original(*arguments)) or drawn[-1])
    monkeypatch.setattr(api, "predict_volume", lambda trained, volume: made[volume.name][1])
    folder = tmp_path / "out"
    methods = {"f0": trained_folder("f0", ["a", "z"]), "f1": trained_folder("f1", ["v"])}
    cases = [("f0", made["a"][0]), ("f0", made["z"][0]), ("f1", made["v"][0])]
    regions.check_new(folder)
    regions.run(methods, cases, folder, {"command": "c"})

    found = json.loads((folder / "regions.json").read_text())
    assert found["command"] == "c" and found["cases"] == ["a", "z", "v"] and found["trained_on"] == ["v"]
    shown = [(one["case"], one["cause"], one["mostly_wrong"]) for one in found["regions"]]
    assert shown == [
        ("v", "missing input", True), ("a", "conflict", True), ("a", "ignorance", True), ("a", "boundary", False),
        ("v", "missing input", True), ("v", "missing input", False),
    ]  # fmt: skip
    assert (
        found["regions"][1]["share_wrong"] == pytest.approx(0.5) and "A and B contra" in found["regions"][1]["sentence"]
    )
    text = (folder / "regions.md").read_text().splitlines()
    assert text[0].endswith("| seen by eye |") and all(line.endswith("|  |") for line in text[2:8])
    assert text[3].startswith("| 2 | a | conflict | ") and "| 0.60 | 0.50 | B (-0.25) |" in text[3]
    assert "| conflict | 1 | 1 | 0.1 | 0.60 | 0.50 |" in text and text[-1].startswith("| all | 8 | 2 | ")

    (picture,) = drawn
    said = [text.get_text() for axes in picture.axes for text in axes.texts]
    assert "2   a   conflict" in said and said.count("missing") == 3  # B of v
    assert any("wrong: 0.50 in truth, 0.60 expected" in words for words in said)
    height, width = imread(folder / "regions.png").shape[:2]
    renderer = picture.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for axes in picture.axes for text in axes.texts if text.get_text()]
    pictured = [
        (axes, axes.images[0].get_extent()) for axes in picture.axes if axes.images and axes.get_xlim() != (0, 1)
    ]
    assert len(pictured) == 6 * 5 - 3 and all((*a.get_xlim(), *a.get_ylim()) == tuple(extent) for a, extent in pictured)
    with Image.open(folder / "regions.png") as file:
        assert file.mode == "P"
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    with pytest.raises(UserError, match=r"regions\.md: is there"):
        regions.check_new(folder)


def test_nothing_doubtful_is_an_error(tmp_path, monkeypatch):
    volume, prediction = case("a")
    prediction["error_probability"] = np.full(SHAPE, 0.01, np.float32)
    monkeypatch.setattr(api, "predict_volume", lambda *_: prediction)
    with pytest.raises(UserError, match="no region of 1 cases"):
        regions.run({"f": trained_folder("f", ["a"])}, [("f", volume)], tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_stand_side_by_side_are_refused():
    first = trained_folder("f0", ["a"])
    other = {"data.split.fold": 1, "data.dir": "elsewhere"}
    regions.check({"f0": first, "f1": trained_folder("f1", ["b"], **other)}, "test")
    regions.check({"f0": first}, "all")
    for second, split, words in (
        (trained_folder("f1", ["b"], **other, method="unet"), "test", "f1: holds a U-Net"),
        (trained_folder("f1", ["b"], **other, **{"train.batch": 3}), "test", "differ in config.train.batch"),
        (trained_folder("f1", ["a"], **other), "test", "f0 and f1 both test a"),
        (trained_folder("f1", ["b"], **other), "all", "--split=all"),
    ):
        with pytest.raises(UserError, match=words):
            regions.check({"f0": first, "f1": second}, split)
