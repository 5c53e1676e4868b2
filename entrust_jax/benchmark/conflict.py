"""The conflict suite: does uncertainty follow conflict that was injected into exactly one modality?

A: the scan with a lesion erased from, or transplanted into, one modality (`data.injection`); A': the same change in all
modalities, in the same place, hence of the same size, as far from every boundary, and without conflict. Besides: the
scan untouched, weaker doses, and a texture of equal energy in the one modality. A phantom is drawn again instead, with
the opposite of what a reader showed; there Bayes says what follows. All is judged inside the injected region, the
patient is the unit. Definitions: ours.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import stats

from entrust_jax import api
from entrust_jax.baselines.unet import UNet
from entrust_jax.benchmark import acceptance
from entrust_jax.benchmark.conflict_figures import AIMS, HEADLINE, Result, flat_rows, summarise, table
from entrust_jax.data import dataset, injection, phantom, phantom_law, phantom_scene, resampling
from entrust_jax.data.injection import Injection
from entrust_jax.data.preprocess import Volume, without
from entrust_jax.errors import UserError
from entrust_jax.metrics import conflict, usefulness
from entrust_jax.report import curves
from entrust_jax.runtime import logs
from entrust_jax.trustmap import pixels, probing
from entrust_jax.trustmap import statistics as spread

DOSES = (0.25, 0.5, 0.75, 1.0)
POWERS = (0.8, 1.25)  # of the contrasts of test-time augmentation, each mirrored and not
NEIGHBOURHOOD = 5  # voxels round a region within which uncertainty is correlated with conflict
MEASURES = {
    "disagreement": "mean pairwise disagreement of the samples",
    "divergence": "mutual information between voxel and sample",
    "entropy": "entropy of the mean prediction",
    "one-step entropy": "entropy of the one-step prediction p_1, which no sampling blurs",
    "conflict": "kappa",
}
SHOWN = 4  # cases in the picture


class Said(NamedTuple):
    """What a method says of one scan: uncertainty by measure, and the reasons where it gives any."""

    maps: dict[str, Float[np.ndarray, "d h w"]]
    label: Integer[np.ndarray, "d h w"]
    hypotheses: Integer[np.ndarray, "n d h w"] | None = None
    phi: Float[np.ndarray, "m d h w"] | None = None
    doubt: Float[np.ndarray, "d h w"] | None = None  # mean entropy of the unimodal posteriors


class Observer(NamedTuple):
    """A method: what it says of a scan, asked for its reasons or not. thorough: also at lower doses and of textures."""

    ask: Callable[[Volume, bool], Said]
    thorough: bool


class Subject(NamedTuple):
    """A scan that can be injected into. exact: what Bayes says of each injection, where that is known."""

    volume: Volume
    injections: list[Injection]
    exact: list[dict[str, Any]]


# --- what is asked ------------------------------------------------------------------------------------------


def said_of(raw: Mapping[str, Any]) -> Said:
    """The maps of an examined case that this suite reads."""
    unimodal = raw.get("unimodal")
    doubt = None
    if unimodal is not None:
        doubt = np.mean(np.asarray(spread.entropy(jnp.asarray(unimodal))), axis=0)
    maps = {name: np.asarray(raw[name], np.float32) for name in MEASURES if name in raw}
    if unimodal is not None:  # of EnTrust; the one step of a U-Net is its mean
        maps["one-step entropy"] = np.asarray(spread.entropy(jnp.asarray(raw["one_step"])))
    return Said(maps, raw["label"], raw.get("hypotheses"), raw.get("attribution"), doubt)


def ask(trained: api.Trained, volume: Volume, probed: bool) -> Said:
    """What a trained model says of a scan."""
    return said_of(api.examine(trained, volume, probed=probed))


def mirrored(volume: Volume) -> Volume:
    """The scan with left and right exchanged."""
    places = volume.coordinates[:, ::-1] * np.array([1, -1, 1], np.float32)
    return dataclasses.replace(
        volume, image=volume.image[:, :, ::-1].copy(), body=volume.body[:, ::-1].copy(), coordinates=places,
        label=None, raters=None,
    )  # fmt: skip


def contrasted(volume: Volume, power: float) -> Volume:
    """The scan in another contrast: each modality, over its range in the body, to a power; mean and deviation stay."""
    image = volume.image.copy()
    for m in np.flatnonzero(volume.present):
        z = image[m][volume.body].astype(np.float64)
        if z.size and np.ptp(z) > 0:
            changed = ((z - z.min()) / np.ptp(z)) ** power
            image[m][volume.body] = (changed - changed.mean()) / changed.std() * z.std() + z.mean()
    return dataclasses.replace(volume, image=image)


def ask_augmented(trained: api.Trained, volume: Volume, probed: bool) -> Said:
    """Test-time augmentation (Wang et al. 2019): the same network on the scan mirrored and in other contrasts."""
    del probed
    passes = []
    for power in POWERS:
        changed = contrasted(volume, power)
        passes.append(api.examine(trained, changed)["mean"])
        passes.append(api.examine(trained, mirrored(changed))["mean"][:, ::-1])
    members = np.stack(passes, axis=1)
    found = spread.statistics(jnp.asarray(members), jnp.asarray(members.mean(axis=1)))
    maps = {name: np.asarray(found[name]) for name in ("disagreement", "divergence", "entropy")}
    return Said(maps, np.argmax(members.mean(axis=1), axis=-1).astype(np.uint8))


def observers(methods: Mapping[str, api.Trained]) -> dict[str, Observer]:
    """The methods and, of each U-Net or ensemble without dropout, test-time augmentation."""
    found: dict[str, Observer] = {}
    for name, trained in methods.items():
        found[name] = Observer(functools.partial(ask, trained), True)
        if isinstance(trained.network, UNet) and not trained.network.dropout:
            found[f"{name}, augmented at test time"] = Observer(functools.partial(ask_augmented, trained), False)
    return found


# --- what is injected ---------------------------------------------------------------------------------------


def subjects(volumes: Sequence[Volume], spacing: Sequence[float], slices: int) -> Iterator[Subject]:
    """The slices of each labelled scan with the most lesion, and what can be injected there; on the working grid."""
    for volume in volumes:
        part, found = injection.prepared(resampling.at_spacing(volume, spacing), slices)
        yield Subject(part, found, [{} for _ in found])


def phantoms(spec: phantom.Spec, numbers: Sequence[int], seed: int) -> Iterator[Subject]:
    """Phantoms at whose sites all readers show the same, and are made to show the opposite; with the exact figures."""
    if spec.variant != "binary" or spec.depth != 1:
        raise UserError("data.phantom: the conflict suite takes phantoms of one slice with one kind of lesion")
    scenes = phantom_scene.scenes(spec, numbers, seed)
    found = acceptance.blobs(scenes, spec)
    volumes = phantom_scene.volumes(spec, numbers, seed)
    readers, sites = len(spec.modalities), spec.sites
    flips = {
        (m, j): phantom_scene.volumes(spec, numbers, seed, flip=(m, j)) for m in range(readers) for j in range(sites)
    }
    for n, volume in enumerate(volumes):
        said = found.evidence[n]
        agreed = [j for j in range(sites) if abs(int(said[:, j].sum())) == readers]
        injections = []
        for j in agreed:
            changed = np.stack([flips[m, j][n].image[m] for m in range(readers)])
            injections.append(Injection(f"site {j}", found.core[n, j][None], changed))
        yield Subject(volume, injections, [exact(said[:, j], j, spec) for j in agreed])


def exact(evidence: Integer[np.ndarray, " m"], site: int, spec: phantom.Spec) -> dict[str, Any]:
    """What Bayes says of a site at which each reader alone, and all of them, are turned round: disagreement of two

    draws, and the reader that argues most against the likeliest truth.
    """
    count = len(evidence)
    turned = np.concatenate([evidence[:, None] * (1 - 2 * np.eye(count, dtype=int)), -evidence[:, None]], axis=1)
    everyone = jnp.ones(count, bool)
    whole = np.zeros((count, count + 1, spec.sites), np.int32)
    whole[..., site] = turned
    p = np.asarray(phantom.posterior(jnp.asarray(whole), everyone, spec))[:, site].astype(np.float64)
    phi = phantom_law.contributions(whole, np.ones(count, bool), spec)[..., site]
    return {
        "posterior": p,
        "disagreement": 2 * p * (1 - p),
        "blamed": np.argmin(phi, axis=0)[:count],
    }


def best_auroc(one: Float[np.ndarray, " n"], all_: Float[np.ndarray, " k"], draws: int) -> float:
    """AUROC, places of A against places of A', of the disagreement of so many draws by an observer who knows P(lesion)

    at each: draws of a likely lesion often all agree, so that it is below 1.
    """
    count = np.arange(draws + 1)
    law = [stats.binom.pmf(count[:, None], draws, p).mean(axis=1) for p in (one, all_)]
    unlike = count * (draws - count)
    above = (unlike[:, None] > unlike[None]) + 0.5 * (unlike[:, None] == unlike[None])
    return float(law[0] @ above @ law[1])


# --- one subject --------------------------------------------------------------------------------------------


def within(said: Said, measure: str, region: Bool[np.ndarray, "d h w"]) -> float:
    """Mean of a measure over a region."""
    return float(said.maps[measure][region].mean(dtype=np.float64))


def separates(one: Said, all_: Said, measure: str, region: Bool[np.ndarray, "d h w"]) -> float:
    """AUROC of a measure: voxels of A against the same voxels of A'."""
    values = np.concatenate([one.maps[measure][region], all_.maps[measure][region]])
    return usefulness.auroc(values, np.arange(len(values)) < region.sum())


