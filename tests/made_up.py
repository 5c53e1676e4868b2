"""Scans, their files and parameters out of a generator of random numbers, for tests of what is done with them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import nibabel
import numpy as np
from PIL import Image

from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])


def volume(body: np.ndarray, present: Sequence[bool] = (True, True)) -> Volume:
    """Random images inside a body [D, H, W], in voxels of 3 x 1 x 1 mm; label left out."""
    there = np.asarray(present)
    image = np.random.default_rng(0).normal(size=(len(there), *body.shape)).astype(np.float32) * body
    return Volume(
        name="case",
        patient="case",
        number=123,
        image=image * there[:, None, None, None],
        present=there,
        label=None,
        body=body,
        coordinates=coordinates(body),
        spacing=(3.0, 1.0, 1.0),
        reference=None,
    )


def slices(present: Sequence[bool] = (True, True)) -> Volume:
    """A case of 8 slices whose odd size in plane, 15 x 13, has to be padded to 16."""
    body = np.ones((8, 15, 13), bool)
    body[:, :2] = False
    return volume(body, present)


def parameters(init: Callable[..., Any], *arguments: Any) -> Any:
    """Random in every entry, so that nothing is closed by a zero initialisation."""
    shapes = jax.eval_shape(init, *arguments)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def head(shape=(16, 14, 6), seed=0):
    """A bright ellipse on a noisy background."""
    rng = np.random.default_rng(seed)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return (rng.uniform(0, 3, shape) + (x**2 + y**2 < 0.6) * rng.uniform(80, 120, shape)).astype(np.float32)


def save(path: Path, values, affine=AFFINE, dtype=None) -> Path:
    """Writes a scan as NIfTI."""
    values = np.asarray(values)
    nibabel.Nifti1Image(values.astype(dtype or values.dtype), affine).to_filename(path)
    return path


def picture(path: Path, seed=0, shape=(20, 26)) -> Path:
    """A bright disc, brighter above (in front) than below, and darker to the left."""
    rows, columns = np.indices(shape)
    disc = (rows - 10) ** 2 + (columns - 13) ** 2 < 80
    values = disc * (120 + 3 * (20 - rows) + columns) + np.random.default_rng(seed).integers(0, 4, shape)
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def pet_ct_t1(folder: Path, cases: int, shape=(40, 44, 8)) -> None:
    """Patients with PET in SUV, CT in Hounsfield units, T1 and a mask of the hot spot, listed in a manifest."""
    rows = ["case,PET,CT,T1,label"]
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    for number in range(cases):
        rng = np.random.default_rng(number)
        body, hot = x**2 + y**2 < 0.8, (x - 0.3) ** 2 + (y + rng.uniform(-0.2, 0.2)) ** 2 < 0.06
        fat = body & (x**2 + y**2 > 0.5)
        scans = {
            "PET": np.where(body, rng.uniform(0.3, 0.9, shape) + 6 * hot, rng.uniform(0, 0.05, shape)),
            "CT": np.where(body, np.where(fat, -95.0, 45 - 15 * hot + 4 * z), -1000.0) + rng.normal(0, 12, shape),
            "T1": np.where(body, np.where(fat, 950.0, 320 + 90 * hot), 8.0) + rng.uniform(0, 60, shape),
            "label": hot.astype(np.uint8),
        }
        (folder / f"p{number}").mkdir(parents=True)
        for name, values in scans.items():
            save(folder / f"p{number}" / f"{name}.nii.gz", values, dtype=np.uint8 if name == "label" else np.float32)
        rows.append(f"p{number}," + ",".join(f"p{number}/{name}.nii.gz" for name in scans))
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
