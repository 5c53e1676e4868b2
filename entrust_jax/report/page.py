"""A page of pictures with their keys above cards of text, as tall as they need."""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch

from entrust_jax.report.slices import FAINT, INK

PAPER = "#F4F5F7"
DPI = 110
WIDTH, GAP, MARGIN, TITLE = (
    3.1,
    0.18,
    0.4,
    0.30,
)  # inches: a panel's width, between panels, round the page, a panel's title


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


def grid_columns(count: int, cell: float, words: float) -> int:
    """Panels a row, three to six: a page about 0.8 as tall as wide, like a screen, with few empty places.

    cell: a row's height in inches; words: about what the text needs.
    """

    def cost(n: int) -> float:
        page = math.ceil(count / n) * cell + words
        return abs(math.log(page / (n * (WIDTH + GAP)) / 0.8)) + (-count % n) / n

    return min(range(3, 7), key=cost)


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
