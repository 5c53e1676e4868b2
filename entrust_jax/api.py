"""What the entry points and a notebook call: `load(workdir)`, then `predict_volume(trained, volume)`."""

import dataclasses
import json
import math
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from entrust_jax import features, footprint, inference, model, windows
from entrust_jax.baselines import unet
from entrust_jax.data import dataset, preprocess, resampling, splits
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.networks import examine_with, extent, init_params, network_of, volumetric
from entrust_jax.runtime import checkpoint, mesh
from entrust_jax.trustmap import conformal, explanation, ood, prediction

SPACING = "spacing.json"  # the planned working spacing, in the working folder
CONFORMAL = "conformal.json"  # the guarantees
UNUSUAL = "ood.json", "ood.npz"  # how far reference patients lie from those of training; what is usual there
SECTIONS = ("name", "method", "seed", "data", "model", "diffusion", "train", "unet")
# Keys that older working folders lack, with the values that they were trained with.
ADDED = {
    "data": {
        "patient_pattern": "",
        "intensity": {},
        "spacing": [],
        "drop_copies": False,
        "names": {},
        "window": [],
        "augmentation": {"affine": 0.0, "shift": 0.0, "gamma": 0.0, "bias": 0.0, "ghosting": 0.0, "noise": 0.0},
    },
    "model": {"strides": [], "compute": "float32", "remat": False},
    "trust": {"fnr": 0.1, "fdr": 0.1, "coverage": 0.9},
    "unet": {"dropout": 0.0, "passes": 16},
}
# Raised where trained parameters no longer mean what they did. 2: the denoiser sees and hears the noisy mask at every
# scale (`seen_at`, `Denoiser.evidence`).
FORMATS = {"entrust": 2, "unet": 1, "deep_ensemble": 1}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A working folder, loaded.

    Attributes:
      workdir, config, splits: as trained. name: the folder's name.
      network: EnTrust or UNet. params: its EMA parameters (stacked by member for a U-Net).
      spacing: millimetres along D, H, W that the network sees; 0, or (), where an axis stays as scanned.
      tau: the Dice threshold of stage 3, for methods without hypotheses.
      rung, calibration: the chosen calibrator and its parameters. meta: what stage 4 wrote of its choice.
      conformal: what stage 5 found (`conformal.fit`); None where the folder is older than that stage.
      usual: what stage 6 found (`ood.fit`); None where the folder is older than that stage, or the method is another.
    """

    workdir: Path
    name: str
    config: Any
    splits: dict[str, list[str]]
    spacing: tuple[float, ...]
    network: model.EnTrust | unet.UNet
    params: Any
    mesh: Mesh
    tau: float
    rung: str
    calibration: dict[str, np.ndarray]
    conformal: dict[str, Any] | None = None
    usual: tuple[dict[str, ood.Usual], dict[str, Any]] | None = None


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """A config as it was written down, with the keys that were added since."""
    return values | {section: added | values.get(section, {}) for section, added in ADDED.items()}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A config's values by dotted names, {"data.split.fold": 0}."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {k: v for name, value in tree.items() for k, v in flat(value, f"{prefix}{name}.").items()}


def read_config(workdir: Path) -> ConfigDict:
    """The config that a working folder was trained with. Raises UserError when there is none, or no whole one."""
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text())
        lacking = [name for name in SECTIONS if name not in values] if isinstance(values, dict) else ["an object"]
        if lacking:
            raise ValueError(f"it lacks {lacking[0]}")
        return ConfigDict(completed(values))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; train first: python -m entrust_jax.train --config=configs/X.py --workdir={workdir}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); restore it or train into a new working folder") from None


def check_format(workdir: Path, method: str) -> None:
    """Raises UserError for a folder whose network this version would read wrongly, or does not know."""
    if method not in FORMATS:
        raise UserError(f"{workdir / 'config.json'}: has method {method!r}, this version knows {', '.join(FORMATS)}")
    path, wanted = workdir / "version.json", FORMATS[method]
    try:
        version = json.loads(path.read_text()) if path.exists() else {}
        found, commit = int(version.get("format", 1)), version.get("commit", "unknown")
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); restore it or train into a new working folder") from None
    if found != wanted:
        which = "an earlier" if found < wanted else "a later"
        raise UserError(
            f"{workdir}: was trained by {which} version of entrust_jax, whose networks have format {found} (commit "
            f"{commit}); this one reads {wanted}: train again into a new working folder, or use that version"
        )


def load(workdir: Path | str) -> Trained:
    """Loads a finished working folder: EMA parameters of `best`, threshold and calibrator.

    Raises:
      UserError: no such folder, training not finished, a damaged or foreign checkpoint, a folder of another version.
    """
    workdir = Path(workdir)
    config: Any = read_config(workdir)
    check_format(workdir, config.method)
    meta_path, values = workdir / "calibration.json", workdir / "calibration.npz"
    if not (meta_path.exists() and values.exists()):
        raise UserError(
            f"{workdir}: training has not finished (no calibration.json); run the same train command again, it goes on"
        )
    try:
        meta = json.loads(meta_path.read_text())
        tau, rung = float(meta["tau"]), str(meta["chosen"])
        changed = changed_thresholds(dict(meta.get("thresholds", {})))
        with np.load(values) as file:
            params = {name: file[name] for name in file.files}
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{values} or .json beside it: is damaged ({type(error).__name__}: {error}); "
            "remove both and run train again, it goes on"
        ) from None
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    manager = checkpoint.open_manager(workdir / "checkpoints" / "best", read_only=True)
    restored = checkpoint.restore_best(manager, abstract)
    manager.close()
    if restored is None:
        raise UserError(
            f"{workdir}/checkpoints/best: holds no checkpoint; run the same train command again, it goes on"
        )
    if changed:
        print(f"{workdir}: thresholds of doubt have changed since its training: {changed}; report.json has today's")
    m = mesh.data_mesh()
    return Trained(
        workdir=workdir,
        name=workdir.resolve().name,
        config=config,
        splits=splits.load(workdir / "splits.json"),
        spacing=dataset.working_spacing(config.data, workdir / SPACING),
        network=network_of(config),
        params=jax.device_put(restored[0], mesh.replicated(m)),
        mesh=m,
        tau=tau,
        rung=rung,
        calibration=params,
        conformal=read_conformal(workdir / CONFORMAL, tuple(config.data.regions)),
        usual=read_usual(workdir, len(config.data.modalities)),
    )


def changed_thresholds(fixed: dict[str, float]) -> str:
    """Which thresholds of causes and reviews a training fixed otherwise than this version has them; "" where none."""
    own = explanation.THRESHOLDS
    return ", ".join(f"{name} {value:g} (now {own.get(name, 'none')})" for name, value in fixed.items()
                     if own.get(name) != value)  # fmt: skip


def with_hypotheses(trained: Trained, count: int) -> Trained:
    """The same model, which draws so many hypotheses of a case; a U-Net with dropout takes so many passes."""
    config = trained.config.copy_and_resolve_references()
    config.diffusion.hypotheses = config.unet.passes = count
    return dataclasses.replace(trained, config=config, network=network_of(config))


def read_conformal(path: Path, regions: tuple[str, ...]) -> dict[str, Any] | None:
    """The guarantees of a working folder; None where it has none. Raises UserError where they are damaged."""
    try:
        found = json.loads(path.read_text())
        conformal.statements(found)
        if any(set(found[kind]) != set(regions) for kind in ("outer", "inner", "volume")):
            raise ValueError("it is for other regions")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is damaged ({type(error).__name__}: {error}); remove it and run the same train command again"
        ) from None


def read_usual(workdir: Path, modalities: int) -> tuple[dict[str, ood.Usual], dict[str, Any]] | None:
    """What is usual in training's scans; None where the folder does not say. Raises UserError where that is damaged."""
    record, arrays = (workdir / name for name in UNUSUAL)
    try:
        found = json.loads(record.read_text())
        if found["note"]:
            return {}, found
        if not float(found["farthest"]) > -math.inf or int(found["patients"]) < 1:
            raise ValueError("it has no reference patients")
        with np.load(arrays) as file:
            return ood.laws_of({name: file[name] for name in file.files}, modalities), found
    except FileNotFoundError:
        if not record.exists():
            return None
        wrong = "is missing"
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        wrong = f"or .json beside it: is damaged ({type(error).__name__}: {error})"
    raise UserError(f"{arrays} {wrong}; remove {record.name} and run the same train command again")


