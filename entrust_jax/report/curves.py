"""Reliability, risk-coverage, conflict and phantom pictures."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

# Okabe & Ito: told apart with every common colour vision deficiency.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, FAINT = "#222222", "#999999"
STYLES = ("-", "--", "-.", ":")


def reliability_figure(
    panels: Mapping[str, Float[np.ndarray, "bins 3"]], title: str, notes: Mapping[str, str]
) -> Figure:
    """A reliability diagram per panel, side by side, each with its bin counts below.

    `panels` maps a panel's heading to its bins (voxels, sum of confidence, sum of correctness); `notes`
    adds a line under a heading, such as the calibration error. Points sit at the bin's mean confidence.
    """
    picture = Figure(figsize=(3.6 * len(panels) + 0.4, 4.6), dpi=150, layout="constrained")
    axes = picture.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, (heading, bins) in enumerate(panels.items()):
        curve, counts = axes[0, column], axes[1, column]
        filled = bins[:, 0] > 0
        size = np.where(filled, bins[:, 0], 1.0)
        confidence, accuracy = (bins[:, 1] / size)[filled], (bins[:, 2] / size)[filled]
        curve.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--", label="perfect calibration")
        curve.vlines(confidence, confidence, accuracy, color=COLOURS[1], linewidth=3, alpha=0.5, label="gap")
        curve.plot(confidence, accuracy, "o-", color=COLOURS[0], markersize=4, linewidth=1.4, label="observed")
        curve.set(xlim=(0, 1), ylim=(0, 1))
        curve.set_title(heading + (f"\n{notes[heading]}" if heading in notes else ""), fontsize=9, color=INK)
        edges = np.linspace(0, 1, bins.shape[0] + 1)
        counts.bar(
            edges[:-1],
            bins[:, 0],
            width=np.diff(edges),
            align="edge",
            color=COLOURS[0],
            edgecolor="white",
            linewidth=0.5,
        )
        if filled.any():
            counts.set_yscale("log")
            counts.set_ylim(bottom=0.5)  # a bar of one voxel shows
        counts.set_xlabel("predicted probability", fontsize=8, color=INK)
    axes[0, 0].set_ylabel("observed frequency", fontsize=8, color=INK)
    axes[1, 0].set_ylabel("voxels", fontsize=8, color=INK)
    axes[0, 0].legend(frameon=False, fontsize=7, loc="upper left")
    _dress(picture, axes.ravel(), title)
    return picture


def risk_coverage_figure(
    curves: Mapping[str, tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]],
    title: str,
    oracle: Mapping[str, tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]],
) -> Figure:
    """Mean risk of the cases kept against the share kept, one curve per method; `oracle` (same keys, or
    fewer) is drawn faintly: the best possible order of that method's cases."""
    picture = Figure(figsize=(4.8, 3.8), dpi=150, layout="constrained")
    axis = picture.subplots()
    for i, (name, (coverage, risk)) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(
            coverage,
            risk,
            STYLES[i % len(STYLES)],
            color=colour,
            linewidth=1.6,
            marker="o",
            markersize=3,
            label=name,
        )
        if name in oracle:
            axis.plot(*oracle[name], color=colour, linewidth=0.9, alpha=0.45, label=f"{name}: best order")
        if risk.size:
            axis.axhline(risk[-1], color=colour, linewidth=0.7, alpha=0.35, linestyle=":")
    axis.set(xlim=(0, 1.02))
    axis.set_ylim(0, 1.08 * max([float(risk.max()) for _, risk in curves.values() if risk.max() > 0], default=1.0))
    axis.set_xlabel("share of cases kept, most confident first", fontsize=8, color=INK)
    axis.set_ylabel("mean risk (1 - Dice) of those kept", fontsize=8, color=INK)
    if curves:
        axis.legend(frameon=False, fontsize=7)
    _dress(picture, np.array([axis]), title)
    return picture