def examine(
    subject: Subject,
    methods: Mapping[str, Observer],
    first: str,
    faith: Callable[[Volume, Said], dict[str, float]],
) -> Result:
    """Everything that is asked of one subject; `first` is the method whose reasons are judged, and which `faith` asks

    for those of the untouched scan.
    """
    volume = subject.volume
    none = {name: method.ask(volume, True) for name, method in methods.items()}
    there = np.flatnonzero(volume.present).tolist()
    rows, pictures = [], []
    for change, exactly in zip(subject.injections, subject.exact, strict=True):
        everywhere = injection.altered(volume, change, volume.present)
        control = {name: method.ask(everywhere, False) for name, method in methods.items()}
        other = injection.unrelated(volume, change, volume.number)
        for m in there:
            only = np.arange(len(volume.present)) == m
            doses = [injection.altered(volume, change, only, dose) for dose in DOSES]
            texture = injection.altered(volume, other, only)
            row: dict[str, Any] = {"kind": change.kind, "modality": m, "voxels": int(change.region.sum())}
            row |= {"methods": {}, "maps": {}, "region": change.region, "body": volume.body}
            for name, method in methods.items():
                asked = [*zip(doses, DOSES, strict=True)][0 if method.thorough else -1 :]
                told = [method.ask(dosed, dose == 1) for dosed, dose in asked]
                besides = method.ask(texture, False) if method.thorough else None
                row["methods"][name] = measured(none[name], told, control[name], besides, change.region)
                row["maps"][name] = {key: (told[-1].maps[key], control[name].maps[key]) for key in told[-1].maps}
                if name == first:
                    row |= reasons(none[name], told[-1], control[name], change.region, volume, m)
                    if exactly:
                        p = exactly["posterior"]
                        draws = len(told[-1].hypotheses) if told[-1].hypotheses is not None else 1
                        row["exact"] = {
                            "auroc": best_auroc(p[m : m + 1], p[-1:], draws),
                            "one": float(exactly["disagreement"][m]),
                            "all": float(exactly["disagreement"][-1]),
                            "blamed": bool(exactly["blamed"][m] == m),
                        }
                    pictures.append(picture(doses[-1], told[-1], change, m))
            rows.append(row)
    return Result(volume.patient, rows, faith(volume, none[first]), pictures)


