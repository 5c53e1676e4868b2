"""Scores trained models on labelled cases: python -m entrust_jax.evaluate --workdir=W [--data_dir=D]
[--split=test|all] [--location] [--lesions=glioma|metastases].

With several working folders, --workdir=A,B,C, all are scored on the same cases inside one region of
interest, and compared with the first.
"""

import csv
import dataclasses
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from entrust_jax import api, cli, inference, networks
from entrust_jax.baselines import location as baseline
from entrust_jax.data import preprocess, resampling, scans
from entrust_jax.errors import UserError
from entrust_jax.metrics import calibration, comparison, conflict, lesions, scoring, summary, usefulness
from entrust_jax.report import curves
from entrust_jax.report import output as output_folder
from entrust_jax.runtime import logs, memory
from entrust_jax.trustmap import conformal

FLAGS = flags.FLAGS
MAKER = "entrust_jax.evaluate"
# What an evaluation leaves in its folder, beside a folder with a summary.json for each of several methods.
WRITTEN = (
    "summary.json", "cases.csv", "reliability.png", "risk_coverage.png", "conflict.png",
    "comparison.json", "comparison.md",
)  # fmt: skip


def define_flags() -> None:
    """The command line of this entry point."""
    flags.DEFINE_list("workdir", None, "Working folders of trained models, separated by commas.")
    flags.DEFINE_string("data_dir", None, "Folder of the labelled scans; the one trained on if left out.")
    flags.DEFINE_enum("split", "test", ["test", "all"], "Held-out test cases, or every labelled case of the folder.")
    flags.DEFINE_bool("location", False, "Beside each Dice that of the mean training mask: place alone.")
    flags.DEFINE_enum(
        "lesions",
        "glioma",
        list(lesions.RULES),
        "Rule of BraTS 2023 by which lesions are scored: of its glioma challenge (with at most 6 voxels between them "
        "they are one, none of 50 mm^3 or less counts), or of its metastases challenge (2 voxels, 2 mm^3), for sets of "
        "small lesions.",
    )
    flags.DEFINE_string(
        "output",
        None,
        "Folder for the results, default W/evaluation (for several: W/comparison of the first W).",
    )


def main(_: Sequence[str]) -> None:
    """Loads, predicts and scores case by case, then writes everything at once."""
    if not FLAGS.workdir:
        raise UserError("--workdir is missing: name the working folder of a trained model, --workdir=runs/NAME")
    workdirs = [Path(workdir) for workdir in FLAGS.workdir]
    default = workdirs[0] / ("evaluation" if len(workdirs) == 1 else "comparison")
    output = Path(FLAGS.output) if FLAGS.output else default
    cli.check_place(output, "--output")
    check_output(output)
    cli.setup_devices()
    methods = load_methods(workdirs)
    targets = common_targets({name: trained.config for name, trained in methods.items()}, FLAGS.lesions)
    volumes, left_out = read_volumes(methods, FLAGS.data_dir, FLAGS.split)
    places = {name: mean_mask(trained, targets) for name, trained in methods.items()} if FLAGS.location else {}
    scores = score_all(methods, volumes, targets)
    for name, place in places.items():
        scores[name] = beside_location(place, volumes[name], scores[name], targets)
    about = {
        "command": shlex.join(["python", "-m", "entrust_jax.evaluate", *sys.argv[1:]]),
        "code_version": logs.code_version(),
        "data": str(FLAGS.data_dir or next(iter(methods.values())).config.data.dir),
        "split": FLAGS.split,
        "warnings": left_out,
        "trained_on": {name: seen_in_training(trained, scores[name]) for name, trained in methods.items()},
        "calibrator": {name: trained.rung for name, trained in methods.items()},
        "guarantees": {
            name: conformal.statements(trained.conformal) if trained.conformal else [conformal.NO_GUARANTEE]
            for name, trained in methods.items()
        },
        "roi_shared_by": list(methods),
    }
    folders = {name: str(workdir) for name, workdir in zip(methods, workdirs, strict=True)}
    with output_folder.whole_folder(output, check_output) as folder:
        write_results(folder, scores, targets, about, folders)
    print(f"wrote {output}")


def load_methods(workdirs: Sequence[Path]) -> dict[str, Any]:
    """The trained models by a name that tells them apart: the config's, else the folder's, else the
    folder's path."""
    trained = [api.load(workdir) for workdir in workdirs]
    for names in (
        [one.name for one in trained],
        [w.name for w in workdirs],
        [str(w).replace(os.sep, "_") for w in workdirs],
    ):
        if len(set(names)) == len(names):
            return dict(zip(names, trained, strict=True))
    raise UserError(f"--workdir={','.join(map(str, workdirs))} names a folder twice: name each once")


