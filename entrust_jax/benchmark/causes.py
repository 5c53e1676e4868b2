"""The causes suite: whether the reasons given for doubt are the right ones, on phantoms, where they are known exactly.

Every doubtful voxel of a test case is given a cause by `trustmap.explanation`. A phantom knows three of them: readers
contradict each other at the voxel's site, every reader is silent there, or the voxel's class hangs on where the border
lies. Agreement is held against what the same causes would reach if they were dealt out among the same voxels at random.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8

from entrust_jax import api
from entrust_jax.data import dataset, phantom
from entrust_jax.errors import UserError
from entrust_jax.metrics import statistics
from entrust_jax.report import markdown
from entrust_jax.runtime import logs
from entrust_jax.trustmap import explanation

PLANTED = (explanation.CONFLICT, explanation.IGNORANCE, explanation.BOUNDARY)
GIVEN = range(explanation.MISSING_INPUT, len(explanation.CAUSES))


def planted(scene: phantom.Scene) -> UInt8[np.ndarray, "d h w"]:
    """The cause that a phantom plants at each voxel; 0 where it plants none, as at a site where some reader speaks and
    none contradicts, however little they say.
    """
    silent = np.append(np.all(np.asarray(scene.evidence) == 0, axis=0), False)[np.asarray(scene.site)]
    masks = [scene.boundary, scene.conflict, np.asarray(scene.ignorance) & silent]
    codes = (explanation.BOUNDARY, explanation.CONFLICT, explanation.IGNORANCE)
    return np.select([np.asarray(mask) for mask in masks], codes, explanation.NONE).astype(np.uint8)


def voxels(
    exact: UInt8[np.ndarray, "d h w"], given: UInt8[np.ndarray, "d h w"]
) -> Integer[np.ndarray, "causes causes"]:
    """Counts of doubtful voxels by the planted and the given cause."""
    doubtful = given != explanation.NONE
    count = len(explanation.CAUSES)
    return np.bincount(exact[doubtful] * count + given[doubtful], minlength=count**2).reshape(count, count)


def regions(exact: UInt8[np.ndarray, "d h w"], said: Mapping[str, Any]) -> Integer[np.ndarray, "causes causes"]:
    """Counts of a prediction's regions by the planted cause of most of their voxels (0: of none) and the given one."""
    numbered = explanation.components(said["error_probability"], said["cause"])
    count = len(explanation.CAUSES)
    found = np.zeros((count, count), np.int64)
    for record in said["records"]:
        place = tuple(record["place"][axis] for axis in ("slice", "row", "column"))
        inside = exact[numbered == numbered[place]]
        most = np.bincount(inside, minlength=count).argmax()
        found[most, explanation.CAUSES.index(record["cause"])] += 1
    return found


def agreement(counts: Integer[np.ndarray, "n causes causes"]) -> dict[str, Any]:
    """Share of what has a planted cause that was given it, the share expected by chance, and the difference; recall and
    precision by cause. The patient is the unit, counts are pooled.
    """
    of_planted = counts[:, PLANTED].astype(np.float64)

    def shares(weights: np.ndarray) -> tuple[float, float]:
        table = np.tensordot(weights, of_planted, 1)
        total = table.sum()
        if total == 0:
            return float("nan"), float("nan")
        right = sum(table[i, code] for i, code in enumerate(PLANTED)) / total
        chance = sum(table[i].sum() * table[:, code].sum() for i, code in enumerate(PLANTED)) / total**2
        return float(right), float(chance)

    n = len(counts)
    found: dict[str, Any] = {
        "agreement": statistics.figure(lambda weights: shares(weights)[0], n),
        "chance": statistics.figure(lambda weights: shares(weights)[1], n),
        "above_chance": statistics.figure(lambda weights: shares(weights)[0] - shares(weights)[1], n),
    }
    for code in PLANTED:
        own = counts[:, code, code]
        for name, total in (("recall", counts[:, code].sum(axis=1)), ("precision", counts[:, :, code].sum(axis=1))):
            pairs = np.stack([own, total], axis=1)[total > 0].astype(np.float64)
            found[f"{name} {explanation.CAUSES[code]}"] = statistics.figure(
                lambda weights, pairs=pairs: statistics.pooled_ratio(pairs, weights), len(pairs)
            )
    return found | {"counts": counts.sum(axis=0).tolist()}


def check(trained: api.Trained) -> None:
    """Raises UserError for a model that gives no reasons, or whose cases do not know theirs."""
    if trained.config.method != "entrust":
        raise UserError(f"{trained.workdir}: is of the method {trained.config.method}, which gives no reasons")
    if trained.config.data.layout != "phantom":
        raise UserError(
            f"{trained.workdir}: was trained on scans, and no scan says why it is doubtful; name a model of a"
            " phantom, or look at --suite=regions"
        )


def run(trained: api.Trained, cases: int, output: Path, about: dict[str, Any]) -> None:
    """Predicts test cases, all where `cases` is 0, and writes causes.json and causes.md."""
    spec = dataset.phantom_spec(trained.config.data)
    volumes, _ = api.read_cases(trained)
    volumes = volumes[:cases] if cases else volumes
    scenes = phantom.scenes(spec, [volume.number for volume in volumes], trained.config.seed)
    by_voxel, by_region = [], []
    with logs.progress("causes", len(volumes)) as show:
        for i, volume in enumerate(volumes):
            said = api.predict_volume(trained, volume)
            exact = planted(phantom.Scene(*(np.asarray(field)[i] for field in scenes)))
            by_voxel.append(voxels(exact, said["cause"]))
            by_region.append(regions(exact, said))
            show(i + 1)
    found = {"voxels": agreement(np.stack(by_voxel)), "regions": agreement(np.stack(by_region))}
    output.mkdir(parents=True, exist_ok=True)
    logs.write_json(output / "causes.json", about | {"cases": len(volumes)} | found)
    logs.write_bytes(output / "causes.md", table(found).encode())


def table(found: dict[str, Any]) -> str:
    """The result as markdown: figures, then counts by the planted (rows) and the given cause."""
    names = [name for name in found["voxels"] if name != "counts"]
    rows = [[name.replace("_", " "), *(markdown.figure(found[unit][name]) for unit in found)] for name in names]
    lines = markdown.table(["", *found], rows)
    for unit, one in found.items():
        lines += ["", f"{unit.capitalize()} by the planted cause and the given one:", ""]
        counted = [
            [explanation.CAUSES[code], *(str(one["counts"][code][k]) for k in GIVEN)]
            for code in (*PLANTED, explanation.NONE)
        ]
        lines += markdown.table(["planted", *(explanation.CAUSES[k] for k in GIVEN)], counted)
    return "\n".join(lines) + "\n"
