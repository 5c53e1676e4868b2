"""A contact sheet: one row a case, one column a modality, the label outlined."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from entrust_jax.data.survey import Glimpse
from entrust_jax.report import figures

INCHES = 1.9  # of a picture's side


def sheet(glimpses: Sequence[Glimpse], modalities: Sequence[str], classes: Sequence[str], title: str) -> Figure:
    """The slices in radiological orientation; a missing modality says so."""
    rows, columns = max(len(glimpses), 1), len(modalities)
    picture = Figure(figsize=(INCHES * columns + 1.3, INCHES * rows + 1.1), dpi=110, layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False)
    for row, one in zip(axes, glimpses, strict=False):
        view = figures.make_view(one.body[None], one.spacing)
        for m, axis in enumerate(row):
            axis.set_xticks([])
            axis.set_yticks([])
            if not one.present[m]:
                figures.blank(axis, "missing")
                continue
            grey = figures.radiological(figures.window(one.image[m], one.body), view)
            axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=view.extent, interpolation="bilinear")
            for k in range(1, len(classes)) if one.label is not None else ():
                figures.outline(axis, np.asarray(one.label == k), view, colour_of(k), width=1.1)
        name = textwrap.fill(one.name, 14)
        row[0].set_ylabel(f"{name}\nslice {one.number}", fontsize=7, rotation=0, ha="right", va="center")
    for axis, name in zip(axes[0], modalities, strict=True):
        axis.set_title(name, fontsize=9)
    picture.suptitle(f"{title}; the patient's right is on the left", fontsize=8)
    key = [Patch(facecolor=colour_of(k), label=name) for k, name in enumerate(classes) if k]
    picture.legend(handles=key, loc="outside lower center", ncols=min(len(key), 6), fontsize=7, frameon=False)
    return picture


def colour_of(k: int) -> str:
    """The outline of class k > 0."""
    return figures.CLASS_COLOURS[(k - 1) % len(figures.CLASS_COLOURS)]
