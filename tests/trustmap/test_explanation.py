"""Causes by their order of precedence; records and sentences of a synthetic scan."""

import json

import numpy as np

from entrust_jax.trustmap import explanation
from entrust_jax.trustmap.explanation import cause, outline_distances, records, sentence

SHAPE = (4, 12, 12)
MODALITIES, CLASSES = ("T1", "FLAIR", "T1ce"), ("background", "lesion")


def scan():
    """One conflict of 2 x 4 x 4 voxels (FLAIR lesion, T1 background), one dim blob of 8, one speck of 2."""
    error = np.zeros(SHAPE, np.float32)
    conflict = (slice(1, 3), slice(2, 6), slice(2, 6))
    dim = (slice(0, 2), slice(9, 11), slice(9, 11))
    error[conflict], error[dim], error[3, 0, 0:2] = 0.4, 0.3, 0.9
    error[2, 4, 4] = 0.7
    label = np.zeros(SHAPE, np.uint8)
    label[conflict] = 1
    support = np.zeros((3, *SHAPE, 2), np.float32)
    support[(1, *conflict, 1)], support[(0, *conflict, 0)] = 0.9, 0.6
    pairs = np.zeros((3, *SHAPE), np.float32)
    pairs[(0, *conflict)] = 0.54
    attribution = np.zeros((3, *SHAPE), np.float32)
    attribution[(0, *conflict)], attribution[(1, *conflict)], attribution[(2, *conflict)] = -0.4, 0.9, -5.0
    counterfactual = np.stack([0 * label, label, label])
    return error, label, support, pairs, attribution, counterfactual


def run(present=(True, True, False), **changes):
    error, label, support, pairs, attribution, counterfactual = scan()
    here = np.repeat(np.array(present)[:, None], SHAPE[0], axis=1)
    far = np.full(SHAPE, np.inf)
    codes = cause(error, pairs.max(0), support, far, far, np.full(SHAPE, 9.0), np.ones(SHAPE, bool), here)
    # By itself every scan says what the place says, background: but for FLAIR, which outweighs the place.
    unimodal = np.stack([np.full(SHAPE, 0.9), np.full(SHAPE, 0.1)], axis=-1)[None].repeat(3, axis=0)
    unimodal[1] = np.where(support[1, ..., 1:] > 0, [0.3, 0.7], unimodal[1])
    arguments = {
        "cause": codes,
        "conflict_pairs": pairs,
        "support": support,
        "unimodal": unimodal,
        "attribution": attribution,
        "counterfactual": counterfactual,
    } | changes
    return records(error, label, (5.0, 1.0, 2.0), MODALITIES, CLASSES, here, **arguments)


def surely_there(error, label, body, sampling):
    return outline_distances(error, label, body, sampling)[0]


def test_cause_precedence():
    shape = (1, 1, 11)
    kappa = np.array([0.5, 0.5, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.5]).reshape(shape)
    support = np.zeros((2, *shape, 2))
    support[0, 0, 0, :, 1] = [0.9, 0.05, 0.05, 0.9, 0.9, 0.9, 0.9, 0.9, 0.05, 0.9, 0.9]
    distance = np.array([1, 1, 1, -1.5, 5, 1, 1, 5, 5, 5, 5.0]).reshape(shape)
    surely = np.array([11, np.inf, 11, 11, 11, 1, 1, 5, 5, 11, np.inf]).reshape(shape)
    likelier = np.array([11, np.inf, 11, 11, 11, 1, 1, 5, 5, 10, 5.0]).reshape(shape)
    body = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1], bool).reshape(shape)
    error = np.array([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.01, 0.5, 0.5, 0.5, 0.5]).reshape(shape)

    def found(*shown: bool) -> list[int]:
        return cause(error, kappa, support, surely, likelier, distance, body, np.array(shown)[:, None]).ravel().tolist()

    assert found(True, True) == [2, 2, 3, 4, 5, 0, 0, 4, 4, 4, 2]
    assert found(True, False) == [2, 1, 1, 4, 5, 0, 0, 4, 4, 4, 2]
    # what an absent modality would have said does not count
    support[1] = 0.9
    assert found(True, False) == [2, 1, 1, 4, 5, 0, 0, 4, 4, 4, 2]


