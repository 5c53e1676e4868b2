"""The semi-synthetic suite: a set of scans with a known posterior, and what a trained model believes of its sites.

The law of the set is in `data.semisynthetic`. Judged as blobs of the phantom suite are: the mean one-step probability
over each site's core against P(z = 1 | what the modalities show), where they agree and where they contradict each
other; and whether uncertainty follows conflict, as the conflict suite asks, beside what the exact law says of it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage

from entrust_jax import api
from entrust_jax.benchmark import conflict
from entrust_jax.benchmark.conflict_figures import AIMS, RESAMPLES, Result, by_patient, mean_figure, ratio_figure
from entrust_jax.data import dataset, intensity, manifest, preprocess, resampling, scans, semisynthetic
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.metrics.conflict import site_auroc
from entrust_jax.report import output as output_folder
from entrust_jax.runtime import logs
from entrust_jax.trustmap import probing

LAW = "posterior.json"
SITES = "sites.npz"  # 1 and 2 where the two sites are, [D, H, W]; no scan, so that nobody takes it for one
KINDS = ("agree", "conflict")
TIE = 1e-4  # nats: beliefs are in single precision
# Of the first modality where none is given; that of the last is so much less, the others lie between.
RELIABILITY, LESS = (0.9, 0.85, 0.8, 0.75, 0.7), 0.1


def exact_law(reliability: Sequence[float], hypotheses: int) -> dict[str, float]:
    """What the disagreement of so many draws from the exact posterior says of a site of the set: its AUROC, sites where

    modalities contradict each other against those that all of them show, and the ratio of its means. Ours.
    """
    evidence, weight = semisynthetic.patterns(reliability)
    p = semisynthetic.posterior(evidence, reliability)
    kinds = np.array([semisynthetic.kind(one) for one in evidence])
    agreed, opposed, share = p[kinds == "agree"], p[kinds == "conflict"], weight[kinds == "conflict"]
    auroc = np.average([conflict.best_auroc(one, agreed, hypotheses) for one in opposed[:, None]], weights=share)
    unlike = np.average(opposed * (1 - opposed), weights=share)
    return {"hypotheses": hypotheses, "auroc": float(auroc), "ratio": float(unlike / np.mean(agreed * (1 - agreed)))}


def reliabilities(asked: Sequence[str], modalities: Sequence[str], hypotheses: int) -> tuple[float, ...]:
    """One for each modality: as asked, or the most reliable ones of RELIABILITY with whom the exact law reaches the aim

    with so many hypotheses. Very reliable readers who contradict each other leave little doubt: the draws of a likely
    lesion often all agree, and .95, .825 and .7 reach an AUROC of .77 with 16, .9, .85 and .8 reach .90, so that the
    aim of .85 could be met by no model of the former. With four modalities it takes .8 to .7.

    Raises UserError for a single modality, another number of them, and for a value outside [.5, 1).
    """
    if len(modalities) < 2:
        raise UserError("--config: one modality contradicts nothing; name a config of two or more")
    if not asked:
        ladder = [tuple(np.linspace(top, top - LESS, len(modalities)).tolist()) for top in RELIABILITY]
        reached = (one for one in ladder if exact_law(one, hypotheses)["auroc"] >= AIMS["auroc"])
        return next(reached, ladder[-1])
    try:
        found = tuple(float(value) for value in asked)
    except ValueError as error:
        raise UserError(f"--reliability={','.join(asked)}: {error}; give numbers such as .95,.8,.7") from None
    if len(found) != len(modalities):
        raise UserError(f"--reliability has {len(found)} values, the modalities are {', '.join(modalities)}; give each")
    if not all(0.5 <= value < 1 for value in found):
        raise UserError(f"--reliability={','.join(asked)}: each must be at least .5 and below 1")
    return found


def make(
    config: Any, output: Path, reliability: Sequence[float], draws: int, slices: int | None = None
) -> dict[str, Any]:
    """Writes the set made of config.data: a folder a case, manifest.csv and posterior.json, whole or not at all.

    draws: cases made of each scan, all of one patient. slices: so many of each scan alone, all if None.
    """
    data = config.data
    if data.layout == "phantom":
        raise UserError("--config: a phantom's posterior is known already; name a config of real scans")
    modalities = tuple(data.modalities)
    values = output_folder.label_values(tuple(map(tuple, data.label_map)), len(data.classes))
    rules = intensity.rules_of(data.intensity.to_dict(), modalities)
    law: dict[str, Any] = {"prior": semisynthetic.PRIOR, "reliability": dict(zip(modalities, reliability, strict=True))}
    law |= {"exact": exact_law(reliability, config.diffusion.hypotheses), "cases": {}, "left_out": []}
    rows: list[dict[str, str]] = []
    with output_folder.whole_folder(output, check_new) as folder:
        for case in dataset.find(data):
            found, _ = preprocess.read_volumes([case], **dataset.reading(data))
            for volume in found:
                candidate = semisynthetic.candidate(volume, slices)
                if candidate is None:
                    law["left_out"].append(volume.name)
                    print(f"{volume.name}: no lesion with a healthy place of its size beside it, left out", flush=True)
                    continue
                for number in range(draws):
                    made, sites = semisynthetic.draw(candidate, reliability, number)
                    name = f"{volume.name}_{number:02d}"
                    rows.append(write_case(folder, name, candidate.start, made, sites, modalities, values, rules))
                    law["cases"][name] = [described(site, modalities) for site in sites]
        if not rows:
            raise UserError(
                f"{data.dir}: no scan has a lesion with a healthy place of its size beside it; take few --slices"
            )
        text = manifest.as_csv(rows, [*modalities, "label"], ".")
        logs.write_bytes(folder / "manifest.csv", text.encode())
        logs.write_json(folder / LAW, law)
    return law


def check_new(output: Path) -> None:
    """Raises UserError unless the folder is new, empty or an earlier set."""
    if output.exists() and any(output.iterdir()) and not (output / LAW).is_file():
        raise UserError(f"--output={output}: holds other files; name a new folder")


def write_case(
    folder: Path,
    name: str,
    start: int,
    volume: Volume,
    sites: Sequence[semisynthetic.Site],
    modalities: Sequence[str],
    values: np.ndarray,
    rules: Sequence[intensity.Rule | None],
) -> dict[str, str]:
    """Writes the scans, the label and the sites of one case, the slices of its scan from `start` on; its row of the

    manifest.
    """
    assert volume.reference is not None and volume.label is not None
    own = folder / name
    own.mkdir()
    row = {"case": name, "patient": volume.patient, "label": f"{name}/label.nii.gz"}
    grid, images = folder / row["label"], intensity.stored(volume.image, volume.body, rules)
    scans.write_grid(grid, volume.reference, start, len(volume.body))
    for m, modality in enumerate(modalities):
        if volume.present[m]:
            row[modality] = f"{name}/{modality}.nii.gz"
            scans.write_map(folder / row[modality], images[m], grid, np.float32)
    # Voxels that count nowhere have no value of their own in every set: they are background here.
    scans.write_map(grid, values[np.maximum(volume.label, 0)], grid, np.uint8)
    marks = sum((i * site.mask.astype(np.uint8) for i, site in enumerate(sites, 1)), np.zeros((), np.uint8))
    np.savez_compressed(own / SITES, sites=np.asarray(marks, np.uint8))
    return row


def described(site: semisynthetic.Site, modalities: Sequence[str]) -> dict[str, Any]:
    """A site as posterior.json holds it."""
    return {
        "place": site.place,
        "kind": semisynthetic.kind(site.evidence),
        "evidence": dict(zip(modalities, site.evidence.tolist(), strict=True)),
        "truth": site.truth,
        "posterior": site.posterior,
    }


# --- what a model believes ----------------------------------------------------------------------------------


def read_law(folder: Path) -> dict[str, Any]:
    """posterior.json of a set. Raises UserError where there is none."""
    place = folder.parent if folder.is_file() else folder
    try:
        return json.loads((place / LAW).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{place}: has no {LAW}; give the folder that --suite=semisynthetic wrote as --data_dir"
        ) from None


def core(mask: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """The mask without its rim in each slice; the mask itself where nothing would be left."""
    cross = ndimage.generate_binary_structure(3, 1)
    cross[[0, 2]] = False
    inner = ndimage.binary_erosion(mask, cross)
    return inner if inner.any() else mask


def believed(trained: api.Trained, volume: Volume, marks: np.ndarray, count: int) -> list[dict[str, Any]]:
    """What a model says of each of `count` sites, means over its core: the one-step probability of a lesion, the

    measures of the conflict suite (NaN where the method has none), phi of each modality (None without reasons), and
    the number of its hypotheses.
    """
    working = resampling.at_spacing(volume, trained.spacing)
    marks = resampling.moved(marks, resampling.lattice_of(volume), resampling.lattice_of(working))
    raw = api.examine(trained, working)
    said = conflict.said_of(raw)
    found: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        inside = core(marks == number)
        seen = bool(inside.any())

        def mean(values: np.ndarray, inside: np.ndarray = inside, seen: bool = seen) -> float:
            return float(values[inside].mean(dtype=np.float64)) if seen else math.nan

        one: dict[str, Any] = {"belief": 1 - mean(raw["one_step"][..., 0])}
        one |= {name: mean(said.maps[name]) if name in said.maps else math.nan for name in conflict.MEASURES}
        one["phi"] = [mean(phi) for phi in said.phi] if seen and said.phi is not None else None
        found.append(one | {"hypotheses": 0 if said.hypotheses is None else len(said.hypotheses)})
    return found


def contributions(evidence: Int[np.ndarray, " m"], reliability: Sequence[float]) -> Float[np.ndarray, " m"]:
    """Shapley value of what each modality shows for ln P(likeliest truth | scans), in nats, as `probing.shapley` has it

    of a model's beliefs; 0 for missing ones.
    """
    p = semisynthetic.posterior(probing.subsets(len(evidence)).astype(int) * evidence, reliability)
    return np.asarray(probing.shapley(jnp.log(jnp.asarray(p if p[-1] >= 0.5 else 1 - p))))


def rightly_blamed(phi: Float[np.ndarray, " m"], evidence: Int[np.ndarray, " m"], truth: bool) -> float:
    """1 where the modality that argues most against the answer shows the opposite of the truth; ties share."""
    least = (evidence != 0) & (phi <= phi[evidence != 0].min() + TIE)
    return float(np.mean((evidence != (1 if truth else -1))[least]))


def judged(rows: Sequence[Mapping[str, Any]], law: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of one model. rows: patient, kind, evidence, truth, posterior and what `believed` returns of each site

    that is seen.

    Beside the model's error that of two short-cuts: the mean of what each modality alone would say, and one half
    wherever they contradict each other. Beside AUROC, ratio and blame what the exact law says of the same sites with
    as many hypotheses.
    """
    rho = list(law["reliability"].values())
    names = sorted({row["patient"] for row in rows})
    results = [Result(name, [dict(row) for row in rows if row["patient"] == name], {}, []) for name in names]

    def of(kind: str, value: Callable[[Mapping[str, Any]], float | None]) -> Float[np.ndarray, " n"]:
        return by_patient(results, lambda row: value(row) if row["kind"] == kind else None)

    def figure(kind: str, value: Callable[[Mapping[str, Any]], float | None]) -> dict[str, Any]:
        return mean_figure(of(kind, value))

    def average(row: Mapping[str, Any]) -> float:
        said = np.array(row["evidence"])
        alone = semisynthetic.posterior(np.diag(said), rho)
        return float(alone[said != 0].mean())

    found: dict[str, Any] = {"sites": {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}}
    found["hypotheses"] = draws = max((row["hypotheses"] for row in rows), default=0)
    for kind in KINDS:
        found[f"error where they {kind}"] = figure(kind, lambda r: abs(r["belief"] - r["posterior"]))
        found[f"error of the mean of readers where they {kind}"] = figure(
            kind, lambda r: abs(average(r) - r["posterior"])
        )
    found["error of one half where they conflict"] = figure("conflict", lambda r: abs(0.5 - r["posterior"]))
    found["belief on Bayes' side in conflict"] = figure("conflict", lambda r: _sided(r["belief"], r["posterior"]))
    found["its exact value"] = figure("conflict", lambda r: _sided(r["posterior"], r["posterior"]))
    for kind in KINDS:
        found[f"disagreement where they {kind}"] = figure(kind, lambda r: r["disagreement"])
        found[f"its exact value where they {kind}"] = figure(kind, _unlike)
    found["ratio of disagreement"] = ratio_figure(*(of(kind, lambda r: r["disagreement"]) for kind in KINDS[::-1]))
    found["its exact ratio"] = ratio_figure(*(of(kind, _unlike) for kind in KINDS[::-1]))
    for kind in KINDS:
        found[f"kappa where they {kind}"] = figure(kind, lambda r: r["conflict"])
    opposed, patient = (np.array([row[key] for row in rows]) for key in ("kind", "patient"))
    for name in conflict.MEASURES:
        score = np.array([row[name] for row in rows], np.float64)
        found[f"AUROC of {'kappa' if name == 'conflict' else name}"] = site_auroc(
            score, opposed == "conflict", patient, resamples=RESAMPLES
        )
    found["exact AUROC of disagreement"] = _exactly_separated(rows, draws)
    exactly = {said: contributions(np.array(said), rho) for said in {tuple(row["evidence"]) for row in rows}}
    blames: dict[str, Callable[[Mapping[str, Any]], np.ndarray | None]] = {
        "blame is right in conflict": lambda r: None if r["phi"] is None else np.array(r["phi"]),
        "its exact rate": lambda r: exactly[tuple(r["evidence"])],
        "its rate by chance": lambda r: np.zeros(len(rho)),
    }
    for name, phi in blames.items():
        found[name] = figure("conflict", lambda r, phi=phi: _blame(r, phi(r)))
    return found


