"""What the calibrators are fitted on: slices of the calibration patients, as the frozen network sees them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from entrust_jax import networks
from entrust_jax.data import preprocess
from entrust_jax.data.preprocess import Volume
from entrust_jax.runtime import logs
from entrust_jax.trustmap import calibration, pixels
from entrust_jax.trustmap.prediction import Raw


def calibration_set(
    config: Any, network: Any, params: Any, tau: float, volumes: list[Volume], devices: Any
) -> calibration.CalibrationSet:
    """What the frozen network says of the calibration patients, with what is true."""
    slices = []
    patients = sorted({volume.patient for volume in volumes})
    with logs.progress("calibration", len(volumes)) as show:
        for i, volume in enumerate(volumes):
            raw = networks.examine_with(config, network, params, devices, tau, volume, config.train.calibration_slices)
            slices.append(calibration_slices(raw, volume, patients.index(volume.patient), config.seed))
            show(i + 1)
    return join(slices)


def calibration_slices(raw: Raw, volume: Volume, patient: int, seed: int) -> calibration.CalibrationSet:
    """The examined slices of one case, with importance-sampled pixels; for R raters R times, at 1 / R of the weight."""
    kept = raw["kept"]
    body, labels = volume.body[kept], preprocess.labels_of(volume)
    delivered = raw["label"]
    inputs, _ = pixels.features(raw, volume.present)
    rng = np.random.default_rng([seed, volume.number])
    weight = pixels.importance_weights(raw["entropy"], raw["border"], body, rng)
    first = calibration.CalibrationSet(
        features=inputs,
        one_step=pixels.log_probability(raw["one_step"]),
        mean=pixels.log_probability(raw["mean"]),
        label=labels[0][kept],
        delivered=delivered.astype(np.int32),
        weight=weight * raw["slice_weight"][:, None, None] / len(labels),
        patient=np.full(len(kept), patient),
    )
    return join([dataclasses.replace(first, label=label[kept]) for label in labels]) if len(labels) > 1 else first


def join(parts: Sequence[calibration.CalibrationSet]) -> calibration.CalibrationSet:
    """One set of the slices of many cases, padded to the largest in-plane size with voxels of weight 0 and label -1."""
    size = np.max([part.label.shape[1:] for part in parts], axis=0)

    def padded(part: calibration.CalibrationSet, name: str) -> np.ndarray:
        value = getattr(part, name)
        if value.ndim == 1:
            return value
        more = [(0, 0), *((0, int(n - m)) for n, m in zip(size, value.shape[1:3], strict=True))]
        more += [(0, 0)] * (value.ndim - 3)
        return np.pad(value, more, constant_values=-1 if name == "label" else 0)

    names = [f.name for f in dataclasses.fields(calibration.CalibrationSet)]
    return calibration.CalibrationSet(*(np.concatenate([padded(part, name) for part in parts]) for name in names))