def read_cases(trained: Trained, data_dir: str | None = None, split: str = "test") -> tuple[list[Volume], list[str]]:
    """The labelled cases of a split ("all": every case in the folder) on their own grids, and a line per problem.

    Raises UserError when the data folder lacks them.
    """
    data = trained.config.data.copy_and_resolve_references()
    if data_dir and data.layout == "phantom":
        raise UserError(
            f"--data_dir={data_dir}: {trained.workdir} was trained on the built-in phantom, which has no folder; "
            "leave --data_dir out"
        )
    if data_dir:
        data.dir = data_dir
    if split != "all":
        names = trained.splits[split]
    elif data.layout == "phantom":
        names = [name for part in splits.PARTS for name in trained.splits[part]]
    else:
        names = [found.name for found in dataset.find(data)]
    return dataset.read(data, names, trained.config.seed)


def examine(trained: Trained, volume: Volume, slices: int | None = None, probed: bool = True) -> prediction.Raw:
    """What the network says of a case before calibration; see `inference.examine`."""
    return examine_with(
        trained.config, trained.network, trained.params, trained.mesh, trained.tau, volume, slices, probed
    )


def describe_volume(trained: Trained, volume: Volume) -> dict[str, np.ndarray]:
    """The features by which a case, on its scan's own grid, is compared with training's; see `features.describe`."""
    assert isinstance(trained.network, model.EnTrust), "other methods do not see each modality by itself"
    rooms, own = windows if volumetric(trained.config) else inference, resampling.at_spacing(volume, trained.spacing)
    batches = rooms.pieces(own, mesh=trained.mesh, **extent(trained.config))
    return features.describe(trained.params, own, batches, model=trained.network, mesh=trained.mesh)


