"""What a prediction leaves on disk: maps in the scan's geometry, report.json, a picture; all or nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nibabel import orientations

from entrust_jax.data.scans import in_mm, open_scan, write_map
from entrust_jax.errors import UserError
from entrust_jax.report import figures
from entrust_jax.trustmap import explanation

if TYPE_CHECKING:
    from entrust_jax.data.preprocess import Volume

REPORT, PICTURE = "report.json", "overview.png"
MAKER = "entrust_jax.predict"  # in report.json: how a folder of ours is known again
STATEMENT = (
    "Research software, not a medical device. It has not been tested or approved for diagnosis or treatment; "
    "every result must be checked by a qualified person."
)
VOXEL = "of distances: a pixel of the slice; for a network on volumes the scan's finest spacing, in every direction"
PLACES = (
    "place: voxel indices from 0 in canonical orientation, slice towards the head, "
    "row towards the patient's right, column towards anterior; "
    "scan_voxel: indices in the reference scan's own array; world_mm: the scan's RAS+ world coordinates"
)
# file stem -> (key of the prediction, meaning); one value per voxel, f32
MAPS = {
    "error_probability": (
        "error_probability",
        "calibrated probability that the delivered label is wrong, 0 to 1",
    ),
    "entropy": ("entropy", "total predictive entropy, nats"),
    "divergence": (
        "divergence",
        "mutual information between hypotheses: how far the plausible outlines differ, nats",
    ),
    "conflict": ("conflict", "how strongly two scans support different classes, 0 to 1"),
}
# key of the prediction, of a file for each scan -> meaning
OF_A_SCAN = {
    "attribution": "Shapley value of {} for the delivered label, nats: positive supports it, negative argues against "
    "it",
    "counterfactual": "segmentation if {} alone were right where scans contradict each other (likeliest class of the "
    "one-step prediction), label values as in label.nii.gz",
}
# file stem -> meaning; what is guaranteed of them stands in the report
MASKS = {
    "outer_mask": "what the region does not reach beyond, but for a guaranteed share of it",
    "inner_mask": "what belongs to the region, but for a guaranteed share of the mask",
}


@contextmanager
def whole_folder(output: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block ends well, else vanishes (Ctrl-C too).

    An earlier result at `output` stays until then. `check` raises UserError where `output` may not be replaced.
    """
    output = output.resolve()
    check(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.parent / f".{output.name}.{os.getpid()}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    except OSError as error:
        raise UserError(f"{output}: cannot be made ({error.strerror}); name a folder that you may write to") from None
    old = part.with_suffix(".old")
    try:
        yield part
        check(output)  # somebody may have put a file there in the minutes between
        if output.exists():
            try:
                output.rename(old)
            except OSError:  # a mount point, such as a container's volume: its contents can be replaced, not itself
                _fill(output, part)
                return
        try:
            part.rename(output)
        except BaseException:
            if old.exists() and not output.exists():
                old.rename(output)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)


