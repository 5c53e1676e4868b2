"""Multiple sclerosis: white-matter lesions on T1, T1 after contrast, T2 and FLAIR, listed in a manifest.

    python -m entrust_jax.manifest --dir=FOLDER T1={case}/T1W.nii.gz T1POST={case}/T1WKS.nii.gz T2={case}/T2W.nii.gz \\
      FLAIR={case}/FLAIR.nii.gz label={case}/consensus_gt.nii.gz
    python -m entrust_jax.train --config=configs/ms_lesions.py --config.data.dir=FOLDER
    python -m entrust_jax.train --config=configs/ms_lesions.py:volumes --config.data.dir=FOLDER     (in 3-D)

30 patients, consensus of three raters (Lesjak et al. 2017, doi 10.1007/s12021-017-9348-7), CC BY:
https://lit.fe.uni-lj.si/en/research/resources/3D-MR-MS; the patterns are for the names in a copy by patient
(cross_sectional/raw of open_ms_data on GitHub, muschellij2); write those of yours. Time and score of that
set: not run here. Two patients of a copy: Dice .38 in sample after 43 planned minutes of steps; in 3-D, after
51, .20 (docs/data-sets.md).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common
from entrust_jax.errors import UserError


def get_config(arg: str = "") -> Any:
    config = common.get_config()
    config.name = "ms_lesions" + (f"_{arg}" if arg else "")
    config.data.update(
        layout="manifest",
        source="Lesjak et al. 2017 (doi 10.1007/s12021-017-9348-7)",
        modalities=("T1", "T1POST", "T2", "FLAIR"),
        reference="FLAIR",
        classes=("background", "lesion"),
        label_map=((0, 0), (1, 1)),
        patch=(128, 128),
    )
    config.data.regions = ConfigDict({"lesion": (1,)})
    config.data.names = ConfigDict({"T1POST": ("T1WKS", "T1c", "T1ce", "T1Gd")})
    # Rates of nnU-Net (affine, gamma, noise) and of TorchIO's example (bias, ghosting); shifts ours.
    config.data.augmentation.update(affine=0.3, shift=0.5, gamma=0.3, bias=0.2, ghosting=0.1, noise=0.1)
    config.diffusion.b = 0.2  # 2.5 / sqrt(2 n): small lesions, hence evaluate with --lesions=metastases
    if arg == "volumes":
        config.data.patch = (16, 64, 64)
        config.diffusion.update(b=0.1, lambda_min=-15.0, hypotheses=8)
        config.train.update(batch=4, enfuse_steps=250, segdiff_steps=800, unet_steps=1050)
    elif arg:
        raise UserError(f"ms_lesions has no variant {arg!r}; leave it out or use 'volumes'")
    return config.lock()
