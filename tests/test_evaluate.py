"""The evaluation end to end on made-up predictions: no network, no files but the results."""

import csv
import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from entrust_jax import errors, evaluate
from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume
from entrust_jax.metrics import calibration, comparison, lesions, scoring, summary, surface
from entrust_jax.report import output as output_files
from entrust_jax.runtime.mesh import data_mesh

SHAPE = (4, 32, 32)
TARGETS = scoring.Targets(("background", "core", "rim"), {"whole": (1, 2)})


def volume(i, patient=None):
    rng = np.random.default_rng(i)
    z, x, y = np.indices(SHAPE)
    centre = 12 + 8 * rng.random(2)
    r = np.hypot(x - centre[0], y - centre[1]) + 0 * z
    label = np.where(r < 4, 1, np.where(r < 7, 2, 0)).astype(np.int32)
    label[0, 0, :3] = -1
    return Volume(
        name=f"case{i}",
        patient=patient or f"patient{i}",
        number=i,
        image=np.zeros((2, *SHAPE), np.float32),
        present=np.ones(2, bool),
        label=label,
        body=np.ones(SHAPE, bool),
        coordinates=coordinates(np.ones(SHAPE, bool)),
        spacing=(3.0, 1.0, 1.0),
        reference=None,
    )


def predict(case, sharpness=1.0, conflict=True, hypotheses=True):
    """The exact posterior of labels seen through noise; before calibration `sharpness` times too sharp."""
    rng = np.random.default_rng(case.number + 1000)
    true = np.maximum(case.label, 0)
    prior = np.bincount(true.ravel(), minlength=3) / true.size + 1e-3
    seen = 2.0 * np.eye(3)[true] + rng.normal(size=(*SHAPE, 3))
    logits = 2.0 * seen + np.log(prior)

    def softmax(values):
        values = np.exp(values - values.max(-1, keepdims=True))
        return (values / values.sum(-1, keepdims=True)).astype(np.float32)

    p = softmax(logits)
    label = p.argmax(-1).astype(np.uint8)
    entropy = -(p * np.log(p)).sum(-1)
    found = {
        "label": label,
        "probability": p,
        "probability_raw": softmax(sharpness * logits),
        "error_probability": 1 - p.max(-1),
        "entropy": entropy,
        "predicted_dice": 0.9,
        "trust": {"score": case.number * 5 % 11 // 2 / 10},  # two cases have each of them, and its order is no other's
        "seconds": 0.25,
    }
    if hypotheses:
        drawn = (rng.random((5, *SHAPE, 1)) > np.cumsum(p, -1)[None]).sum(-1)
        found["hypotheses"] = np.minimum(drawn, 2).astype(np.uint8)
        found["mean"] = p
        found["gap"] = np.full(SHAPE, 0.05, np.float32)
    if conflict:
        found["conflict"] = (rng.random(SHAPE) < 0.3).astype(np.float32)
        found["one_step"] = p
        found["divergence"] = (0.1 * entropy + 0.05 * found["conflict"]).astype(np.float32)
    return found


def scores(count=11, **options):
    found = []
    for i in range(count):
        case = volume(i)
        found.append(evaluate.score_predictions({"m": predict(case, **options)}, {"m": case}, TARGETS)["m"])
    return found


@pytest.fixture(scope="module")
def plain():
    return scores()


@pytest.fixture(scope="module")
def sharp():
    return scores(sharpness=3.0, conflict=False, hypotheses=False)


def test_a_perfect_prediction_gets_perfect_scores():
    case = volume(0)
    certain = np.eye(3, dtype=np.float32)[np.maximum(case.label, 0)]
    prediction = {
        "label": np.maximum(case.label, 0).astype(np.uint8),
        "probability": certain,
        "probability_raw": certain,
        "error_probability": np.zeros(SHAPE, np.float32),
        "entropy": np.zeros(SHAPE, np.float32),
        "trust": {"score": 1.0},
        "seconds": 1.0,
    }
    scored = evaluate.score_predictions({"m": prediction}, {"m": case}, TARGETS)["m"]
    found = summary.summarise([scored], TARGETS)
    assert found["dice"]["value"] == 1 and found["hd95"]["value"] == 0
    assert found["ece_classwise_roi"]["after"]["value"] == 0
    assert found["nll"]["after"]["value"] == 0 and found["brier"]["before"]["value"] == 0
    assert found["aurc"]["value"] == found["aurc_referral"]["value"] == 0
    assert found["error_auroc"]["value"] is None  # no error to find
    assert "hypothesis_diversity" not in found and "conflict_alignment" not in found
    assert "predicted_dice_mae" not in found and "predicted_dice_spearman" not in found


def test_figures_of_many_patients(plain):
    found = summary.summarise(plain, TARGETS, resamples=200)
    required = ["dice", "hd95", "error_auroc", "error_auprc", "aurc_referral", "aurc", "predicted_dice_mae"]
    required += ["hypothesis_diversity", "hypothesis_dice", "seconds_per_case", "entropy_auroc"]
    required += ["hd95_area_weighted", "nsd", "nsd_voxels", "lesion_dice", "lesion_hd95", "lesion_f1"]
    for key in required:
        low, high = found[key]["ci95"]
        assert low <= found[key]["value"] <= high and found[key]["n"] == 11
    for key in ("ece_classwise_roi", "ece_classwise_body", "nll", "brier"):
        assert set(found[key]) == {"before", "after"}
        assert found[key]["before"] == found[key]["after"]  # sharpness 1: the calibration changed nothing
    assert set(found["dice_by_group"]) == {"core", "rim", "whole"}
    assert found["dice"]["value"] == pytest.approx(np.mean([one.values["dice/whole"] for one in plain]))
    assert found["error_auroc"]["value"] > 0.7
    assert found["error_auprc"]["value"] > found["error_auprc"]["prevalence"] > 0
    assert found["conflict_alignment"]["value"] == pytest.approx(0.05, abs=0.01)
    assert found["conflict_alignment"]["stratified_by"] == ["one-step entropy", "border distance"]
    gaps = [abs(0.9 - one.values["dice_by_class"]) for one in plain]
    assert found["predicted_dice_mae"]["value"] == pytest.approx(np.mean(gaps))
    assert found["tower"]["gap"]["value"] == pytest.approx(0.05) and found["tower"]["holds"]


def test_figures_in_millimetres_name_their_convention(plain):
    found = summary.summarise(plain, TARGETS, resamples=50)
    assert found["nsd"]["convention"] == "area_weighted" and found["nsd_voxels"]["convention"] == "voxels"
    assert found["nsd"]["tolerance_mm"] == scoring.NSD_TOLERANCE
    assert {key: found["lesion_dice"][key] for key in ("rule", "dilation", "floor_mm3", "empty")} == {
        "rule": "glioma",
        "dilation": 3,
        "floor_mm3": 50.0,
        "empty": 0,
    }
    assert found["hd95_area_weighted"]["convention"] == "area_weighted"
    assert set(found["nsd_by_group"]) == set(found["lesion_f1_by_group"]) == {"core", "rim", "whole"}
    case = volume(4)
    truth, guess = (np.where(case.label >= 0, one, 0) > 0 for one in (case.label, predict(case)["label"]))
    values = plain[4].values
    assert values["hd95_area_weighted/whole"] == surface.hd95(guess, truth, case.spacing, "area_weighted")
    for key, convention in (("nsd", "area_weighted"), ("nsd_voxels", "voxels")):
        assert values[f"{key}/whole"] == surface.nsd(guess, truth, case.spacing, scoring.NSD_TOLERANCE, convention)
    for key, value in lesions.scores(guess, truth, case.spacing, lesions.RULES["glioma"]).items():
        assert values[f"{key}/whole"] == value
    few = scoring.Targets(TARGETS.classes, TARGETS.regions, lesion_rule="metastases")
    other = evaluate.score_predictions({"m": predict(case)}, {"m": case}, few)["m"].values
    assert other["lesions_spurious/whole"] >= values["lesions_spurious/whole"] and other["nsd"] == values["nsd"]


def test_a_single_slice_has_a_contour():
    case = volume(0)
    whole = predict(case, conflict=False, hypotheses=False)
    slice_ = {key: value[1:2] if isinstance(value, np.ndarray) else value for key, value in whole.items()}
    label, everywhere = case.label[1:2], np.ones((1, *SHAPE[1:]), bool)
    slice_["label"] = np.roll(label, 3, axis=2).astype(np.uint8)
    values = scoring.score_case(
        slice_, label[None], everywhere, (9.0, 1.0, 1.0), everywhere, TARGETS, name="c", patient="p"
    ).values
    guess, truth = slice_["label"] == 1, label == 1
    pairs = {"hd95": "max_of_directed", "hd95_pooled": "pooled", "hd95_area_weighted": "area_weighted"}
    for key, convention in pairs.items():
        assert values[f"{key}/core"] == surface.hd95(guess[0], truth[0], (1.0, 1.0), convention)
    # As a volume of one slice all of it would be surface, most of which lies on the other's.
    assert values["nsd/core"] < surface.nsd(guess, truth, (9.0, 1.0, 1.0), scoring.NSD_TOLERANCE, "area_weighted")


def test_masks_that_are_empty_are_charged_or_left_out_and_counted():
    case = volume(0)
    none = dataclasses.replace(case, label=np.zeros(SHAPE, np.int32))
    blind = predict(case) | {"label": np.zeros(SHAPE, np.uint8)}
    both, one = (
        summary.summarise([evaluate.score_predictions({"m": dict(blind)}, {"m": c}, TARGETS)["m"]], TARGETS)
        for c in (none, case)
    )
    for key in scoring.GEOMETRY:
        nothing = {"lesion_dice": 1, "lesion_hd95": 0, "lesion_f1": 1}.get(key)  # as BraTS 2023 has it
        assert both[key]["value"] == nothing and both[key]["empty"] == (nothing is None), key
        expected = None if key.startswith("hd95") else 374.0 if key == "lesion_hd95" else 0.0
        assert one[key]["value"] == expected and one[key]["empty"] == (expected is None), key


def test_too_sharp_probabilities_are_worse_before_calibration(sharp):
    found = summary.summarise(sharp, TARGETS, resamples=50)
    for key in ("ece_classwise_roi", "nll", "brier"):
        assert found[key]["before"]["value"] > found[key]["after"]["value"]


def test_pooled_figures_equal_those_of_all_voxels_together(plain):
    p, y, inside = [], [], []
    for i in range(len(plain)):
        case = volume(i)
        p.append(predict(case)["probability"])
        y.append(case.label)
        inside.append(calibration.region_of_interest([p[-1][..., 0]]))
    p, y, inside = np.stack(p), np.stack(y), np.stack(inside)
    found = summary.summarise(plain, TARGETS, resamples=50)
    whole = calibration.classwise_ece(calibration.class_bins(p, y, inside))
    assert found["ece_classwise_roi"]["after"]["value"] == pytest.approx(whole)
    total, count = calibration.nll(p, y, inside)
    assert found["nll"]["after"]["value"] == pytest.approx(total / count)
    per_patient = [calibration.classwise_ece(calibration.class_bins(p[i], y[i], inside[i])) for i in range(11)]
    assert found["ece_classwise_roi_per_patient"]["after"]["value"] == pytest.approx(np.mean(per_patient))


def with_values(scores, **columns):
    """The scores with other values, one a case, under these names."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [dataclasses.replace(one, values=one.values | row) for one, row in zip(scores, rows, strict=True)]


def test_an_order_stands_beside_a_random_one_and_the_best(plain):
    dice = np.array([0.2, 0.4, 0.6, 0.8])
    own = with_values(plain[:4], dice=dice, trust=(0.1, 0.3, 0.3, 0.9), uncertainty=(0.0, 0.3, 0.2, 0.4))
    found = summary.summarise(own, TARGETS)
    best = np.mean([0.2, 0.3, 0.4, 0.5])  # of the best, the best two, the best three and all, by hand
    for key in ("aurc_referral", "aurc"):
        assert found[key]["random"] == pytest.approx(0.5) and found[key]["oracle"] == pytest.approx(best)
        assert found[f"excess_{key}"]["value"] == pytest.approx(found[key]["value"] - best)
    assert found["aurc_referral"]["value"] == pytest.approx(best)  # the tied by their uncertainty
    assert found["aurc"]["value"] == pytest.approx(np.mean([0.8, 0.6, 0.6, 0.5]))  # worse than no order at all
    none = summary.summarise(with_values(plain[:1], dice=[np.nan]), TARGETS)
    assert none["aurc"]["value"] is None and "random" not in none["aurc"]


def test_predicted_and_true_dice_are_compared_by_rank_over_the_patients(plain):
    true = np.array([0.1, 0.9, 0.3, 0.5, 0.2, 0.8, 0.4, 0.6, 0.7, 0.35, 0.65])
    guess = true**3  # far off, in the right order
    guess[[0, 1]] = guess[[1, 0]]  # but for the worst and the best
    found = summary.summarise(with_values(plain, predicted_dice=guess, dice_by_class=true), TARGETS, resamples=200)
    one = found["predicted_dice_spearman"]
    assert one["value"] == pytest.approx(1 - 6 * 2 * 10**2 / (11 * (11**2 - 1))) and one["n"] == 11
    assert one["ci95"][0] < one["value"] <= one["ci95"][1] <= 1
    few = with_values(plain[:9], predicted_dice=guess[:9], dice_by_class=true[:9])
    few = summary.summarise(few, TARGETS)["predicted_dice_spearman"]
    assert few["ci95"] is None and "fewer than 10" in few["reason"]
    same = summary.summarise(plain, TARGETS, resamples=20)["predicted_dice_spearman"]  # .9 for all
    assert same["value"] is None and same["reason"] == "undefined"


def test_two_scans_of_a_patient_count_once():
    cases = [volume(0, "same"), volume(1, "same"), volume(2)]
    own = [evaluate.score_predictions({"m": predict(c)}, {"m": c}, TARGETS)["m"] for c in cases]
    found = summary.summarise(own, TARGETS)
    dice = [one.values["dice"] for one in own]
    assert found["dice"]["n"] == 2
    assert found["dice"]["value"] == pytest.approx(((dice[0] + dice[1]) / 2 + dice[2]) / 2)
    assert found["conflict_alignment"]["n"] == 2


def test_dice_that_a_prediction_estimates_counts_empty_classes_as_right():
    case = volume(0)
    case = dataclasses.replace(case, label=np.where(case.label == 1, 1, 0).astype(np.int32))  # class 2 is nowhere
    prediction = predict(case)
    prediction["label"] = case.label.astype(np.uint8)
    scored = evaluate.score_predictions({"m": prediction}, {"m": case}, TARGETS)["m"]
    assert np.isnan(scored.values["dice/rim"])
    assert scored.values["dice_by_class"] == 1 and scored.values["predicted_dice_error"] == pytest.approx(0.1)


def test_a_gap_above_its_bound_fails_the_tower_check():
    p = np.full((10, 2), 0.5, np.float32)
    body = np.ones(10, bool)
    gap, bound, count = scoring.tower_sums(np.full(10, 0.3, np.float32), p, body, 16)
    assert count == 10 and gap / count == pytest.approx(0.3)
    assert bound / count == pytest.approx(0.92 * 0.5 / 4 + 0.02)
    assert scoring.tower_sums(np.ones(10, np.float32), p * 0 + np.float32([0.95, 0.05]), body, 16)[2] == 0


@pytest.mark.parametrize(("share", "holds"), [(0.0, True), (0.25, False)])
def test_tower_holds_for_draws_of_the_marginal_and_fails_for_a_shifted_sampler(share: float, holds: bool):
    rng = np.random.default_rng(1)
    p = rng.uniform(0, 1, (1, 40, 40)).astype(np.float32)
    votes = (rng.random((16, *p.shape)) < p + share * (1 - p)).mean(0).astype(np.float32)
    body = np.ones(p.shape, bool)
    gap, bound, count = scoring.tower_sums(np.abs(p - votes), np.stack([1 - votes, votes], -1), body, 16)
    assert count == ((votes > 0.1) & (votes < 0.9)).sum()
    assert (gap <= bound) == holds


def test_roi_is_shared_by_the_methods():
    case = volume(0)
    narrow, wide = predict(case), predict(case)
    wide["probability"] = np.full_like(wide["probability"], 1 / 3)
    alone = evaluate.score_predictions({"a": dict(narrow)}, {"a": case}, TARGETS)["a"]
    both = evaluate.score_predictions({"a": narrow, "b": wide}, {"a": case, "b": case}, TARGETS)
    known = (case.label >= 0).sum()
    assert both["a"].values["roi_voxels"] == both["b"].values["roi_voxels"] == known
    assert alone.values["roi_voxels"] <= known


def test_roi_does_not_know_the_truth():
    case = volume(0)
    blind = predict(case)
    for key in ("probability", "probability_raw"):
        blind[key] = np.broadcast_to(np.float32([1, 0, 0]), (*SHAPE, 3)).copy()
    blind["label"] = np.zeros(SHAPE, np.uint8)
    scored = evaluate.score_predictions({"m": blind}, {"m": case}, TARGETS)["m"]
    assert scored.values["roi_voxels"] == 0
    found = summary.summarise([scored], TARGETS)
    assert found["ece_classwise_roi"]["after"]["value"] is None
    assert found["ece_classwise_body"]["after"]["value"] > 0
    assert found["hd95"]["value"] is None and found["hd95"]["empty"] == 1 and found["dice"]["value"] == 0


def test_comparison_is_paired(plain, sharp):
    found = comparison.compare({"ours": sharp, "other": plain}, resamples=200)
    assert found["reference"] == "ours"
    same = found["differences"]["other"]["dice"]  # the same masks
    assert same["value"] == 0 and same["ci95"] == [0, 0] and same["p"] is None
    ece = found["differences"]["other"]["ece_classwise_roi/before"]
    assert ece["ci95"][1] < 0 and ece["p_holm"] < 0.05 and ece["rank_biserial"] == -1
    assert "hypothesis_diversity" not in found["differences"]["other"]  # one method has no hypotheses
    assert found["differences"]["other"]["aurc"]["p"] is None
    table = comparison.comparison_table(found)
    lines = table.strip().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    for metric in ("hypothesis_diversity", "nsd", "lesion_dice", "lesion_f1"):
        assert any(line.startswith(f"| {metric}") for line in lines)
    random = 1 - np.mean([one.values["dice"] for one in plain])
    assert found["figures"]["other"]["aurc"]["random"] == pytest.approx(random)
    for metric in summary.AREAS:  # of both methods, not of their difference
        (line,) = [line for line in lines if line.startswith(f"| {metric} ")]
        assert line.count(f"(n=11, random {random:.4g}, best ") == 2
    with pytest.raises(ValueError, match="different cases"):
        comparison.compare({"a": plain, "b": plain[:-1]})


def test_results_of_one_method_are_written(tmp_path, plain, capsys):
    about = {"data": "phantom", "split": "test", "command": "c", "code_version": None}
    output = tmp_path / "W" / "evaluation"
    with output_files.whole_folder(output, evaluate.check_output) as folder:
        evaluate.write_results(folder, {"m": plain}, TARGETS, about, {"m": "W"}, resamples=50)
        assert not output.exists()
    assert sorted(one.name for one in output.iterdir()) == [
        "cases.csv",
        "conflict.png",
        "reliability.png",
        "risk_coverage.png",
        "summary.json",
    ]
    found = json.loads((output / "summary.json").read_text(), parse_constant=pytest.fail)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("aurc_referral ")]
    assert line.endswith(f"n=11, random {found['aurc']['random']:.4g}, best {found['aurc']['oracle']:.4g}")
    assert found["dice"]["n"] == 11 and found["about"]["conventions"]["roi"]
    assert found["peak_memory_mb"]["value"] > 50
    with (output / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [f"case{i}" for i in range(11)]
    assert float(rows[3]["dice"]) == pytest.approx(plain[3].values["dice"])
    assert float(rows[3]["nsd/core"]) == plain[3].values["nsd/core"] and float(rows[3]["lesions/whole"]) == 1
    assert float(rows[3]["ece_classwise_roi/after"]) > 0 and float(rows[3]["error_auroc"]) > 0.5
    evaluate.check_output(output)  # may be replaced


def test_results_of_several_methods_are_written(tmp_path, plain, sharp):
    about = {"data": "phantom", "split": "test"}
    evaluate.write_results(tmp_path, {"a": plain, "b": sharp}, TARGETS, about, {"a": "A", "b": "B"}, resamples=30)
    assert (tmp_path / "a" / "summary.json").is_file() and (tmp_path / "b" / "cases.csv").is_file()
    table = (tmp_path / "comparison.md").read_text()
    assert table.count("\n|") > 8 and "NSD within 2 mm" in table and "the glioma rule of BraTS 2023" in table
    assert json.loads((tmp_path / "comparison.json").read_text())["reference"] == "a"
    assert (tmp_path / "risk_coverage.png").is_file()


def test_a_failure_keeps_the_earlier_results(tmp_path):
    output = tmp_path / "evaluation"
    output.mkdir()
    old = json.dumps({"about": {"made_by": evaluate.MAKER}})
    (output / "summary.json").write_text(old)
    with pytest.raises(RuntimeError), output_files.whole_folder(output, evaluate.check_output) as folder:
        (folder / "summary.json").write_text("new")
        raise RuntimeError
    assert (output / "summary.json").read_text() == old
    assert [one.name for one in tmp_path.iterdir()] == ["evaluation"]
    with output_files.whole_folder(output, evaluate.check_output) as folder:
        (folder / "comparison.json").write_text("new")
    assert [one.name for one in output.iterdir()] == ["comparison.json"]
    assert [one.name for one in tmp_path.iterdir()] == ["evaluation"]


@pytest.mark.parametrize(
    ("files", "lost"),
    [
        ({"summary.json": "{}"}, "summary.json"),  # somebody else's: nnU-Net writes one too
        ({"summary.json": "OURS", "thesis.docx": ""}, "thesis.docx"),
        ({"A/summary.json": "OURS", "B/summary.json": "OURS"}, "A/summary.json"),  # results of their own
        ({"comparison.json": "OURS", "A/summary.json": "", "A/thesis.docx": ""}, "A/thesis.docx"),
        ({"comparison.json": "OURS", "C/summary.json": ""}, "C/summary.json"),
    ],
)
def test_only_an_earlier_evaluation_is_replaced(tmp_path, files, lost):
    ours = {"made_by": evaluate.MAKER, "roi_shared_by": ["A", "B"]}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(ours | {"about": ours}) if text == "OURS" else text)
    with pytest.raises(errors.UserError, match="would be lost") as error:
        evaluate.check_output(tmp_path)
    assert f"({lost})" in str(error.value)


def test_an_earlier_comparison_is_replaced(tmp_path):
    (tmp_path / "comparison.json").write_text(json.dumps({"made_by": evaluate.MAKER, "roi_shared_by": ["A"]}))
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "cases.csv").write_text("")
    evaluate.check_output(tmp_path)


def test_a_folder_of_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(errors.UserError, match="which would be lost"):
        evaluate.check_output(tmp_path)
    with pytest.raises(errors.UserError, match="file"):
        evaluate.check_output(tmp_path / "thesis.tex")
    evaluate.check_output(tmp_path / "new")


def test_mistakes_are_explained():
    with pytest.raises(errors.UserError, match="no labelled case"):
        evaluate.check_same_cases({"a": []}, "test")
    with pytest.raises(errors.UserError, match=r"2 in one only: x, z"):
        evaluate.check_same_cases({"a": ["x", "y"], "b": ["y", "z"]}, "test")
    evaluate.check_same_cases({"a": ["x"], "b": ["x"]}, "test")

    def config(*classes):
        data = {"classes": classes, "regions": {"whole": (1,)}, "modalities": ("A", "B")}
        return types.SimpleNamespace(data=types.SimpleNamespace(**data, get=data.get))

    assert evaluate.common_targets({"a": config("bg", "x")}, "glioma").headline() == ["whole"]
    with pytest.raises(errors.UserError, match="classes"):
        evaluate.common_targets({"a": config("bg", "x"), "b": config("bg", "y")}, "glioma")


def test_flow_with_a_made_up_model(tmp_path, monkeypatch, capsys):
    cases = [volume(1), volume(0)]
    unlabelled = dataclasses.replace(volume(2), label=None)
    data = {
        "classes": TARGETS.classes,
        "regions": dict(TARGETS.regions),
        "dir": "D",
        "modalities": ("A", "B"),
        "patch": (8, 8),
    }
    config = types.SimpleNamespace(data=types.SimpleNamespace(**data, get=data.get))

    def load(workdir):
        return types.SimpleNamespace(
            name=workdir.name, config=config, splits={"train": ["case1"], "test": []}, rung="identity",
            conformal=None, spacing=(), mesh=data_mesh(jax.devices()[:1]),
        )  # fmt: skip

    monkeypatch.setattr(evaluate.cli, "setup_devices", lambda: None)  # the tests' devices stay
    monkeypatch.setattr(evaluate.api, "load", load)
    monkeypatch.setattr(evaluate.api, "read_cases", lambda *_, **__: ([*cases, unlabelled], ["case9: unreadable"]))
    predicted = []

    def predict_volume(trained, case):
        predicted.append((trained.name, case.name))
        return predict(case)

    monkeypatch.setattr(evaluate.api, "predict_volume", predict_volume)
    monkeypatch.setattr(evaluate.networks, "multiple", lambda config: 16)
    flags = types.SimpleNamespace(
        workdir=[str(tmp_path / "A"), str(tmp_path / "B")], data_dir=None, split="all", output=None, location=True,
        lesions="metastases",
    )  # fmt: skip
    monkeypatch.setattr(evaluate, "FLAGS", flags)
    evaluate.main([])
    printed = capsys.readouterr().out
    assert (
        "A: case9: unreadable" in printed
        and "left out: case2" in printed
        and "2/2 case1" in printed
        and "had a part in training" in printed
    )
    found = json.loads((tmp_path / "A" / "comparison" / "comparison.json").read_text())
    assert found["differences"]["B"]["dice"]["value"] == 0
    assert "case9: unreadable" in found["warnings"]["A"] and "case2" in found["warnings"]["B"][-1]
    # Each method once more on the first case of a size, whose time would be that of compiling.
    assert predicted == [("A", "case0"), ("B", "case0"), ("A", "case0"), ("B", "case0"), ("A", "case1"), ("B", "case1")]
    assert found["trained_on"]["A"] == ["case1"]
    ruled = json.loads((tmp_path / "A" / "comparison" / "A" / "summary.json").read_text())["lesion_f1"]
    assert ruled["rule"] == "metastases" and ruled["dilation"] == 1
    place = json.loads((tmp_path / "A" / "comparison" / "A" / "summary.json").read_text())["location_dice"]
    assert 0.1 < place["value"] < 1 and place["n"] == 2
    with pytest.raises(errors.UserError, match="twice"):
        evaluate.load_methods([tmp_path / "A", tmp_path / "A"])


def test_unimodal_dice_leaves_missing_modalities_out():
    case = volume(1)
    prediction = predict(case)
    truth = np.eye(len(TARGETS.classes), dtype=np.float32)[np.maximum(case.label, 0)]
    prediction["unimodal"] = np.stack([truth, np.roll(truth, 1, axis=-1)])
    targets = scoring.Targets(TARGETS.classes, TARGETS.regions, ("A", "B"))
    roi = np.ones(case.label.shape, bool)

    def score(present):
        one = prediction | {"present": np.array(present)}
        found = scoring.score_case(
            one, case.label[None], case.body, case.spacing, roi, targets, name="c", patient="p", permutations=10
        )
        return {key: value for key, value in found.values.items() if key.startswith("unimodal")}

    both = score([True, True])
    assert both["unimodal_dice/A"] == pytest.approx(1.0)
    assert both["unimodal_dice/B"] < 0.5
    assert set(score([True, False])) == {"unimodal_dice/A"}


def rated(i, raters):
    """A case whose raters drew the label of `volume`, shifted by so many voxels each; None: saw nothing."""
    case = volume(i)
    truth = np.maximum(case.label, 0)
    drawn = [np.zeros_like(truth) if shift is None else np.roll(truth, shift, axis=1) for shift in raters]
    return dataclasses.replace(case, raters=np.stack(drawn))


def test_raters_are_the_truth_one_after_the_other():
    case = rated(3, (0, 1, None))
    prediction = predict(case) | {"present": np.array([True])}
    found = evaluate.score_predictions({"m": dict(prediction)}, {"m": case}, TARGETS)["m"]
    alone = [
        evaluate.score_predictions(
            {"m": dict(prediction)}, {"m": dataclasses.replace(case, label=one, raters=None)}, TARGETS
        )["m"]
        for one in case.raters
    ]
    for key in ("dice/whole", "dice_by_class", "hd95", "uncertainty", "roi_voxels", "hypothesis_diversity"):
        values = [one.values[key] for one in alone]
        assert found.values[key] == pytest.approx(np.nanmean(values)), key
    for key in ("bins_roi/after", "nll/after", "error"):
        np.testing.assert_allclose(found.sums[key], np.mean([one.sums[key] for one in alone], axis=0))
    # The predicted Dice estimates the mean over raters; its error is that of the mean, not the mean of the errors.
    assert found.values["predicted_dice_error"] == pytest.approx(abs(0.9 - found.values["dice_by_class"]))
    assert found.alignment is not None and "ged2" not in alone[0].values


def test_hypotheses_that_are_the_raters_get_perfect_scores_and_their_sizes_are_printed(tmp_path, capsys):
    cases = [rated(i, (0, 2, None, 1)[: 4 - i % 2]) for i in range(4)]
    own = []
    for case in cases:
        one = predict(case)
        one["hypotheses"] = case.raters[np.arange(12) % len(case.raters)].astype(np.uint8)
        own.append(evaluate.score_predictions({"m": one}, {"m": case}, TARGETS)["m"])
    found = summary.summarise(own, TARGETS)
    assert found["ged2"]["value"] == pytest.approx(0) and found["ged2"]["reason"].startswith("4 patients")
    for key in ("hm_iou", "d_max"):
        assert found[key]["value"] == pytest.approx(1)
    assert {key: found["ged2"][key] for key in ("n", "hypotheses", "raters")} == {
        "n": 4,
        "hypotheses": 12,
        "raters": [3, 4],
    }
    # Twelve draws of a few masks repeat them: the smallest distance is 0, the raters' is not.
    assert found["ci_score"]["value"] < 1
    assert found["diversity"]["value"] == pytest.approx(found["rater_diversity"]["value"], rel=0.4)
    about = {"data": "d", "split": "test", "command": "c", "code_version": None}
    evaluate.write_results(tmp_path, {"m": own}, TARGETS, about, {"m": "W"}, resamples=20)
    assert "N=12, R=3-4" in capsys.readouterr().out
    written = json.loads((tmp_path / "summary.json").read_text())
    assert "V-statistic" in written["about"]["conventions"]["ged2"] and written["ged2"]["hypotheses"] == 12
    with (tmp_path / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["raters"]) for row in rows] == [4, 3, 4, 3] and float(rows[0]["hm_iou"]) == pytest.approx(1)


def test_what_became_of_the_guarantees(tmp_path, capsys):
    found = []
    for i in range(12):
        case = volume(i)
        truth = np.isin(case.label, (1, 2))
        outer = truth.copy()
        outer[:, :, 16:] &= i % 4 != 0  # every fourth patient loses what lies there
        ml = float(truth.sum() * 3 / 1000)
        promised = {
            "outer_mask": {"whole": outer},
            "inner_mask": {"whole": np.roll(truth, 1, axis=1) if i % 2 else np.zeros_like(truth)},
            "dice": (0.0, 1.0) if i % 3 else (0.0, 0.0),
            "volume": {"whole": (ml, ml) if i < 6 else (0.0, 0.9 * ml)},
            "statements": [],
        }
        one = evaluate.score_predictions({"m": predict(case) | {"conformal": promised}}, {"m": case}, TARGETS)["m"]
        found.append(one)
        assert one.values["outer_fnr/whole"] == pytest.approx(np.mean(~outer[truth]))
    about = {"data": "d", "split": "test", "command": "c", "code_version": None}
    evaluate.write_results(tmp_path, {"m": found}, TARGETS, about, {"m": "W"}, resamples=20)
    written = json.loads((tmp_path / "summary.json").read_text())["conformal"]
    assert set(written) == set(summary.GUARANTEED)
    mean = np.mean([one.values["outer_fnr/whole"] for one in found])
    assert 0 < mean < 0.25 and written["outer_fnr"]["whole"]["value"] == pytest.approx(mean)
    assert 0 < written["inner_fdr"]["whole"]["value"] < 0.5  # nothing marked, nothing false
    assert written["dice_covered"]["value"] == pytest.approx(8 / 12) and written["dice_covered"]["n"] == 12
    assert written["volume_covered"]["whole"]["value"] == pytest.approx(0.5)
    assert "outer_fnr whole" in capsys.readouterr().out
    # A patient without the region has nothing to miss.
    case = dataclasses.replace(volume(0), label=np.zeros(SHAPE, np.int32))
    none = {**promised, "outer_mask": {"whole": np.zeros(SHAPE, bool)}}
    one = evaluate.score_predictions({"m": predict(case) | {"conformal": none}}, {"m": case}, TARGETS)["m"]
    assert np.isnan(one.values["outer_fnr/whole"])


def test_referral_leaves_the_better_cases(plain):
    found = summary.summarise(plain, TARGETS, resamples=20)["referral"]
    assert found["referred"] == pytest.approx([0, 1 / 11, 2 / 11, 3 / 11, 5 / 11])
    assert found["dice"][0] == pytest.approx(np.mean([one.values["dice"] for one in plain]))
    order = sorted(plain, key=lambda one: (-one.values["trust"], one.values["uncertainty"]))
    assert found["dice"][-1] == pytest.approx(np.mean([one.values["dice"] for one in order[:6]]))


def test_methods_are_compared_against_raters_at_equal_numbers_of_hypotheses_only():
    cases = [rated(i, (0, 1)) for i in range(3)]
    many = [evaluate.score_predictions({"m": predict(c)}, {"m": c}, TARGETS)["m"] for c in cases]
    single = [evaluate.score_predictions({"m": predict(c, hypotheses=False)}, {"m": c}, TARGETS)["m"] for c in cases]
    found = comparison.compare({"many": many, "again": many, "single": single}, resamples=20)
    assert found["differences"]["again"]["ged2"]["value"] == 0
    assert "ged2" not in found["differences"]["single"] and "dice" in found["differences"]["single"]
    # A method without hypotheses has one, the delivered label: no diversity, but a distance to the raters.
    assert found["figures"]["single"]["ged2"]["hypotheses"] == 1 and found["figures"]["many"]["ged2"]["hypotheses"] == 5
    assert found["figures"]["single"]["diversity"]["value"] is None
    assert single[0].values["d_max"] > 0 and "N=1)" in comparison.comparison_table(found)
