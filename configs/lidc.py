"""Lung nodules on CT, outlined by four radiologists apart: one modality, several raters, listed in a manifest.

    python -m entrust_jax.manifest --dir=FOLDER CT={patient}/{case}/image_*.jpg label={patient}/{case}/label0_.jpg \\
      label2={patient}/{case}/label1_.jpg label3={patient}/{case}/label2_.jpg label4={patient}/{case}/label3_.jpg
    python -m entrust_jax.train --config=configs/lidc.py --config.data.dir=FOLDER

LIDC-IDRI (Armato et al. 2011, doi 10.1118/1.3528204; Clark et al. 2013), CC BY 3.0:
https://www.cancerimagingarchive.net/collection/lidc-idri. The patterns are for crops of 128 x 128 pixels as grey JPEG,
such as the 28 in the folder data/ of Rahman et al. 2023 (CIMD on GitHub, aimansnigdha): training/0/image_1.jpg, beside
it label0_.jpg to label3_.jpg, 0 or 255. An empty mask says that a radiologist saw no nodule. A crop has no pixel size:
distances and volumes are in pixels.

The file names do not say whose scan a crop is of, and neighbouring slices are very much alike, so before training give
the column patient of manifest.csv its true values. Of these 28 crops, by their look: one nodule in 0, 1, 3, 4, 6, 7, 13
to 19; one in 2, 5, 8 to 12 and 23; one in 40 and 65; one in 43 and 61; one each in 24, 50 and 70. That is seven
patients at most, with nodules on both sides of the folders training and testing, so no figure from these crops says
much, and none has an interval.

Time: 7 CPU-minutes for 100 + 250 steps. Score: after these, none to speak of (docs/data-sets.md); in full not run here.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common


def get_config() -> Any:
    config = common.get_config()
    config.name = "lidc"
    config.data.update(
        layout="manifest",
        source="The Cancer Imaging Archive, collection LIDC-IDRI (https://www.cancerimagingarchive.net)",
        modalities=("CT",),
        reference="CT",
        classes=("background", "nodule"),
        label_map=((0, 0), (255, 1)),
        patch=(128, 128),
    )
    config.data.regions = ConfigDict({"nodule": (1,)})
    config.data.intensity = ConfigDict({"CT": ("window", 0.0, 255.0)})  # of the pictures
    config.data.augmentation.update(affine=0.3, noise=0.1)  # rates of nnU-Net
    config.diffusion.b = 0.2  # 2.5 / sqrt(2 n): nodules of about 100 pixels
    config.train.update(enfuse_steps=200, segdiff_steps=600, unet_steps=800, batch=8)
    return config.lock()
