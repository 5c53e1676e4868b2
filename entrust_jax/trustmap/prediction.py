"""What a network says of a case -> the prediction that report and metrics read: calibrated, on the scan's own grid,

explained and summed up.
"""

import time
from typing import Any

import numpy as np
from scipy.special import expit, logit

from entrust_jax.data import preprocess, resampling
from entrust_jax.data.preprocess import Volume
from entrust_jax.data.resampling import Lattice
from entrust_jax.trustmap import case, explanation, pixels, rungs

# Maps with an axis of modalities or pairs; it comes first in a Raw.
STACKED = ("kappa_pairs", "support", "unimodal", "attribution", "delta_modality", "counterfactual")

Raw = dict[str, Any]  # what a network says of a case: maps [d h w ...] by name, its hypotheses, and the decision


def border(label: np.ndarray, spacing: tuple[float, ...], volumetric: bool) -> np.ndarray:
    """Signed distance [d h w] to the mask's border in voxels: of each slice; for a network on volumes of the volume, in

    millimetres divided by the finest spacing.
    """
    return pixels.signed_distance_mm(label, spacing) / min(spacing) if volumetric else pixels.signed_distance(label)


def calibrated(raw: Raw, present: np.ndarray, chosen: str, params: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """(p before calibration [d h w k], p_cal, e [d h w]) of an examined case under a fitted rung of the ladder.

    By few slices at a time: the head's features of a whole scan, in columns and side by side, would take .7 of the
    memory that all its maps do (192 and 265 bytes a voxel, four modalities and classes).
    """
    before, error = np.empty(raw["mean"].shape, np.float32), np.empty(raw["label"].shape, np.float32)
    after = before if chosen == "identity" else np.empty_like(before)
    for start in range(0, len(error), rungs.SLICES):
        part = slice(start, start + rungs.SLICES)
        maps = {
            name: value[:, part] if name in (*STACKED, "hypotheses") else value[part]
            for name, value in raw.items()
            if isinstance(value, np.ndarray) and value.ndim > 2
        }
        one_step, mean = pixels.log_probability(maps["one_step"]), pixels.log_probability(maps["mean"])
        nothing = np.zeros((*maps["label"].shape, 0), np.float32)
        before[part], error[part] = rungs.apply("identity", {}, nothing, one_step, mean, maps["label"])
        if chosen != "identity":
            inputs = pixels.features(maps, present)[0] if chosen == "head" else nothing
            after[part], error[part] = rungs.apply(chosen, params, inputs, one_step, mean, maps["label"])
    return before, after, error


def carried(raw: Raw, examined: Volume, scan: Volume) -> Raw:
    """What was said of a case on its working grid, on the scan's own grid (`resampling.moved`).

    The label is decided again, by the same action on the maps as they lie here: the same threshold of p_bar, or the
    same hypothesis. The error probability follows it: 1 - p_cal[label], with what the calibrator adds to its logit.
    Ours.
    """
    source, target = resampling.lattice_of(examined), resampling.lattice_of(scan)
    error = np.clip(raw["error_probability"], pixels.FLOOR, 1 - pixels.FLOOR)
    addition = logit(error) - _log_odds_against(raw["probability"], raw["label"])
    found = {}
    for name, value in (raw | {"addition": addition}).items():
        if name == "sampled":  # one value a slice
            value = resampling.moved(value, *(Lattice(one.sizes[:1], one.spacing[:1]) for one in (source, target)))
        elif isinstance(value, np.ndarray):
            value = resampling.moved(value, source, target, first=int(name in (*STACKED, "hypotheses")))
        found[name] = value
    action = raw["action"]
    by_threshold = isinstance(action, float)
    found["label"] = case.threshold_action(found["mean"], action) if by_threshold else found["hypotheses"][action]
    error = _log_odds_against(found["probability"], found["label"]) + found.pop("addition")
    return found | {"error_probability": expit(error)}


def _log_odds_against(p: np.ndarray, label: np.ndarray) -> np.ndarray:
    """logit(1 - p[label]), from the sum of the other classes: 1 - p would cancel where the label is sure."""
    own = np.arange(p.shape[-1]) == label[..., None]
    ours, others = (np.maximum(np.sum(p, axis=-1, where=mask), pixels.FLOOR) for mask in (own, ~own))
    return np.log(others) - np.log(ours)


def finish(
    raw: Raw,
    volume: Volume,
    *,
    scan: Volume,
    chosen: str,
    params: dict[str, np.ndarray],
    modalities: tuple[str, ...],
    classes: tuple[str, ...],
    regions: dict[str, tuple[int, ...]],
    volumetric: bool,
    started: float,
) -> dict[str, Any]:
    """Calibrates, explains and sums up an examined case: the prediction that report and metrics read.

    scan: the case on the grid that the prediction is wanted on; `volume` itself where it was examined there.
    volumetric: whether the network sees volumes, for `border`.
    """
    before, p_cal, e = calibrated(raw, volume.present, chosen, params)
    raw = {name: value for name, value in raw.items() if name not in ("kept", "slice_weight")}
    raw |= {"probability_raw": before, "probability": p_cal, "error_probability": e}
    if scan is not volume:
        raw, volume = carried(raw, volume, scan), scan
        raw["border"] = border(raw["label"], scan.spacing, volumetric)
    e = raw["error_probability"] * volume.body
    out = {name: value for name, value in raw.items() if name not in ("action", "border")}
    out |= {"present": volume.present, "error_probability": e}
    evidence: dict[str, Any] = {}
    shown = preprocess.shown(volume)
    if "conflict" in raw:
        conflict = raw["conflict"]
        if not shown.all():  # windows of volumes hear a scan that ends, and a scan that is not there contradicts nobody
            first, second = np.triu_indices(len(shown), 1)
            both = (shown[first] & shown[second])[:, :, None, None]
            conflict = np.minimum(conflict, np.max(raw["kappa_pairs"] * both, axis=0, initial=0.0))
        out["conflict"] = conflict * volume.body  # outside the body there is nothing to contradict
        sampling = [size / min(volume.spacing) for size in volume.spacing] if volumetric else None
        ways = explanation.outline_distances(e, raw["label"], volume.body, sampling)
        out["cause"] = explanation.cause(e, conflict, raw["support"], *ways, raw["border"], volume.body, shown)
        evidence = {
            "cause": out["cause"],
            "conflict_pairs": raw["kappa_pairs"],
            "support": raw["support"],
            "unimodal": raw["unimodal"],
            "attribution": raw["attribution"],
            "counterfactual": raw["counterfactual"],
            "conflict_uncertainty": raw["conflict_uncertainty"],
        }
    out["records"] = explanation.records(e, raw["label"], volume.spacing, modalities, classes, shown, **evidence)
    voxel_ml = float(np.prod(volume.spacing)) / 1000
    out["regions"] = case.volumes(raw.get("hypotheses", raw["label"][None]), regions, voxel_ml)
    out["trust"] = case.trust(
        e,
        raw["probability"],
        raw["label"],
        volume.body,
        voxel_ml,
        raw["predicted_dice"],
        out.get("conflict"),
        raw.get("gap"),
    )
    out["seconds"] = time.perf_counter() - started
    return out