def test_a_modality_that_ends_is_missing_where_it_ends():
    shape = (2, 1, 2)
    support = np.zeros((2, *shape, 2))
    far = np.full(shape, np.inf)
    codes = cause(
        np.full(shape, 0.5), np.zeros(shape), support, far, far, far, far > 0, np.array([[1, 1], [1, 0]], bool)
    )
    assert codes[:, 0, 0].tolist() == [explanation.IGNORANCE, explanation.MISSING_INPUT]


def test_what_is_surely_there_has_an_outline_and_what_is_in_doubt_has_none():
    error, label = np.zeros((2, 1, 20)), np.zeros((2, 1, 20), np.uint8)
    label[0, 0, 8:13] = label[1, 0, 17:] = 1
    error[0, 0, 6:10] = error[1, 0, 15:] = 0.3  # something with a sure part, and something without
    found = surely_there(error, label, label < 9, None)
    # Inside, the way of the innermost voxel, 3, is stretched to 10.
    np.testing.assert_allclose(found[0, 0, 5:15], [3, 2, 1, 10 / 3, 20 / 3, 10, 20 / 3, 10 / 3, 1, 2], rtol=1e-6)
    assert np.isinf(found[1]).all()
    # In a volume the way may lead to the other slice, 1.5 voxels away.
    deep = surely_there(error, label, label < 9, (1.5, 1.0, 1.0))
    assert deep[1, 0, 10] == 1.5 and deep[0, 0, 10] == 10 and deep[0, 0, 12] == np.float32(1 / 0.15)
    # Both of one component: what is doubtful in one slice goes on to what is sure in the other.
    label[1], label[1, 0, 12:16], error[1, 0, 12:16] = 0, 1, 0.3
    assert surely_there(error, label, label < 9, None)[1, 0, 11] == 1


def test_the_core_of_something_small_is_not_its_outline():
    """Half of the way to the innermost voxel is the outline's, at most 5 voxels; a component is measured whole."""
    error, label = np.zeros((2, 40, 60)), np.zeros((2, 40, 60), np.uint8)
    label[0, 2:32, 2:32] = 1  # 15 voxels deep
    label[1, 10:14, 10:14] = 1  # its cap
    label[0, 4:11, 44:51] = 1  # 4 deep
    found = surely_there(error, label, label < 9, None)
    np.testing.assert_array_equal(found[0, 17, 2:17], np.arange(1, 16))
    np.testing.assert_array_equal(found[1, 12, 10:12], [1, 2])
    np.testing.assert_array_equal(found[0, 7, 44:48], [2.5, 5, 7.5, 10])
    np.testing.assert_array_equal(found[0, 7, 41:44], [3, 2, 1])  # outside as ever
    label[0] = 1  # without an outline in this slice
    assert np.isinf(surely_there(error, label, label < 9, None)[0]).all()


def test_a_mass_that_is_less_doubtful_within_has_an_outline_too():
    """Of two masses, none of which is surely there, that one whose core is at most half as doubtful as its rim."""
    error, label = np.full((1, 20, 60), 0.3), np.zeros((1, 20, 60), np.uint8)
    label[0, 5:14, 5:14] = label[0, 5:14, 40:49] = 1  # 5 voxels deep
    error[0, 7:12, 7:12], error[0, 7:12, 42:47] = 0.14, 0.16
    surely, likelier = outline_distances(error, label, label < 9, None)
    assert np.isinf(surely).all()
    np.testing.assert_array_equal(likelier[0, 9, :10], [5, 4, 3, 2, 1, 1, 2, 3, 4, 5])
    assert np.isinf(likelier[0, 9, 40:49]).all()
    # A thing without a core, two voxels across, is not likelier anywhere.
    label[:], label[0, 5:7, 5:14], error[:] = 0, 1, 0.06
    assert np.isinf(outline_distances(error, label, label < 9, None)[1]).all()


def test_outside_the_body_nothing_is_sure():
    error, label = np.zeros((1, 1, 9)), np.zeros((1, 1, 9), np.uint8)
    label[0, 0, 3:7], error[0, 0, 3:6] = 1, 0.3  # column 6 lies outside, where e is 0
    assert np.isinf(surely_there(error, label, np.arange(9)[None, None] < 6, None)).all()


