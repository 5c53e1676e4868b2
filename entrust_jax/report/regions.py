"""A sheet of regions that a model calls doubtful, a row each: scans, doubt, conflict, truth and the reason given."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from entrust_jax.data.preprocess import Volume
from entrust_jax.report import figures, slices
from entrust_jax.report.slices import View

TRUE, DELIVERED, REGION = "#56B4E9", "#E69F00", "#FFFFFF"
SIDE, WORDS = 1.55, 4.7  # inches of a panel's width, and of the words beside a row
TALLEST = 1.2  # of a panel's height over its width: a leg's would be twice
LINE = 74  # characters that fit beside a row
HEATS = (("error_probability", "error probability", "inferno"), ("conflict", "conflict (kappa)", "magma"))


class Sight(NamedTuple):
    """The slice of a region.

    grey: each modality in [0, 1]; base: the one on which the maps lie. region: the region's voxels. maps:
    error_probability and conflict, 0 to 1. view: the whole slice; near: the region and its surroundings.
    """

    grey: Float[np.ndarray, "m h w"]
    base: int
    present: Bool[np.ndarray, " m"]
    true: Integer[np.ndarray, "h w"]
    delivered: Integer[np.ndarray, "h w"]
    region: Bool[np.ndarray, "h w"]
    maps: Mapping[str, Float[np.ndarray, "h w"]]
    view: View
    near: View


class Row(NamedTuple):
    """A region on the sheet. cause: of `explanation.CAUSES`; words: what stands beside it, paragraph by paragraph."""

    heading: str
    cause: str
    words: Sequence[str]
    sight: Sight


def look(
    volume: Volume,
    scans: Sequence[Float[np.ndarray, "d h w"]],
    prediction: Mapping[str, Any],
    region: Bool[np.ndarray, "h w"],
    z: int,
    reference: int,
) -> Sight:
    """A region in its slice z. scans: each modality in [0, 1] (`slices.window`); reference: that of the grid."""
    assert volume.label is not None, "the sheet shows the truth"
    view = slices.make_view(volume.body, volume.spacing)
    return Sight(
        grey=np.stack([scan[z] for scan in scans]),
        base=reference if volume.present[reference] else int(np.argmax(volume.present)),
        present=volume.present,
        true=volume.label[z],
        delivered=prediction["label"][z],
        region=region,
        maps={name: np.array(prediction[name][z]) for name, _, _ in HEATS},  # a copy lets go of the whole map
        view=view,
        near=slices.zoomed(view, region, volume.spacing),
    )


def sheet(rows: Sequence[Row], modalities: Sequence[str], classes: int, title: str) -> Figure:
    """The regions in radiological orientation, pixels in their true proportions; a missing modality says so."""
    panels = 1 + len(modalities) + len(HEATS)
    heights = [SIDE * min(row.sight.view.extent[3] / row.sight.view.extent[1], TALLEST) for row in rows]
    size = (SIDE * panels + WORDS, sum(heights) + 0.06 * len(rows) + 1.0)
    picture = Figure(figsize=size, dpi=100, layout="constrained")
    axes = picture.subplots(
        len(rows) + 1,
        panels + 1,
        squeeze=False,
        height_ratios=[*heights, 0.3],
        width_ratios=[SIDE] * panels + [WORDS],
    )
    for row, own in zip(rows, axes, strict=False):
        draw(row, [*own], classes)
    titles = ["whole slice", *modalities, *(words for _, words, _ in HEATS)]
    for axis, name in zip(axes[0], titles, strict=False):
        axis.set_title(name, fontsize=9)
    for axis in axes[-1]:
        axis.set_axis_off()
    for axis, (_, _, cmap) in zip(axes[-1, -1 - len(HEATS) :], HEATS, strict=False):
        figures.colour_key(axis, cmap, ("0", "", "0.5 or more"))
        axis.set(xlim=(0, 1), ylim=(0, 1))
    lines = (("true outline", TRUE), ("delivered outline", DELIVERED), ("the region", REGION))
    key = [Line2D([], [], color=colour, linewidth=2.5, label=words) for words, colour in lines]
    picture.legend(handles=key, loc="outside lower left", ncols=3, fontsize=9, facecolor="#8A8A8A")
    picture.suptitle(f"{title}, in the slice of their centre; the patient's right is on the left", fontsize=10)
    return picture


def draw(row: Row, axes: Sequence[Axes], classes: int) -> None:
    """One row: the whole slice, then near the region the modalities and the maps over the dimmed scan, then words."""
    sight, last = row.sight, axes[-1]
    base = sight.grey[sight.base]

    def scan(axis: Axes, grey: np.ndarray, view: View) -> None:
        shown = slices.radiological(grey, view)
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=view.extent, interpolation="bilinear")

    def outlines(axis: Axes, view: View) -> None:
        slices.outline(axis, sight.region, view, REGION, width=0.9)
        for mask, colour in ((sight.true, TRUE), (sight.delivered, DELIVERED)):
            for k in range(1, classes):
                slices.outline(axis, mask == k, view, colour, width=1.2)
        left, right, bottom, top = view.extent
        axis.set(xlim=(left, right), ylim=(bottom, top))  # contours reach half a pixel beyond

    for axis in axes:
        axis.set(xticks=[], yticks=[])
    whole, *scans = axes[: 1 + len(sight.grey)]
    scan(whole, base, sight.view)
    outlines(whole, sight.view)
    if sight.near is not sight.view:
        slices.box(whole, sight.near, sight.view)
    for axis, grey, here in zip(scans, sight.grey, sight.present, strict=True):
        if here:
            scan(axis, grey, sight.near)
            outlines(axis, sight.near)
        else:
            slices.blank(axis, "missing")
    for axis, (name, _, cmap) in zip(axes[1 + len(scans) :], HEATS, strict=False):
        scan(axis, 0.55 * base, sight.near)
        heat = slices.heat_rgba(slices.radiological(sight.maps[name], sight.near), 0.5, cmap)
        axis.imshow(heat, extent=sight.near.extent, interpolation="nearest")
        outlines(axis, sight.near)
    last.set_axis_off()
    _, colour = figures.CAUSE_KEY[row.cause]
    tag = {"facecolor": colour, "edgecolor": "none", "pad": 2}
    text = "\n".join(textwrap.fill(words, LINE) for words in row.words)
    for down, words, how in (
        (4, row.heading, {"fontsize": 9, "fontweight": "bold", "bbox": tag}),
        (22, text, {"fontsize": 8, "linespacing": 1.25}),
    ):
        last.annotate(
            words, (0.02, 1.0), xytext=(0, -down), xycoords="axes fraction", textcoords="offset points", va="top",
            color=slices.INK, parse_math=False, **how,
        )  # fmt: skip
