"""The one-page picture of a prediction, for a reader who looks at it for ten seconds.

Axial slices are shown as a radiologist hangs them: anterior up, the patient's right on the left of the
picture, pixels in their true proportions.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.patheffects import withStroke
from scipy import ndimage

from entrust_jax.trustmap import explanation

if TYPE_CHECKING:
    from entrust_jax.data.preprocess import Volume

# Okabe and Ito's colours stay apart under common colour blindness; those that stand out on grey come first.
CLASS_COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
CAUSE_KEY = {
    "missing input": ("a scan is missing", "#CC79A7"),
    "conflict": ("scans contradict", "#D55E00"),
    "ignorance": ("no scan is clear", "#56B4E9"),
    "boundary": ("edge of the outline", "#F0E442"),
    "other": ("other", "#B0B0B0"),
}
INK, FAINT, PAPER = "#1A1A1A", "#5A5A5A", "#F4F5F7"
SHOWN_REGIONS = 3
ZOOM_BELOW = 0.6  # share of the window's side: smaller findings are shown enlarged
ZOOM_FLOOR = 0.3
DPI = 110
WIDTH, GAP, MARGIN, TITLE = (
    3.1,
    0.18,
    0.4,
    0.30,
)  # inches: a panel's width, between panels, round the page, a panel's title


@dataclass(frozen=True)
class View:
    """What a panel shows: voxels of H (rows) and W (columns); extent (left, right, bottom, top) in mm."""

    rows: slice
    columns: slice
    extent: tuple[float, float, float, float]


@dataclass(frozen=True)
class Panel:
    """One picture with its title and, below it, a key of the given height in inches."""

    title: str
    draw: Callable[[Axes], None]
    key: Callable[[Axes], None] | None = None
    key_height: float = 0.0


@dataclass(frozen=True)
class Line:
    """One line of the text below the pictures; `step` is the distance to the next in inches."""

    text: str
    size: float
    weight: str = "normal"
    colour: str = INK
    indent: float = 0.0
    step: float = 0.2
    badge: str = ""


def make_view(body: np.ndarray, spacing: Sequence[float]) -> View:
    """The body's bounding box in H and W, a little wider. body [D, H, W]; spacing in mm along D, H, W."""
    spans = []
    for axis in (1, 2):
        hit = np.flatnonzero(body.any(axis=(0, 3 - axis)))
        low, high = (int(hit[0]), int(hit[-1]) + 1) if hit.size else (0, body.shape[axis])
        edge = max(2, round(0.04 * (high - low)))
        spans.append(slice(max(0, low - edge), min(body.shape[axis], high + edge)))
    rows, columns = spans
    return View(
        rows,
        columns,
        (0.0, (rows.stop - rows.start) * spacing[1], 0.0, (columns.stop - columns.start) * spacing[2]),
    )


def radiological(plane: np.ndarray, view: View) -> np.ndarray:
    """An axial plane [H, W] (x towards the patient's right, y towards anterior) as picture rows and columns.

    Anterior is up, the patient's right on the left.
    """
    return np.swapaxes(plane[view.rows, view.columns], 0, 1)[::-1, ::-1]


def position(h: int | float, w: int | float, view: View) -> tuple[float, float]:
    """Where the centre of voxel (h, w) lies in the picture, in mm from its lower left corner."""
    _, width, _, height = view.extent
    across = (h + 0.5 - view.rows.start) / (view.rows.stop - view.rows.start)
    up = (w + 0.5 - view.columns.start) / (view.columns.stop - view.columns.start)
    return width * (1 - across), height * up


