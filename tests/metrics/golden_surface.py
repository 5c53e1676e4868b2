"""Makes golden_surface.json anew: surface distances and lesion scores as the tools say that METRICS names.

    python -m venv golden
    golden/bin/pip install medpy==0.5.2 monai==1.6.1 surface-distance==0.1 panoptica==2.1.7 nibabel
    git clone https://github.com/rachitsaluja/BraTS-2023-Metrics
    golden/bin/python tests/metrics/golden_surface.py --brats=BraTS-2023-Metrics

In an environment of its own: MedPy is GPL, and nothing of these is needed by the package or by its tests, which read
the JSON alone. What the newest libraries have dropped is put back: np.Inf (surface-distance and the challenge's
evaluation say it of empty masks), and of pandas (the challenge's evaluation) append, and replace in a table that holds
arrays.
"""

import argparse
import base64
import importlib
import importlib.metadata
import json
import math
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import monai.metrics
import nibabel
import numpy as np
import pandas
import surface_distance
import torch
from medpy.metric import binary
from panoptica import InputType, Panoptica_Evaluator
from panoptica.instance_approximator import ConnectedComponentsInstanceApproximator
from panoptica.instance_matcher import NaiveThresholdMatching
from panoptica.metrics import Metric
from scipy import ndimage

TOLERANCES = (0.5, 1.0, 2.0)
CHALLENGES = {"glioma": "BraTS-GLI", "metastases": "BraTS-MET"}
PACKAGES = ("medpy", "monai", "surface-distance", "panoptica", "numpy", "scipy", "torch", "connected-components-3d")

np.Inf = np.inf
pandas.DataFrame.append = lambda self, other: pandas.concat([self, other])
pandas.DataFrame.replace = lambda self, old, new, inplace=False: self.assign(
    **{name: self[name].where(self[name] != old, new) for name in self.select_dtypes("number")}
)


def blobs(rng, shape, sigma, share):
    """A random mask of smooth outline that fills this share of the array, and touches its edges."""
    field = ndimage.gaussian_filter(rng.normal(size=shape), sigma)
    return field > np.quantile(field, 1 - share)


def balls(shape, *centres_and_radii):
    """Union of balls, in voxels."""
    grid = np.indices(shape)
    mask = np.zeros(shape, bool)
    for centre, radius in centres_and_radii:
        mask |= sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2
    return mask


def surface_pairs():
    """(name, spacing, prediction, truth)."""
    rng = np.random.default_rng(0)
    for spacing in ((3.0, 1.0, 0.5), (1.0, 1.0, 1.0), (0.7, 2.0, 1.3)):
        one, two = (blobs(rng, (7, 12, 10), 1.5, 0.2) for _ in range(2))
        yield f"smooth {spacing}", spacing, one, two
    near = blobs(rng, (8, 14, 12), 2.0, 0.15)
    yield "shifted", (2.5, 0.8, 0.8), np.roll(near, 1, axis=1), near
    yield "noise, all neighbourhoods", (1.5, 1.0, 0.75), *(rng.random((6, 9, 9)) < 0.5 for _ in range(2))
    yield "a voxel", (3.0, 1.0, 0.5), balls((5, 5, 5), ((2, 2, 2), 0)), balls((5, 5, 5), ((1, 3, 4), 0))
    for spacing in ((2.0, 0.75), (1.0, 1.0)):
        one, two = (blobs(rng, (20, 24), 2.0, 0.25) for _ in range(2))
        yield f"smooth {spacing}", spacing, one, two
    yield "noise in 2-D", (1.5, 1.0), *(rng.random((12, 12)) < 0.5 for _ in range(2))
    some, none = blobs(rng, (5, 6, 6), 1.0, 0.2), np.zeros((5, 6, 6), bool)
    yield "no prediction", (3.0, 1.0, 0.5), none, some
    yield "no truth", (3.0, 1.0, 0.5), some, none
    yield "both empty", (3.0, 1.0, 0.5), none, none


def lesion_pairs():
    """(name, spacing, prediction, truth)."""
    rng = np.random.default_rng(1)
    shape = (22, 30, 26)
    first, second, third = ((6, 6, 6), 3.0), ((6, 22, 6), 2.5), ((15, 12, 19), 3.2)
    apart = balls(shape, first, second, third)
    yield "apart", (1.0, 1.0, 1.0), balls(shape, ((6, 7, 6), 3.0), ((15, 12, 18), 2.6), ((4, 26, 22), 2.0)), apart
    drawn = balls(shape, ((6, 6, 6), 2.5), ((6, 13, 6), 2.0), ((15, 20, 19), 2.0), ((4, 26, 4), 1.0))
    guessed = balls(shape, ((6, 9, 6), 2.5), ((15, 24, 19), 1.0), ((4, 27, 4), 1.0), ((18, 5, 20), 1.0))
    yield "near, small and beside", (1.0, 1.0, 1.0), guessed, drawn
    yield "near, small and beside, anisotropic", (2.0, 1.0, 1.5), guessed, drawn
    truth = blobs(rng, shape, 1.6, 0.02)
    yield "many", (1.5, 0.75, 1.0), np.roll(truth, 1, axis=2) & (rng.random(shape) < 0.8), truth
    yield (
        "one bridges two",
        (1.0, 1.0, 1.0),
        balls(shape, *(((11, y, 11), 2.0) for y in range(6, 25))),
        balls(shape, ((11, 6, 11), 2.5), ((11, 23, 11), 3.0)),
    )
    none = np.zeros(shape, bool)
    yield "no prediction", (1.0, 1.0, 1.0), none, apart
    yield "no truth", (1.0, 1.0, 1.0), apart, none
    yield "both empty", (1.0, 1.0, 1.0), none, none


