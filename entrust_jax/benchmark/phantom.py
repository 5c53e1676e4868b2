"""The phantom suite: trains the reference and its ablations and holds them against the exact posterior.

What each check asks is in `acceptance`; the models that are known to be right or wrong are in `references`; what an
ablation changes in `ablations`; what the parts of a model carry in `disentanglement`.
"""

import dataclasses
import functools
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from entrust_jax import api, inference, networks, train
from entrust_jax import model as entrust
from entrust_jax.benchmark import acceptance, disentanglement, references
from entrust_jax.benchmark.ablations import ABLATIONS, ALL, REFERENCE, Ablation
from entrust_jax.benchmark.acceptance import Observation
from entrust_jax.data import dataset, phantom, phantom_law, phantom_scene, pipeline, preprocess
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.report import curves, markdown
from entrust_jax.runtime import logs, mesh
from entrust_jax.training.calibration_data import calibration_set
from entrust_jax.training.stages import plan_stages
from entrust_jax.trustmap import calibration, case, pixels, prediction

HYPOTHESES = 24
SLICES = 32  # phantoms in one compiled call
GENERATION = 3  # of what a training learns: raised when the same config would come to something else
FIRST = 100_000  # the number of the first test phantom; no training sees one so large
STEPS = (1, 2, 4, 8, 16)  # of the curves of diversity
METHODS = ("dpmpp2m", "ddim")
SECOND = 2  # the second reader's bit in the number of a subset; ~SECOND counts from the end: all but that one
STEPPED = (REFERENCE, "A10 b = 1, four steps", "A10 b = .07")  # models whose curves are drawn
OPENED = (REFERENCE, "A4 no independence", "domain term")  # models whose parts are looked into


def chosen(asked: list[str]) -> list[str]:
    """The reference and the ablations asked for, in the suite's order; all of them where none is asked for.

    Raises UserError for one that does not exist.
    """
    if unknown := [name for name in asked if name not in ABLATIONS]:
        raise UserError(f"--ablation: there is none called {unknown[0]!r}; there are {'; '.join(ABLATIONS)}")
    return [name for name in ABLATIONS if name == REFERENCE or name in asked or not asked]


def own_config(config: Any, ablation: Ablation, name: str, seed: int) -> Any:
    """The config of one training."""
    own = config.copy_and_resolve_references()
    own.update_from_flattened_dict(dict(ablation.config))
    own.name, own.seed = name, seed
    return own.lock()


def own_network(config: Any, ablation: Ablation) -> entrust.EnTrust:
    """The config's network as the ablation's class: equal parameters, another way through them."""
    network = networks.network_of(config)
    fields = {f.name: getattr(network, f.name) for f in dataclasses.fields(network) if f.name not in ("parent", "name")}
    return ablation.network(**fields)


def trained(config: Any, ablation: Ablation, workdir: Path) -> api.Trained:
    """The ablation's model, trained into `workdir` unless it is there already."""
    network = own_network(config, ablation)
    train.check(workdir, config)
    if not (workdir / "calibration.json").exists():
        stages = [
            dataclasses.replace(stage, loss=functools.partial(stage.loss, **ablation.loss.get(stage.name, {})))
            for stage in plan_stages(config, network)
        ]
        train.run(config, workdir, network, stages)
    return dataclasses.replace(api.load(workdir), network=network)


def borrowed(ablation: Ablation, workdir: Path) -> api.Trained:
    """A model trained as another one, used as the ablation says."""
    model = api.load(workdir)
    model = dataclasses.replace(model, network=own_network(model.config, ablation))
    if not ablation.inputs:
        return model
    config, network = model.config, model.network
    cases, _ = dataset.read(config.data, model.splits["calibration"], config.seed)
    data = calibration_set(config, network, model.params, model.tau, cases, model.mesh)
    raw = networks.examine_with(config, network, model.params, model.mesh, model.tau, cases[0])
    _, names = pixels.features(raw, cases[0].present)
    # An input that never varies is switched off when the head is fitted.
    seen = np.isin(names, ablation.inputs) | (ablation.inputs == ALL)
    data = dataclasses.replace(data, features=np.float32(data.features * seen))
    head = calibration.fit("head", data, jax.random.key(config.seed), config.train.head_steps)
    return dataclasses.replace(model, rung="head", calibration=head)


