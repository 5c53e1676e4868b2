"""Contact sheets: cases as they are read, and a training patch as augmentation changes it, the label outlined."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from entrust_jax.data.survey import Glimpse, Sample
from entrust_jax.report import slices

INCHES = 1.9  # of a picture's side


def sheet(glimpses: Sequence[Glimpse], modalities: Sequence[str], classes: Sequence[str], title: str) -> Figure:
    """The slices in radiological orientation; a missing modality says so."""
    rows, columns = max(len(glimpses), 1), len(modalities)
    picture = Figure(figsize=(INCHES * columns + 1.3, INCHES * rows + 1.1), dpi=110, layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False)
    for row, one in zip(axes, glimpses, strict=False):
        view = slices.make_view(one.body[None], one.spacing)
        for m, axis in enumerate(row):
            axis.set_xticks([])
            axis.set_yticks([])
            if not one.present[m]:
                slices.blank(axis, "missing")
                continue
            grey = slices.radiological(slices.window(one.image[m], one.body), view)
            axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=view.extent, interpolation="bilinear")
            for k in range(1, len(classes)) if one.label is not None else ():
                slices.outline(axis, np.asarray(one.label == k), view, colour_of(k), width=1.1)
        name = textwrap.fill(one.name, 14)
        row[0].set_ylabel(f"{name}\nslice {one.number}", fontsize=7, rotation=0, ha="right", va="center")
    for axis, name in zip(axes[0], modalities, strict=True):
        axis.set_title(name, fontsize=9)
    picture.suptitle(f"{title}; the patient's right is on the left", fontsize=8)
    key = [Patch(facecolor=colour_of(k), label=name) for k, name in enumerate(classes) if k]
    picture.legend(handles=key, loc="outside lower center", ncols=min(len(key), 6), fontsize=7, frameon=False)
    return picture


def changes(
    samples: Sequence[Sample],
    modalities: Sequence[str],
    classes: Sequence[str],
    spacing: Sequence[float],
    title: str,
) -> Figure:
    """A patch plain (the first sample) and changed, one column each, one row a modality, each row in one window.

    spacing: mm along D, H, W. What a change leaves as it is says so.
    """
    rows, columns, plain = len(modalities), len(samples), samples[0]
    view = slices.make_view(np.stack([one.body for one in samples]), spacing)
    height = INCHES * view.extent[3] / view.extent[1]
    picture = Figure(figsize=(INCHES * columns + 0.6, height * rows + 1.2), dpi=110, layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False)
    for m, name in enumerate(modalities):
        axes[m, 0].set_ylabel(name, fontsize=9)
        low, high = np.percentile(plain.image[m][plain.body], (1.0, 99.7))
        for one, axis in zip(samples, axes[m], strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if not one.present[m]:
                slices.blank(axis, "missing")
                continue
            grey = np.clip((one.image[m] - low) / max(float(high - low), 1e-6), 0, 1) * one.body
            shown = slices.radiological(grey, view)
            axis.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=view.extent, interpolation="nearest")
            for k in range(1, len(classes)):
                slices.outline(axis, one.label == k, view, colour_of(k), width=0.9)
            if one is not plain and np.array_equal(one.image[m], plain.image[m]):
                slices.note(axis, "unchanged")
    for one, axis in zip(samples, axes[0], strict=True):
        axis.set_title(one.title, fontsize=8)
    picture.suptitle(f"{title}; the patient's right is on the left where nothing is mirrored", fontsize=9)
    key = [Patch(facecolor=colour_of(k), label=name) for k, name in enumerate(classes) if k]
    picture.legend(handles=key, loc="outside lower center", ncols=min(len(key), 6), fontsize=7, frameon=False)
    return picture


def colour_of(k: int) -> str:
    """The outline of class k > 0."""
    return slices.CLASS_COLOURS[(k - 1) % len(slices.CLASS_COLOURS)]
