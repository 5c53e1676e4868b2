"""Any data set in nnU-Net raw layout, as its dataset.json describes it.

    python -m entrust_jax.check --config=configs/nnunet.py:FOLDER/Dataset101_NAME
    python -m entrust_jax.train --config=configs/nnunet.py:FOLDER/Dataset101_NAME

Modalities are the channels by name, the first one gives the grid; classes, label values, the ignored label and regions
are those of "labels". A channel CT is in Hounsfield units, as nnU-Net takes it to be, and is read in a window of -1000
to 1000, which loses nothing of any organ but metal and the densest bone; for one organ a narrower window shows more:
--config.data.intensity.CT="('window',-160.0,240.0)". All others are z-scored, PET too: its unit is not known here. A
splits_final.json beside dataset.json says who is test in fold --config.data.split.fold. Several scans of one patient:
--config.data.patient_pattern. Sizes and durations are those of configs/glioma.py, for a small set on a CPU;
copy that file for a config of your own. A channel that is a copy of another counts as missing. FOLDER holds
dataset.json, imagesTr/NAME_0000.nii.gz and labelsTr/NAME.nii.gz, as described on
https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md. Licence: that of your set. Time: as
configs/glioma.py. Score: not run here.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import common
from entrust_jax.data import cases, nnunet
from entrust_jax.errors import UserError

CT = ("window", -1000.0, 1000.0)


def get_config(arg: str = "") -> Any:
    if not arg:
        raise UserError("configs/nnunet.py needs the folder of dataset.json: --config=configs/nnunet.py:FOLDER")
    folder = Path(arg)
    path = folder / nnunet.DESCRIPTION
    info = nnunet.describe(folder)
    modalities = tuple(nnunet.channels_of(info, path).values())
    cases.known_names(modalities, {})
    labels = nnunet.labels_of(info, path)
    if odd := [name for name in modalities if set(name) & set("./\0")]:
        raise UserError(f"{path}: channel {odd[0]!r} has a dot or a slash, and files are named after it; rename it")
    if odd := [name for name in labels.regions if "." in name]:
        raise UserError(f"{path}: label {odd[0]!r} has a dot, and keys of a config cannot; rename it")
    config = common.get_config()
    config.name = folder.resolve().name
    config.data.update(
        layout="nnunet",
        dir=arg,
        modalities=modalities,
        reference=modalities[0],
        classes=labels.classes,
        label_map=labels.label_map,
        drop_copies=True,  # nnU-Net wants every channel, so sets fill in for a missing one
    )
    config.data.regions = ConfigDict(labels.regions)
    config.data.intensity = ConfigDict({name: CT for name in modalities if name.lower() == "ct"})
    return config.lock()
