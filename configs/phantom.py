"""The planted-conflict phantom: two readers of reliability .95 and .7, exact posterior known.

    python -m entrust_jax.train --config=configs/phantom.py

Time and score: not run here yet.

Where the readers contradict each other Bayes gives .89 to the reliable one; averaging gives .63, "conflict is maximal
entropy" .5.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common
from entrust_jax.errors import UserError


def get_config(arg: str = "") -> Any:
    if arg:
        raise UserError(f"phantom has no variant {arg!r}; leave it out")
    config = common.get_config()
    config.name = "phantom"
    config.data.update(
        layout="phantom",
        modalities=("A", "B"),
        reference="A",
        classes=("background", "lesion"),
        label_map=((0, 0), (1, 1)),
        patch=(48, 48),
        augment=False,
    )
    config.data.regions = ConfigDict({"lesion": (1,)})
    config.data.phantom = ConfigDict(
        {
            "cases": (4096, 128, 64, 128),
            "size": (48, 48),
            "depth": 1,
            "sites": 3,
            "prior": 0.5,
            "reliability": (0.95, 0.7),
            "ignorance": (0.1, 0.1),
            "radius": 4.5,
            "jitter": 1.0,
            "variant": "binary",
        }
    )
    config.model.update(widths=(16, 32, 32), space_to_depth=1)
    config.unet.widths = (16, 32, 32)
    config.diffusion.update(b=0.21, lambda_max=6.0)
    config.train.update(batch=32, enfuse_steps=400, segdiff_steps=1500, unet_steps=1900, draws=1, val_slices=128)
    return config.lock()