def conflict_figure(
    profile: Float[np.ndarray, "bins 4"],
    effects: Float[np.ndarray, " n"],
    null: Float[np.ndarray, " p"],
    title: str,
    threshold: float,
) -> Figure:
    """Do hypotheses diverge where modalities conflict? Left: mean divergence in high and in low conflict at equal
    one-step entropy and border distance (`metrics.conflict.divergence_profile`); right: the difference, a dot per
    patient and their mean, beside its distribution when conflict is permuted within the strata."""
    picture = Figure(figsize=(8.4, 3.6), dpi=150, layout="constrained")
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))
    middle, high, low, weight = profile.T
    for values, name, colour in ((high, "above", COLOURS[1]), (low, "up to", COLOURS[0])):
        left.plot(middle, values, color=colour, linewidth=1.4, label=f"conflict {name} {threshold:g}")
        left.scatter(middle, values, s=40 * weight / max(weight.max(), 1e-9) + 2, color=colour)
    left.set(xlim=(0, 1), ylim=(0, None))
    left.set_xlabel("one-step entropy, share of log K (dot size: voxels compared)", fontsize=8, color=INK)
    left.set_ylabel("mean divergence (nats)", fontsize=8, color=INK)
    left.legend(frameon=False, fontsize=7, loc="upper left")
    right.axhline(0, color=FAINT, linewidth=1)
    right.violinplot([null], positions=[0], widths=0.6, showextrema=False)
    jitter = np.linspace(-0.15, 0.15, len(effects))
    right.plot(1 + jitter, effects, "o", color=COLOURS[0], markersize=3.5, alpha=0.7)
    right.hlines(effects.mean(), 0.75, 1.25, color=COLOURS[1], linewidth=2)
    right.set_xticks([0, 1], [f"conflict permuted\n({null.size} times)", f"observed\n({len(effects)} patients, mean)"])
    right.set_xlim(-0.6, 1.6)
    right.set_ylabel("divergence, high less low conflict (nats)", fontsize=8, color=INK)
    _dress(picture, np.array([left, right]), title)
    return picture


def blob_figure(
    posterior: Float[np.ndarray, " n"],
    panels: Mapping[str, Float[np.ndarray, " n"]],
    kinds: Mapping[str, Bool[np.ndarray, " n"]],
    title: str,
) -> Figure:
    """What a model says of each phantom blob against the analytic posterior, one panel a figure (its one-step belief,
    the share of hypotheses that show it), one colour a kind of blob; larger marks are means over equal posteriors."""
    picture = Figure(figsize=(3.8 * len(panels), 3.8), dpi=150, layout="constrained")
    axes = picture.subplots(1, len(panels), squeeze=False)[0]
    rng = np.random.default_rng(0)
    for axis, (heading, values) in zip(axes, panels.items(), strict=True):
        axis.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
        for (kind, chosen), colour in zip(kinds.items(), COLOURS, strict=False):
            jitter = 0.01 * rng.normal(size=int(chosen.sum()))
            axis.plot(posterior[chosen] + jitter, values[chosen], ".", color=colour, markersize=2, alpha=0.35)
            level, index = np.unique(np.round(posterior[chosen], 4), return_inverse=True)
            mean = np.bincount(index, values[chosen]) / np.maximum(np.bincount(index), 1)
            axis.plot(level, mean, "o", color=colour, markersize=6, markeredgecolor="white", label=kind)
        axis.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
        axis.set_title(heading, fontsize=9, color=INK)
        axis.set_xlabel("analytic posterior", fontsize=8, color=INK)
    axes[0].legend(frameon=False, fontsize=7, loc="upper left")
    _dress(picture, axes, title)
    return picture