def zoomed(view: View, interest: np.ndarray, spacing: Sequence[float]) -> View:
    """The same window, or a part of it in the same proportions where interest, bool [H, W], is small."""
    hit = np.argwhere(interest[view.rows, view.columns])
    if not len(hit):
        return view
    full = np.array([view.rows.stop - view.rows.start, view.columns.stop - view.columns.start])
    low, high = hit.min(0), hit.max(0) + 1
    share = max(1.2 * float(((high - low + 6) / full).max()), ZOOM_FLOOR)  # room round the finding
    if share > ZOOM_BELOW:
        return view
    size = np.maximum(np.round(share * full).astype(int), 1)
    start = np.clip((low + high - size) // 2, 0, full - size) + np.array([view.rows.start, view.columns.start])
    rows, columns = (slice(int(a), int(a + n)) for a, n in zip(start, size, strict=True))
    return View(rows, columns, (0.0, float(size[0] * spacing[1]), 0.0, float(size[1] * spacing[2])))


def informative_slice(prediction: Mapping[str, Any], body: np.ndarray, threshold: float) -> tuple[int, str]:
    """The axial slice that tells most, and why it was chosen.

    The largest expected number of wrong voxels, counted where something was found or the error probability is
    above the threshold (over the whole body the background's small probabilities would win); without any, the
    largest lesion; without that, the middle of the body.
    """
    label, error = prediction["label"] > 0, prediction["error_probability"]
    expected = np.where(label | (error > threshold), error, 0.0).sum(axis=(1, 2), dtype=np.float64)
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
    threshold: float = 0.2,
) -> None:
    """Writes the picture as PNG. Maps that the method does not make are left out; missing modalities say so.

    prediction: the dict of one case; its regions are listed in their order.
    threshold: error probability from which a region is up for review, as used for prediction["records"].
    """
    body = volume.body if volume.body.any() else np.ones_like(volume.body)
    view = make_view(body, volume.spacing)
    chosen, why = informative_slice(prediction, body, threshold)
    doubt = (prediction["label"][chosen] > 0) | (prediction["error_probability"][chosen] > threshold)
    near = zoomed(view, doubt, volume.spacing)
    records = list(prediction.get("records", ()))[:SHOWN_REGIONS]
    places = marks(prediction["error_probability"], records, chosen, threshold)
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
            right, bottom = position(near.rows.start - 0.5, near.columns.start - 0.5, view)
            axes.add_patch(
                Rectangle(
                    (right, bottom),
                    -near.extent[1],
                    near.extent[3],
                    fill=False,
                    edgecolor="white",
                    linewidth=1.0,
                    linestyle=(0, (4, 3)),
                )
            )

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
    error: np.ndarray, records: Sequence[Mapping[str, Any]], chosen: int, threshold: float
) -> list[tuple[int, int, int]]:
    """Where to number each review region (D, H, W): in the chosen slice if it is there too."""
    components, _ = ndimage.label(error > threshold, structure=np.ones((3, 3, 3)))  # type: ignore[misc]
    found = []
    for record in records:
        z, h, w = (record["place"][key] for key in ("slice", "row", "column"))
        here = np.argwhere((components[chosen] == components[z, h, w]) & (components[chosen] > 0))
        if len(here):
            h, w = here[np.argmin(((here - here.mean(0)) ** 2).sum(1))].tolist()
            z = chosen
        found.append((z, h, w))
    return found


def window(image: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Grey values [D, H, W] in [0, 1]: the body's 1st to 99.7th percentile, and black outside the body."""
    values = image[body] if body.any() else image.ravel()
    low, high = np.percentile(values, (1.0, 99.7))
    return np.clip((image - low) / max(float(high - low), 1e-6), 0.0, 1.0) * body


def heat_rgba(values: np.ndarray, top: float, cmap: str) -> np.ndarray:
    """Colours that fade in over the first fifth of the scale, so that anatomy shows where no doubt is."""
    scaled = np.clip(np.nan_to_num(values) / top, 0.0, 1.0)
    colours = colormaps[cmap](0.2 + 0.8 * scaled)
    colours[..., 3] = np.clip(scaled / 0.2, 0.0, 1.0) * 0.95
    return colours


def signed_rgba(values: np.ndarray, limit: float) -> np.ndarray:
    """Orange against, purple for, clear at zero."""
    scaled = np.clip(np.nan_to_num(values) / limit, -1.0, 1.0)
    colours = colormaps["PuOr"](0.5 + 0.5 * scaled)
    colours[..., 3] = np.clip(np.abs(scaled) / 0.2, 0.0, 1.0) * 0.95
    return colours


def outline(
    axes: Axes,
    mask: np.ndarray,
    view: View,
    colour: str,
    *,
    width: float = 1.7,
    alpha: float = 1.0,
    halo: bool = True,
) -> None:
    """The border of a mask [H, W]; a dark halo keeps it visible on bright tissue."""
    shown = radiological(mask, view)
    if not shown.any():
        return
    rows, columns = shown.shape
    dx, dy = view.extent[1] / columns, view.extent[3] / rows
    x = (np.arange(-1, columns + 1) + 0.5) * dx
    y = view.extent[3] - (np.arange(-1, rows + 1) + 0.5) * dy
    # The frame of zeros closes outlines that touch the window's edge.
    padded = np.pad(shown.astype(np.float32), 1)
    if halo:
        axes.contour(x, y, padded, levels=[0.5], colors="black", linewidths=width + 1.4, alpha=0.7 * alpha)
    axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=width, alpha=alpha)