def common_targets(configs: Mapping[str, Any], lesion_rule: str) -> scoring.Targets:
    """The classes and regions to score, and how lesions are; UserError if the methods' classes differ."""
    found = {name: tuple(config.data.classes) for name, config in configs.items()}
    first, *others = found
    for name in others:
        if found[name] != found[first]:
            raise UserError(
                f"{name} has classes {found[name]}, {first} {found[first]}: "
                "compare models with equal config.data.classes"
            )
    regions = configs[first].data.get("regions") or {}
    return scoring.Targets(
        found[first],
        {str(region): tuple(members) for region, members in regions.items()},
        tuple(configs[first].data.modalities),
        lesion_rule,
    )


def read_volumes(
    methods: Mapping[str, Any], data_dir: str | None, split: str
) -> tuple[dict[str, list[Any]], dict[str, list[str]]]:
    """The labelled cases as each method reads them, in one order, and a line for every case left out or warned of;

    UserError if the methods' cases differ or there are none.
    """
    volumes: dict[str, list[Any]] = {}
    warnings: dict[str, list[str]] = {}
    for name, trained in methods.items():
        found, problems = api.read_cases(trained, data_dir, split)
        warnings[name] = problems
        for problem in problems:
            print(f"{name}: {problem}")
        volumes[name] = sorted(found, key=lambda volume: volume.name)
        if any(scans.is_picture(volume.reference) for volume in found if volume.reference):
            warnings[name].append("pictures do not say how large a pixel is: 1 mm is taken, so no mm or ml is real")
            print(f"{name}: {warnings[name][-1]}")
        unlabelled = [volume.name for volume in volumes[name] if volume.label is None]
        if unlabelled:
            warnings[name].append(f"without a label, left out: {', '.join(unlabelled)}")
            print(f"{name}: {warnings[name][-1]}")
            volumes[name] = [volume for volume in volumes[name] if volume.label is not None]
    check_same_cases({name: [volume.name for volume in own] for name, own in volumes.items()}, split)
    return volumes, warnings


def check_same_cases(cases: Mapping[str, Sequence[str]], split: str) -> None:
    """UserError unless every method has the same cases, at least one."""
    first, *others = cases
    if not cases[first]:
        raise UserError(f"--split={split}: no labelled case to score; check --data_dir, or use --split=all")
    for name in others:
        if odd := sorted(set(cases[name]) ^ set(cases[first])):
            shown = ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
            raise UserError(
                f"{name} and {first} have different {split} cases ({len(odd)} in one only: {shown}): compare "
                "models of one split, or give --data_dir with scans that none was trained on and --split=all"
            )


