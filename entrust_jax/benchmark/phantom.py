"""The phantom suite: trains the reference and its ablations and holds them against the exact posterior.

What each check asks is in `acceptance`; the models that are known to be right or wrong are in `references`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from entrust_jax import api, inference, train
from entrust_jax import model as entrust
from entrust_jax.baselines.unet import soft_dice
from entrust_jax.benchmark import acceptance, references
from entrust_jax.benchmark.acceptance import Observation
from entrust_jax.data import dataset, phantom, phantom_law, pipeline
from entrust_jax.data.preprocess import Volume
from entrust_jax.enfuse.encoder import Evidence
from entrust_jax.report import curves
from entrust_jax.runtime import logs
from entrust_jax.segdiff import schedule
from entrust_jax.trustmap import case

HYPOTHESES = 24
SLICES = 32  # phantoms in one compiled call
FIRST = 100_000  # the number of the first test phantom; no training sees one so large


class MeanFusion(entrust.EnTrust):
    """Every modality that is there counts the same: no learned reliability."""

    def encode(self, *args: Any, **options: Any) -> Evidence:
        evidence = super().encode(*args, **options)
        return dataclasses.replace(evidence, reliability=tuple(0 * r for r in evidence.reliability))


class NoConflictFeatures(entrust.EnTrust):
    """F_cf is zero: the denoiser must find conflict in F_c and F_u by itself."""

    def fuse(self, evidence: Evidence, availability: Array, **options: Any) -> entrust.Condition:
        nothing = jnp.zeros(availability.shape[:1])
        return super().fuse(evidence, availability, **(options | {"conflict_scale": nothing}))


class NoIndependence(entrust.EnTrust):
    """Without the cross-covariance objective."""

    def fuse_terms(self, *args: Any, **options: Any) -> Any:
        condition, terms, figures = super().fuse_terms(*args, **options)
        return condition, terms | {"xcov": 0 * terms["xcov"]}, figures


class GlobalPrior(entrust.EnTrust):
    """The class frequency of the whole body in place of the positional base rate pi(u)."""

    def encode(self, *args: Any, **options: Any) -> Evidence:
        evidence = super().encode(*args, **options)
        space = tuple(range(1, evidence.body.ndim))
        inside = evidence.body[..., None]
        rate = jnp.sum(inside * jax.nn.softmax(evidence.prior_logits, axis=-1), axis=space, keepdims=True)
        rate = rate / jnp.maximum(jnp.sum(inside, axis=space, keepdims=True), 1.0)
        return dataclasses.replace(evidence, prior_logits=jnp.broadcast_to(jnp.log(rate), evidence.prior_logits.shape))


def recycled(
    denoise: Callable[[Array, Array], Array], x0: Float[Array, "b *s k"], log_snr: Float[Array, " b"], eps: Array
) -> Float[Array, "b *s k"]:
    """x_t from the model's own one-step prediction instead of the truth (Fu et al. 2023, arXiv 2303.06040)."""
    lowest = jnp.full_like(log_snr, -12.0)
    own = jax.lax.stop_gradient(jax.nn.softmax(denoise(eps, lowest), axis=-1))
    size = jnp.max(jnp.abs(x0))
    return schedule.diffuse(size * (2 * own - 1), log_snr, jnp.roll(eps, 1, axis=0))