def packed(mask):
    return base64.b85encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode()


def plain(value):
    """A JSON number; "nan", "inf" where it is none."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def or_error(function, *arguments, **options):
    try:
        return plain(function(*arguments, **options))
    except Exception as error:  # what a tool does with an empty mask is part of its convention
        return f"raises {type(error).__name__}"


def of_monai(function, prediction, truth, **options):
    one, two = (torch.as_tensor(mask.astype(np.float32))[None, None] for mask in (prediction, truth))
    return function(one, two, include_background=True, **options).item()


def surfaces(spacing, prediction, truth):
    elements = surface_distance.compute_surface_distances(truth, prediction, spacing)
    return {
        "hd95": {
            "medpy": or_error(binary.hd95, prediction, truth, voxelspacing=spacing),
            "monai": or_error(
                of_monai, monai.metrics.compute_hausdorff_distance, prediction, truth, percentile=95, spacing=spacing
            ),
            "surface-distance": or_error(surface_distance.compute_robust_hausdorff, elements, 95),
        },
        "nsd": {
            str(tolerance): {
                "surface-distance": or_error(surface_distance.compute_surface_dice_at_tolerance, elements, tolerance),
                **{
                    name: or_error(
                        of_monai,
                        monai.metrics.compute_surface_dice,
                        prediction,
                        truth,
                        class_thresholds=[tolerance],
                        spacing=spacing,
                        use_subvoxels=subvoxels,
                    )
                    for name, subvoxels in (("monai", False), ("monai, use_subvoxels", True))
                },
            }
            for tolerance in TOLERANCES
        },
    }


def challenge_evaluation(folder):
    """The challenge's module, with the surface_distance that lies beside it and takes whole numbers as masks."""
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "surface_distance"}
    sys.path.insert(0, str(folder))
    module = importlib.import_module("metrics")
    sys.path.pop(0)
    sys.modules.update(own)
    return module


def of_brats(metrics, challenge, spacing, prediction, truth):
    """Lesion-wise scores of the challenge's own evaluation, of the region that is label 3."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, mask in (("prediction", prediction), ("truth", truth)):
            paths.append(f"{folder}/{name}.nii.gz")
            affine = np.diag([*spacing, 1.0])
            nibabel.save(nibabel.Nifti1Image(3 * mask.astype(np.uint8), affine), paths[-1])
        table = metrics.get_LesionWiseResults(*paths, challenge_name=challenge)
    row = table[table["Labels"] == "ET"].iloc[0]
    named = {"found": "Num_TP", "missed": "Num_FN", "spurious": "Num_FP"}
    named |= {"dice": "LesionWise_Score_Dice", "hd95": "LesionWise_Score_HD95"}
    return {key: plain(row[column]) for key, column in named.items()}


def of_panoptica(prediction, truth):
    """Its recognition quality is F1, its segmentation quality the mean Dice over what is found; it grows nothing."""
    evaluator = Panoptica_Evaluator(
        expected_input=InputType.SEMANTIC,
        instance_approximator=ConnectedComponentsInstanceApproximator(),
        instance_matcher=NaiveThresholdMatching(matching_metric=Metric.DSC, matching_threshold=1e-6),
        instance_metrics=[Metric.DSC],
        global_metrics=[],
    )
    found = evaluator.evaluate(prediction.astype(np.uint8), truth.astype(np.uint8))["ungrouped"]
    return {key: plain(getattr(found, key)) for key in ("tp", "fp", "fn", "rq", "sq_dsc")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--brats", type=Path, required=True, help="clone of rachitsaluja/BraTS-2023-Metrics")
    brats = parser.parse_args().brats
    evaluation = challenge_evaluation(brats)
    commit = subprocess.run(["git", "-C", brats, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    found = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"BraTS-2023-Metrics": commit.stdout.strip()},
        "surfaces": [],
        "lesions": [],
    }
    for name, spacing, prediction, truth in surface_pairs():
        case = {"name": name, "spacing": spacing, "shape": truth.shape}
        case |= {"prediction": packed(prediction), "truth": packed(truth)}
        found["surfaces"].append(case | surfaces(spacing, prediction, truth))
    for name, spacing, prediction, truth in lesion_pairs():
        case = {"name": name, "spacing": spacing, "shape": truth.shape}
        case |= {"prediction": packed(prediction), "truth": packed(truth)}
        case["brats"] = {
            rule: of_brats(evaluation, short, spacing, prediction, truth) for rule, short in CHALLENGES.items()
        }
        if name == "apart":  # so far that growing joins nothing
            case["panoptica"] = of_panoptica(prediction, truth)
        found["lesions"].append(case)
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