def test_every_class_has_its_own_outline():
    error, label = np.zeros((1, 1, 12)), np.zeros((1, 1, 12), np.uint8)
    label[0, 0, 4:8], label[0, 0, 8:] = 1, 2
    # The four voxels of the first class are stretched to 5, 10, 10, 5; the second class's outline is nearer.
    np.testing.assert_array_equal(
        surely_there(error, label, label < 9, None)[0, 0], [4, 3, 2, 1, 4, 3, 2, 1, 1, 2, 3, 4]
    )
    error[0, 0, 4:8] = 0.3  # then the second class alone is sure
    np.testing.assert_array_equal(surely_there(error, label, label < 9, None)[0, 0, 4:9], [4, 3, 2, 1, 2.5])


def test_records_of_a_scan():
    found = run()
    # sorted by expected errors; the speck of two voxels is no region
    assert [r["voxels"] for r in found] == [32, 8]
    first, second = found
    assert first["place"] == {"slice": 2, "row": 4, "column": 4} or first["place"]["slice"] in (1, 2)
    np.testing.assert_allclose(first["volume_ml"], 32 * 0.01)
    np.testing.assert_allclose(first["expected_error_ml"], (31 * 0.4 + 0.7) * 0.01, rtol=1e-5)
    np.testing.assert_allclose([first["mean_error"], first["max_error"]], [(31 * 0.4 + 0.7) / 32, 0.7], rtol=1e-5)
    assert first["cause"] == "conflict" and first["delivered"] == "lesion" and first["missing"] == ["T1ce"]
    assert first["sentence"] == sentence(first) and "conflict_uncertainty" not in first
    uncertainty = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    expected = [uncertainty[1:3, 2:6, 2:6].mean(), uncertainty[0:2, 9:11, 9:11].mean()]
    np.testing.assert_allclose([r["conflict_uncertainty"] for r in run(conflict_uncertainty=uncertainty)], expected)
    assert first["pair"]["modalities"] == ["T1", "FLAIR"]
    assert first["votes"]["T1"]["class"] == "background" and first["votes"]["FLAIR"]["class"] == "lesion"
    np.testing.assert_allclose(first["votes"]["FLAIR"]["strength"], 0.9, rtol=1e-5)
    assert first["votes"]["FLAIR"]["alone"] == "lesion"
    np.testing.assert_allclose(first["votes"]["FLAIR"]["probability"], 0.7, rtol=1e-5)
    # the absent T1ce has the smallest phi and must not be blamed
    assert first["blame"] == "T1" and set(first["attribution"]) == {"T1", "FLAIR"}
    assert first["counterfactual"]["T1"] == {"region_ml": 0.0, "total_ml": 0.0}
    np.testing.assert_allclose(first["counterfactual"]["FLAIR"]["region_ml"], 0.32)
    assert second["cause"] == "missing input" and second["delivered"] == "background" and second["pair"] is None
    assert second["votes"]["T1"]["class"] is None
    json.dumps(found)


def test_a_scan_counts_in_the_slices_that_show_it():
    """T1 ends before the upper slice of the conflict and of the dim blob."""
    error, label, support, pairs, attribution, _ = scan()
    support[0, 2], pairs[0, 2], attribution[0, 2] = 5.0, 5.0, 5.0  # of nothing
    shown = np.array([[True, True, False, False], [True] * 4, [True] * 4])
    unimodal = np.stack([1 - support[..., 1], support[..., 1]], axis=-1)
    codes = np.where(error > 0, explanation.CONFLICT, 0).astype(np.uint8)
    codes[1, 9:11, 9:11] = explanation.MISSING_INPUT
    arguments = {"conflict_pairs": pairs, "support": support, "unimodal": unimodal, "attribution": attribution}
    first, second = records(error, label, (5.0, 1.0, 2.0), MODALITIES, CLASSES, shown, cause=codes, **arguments)
    np.testing.assert_allclose(first["pair"]["mean_conflict"], 0.54, rtol=1e-5)
    np.testing.assert_allclose([first["votes"]["T1"]["strength"], first["attribution"]["T1"]], [0.6, -0.4], rtol=1e-5)
    assert first["missing"] == [] and second["cause_shares"]["missing input"] == 0.5
    shown[0, 1], second_only = False, {"cause": np.where(codes == explanation.MISSING_INPUT, codes, 0).astype(np.uint8)}
    again = records(error, label, (5.0, 1.0, 2.0), MODALITIES, CLASSES, shown, **arguments, **second_only)
    assert again[0]["missing"] == ["T1"] and "T1" not in again[0]["votes"]  # absent from all of it
    assert again[1]["missing"] == ["T1"] and "T1 is missing here and the other scans" in sentence(again[1])
    nobody = records(
        error, label, (5.0, 1.0, 2.0), MODALITIES, CLASSES, 0 * shown > 0, **arguments,
        cause=np.where(error > 0, explanation.MISSING_INPUT, 0).astype(np.uint8),
    )  # fmt: skip
    assert "Reason: T1, FLAIR and T1ce are missing here." in sentence(nobody[0])


