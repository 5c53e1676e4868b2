"""The subsets suite: masks, calibration and guarantees of a model when some of its modalities are taken away.

A hospital may lack a sequence, and a calibrator is fitted on cases that have nearly all. So every test case is
predicted again from every subset of the modalities that it has, and its calibration is measured before and after the
calibrator.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entrust_jax import api
from entrust_jax.data import preprocess
from entrust_jax.data.preprocess import Volume
from entrust_jax.metrics import calibration, scoring, summary
from entrust_jax.report import markdown
from entrust_jax.runtime import logs

SHOWN = ("dice", "ece_classwise_roi", "nll", "predicted_dice_mae")  # of all that `summary.summarise` gives
GUARANTEES = ("outer_fnr", "outer_size", "inner_fdr", "dice_covered", "volume_covered")


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset but the empty one, the largest first."""
    sizes = range(len(modalities), 0, -1)
    return [chosen for size in sizes for chosen in itertools.combinations(modalities, size)]


def only(volume: Volume, modalities: Sequence[str], kept: Sequence[str]) -> Volume | None:
    """The case as it would be if the other modalities had not been scanned; None if it lacks one of those kept.

    Its body stays the one that all of its scans show.
    """
    chosen = np.array([name in kept for name in modalities])
    if not volume.present[chosen].all():
        return None
    image = volume.image * chosen[:, None, None, None]
    return dataclasses.replace(volume, image=image, present=volume.present & chosen)


def score(trained: api.Trained, volumes: Sequence[Volume], targets: scoring.Targets) -> list[scoring.Scores]:
    """Scores of cases, each in the region of interest of its own prediction. Reasons are asked for only where the

    calibrator needs them.
    """
    found = []
    for volume in volumes:
        prediction = api.predict_volume(trained, volume, probed=trained.rung == "head")
        found.append(
            scoring.score_case(
                prediction, preprocess.labels_of(volume), volume.body, volume.spacing,
                calibration.region_of_interest([prediction["probability"][..., 0]]), targets,
                name=volume.name, patient=volume.patient, seed=volume.number,
            )
        )  # fmt: skip
    return found


def measure(
    trained: api.Trained, volumes: Sequence[Volume], targets: scoring.Targets
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(names of a subset, its figures), one subset after the other; subsets that no case has are left out."""
    modalities = tuple(trained.config.data.modalities)
    for kept in subsets(modalities):
        cases = [one for volume in volumes if (one := only(volume, modalities, kept)) is not None]
        if cases:
            yield " + ".join(kept), summary.summarise(score(trained, cases, targets), targets)


def run(
    trained: api.Trained, volumes: Sequence[Volume], targets: scoring.Targets, output: Path, about: Mapping[str, Any]
) -> None:
    """Writes subsets.json and subsets.md after each subset."""
    found: dict[str, dict[str, Any]] = {}
    for name, figures in measure(trained, volumes, targets):
        output.mkdir(parents=True, exist_ok=True)
        found[name] = {key: figures[key] for key in (*SHOWN, "conformal") if key in figures}
        logs.write_json(output / "subsets.json", {**about, "subsets": found})
        logs.write_bytes(output / "subsets.md", table(found).encode())
        print(f"{name}: Dice {markdown.figure(figures['dice'])}", flush=True)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as markdown."""
    head = ["modalities", "n", "Dice", "ECE before", "ECE after", "NLL before", "NLL after", "predicted Dice, error"]
    head += ["outside the outer mask", "its size", "inner mask false", "Dice covered", "volume covered"]
    rows = []
    for name, one in found.items():
        pairs = [one[key][stage] for key in ("ece_classwise_roi", "nll") for stage in ("before", "after")]
        promised = one.get("conformal", {})
        said = [mean_of_regions(promised.get(key, {})) for key in GUARANTEES]
        rows.append(
            [
                *(name, str(one["dice"]["n"])),
                *map(markdown.figure, (one["dice"], *pairs, one.get("predicted_dice_mae"))),
                *said,
            ]
        )
    lines = markdown.table(head, rows)
    lines += [
        "",
        "Intervals are of 95 % over patients, from 10 patients on. ECE: class-wise, in the region of interest of each"
        " prediction, so not on the same voxels from row to row; before and after the calibrator, fitted once, on"
        " calibration patients with the modalities that they have. The last columns: what the guaranteed masks miss"
        " and hold too much, the outer one's volume over the true one, and the share of the patients whose Dice and"
        " volume lie in their guaranteed intervals; means over patients, '-' where none is given.",
    ]
    return "\n".join(lines) + "\n"


def mean_of_regions(figures: Mapping[str, Any]) -> str:
    """The mean over the regions for which there is a figure; of one that is of no region, itself."""
    each = [figures] if "value" in figures else figures.values()
    values = [one["value"] for one in each if one["value"] is not None]
    return f"{np.mean(values):.3f}" if values else "-"