def measured(
    none: Said, told: Sequence[Said], all_: Said, other: Said | None, region: Bool[np.ndarray, "d h w"]
) -> dict[str, dict[str, Any]]:
    """By measure: its mean in A (at each dose), in A', untouched and with the texture; AUROC; Kendall's tau; None where

    nothing was asked.
    """
    found = {}
    for key in none.maps:
        line = [within(none, key, region), *(within(one, key, region) for one in told)]
        found[key] = {
            "auroc": separates(told[-1], all_, key, region),
            "one": line[-1],
            "all": within(all_, key, region),
            "none": line[0],
            "unrelated": within(other, key, region) if other else None,
            "auroc_unrelated": separates(told[-1], other, key, region) if other else None,
            "line": line,
            "tau": conflict.kendall((0.0, *DOSES), line) if len(told) == len(DOSES) else None,
        }
    return found


def reasons(
    none: Said, one: Said, all_: Said, region: Bool[np.ndarray, "d h w"], volume: Volume, m: int
) -> dict[str, Any]:
    """Blame, what became of the label and of the hypotheses, and how uncertainty goes with kappa near the region."""
    found: dict[str, Any] = {}
    if one.phi is not None:
        phi = np.where(volume.present, one.phi[:, region].mean(axis=1), np.inf)
        found["blamed"] = bool(np.argmin(phi) == m)
        found["chance"] = 1 / int(volume.present.sum())
    changed = (np.mean((x.label != none.label)[region]) >= 0.5 for x in (one, all_))
    found["moved"], found["moved_by_all"] = (bool(value) for value in changed)
    if none.hypotheses is not None and one.hypotheses is not None:
        differ = (none.hypotheses > 0) != (one.hypotheses > 0)
        found["hypotheses_moved"] = float(np.mean(differ[:, region].mean(axis=1) >= 0.5))
    if one.doubt is not None and "conflict" in one.maps:
        near = injection.grown(region, NEIGHBOURHOOD) & volume.body
        distance = np.abs(pixels.signed_distance(one.label))[near]
        u, kappa = one.maps[HEADLINE][near], one.maps["conflict"][near]
        found["spearman"] = conflict.partial_spearman(u, kappa, [])
        found["partial_spearman"] = conflict.partial_spearman(u, kappa, [distance, one.doubt[near]])
    return found