def _fill(output: Path, part: Path) -> None:
    """Replaces what is in `output` by what is in `part`."""
    try:
        for path in list(output.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in list(part.iterdir()):
            shutil.move(path, output / path.name)
    except OSError as error:
        raise UserError(f"{output}: cannot be filled ({error.strerror}); name another folder") from None


def check_output(output: Path) -> None:
    """Raises UserError unless `output` is new, empty, or holds an earlier prediction and nothing else."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder for the results")
    found = {path.name for path in output.iterdir()}
    if not found:
        return
    try:
        report = json.loads((output / REPORT).read_text(encoding="utf-8"))
        ours = {REPORT, *report["files"]} if report["made_by"] == MAKER else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if not ours:
        raise UserError(f"{output}: already holds files that are no prediction of ours; name another folder")
    if foreign := sorted(found - ours):
        raise UserError(
            f"{output}: holds {foreign[0]} beside an earlier prediction; move it away or name another folder"
        )


def label_values(label_map: Iterable[Sequence[int]], count: int) -> np.ndarray:
    """Class index -> the data set's own label value: label_map inverted, the first value for a class.

    Raises UserError when a class has no value.
    """
    first: dict[int, int] = {}
    for value, index in label_map:
        first.setdefault(int(index), int(value))
    if lacking := sorted(set(range(count)) - set(first)):
        raise UserError(f"config.data.label_map: no label value for class index {lacking[0]}; add one")
    values = np.array([first[index] for index in range(count)], np.int64)
    return values.astype(np.uint8 if values.min() >= 0 and values.max() <= 255 else np.int32)


def write_prediction(
    output: Path,
    prediction: Mapping[str, Any],
    volume: Volume,
    *,
    name: str,
    method: str,
    modalities: Sequence[str],
    reference: str,
    classes: Sequence[str],
    label_map: Iterable[Sequence[int]],
    regions: Mapping[str, Sequence[int]],
    hypotheses: bool,
    versions: Mapping[str, str],
    warnings: Sequence[str] = (),
) -> None:
    """Writes maps, report and picture of one case to the folder `output`, whole or not at all.

    name, method: the config's. regions: name -> class indices. Maps that the method does not make are
    absent, and report.json says why.

    Raises UserError when `output` holds anything but an earlier prediction or cannot be written.
    """
    scan = volume.reference
    if scan is None:
        raise UserError(f"{volume.name}: has no scan file whose geometry the maps could take; predict from NIfTI files")
    values = label_values(label_map, len(classes))
    with whole_folder(output, check_output) as folder:
        files: dict[str, str] = {}
        absent: dict[str, str] = {}

        def write(stem: str, array: np.ndarray, dtype: Any, meaning: str, channel_axis: int | None = None) -> None:
            files[f"{stem}.nii.gz"] = meaning
            write_map(folder / f"{stem}.nii.gz", array, scan, dtype, channel_axis=channel_axis)

        try:
            meant = ", ".join(f"{value} {word}" for value, word in zip(values.tolist(), classes, strict=True))
            write("label", values[prediction["label"]], values.dtype, f"delivered segmentation: {meant}")
            order = ", ".join(classes)
            write(
                "probability",
                prediction["probability"],
                np.float32,
                f"calibrated probability, fourth axis: {order}",
                -1,
            )
            for stem, (key, meaning) in MAPS.items():
                if key in prediction:
                    write(stem, prediction[key], np.float32, meaning)
                else:
                    absent[f"{stem}.nii.gz"] = why_absent(key, method)
            if "cause" in prediction:
                codes = ", ".join(f"{code} {word}" for code, word in enumerate(explanation.CAUSES))
                write("cause", prediction["cause"], np.uint8, f"why a voxel may be wrong: {codes}")
            else:
                absent["cause.nii.gz"] = why_absent("cause", method)
            for m, modality in enumerate(modalities):
                for key, meaning in OF_A_SCAN.items():
                    stem = f"{key}_{modality}"
                    if key not in prediction:
                        absent[f"{stem}.nii.gz"] = why_absent(key, method)
                    elif not volume.present[m]:
                        absent[f"{stem}.nii.gz"] = f"no {modality} scan was given"
                    elif key == "counterfactual":
                        write(stem, values[prediction[key][m]], values.dtype, meaning.format(modality))
                    else:
                        write(stem, prediction[key][m], np.float32, meaning.format(modality))
            promised: Mapping[str, Any] = prediction.get("conformal") or {}
            for stem, meaning in MASKS.items() if promised else ():
                if own := promised[stem]:
                    write(stem, *stacked(own, meaning))
                else:
                    absent[f"{stem}.nii.gz"] = "no such mask is guaranteed: see guarantees"
            if "hypotheses" not in prediction:
                absent["hypotheses.nii.gz"] = why_absent("hypotheses", method)
            elif not hypotheses:
                absent["hypotheses.nii.gz"] = "written with --hypotheses only"
            else:
                count = len(prediction["hypotheses"])
                meaning = f"{count} plausible segmentations along the fourth axis, label values as in label.nii.gz"
                write("hypotheses", values[prediction["hypotheses"]], values.dtype, meaning, 0)
            files[PICTURE] = "the result, its doubts and their reasons at a glance"
            figures.overview(
                folder / PICTURE,
                prediction,
                volume,
                modalities=modalities,
                reference=reference,
                classes=classes,
                title=f"{volume.name}   ({method}, {name})",
                warnings=warnings,
            )
            report = {
                "made_by": MAKER,
                "statement": STATEMENT,
                "case": volume.name,
                "config": name,
                "method": method,
                "versions": dict(versions),
                "modalities": {
                    "present": [word for word, here in zip(modalities, volume.present, strict=True) if here],
                    "missing": [word for word, here in zip(modalities, volume.present, strict=True) if not here],
                    "geometry_from": scan.name,
                },
                "compared_with_training": prediction.get("compared"),
                "predicted_dice": prediction.get("predicted_dice"),
                "predicted_dice_interval": promised.get("dice"),
                "trust": prediction.get("trust"),
                "guarantees": promised.get("statements", []),
                "regions": {
                    word: {
                        "classes": [classes[index] for index in regions[word]],
                        "interval_means": "5th to 95th percentile over the hypotheses"
                        if found.get("interval")
                        else None,
                        **found,
                        "guaranteed_interval": promised.get("volume", {}).get(word),
                    }
                    for word, found in prediction["regions"].items()
                },
                "review": [
                    {"sentence": record["sentence"], **record, **located(record, scan)}
                    for record in prediction.get("records", ())
                ],
                "places": PLACES,
                "thresholds": explanation.THRESHOLDS | {"a_voxel_is": VOXEL},
                "warnings": list(warnings),
                "seconds": prediction.get("seconds"),
                "files": files,
                "absent": absent,
            }
            text = json.dumps(plain(report), indent=2, ensure_ascii=False, allow_nan=False)
            (folder / REPORT).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror or error}); name another folder") from error


def stacked(masks: Mapping[str, np.ndarray], meaning: str) -> tuple[np.ndarray, Any, str, int | None]:
    """Masks by region as one map: along a fourth axis where there are several. What `write` takes after the stem."""
    names, arrays = ", ".join(masks), list(masks.values())
    if len(arrays) == 1:
        return arrays[0], np.uint8, f"{meaning} ({names})", None
    return np.stack(arrays, axis=-1), np.uint8, f"{meaning}; fourth axis: {names}", -1


def why_absent(key: str, method: str) -> str:
    needs = {
        "divergence": "several hypotheses",
        "hypotheses": "several hypotheses",
        "conflict": "evidence from each scan apart",
        "cause": "evidence from each scan apart",
        "attribution": "evidence from each scan apart",
        "counterfactual": "evidence from each scan apart",
    }
    return f"the method {method} does not make it" + (f": it needs {needs[key]}" if key in needs else "")


def located(record: Mapping[str, Any], scan: Path) -> dict[str, Any]:
    """A record's place in the scan's own array and in world coordinates (mm, RAS+), for a NIfTI viewer."""
    image = open_scan(scan)
    shape = image.shape[:3]
    orientation = orientations.io_orientation(image.affine)
    place = record["place"]
    canonical = np.array([place["row"], place["column"], place["slice"], 1.0])
    # inv_ornt_aff maps indices of the reoriented array to those of the array as stored.
    stored = orientations.inv_ornt_aff(orientation, shape) @ canonical
    world = in_mm(image) @ stored
    return {
        "scan_voxel": [round(v) for v in stored[:3].tolist()],
        "world_mm": [round(v, 2) for v in world[:3].tolist()],
    }


def plain(value: Any) -> Any:
    """The same as plain Python for JSON; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
