"""What every config shares. A data set's file changes only what differs.

Durations are in optimiser steps. Every value can be set on the command line: --config.train.batch=4.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> Any:
    """A ConfigDict without data set; its attributes are of any type, hence the annotation."""
    config: Any = ConfigDict()
    config.name = ""
    config.method = "entrust"  # or 'unet', 'deep_ensemble': baselines under the same trainer
    config.seed = 0

    config.data = ConfigDict(
        {
            "layout": "nnunet",
            "dir": "",
            "source": "",  # where a person gets the data
            "modalities": (),
            "reference": "",  # the modality whose grid is used
            "patient_pattern": "",  # its first group in a case's name is the patient; "": as the layout says
            "classes": (),
            "label_map": ((0, 0), (1, 1)),  # (value in the file, class index; -1: such voxels do not count)
            "drop_copies": False,  # a modality that is a copy of another counts as missing (else it is a warning)
            # mm along slice, row, column that networks see: () as scanned, ("median",) planned, 0 an axis as scanned
            "spacing": (),
            "patch": (96, 96),
            # Voxels that a 3-D network sees at once when it predicts; (): as large as the patch. Larger ones are fewer,
            # but not what the network has learnt on: look at --suite=volume first.
            "window": (),
            "foreground_share": 0.5,  # of the training patches, centred on foreground (undone by weights in the loss)
            "augment": True,  # False: patches as they are, whatever `augmentation` says
            # By patient. folds=1: every case in every part, for a set too small to divide; no score says anything.
            "split": {"seed": 0, "folds": 5, "fold": 0, "test_pattern": ""},
        }
    )
    config.data.regions = ConfigDict({})
    # Names of a modality's files, channels and columns, in place of the usual ones: {"T1": ("T1_MPRAGE", "mprage")}.
    config.data.names = ConfigDict({})
    # How intensities with a unit are read: {"CT": ("window", low, high), "PET": ("scale", unit)}; others are z-scored.
    config.data.intensity = ConfigDict({})
    # With `augment` every patch is mirrored half of the time and gets a little gamma, gain, offset and noise. How often
    # what follows happens besides, from 0 to 1; data/augment.py has the strengths. Bias field, ghosting and gamma are
    # for modalities without a rule in `intensity`, which are taken for MR.
    config.data.augmentation = ConfigDict(
        {
            "affine": 0.0,  # rotation and zoom, of a slice
            "shift": 0.0,  # by at most a voxel, of modalities against each other
            "gamma": 0.0,  # this and what follows: of each modality on its own
            "bias": 0.0,
            "ghosting": 0.0,
            "noise": 0.0,
        }
    )

    config.model = ConfigDict(
        {
            "widths": (16, 32, 48, 64),
            "d_c": 16,
            "d_u": 8,
            "space_to_depth": 2,
            # One factor an axis for every scale, the first that of the space-to-depth. (): space_to_depth, then 2,
            # along every axis (volumes: planned from the spacing when a training starts).
            "strides": (),
            "head_dropout": 0.2,
            "compute": "float32",  # or "bfloat16": of activations and convolutions, for accelerators
            "remat": False,  # blocks are computed again for the gradient: less memory, a third more work
        }
    )
    config.diffusion = ConfigDict(
        {
            "b": 0.1,  # scale of the one-hot masks: 2.5 / sqrt(2 n) for structures of n pixels
            "lambda_min": -12.0,
            "lambda_max": 8.5,
            "steps": 8,
            "hypotheses": 16,
            "sampler": "ddim",
            "eta_min": 0.2,
        }
    )
    config.train = ConfigDict(
        {
            "batch": 8,
            "enfuse_steps": 600,
            "segdiff_steps": 1500,
            "unet_steps": 2100,
            "draws": 2,  # noise levels trained per encoded slice
            "learning_rate": 2e-3,
            "weight_decay": 1e-4,
            "ema": 0.995,
            "log_every": 10,
            "eval_every": 100,
            "val_slices": 64,
            "calibration_slices": 8,  # per calibration case
            "head_steps": 500,
        }
    )
    # What is promised of a new patient, by the calibration patients. Changed after training, the last stage runs again.
    config.trust = ConfigDict(
        {
            "fnr": 0.1,  # share of a region that its outer mask may miss, on average over patients
            "fdr": 0.1,  # share of an inner mask that may be false, on average over patients
            "coverage": 0.9,  # of the intervals of Dice and volumes; and how sure the inner mask is of its share
        }
    )
    config.unet = ConfigDict(
        {
            "widths": (16, 32, 48, 64),
            "dice": 0.0,
            "members": 5,
            "dropout": 0.0,  # share of channels left out, in training and in each of `passes` at inference
            "passes": 16,
        }
    )
    return config
