"""Ischaemic stroke: infarct on DWI, ADC and FLAIR, in BIDS as ISLES 2022 ships it.

    python -m entrust_jax.train --config=configs/isles.py --config.data.dir=FOLDER/ISLES-2022

250 cases of three hospitals (Hernandez Petzsche et al. 2022, doi 10.1038/s41597-022-01875-5), CC BY-SA 4.0:
https://zenodo.org/records/7153326; the folder holds rawdata/ and derivatives/. FLAIR comes on a grid of its own and is
resampled onto DWI; the in-plane spacing is the training cases' median. Time and score of the set: not run here; a
single case of it, trained on with 400 + 1000 steps in 17 CPU-minutes, has Dice .71 (docs/data-sets.md). Infarcts may be
many and small: evaluate with --lesions=metastases.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common


def get_config() -> Any:
    config = common.get_config()
    config.name = "isles"
    config.data.update(
        layout="bids",
        source="ISLES 2022 (https://zenodo.org/records/7153326)",
        modalities=("DWI", "ADC", "FLAIR"),
        reference="DWI",
        classes=("background", "infarct"),
        label_map=((0, 0), (1, 1)),
        patch=(96, 96),
        spacing=("median",),  # the hospitals' DWI differ in plane
    )
    config.data.regions = ConfigDict({"infarct": (1,)})
    # Rates of nnU-Net (affine, gamma, noise) and of TorchIO's example (bias, ghosting); shifts ours.
    config.data.augmentation.update(affine=0.3, shift=0.5, gamma=0.3, bias=0.2, ghosting=0.1, noise=0.1)
    return config.lock()