def chunks(model: api.Trained, volumes: list[Volume]) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one compiled shape that hold phantoms of one slice each, the last filled up."""
    batch = pipeline.stacked_slices(volumes, multiple=networks.multiple(model.config))
    return pipeline.chunks(batch, mesh.round_to_devices(SLICES, model.mesh))


def glance(model: api.Trained, volumes: list[Volume]) -> acceptance.Alone:
    """What a trained model says of phantoms of one slice each in one step, without hypotheses."""
    static = {"model": model.network, "sampler": inference.sampler_of(model.config), "mesh": model.mesh}
    one_step, kappa = [], []
    for piece in chunks(model, volumes):
        _, maps = inference.look(model.params, piece, jax.random.key(model.config.seed), **static)
        one_step.append(np.asarray(maps["one_step"]))
        kappa.append(np.asarray(maps["conflict"]) * piece["body"])
    h, w = volumes[0].body.shape[1:]
    return acceptance.Alone(*(np.concatenate(x)[: len(volumes), :h, :w] for x in (one_step, kappa)))


def observe(model: api.Trained, volumes: list[Volume], hypotheses: int) -> Observation:
    """What a trained model says of phantoms of one slice each."""
    config = model.config
    static = {"model": model.network, "sampler": inference.sampler_of(config), "mesh": model.mesh}
    key = jax.random.key(config.seed)
    parts = []
    for piece in chunks(model, volumes):
        evidence, maps = inference.look(model.params, piece, key, **static)
        drawn, members = inference.draw(model.params, evidence, piece, key, hypotheses=hypotheses, **static)
        members = np.asarray(members)
        both = zip(np.asarray(drawn["mean"]), members, strict=True)
        label = np.concatenate([case.dice_bayes(mean[None], own[:, None])[0] for mean, own in both])
        probes = inference.probe(model.params, evidence, piece, label.astype(np.int32), key, **static)
        raw = {name: np.asarray(value) for name, value in {**maps, **drawn, **probes}.items()}
        raw |= {"label": label, "border": prediction.border(label, volumes[0].spacing, volumetric=False)}
        for name in prediction.STACKED:
            raw[name] = np.moveaxis(raw[name], 1, 0)
        _, probability, error = prediction.calibrated(raw, volumes[0].present, model.rung, model.calibration)
        parts.append(
            Observation(
                one_step=raw["one_step"],
                hypotheses=members,
                kappa=raw["conflict"] * piece["body"],
                attribution=np.moveaxis(raw["attribution"], 0, 1),
                label=label,
                probability=probability,
                error_probability=error * piece["body"],
                entropy=raw["entropy"],
            )
        )
    h, w = volumes[0].body.shape[1:]
    whole = Observation(*(np.concatenate(values)[: len(volumes)] for values in zip(*parts, strict=True)))
    return Observation(
        one_step=whole.one_step[:, :h, :w],
        hypotheses=whole.hypotheses[:, :, :h, :w],
        kappa=whole.kappa[:, :h, :w],
        attribution=whole.attribution[:, :, :h, :w],
        label=whole.label[:, :h, :w],
        probability=whole.probability[:, :h, :w],
        error_probability=whole.error_probability[:, :h, :w],
        entropy=whole.entropy[:, :h, :w],
    )


def by_steps(model: api.Trained, volumes: list[Volume], scenes: phantom_scene.Scene) -> dict[str, Any]:
    """Diversity of hypotheses drawn in few and in many steps: {sampler: {steps: figure}}."""
    found: dict[str, Any] = {method: {} for method in METHODS}
    key, own = jax.random.key(model.config.seed), inference.sampler_of(model.config)
    h, w = volumes[0].body.shape[1:]
    pieces = list(chunks(model, volumes))
    static = {"model": model.network, "mesh": model.mesh}
    evidence = [inference.look(model.params, piece, key, sampler=own, **static)[0] for piece in pieces]
    for method, steps in itertools.product(METHODS, STEPS):
        chain = dataclasses.replace(own, method=method, steps=steps)
        members = [
            inference.draw(model.params, seen, piece, key, sampler=chain, hypotheses=HYPOTHESES, **static)[1]
            for seen, piece in zip(evidence, pieces, strict=True)
        ]
        drawn = np.concatenate([np.asarray(x) for x in members])[: len(volumes), :, :h, :w]
        found[method][str(steps)] = acceptance.diversity(drawn, scenes)
    return found


def checks(
    seen: Observation, alone: acceptance.Alone, scenes: phantom_scene.Scene, spec: phantom.Spec
) -> dict[str, Any]:
    """Every acceptance check of one model: what it says with every modality, and without the second one."""
    found = acceptance.blobs(scenes, spec)
    rows = zip(np.asarray(scenes.belief), np.asarray(scenes.site), np.asarray(scenes.distance), strict=True)
    laws = [phantom_law.exact_law(belief, site, distance, spec) for belief, site, distance in rows]
    rest = references.readers(scenes, spec)[:, ~SECOND]
    to_the_rim = acceptance.blobs(scenes, spec, margin=0.0)
    every = {
        "G1": acceptance.g1_marginals(seen, found) | {"to_the_rim": acceptance.g1_marginals(seen, to_the_rim)["value"]},
        "G2": acceptance.g2_strong_reader(seen, found, spec),
        "G3": acceptance.g3_coherence(seen, found) | {"to_the_rim": acceptance.coherence(seen.hypotheses, to_the_rim)},
        "G4": acceptance.g4_share(seen, found),
        "G5": acceptance.g5_diversity(seen, scenes),
        "G6": acceptance.g6_enrichment(seen, scenes, found),
        "G7": acceptance.g7_joint(seen, laws, found),
        "G8": acceptance.g8_scores(seen, scenes, found),
        "G9": acceptance.g9_blame(seen, found, spec),
        "G10": acceptance.g10_errors(seen, scenes),
        "G11": acceptance.g11_missing(alone, found, rest),
        "T12": acceptance.t12_tower(seen),
    }
    return {name: one for name, one in every.items() if one is not None}


def fakes(spec: phantom.Spec, numbers: Iterable[int], hypotheses: int) -> dict[str, list[str]]:
    """The checks that the exact observer and every planted fake fail.

    Where half of the sites hold a lesion, Jensen-Shannon divergence orders conflict and ignorance as kappa does; where
    lesions are rare and a reader is often silent it does not, so it is judged there.
    """
    numbers = list(numbers)
    silence = tuple(np.linspace(0.05, 0.4, len(spec.modalities)).tolist())
    rare = dataclasses.replace(spec, prior=0.3, ignorance=silence)
    failed: dict[str, list[str]] = {}
    for kind, words in ((spec, ""), (rare, ", lesions rare")):
        scenes = phantom_scene.scenes(kind, numbers, 0)
        seen = references.exact(scenes, kind, hypotheses, 0)
        found = acceptance.blobs(scenes, kind)
        rest = references.marginals(scenes, references.readers(scenes, kind)[:, ~SECOND], kind)
        made = {"none (the exact observer)": seen}
        if kind is spec:
            made |= {
                "temperature by conflict": references.hot_in_conflict(seen, scenes, kind, found, 1),
                "every pixel drawn by itself": references.pixel_noise(seen, 1),
                "thresholds of one marginal map": references.thresholds_of_one_map(seen, 1),
            }
        else:
            made |= {"Jensen-Shannon divergence as conflict": references.divergence_as_conflict(seen, scenes, kind)}
        for name, fake in made.items():
            every = checks(fake, acceptance.Alone(rest, 0 * seen.kappa), scenes, kind)
            failed[name + words] = [check for check, one in every.items() if not one["pass"]]
    return failed


def flat(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures of `checks` by one name each, G1.conflict, G3; NaN where a model left nothing to measure."""
    rows: dict[str, float] = {}
    for name, one in found.items():
        values = one["value"] if isinstance(one["value"], dict) else {"": one["value"]}
        rows |= {f"{name}.{part}".rstrip("."): np.nan if v is None else float(v) for part, v in values.items()}
    return rows