def map_figure(columns: Mapping[str, Float[np.ndarray, "n h w"]], images: int, title: str) -> Figure:
    """Maps of n cases, a row each: the first `images` columns in grey, each case in its own window, the others are
    shares between 0 (white) and 1 (black)."""
    rows = len(next(iter(columns.values())))
    picture = Figure(figsize=(1.15 * len(columns), 1.15 * rows + 0.7), dpi=150, layout="constrained")
    axes = picture.subplots(rows, len(columns), squeeze=False)
    for column, (heading, maps) in enumerate(columns.items()):
        axes[0, column].set_title(heading.replace(" of ", "\nof ").replace(" exact", "\nexact"), fontsize=7, color=INK)
        for row, values in enumerate(maps):
            axis = axes[row, column]
            if column < images:
                axis.imshow(values, cmap="gray", interpolation="nearest")
            else:
                axis.imshow(values, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    picture.suptitle(f"{title} (maps: white 0, black 1)", fontsize=9, color=INK)
    return picture


def steps_figure(lines: Mapping[str, Mapping[int, float]], accepted: tuple[float, float]) -> Figure:
    """Diversity of hypotheses over its analytic value, by the sampler's steps; `accepted` is shaded."""
    picture = Figure(figsize=(4.8, 3.6), dpi=150, layout="constrained")
    axis = picture.subplots()
    axis.axhspan(*accepted, color=FAINT, alpha=0.15, linewidth=0)
    axis.axhline(1, color=FAINT, linewidth=1, linestyle="--")
    for i, (name, line) in enumerate(lines.items()):
        axis.plot([*line], [*line.values()], "o" + STYLES[i % len(STYLES)], color=COLOURS[i], markersize=4, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks([*next(iter(lines.values()))], [str(x) for x in next(iter(lines.values()))])
    axis.set_ylim(0, None)
    axis.set_xlabel("steps of the sampler", fontsize=8, color=INK)
    axis.set_ylabel("pairwise disagreement over its analytic value", fontsize=8, color=INK)
    axis.legend(frameon=False, fontsize=7, loc="lower right")
    _dress(picture, np.array([axis]), "Diversity of hypotheses")
    return picture


def injection_figure(
    shown: Sequence[Mapping[str, Any]],
    modalities: Sequence[str],
    doses: Sequence[float],
    lines: Mapping[str, Float[np.ndarray, "n c"]],
    bars: Mapping[str, Mapping[str, Any]],
    aim: float,
    method: str,
) -> Figure:
    """What an injected conflict does, a row each: the modalities, the altered one outlined in colour, kappa, the
    disagreement of the hypotheses and blame. Below: disagreement inside the region by dose (`lines`: by altered
    modality, its value at each dose, with the change in all modalities, and beside a texture), and the AUROC of every
    measure."""
    rows, columns = len(shown), len(modalities) + 3
    picture = Figure(figsize=(1.5 * columns, 1.65 * rows + 3.9), dpi=130, layout="constrained")
    parts: Any = picture.subfigures(2, 1, height_ratios=(1.65 * rows, 3.7))
    upper, lower = parts
    axes = upper.subplots(rows, columns, squeeze=False)
    blame_colours = ListedColormap(COLOURS[: len(modalities)])
    for row, one in enumerate(shown):
        outline = _hung(one["region"]).astype(float)
        altered = int(one["modality"])
        panels: list[tuple[str, np.ndarray, dict[str, Any]]] = []
        for m, name in enumerate(modalities):
            plane = one["image"][m]
            low, high = np.percentile(plane[plane != 0], (1, 99)) if np.any(plane) else (0, 1)
            panels.append((name, plane, {"cmap": "gray", "vmin": low, "vmax": high}))
        panels.append(("kappa", one["conflict"], {"cmap": "magma", "vmin": 0, "vmax": 1}))
        panels.append(("disagreement", one["disagreement"], {"cmap": "magma", "vmin": 0, "vmax": 0.5}))
        blame = one.get("blame", np.full(one["region"].shape, -1))
        panels.append(("blame", np.ma.masked_less(blame, 0), {"cmap": blame_colours, "vmin": -0.5,
                                                              "vmax": len(modalities) - 0.5}))  # fmt: skip
        for column, (name, plane, how) in enumerate(panels):
            axis = axes[row, column]
            axis.imshow(_hung(plane), interpolation="nearest", **how)
            own = column == altered
            edge = COLOURS[altered] if own else ("#FFFFFF" if column in range(len(modalities), columns - 1) else FAINT)
            axis.contour(outline, [0.5], colors=[edge], linewidths=1.6 if own else 0.6)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color=COLOURS[altered] if own else FAINT, linewidth=2 if own else 0.4)
            if row == 0:
                axis.set_title(name, fontsize=8, color=COLOURS[column] if column < len(modalities) else INK)
        axes[row, 0].set_ylabel(f"{one['kind']}\nin {modalities[altered]}", fontsize=7, color=INK)
    left, right = lower.subplots(1, 2, width_ratios=(1, 1.1))
    for m, name in enumerate(modalities):
        if name not in lines:
            continue
        mean = lines[name].mean(axis=0)
        left.plot(doses, mean[: len(doses)], "o-", color=COLOURS[m], markersize=4, label=f"altered in {name} alone")
        left.plot(1.13, mean[-1], "x", color=COLOURS[m], markersize=5)
    every = np.concatenate([one[:, len(doses)] for one in lines.values()])
    left.plot(1.06, every.mean(), "s", color=INK, markersize=5, label="the same in all modalities")
    left.plot([], [], "x", color=INK, label="a texture of equal energy")
    left.set(xlim=(-0.03, 1.2), ylim=(0, 1.45 * left.get_ylim()[1]))  # room for the legend
    left.set_xlabel("dose", fontsize=8, color=INK)
    left.set_ylabel("disagreement in the region, mean", fontsize=8, color=INK)
    left.legend(frameon=False, fontsize=6.5, loc="upper left")
    for at, (name, one) in enumerate(bars.items()):
        if one["value"] is None:
            continue
        low, high = one["ci95"] or (one["value"], one["value"])
        colour = COLOURS[0] if name.startswith(f"{method}: ") else FAINT
        right.plot([low, high], [at, at], color=colour, linewidth=2)
        right.plot(one["value"], at, "o", color=colour, markersize=4, clip_on=False)
    right.axvline(0.5, color=FAINT, linewidth=1, linestyle="--")
    right.axvline(aim, color=COLOURS[2], linewidth=1, linestyle=":")
    right.set_yticks(range(len(bars)), list(bars), fontsize=6.5)
    right.set(xlim=(0, 1), ylim=(len(bars) - 0.5, -0.5))
    right.set_xlabel(f"AUROC (dotted: aim {aim:g})", fontsize=8, color=INK)
    for axis in (left, right):
        axis.tick_params(axis="x", labelsize=7, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
    left.tick_params(labelsize=7, colors=INK)
    lower.suptitle("")
    picture.suptitle("Conflict injected into one modality (outlined)", fontsize=10, color=INK)
    return picture


def _hung(plane: np.ndarray) -> np.ndarray:
    """An axial plane [H, W] as a radiologist hangs it: anterior up, the patient's right on the left."""
    return np.swapaxes(plane, 0, 1)[::-1, ::-1]


def save(picture: Figure, path: Path, palette: bool = False) -> None:
    """Writes a PNG beside `path` and renames it into place. palette: of 256 colours, which halves a sheet of scans."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".png")
    os.close(handle)
    beside = Path(name)
    try:
        FigureCanvasAgg(picture)
        picture.savefig(beside, format="png")
        if palette:
            with Image.open(beside) as file:
                reduced = file.convert("RGB").quantize(256, kmeans=2)  # else thin lines lose their colour
            reduced.save(beside, format="PNG", optimize=True)
        beside.chmod(0o644)  # mkstemp makes it private
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _dress(picture: Figure, axes: Any, title: str) -> None:
    picture.suptitle(title, fontsize=9, color=INK)
    for axis in axes:
        axis.tick_params(labelsize=7, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