def _unlike(row: Mapping[str, Any]) -> float:
    """P(two draws from the exact law differ)."""
    return 2 * row["posterior"] * (1 - row["posterior"])


def _blame(row: Mapping[str, Any], phi: np.ndarray | None) -> float | None:
    return None if phi is None else rightly_blamed(phi, np.array(row["evidence"]), row["truth"])


def _exactly_separated(rows: Sequence[Mapping[str, Any]], draws: int) -> dict[str, Any]:
    """AUROC of the disagreement of so many draws from the exact law over the same sites."""
    all_, one = (np.array([row["posterior"] for row in rows if row["kind"] == kind]) for kind in KINDS)
    if draws < 2 or not (one.size and all_.size):
        return {"value": None, "ci95": None, "n": 0, "reason": "undefined"}
    return {"value": conflict.best_auroc(one, all_, draws), "ci95": None, "n": len({row["patient"] for row in rows})}


def _sided(value: float, exact: float) -> float:
    return value if exact >= 0.5 else 1 - value


def evaluate(
    trained: api.Trained, volumes: Sequence[Volume], law: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, a row for each site) of a model on cases of the set in `folder`; unseen sites are left out."""
    rows: list[dict[str, Any]] = []
    for volume in volumes:
        if volume.name not in law["cases"]:
            raise UserError(f"{folder / LAW}: does not know case {volume.name}; give the folder that the case is from")
        sites = law["cases"][volume.name]
        with np.load(folder / volume.name / SITES) as file:
            beliefs = believed(trained, volume, file["sites"], len(sites))
        for site, belief in zip(sites, beliefs, strict=True):
            if site["kind"] in KINDS:
                rows.append({"case": volume.name, "patient": volume.patient, **site, **belief})
                rows[-1]["evidence"] = list(site["evidence"].values())
        said = ", ".join(f"{one['belief']:.2f}" for one in beliefs)
        print(f"{volume.name}: belief in its sites {said}", flush=True)
    return judged(rows, law), rows


def table(found: Mapping[str, Any]) -> str:
    """semisynthetic.md."""
    sites = ", ".join(f"{count} {kind}" for kind, count in found["sites"].items())
    lines = ["# Semi-synthetic set", "", f"Sites: {sites}; {found['hypotheses']} hypotheses. ", ""]
    lines[2] += "Means over patients, AUROCs over sites, with 95 % intervals over patients."
    lines += ["| figure | value |", "| --- | --- |"]
    for name, one in found.items():
        if name not in ("sites", "hypotheses"):
            value = "–" if one["value"] is None else f"{one['value']:.3f}"
            interval = f" [{one['ci95'][0]:.3f}, {one['ci95'][1]:.3f}]" if one["ci95"] else ""
            lines.append(f"| {name} | {value}{interval} |")
    return "\n".join(lines) + "\n"