def summarise(runs: Mapping[str, list[dict[str, Any]]], fake: Mapping[str, list[str]]) -> dict[str, Any]:
    """summary.json from the checks of every run, {ablation: one dict of checks per seed, in the reference's order}.

    A check of the reference passes when it passes on every seed; its value is the mean over them. An ablation is
    compared with the reference of the same seed: phantoms and initial weights are those of the seed.
    """
    reference = runs[REFERENCE]
    rows = {name: [flat(found) for found in own] for name, own in runs.items()}
    means = {key: float(np.mean([row[key] for row in rows[REFERENCE]])) for key in rows[REFERENCE][0]}

    def value(check: str) -> Any:
        inner = {key.partition(".")[2]: mean for key, mean in means.items() if key.split(".")[0] == check}
        return inner.get("", inner)

    done = {}
    for check, first in reference[0].items():
        done[check] = {
            "value": value(check),
            "threshold": first["threshold"],
            "pass": all(found[check]["pass"] for found in reference),
            "seeds": [found[check]["value"] for found in reference],
        }
        if "to_the_rim" in first:
            done[check]["to_the_rim"] = [found[check]["to_the_rim"] for found in reference]
    compared = {
        name: {
            "expected": ABLATIONS[name].expected,
            "fails": [check for check, passed in passes(runs[name]).items() if not passed],
            "figures": {
                key: _figure([row[key] for row in own], [row[key] for row in rows[REFERENCE]]) for key in own[0]
            },
        }
        for name, own in rows.items()
    }
    return {"checks": done, "fakes": dict(fake), "ablations": compared}


