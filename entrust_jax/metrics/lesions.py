"""Scores lesion by lesion, by the rules of BraTS 2023: what is missed or made up counts as much as what is found.

The truth is grown; what touches then is one lesion. Every connected piece of the prediction that meets a grown lesion
belongs to it, and is compared with the lesion as drawn. A lesion without a piece, and a piece without a lesion, score
Dice 0 and HD95 374 mm. Lesions of a small volume are not scored, found or not, but a piece on them is no mistake;
pieces without a lesion count whatever their volume. (Moawad et al. 2023, arXiv 2306.00838, and the challenge's own
evaluation.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from entrust_jax.metrics import surface

MISSED_HD95 = 374.0  # mm: the diagonal of a BraTS volume (240 x 240 x 155 voxels of 1 mm), rounded up


@dataclass(frozen=True)
class Rule:
    """How often the truth grows by a voxel, and the volume in mm^3 up to which a lesion is not scored."""

    dilation: int
    floor: float


RULES = {"glioma": Rule(dilation=3, floor=50.0), "metastases": Rule(dilation=1, floor=2.0)}  # of two of its challenges


def scores(
    prediction: Bool[np.ndarray, "*s"],
    truth: Bool[np.ndarray, "*s"],
    spacing: Sequence[float],
    rule: Rule,
    thickness: float = 1.0,
) -> dict[str, float]:
    """Figures of one case; spacing in mm. `thickness` is that of a picture of two axes, in mm.

    lesion_dice, lesion_hd95 (mm, area-weighted): means over the scored lesions and the pieces without one. lesion_f1:
    2 found / (2 found + missed + spurious). lesions, lesions_missed: scored lesions of the truth, and how many of them
    no piece meets; lesions_spurious: pieces without a lesion. Where there is neither lesion nor piece the first three
    are 1, 0 and 1, as in the challenge's own evaluation.

    Growing is by the 18 neighbours (8 in 2-D), in voxels as in the challenge, whose voxels have 1 mm; pieces hang
    together by 26 (8).
    """
    box = surface.bounding_box(prediction | truth, margin=rule.dilation)
    prediction, truth = prediction[box], truth[box]
    joined = ndimage.generate_binary_structure(truth.ndim, truth.ndim)
    reach = ndimage.generate_binary_structure(truth.ndim, 2)
    grown, count = cast(Any, ndimage.label(ndimage.binary_dilation(truth, reach, iterations=rule.dilation), joined))
    pieces, guesses = cast(Any, ndimage.label(prediction, joined))
    lesion_boxes, piece_boxes = ndimage.find_objects(grown), ndimage.find_objects(pieces)
    meeting = (grown > 0) & prediction
    met = np.zeros((count + 1, guesses + 1), bool)
    met[grown[meeting], pieces[meeting]] = True
    volumes = (
        np.bincount(grown[truth], minlength=count + 1) * np.prod(spacing) * (thickness if truth.ndim == 2 else 1.0)
    )
    scored = [lesion for lesion in range(1, count + 1) if volumes[lesion] > rule.floor]
    found = [lesion for lesion in scored if met[lesion].any()]
    spurious = int(guesses - met.any(axis=0).sum())
    compared = []
    for lesion in found:
        own = np.flatnonzero(met[lesion])
        around = _hull([lesion_boxes[lesion - 1], *(piece_boxes[piece - 1] for piece in own)])
        theirs = truth[around] & (grown[around] == lesion)
        ours = met[lesion][pieces[around]]
        dice = 2 * np.sum(ours & theirs) / (np.sum(ours) + np.sum(theirs))
        compared.append((float(dice), surface.hd95(ours, theirs, spacing, "area_weighted")))
    wrong = len(scored) - len(found) + spurious
    total = len(scored) + spurious
    return {
        "lesion_dice": sum(dice for dice, _ in compared) / total if total else 1.0,
        "lesion_hd95": (sum(hd95 for _, hd95 in compared) + wrong * MISSED_HD95) / total if total else 0.0,
        "lesion_f1": 2 * len(found) / (2 * len(found) + wrong) if total else 1.0,
        "lesions": float(len(scored)),
        "lesions_missed": float(len(scored) - len(found)),
        "lesions_spurious": float(spurious),
    }


def _hull(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box that holds all of these."""
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True)
    )
