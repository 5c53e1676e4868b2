"""The semi-synthetic suite: a set of scans with a known posterior, and what a trained model believes of its sites.

The law of the set is in `data.semisynthetic`. Judged as blobs of the phantom suite are: the mean one-step probability
over each site's core against P(z = 1 | what the modalities show), where they agree and where they contradict each
other.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from entrust_jax import api
from entrust_jax.data import dataset, manifest, preprocess, resampling, scans, semisynthetic
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.metrics import statistics
from entrust_jax.report import output as output_folder
from entrust_jax.runtime import logs

LAW = "posterior.json"
SITES = "sites.npz"  # 1 and 2 where the two sites are, [D, H, W]; no scan, so that nobody takes it for one
RESAMPLES = statistics.RESAMPLES
KINDS = ("agree", "conflict")
RELIABILITY = (0.95, 0.7)  # of the first and the last modality where none is given, the others between


def reliabilities(asked: Sequence[str], modalities: Sequence[str]) -> tuple[float, ...]:
    """One for each modality. Raises UserError for another number of them, and for one outside [.5, 1)."""
    if not asked:
        return tuple(np.linspace(*RELIABILITY, len(modalities)).tolist())
    try:
        found = tuple(float(value) for value in asked)
    except ValueError as error:
        raise UserError(f"--reliability={','.join(asked)}: {error}; give numbers such as .95,.8,.7") from None
    if len(found) != len(modalities):
        raise UserError(f"--reliability has {len(found)} values, the modalities are {', '.join(modalities)}; give each")
    if not all(0.5 <= value < 1 for value in found):
        raise UserError(f"--reliability={','.join(asked)}: each must be at least .5 and below 1")
    return found


def make(config: Any, output: Path, reliability: Sequence[float], draws: int) -> dict[str, Any]:
    """Writes the set made of config.data: a folder a case, manifest.csv and posterior.json, whole or not at all.

    draws: cases made of each scan, all of one patient.
    """
    data = config.data
    if data.layout == "phantom":
        raise UserError("--config: a phantom's posterior is known already; name a config of real scans")
    modalities = tuple(data.modalities)
    values = output_folder.label_values(tuple(map(tuple, data.label_map)), len(data.classes))
    law: dict[str, Any] = {"prior": semisynthetic.PRIOR, "reliability": dict(zip(modalities, reliability, strict=True))}
    law |= {"cases": {}, "left_out": []}
    rows: list[dict[str, str]] = []
    with output_folder.whole_folder(output, check_new) as folder:
        for case in dataset.find(data):
            found, _ = preprocess.read_volumes([case], **dataset.reading(data))
            for volume in found:
                candidate = semisynthetic.candidate(volume)
                if candidate is None:
                    law["left_out"].append(volume.name)
                    print(f"{volume.name}: no lesion with a healthy place of its size beside it, left out", flush=True)
                    continue
                for number in range(draws):
                    made, sites = semisynthetic.draw(candidate, reliability, number)
                    name = f"{volume.name}_{number:02d}"
                    rows.append(write_case(folder, name, made, sites, modalities, values))
                    law["cases"][name] = [described(site, modalities) for site in sites]
        if not rows:
            raise UserError(f"{data.dir}: no scan has a lesion with a healthy place of its size beside it")
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
    volume: Volume,
    sites: Sequence[semisynthetic.Site],
    modalities: Sequence[str],
    values: np.ndarray,
) -> dict[str, str]:
    """Writes the scans, the label and the sites of one case; its row of the manifest."""
    assert volume.reference is not None and volume.label is not None
    own = folder / name
    own.mkdir()
    row = {"case": name, "patient": volume.patient}
    for m, modality in enumerate(modalities):
        if volume.present[m]:
            row[modality] = f"{name}/{modality}.nii.gz"
            scans.write_map(folder / row[modality], semisynthetic.stored(volume)[m], volume.reference, np.float32)
    row["label"] = f"{name}/label.nii.gz"
    # Voxels that count nowhere have no value of their own in every set: they are background here.
    scans.write_map(folder / row["label"], values[np.maximum(volume.label, 0)], volume.reference, np.uint8)
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


def believed(trained: api.Trained, volume: Volume, marks: np.ndarray, count: int) -> list[dict[str, float]]:
    """What a model says of each of `count` sites: its mean one-step probability of a lesion, and how far samples differ

    (NaN for a method without samples).
    """
    working = resampling.at_spacing(volume, trained.spacing)
    marks = resampling.moved(marks, resampling.lattice_of(volume), resampling.lattice_of(working))
    raw = api.examine(trained, working, probed=False)
    found = []
    for number in range(1, count + 1):
        inside = core(marks == number)
        belief = 1 - raw["one_step"][inside][:, 0].mean(dtype=np.float64) if inside.any() else np.nan
        spread = (
            raw["disagreement"][inside].mean(dtype=np.float64) if "disagreement" in raw and inside.any() else np.nan
        )
        found.append({"belief": float(belief), "disagreement": float(spread)})
    return found


def judged(rows: Sequence[Mapping[str, Any]], law: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of one model. rows: patient, kind, evidence, posterior, belief, disagreement of each site that is seen.

    Beside the model's error that of two short-cuts: the mean of what each modality alone would say, and one half
    wherever they contradict each other.
    """
    rho = list(law["reliability"].values())
    patients = sorted({row["patient"] for row in rows})

    def figure(kind: str, value: Any) -> dict[str, Any]:
        own = [[value(r) for r in rows if r["patient"] == p and r["kind"] == kind] for p in patients]
        means = np.array([np.nanmean(x) for x in own if np.isfinite(x).any()])
        return statistics.figure(lambda w: statistics.weighted_mean(means, w), len(means), resamples=RESAMPLES)

    def average(row: Mapping[str, Any]) -> float:
        said = np.array(row["evidence"])
        alone = semisynthetic.posterior(np.diag(said), rho)
        return float(alone[said != 0].mean())

    found: dict[str, Any] = {"sites": {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}}
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
        found[f"its exact value where they {kind}"] = figure(kind, lambda r: 2 * r["posterior"] * (1 - r["posterior"]))
    return found


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
    lines = ["# Semi-synthetic set", "", f"Sites: {found['sites']}. Means over patients with 95 % intervals.", ""]
    lines += ["| figure | value |", "| --- | --- |"]
    for name, one in found.items():
        if name != "sites":
            value = "–" if one["value"] is None else f"{one['value']:.3f}"
            interval = f" [{one['ci95'][0]:.3f}, {one['ci95'][1]:.3f}]" if one["ci95"] else ""
            lines.append(f"| {name} | {value}{interval} |")
    return "\n".join(lines) + "\n"
