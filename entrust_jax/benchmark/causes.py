"""The causes suite: whether the reasons given for doubt are the right ones, on phantoms, where they are known exactly.

Every doubtful voxel of a test case is given a cause by `trustmap.explanation`. A phantom knows three of them: readers
contradict each other at the voxel's site, every reader is silent there, or the voxel's class hangs on where the border
lies. Along the border of a site at which readers contradict each other two hold, and neither answer is counted.
Agreement is held against what the same causes would reach if they were dealt out among the same voxels at random.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer, UInt8

from entrust_jax import api
from entrust_jax.data import dataset, phantom, phantom_scene
from entrust_jax.errors import UserError
from entrust_jax.metrics import statistics
from entrust_jax.report import markdown
from entrust_jax.runtime import logs
from entrust_jax.trustmap import explanation

PLANTED = (explanation.CONFLICT, explanation.IGNORANCE, explanation.BOUNDARY)
BOTH = len(explanation.CAUSES)  # contradicted, and at the border
ROWS = {code: explanation.CAUSES[code] for code in PLANTED} | {BOTH: "conflict and boundary", explanation.NONE: "none"}
GIVEN = range(explanation.MISSING_INPUT, len(explanation.CAUSES))


def planted(scene: phantom_scene.Scene) -> UInt8[np.ndarray, "d h w"]:
    """The cause that a phantom plants at each voxel, BOTH where there are two; 0 where it plants none, as at a site
    where some reader speaks and none contradicts, however little they say.
    """
    evidence, site = np.asarray(scene.evidence), np.asarray(scene.site)
    opposed = np.asarray(phantom.opposed(jnp.asarray(evidence), jnp.ones(len(evidence), bool)))
    contradicted, silent = (np.append(own, False)[site] for own in (opposed, np.all(evidence == 0, axis=0)))
    boundary = np.asarray(scene.boundary)
    masks = [boundary & contradicted, boundary, np.asarray(scene.conflict), np.asarray(scene.ignorance) & silent]
    codes = [BOTH, explanation.BOUNDARY, explanation.CONFLICT, explanation.IGNORANCE]
    return np.select(masks, codes, explanation.NONE).astype(np.uint8)


def voxels(
    exact: UInt8[np.ndarray, "d h w"], given: UInt8[np.ndarray, "d h w"]
) -> Integer[np.ndarray, "planted given"]:
    """Counts of doubtful voxels by the planted and the given cause."""
    doubtful = given != explanation.NONE
    found = np.zeros((BOTH + 1, len(explanation.CAUSES)), np.int64)
    np.add.at(found, (exact[doubtful], given[doubtful]), 1)
    return found


def regions(exact: UInt8[np.ndarray, "d h w"], said: Mapping[str, Any]) -> Integer[np.ndarray, "planted given"]:
    """Counts of a prediction's regions by the commonest planted cause of their voxels and the given one."""
    numbered = explanation.components(said["error_probability"], said["cause"])
    found = np.zeros((BOTH + 1, len(explanation.CAUSES)), np.int64)
    for record in said["records"]:
        place = tuple(record["place"][axis] for axis in ("slice", "row", "column"))
        inside = exact[numbered == numbered[place]]
        found[np.bincount(inside).argmax(), explanation.CAUSES.index(record["cause"])] += 1
    return found


def agreement(counts: Integer[np.ndarray, "n planted given"]) -> dict[str, Any]:
    """Share of what has one planted cause that was given it, the share expected by chance, and the difference; recall
    and precision by cause. The patient is the unit, counts are pooled.
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
        for name, total in (
            ("recall", counts[:, code].sum(axis=1)),
            ("precision", counts[:, PLANTED, code].sum(axis=1)),
        ):
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
    scenes = phantom_scene.scenes(spec, [volume.number for volume in volumes], trained.config.seed)
    by_voxel, by_region = [], []
    with logs.progress("causes", len(volumes)) as show:
        for i, volume in enumerate(volumes):
            said = api.predict_volume(trained, volume)
            exact = planted(phantom_scene.Scene(*(np.asarray(field)[i] for field in scenes)))
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
        counted = [[name, *(str(one["counts"][code][k]) for k in GIVEN)] for code, name in ROWS.items()]
        lines += markdown.table(["planted", *(explanation.CAUSES[k] for k in GIVEN)], counted)
    return "\n".join(lines) + "\n"
