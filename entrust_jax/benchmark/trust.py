"""The trust suite: whether a finished EnTrust working folder keeps what it says of itself.

unlike training: every test case is spoilt in one scan at a time; how well its distance from the scans of training tells
spoilt from clean cases, how often `predict` would warn, and whether it names the scan. guarantees: the calibration and
the test patients, of whom the network knows neither, are divided anew many times, and the promises of each division are
held against its test patients; of a phantom there are as many patients as are asked for. predicted Dice: how far it is
off on test patients, with and without the map that calibration patients suggest.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage, stats

from entrust_jax import api
from entrust_jax.data import augment, dataset, intensity, phantom_scene
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.metrics import statistics
from entrust_jax.report import markdown
from entrust_jax.runtime import logs
from entrust_jax.trustmap import conformal, ood

GHOSTS, GHOSTED = 4, 0.9  # every fourth line of k-space keeps a tenth of its strength
NOISE = 0.6  # deviation of the noise, where that of the scan is 1
CROPPED = 1 / 3  # share of the body's box along one axis that the field of view leaves out
BLUR = 1.5  # voxels in plane
NATIVE = {"T1ce": "T1", "T1c": "T1", "T1Gd": "T1", "T1POST": "T1"}  # what is left without the contrast agent
RESPLITS = 200


class Spoilt(NamedTuple):
    """A case with a fault: its kind, which modalities have it, and the case."""

    kind: str
    modalities: tuple[int, ...]
    volume: Volume


# ---- faults ------------------------------------------------------------------------------------------------------


def spoilt(volume: Volume, modalities: Sequence[str], rules: Sequence[intensity.Rule | None]) -> Iterator[Spoilt]:
    """Every fault of a case, one scan at a time; the same for the same case.

    exchanged: the files of two modalities. replaced: another modality's file in a modality's place, too. ghosting,
    noise (Rician), cropped (beyond the field of view nothing is measured). native: the scan before the contrast agent
    in place of the one after it, taken again: moved by half a voxel, with its own noise. blurred: in place of that
    where there is no such pair. Scans whose intensities have a unit (CT, PET) are neither exchanged nor ghosted.
    """
    here = np.flatnonzero(volume.present).tolist()
    free = [m for m in here if rules[m] is None]
    empty = augment.no_signal(volume.image, rules)
    for m, n in itertools.combinations(free, 2):
        image = volume.image.copy()
        image[[m, n]] = image[[n, m]]
        yield Spoilt("exchanged", (m, n), dataclasses.replace(volume, image=image))
    for m, n in itertools.permutations(free, 2):
        image = volume.image.copy()
        image[m] = image[n]
        yield Spoilt("replaced", (m,), dataclasses.replace(volume, image=image))
    for m in here:
        rng = np.random.default_rng([volume.number, m])
        signal = np.where(volume.body, volume.image[m] - np.float32(empty[m]), 0)
        first, second = rng.normal(size=(2, *signal.shape))
        if rules[m] is None:
            axis = int(rng.integers(2))
            ghosts = np.stack([augment.ghosts(one, axis, GHOSTS, GHOSTED) for one in signal])
            yield Spoilt("ghosting", (m,), with_signal(volume, m, ghosts, empty[m], rules[m]))
        noisy = np.hypot(signal + NOISE * first, NOISE * second)
        yield Spoilt("noise", (m,), with_signal(volume, m, noisy, empty[m], rules[m]))
        yield Spoilt("cropped", (m,), cropped(volume, m, rules[m], rng))
        source = NATIVE.get(modalities[m])
        if source is None or source not in modalities:
            if not any(one in modalities and other in modalities for one, other in NATIVE.items()):
                blurred = ndimage.gaussian_filter(signal, (0, BLUR, BLUR))
                yield Spoilt("blurred", (m,), with_signal(volume, m, blurred, empty[m], rules[m]))
        elif volume.present[modalities.index(source)]:
            n = list(modalities).index(source)
            signal = np.where(volume.body, volume.image[n] - np.float32(empty[n]), 0)
            again = np.maximum(ndimage.shift(signal, (0, 0.5, 0.3), order=1) + 0.1 * first, 0)
            yield Spoilt("native", (m,), with_signal(volume, m, again, empty[n], rules[m]))


def with_signal(volume: Volume, m: int, signal: np.ndarray, empty: float, rule: intensity.Rule | None) -> Volume:
    """The case with another signal (0 is none, `empty` in the image's units) in modality m, read as a file would be."""
    return _read(volume, m, signal + empty, volume.body, rule)


def cropped(volume: Volume, m: int, rule: intensity.Rule | None, rng: np.random.Generator) -> Volume:
    """The case with a field of view of modality m that ends within the body, on one side of one axis."""
    axes = [axis for axis in range(3) if volume.body.shape[axis] >= 3]
    axis, side = int(rng.choice(axes)), int(rng.choice([-1, 1]))
    field = volume.body & (side * volume.coordinates[..., axis] <= 1 - 2 * CROPPED)
    return _read(volume, m, volume.image[m], field, rule)


def _read(volume: Volume, m: int, values: np.ndarray, field: np.ndarray, rule: intensity.Rule | None) -> Volume:
    image = volume.image.copy()
    image[m] = np.where(field, values, 0)
    if rule is None:
        image[m] = intensity.normalise(image[m : m + 1], np.array([True]), field)[0]
    return dataclasses.replace(volume, image=image)


# ---- unlike training ---------------------------------------------------------------------------------------------


def unlike_training(trained: api.Trained, cases: Sequence[Volume]) -> dict[str, Any]:
    """How well distances tell spoilt cases from clean ones; figures with intervals over patients."""
    modalities = tuple(trained.config.data.modalities)
    rules = intensity.rules_of(trained.config.data.intensity.to_dict(), modalities)
    patients = sorted({case.patient for case in cases})
    clean: list[tuple[int, dict[str, Any]]] = []
    found: dict[str, list[tuple[int, tuple[int, ...], dict[str, Any]]]] = {}
    with logs.progress("unlike training", len(cases)) as show:
        for i, case in enumerate(cases):
            row = patients.index(case.patient)
            clean.append((row, _compared(trained, case)))
            for one in spoilt(case, modalities, rules):
                found.setdefault(one.kind, []).append((row, one.modalities, _compared(trained, one.volume)))
            show(i + 1)
    n = clean[0][1]["patients"]
    alarms = _by_patient([(row, float(bool(one["unlike"]))) for row, one in clean], len(patients))
    by_kind = {}
    for kind, rows in found.items():
        named = [(row, float(farthest(one, modalities) in where)) for row, where, one in rows]
        flagged = [(row, float(bool(one["unlike"]))) for row, _, one in rows]
        right = [(row, float(any(modalities.index(m) in where for m in one["unlike"]))) for row, where, one in rows]
        by_kind[kind] = {
            "cases": len(rows),
            "auroc": auroc(
                [(row, one["distance"]) for row, one in clean],
                [(row, one["distance"]) for row, _, one in rows],
                len(patients),
            ),
            "flagged": _mean(_by_patient(flagged, len(patients))),
            "flagged_the_right_scan": _mean(_by_patient(right, len(patients))),
            "right_scan_is_farthest": _mean(_by_patient(named, len(patients))),
        }
        each = sorted({where for _, where, _ in rows})
        by_kind[kind]["by_scan"] = {
            "/".join(modalities[m] for m in where): auroc(
                [(row, one["distance"]) for row, one in clean],
                [(row, one["distance"]) for row, own, one in rows if own == where],
                len(patients),
            )["value"]
            for where in each
        }
    return {
        "patients": len(patients),
        "reference_patients": n,
        "false_alarms": _mean(alarms) | {"expected_of_patients_like_the_reference": 1 / (n + 1)},
        "faults": by_kind,
    }


def _compared(trained: api.Trained, volume: Volume) -> dict[str, Any]:
    record = api.compare_volume(trained, volume)
    if record is None or record["note"] or record["distance"] is None:
        raise UserError(
            f"{trained.workdir}: its cases cannot be compared with training's ({(record or ood.NOTHING)['note']})"
        )
    return record


def farthest(record: dict[str, Any], modalities: Sequence[str]) -> int:
    """The modality of a case with the largest distance."""
    away = [record["modalities"][name]["distance"] for name in modalities]
    return int(np.nanargmax(np.array(away, np.float64)))


def auroc(clean: Sequence[tuple[int, float]], faulty: Sequence[tuple[int, float]], patients: int) -> dict[str, Any]:
    """P(a faulty case is farther than a clean one), ties half, between patients drawn alike: a figure with interval.

    clean, faulty: (patient's number, distance). A patient without one of them counts for the other alone.
    """
    counts, wins = np.zeros((patients, patients)), np.zeros((patients, patients))
    for (i, a), (j, b) in itertools.product(clean, faulty):
        wins[i, j] += (b > a) + 0.5 * (b == a)
        counts[i, j] += 1
    share = wins / np.maximum(counts, 1)
    known = (counts > 0).astype(np.float64)

    def statistic(weights: np.ndarray) -> float:
        total = float(weights @ known @ weights)
        return float(weights @ (share * known) @ weights) / total if total > 0 else float("nan")

    return statistics.figure(statistic, patients)


def _by_patient(values: Sequence[tuple[int, float]], patients: int) -> np.ndarray:
    """Each patient's mean; NaN for one without a value."""
    own = [[value for row, value in values if row == i] for i in range(patients)]
    return np.array([np.mean(one) if one else np.nan for one in own])


def _mean(values: np.ndarray) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    return statistics.figure(lambda weights: statistics.weighted_mean(known, weights), len(known))


# ---- guarantees --------------------------------------------------------------------------------------------------


def resplit(
    cases: Sequence[conformal.Case],
    regions: Sequence[str],
    levels: dict[str, Any],
    calibration: int,
    *,
    times: int = RESPLITS,
) -> dict[str, Any]:
    """Divides the patients `times` anew, `calibration` of them to fit on, and holds what is promised against the rest.

    The patients being given, every division is as likely, so a promise that is one holds on average over divisions; the
    standard error is theirs.
    """
    patients = sorted({case.patient for case in cases})
    found: dict[str, list[float]] = {}
    refused: dict[str, int] = {}
    rng = np.random.default_rng(0)
    for _ in range(times):
        order = rng.permutation(len(patients))
        fitted = {patients[i] for i in order[:calibration]}
        told = conformal.fit([case for case in cases if case.patient in fitted], regions, **levels)
        kept = outcome(told, [case for case in cases if case.patient not in fitted])
        for name, value in kept.items():
            if value is None:
                refused[name] = refused.get(name, 0) + 1
            elif np.isfinite(value):
                found.setdefault(name, []).append(value)
    result: dict[str, Any] = {"times": times, "calibration": calibration, "test": len(patients) - calibration}
    promised = {"outer": ("fnr", 1), "inner": ("fdr", 1), "dice": ("coverage", -1), "volume": ("coverage", -1)}
    for name in sorted({*found, *refused}):
        level, sign = promised[name.split(" ")[0]]
        values = np.array(found.get(name, []))
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        mean = float(np.mean(values)) if len(values) else None
        holds = None if mean is None else bool(sign * (mean - levels[level]) <= 2 * (error or 0.0))
        # Of an inner mask it is promised of so many calibrations; on few test patients chance takes part in it.
        above = float(np.mean(values > levels[level])) if name.startswith("inner") and len(values) else None
        result[name] = {
            "promised": levels[level], "mean": mean, "standard_error": error, "holds": holds,
            "divisions_above": above, "refused": refused.get(name, 0),
        }  # fmt: skip
    return result


def outcome(found: dict[str, Any], cases: Sequence[conformal.Case]) -> dict[str, float | None]:
    """What the promises came to on other patients: mean FNR of outer masks and FDR of inner ones over each one's mean,
    shares of patients whose Dice values and volumes are all covered. None where nothing was promised, NaN where no case
    can tell.
    """
    result: dict[str, float | None] = {}
    for kind, curves in (("outer", "missed"), ("inner", "wrong")):
        for name, one in found[kind].items():
            key = f"{kind} {name}"
            result[key] = None
            if one["threshold"] is not None:
                index = int(np.flatnonzero(np.float32(one["threshold"]) == conformal.THRESHOLDS)[0])
                own = [(case, getattr(case, curves)[name]) for case in cases if name in getattr(case, curves)]
                result[key] = by_patient([(case, float(np.nan_to_num(curve[index]))) for case, curve in own], np.mean)
    margins: list[tuple[str, Any, Callable[[conformal.Case], float | None]]] = [
        ("dice", found["dice"]["margin"], lambda case: case.dice)
    ]
    for name, one in found["volume"].items():
        margins.append((f"volume {name}", one["margin"], lambda case, name=name: case.volume[name]))
    for key, margin, of in margins:
        result[key] = None
        if margin is not None:
            values = [(case, value) for case in cases if (value := of(case)) is not None]
            result[key] = by_patient([(case, float(value <= margin + 1e-9)) for case, value in values], np.min)
    return result


def by_patient(values: Sequence[tuple[conformal.Case, float]], joined: Callable[[list[float]], Any]) -> float:
    """Mean over patients of what is `joined` of each one's cases; NaN without any."""
    own: dict[str, list[float]] = {}
    for case, value in values:
        own.setdefault(case.patient, []).append(value)
    return float(np.mean([joined(each) for each in own.values()])) if own else float("nan")


# ---- predicted Dice ----------------------------------------------------------------------------------------------


def predicted_dice(
    told: dict[str, Any], calibration: Sequence[conformal.Case], test: Sequence[conformal.Case]
) -> dict[str, Any]:
    """Error and rank correlation of the predicted Dice on test patients, means over the cases of each: as it is, under

    the map of the calibration patients, and as delivered, which is one of the two within its interval. told: what
    `conformal.fit` found on the calibration cases.
    """
    pairs = np.array([(one.predicted_dice, one.true_dice) for one in calibration], np.float64)
    curve, margin = conformal.isotonic(pairs), told["dice"]["margin"]

    def delivered(x: float) -> Any:
        return conformal.corrected_dice(told, x, None if margin is None else (max(0, x - margin), min(1, x + margin)))

    said: dict[str, Callable[[float], Any]] = {
        "as_it_is": float, "under_the_map": lambda x: np.interp(x, *curve), "delivered": delivered
    }  # fmt: skip
    own: dict[str, list[tuple[float, float]]] = {}
    for case in test:
        if case.predicted_dice is not None and case.true_dice is not None:
            own.setdefault(case.patient, []).append((case.predicted_dice, case.true_dice))
    result: dict[str, Any] = {"calibration": told["dice_map"]["patients"], "map": told["dice_map"]}
    for name, of in said.items():
        both = [np.array([(of(x), y) for x, y in each], np.float64) for each in own.values()]
        x, y = np.array([each.mean(axis=0) for each in both]).T
        error = np.array([np.mean(np.abs(each[:, 0] - each[:, 1])) for each in both])
        ranks: Any = stats.spearmanr(x, y) if np.ptp(x) > 0 and np.ptp(y) > 0 else None
        rho = float("nan") if ranks is None else float(ranks.statistic)
        result[name] = {
            "mean_error": _mean(error),
            "spearman": None if not np.isfinite(rho) else rho,
            "n": len(both),
        }
    return result


# ---- the suite ---------------------------------------------------------------------------------------------------


def observed(trained: api.Trained, cases: Sequence[Volume], title: str) -> list[conformal.Case]:
    """Whole predictions of labelled cases."""
    result = []
    with logs.progress(title, len(cases)) as show:
        for i, case in enumerate(cases):
            result.append(api.observe_volume(trained, case))
            show(i + 1)
    return result


def extra_phantoms(trained: api.Trained, count: int) -> list[Volume]:
    """Phantoms beyond those of the split, of the law that it was drawn from."""
    first = 1 + max(int(name.rsplit("_", 1)[1]) for part in trained.splits.values() for name in part)
    names = [phantom_scene.case_name(number) for number in range(first, first + count)]
    return dataset.read(trained.config.data, names, trained.config.seed)[0]


def measure(trained: api.Trained, cases: int, spoilt_cases: int) -> Iterator[dict[str, Any]]:
    """The parts of the suite on one working folder, one after the other as they are done.

    cases: at least so many patients are divided anew where there are phantoms to be had. spoilt_cases: test cases that
    are spoilt, at most. Raises UserError for a folder that cannot be measured.
    """
    if trained.config.method != "entrust":
        raise UserError(f"{trained.workdir}: is of the method {trained.config.method}; the trust suite needs entrust")
    if trained.usual is None:
        raise UserError(f"{trained.workdir}: {ood.NOTHING['note']}")
    test, _ = api.read_cases(trained)
    calibration, _ = api.read_cases(trained, split="calibration")
    yield {"config": trained.config.name, "unlike_training": unlike_training(trained, test[:spoilt_cases])}
    own = observed(trained, calibration, "calibration")
    others = observed(trained, test, "test")
    extra: list[conformal.Case] = []
    if trained.config.data.layout == "phantom" and cases > len(own) + len(others):
        extra = observed(trained, extra_phantoms(trained, cases - len(own) - len(others)), "further phantoms")
    every = [*own, *others, *extra]
    patients = len({case.patient for case in every})
    share = len({case.patient for case in own}) if not extra else patients // 2
    levels, regions = trained.config.trust.to_dict(), tuple(trained.config.data.regions)
    told = conformal.fit(own, regions, **levels)
    yield {
        "guarantees": resplit(every, regions, levels, min(share, patients - 1)),
        "guarantees_of_this_split": outcome(told, [*others, *extra]),
        "predicted_dice": predicted_dice(told, own, [*others, *extra]),
    }


def run(workdir: Path, output: Path, cases: int, spoilt_cases: int, about: dict[str, Any]) -> None:
    """Writes trust.json after each part of the suite, and trust.md."""
    found = dict(about)
    for part in measure(api.load(workdir), cases, spoilt_cases):
        output.mkdir(parents=True, exist_ok=True)
        found |= part
        logs.write_json(output / "trust.json", found)
    logs.write_bytes(output / "trust.md", table(found).encode())


def table(found: dict[str, Any]) -> str:
    """The result as markdown."""
    unlike, again, dice = found["unlike_training"], found["guarantees"], found["predicted_dice"]
    n = unlike["reference_patients"]
    lines = [
        f"{unlike['patients']} test patients, one scan spoilt at a time; {n} reference patients.",
        "",
        "| fault | cases | AUROC against clean cases | flagged | the right scan | the right scan is farthest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, one in unlike["faults"].items():
        names = ("auroc", "flagged", "flagged_the_right_scan", "right_scan_is_farthest")
        cells = [markdown.figure(one[name]) for name in names]
        lines.append(f"| {kind} | {one['cases']} | " + " | ".join(cells) + " |")
    alarms = unlike["false_alarms"]
    lines += [
        f"| none (false alarms) | {alarms['n']} | | {markdown.figure(alarms)}, expected "
        f"{alarms['expected_of_patients_like_the_reference']:.3f} | | |",
        "",
        f"{again['times']} divisions into {again['calibration']} calibration and {again['test']} test patients:",
        "",
        "| promise | promised | mean +- standard error | holds | share of divisions above it | refused |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in again.items():
        if isinstance(one, dict):
            mean = "-" if one["mean"] is None else f"{one['mean']:.3f} +- {one['standard_error'] or 0:.3f}"
            above = "" if one["divisions_above"] is None else f"{one['divisions_above']:.3f}"
            lines.append(f"| {name} | {one['promised']:g} | {mean} | {one['holds']} | {above} | {one['refused']} |")
    said = [f"{name} {'refused' if v is None else f'{v:.3f}'}" for name, v in found["guarantees_of_this_split"].items()]
    lines += ["", f"By the calibration patients of the split, on its test patients: {', '.join(said)}."]
    lines += ["", "| predicted Dice | mean error | Spearman | n |", "| --- | --- | --- | --- |"]
    for name in ("as_it_is", "under_the_map", "delivered"):
        one = dice[name]
        rho = "-" if one["spearman"] is None else f"{one['spearman']:.2f}"
        lines.append(f"| {name.replace('_', ' ')} | {markdown.figure(one['mean_error'])} | {rho} | {one['n']} |")
    if dice["map"]["reason"]:
        lines += ["", f"No map is used: {dice['map']['reason']}."]
    return "\n".join(lines) + "\n"