def _figure(own: list[float], reference: list[float]) -> dict[str, Any]:
    """Mean and spread over seeds, and the mean and spread of the paired differences to the reference."""
    difference = np.array(own) - reference[: len(own)]
    spread = [float(np.std(x, ddof=1)) if len(own) > 1 else None for x in (own, difference)]
    return {
        "value": float(np.mean(own)),
        "spread": spread[0],
        "difference": float(np.mean(difference)),
        "difference_spread": spread[1],
        "n": len(own),
    }


def passes(seeds: list[dict[str, Any]]) -> dict[str, bool]:
    """Which checks pass on every seed."""
    return {check: all(found[check]["pass"] for found in seeds) for check in seeds[0]}


def table(summary: Mapping[str, Any]) -> str:
    """phantom.md: what was found, in the order in which a reader asks."""
    head = ["check", "value, mean over seeds", "threshold", "passes", "what it is"]
    rows = [
        [
            check,
            _text(one["value"]),
            _text(one["threshold"]),
            "yes" if one["pass"] else "**no**",
            acceptance.QUESTIONS[check],
        ]
        for check, one in summary["checks"].items()
    ]
    lines = ["# Phantom suite", "", *markdown.table(head, rows)]
    fakes_ = [[name, ", ".join(failed) or "none"] for name, failed in summary["fakes"].items()]
    lines += ["", *markdown.table(["planted fake", "fails"], fakes_)]
    if len(summary["ablations"]) > 1:
        names = list(summary["ablations"])
        lines += ["", "Value ± spread over n seeds; in brackets the difference to the reference of the same seeds.", ""]
        keys = list(summary["ablations"][names[0]]["figures"])
        rows = [["theory", *(summary["ablations"][name]["expected"] for name in names)]]
        rows += [["seeds", *(str(summary["ablations"][name]["figures"][keys[0]]["n"]) for name in names)]]
        rows += [["fails", *(", ".join(summary["ablations"][name]["fails"]) or "none" for name in names)]]
        rows += [[key, *(_cell(summary["ablations"][name]["figures"][key]) for name in names)] for key in keys]
        lines += markdown.table(["", *names], rows)
    if summary["steps"]:
        rows = [[name, *(f"{value:.2f}" for value in own.values())] for name, own in lines_of(summary).items()]
        lines += ["", "Diversity of hypotheses over its analytic value, by the sampler's steps.", ""]
        lines += markdown.table(["", *(str(steps) for steps in STEPS)], rows)
    if summary["parts"]:
        names = list(summary["parts"])
        rows = [[key, *(f"{summary['parts'][name][key]:.3g}" for name in names)] for key in summary["parts"][names[0]]]
        lines += ["", "What the parts carry (R2: squared correlation less its value under independence).", ""]
        lines += markdown.table(["", *names], rows)
    return "\n".join(lines) + "\n"


