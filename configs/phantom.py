"""The planted-conflict phantom: two readers of reliability .95 and .7, exact posterior known.

    python -m entrust_jax.train --config=configs/phantom.py
    python -m entrust_jax.train --config=configs/phantom.py:class_conflict   (readers disagree on the class of a lesion)
    python -m entrust_jax.train --config=configs/phantom.py:places           (each reader is the reliable one somewhere)
    python -m entrust_jax.train --config=configs/phantom.py:correlated       (two of three readers err together)
    python -m entrust_jax.train --config=configs/phantom.py:four_readers     (four readers of reliability .9)

Time: about ten minutes on one core, calibration included (32 x 32 pixels, half resolution inside). Score of the first
variant, three seeds: beliefs in blobs in conflict are within .02 of the exact posterior on average
(docs/evidence/phantom); the others were not run here.

Where the two readers contradict each other Bayes gives .89 to the reliable one; averaging gives .63, "conflict is
maximal entropy" .5. Where the two correlated readers contradict the third, Bayes gives .65 to the third; a product of
the three opinions gives it .36.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common
from entrust_jax.errors import UserError

VARIANTS = ("places", "class_conflict", "correlated", "four_readers")


def get_config(arg: str = "") -> Any:
    if arg and arg not in VARIANTS:
        raise UserError(f"phantom has no variant {arg!r}; leave it out or use one of {', '.join(VARIANTS)}")
    config = common.get_config()
    config.name = "phantom" + (f"_{arg}" if arg else "")
    config.data.update(
        layout="phantom",
        modalities=("A", "B"),
        reference="A",
        classes=("background", "lesion"),
        label_map=((0, 0), (1, 1)),
        patch=(32, 32),
        augment=False,
    )
    config.data.regions = ConfigDict({"lesion": (1,)})
    config.data.phantom = ConfigDict(
        {
            "cases": (4096, 128, 128, 128),
            "size": (32, 32),
            "depth": 1,
            "sites": 2,
            "prior": 0.5,
            "reliability": (0.95, 0.7),
            "ignorance": (0.1, 0.1),
            "radius": 4.0,
            "jitter": 0.5,
            "variant": "binary",
        }
    )
    if arg == "places":
        with config.data.phantom.ignore_type():
            config.data.phantom.reliability = ((0.95, 0.7), (0.7, 0.95))  # by site
    elif arg == "class_conflict":
        config.data.update(classes=("background", "lesion1", "lesion2"), label_map=((0, 0), (1, 1), (2, 2)))
        config.data.regions = ConfigDict({"lesion": (1, 2), "lesion1": (1,), "lesion2": (2,)})
        with config.data.phantom.ignore_type():
            config.data.phantom.update(variant="class", prior=(0.35, 0.35))
    elif arg == "correlated":
        config.data.modalities = ("A", "B", "C")
        config.data.phantom.update(reliability=(0.9, 0.8, 0.8), ignorance=(0.1, 0.1, 0.1))
        config.data.phantom.correlated = ("B", "C", 0.76)  # independent, they would both be correct with .64
    elif arg == "four_readers":
        config.data.modalities = ("A", "B", "C", "D")
        config.data.phantom.update(reliability=(0.9,) * 4, ignorance=(0.1,) * 4)
    config.model.update(widths=(16, 32, 32))
    config.unet.widths = (16, 32, 32)
    config.diffusion.update(b=0.21, lambda_max=6.0, sampler="dpmpp2m")
    config.train.update(batch=32, enfuse_steps=400, segdiff_steps=1600, unet_steps=2000, val_slices=128)
    return config.lock()