def compare_volume(trained: Trained, volume: Volume) -> dict[str, Any] | None:
    """Whether each scan of a case looks like those of training: what `ood.compare` returns; None for other methods than

    EnTrust. Seconds, for nothing is drawn: a person should know before the prediction.
    """
    if trained.config.method != "entrust":
        return None
    laws, found = trained.usual or ({}, ood.NOTHING)
    described = describe_volume(trained, volume) if laws else {}
    return ood.compare(laws, found, described, tuple(trained.config.data.modalities))


def predict_volume(trained: Trained, volume: Volume, probed: bool = True) -> dict[str, Any]:
    """Segmentation, calibrated uncertainty, reasons and guarantees of one case: the maps and records of

    `prediction.finish`, and under "conformal" what `conformal.apply` returns. The predicted Dice is corrected by the
    calibration patients where that helps (`conformal.dice_map`); the trust score keeps the one before, whose order is
    the same without the ties that such a map makes.

    The volume is on its scan's own grid, and so are the maps, whatever the network's working spacing. Without `probed`
    nothing is asked for the reasons, which saves almost half of the time; a learned head needs them.
    """
    found = _predicted(trained, volume, probed)
    promised = conformal.apply(
        trained.conformal,
        found["probability_raw"],
        _regions(trained),
        predicted_dice=found["predicted_dice"],
        volumes=found["regions"],
    )
    hypotheses = trained.config.diffusion.hypotheses
    reasons = conformal.unlike_calibration(trained.conformal, modalities_of(trained, volume), hypotheses)
    found["conformal"] = conformal.doubted(promised, reasons)
    value = conformal.corrected_dice(trained.conformal, found["predicted_dice"], found["conformal"]["dice"])
    found["predicted_dice"] = found["trust"]["predicted_dice"] = value
    return found


def modalities_of(trained: Trained, volume: Volume) -> list[str]:
    """The names of those that a case has."""
    names = trained.config.data.modalities
    return [name for name, here in zip(names, volume.present, strict=True) if here]


def memory_in_words(trained: Trained, volume: Volume) -> str | None:
    """About how much memory a case will take, for people; None for slices, which take little, and for U-Nets."""
    network = trained.network
    if not volumetric(trained.config) or isinstance(network, unet.UNet):
        return None
    config = trained.config
    return footprint.in_words(
        footprint.estimate(
            trained.params, resampling.at_spacing(volume, trained.spacing), scan=volume,
            model=network, sampler=inference.sampler_of(config), mesh=trained.mesh,
            hypotheses=config.diffusion.hypotheses, **extent(config),
        )
    )  # fmt: skip


def observe_volume(trained: Trained, volume: Volume) -> conformal.Case:
    """How far the prediction of a labelled case is off, made in the way and on the grid of `predict_volume`."""
    found = _predicted(trained, volume, probed=False)
    return conformal.observe(
        volume.patient,
        found["probability_raw"],
        found["label"],
        preprocess.labels_of(volume),
        _regions(trained),
        predicted_dice=found["predicted_dice"],
        volumes=found["regions"],
        voxel_ml=float(np.prod(volume.spacing)) / 1000,
    )


def _regions(trained: Trained) -> dict[str, tuple[int, ...]]:
    return {name: tuple(classes) for name, classes in trained.config.data.regions.items()}


def _predicted(trained: Trained, volume: Volume, probed: bool = True) -> dict[str, Any]:
    started = time.perf_counter()
    data = trained.config.data
    working = resampling.at_spacing(volume, trained.spacing)
    return prediction.finish(
        examine(trained, working, probed=probed),
        working,
        scan=volume,
        chosen=trained.rung,
        params=trained.calibration,
        modalities=tuple(data.modalities),
        classes=tuple(data.classes),
        regions=_regions(trained),
        volumetric=volumetric(trained.config),
        started=started,
    )