def picture(volume: Volume, said: Said, change: Injection, m: int) -> dict[str, Any]:
    """The slice of one injection that holds most of its region, for the figure."""
    d = int(np.argmax(change.region.sum(axis=(1, 2))))
    found = {"kind": change.kind, "modality": m, "image": volume.image[:, d], "region": change.region[d]}
    found |= {"conflict": said.maps.get("conflict", 0 * said.maps[HEADLINE])[d], HEADLINE: said.maps[HEADLINE][d]}
    if said.phi is not None:
        blamed = probing.blame(jnp.asarray(said.phi[None, :, d]), jnp.asarray(volume.present[None]))[0]
        strong = np.max(np.abs(said.phi[:, d]), axis=0) > 0.1  # nats: where the modalities matter at all
        found["blame"] = np.where(strong, np.asarray(blamed), -1)
    return found


# --- faithfulness of the reasons on the untouched scan ------------------------------------------------------


def shuffled(params: Any, seed: int) -> Any:
    """Parameters whose values are exchanged within every array: the same scales, and nothing learnt."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.permuted(np.asarray(x).ravel()).reshape(x.shape)) for x in leaves])


def faithfulness(trained: api.Trained, volume: Volume, said: Said) -> dict[str, float]:
    """Deletion: share of the region's label that changes without the modality that speaks most for it, and without

    another one (mean over those); and the rank correlation of phi with that of a network of shuffled parameters. NaN
    where nothing is found, or fewer than two modalities are there.
    """
    there = np.flatnonzero(volume.present).tolist()
    region = said.label > 0
    if said.phi is None or len(there) < 2 or not region.any():
        return {"deleted_top": math.nan, "deleted_other": math.nan, "randomised": math.nan}
    phi = said.phi[:, region].mean(axis=1)
    top = max(there, key=lambda m: phi[m])
    lost = {m: float(np.mean((ask(trained, without(volume, m), False).label != said.label)[region])) for m in there}
    fool = ask(dataclasses.replace(trained, params=shuffled(trained.params, trained.config.seed)), volume, True)
    near = injection.grown(region, NEIGHBOURHOOD) & volume.body
    assert fool.phi is not None
    alike = conflict.partial_spearman(said.phi[there][:, near].ravel(), fool.phi[there][:, near].ravel(), [])
    return {
        "deleted_top": lost[top],
        "deleted_other": float(np.mean([lost[m] for m in there if m != top])),
        "randomised": alike,
    }


# --- output -------------------------------------------------------------------------------------------------


def check(methods: Mapping[str, api.Trained]) -> None:
    """Raises UserError unless the first method is an EnTrust and the others read scans as it does."""
    first, *others = methods
    if isinstance(methods[first].network, UNet):
        raise UserError(f"--workdir: {first} is no EnTrust; name an EnTrust first, then the methods beside it")
    for name in others:
        for key in ("modalities", "classes", "layout", "reference"):
            if methods[name].config.data[key] != methods[first].config.data[key]:
                raise UserError(f"--workdir: {name} and {first} differ in config.data.{key}; compare models of one set")
        if tuple(methods[name].spacing) != tuple(methods[first].spacing):
            raise UserError(f"--workdir: {name} and {first} work at different spacings; train them with one")


def run(
    methods: Mapping[str, api.Trained], found: Iterator[Subject], folder: Path, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Injects, asks, and writes conflict.json, conflict.md and conflict.png into `folder`."""
    first = next(iter(methods))
    calls = observers(methods)
    results: list[Result] = []
    left_out: list[str] = []
    for subject in found:
        if not subject.injections:
            left_out.append(subject.volume.name)
            print(f"{subject.volume.name}: nothing here that could be changed, left out", flush=True)
            continue
        results.append(examine(subject, calls, first, functools.partial(faithfulness, methods[first])))
        values = [row["methods"][first][HEADLINE]["auroc"] for row in results[-1].rows]
        print(f"{subject.volume.name}: {len(values)} injections, AUROC {np.nanmean(values):.3f}", flush=True)
    if not results:
        raise UserError("no case has a lesion that can be injected; give a test split with lesions, or --split=all")
    return write(results, tuple(methods[first].config.data.modalities), folder, {**about, "left_out": left_out})


