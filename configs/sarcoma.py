"""Soft-tissue sarcoma: tumour on PET, CT and T1, each scan on its own grid, listed in a manifest.

    python -m entrust_jax.manifest --dir=FOLDER PET={case}/PET_image.nii.gz CT={case}/CT_image.nii.gz \\
      T1={case}/MR_T1_image.nii.gz label={case}/MR_T1_mask.nii.gz
    python -m entrust_jax.train --config=configs/sarcoma.py --config.data.dir=FOLDER
    python -m entrust_jax.train --config=configs/sarcoma.py:volumes --config.data.dir=FOLDER     (in 3-D)

The validation set of the Image Biomarker Standardisation Initiative, made of TCIA's Soft-tissue-Sarcoma (Vallieres et
al. 2015; Clark et al. 2013), CC BY 3.0: https://www.cancerimagingarchive.net/collection/soft-tissue-sarcoma. CT in
Hounsfield units, PET in SUV. The crops are centred on the tumour, so a model can learn the place. Time: train plans
6 minutes on two CPU cores, in 3-D 13. Score: Dice .72 on the sixteen patients of five folds, .66 by the place alone,
which is no difference that can be told; in 3-D, one training each, after as many minutes as 2-D, .64 on the second fold
(2-D .71) and .70 on the fifth (.72; docs/data-sets.md).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common
from entrust_jax.errors import UserError


def get_config(arg: str = "") -> Any:
    config = common.get_config()
    config.name = "sarcoma" + (f"_{arg}" if arg else "")
    config.data.update(
        layout="manifest",
        source="The Cancer Imaging Archive, collection Soft-tissue-Sarcoma (IBSI validation set)",
        modalities=("PET", "CT", "T1"),
        reference="T1",
        classes=("background", "tumour"),
        label_map=((0, 0), (1, 1)),
        patch=(96, 96),
    )
    config.data.regions = ConfigDict({"tumour": (1,)})
    config.data.intensity = ConfigDict({"PET": ("scale", 2.5), "CT": ("window", -160.0, 240.0)})
    # Rates of nnU-Net (affine, gamma, noise) and of TorchIO's example (bias, ghosting); shifts ours.
    config.data.augmentation.update(affine=0.3, shift=0.5, gamma=0.3, bias=0.2, ghosting=0.1, noise=0.1)
    config.train.update(enfuse_steps=250, segdiff_steps=600)
    if arg == "volumes":
        # Slices of 3.3 mm: the planned strides leave them whole where the plane is folded.
        config.data.patch = (16, 96, 96)
        config.model.update(widths=(8, 16, 24, 32), d_c=8, d_u=4)
        config.unet.widths = (8, 16, 24, 32)
        config.diffusion.update(b=0.02, lambda_min=-12.0, lambda_max=11.5, hypotheses=8)  # masses of some 10,000 voxels
        config.train.update(batch=2, enfuse_steps=120, segdiff_steps=300, unet_steps=420, val_slices=16)
    elif arg:
        raise UserError(f"sarcoma has no variant {arg!r}; leave it out or use 'volumes'")
    return config.lock()
