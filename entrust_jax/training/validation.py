"""What validation says of a stage: figures of fixed patches, at fixed levels of noise, by which `best` is chosen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from entrust_jax import model as entrust
from entrust_jax.baselines import unet
from entrust_jax.data import pipeline
from entrust_jax.data.preprocess import Volume
from entrust_jax.runtime import mesh
from entrust_jax.segdiff.objective import bin_levels
from entrust_jax.training.stages import Batch, Stage

KAPPA_ALARM = 0.5  # mean conflict on training cases, relative to validation, below which overfitting has eaten it


def validation_batches(config: Any, volumes: list[Volume], devices: Any) -> list[Batch]:
    """A fixed set of validation patches, drawn and weighted as in training but not augmented."""
    size = mesh.round_to_devices(config.train.batch, devices)
    data = pipeline.training_dataset(
        volumes, batch=size, patch=tuple(config.data.patch), seed=config.seed + 1,
        foreground_share=config.data.foreground_share, augment=False,
    )  # fmt: skip
    count = max(1, -(-config.train.val_slices // size))
    return [mesh.shard_batch(pipeline.batch_at(data, i), devices) for i in range(count)]


def levels_of(config: Any, stage: Stage) -> Float[np.ndarray, " levels"]:
    """The levels of log SNR at which EnTrust is validated: the first alone while the denoiser is not trained yet."""
    levels = bin_levels(config.diffusion.lambda_min, config.diffusion.lambda_max)
    return levels[:1] if stage.name == "enfuse" else levels


def validate_batch(config: Any, network: Any, stage: Stage, params: Any, batch: Batch) -> Any:
    """What `validate` averages, of one batch: cross-entropy by level, of the modality heads, and kappa; of U-Nets, by

    member, the cross-entropy.
    """
    if stage.name == "unet":
        return unet.over_members(lambda p: unet.validate(network, p, batch))(params)
    levels = jnp.asarray(levels_of(config, stage))
    return entrust.validate(network, params, batch, levels, jax.random.key(config.seed))


def validate(stage: Stage, call: Callable[..., Any], ema: Any, batches: list[Batch]) -> dict[str, float]:
    """Validation figures of EMA parameters. `val/score` is what `best` goes by: CE of the unimodal heads in stage 1,

    of the denoiser at lambda_min in stage 2a, of the (mean) member for U-Nets. call: `validate_batch`, compiled.
    """
    weight = np.concatenate([np.asarray(b["weight"] * b["valid"]) for b in batches])
    found = [jax.tree.map(np.asarray, call(ema, batch)) for batch in batches]

    def mean(parts):
        return float(np.sum(weight * np.concatenate(parts)) / np.sum(weight))

    if stage.name == "unet":
        score = mean([by_member.mean(axis=0) for by_member in found])
        return {"val/ce": score, "val/score": score}
    row = {"val/unimodal": mean([u for _, u, _ in found]), "val/kappa": mean([k for _, _, k in found])}
    if stage.name == "enfuse":
        return row | {"val/score": row["val/unimodal"]}
    levels = len(found[0][0])
    per_level = {f"val/ce_bin_{i}": mean([ce[i] for ce, _, _ in found]) for i in range(levels)}
    return row | per_level | {"val/score": per_level["val/ce_bin_0"]}


def warn_of_lost_conflict(rows: list[dict[str, Any]], stage: Stage, interval: int) -> None:
    """Says so when the unimodal heads have fitted the training cases so well that their conflict is gone there.

    `rows` are those of metrics.jsonl, the last of them validated; training's kappa is the mean over the last
    `interval` steps.
    """
    last = rows[-1]
    begin = max(stage.begin, last["step"] - interval)
    seen = [row["kappa"] for row in rows if row.get("step", 0) > begin and row.get("kappa") is not None]
    if seen and last.get("val/kappa") and np.mean(seen) < KAPPA_ALARM * last["val/kappa"]:
        print(
            f"warning: step {last['step']}: mean conflict is {np.mean(seen):.4f} on training cases and "
            f"{last['val/kappa']:.4f} on validation cases: the modality heads overfit; train fewer steps, or on more "
            "cases",
            flush=True,
        )
