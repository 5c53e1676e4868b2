"""Lower-grade glioma: FLAIR abnormality on T1, FLAIR and T1ce, in nnU-Net raw layout.

    python -m entrust_jax.train --config=configs/glioma.py --config.data.dir=FOLDER/Dataset101_LowerGradeGlioma
    python -m entrust_jax.train --config=configs/glioma.py:gpu --config.data.dir=...

TCGA-LGG scans (https://www.cancerimagingarchive.net/collection/tcga-lgg) with the masks of Buda et al. 2019 (doi
10.1016/j.compbiomed.2019.05.002), research use only: https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation.
That page ships one TIFF a slice, the sequences as channels: write them as imagesTr/NAME_0000.nii.gz (T1), _0001
(FLAIR), _0002 (T1ce), labelsTr/NAME.nii.gz and dataset.json. TIFF has no spacing: millimetres mean nothing there.

Train on one hospital, test on the other:
--config.data.split.test_pattern=LGG_CS. Time: 15 minutes of training planned on two idle CPU cores, 22 measured beside
other work, calibration included. Score, one seed: Dice .75 on a patient fold (13 patients, an earlier version),
.66 across hospitals (16 patients; the place alone .11); the :gpu setting was not run here.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common
from entrust_jax.errors import UserError


def get_config(arg: str = "") -> Any:
    config = common.get_config()
    config.name = "glioma" + (f"_{arg}" if arg else "")
    config.data.update(
        layout="nnunet",
        source="The Cancer Imaging Archive, collection TCGA-LGG (masks: Buda et al. 2019)",
        modalities=("T1", "FLAIR", "T1ce"),
        reference="FLAIR",
        classes=("background", "lesion"),
        label_map=((0, 0), (1, 1)),
        patch=(96, 96),
    )
    config.data.regions = ConfigDict({"lesion": (1,)})
    if arg == "gpu":
        config.data.patch = (128, 128)
        # Rates of nnU-Net (affine, gamma, noise) and of TorchIO's example (bias, ghosting); shifts ours.
        config.data.augmentation.update(affine=0.3, shift=0.5, gamma=0.3, bias=0.2, ghosting=0.1, noise=0.1)
        config.model.update(widths=(32, 64, 128, 128), d_c=32, d_u=16, space_to_depth=1)
        config.unet.widths = (32, 64, 128, 128)
        config.train.update(
            batch=32, enfuse_steps=5000, segdiff_steps=20000, unet_steps=25000, ema=0.999, learning_rate=5e-4
        )
    elif arg:
        raise UserError(f"glioma has no variant {arg!r}; leave it out or use 'gpu'")
    return config.lock()