def write(
    results: Sequence[Result], modalities: Sequence[str], folder: Path, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The files of `run` from what was found in its subjects; the first method is the one that is judged."""
    names = {name: list(keys) for name, keys in results[0].rows[0]["methods"].items()}
    first = next(iter(names))
    summary = {**about, **summarise(results, names, modalities)}
    logs.write_json(folder / "conflict.json", summary | {"rows": flat_rows(results, modalities)})
    logs.write_bytes(folder / "conflict.md", table(summary).encode())
    curves.save(draw(results, summary, first, modalities), folder / "conflict.png")
    return summary


def draw(results: Sequence[Result], summary: Mapping[str, Any], first: str, modalities: Sequence[str]) -> Any:
    """The picture: the first patients, the altered modality going round; dose-response; AUROC of every measure."""
    shown = []
    for i, result in enumerate(results[:SHOWN]):
        turn = [p for p in result.pictures if p["modality"] == i % len(modalities)] or result.pictures
        shown.append(turn[(i // 2) % len(turn)])
    lines = {}
    for m, name in enumerate(modalities):
        own = [row["methods"][first][HEADLINE] for result in results for row in result.rows if row["modality"] == m]
        if own:
            lines[name] = np.array([[*one["line"], one["all"], one["unrelated"]] for one in own])
    bars = {name: one["auroc"] for name, one in summary["measures"].items()}
    return curves.injection_figure(shown, modalities, (0.0, *DOSES), lines, bars, AIMS["auroc"], first)


def selected(volumes: Sequence[Volume], count: int) -> list[Volume]:
    """All cases, or so many evenly spaced ones."""
    if not count or count >= len(volumes):
        return list(volumes)
    return [volumes[i] for i in np.round(np.linspace(0, len(volumes) - 1, count)).astype(int)]


def subjects_of(trained: api.Trained, volumes: Sequence[Volume], slices: int) -> Iterator[Subject]:
    """The subjects of a trained model's cases, scans or phantoms."""
    if trained.config.data.layout != "phantom":
        return subjects(volumes, trained.spacing, slices)
    spec = dataset.phantom_spec(trained.config.data)
    return phantoms(spec, [volume.number for volume in volumes], trained.config.seed)