def test_sentences_say_what_the_record_holds():
    first, second = run()
    text = sentence(first)
    for part in (
        "0.32 ml",
        "41 %",
        "70 %",
        "T1 and FLAIR contradict each other",
        "alone, T1 says background (0.90) and FLAIR says lesion (0.70)",
    ):
        assert part in text
    assert "T1 argues most against the delivered label (-0.40 nats)" in text
    assert "0.00 ml if only T1 is right" in text
    first["attribution"]["T1"] = -0.09
    assert "argues" not in sentence(first)  # next to nothing
    assert "T1ce is missing here" in sentence(second)
    first["votes"]["T1"]["class"] = "lesion"
    assert "T1 says background (0.90; more for lesion than the place) and FLAIR" in sentence(first)
    first["votes"]["T1"]["class"] = None
    assert "T1 says no more than the place and FLAIR says lesion (0.70)" in sentence(first)
    complete = run(present=(True, True, True))
    assert complete[0]["blame"] == "T1ce" and "no scan shows anything clear" in sentence(complete[1])


def test_records_without_conflict_maps_and_limits():
    plain = run(cause=None, conflict_pairs=None, support=None, unimodal=None, attribution=None, counterfactual=None)
    assert len(plain) == 2 and "votes" not in plain[0] and "Reason" not in sentence(plain[0])
    assert len(run(largest=1)) == 1
    alone = run(present=(False, True, False))
    assert alone[0]["blame"] is None and alone[0]["pair"] is None
    assert sentence(alone[1]).count("T1 and T1ce are missing here") == 1


def test_only_what_is_above_the_threshold_of_a_review_is_a_region():
    error, label, *_ = scan()
    for scale, expected in ((1.0, [32, 8]), (0.6, [32]), (0.2, [])):  # of .4, .3 and less than 5 voxels of more
        found = records(scale * error, label, (1.0, 1.0, 1.0), MODALITIES, CLASSES, np.ones((3, SHAPE[0]), bool))
        assert [r["voxels"] for r in found] == expected


def test_components_are_three_dimensional():
    error = np.zeros((3, 4, 4), np.float32)
    for d in range(3):
        error[d, d : d + 2, d : d + 2] = 0.5
    found = records(error, np.zeros((3, 4, 4), np.uint8), (1.0, 1.0, 1.0), ("T1",), CLASSES, np.ones((1, 3), bool))
    assert [r["voxels"] for r in found] == [12]
    assert explanation.CAUSES[explanation.CONFLICT] == "conflict"


def test_doubt_inside_a_lesion_is_a_region_apart_from_the_band_around_it():
    error, label = np.zeros((1, 12, 12), np.float32), np.zeros((1, 12, 12), np.uint8)
    error[0, 2:10, 2:10], label[0, 2:10, 2:10] = 0.4, 1
    codes = np.where(error > 0, explanation.BOUNDARY, 0).astype(np.uint8)
    codes[0, 4:8, 4:8] = explanation.CONFLICT
    arguments = (error, label, (1.0, 1.0, 1.0), ("T1",), CLASSES, np.ones((1, 1), bool))
    found = records(*arguments, cause=codes)
    assert [(one["cause"], one["voxels"]) for one in found] == [("boundary", 48), ("conflict", 16)]
    assert [one["voxels"] for one in records(*arguments)] == [64]
    assert sorted(np.unique(explanation.components(error, codes))) == [0, 1, 2]
