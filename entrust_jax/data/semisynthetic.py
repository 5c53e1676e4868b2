"""Real scans whose lesions are shown or hidden by each modality with known reliability: the posterior is known (ours).

A labelled scan gives two candidate sites: where its lesion is, and a healthy place to which its appearance can be
transplanted (`injection`). At each site there is a lesion with probability `prior`, z ~ Bern(prior), independently;
modality m shows it if it is right, with probability rho_m, independently given z, and the opposite otherwise. Hidden
means erased at the first site and untouched at the second. The label holds the sites with z = 1. So

    logit P(z = 1 | scans) = logit prior + sum_m s_m ln(rho_m / (1 - rho_m)),   s_m = +1 shown, -1 hidden, 0 missing

for whoever can see what each modality shows. Which site it is, and traces of the change, say nothing more about z. A
site that every modality hides cannot be seen to be one, and is no test of a belief.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit, logit

from entrust_jax.data import injection
from entrust_jax.data.preprocess import Volume

PRIOR = 0.5
PLACES = ("own place", "other place")


class Candidate(NamedTuple):
    """The slices of a labelled scan from `start` on, the label of their lesion at the other place, every modality with

    the lesion erased, and with it transplanted there.
    """

    start: int
    volume: Volume
    other: Int[np.ndarray, "d h w"]
    hidden: Float[np.ndarray, "m d h w"]
    shown: Float[np.ndarray, "m d h w"]


class Site(NamedTuple):
    """A candidate lesion: what each modality shows of it (+1, -1, 0 missing), the truth, and the exact posterior."""

    place: str
    mask: Bool[np.ndarray, "d h w"]
    evidence: Int[np.ndarray, " m"]
    truth: bool
    posterior: float


def posterior(evidence: Int[np.ndarray, "*s m"], reliability: Sequence[float], prior: float = PRIOR) -> np.ndarray:
    """P(z = 1 | what the modalities show)."""
    rho = np.asarray(reliability, float)
    return np.asarray(expit(logit(prior) + np.asarray(evidence) @ logit(rho)))


def patterns(reliability: Sequence[float]) -> tuple[Int[np.ndarray, "e m"], Float[np.ndarray, " e"]]:
    """Everything that the modalities can show of a site together, and how often they do."""
    rho = np.asarray(reliability, float)
    evidence = np.array(list(itertools.product((1, -1), repeat=len(rho))))
    given = [np.where(evidence == z, rho, 1 - rho).prod(axis=1) for z in (1, -1)]
    return evidence, PRIOR * given[0] + (1 - PRIOR) * given[1]


def candidate(volume: Volume, slices: int | None = None) -> Candidate | None:
    """What can be shown and hidden in a labelled scan, or in so many slices of it (`injection.find_run`): a lesion that

    fills the body has a healthy place of its size only where it is small. None where there is no lesion or no such
    place.
    """
    found = injection.find_run(volume, slices or len(volume.body))
    if found is None:
        return None
    start, part, move = found
    assert part.label is not None
    lesion = injection.lesion_of(part)
    other = injection.carried(np.where(lesion, part.label, 0), move) * part.body
    hide, show = injection.erased(part, lesion, move), injection.transplanted(part, lesion, move)
    return Candidate(start, part, other.astype(np.int32), hide.changed, show.changed)


def draw(one: Candidate, reliability: Sequence[float], seed: int) -> tuple[Volume, list[Site]]:
    """One case of the set and its two sites."""
    volume, label = one.volume, one.volume.label
    assert label is not None
    rng = np.random.default_rng([seed, volume.number])
    truth = rng.random(2) < PRIOR
    right = rng.random((2, len(volume.present))) < np.asarray(reliability)
    evidence = np.where(right == truth[:, None], 1, -1) * volume.present
    image = volume.image + (evidence[0] < 0).reshape(-1, 1, 1, 1) * (one.hidden - volume.image)
    image = image + (evidence[1] > 0).reshape(-1, 1, 1, 1) * (one.shown - volume.image)
    known = np.where(truth[0] | (label < 0), label, 0)
    known = np.where(truth[1] & (one.other > 0), one.other, known)
    beliefs = posterior(evidence, reliability)
    masks = ((label > 0) & volume.body, one.other > 0)
    made = dataclasses.replace(volume, image=image.astype(np.float32), label=known.astype(np.int32), raters=None)
    return made, [
        Site(place, masks[i], evidence[i], bool(truth[i]), float(beliefs[i])) for i, place in enumerate(PLACES)
    ]


def kind(evidence: Int[np.ndarray, " m"]) -> str:
    """What the modalities say of a site together: "conflict", "agree", or "unseen" where none shows it."""
    if not np.any(evidence > 0):
        return "unseen"
    return "conflict" if np.any(evidence < 0) else "agree"