def number_marks(axes: Axes, points: Sequence[tuple[float, float]], numbers: Sequence[int], view: View) -> None:
    """Numbered discs beside the points: each at that of sixteen places which is farthest from the others."""
    _, width, _, height = view.extent
    taken: list[tuple[float, float]] = []
    for number, (x, y) in zip(numbers, points, strict=True):
        angles = np.arange(16) * np.pi / 8 + np.pi / 4
        around = np.stack([x + 0.13 * width * np.cos(angles), y + 0.13 * width * np.sin(angles)], axis=1)
        others = np.array([p for p in points if p != (x, y)] + taken or [(width / 2, height / 2)])
        room = np.linalg.norm(around[:, None] - others[None], axis=-1).min(axis=1)
        margin = 0.07 * width
        inside = (np.abs(around - (width / 2, height / 2)) < (width / 2 - margin, height / 2 - margin)).all(axis=1)
        spot = around[int(np.argmax(np.where(inside, room, -1.0)))]
        taken.append((float(spot[0]), float(spot[1])))
        axes.annotate(
            str(number),
            xy=(x, y),
            xytext=(float(spot[0]), float(spot[1])),
            fontsize=10,
            fontweight="bold",
            color="black",
            ha="center",
            va="center",
            bbox={
                "boxstyle": "circle,pad=0.22",
                "facecolor": "white",
                "edgecolor": "black",
                "linewidth": 0.8,
            },
            arrowprops={
                "arrowstyle": "-",
                "color": "white",
                "linewidth": 1.1,
                "shrinkA": 0,
                "shrinkB": 2,
                "path_effects": [withStroke(linewidth=2.6, foreground="black")],
            },
        )


def side_marks(axes: Axes) -> None:
    """R and L: the patient's sides. A picture without them can be misread."""
    for x, mark in ((0.03, "R"), (0.97, "L")):
        axes.text(
            x,
            0.5,
            mark,
            transform=axes.transAxes,
            color="white",
            path_effects=[withStroke(linewidth=2.0, foreground="black")],
            fontsize=9,
            fontweight="bold",
            ha="left" if mark == "R" else "right",
            va="center",
        )


def blank(axes: Axes, words: str) -> None:
    axes.set_facecolor("#E4E6EA")
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=14, color=FAINT)


def note(axes: Axes, words: str) -> None:
    axes.text(
        0.5,
        0.04,
        words,
        transform=axes.transAxes,
        ha="center",
        va="bottom",
        fontsize=10,
        color="white",
        bbox={"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 2},
    )


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
        lines.append(Line("expected overlap with an expert's outline; 1 is perfect", 9.5, colour=FAINT, step=0.3))
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
        lines.append(Line(explanation.sentence(dict(record)), 11.0, indent=0.34, step=0.205, badge=str(number)))
    return lines


def wrap(text: str, width: float, size: float, weight: str, renderer: Any) -> list[str]:
    """Breaks a text into lines that fit in `width` inches as drawn; longer words are broken."""
    font = FontProperties(size=size, weight=weight)

    def fits(words: str) -> bool:
        return renderer.get_text_width_height_descent(words, font, ismath=False)[0] <= width * DPI

    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] = f"{lines[-1]} {word}"
            continue
        while not fits(word) and len(word) > 1:
            cut = max(1, bisect.bisect(range(1, len(word)), 0, key=lambda n: not fits(word[:n])))
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    return lines or [""]


def lay_out(lines: Sequence[Line], width: float, renderer: Any) -> list[Line]:
    """Wraps every line to the card's width; the first piece carries the badge, room follows the last."""
    out: list[Line] = []
    for line in lines:
        pieces = wrap(line.text, width - line.indent, line.size, line.weight, renderer)
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            step = line.step if not last else line.step + (0.11 if line.badge else 0.0)
            if not last:
                step = max(0.018 * line.size, 0.17)
            out.append(
                Line(
                    piece,
                    line.size,
                    line.weight,
                    line.colour,
                    line.indent,
                    step,
                    line.badge if index == 0 else "",
                )
            )
    return out


def grid_columns(count: int, cell: float, words: float) -> int:
    """Panels a row, three to six: a page about 0.8 as tall as wide, like a screen, with few empty places.

    cell: a row's height in inches; words: about what the text needs.
    """

    def cost(n: int) -> float:
        page = math.ceil(count / n) * cell + words
        return abs(math.log(page / (n * (WIDTH + GAP)) / 0.8)) + (-count % n) / n

    return min(range(3, 7), key=cost)


