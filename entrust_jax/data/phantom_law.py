"""The exact joint law of a phantom's label map given its images, and what follows from it (ours).

Given the images, sites are independent. Site j shows nothing with probability P(z_j = 0 | images); a lesion of class z
and border delta with probability P(z_j = z | images) / B, B the number of values of delta. That makes
1 + (Z - 1) B states a site, Z the number of values of z_j, and the product over sites for the whole map: 64 for three
sites of the binary variant, 256 for four, 343 for three sites with two classes of lesion.

Overlap of two masks needs counts of pixels alone, which add up over sites: the law of a sum of independent counts is
built site by site, and equal sums are merged. No image is held per state (`enumerate_maps`, made for small examples,
excepted). All is computed in double precision from the posterior of the sites.

IoU and Dice are 1 where both masks are empty, and are averaged over the foreground classes.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from entrust_jax.data import phantom
from entrust_jax.errors import UserError
from entrust_jax.metrics.distribution import Estimator, mean_self_distance, pairwise_distance

MOST_SUMS = 2**21  # different sums of counts held at once: some 100 MB
MOST_MAPS = 2**12  # label maps held at once
MOST_READINGS = 2**20  # patterns of evidence times subsets of readers


class SiteLaw(NamedTuple):
    """What one site shows: state i, the labels mask[i] of its pixels, has probability weight[i]."""

    weight: Float[np.ndarray, " s"]
    pixels: Int[np.ndarray, " n"]  # indices into the flattened label map, in increasing order
    mask: Int[np.ndarray, "s n"]


class Law(NamedTuple):
    """The law of a label map: independent sites, background elsewhere."""

    shape: tuple[int, ...]  # of a label map
    classes: int  # K, background included
    sites: tuple[SiteLaw, ...]


def exact_law(
    belief: Float[Array | np.ndarray, "j z"],
    site: Int[Array | np.ndarray, "*s"],
    distance: Float[Array | np.ndarray, "*s"],
    spec: phantom.Spec,
) -> Law:
    """The law of the label map of one scene.

    belief: P(z_j = z | images), for any subset of modalities from phantom.belief; site, distance: the scene's.
    """
    weights = np.asarray(belief, np.float64)
    weights = weights / weights.sum(axis=1, keepdims=True)  # single precision sums to 1 up to 1e-7
    where, far = np.asarray(site).ravel(), np.asarray(distance).ravel()
    borders = len(spec.boundary)
    sites = []
    for j, chance in enumerate(weights):
        pixels = np.flatnonzero(where == j)
        near = jnp.asarray(far[pixels])
        lesion = np.stack([np.asarray(phantom.lesion_classes(near, delta, spec)) for delta in spec.boundary])
        mask = np.concatenate([0 * lesion[:1], *(z * lesion for z in range(1, spec.values))])
        sites.append(SiteLaw(np.concatenate([chance[:1], np.repeat(chance[1:] / borders, borders)]), pixels, mask))
    return Law(tuple(np.shape(site)), len(spec.classes), tuple(sites))


def raters(key: PRNGKeyArray, law: Law, count: int) -> Int[np.ndarray, "r *s"]:
    """Label maps of `count` raters, drawn independently from the law; the same key gives the same maps."""
    result = np.zeros((count, math.prod(law.shape)), np.int32)
    for number, (weight, pixels, mask) in enumerate(law.sites):
        draws = jax.random.choice(jax.random.fold_in(key, number), len(weight), (count,), p=jnp.asarray(weight))
        result[:, pixels] = mask[np.asarray(draws)]
    return result.reshape(count, *law.shape)


def enumerate_maps(law: Law) -> tuple[Float[np.ndarray, " t"], Int[np.ndarray, "t *s"]]:
    """(probability, label map) of every state of the whole map.

    Time and memory are the product over sites of their states, times the pixels. Raises UserError beyond MOST_MAPS
    states.
    """
    total = math.prod(len(site.weight) for site in law.sites)
    if total > MOST_MAPS:
        raise UserError(
            f"data.phantom.sites: {len(law.sites)} sites make {total} label maps, more than {MOST_MAPS}; take fewer"
        )
    weight, maps = np.ones(total), np.zeros((total, math.prod(law.shape)), np.int32)
    for states, site in zip(np.unravel_index(np.arange(total), _sizes(law)), law.sites, strict=True):
        weight *= site.weight[states]
        maps[:, site.pixels] = site.mask[states]
    return weight, maps.reshape(total, *law.shape)


def _sizes(law: Law) -> tuple[int, ...]:
    return tuple(len(site.weight) for site in law.sites)


def marginals(law: Law) -> Float[np.ndarray, "*s k"]:
    """P(y_u = k | images)."""
    result = np.zeros((math.prod(law.shape), law.classes))
    result[:, 0] = 1.0
    for weight, pixels, mask in law.sites:
        for k in range(law.classes):
            result[pixels, k] = weight @ (mask == k)
    return result.reshape(*law.shape, law.classes)


def pairwise_disagreement(
    marginal: Float[Array | np.ndarray, "*s k"], region: Bool[Array | np.ndarray, "*s"] | None = None
) -> float:
    """P(two independent draws differ at a pixel) = sum_k p_k (1 - p_k), averaged over the pixels of `region` (all
    pixels by default): what the mean pairwise disagreement of sampled label maps estimates. NaN for no pixel."""
    p = np.asarray(marginal, np.float64)
    differ = np.sum(p * (1 - p), axis=-1)
    inside = differ if region is None else differ[np.asarray(region)]
    return float(inside.mean()) if inside.size else float("nan")


# --- distances and overlap ----------------------------------------------------------------------------------


def _expect(
    parts: Sequence[tuple[Float[np.ndarray, " _"], Integer[np.ndarray, "_ 2"]]],
    value: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> float:
    """E value(a, b), (a, b) the sum of independent pairs of counts, one a site, each given as (probability, counts).

    Raises UserError beyond MOST_SUMS different sums.
    """
    weight, sums = np.ones(1), np.zeros(1, np.int64)
    base = 1 + sum(int(counts[:, 1].max(initial=0)) for _, counts in parts)
    for chance, counts in parts:
        codes, inverse = np.unique(counts[:, 0] * base + counts[:, 1], return_inverse=True)
        if len(sums) * len(codes) > MOST_SUMS:
            raise UserError(
                f"data.phantom.sites: {len(parts)} sites make more than {MOST_SUMS} different overlaps; take fewer"
                " sites or a shorter boundary"
            )
        chance = np.bincount(inverse.ravel(), chance)
        sums, inverse = np.unique(np.add.outer(sums, codes), return_inverse=True)
        weight = np.bincount(inverse.ravel(), np.outer(weight, chance).ravel())
    return float(weight @ value(*np.divmod(sums, base)))


def _iou_loss(shared: np.ndarray, union: np.ndarray) -> np.ndarray:
    return np.where(union > 0, 1 - shared / np.maximum(union, 1), 0.0)


def mean_distance(law: Law) -> float:
    """E d(Y, Y') of two independent draws, d = 1 - IoU averaged over the foreground classes.

    Costs, for each class, the product over sites of the different pairs (|intersection|, |union|) of two states of
    the site: at most 10 for three borders and one class, hence 10^4 for four sites. Raises UserError beyond MOST_SUMS.
    """
    total = 0.0
    for k in range(1, law.classes):
        parts = []
        for weight, _, mask in law.sites:
            inside = (mask == k).astype(np.int64)
            shared, size = inside @ inside.T, inside.sum(axis=1)
            union = size[:, None] + size[None] - shared
            parts.append((np.outer(weight, weight).ravel(), np.stack([shared.ravel(), union.ravel()], axis=1)))
        total += _expect(parts, _iou_loss)
    return total / (law.classes - 1)


def _against(
    law: Law, masks: Integer[np.ndarray, "n *s"], value: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
) -> Float[np.ndarray, " n"]:
    """E value(|x & Y|, |Y|, |x|) for every mask x and a draw Y, averaged over the foreground classes."""
    flat = masks.reshape(masks.shape[0], -1)
    total = np.zeros(len(flat))
    for k in range(1, law.classes):
        drawn = [(mask == k).astype(np.int64) for _, _, mask in law.sites]
        for n, ours in enumerate(flat == k):
            parts = [
                (site.weight, np.stack([inside @ ours[site.pixels], inside.sum(axis=1)], axis=1))
                for site, inside in zip(law.sites, drawn, strict=True)
            ]
            size = int(ours.sum())
            total[n] += _expect(parts, lambda shared, theirs, size=size: value(shared, theirs, size))
    return total / (law.classes - 1)


def distance_to(law: Law, hypotheses: Integer[np.ndarray, "n *s"]) -> Float[np.ndarray, " n"]:
    """E d(x, Y) of every given label map x to a draw Y, d = 1 - IoU averaged over the foreground classes.

    Costs, for each map and class, the product over sites of their states. Raises UserError beyond MOST_SUMS.
    """
    return _against(law, hypotheses, lambda shared, theirs, ours: _iou_loss(shared, theirs + ours - shared))


def ged_squared(law: Law, hypotheses: Integer[np.ndarray, "n *s"], estimator: Estimator = "v") -> float:
    """Squared generalised energy distance 2 E d(X, Y) - E d(X, X') - E d(Y, Y') of given label maps X and the exact
    law of Y (Szekely & Rizzo 2013; for segmentations Kohl et al. 2018); the estimator concerns E d(X, X').

    Of N independent draws from the law itself the expectation is E d(Y, Y') / N with `v` and 0 with `u`. Costs what
    mean_distance and distance_to cost.
    """
    own = pairwise_distance(hypotheses, hypotheses, range(1, law.classes))
    return float(2 * distance_to(law, hypotheses).mean() - mean_self_distance(own, estimator) - mean_distance(law))


def expected_dice(law: Law, masks: Integer[np.ndarray, "n *s"]) -> Float[np.ndarray, " n"]:
    """E Dice(x, Y) of every given label map x, averaged over the foreground classes, 1 where both lack the class.

    Costs, for each map and class, the product over sites of their states. Raises UserError beyond MOST_SUMS.
    """
    return _against(
        law,
        masks,
        lambda shared, theirs, ours: np.where(theirs + ours > 0, 2 * shared / np.maximum(theirs + ours, 1), 1.0),
    )


def dice_action(law: Law, thresholds: Sequence[float] | None = None) -> tuple[Int[np.ndarray, "*s"], float, float]:
    """(label map, tau, expected Dice) of the best action among thresholds of the marginal: the likeliest foreground
    class where 1 - P(background) > tau, background elsewhere.

    thresholds: the values of tau; by default 0 and every value that 1 - P(background) takes, which gives every map of
    this family. The best of all maps need not be one of them (a pixel of a small lesion can be worth more than a
    likelier one of a large lesion), but is nearly always. Ties go to the larger tau, that is the smaller mask.
    """
    p = marginals(law)
    foreground = np.round(1 - p[..., 0], 12)  # pixels of one probability stay together
    winner = 1 + np.argmax(p[..., 1:], axis=-1)
    taus = np.unique(np.append(foreground, 0.0) if thresholds is None else np.asarray(thresholds, np.float64))
    masks = np.stack([np.where(foreground > tau, winner, 0) for tau in taus])
    score = expected_dice(law, masks)
    best = int(np.flatnonzero(score >= score.max() - 1e-12)[-1])
    return masks[best].astype(np.int32), float(taus[best]), float(score[best])


# --- blame --------------------------------------------------------------------------------------------------


def contributions(
    evidence: Int[Array | np.ndarray, "m *j"], present: Bool[Array | np.ndarray, " m"], spec: phantom.Spec
) -> Float[np.ndarray, "m *j"]:
    """Shapley value of every reader for ln P(z_j = likeliest value | readers), in nats: what it says for (> 0) or
    against the answer that all present readers together give. 0 for absent and silent ones.

        phi_m = sum over S without m of |S|! (M - |S| - 1)! / M! (v(S + m) - v(S))     (Shapley 1953)

    With independent readers and one class of lesion its sign is that of s_mj, turned to the answer. Of two equally
    likely values the smaller is the answer. Costs 2^M posteriors.
    """
    said, there = np.asarray(evidence), np.asarray(present, bool)
    count = len(there)
    subsets = (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(bool)  # [t m], all readers last
    speak = (subsets & there).T.reshape(count, -1, *(1,) * (said.ndim - 1))
    chance = np.asarray(phantom.belief(jnp.asarray(np.where(speak, said[:, None], 0)), jnp.ones(count, bool), spec))
    whole = chance[-1]
    answer = np.argmax(whole > whole.max(axis=-1, keepdims=True) - 1e-5, axis=-1)[None, ..., None]
    value = np.log(np.take_along_axis(chance, answer, axis=-1)[..., 0].astype(np.float64))  # [t *j]
    phi = np.zeros(said.shape)
    for m in range(count):
        without = np.flatnonzero(~subsets[:, m])
        orders = [count * math.comb(count - 1, int(n)) for n in subsets[without].sum(axis=1)]
        phi[m] = np.tensordot(1 / np.array(orders), value[without + 2**m] - value[without], 1)
    return phi


def blame_rate(spec: phantom.Spec, present: Sequence[bool] | None = None, liars: int | None = None) -> float:
    """Exact Bayes blame rate: P(the reader that argues most against the likeliest truth is wrong | readers contradict
    each other), argmin of `contributions` over the present readers that display something, ties shared equally.

    present: which modalities there are, by default all; liars: further condition on exactly this many wrong readers.
    It is what perfect knowledge of the law attains where the answer is the likeliest one. NaN where nothing of the
    kind can happen. Enumerates all evidence at one site, (2 + number of lesion classes)^M patterns and 2^M subsets of
    readers. Raises UserError beyond MOST_READINGS of them.
    """
    count = len(spec.modalities)
    there = np.ones(count, bool) if present is None else np.asarray(present, bool)
    displays = range(-1, spec.values)
    if (2 * len(displays)) ** count > MOST_READINGS:
        raise UserError(f"data.phantom.modalities: {count} readers have too many patterns of evidence; take fewer")
    evidence = np.array(list(itertools.product(displays, repeat=count)), np.int32).T  # [m e]
    evidence = np.unique(np.where(there[:, None], evidence, 0), axis=1)
    given = phantom.log_likelihood(jnp.asarray(evidence), jnp.asarray(there), spec)
    silence = np.asarray(spec.ignorance)[:, None]
    shown = np.where(evidence == 0, silence, 1 - silence)[there].prod(axis=0)
    weight = shown[:, None] * phantom.prior(spec) * np.exp(np.asarray(given, np.float64))  # P(evidence, z) [e z]
    truth = np.broadcast_to(np.arange(spec.values), weight.shape)
    said = jnp.asarray(np.broadcast_to(evidence[..., None], (count, *weight.shape)))
    guilty = np.asarray(phantom.wrong(said, jnp.asarray(truth)))  # [m e z]
    weight = weight * np.asarray(phantom.opposed(jnp.asarray(evidence), jnp.asarray(there)))[:, None]
    if liars is not None:
        weight = weight * (guilty.sum(axis=0) == liars)
    with np.errstate(divide="ignore", invalid="ignore"):  # evidence that cannot be has no posterior and no weight
        phi = contributions(evidence, there, spec)
    phi = np.where(evidence != 0, phi, np.inf)
    blamed = phi <= phi.min(axis=0) + 1e-4  # posteriors are in single precision
    named = np.einsum("me,mez->ez", blamed / np.maximum(blamed.sum(axis=0), 1), guilty.astype(np.float64))
    possible = weight > 0
    return float((weight * named)[possible].sum() / weight.sum()) if possible.any() else float("nan")
