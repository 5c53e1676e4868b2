"""Brain tumours (BraTS): T1, T1ce, T2, FLAIR -> background, NCR, ED, ET; regions WT, TC, ET.

    python -m entrust_jax.train --config=configs/brats.py --config.data.dir=FOLDER      (volumes, for accelerators)
    python -m entrust_jax.train --config=configs/brats.py:gli2024 --config.data.dir=FOLDER    (glioma after treatment)
    python -m entrust_jax.train --config=configs/brats.py:slices --config.data.dir=FOLDER    (2-D, smaller machines)
    python -m entrust_jax.train --config=configs/brats.py:demo                       (built-in phantom, two CPU cores)

Volumes: patches of 128 x 128 x 128 voxels, four scales of 32 to 256 channels, activations in bfloat16, blocks computed
again for the gradient. The batch is meant for one device of 80 GB, which was not tried (69.4 GiB by the CPU's compiler,
docs/evidence/compile): take 1, or patches of 96, where it does not fit; on eight devices --config.train.batch=16.

Time: the demo about 6 minutes on two CPU cores, compilation included; the other settings were not run here in full.
Scores: the demo prints its validation Dice; a small 2-D setting on three cases of BraTS 2013 is in docs/data-sets.md;
those of the others are not known.

Licence: as the page of each year says, for research, after registration. 2020:
https://www.med.upenn.edu/cbica/brats2020/data.html, 2021:
https://www.cancerimagingarchive.net/analysis-result/rsna-asnr-miccai-brats-2021, 2023:
https://www.synapse.org/Synapse:syn51156910, 2024 from the challenge's page there.

The folder holds one folder a case, BraTS 2020 / 2021 (NAME_t1.nii.gz ...) or 2023 / 2024 (NAME-t1n.nii.gz ...) names.
gli2024 has the labels of BraTS 2024 GLI (de Verdier et al. 2024, arXiv 2405.18368), the resection cavity RC among them,
and that challenge's regions (TC and WT as in earlier years, not checked against its code); time points of a patient
(BraTS-GLI-00005-100, -101) stay in one part. In the 2023 layout ET has the value 3:
--config.data.label_map="((0,0),(1,1),(2,2),(3,3))". BraTS 2013 as redistributed (CC BY-NC-SA 3.0) has four tumour
values: --config.data.label_map="((0,0),(1,1),(2,2),(3,1),(4,3))".
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common
from entrust_jax.errors import UserError


def get_config(arg: str = "") -> Any:
    config = common.get_config()
    config.name = "brats" + (f"_{arg}" if arg else "")
    config.data.update(
        layout="brats",
        source="https://www.synapse.org/Synapse:syn51156910",
        modalities=("T1", "T1ce", "T2", "FLAIR"),
        reference="T1ce",
        classes=("background", "NCR", "ED", "ET"),
        label_map=((0, 0), (1, 1), (2, 2), (4, 3)),
        patch=(128, 128, 128),
    )
    config.data.regions = ConfigDict({"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)})
    config.model.update(widths=(32, 64, 128, 256), d_c=32, d_u=16, space_to_depth=1, compute="bfloat16", remat=True)
    config.unet.widths = (32, 64, 128, 256)
    config.diffusion.update(b=0.07, lambda_min=-15.0, steps=16)
    config.train.update(
        batch=2, enfuse_steps=40000, segdiff_steps=150000, unet_steps=190000, draws=1,
        learning_rate=2e-4, ema=0.9999, log_every=100, eval_every=2000, val_slices=64, head_steps=5000,
    )  # fmt: skip
    if arg in ("slices", "demo"):
        config.data.patch = (192, 192)
        config.model.update(compute="float32", remat=False)
        config.diffusion.lambda_min = -12.0
        config.train.update(batch=32, val_slices=512)
    if arg == "gli2024":
        config.data.classes = ("background", "NETC", "SNFH", "ET", "RC")
        config.data.label_map = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))
        config.data.regions = ConfigDict(
            {"ET": (3,), "TC": (1, 3), "WT": (1, 2, 3), "RC": (4,), "NETC": (1,), "SNFH": (2,)}
        )
    elif arg == "demo":
        config.name = "demo"
        config.data.layout = "phantom"
        config.data.patch = (64, 64)
        config.data.phantom = ConfigDict(
            {
                "cases": (384, 24, 16, 16),  # train, val, calibration, test
                "size": (64, 64),
                "depth": 4,
                "sites": 3,
                "prior": 0.5,
                "reliability": (0.8, 0.95, 0.8, 0.9),
                "ignorance": (0.2, 0.1, 0.2, 0.1),
                "radius": 7.0,
                "jitter": 1.0,
                "variant": "brain",
            }
        )
        config.data.augment = False  # the phantom's law is exact as it is
        config.model.update(widths=(16, 32, 32), d_c=16, d_u=8, space_to_depth=2)
        config.unet.widths = (16, 32, 32)
        config.diffusion.update(b=0.2, lambda_max=7.0, steps=8)
        config.train.update(
            batch=8, enfuse_steps=300, segdiff_steps=700, unet_steps=1000, draws=2,
            learning_rate=2e-3, ema=0.995, log_every=10, eval_every=100, val_slices=32, head_steps=300,
        )  # fmt: skip
    elif arg and arg != "slices":
        raise UserError(f"brats has no variant {arg!r}; leave it out or use 'gli2024', 'slices' or 'demo'")
    if arg != "demo":
        # Rates of nnU-Net (affine, gamma, noise) and of TorchIO's example (bias, ghosting); shifts ours.
        config.data.augmentation.update(affine=0.3, shift=0.5, gamma=0.3, bias=0.2, ghosting=0.1, noise=0.1)
    return config.lock()