def with_dice(logits: Array, label: Array, weight: Array) -> Float[Array, " b"]:
    """Cross-entropy plus soft Dice: nnU-Net's habit, which is no proper score."""
    return entrust.weighted_ce(logits, label, weight) + soft_dice(logits, label, (weight > 0).astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One training: what differs from the reference, and what theory says of it."""

    expected: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    network: type[entrust.EnTrust] = entrust.EnTrust
    loss: Mapping[str, Callable] = dataclasses.field(default_factory=dict)


REFERENCE = "reference"
VARIANTS: Mapping[str, Variant] = {
    REFERENCE: Variant("every check passes"),
    "A0 mean fusion": Variant("may lose in conflict; reported either way", network=MeanFusion),
    "A1 recycling": Variant("no diversity at all", loss={"noisy": recycled}),
    "A2 cross-entropy and Dice": Variant("too sure in conflict", loss={"score": with_dice}),
    "A3 no conflict features": Variant("reported either way", network=NoConflictFeatures),
    "A4 no independence": Variant("parts depend on each other; accuracy reported", network=NoIndependence),
    "A10 b = 1, four steps": Variant("hypotheses too sure", config={"diffusion.b": 1.0, "diffusion.steps": 4}),
    "A12 global prior": Variant("conflict map fails", network=GlobalPrior),
}


def variant_config(config: Any, variant: Variant, name: str, seed: int) -> Any:
    """The config of one training."""
    own = config.copy_and_resolve_references()
    own.update_from_flattened_dict(dict(variant.config))
    own.name, own.seed = name, seed
    return own.lock()


def variant_network(config: Any, variant: Variant) -> entrust.EnTrust:
    """The config's network as the variant's class: equal parameters, another way through them."""
    network = api.network_of(config)
    fields = {f.name: getattr(network, f.name) for f in dataclasses.fields(network) if f.name not in ("parent", "name")}
    return variant.network(**fields)


def trained(config: Any, variant: Variant, workdir: Path) -> api.Trained:
    """The variant's model, trained into `workdir` unless it is there already."""
    network = variant_network(config, variant)
    train.check(workdir, config)
    if not (workdir / "calibration.json").exists():
        stages = train.plan_stages(config, network)
        stages[-1] = dataclasses.replace(stages[-1], loss=functools.partial(stages[-1].loss, **variant.loss))
        train.run(config, workdir, network, stages)
    return dataclasses.replace(api.load(workdir), network=network)


def without(volume: Volume, modality: int) -> Volume:
    """The same scan, one modality missing."""
    present, image = volume.present.copy(), volume.image.copy()
    present[modality], image[modality] = False, 0.0
    return dataclasses.replace(volume, present=present, image=image)


def observe(model: api.Trained, volumes: list[Volume], hypotheses: int) -> Observation:
    """What a trained model says of phantoms of one slice each, `SLICES` of them per compiled call."""
    config = model.config
    static = {"model": model.network, "sampler": inference.sampler_of(config), "mesh": model.mesh}
    key = jax.random.key(config.seed)
    size = -(-SLICES // model.mesh.size) * model.mesh.size
    slices = [pipeline.evaluation_slices(volume, multiple=api.multiple(config)) for volume in volumes]
    batch = {name: np.concatenate([one[name] for one in slices]) for name in slices[0]}
    parts = []
    for piece in pipeline.chunks(batch, size):
        evidence, maps = inference.look(model.params, piece, key, **static)
        drawn, members = inference.draw(model.params, evidence, piece, key, hypotheses=hypotheses, **static)
        members = np.asarray(members)
        both = zip(np.asarray(drawn["mean"]), members, strict=True)
        label = np.concatenate([case.dice_bayes(mean[None], own[:, None])[0] for mean, own in both])
        probes = inference.probe(model.params, evidence, piece, label.astype(np.int32), key, **static)
        raw = {name: np.asarray(value) for name, value in {**maps, **drawn, **probes}.items()}
        raw |= {"label": label}
        for name in inference.STACKED:
            raw[name] = np.moveaxis(raw[name], 1, 0)
        _, probability, error = inference.calibrated(raw, volumes[0].present, model.rung, model.calibration)
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


def checks(seen: Observation, alone: Observation, scenes: phantom.Scene, spec: phantom.Spec) -> dict[str, Any]:
    """Every acceptance check of one model: what it says with all modalities, and without the second one."""
    found = acceptance.blobs(scenes, spec)
    rows = zip(np.asarray(scenes.belief), np.asarray(scenes.site), np.asarray(scenes.distance), strict=True)
    laws = [phantom_law.exact_law(belief, site, distance, spec) for belief, site, distance in rows]
    expected = np.array([phantom_law.mean_distance(law) for law in laws])
    single = references.readers(scenes, spec)[:, 1]
    every = {
        "G1": acceptance.g1_marginals(seen, found),
        "G2": acceptance.g2_strong_reader(seen, found, spec),
        "G3": acceptance.g3_coherence(seen, found),
        "G4": acceptance.g4_share(seen, found),
        "G5": acceptance.g5_diversity(seen, scenes),
        "G6": acceptance.g6_enrichment(seen, scenes, found),
        "G7": acceptance.g7_joint(seen, scenes, found, expected),
        "G8": acceptance.g8_scores(seen, scenes, found),
        "G9": acceptance.g9_blame(seen, found),
        "G10": acceptance.g10_errors(seen, scenes),
        "G11": acceptance.g11_missing(alone, found, single),
    }
    return {name: one for name, one in every.items() if one is not None}


def fakes(scenes: phantom.Scene, spec: phantom.Spec, hypotheses: int) -> dict[str, list[str]]:
    """The checks that the exact observer and every planted fake fail."""
    seen = references.exact(scenes, spec, hypotheses, 0)
    found = acceptance.blobs(scenes, spec)
    single = references.marginals(scenes, references.readers(scenes, spec)[:, 1], spec)
    alone = seen._replace(one_step=single, kappa=0 * seen.kappa)
    made = {
        "none (the exact observer)": seen,
        "temperature by conflict": references.hot_in_conflict(seen, scenes, spec, found, 1),
        "every pixel drawn by itself": references.pixel_noise(seen, 1),
        "thresholds of one marginal map": references.thresholds_of_one_map(seen, 1),
        "Jensen-Shannon divergence as conflict": references.divergence_as_conflict(seen, scenes, spec),
    }
    return {
        name: [check for check, one in checks(fake, alone, scenes, spec).items() if not one["pass"]]
        for name, fake in made.items()
    }


def flat(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures of `checks` by one name each, G1.conflict, G3; NaN where a model left nothing to measure."""
    rows: dict[str, float] = {}
    for name, one in found.items():
        values = one["value"] if isinstance(one["value"], dict) else {"": one["value"]}
        rows |= {f"{name}.{part}".rstrip("."): np.nan if v is None else float(v) for part, v in values.items()}
    return rows


def summarise(runs: Mapping[str, list[dict[str, Any]]], fake: Mapping[str, list[str]]) -> dict[str, Any]:
    """summary.json from the checks of every run, {variant: one dict of checks per seed}.

    A check of the reference passes when it passes on every seed; its value is the mean over them.
    """
    reference = runs[REFERENCE]
    rows = {name: [flat(found) for found in own] for name, own in runs.items()}
    means = {name: {key: float(np.mean([row[key] for row in own])) for key in own[0]} for name, own in rows.items()}

    def value(check: str) -> Any:
        inner = {key.partition(".")[2]: mean for key, mean in means[REFERENCE].items() if key.split(".")[0] == check}
        return inner.get("", inner)

    done = {
        check: {
            "value": value(check),
            "threshold": reference[0][check]["threshold"],
            "pass": all(found[check]["pass"] for found in reference),
            "seeds": [found[check]["value"] for found in reference],
        }
        for check in reference[0]
    }
    ablations = {}
    for name, own in rows.items():
        if name != REFERENCE:
            ablations[name] = {
                "expected": VARIANTS[name].expected,
                "fails": [check for check, passed in own_checks(runs[name]).items() if not passed],
                "figures": {
                    key: {
                        "value": means[name][key],
                        "spread": float(np.std([row[key] for row in own], ddof=1)) if len(own) > 1 else None,
                        "difference": means[name][key] - means[REFERENCE].get(key, float("nan")),
                        "n": len(own),
                    }
                    for key in own[0]
                },
            }
    return {"checks": done, "fakes": dict(fake), "ablations": ablations}


def own_checks(seeds: list[dict[str, Any]]) -> dict[str, bool]:
    """Which checks pass on every seed."""
    return {check: all(found[check]["pass"] for found in seeds) for check in seeds[0]}


def table(summary: Mapping[str, Any]) -> str:
    """phantom.md: what was found, in the order in which a reader asks."""
    head = "| check | value, mean over seeds | threshold | passes | what it is |"
    lines = ["# Phantom suite", "", head, "|" + " --- |" * 5]
    for check, one in summary["checks"].items():
        passed = "yes" if one["pass"] else "**no**"
        cells = [check, _text(one["value"]), _text(one["threshold"]), passed, acceptance.QUESTIONS[check]]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| planted fake | fails |", "| --- | --- |"]
    lines += [f"| {name} | {', '.join(failed) or 'none'} |" for name, failed in summary["fakes"].items()]
    if summary["ablations"]:
        keys = list(next(iter(summary["ablations"].values()))["figures"])
        lines += ["", "| ablation (theory) | fails | " + " | ".join(keys) + " |", "|" + " --- |" * (len(keys) + 2)]
        for name, one in summary["ablations"].items():
            cells = [_cell(one["figures"][key]) for key in keys]
            row = [f"{name} ({one['expected']})", ", ".join(one["fails"]) or "none", *cells]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _cell(figure: Mapping[str, Any]) -> str:
    spread = "" if figure["spread"] is None else f" ± {figure['spread']:.2g}"
    return f"{figure['value']:.3g}{spread} ({figure['difference']:+.2g}, n={figure['n']})"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(_text(one) for one in value)
    return "–" if value is None or np.isnan(value) else f"{value:.3g}"


def draw_blobs(path: Path, name: str, seen: Observation, found: acceptance.Blobs) -> None:
    """One-step belief in every blob, and the share of hypotheses that show it, against the analytic posterior."""
    share = np.mean(acceptance.shown(seen.hypotheses, found) >= 0.5, axis=1)
    panels = {
        "one-step belief": acceptance.presence(seen.one_step, found).ravel(),
        f"share of {seen.hypotheses.shape[1]} hypotheses": share.ravel(),
    }
    kinds = {kind: (found.kind == i).ravel() for i, kind in enumerate(acceptance.KINDS)}
    curves.save(curves.blob_figure(found.posterior.ravel(), panels, kinds, f"{name}: blobs of the test phantoms"), path)


def run(config: Any, output: Path, variants: list[str], seeds: int, test_cases: int) -> dict[str, Any]:
    """Trains and checks every variant on every seed; runs that are finished in `output`/runs are not repeated."""
    spec = dataset.phantom_spec(config.data)
    numbers = range(FIRST, FIRST + test_cases)
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in variants:
        for seed in range(seeds):
            workdir = output / "runs" / f"{name.split()[0]}_{seed}"
            path = workdir / "checks.json"
            own = variant_config(config, VARIANTS[name], f"phantom_{name.split()[0]}", seed)
            if not path.exists():
                model = trained(own, VARIANTS[name], workdir)
                scenes, volumes = phantom.scenes(spec, numbers, seed), phantom.volumes(spec, numbers, seed)
                seen = observe(model, volumes, HYPOTHESES)
                alone = observe(model, [without(volume, 1) for volume in volumes], HYPOTHESES)
                draw_blobs(workdir / "blobs.png", name, seen, acceptance.blobs(scenes, spec))
                logs.write_json(path, checks(seen, alone, scenes, spec))
            runs.setdefault(name, []).append(json.loads(path.read_text()))
            failed = [check for check, passed in own_checks(runs[name][-1:]).items() if not passed]
            print(f"{name}, seed {seed}: fails {', '.join(failed) or 'nothing'}", flush=True)
    summary = summarise(runs, fakes(phantom.scenes(spec, numbers, 0), spec, HYPOTHESES))
    logs.write_json(output / "summary.json", summary)
    logs.write_bytes(output / "phantom.md", table(summary).encode())
    return summary
