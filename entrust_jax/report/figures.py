"""The one-page picture of a prediction, for a reader who looks at it for ten seconds.

What it shows; `slices` draws one slice, `page` puts the pictures and the text in their places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize, to_rgba
from matplotlib.patches import Rectangle

from entrust_jax.report.page import WIDTH, Line, Panel, compose
from entrust_jax.report.slices import (
    CLASS_COLOURS,
    FAINT,
    INK,
    View,
    blank,
    box,
    heat_rgba,
    make_view,
    note,
    number_marks,
    outline,
    position,
    radiological,
    side_marks,
    signed_rgba,
    window,
    zoomed,
)
from entrust_jax.trustmap import explanation

if TYPE_CHECKING:
    from entrust_jax.data.preprocess import Volume

CAUSE_KEY = {
    "missing input": ("a scan is missing", "#CC79A7"),
    "conflict": ("scans contradict", "#D55E00"),
    "ignorance": ("no scan is clear", "#56B4E9"),
    "boundary": ("edge of the outline", "#F0E442"),
    "other": ("other", "#B0B0B0"),
}
SHOWN_REGIONS = 3


def informative_slice(prediction: Mapping[str, Any], body: np.ndarray) -> tuple[int, str]:
    """The axial slice that tells most, and why it was chosen.

    The largest expected number of wrong voxels, counted where something was found or the error probability is
    above that of a review (over the whole body the background's small probabilities would win); without any, the
    largest lesion; without that, the middle of the body.
    """
    label, error = prediction["label"] > 0, prediction["error_probability"]
    expected = np.where(label | (error > explanation.REVIEW_THRESHOLD), error, 0.0).sum(axis=(1, 2), dtype=np.float64)
    if expected.max() > 0:
        return int(expected.argmax()), "where most voxels are expected to be wrong"
    if label.any():
        return int(label.sum(axis=(1, 2)).argmax()), "where the finding is largest"
    inside = np.flatnonzero(body.any(axis=(1, 2)))
    return int(inside[len(inside) // 2]) if inside.size else body.shape[0] // 2, "the middle of the scan"


def overview(
    path: Path,
    prediction: Mapping[str, Any],
    volume: Volume,
    *,
    modalities: Sequence[str],
    reference: str,
    classes: Sequence[str],
    title: str,
    warnings: Sequence[str] = (),
) -> None:
    """Writes the picture as PNG. Maps that the method does not make are left out; missing modalities say so.

    prediction: the dict of one case; its regions are listed in their order.
    """
    body = volume.body if volume.body.any() else np.ones_like(volume.body)
    view = make_view(body, volume.spacing)
    chosen, why = informative_slice(prediction, body)
    doubt = (prediction["label"][chosen] > 0) | (prediction["error_probability"][chosen] > explanation.REVIEW_THRESHOLD)
    near = zoomed(view, doubt, volume.spacing)
    records = list(prediction.get("records", ()))[:SHOWN_REGIONS]
    places = marks(prediction, records, chosen)
    panels = make_panels(
        prediction,
        volume,
        view,
        near,
        chosen,
        places,
        modalities=modalities,
        reference=reference,
        classes=classes,
    )
    present = [name for name, here in zip(modalities, volume.present, strict=True) if here]
    missing = [name for name, here in zip(modalities, volume.present, strict=True) if not here]
    header = f"Axial slice {chosen} of 0 to {body.shape[0] - 1}, {why}.   Scans used: {', '.join(present)}."
    if missing:
        header += f"   Missing: {', '.join(missing)}."
    if near is not view:
        header += "   The dashed box is shown enlarged."
    compose(
        path,
        panels,
        aspect=view.extent[3] / view.extent[1],
        title=title,
        header=header,
        result=result_lines(prediction),
        review=review_lines(records, len(prediction.get("records", ()))),
        notes=list(warnings),
    )


def make_panels(
    prediction: Mapping[str, Any],
    volume: Volume,
    view: View,
    near: View,
    chosen: int,
    places: Sequence[tuple[int, int, int]],
    *,
    modalities: Sequence[str],
    reference: str,
    classes: Sequence[str],
) -> list[Panel]:
    """Scans and result in the full view, doubts and reasons in the near one.

    A review region that the chosen slice does not meet gets a picture of its own.
    """
    base = modalities.index(reference)
    if not volume.present[base]:
        base = int(np.argmax(volume.present))
    scans = [window(volume.image[m], volume.body) for m in range(len(modalities))]

    def scan(axes: Axes, m: int, z: int, shown: View, dim: float = 1.0) -> None:
        picture = radiological(scans[m][z], shown) * dim
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=shown.extent, interpolation="bilinear")
        side_marks(axes)
        if shown is view and near is not view and z == chosen:
            box(axes, near, view)

    def show_scan(axes: Axes, m: int) -> None:
        if volume.present[m]:
            scan(axes, m, chosen, view)
        else:
            blank(axes, f"{modalities[m]}\nmissing")

    def show_result(axes: Axes, z: int, numbers: Sequence[int]) -> None:
        scan(axes, base, z, view)
        for index in range(1, len(classes)):
            outline(axes, prediction["label"][z] == index, view, CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)])
        if not (prediction["label"][z] > 0).any():
            note(axes, "nothing found in this slice" if prediction["label"].any() else "nothing found")
        points = [position(places[n][1], places[n][2], view) for n in numbers]
        number_marks(axes, points, [n + 1 for n in numbers], view)

    def show_hypotheses(axes: Axes) -> None:
        scan(axes, base, chosen, near)
        for member in prediction["hypotheses"]:
            outline(axes, member[chosen] > 0, near, "#56B4E9", width=0.8, alpha=0.6, halo=False)
        outline(axes, prediction["label"][chosen] > 0, near, "#E69F00", width=1.6)

    def heat(name: str, top: float, cmap: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            scan(axes, base, chosen, near, dim=0.55)
            axes.imshow(
                heat_rgba(radiological(prediction[name][chosen], near), top, cmap),
                extent=near.extent,
                interpolation="nearest",
            )
            outline(axes, prediction["label"][chosen] > 0, near, "#FFFFFF", width=0.9, halo=False)

        return draw

    def show_cause(axes: Axes) -> None:
        scan(axes, base, chosen, near, dim=0.55)
        colours = [to_rgba("black", 0.0)] + [to_rgba(CAUSE_KEY[name][1], 0.9) for name in explanation.CAUSES[1:]]
        codes = radiological(prediction["cause"][chosen], near)
        axes.imshow(np.array(colours)[codes], extent=near.extent, interpolation="nearest")
        outline(axes, prediction["label"][chosen] > 0, near, "#FFFFFF", width=0.9, halo=False)

    def show_attribution(axes: Axes, m: int) -> None:
        scan(axes, base, chosen, near, dim=0.55)
        axes.imshow(
            signed_rgba(radiological(prediction["attribution"][m, chosen], near), limit),
            extent=near.extent,
            interpolation="nearest",
        )
        outline(axes, prediction["label"][chosen] > 0, near, "#FFFFFF", width=0.9, halo=False)

    on_slice = [n for n, place in enumerate(places) if place[0] == chosen]
    key_height = 0.24 * math.ceil((len(classes) - 1) / class_columns(classes))
    panels = [Panel(name, lambda axes, m=m: show_scan(axes, m)) for m, name in enumerate(modalities)]
    panels.append(
        Panel(
            f"Result, on {modalities[base]}",
            lambda axes: show_result(axes, chosen, on_slice),
            lambda axes: class_key(axes, classes),
            key_height,
        )
    )
    if "hypotheses" in prediction:
        panels.append(
            Panel(
                f"{len(prediction['hypotheses'])} plausible outlines",
                show_hypotheses,
                lambda axes: line_key(axes, (("plausible", "#56B4E9"), ("delivered", "#E69F00"))),
                0.24,
            )
        )
    ways = math.log(len(classes))
    scales = (
        (
            "error_probability",
            "Chance that the label is wrong",
            0.5,
            "inferno",
            ("0 %", "25 %", "50 % or more"),
        ),
        (
            "divergence",
            "How far the outlines differ",
            0.5 * ways,
            "viridis",
            ("none", "", "half the maximum or more"),
        ),
        ("conflict", "Conflict between the scans", 0.5, "magma", ("0", "0.25", "0.5 or more")),
    )
    if "divergence" not in prediction and "entropy" in prediction:
        scales += (("entropy", "Uncertainty (entropy)", ways, "viridis", ("none", "", "maximum")),)
    for name, words, top, cmap, ticks in scales:
        if name in prediction:
            panels.append(
                Panel(
                    words,
                    heat(name, top, cmap),
                    lambda axes, cmap=cmap, ticks=ticks: colour_key(axes, cmap, ticks),
                    0.36,
                )
            )
    if "cause" in prediction:
        panels.append(Panel("Why it is uncertain", show_cause, cause_key, 0.66))
    if "attribution" in prediction:
        shown = np.abs(prediction["attribution"][:, chosen][:, volume.body[chosen]])
        limit = max(0.5, float(np.percentile(shown, 99.5)) if shown.size else 0.5)
        panels += [
            Panel(
                f"Does {name} support the result?",
                lambda axes, m=m: show_attribution(axes, m),
                lambda axes: colour_key(axes, "PuOr", ("against it", "neutral", "for it")),
                0.36,
            )
            for m, name in enumerate(modalities)
            if volume.present[m]
        ]
    by_slice: dict[int, list[int]] = {}
    for n, place in enumerate(places):
        if place[0] != chosen:
            by_slice.setdefault(place[0], []).append(n)
    for z, numbers in by_slice.items():
        names = " and ".join(str(n + 1) for n in numbers)
        panels.append(
            Panel(
                f"Review {names}: slice {z}",
                lambda axes, z=z, numbers=numbers: show_result(axes, z, numbers),
                lambda axes: class_key(axes, classes),
                key_height,
            )
        )
    return panels


def marks(
    prediction: Mapping[str, Any], records: Sequence[Mapping[str, Any]], chosen: int
) -> list[tuple[int, int, int]]:
    """Where to number each review region (D, H, W): in the chosen slice if it is there too."""
    components = explanation.components(prediction["error_probability"], prediction.get("cause"))
    found = []
    for record in records:
        z, h, w = (record["place"][key] for key in ("slice", "row", "column"))
        here = np.argwhere((components[chosen] == components[z, h, w]) & (components[chosen] > 0))
        if len(here):
            h, w = here[np.argmin(((here - here.mean(0)) ** 2).sum(1))].tolist()
            z = chosen
        found.append((z, h, w))
    return found


def swatches(axes: Axes, entries: Sequence[tuple[str, str]], columns: int) -> None:
    """Coloured squares with words, row by row; the axes are as wide as a panel."""
    rows = math.ceil(len(entries) / columns)
    for index, (words, colour) in enumerate(entries):
        row, column = divmod(index, columns)
        y = 1 - (row + 0.5) / rows
        height = 0.115 / (axes.get_position().height * axes.figure.get_size_inches()[1])  # type: ignore[union-attr]
        axes.add_patch(
            Rectangle(
                (column / columns, y - height / 2),
                0.115 / WIDTH,
                height,
                facecolor=colour,
                edgecolor=INK,
                linewidth=0.5,
            )
        )
        axes.text(column / columns + 0.19 / WIDTH, y, words, fontsize=9, va="center", color=INK, parse_math=False)


def class_columns(classes: Sequence[str]) -> int:
    """How many class names go side by side below a panel, so that they do not touch."""
    longest = max(len(name) for name in classes[1:])
    return 3 if longest <= 9 else 2 if longest <= 17 else 1


def class_key(axes: Axes, classes: Sequence[str]) -> None:
    entries = [(name, CLASS_COLOURS[i % len(CLASS_COLOURS)]) for i, name in enumerate(classes[1:])]
    swatches(axes, entries, class_columns(classes))


def line_key(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    swatches(axes, entries, 2)


def cause_key(axes: Axes) -> None:
    swatches(axes, [CAUSE_KEY[name] for name in explanation.CAUSES[1:]], 2)


def colour_key(axes: Axes, cmap: str, ticks: Sequence[str]) -> None:
    """A colour bar with words below: at its left end, its middle and its right end."""
    low = 0.0 if cmap == "PuOr" else 0.2  # the heat maps leave out the darkest fifth, which is lost on a scan
    colours = ListedColormap(colormaps[cmap](np.linspace(low, 1.0, 128)))
    axes.imshow(
        np.linspace(0, 1, 128)[None],
        cmap=colours,
        norm=Normalize(0, 1),
        extent=(0, 1, 0.62, 0.95),
        aspect="auto",
    )
    for x, words, align in zip((0.0, 0.5, 1.0), ticks, ("left", "center", "right"), strict=True):
        axes.text(x, 0.5, words, fontsize=8.5, ha=align, va="top", color=INK)


def millilitres(volume: float) -> str:
    """Two decimals below 10 ml, one above: about what a contour can mean."""
    return f"{volume:.2f}" if volume < 10 else f"{volume:.1f}"


def result_lines(prediction: Mapping[str, Any]) -> list[Line]:
    lines = [Line("Result", 13.0, "bold", step=0.3)]
    dice = prediction.get("predicted_dice")
    if dice is None or not math.isfinite(dice):
        lines.append(Line("Predicted Dice: not available", 11.0, step=0.24))
    else:
        lines.append(Line(f"Predicted Dice: {dice:.2f}", 11.5, "bold", step=0.22))
        words = "expected overlap with an expert's outline; 1 is perfect"
        if not prediction["label"].any():
            words = "nothing was found, so there is no overlap to expect: look at the scans"
        lines.append(Line(words, 9.5, colour=FAINT, step=0.3))
    for name, measured in prediction["regions"].items():
        lines.append(Line(f"{name}: {millilitres(measured['volume_ml'])} ml", 11.5, "bold", step=0.21))
        interval = measured.get("interval")
        if interval is not None:
            lines.append(
                Line(
                    f"90 % of the hypotheses: {millilitres(interval[0])} to {millilitres(interval[1])} ml",
                    10.0,
                    indent=0.12,
                    step=0.26,
                )
            )
    return lines


def review_lines(records: Sequence[Mapping[str, Any]], total: int) -> list[Line]:
    if not records:
        return [
            Line("Review first", 13.0, "bold", step=0.3),
            Line("No region has an error probability above the threshold for review.", 11.0, step=0.24),
        ]
    more = f" ({len(records)} of {total} regions; all are in report.json)" if total > len(records) else ""
    lines = [Line(f"Review first{more}", 13.0, "bold", step=0.32)]
    for number, record in enumerate(records, start=1):
        lines.append(Line(record["sentence"], 11.0, indent=0.34, step=0.205, badge=str(number)))
    return lines