def lines_of(summary: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Curves of diversity by steps, a line each model and sampler."""
    return {
        f"{name.partition(',')[0]}, {method}": {steps: own[str(steps)] for steps in STEPS}
        for name, both in summary["steps"].items()
        for method, own in both.items()
    }


def _cell(figure: Mapping[str, Any]) -> str:
    value, difference = f"{figure['value']:.3g}", f"{figure['difference']:+.2g}"
    if figure["spread"] is not None:
        value, difference = f"{value} ± {figure['spread']:.2g}", f"{difference} ± {figure['difference_spread']:.2g}"
    return f"{value} ({difference})" if figure["difference"] else value


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(_text(one) for one in value)
    return "–" if value is None or np.isnan(value) else f"{value:.3g}"


def short(name: str) -> str:
    """A variant's name as a folder's."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name)


def examine(config: Any, ablation: Ablation, model: api.Trained, seed: int, cases: int, folder: Path) -> None:
    """Writes what a model says of the test phantoms, with every modality and without the second, into `folder`."""
    spec = dataset.phantom_spec(config.data)
    volumes = phantom_scene.volumes(spec, range(FIRST, FIRST + cases), seed)
    with ablation.drawing():
        seen = observe(model, volumes, HYPOTHESES)
    save(folder / "alone.npz", glance(model, [preprocess.without(volume, 1) for volume in volumes]))
    save(folder / "seen.npz", seen)


def save(path: Path, maps: Observation | acceptance.Alone) -> None:
    """Maps as a compressed file, written beside and renamed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **maps._asdict())  # type: ignore[arg-type]
    logs.write_bytes(path, buffer.getvalue())


def judge(config: Any, seed: int, folder: Path) -> dict[str, Any]:
    """The checks of a model that `examine` has written down."""
    spec = dataset.phantom_spec(config.data)
    seen, alone = Observation(**np.load(folder / "seen.npz")), acceptance.Alone(**np.load(folder / "alone.npz"))
    scenes = phantom_scene.scenes(spec, range(FIRST, FIRST + len(seen.label)), seed)
    return checks(seen, alone, scenes, spec)


def claim(workdir: Path, asked: dict[str, Any]) -> None:
    """Writes what a run was asked for. Raises UserError where the folder holds one that was asked for other things."""
    path = workdir / "asked.json"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        logs.write_json(path, asked)
        return
    before = json.loads(path.read_text())
    if before | {"config": api.completed(before["config"])} != asked:
        raise UserError(f"{workdir}: was made with another config or version; give another --output, or remove it")


def check(config: Any, output: Path, names: list[str]) -> None:
    """What the suite cannot do, said before anything is trained."""
    data = config.data
    if data.layout != "phantom" or data.phantom.variant != "binary" or data.phantom.depth != 1:
        raise UserError(f"--config: {config.name} is no phantom of one slice with one kind of lesion")
    if len(data.modalities) < 2:
        raise UserError(f"--config: {config.name} has one reader; without a second one there is no conflict to judge")
    spec = dataset.phantom_spec(data)
    acceptance.blobs(phantom_scene.scenes(spec, [FIRST], 0), spec)
    path = output / "summary.json"
    if path.exists() and not {*json.loads(path.read_text())["ablations"]} <= {*names}:
        raise UserError(f"{path}: holds results that this command would lose; give another --output")


def run(config: Any, output: Path, names: list[str], seeds: int, cases: int) -> dict[str, Any]:
    """Trains, examines and judges every variant on every seed, an open question on one.

    What is finished in `output`/runs is not repeated.
    """
    check(config, output, names)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    curve: dict[str, list[dict[str, Any]]] = {}
    parts: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        for name in [n for n in names if seed == 0 or not ABLATIONS[n].question]:
            ablation, workdir = ABLATIONS[name], output / "runs" / f"{short(name)}_{seed}"
            own = own_config(config, ablation, f"{config.name}_{short(name)}", seed)
            wanted = {"seen.npz"}
            if len(names) > 1:  # curves and parts are there to be compared
                wanted |= {"steps.json"} if name in STEPPED else set()
                wanted |= {"parts.json"} if name in OPENED and seed == 0 else set()
            asked = {"config": json.loads(own.to_json()), "cases": cases, "hypotheses": HYPOTHESES}
            asked |= {"generation": GENERATION}
            claim(workdir, asked)
            if missing := {file for file in wanted if not (workdir / file).exists()}:
                if ablation.of:
                    model = borrowed(ablation, output / "runs" / f"{short(ablation.of)}_{seed}")
                else:
                    model = trained(own, ablation, workdir)
                if "seen.npz" in missing:
                    examine(own, ablation, model, seed, cases, workdir)
                spec = dataset.phantom_spec(own.data)
                numbers = range(FIRST, FIRST + -(-cases // 4))
                scenes, volumes = phantom_scene.scenes(spec, numbers, seed), phantom_scene.volumes(spec, numbers, seed)
                if "steps.json" in missing:
                    logs.write_json(workdir / "steps.json", by_steps(model, volumes, scenes))
                if "parts.json" in missing:
                    one_step = glance(model, volumes).one_step
                    found = disentanglement.measure(model, volumes, scenes, spec, one_step)
                    logs.write_json(workdir / "parts.json", found)
            runs[name].append(judge(own, seed, workdir))
            if "steps.json" in wanted:
                curve.setdefault(name, []).append(json.loads((workdir / "steps.json").read_text()))
            if "parts.json" in wanted:
                parts.setdefault(name, []).append(json.loads((workdir / "parts.json").read_text()))
            failed = [check for check, passed in passes(runs[name][-1:]).items() if not passed]
            print(f"{name}, seed {seed}: fails {', '.join(failed) or 'nothing'}", flush=True)
    planted = fakes(dataset.phantom_spec(config.data), range(FIRST, FIRST + cases), HYPOTHESES)
    summary = summarise(runs, planted) | {"steps": mean_of(curve), "parts": mean_of(parts)}
    logs.write_json(output / "summary.json", summary)
    logs.write_bytes(output / "phantom.md", table(summary).encode())
    draw(config, output, summary)
    return summary


def mean_of(trees: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Mean over seeds of every figure, {name: the same tree}; what a model left undefined is NaN."""

    def mean(*own: Any) -> Any:
        if isinstance(own[0], dict):
            return {key: mean(*(one[key] for one in own)) for key in own[0]}
        return float(np.mean([np.nan if one is None else one for one in own]))

    return {name: mean(*own) for name, own in trees.items()}


def draw(config: Any, output: Path, summary: Mapping[str, Any]) -> None:
    """The suite's pictures, of the reference's first seed: beliefs of blobs, conflict beside what was planted."""
    spec, folder = dataset.phantom_spec(config.data), output / "runs" / f"{REFERENCE}_0"
    seen = Observation(**np.load(folder / "seen.npz"))
    scenes = phantom_scene.scenes(spec, range(FIRST, FIRST + len(seen.label)), 0)
    found = acceptance.blobs(scenes, spec)
    share = np.mean(acceptance.shown(seen.hypotheses, found) >= 0.5, axis=1)
    panels = {
        "one-step belief": acceptance.presence(seen.one_step, found).ravel(),
        f"share of {seen.hypotheses.shape[1]} hypotheses": share.ravel(),
    }
    kinds = {kind: (found.kind == i).ravel() for i, kind in enumerate(acceptance.KINDS)}
    curves.save(
        curves.blob_figure(found.posterior.ravel(), panels, kinds, "Blobs of the test phantoms"), output / "blobs.png"
    )
    opposed = np.flatnonzero(np.any(found.kind == acceptance.CONFLICT, axis=1))
    ignored = np.flatnonzero(np.all(found.kind == acceptance.IGNORANCE, axis=1))
    rows = np.concatenate([opposed[:4], ignored[:1]])
    columns = {f"image {name}": np.asarray(scenes.image)[rows, m, 0] for m, name in enumerate(spec.modalities)}
    columns |= {
        "exact P(lesion)": np.asarray(scenes.marginal)[rows, 0, ..., 1:].sum(-1),
        "p_1(lesion)": seen.one_step[rows, ..., 1:].sum(-1),
        "planted conflict": np.asarray(scenes.conflict)[rows, 0].astype(float),
        "kappa": seen.kappa[rows],
        "disagreement of hypotheses": acceptance.disagreement(seen.hypotheses)[rows],
        "its exact value": acceptance.exact_disagreement(scenes)[rows],
    }
    curves.save(
        curves.map_figure(columns, len(spec.modalities), "Four phantoms in conflict, one that a reader ignores"),
        output / "conflict.png",
    )
    if summary["steps"]:
        curves.save(curves.steps_figure(lines_of(summary), acceptance.THRESHOLDS["G5"]), output / "diversity.png")
