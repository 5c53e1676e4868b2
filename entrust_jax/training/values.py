"""Which values a config may have, looked at before anything else is done."""

from typing import Any

import numpy as np

from entrust_jax import inference
from entrust_jax.data import augment, intensity, layouts, preprocess, resampling
from entrust_jax.errors import UserError
from entrust_jax.report import output


def check_values(config: Any) -> None:
    """Values that make no sense, also those that are needed only after hours of training."""
    data, counts = config.data, {
        "train": ("batch", "draws", "log_every", "eval_every", "val_slices", "calibration_slices", "head_steps"),
        "model": ("d_c", "d_u", "space_to_depth"),
        "unet": ("members", "passes"),
        "diffusion": ("hypotheses",),
    }  # fmt: skip
    for section, names in counts.items():
        for name in names:
            if config[section][name] < 1:
                raise UserError(f"config.{section}.{name} is {config[section][name]}; give at least 1")
    for name, value in config.trust.items():
        if not 0 < value < 1:
            raise UserError(f"config.trust.{name} is {value}; give a share between 0 and 1, both left out")
    if not 0 <= config.unet.dropout < 1:
        raise UserError(f"config.unet.dropout is {config.unet.dropout}; give a share of at least 0 and below 1")
    for section in ("model", "unet"):
        if not config[section].widths or min(config[section].widths) < 1:
            raise UserError(f"config.{section}.widths is {tuple(config[section].widths)}; give one width a scale")
    if not isinstance(data.patch, tuple | list) or len(data.patch) not in (2, 3) or min(data.patch) < 1:
        raise UserError(
            f"config.data.patch is {data.patch}; give the height and width of the training patches, or depth, height "
            "and width to train on volumes"
        )
    if data.window and (len(data.patch) != 3 or len(data.window) != 3 or np.any(np.less(data.window, data.patch))):
        raise UserError(
            f"config.data.window is {tuple(data.window)}; give the depth, height and width of a window, none less than "
            f"of the patch {tuple(data.patch)}, or () for windows of that size; slices have none"
        )
    layouts.known_names(tuple(data.modalities), data.names.to_dict())
    output.label_values(data.label_map, len(data.classes))
    for value, index in data.label_map:
        if not preprocess.IGNORED <= index < len(data.classes):
            raise UserError(
                f"config.data.label_map gives value {value} the class index {index}; config.data.classes has "
                f"{len(data.classes)}, so give 0 to {len(data.classes) - 1}, or -1 for voxels that do not count"
            )
    for name, members in data.regions.items():
        if not members or not all(0 <= index < len(data.classes) for index in members):
            raise UserError(
                f"config.data.regions.{name} is {tuple(members)}; give class indices from 0 to {len(data.classes) - 1}"
            )
    intensity.rules_of(data.intensity.to_dict(), tuple(data.modalities))
    augment.settings_of(data)
    resampling.asked_spacing(data.spacing)
    inference.sampler_of(config)
