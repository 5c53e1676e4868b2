"""One axial slice as a radiologist hangs it.

Anterior is up, the patient's right on the left of the picture, pixels in their true proportions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

# Okabe and Ito's colours stay apart under common colour blindness; those that stand out on grey come first.
CLASS_COLOURS = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
INK, FAINT = "#1A1A1A", "#5A5A5A"
ZOOM_BELOW = 0.6  # share of the window's side: smaller findings are shown enlarged
ZOOM_FLOOR = 0.3


@dataclass(frozen=True)
class View:
    """What a panel shows: voxels of H (rows) and W (columns); extent (left, right, bottom, top) in mm."""

    rows: slice
    columns: slice
    extent: tuple[float, float, float, float]


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


def box(axes: Axes, near: View, view: View) -> None:
    """A dashed frame round what another panel shows enlarged; dark beneath, to be seen on fat."""
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
            path_effects=[withStroke(linewidth=2.2, foreground="black")],
        )
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