def compose(
    path: Path,
    panels: Sequence[Panel],
    *,
    aspect: float,
    title: str,
    header: str,
    result: Sequence[Line],
    review: Sequence[Line],
    notes: Sequence[str],
) -> None:
    """Places panels and cards on a page as tall as they need, in inches from the top left, and saves it."""
    picture = WIDTH * min(max(aspect, 0.6), 1.4)
    columns = grid_columns(len(panels), TITLE + picture + 0.4, 3.5)
    page = 2 * MARGIN + columns * WIDTH + (columns - 1) * GAP
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()

    inner = page - 2 * MARGIN
    pad = 0.2
    left = WIDTH + 0.35 * (columns > 3)
    cards = (
        lay_out(result, left - 2 * pad, renderer),
        lay_out(review, inner - left - GAP - 2 * pad, renderer),
    )
    card_height = max(sum(line.step for line in card) for card in cards) + 2 * pad
    disclaimer = (
        "Research software, not a medical device: not for diagnosis or treatment. "
        "The doubts shown are the model's own; it can be wrong without doubt."
    )
    foot = lay_out(
        [Line(f"Note: {words}", 10.0, colour=INK, step=0.22) for words in notes]
        + [Line(disclaimer, 10.0, colour=FAINT, step=0.22)],
        inner,
        renderer,
    )
    title_lines = wrap(title, inner, 17.0, "bold", renderer)
    header_lines = wrap(header, inner, 11.0, "normal", renderer)
    head = MARGIN + 0.32 * len(title_lines) + 0.22 * len(header_lines) + 0.12
    row_heights = [TITLE + picture + max(panel.key_height for panel in row) + 0.2 for row in rows]
    tall = head + sum(row_heights) + 0.05 + card_height + 0.2 + sum(line.step for line in foot) + MARGIN * 0.7

    figure = Figure(figsize=(page, tall), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / page, 1 - y / tall, text, parse_math=False, **style)

    def place(x: float, y: float, w: float, h: float) -> Axes:
        axes = figure.add_axes((x / page, 1 - (y + h) / tall, w / page, h / tall))
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    y = MARGIN
    for text in title_lines:
        write(MARGIN, y, text, fontsize=17, fontweight="bold", color=INK, va="top")
        y += 0.32
    for text in header_lines:
        write(MARGIN, y, text, fontsize=11, color=FAINT, va="top")
        y += 0.22
    y = head
    for row, row_height in zip(rows, row_heights, strict=True):
        for index, panel in enumerate(row):
            x = MARGIN + index * (WIDTH + GAP)
            write(x, y + TITLE - 0.08, panel.title, fontsize=11, fontweight="bold", color=INK, va="baseline")
            axes = place(x, y + TITLE, WIDTH, picture)
            axes.set_facecolor("black")
            panel.draw(axes)
            if axes.images:  # outlines widen the limits
                left_edge, right_edge, low, high = axes.images[0].get_extent()
                axes.set_xlim(left_edge, right_edge)
                axes.set_ylim(low, high)
                axes.set_aspect("equal")
            if panel.key is not None:
                key = place(x, y + TITLE + picture + 0.07, WIDTH, panel.key_height)
                key.patch.set_visible(False)
                key.set_xlim(0, 1)
                key.set_ylim(0, 1)
                panel.key(key)
                key.set_xlim(0, 1)
                key.set_ylim(0, 1)
        y += row_height
    y += 0.05
    for x, w, card in ((MARGIN, left, cards[0]), (MARGIN + left + GAP, inner - left - GAP, cards[1])):
        figure.add_artist(
            FancyBboxPatch(
                (x / page, 1 - (y + card_height) / tall),
                w / page,
                card_height / tall,
                boxstyle="square,pad=0",
                transform=figure.transFigure,
                facecolor=PAPER,
                edgecolor="#D5D8DD",
                linewidth=0.8,
            )
        )
        at = y + pad
        for line in card:
            if line.badge:
                write(
                    x + pad + 0.1,
                    at + 0.085,
                    line.badge,
                    fontsize=10,
                    fontweight="bold",
                    ha="center",
                    va="center",
                    bbox={
                        "boxstyle": "circle,pad=0.22",
                        "facecolor": "white",
                        "edgecolor": "black",
                        "linewidth": 0.8,
                    },
                )
            write(
                x + pad + line.indent,
                at,
                line.text,
                fontsize=line.size,
                fontweight=line.weight,
                color=line.colour,
                va="top",
            )
            at += line.step
    y += card_height + 0.2
    for line in foot:
        write(MARGIN, y, line.text, fontsize=line.size, color=line.colour, va="top")
        y += line.step
    figure.savefig(path, dpi=DPI)
