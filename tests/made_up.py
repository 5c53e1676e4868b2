"""Scans and parameters out of a generator of random numbers, for tests of what is done with them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from entrust_jax.data.body import coordinates
from entrust_jax.data.preprocess import Volume


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