def score_all(
    methods: Mapping[str, Any], volumes: Mapping[str, Sequence[Any]], targets: scoring.Targets
) -> dict[str, list[scoring.Scores]]:
    """Scores of every method on every case. Cases outside, methods inside: the region of interest needs
    every method's prediction of a case, and no more than one case is held. A size that is met for the first time
    is predicted twice: seconds per case are those of a compiled program; in 3-D they hold the compiling."""
    met: set[tuple[str, tuple[int, ...]]] = set()
    scores: dict[str, list[scoring.Scores]] = {name: [] for name in methods}
    count = len(next(iter(volumes.values())))
    for i in range(count):
        started = time.perf_counter()
        case = {name: own[i] for name, own in volumes.items()}
        for name, trained in methods.items():
            multiple = networks.multiple(trained.config)
            own, scan = resampling.lattice_of(case[name]), case[name].reference or case[name].name
            slices, *sides = resampling.working(own, trained.spacing, scan).sizes
            chunk = inference.chunk_size(slices, trained.mesh)
            size = (name, (chunk, *(-(-side // multiple) for side in sides)))
            if not networks.volumetric(trained.config) and size not in met:
                api.predict_volume(trained, case[name])
                met.add(size)
        predictions = {name: api.predict_volume(trained, case[name]) for name, trained in methods.items()}
        for name, one in score_predictions(predictions, case, targets).items():
            scores[name].append(one)
        dice = ", ".join(f"{name} {own[-1].values['dice']:.3f}" for name, own in scores.items())
        seconds = time.perf_counter() - started
        print(f"{i + 1}/{count} {next(iter(case.values())).name}: {seconds:.1f} s, Dice {dice}", flush=True)
    return scores


def score_predictions(
    predictions: dict[str, dict[str, Any]], volumes: Mapping[str, Any], targets: scoring.Targets
) -> dict[str, scoring.Scores]:
    """Scores of one case by method, all inside the one region of interest that their foreground
    probabilities give."""
    roi = calibration.region_of_interest([one["probability"][..., 0] for one in predictions.values()])
    scores = {}
    for name in list(predictions):
        volume = volumes[name]
        if volume.label.shape != roi.shape:
            raise UserError(
                f"{volume.name}: {name} reads it on a grid of its own, {volume.label.shape}: "
                "compare models of one config.data.reference"
            )
        scores[name] = scoring.score_case(
            predictions.pop(name),  # its arrays go as soon as they are scored
            preprocess.labels_of(volume),
            volume.body,
            volume.spacing,
            roi,
            targets,
            name=volume.name,
            patient=volume.patient,
            seed=volume.number,
        )
    return scores


def mean_mask(trained: Any, targets: scoring.Targets) -> baseline.Location:
    """The mean mask of a method's own training cases. Raises UserError where they are not there any more."""
    try:
        seen, _ = api.read_cases(trained, split="train")
    except UserError as error:
        raise UserError(f"--location needs the training cases of {trained.name}: {error}") from None
    return baseline.fit(seen, len(targets.classes))


def beside_location(
    location: baseline.Location, volumes: Sequence[Any], scores: Sequence[scoring.Scores], targets: scoring.Targets
) -> list[scoring.Scores]:
    """The scores with the Dice of the mean mask."""
    found = []
    for volume, one in zip(volumes, scores, strict=True):
        place = baseline.predict(location, volume)
        dice = [scoring.headline_dice(place, label, targets) for label in preprocess.labels_of(volume)]
        finite = [value for value in dice if np.isfinite(value)]
        mean = float(np.mean(finite)) if finite else math.nan
        found.append(dataclasses.replace(one, values=one.values | {"location_dice": mean}))
    return found


def seen_in_training(trained: Any, cases: Sequence[Any]) -> list[str]:
    """Names of the cases, or scores of cases, on which the model was trained, chosen or calibrated: no test of it."""
    used = {
        name
        for part, names in dict(trained.splits).items()
        if part in ("train", "val", "calibration")
        for name in names
    }
    seen = sorted(one.name for one in cases if one.name in used)
    if seen:
        print(f"{trained.name}: {len(seen)} of {len(cases)} cases had a part in training: no test")
    return seen


def peak_memory() -> dict[str, Any]:
    """Largest resident memory of this process so far, as a figure."""
    reason = "one measurement: host memory of the whole process, data and every method included"
    return {"value": round(memory.peak() / 2**20, 1), "ci95": None, "n": 1, "reason": reason}


def write_results(
    folder: Path,
    scores: Mapping[str, Sequence[scoring.Scores]],
    targets: scoring.Targets,
    about: Mapping[str, Any],
    workdirs: Mapping[str, str],
    resamples: int = 2000,
) -> None:
    """Writes summary.json, cases.csv and the pictures of one method into `folder`; of several into a folder
    each, with comparison.json, comparison.md and one risk-coverage picture beside them."""
    several = len(scores) > 1
    for name, cases in scores.items():
        own = folder / name if several else folder
        own.mkdir(parents=True, exist_ok=True)
        results = {
            "method": name,
            "workdir": workdirs[name],
            "about": {
                "made_by": MAKER,
                **about,
                "cases": len(cases),
                "patients": len({case.patient for case in cases}),
                "conventions": summary.CONVENTIONS,
            },
            **summary.summarise(cases, targets, resamples=resamples),
            "peak_memory_mb": peak_memory(),
        }
        logs.write_json(own / "summary.json", results)
        write_cases(own / "cases.csv", cases)
        draw_reliability(own / "reliability.png", name, cases, results)
        draw_risk_coverage(own / "risk_coverage.png", {name: cases})
        draw_conflict(own / "conflict.png", name, cases)
        if not several:
            print_headline(results)
    if several:
        compared = comparison.compare(scores, resamples=resamples)
        rule = lesions.RULES[targets.lesion_rule]
        conventions = (
            f"NSD within {scoring.NSD_TOLERANCE:g} mm, by area. Lesions by the {targets.lesion_rule} rule of BraTS "
            f"2023: grown by {rule.dilation} voxels, none of {rule.floor:g} mm^3 or less."
        )
        results = {"made_by": MAKER, **about, "conventions": conventions, "workdirs": dict(workdirs), **compared}
        logs.write_json(folder / "comparison.json", results)
        table = comparison.comparison_table(compared)
        note = f"{about['data']}, split {about['split']}; differences paired by patient. {conventions}\n\n"
        (folder / "comparison.md").write_text(f"# Comparison\n\n{note}{table}", encoding="utf-8")
        draw_risk_coverage(folder / "risk_coverage.png", scores)
        print(table)


def draw_reliability(path: Path, name: str, cases: Sequence[scoring.Scores], results: Mapping[str, Any]) -> None:
    """Reliability before and after calibration: foreground classes pooled in the ROI."""
    panels, notes = {}, {}
    for stage in ("before", "after"):
        heading = f"{stage} calibration"
        panels[heading] = summary.reliability_bins(cases, stage)
        value = results["ece_classwise_roi"][stage]["value"]
        notes[heading] = "no voxel in the ROI" if value is None else f"class-wise ECE {value:.4f}"
    patients = results["about"]["patients"]
    curves.save(
        curves.reliability_figure(
            panels,
            f"{name}: foreground classes in the ROI, 15 equal-width bins, {patients} patients pooled",
            notes,
        ),
        path,
    )


def draw_risk_coverage(path: Path, scores: Mapping[str, Sequence[scoring.Scores]]) -> None:
    """Mean risk against the share of patients kept, with each method's best possible order."""
    lines, best = {}, {}
    for name, cases in scores.items():
        ranked = summary.risk_and_confidence(summary.join_patients(cases))
        ranked = ranked[np.isfinite(ranked).all(axis=1)]
        if len(ranked):
            lines[name] = usefulness.risk_coverage(ranked[:, 0], ranked[:, 1])
            best[name] = usefulness.risk_coverage(ranked[:, 0], -ranked[:, 0])
    curves.save(curves.risk_coverage_figure(lines, "Risk against coverage, in the order of referral", best), path)


def draw_conflict(path: Path, name: str, cases: Sequence[scoring.Scores]) -> None:
    """Divergence against conflict; no picture for a method without both, or without a patient to compare in."""
    patients = [one.alignment for one in summary.join_patients(cases) if one.alignment is not None]
    if not any(one.observed[0] > 0 for one in patients):
        return
    effects, null = conflict.effects_and_null(patients)
    title = f"{name}: do hypotheses diverge where modalities conflict?"
    profile = conflict.divergence_profile(patients)
    curves.save(curves.conflict_figure(profile, effects, null, title, conflict.HIGH_CONFLICT), path)


def print_headline(results: Mapping[str, Any]) -> None:
    """The few figures that a person wants first."""
    headline = (
        "dice",
        "location_dice",
        "hd95",
        "nsd",
        "lesion_dice",
        "lesion_f1",
        "ece_classwise_roi",
        "error_auroc",
        *summary.AREAS,
        "predicted_dice_mae",
        "predicted_dice_spearman",
        *summary.RATER_METRICS,
        "diversity",
        "rater_diversity",
        "seconds_per_case",
    )
    for key in headline:
        found = results.get(key)
        for stage, one in found.items() if found and "before" in found else [("", found)]:
            if one and one["value"] is not None:
                interval = "" if one["ci95"] is None else f"  [{one['ci95'][0]:.4g}, {one['ci95'][1]:.4g}]"
                sets = f", N={one['hypotheses']}, R={_span(one['raters'])}" if "raters" in one else ""
                sets += f", random {one['random']:.4g}, best {one['oracle']:.4g}" if "random" in one else ""
                print(f"{key + (' ' + stage if stage else ''):28s} {one['value']:.4g}{interval}  n={one['n']}{sets}")
    for key, found in results.get("conformal", {}).items():
        for region, one in [("", found)] if "value" in found else found.items():
            if one["value"] is not None:
                print(f"{f'{key} {region}':28s} {one['value']:.4g}  n={one['n']}")


def _span(ends: Sequence[int]) -> str:
    low, high = ends
    return f"{low}" if low == high else f"{low}-{high}"


def write_cases(path: Path, cases: Sequence[scoring.Scores]) -> None:
    """One row per case; undefined values are empty cells."""
    rows = [summary.case_row(case) for case in cases]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()})


def check_output(output: Path) -> None:
    """UserError if `output` exists and is not an earlier evaluation: it would be replaced as a whole."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output={output} is a file: name a folder")
    if foreign := sorted(set(_names(output)) - set(_own(output))):
        raise UserError(f"--output={output} holds other files ({foreign[0]}), which would be lost: name another folder")


def _names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()]


def _own(output: Path) -> list[str]:
    """The files that an earlier evaluation left in `output`, by what its summary says of itself."""
    for name, methods in (("comparison.json", "roi_shared_by"), ("summary.json", None)):
        try:
            found = json.loads((output / name).read_text(encoding="utf-8"))
            about = found if methods else found["about"]
            if about["made_by"] == MAKER:
                inner = [f"{method}/{one}" for method in about[methods] for one in WRITTEN] if methods else []
                return [*WRITTEN, *inner]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []


if __name__ == "__main__":
    define_flags()
    cli.run(main)
