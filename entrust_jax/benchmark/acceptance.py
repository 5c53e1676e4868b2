"""G1 to G11 and T12: does a model say what the phantom's exact posterior says? Pure functions of what it said.

A blob is what one site of a phantom holds. Its core are the pixels whose class depends on the blob's presence alone, at
least a pixel inside of where its boundary may lie. A blob is in conflict where readers contradict each other, ignored
where one shows nothing and none contradicts, else agreed upon. All equations: ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8

from entrust_jax.data import phantom, phantom_law, phantom_scene
from entrust_jax.errors import UserError
from entrust_jax.metrics import calibration, distribution, usefulness

AGREE, CONFLICT, IGNORANCE = range(3)
KINDS = ("agree", "conflict", "ignorance")

# Each set once, to what a correct implementation reaches with its spread, and frozen; docs/evidence/README.md says why.
THRESHOLDS: Mapping[str, Any] = {
    "G1": {"agree": 0.04, "conflict": 0.10, "ignorance": 0.09},
    "G2": (0.82, 0.95),
    "G3": 0.9,
    "G4": (0.8, 1.2),
    "G5": (0.75, 1.15),
    "G6": {"enrichment": (0.7, 1.4), "ignorance": (0.8, 1.2), "auroc": 0.95},
    "G7": {"ged": 0.10, "correlation": 0.1},
    "G8": {"nll": 0.02, "ece": 0.02},
    "G9": 0.95,
    "G10": -0.008,  # of two classes the exact error probability and the exact entropy order pixels alike
    "G11": {"mae": 0.08, "kappa": 0.0},
    "T12": 1.0,
}
QUESTIONS = {
    "G1": "blob presence by p_1 against the analytic posterior, mean absolute error",
    "G2": "mean belief in conflict on the side of the more reliable reader",
    "G3": "share of hypotheses in which an uncertain blob is whole",
    "G4": "slope of the share of hypotheses that show a conflict blob against its posterior",
    "G5": "pairwise disagreement of hypotheses over its analytic value",
    "G6": "divergence in conflict over that in agreement, relative to its exact value; in ignorance; AUROC of kappa",
    "G7": "GED^2 above its value for the exact law; correlation of blobs that are independent",
    "G8": "NLL per blob above the analytic posterior's; calibration error in the ROI",
    "G9": "rate of blaming a guilty reader over that of an ideal observer",
    "G10": "what the delivered error probability finds beyond the entropy: AUROC, area under risk-coverage",
    "G11": "without the second modality: error against the posterior of the others; conflict, where one is left",
    "T12": "distance of p_1 from the mean of the hypotheses over the most that sampling them explains",
}
CERTAIN = 0.1  # what is believed less than this, or more than 1 - this, says nothing about how hypotheses are drawn
MARGIN = 1.0  # pixels from the innermost possible boundary to a core: to place a boundary wrongly is no doubt of a blob
WHOLE = 0.95  # share of a core with one label from which a hypothesis is coherent there


class Observation(NamedTuple):
    """What a model says of n phantoms of one slice each, with N hypotheses."""

    one_step: Float[np.ndarray, "n h w k"]
    hypotheses: UInt8[np.ndarray, "n s h w"]
    kappa: Float[np.ndarray, "n h w"]
    attribution: Float[np.ndarray, "n m h w"]
    label: UInt8[np.ndarray, "n h w"]
    probability: Float[np.ndarray, "n h w k"]
    error_probability: Float[np.ndarray, "n h w"]
    entropy: Float[np.ndarray, "n h w"]


class Alone(NamedTuple):
    """What it says of n phantoms in one step; of those without their second modality in G11."""

    one_step: Float[np.ndarray, "n h w k"]
    kappa: Float[np.ndarray, "n h w"]


class Blobs(NamedTuple):
    """The sites of n phantoms: where each is, what it holds, what an ideal observer of the images believes of it."""

    core: Bool[np.ndarray, "n j h w"]
    kind: Integer[np.ndarray, "n j"]
    truth: Bool[np.ndarray, "n j"]
    posterior: Float[np.ndarray, "n j"]
    evidence: Integer[np.ndarray, "n m j"]
    guilty: Bool[np.ndarray, "n m j"]


def blobs(scenes: phantom_scene.Scene, spec: phantom.Spec, margin: float = MARGIN) -> Blobs:
    """The blobs of binary phantoms with one slice; every field of `scenes` has a leading axis.

    Raises UserError where lesions are so small that a core would be empty.
    """
    site, distance = (np.asarray(x)[:, 0] for x in (scenes.site, scenes.distance))
    evidence, posterior = np.asarray(scenes.evidence), np.asarray(scenes.posterior)
    reach = spec.radius + min(spec.boundary) - margin
    if reach < 1:
        raise UserError(
            f"data.phantom.radius {spec.radius:g} leaves blobs without a core; give at least {2 + margin:g}"
        )
    inside = distance <= reach
    core = inside[:, None] & (site[:, None] == np.arange(posterior.shape[1])[None, :, None, None])
    opposed = np.any(evidence > 0, axis=1) & np.any(evidence < 0, axis=1)
    silent = np.any(evidence == 0, axis=1) & ~opposed
    kind = np.where(opposed, CONFLICT, np.where(silent, IGNORANCE, AGREE))
    return Blobs(core, kind, np.asarray(scenes.truth), posterior, evidence, np.asarray(scenes.guilty))


def over_cores(values: Float[np.ndarray, "n *a h w"], core: Bool[np.ndarray, "n j h w"]) -> Float[np.ndarray, "n *a j"]:
    """Mean over each blob's core."""
    weight = core / np.maximum(core.sum(axis=(2, 3), keepdims=True), 1)
    return np.einsum("n...hw,njhw->n...j", values.astype(np.float64), weight)


def presence(probability: Float[np.ndarray, "n h w k"], found: Blobs) -> Float[np.ndarray, "n j"]:
    """What marginals say of each blob's presence: mean foreground probability over its core."""
    return over_cores(1.0 - probability[..., 0], found.core)


def shown(hypotheses: UInt8[np.ndarray, "n s h w"], found: Blobs) -> Float[np.ndarray, "n s j"]:
    """Share of each blob's core that is lesion, by hypothesis."""
    return over_cores((hypotheses > 0).astype(np.float32), found.core)


def uncertain(found: Blobs) -> Bool[np.ndarray, "n j"]:
    """Blobs whose presence the images leave open."""
    return (found.posterior > CERTAIN) & (found.posterior < 1 - CERTAIN)


def disagreement(hypotheses: UInt8[np.ndarray, "n s h w"]) -> Float[np.ndarray, "n h w"]:
    """Unbiased probability that two hypotheses differ at a pixel, of two classes."""
    count = hypotheses.shape[1]
    share = np.mean(hypotheses > 0, axis=1)
    return count / (count - 1) * 2 * share * (1 - share)


def g1_marginals(seen: Observation, found: Blobs) -> dict[str, Any]:
    """Mean absolute error of blob presence by p_1 against the analytic posterior."""
    error = np.abs(presence(seen.one_step, found) - found.posterior)
    value = {name: _mean(error[found.kind == i]) for i, name in enumerate(KINDS)}
    limit = THRESHOLDS["G1"]
    return _check(value, limit, all(value[name] <= limit[name] for name in KINDS))


def g2_strong_reader(seen: Observation, found: Blobs, spec: phantom.Spec) -> dict[str, Any] | None:
    """Mean belief in conflict on the side of the more reliable of two readers; None for more readers, for equal ones,

    and where the more reliable one is another at another site."""
    rho = phantom.reliabilities(spec)
    if len(rho) != 2 or np.ptp(rho, axis=1).any() or rho[0, 0] == rho[1, 0] or spec.prior != 0.5:
        return None
    side = found.evidence[:, int(np.argmax(rho[:, 0]))]
    p = presence(seen.one_step, found)
    inside = found.kind == CONFLICT
    value = _mean(np.where(side > 0, p, 1 - p)[inside])
    low, high = THRESHOLDS["G2"]
    exact = _mean(np.where(side > 0, found.posterior, 1 - found.posterior)[inside])
    return _check(value, [low, high], low <= value <= high) | {"exact": exact}


def coherence(hypotheses: UInt8[np.ndarray, "n s h w"], found: Blobs) -> float:
    """Share of (hypothesis, uncertain blob) whose core has one label almost everywhere."""
    share = shown(hypotheses, found).swapaxes(1, 2)[uncertain(found)]
    return _mean((share >= WHOLE) | (share <= 1 - WHOLE))


def g3_coherence(seen: Observation, found: Blobs) -> dict[str, Any]:
    """Share of (hypothesis, uncertain blob) whose core has one label almost everywhere."""
    value = coherence(seen.hypotheses, found)
    return _check(value, THRESHOLDS["G3"], value >= THRESHOLDS["G3"])


def g4_share(seen: Observation, found: Blobs) -> dict[str, Any]:
    """Slope of the share of hypotheses that show a blob against its posterior, over conflict blobs."""
    inside = found.kind == CONFLICT
    share = np.mean(shown(seen.hypotheses, found) >= 0.5, axis=1)[inside]
    p = found.posterior[inside].astype(np.float64)
    spread = np.sum(np.square(p - p.mean())) if p.size else 0.0
    value = float(np.sum((p - p.mean()) * (share - share.mean())) / spread) if spread > 1e-6 else float("nan")
    low, high = THRESHOLDS["G4"]
    return _check(value, [low, high], low <= value <= high)


def diversity(hypotheses: UInt8[np.ndarray, "n s h w"], scenes: phantom_scene.Scene) -> float:
    """Pairwise disagreement of hard votes over its analytic value, over all pixels in reach of a site."""
    reach = np.asarray(scenes.site)[:, 0] >= 0
    return float(disagreement(hypotheses)[reach].mean() / exact_disagreement(scenes)[reach].mean())


def g5_diversity(seen: Observation, scenes: phantom_scene.Scene) -> dict[str, Any]:
    """Pairwise pixel disagreement of hard votes over its analytic value, over all pixels in reach of a site."""
    value = diversity(seen.hypotheses, scenes)
    low, high = THRESHOLDS["G5"]
    return _check(value, [low, high], low <= value <= high)


def exact_disagreement(scenes: phantom_scene.Scene) -> Float[np.ndarray, "n h w"]:
    """Probability that two draws of the exact law differ at a pixel: 1 - sum_k p_k^2."""
    return 1.0 - np.sum(np.square(np.asarray(scenes.marginal, np.float64)[:, 0]), axis=-1)


def regions(scenes: phantom_scene.Scene, found: Blobs) -> dict[str, Bool[np.ndarray, "n h w"]]:
    """The cores of each kind of blob, and the boundaries of those that are not in conflict."""
    masks = {kind: np.any(found.core & (found.kind == i)[..., None, None], axis=1) for i, kind in enumerate(KINDS)}
    site, boundary = np.asarray(scenes.site)[:, 0], np.asarray(scenes.boundary)[:, 0]
    own = np.take_along_axis(found.kind, np.maximum(site, 0).reshape(len(site), -1), axis=1).reshape(site.shape)
    return masks | {"boundary": boundary & (own != CONFLICT)}


def g6_enrichment(seen: Observation, scenes: phantom_scene.Scene, found: Blobs) -> dict[str, Any]:
    """Divergence of hypotheses in conflict over that in agreement, relative to its exact value; the same of ignorance;

    AUROC of kappa for conflict cores against ignored cores, and against boundaries of blobs that are not in conflict
    (on the boundary of a contradicted blob the evidence does contradict itself). Not against both at once: the many
    boundary pixels would hide a map that cannot tell conflict from ignorance.
    """
    drawn, exact = disagreement(seen.hypotheses), exact_disagreement(scenes)
    masks = regions(scenes, found)
    ours, theirs = ({name: _mean(x[masks[name]]) for name in KINDS} for x in (drawn, exact))
    value = {
        "enrichment": _ratio(_ratio(ours["conflict"], ours["agree"]), _ratio(theirs["conflict"], theirs["agree"])),
        "ignorance": _ratio(ours["ignorance"], theirs["ignorance"]),
    }
    for other in ("ignorance", "boundary"):
        compared = masks["conflict"] | masks[other]
        value[f"auroc_{other}"] = usefulness.auroc(seen.kappa[compared], masks["conflict"][compared])
    limit = THRESHOLDS["G6"]
    passed = min(value["auroc_ignorance"], value["auroc_boundary"]) >= limit["auroc"] and all(
        limit[name][0] <= value[name] <= limit[name][1] for name in ("enrichment", "ignorance")
    )
    return _check(value, limit, passed)


def g7_joint(seen: Observation, laws: Sequence[phantom_law.Law], found: Blobs) -> dict[str, Any]:
    """GED^2 (V-statistic) against one label in the mean over the exact law of that label, relative to (1 + 1/N) E d(Y,
    Y'), its value for hypotheses from the law; and the mean correlation of different blobs across the hypotheses of a
    case: given the images they are independent.
    """
    count = seen.hypotheses.shape[1]
    own = np.array([phantom_law.mean_distance(law) for law in laws])
    ged = []
    for law, drawn in zip(laws, seen.hypotheses, strict=True):
        spread = distribution.mean_self_distance(distribution.pairwise_distance(drawn, drawn, (1,)), "v")
        ged.append(2 * phantom_law.distance_to(law, drawn[:, None]).mean() - spread)
    there = (shown(seen.hypotheses, found) >= 0.5).astype(np.float64)
    correlations = []
    for indicator, open_ in zip(there, uncertain(found), strict=True):
        blobs_ = indicator[:, open_]
        blobs_ = blobs_[:, blobs_.std(axis=0) > 0]
        if blobs_.shape[1] > 1:
            matrix = np.corrcoef(blobs_.T)
            correlations.append(matrix[np.triu_indices(len(matrix), 1)])
    correlation = _mean(np.concatenate(correlations)) if correlations else float("nan")
    value = {"ged": float(np.mean(ged) / ((1 + 1 / count) * own.mean())) - 1, "correlation": correlation}
    limit = THRESHOLDS["G7"]
    return _check(value, limit, all(abs(value[name]) <= limit[name] for name in limit))


def g8_scores(seen: Observation, scenes: phantom_scene.Scene, found: Blobs) -> dict[str, Any]:
    """NLL per blob above that of the analytic posterior, and the ROI's class-wise ECE, both after calibration."""

    def nll(p: np.ndarray) -> float:
        p = np.clip(p, 1e-6, 1 - 1e-6)
        return _mean(-np.log(np.where(found.truth, p, 1 - p)))

    roi = calibration.region_of_interest([seen.probability[..., 0]])
    bins = calibration.class_bins(seen.probability, np.asarray(scenes.label)[:, 0], roi)
    exact = nll(found.posterior)
    value = {"nll": nll(presence(seen.probability, found)) - exact, "ece": calibration.classwise_ece(bins)}
    limit = THRESHOLDS["G8"]
    return _check(value, limit, all(value[name] <= limit[name] for name in limit)) | {"exact_nll": exact}


def g9_blame(seen: Observation, found: Blobs, spec: phantom.Spec) -> dict[str, Any]:
    """How often the reader that argues most against the delivered label, argmin_m phi_m, is one that contradicts the

    truth, over conflict blobs; relative to the rate of an ideal observer, who is right when the truth is as he thinks.
    Of more than two readers also over the blobs where exactly one of them lies.
    """
    inside = found.kind == CONFLICT
    phi = over_cores(seen.attribution, found.core)
    hit = np.take_along_axis(found.guilty, np.argmin(phi, axis=1)[:, None], axis=1)[:, 0]
    rate = _mean(hit[inside])
    if found.guilty.shape[1] == 2:
        exact = _mean(np.maximum(found.posterior, 1 - found.posterior)[inside])
        value = _ratio(rate, exact)
        return _check(value, THRESHOLDS["G9"], value >= THRESHOLDS["G9"]) | {"rate": rate, "exact": exact}
    one = inside & (found.guilty.sum(axis=1) == 1)
    rates = {"contradicted": rate, "one_liar": _mean(hit[one])}
    ideal = {"contradicted": phantom_law.blame_rate(spec), "one_liar": phantom_law.blame_rate(spec, liars=1)}
    ratios = {name: _ratio(rates[name], ideal[name]) for name in rates}
    passed = all(value >= THRESHOLDS["G9"] for value in ratios.values())
    return _check(ratios, THRESHOLDS["G9"], passed) | {"rate": rates, "exact": ideal}


def g10_errors(seen: Observation, scenes: phantom_scene.Scene) -> dict[str, Any]:
    """What the delivered error probability finds beyond the entropy: differences in AUROC over the ROI's pixels and in

    area under the risk-coverage curve over cases (both better when positive).
    """
    truth = np.asarray(scenes.label)[:, 0]
    wrong = seen.label != truth
    roi = calibration.region_of_interest([seen.probability[..., 0]])
    entropy = usefulness.unit_entropy(seen.entropy, seen.one_step.shape[-1])
    overlap = np.sum((seen.label > 0) & (truth > 0), axis=(1, 2))
    size = np.sum(seen.label > 0, axis=(1, 2)) + np.sum(truth > 0, axis=(1, 2))
    risk = 1 - np.where(size > 0, 2 * overlap / np.maximum(size, 1), 1.0)
    area = [usefulness.aurc(risk, -np.mean(score, axis=(1, 2))) for score in (entropy, seen.error_probability)]
    auroc = [usefulness.auroc(score[roi], wrong[roi]) for score in (seen.error_probability, entropy)]
    value = {"auroc": auroc[0] - auroc[1], "aurc": area[0] - area[1]}
    return _check(value, THRESHOLDS["G10"], min(value.values()) >= THRESHOLDS["G10"])


def g11_missing(alone: Alone, found: Blobs, rest: Float[np.ndarray, "n j"]) -> dict[str, Any]:
    """Without the second modality: blob presence by p_1 against the posterior of the other readers, and no conflict at

    all where a single one is left. `alone`: what the model says without it; `rest`: P(blob | the other readers).
    """
    value = {"mae": _mean(np.abs(presence(alone.one_step, found) - rest))}
    if found.evidence.shape[1] == 2:
        value["kappa"] = float(np.max(alone.kappa))
    limit = {name: THRESHOLDS["G11"][name] for name in value}
    return _check(value, limit, all(value[name] <= limit[name] for name in limit))


def t12_tower(seen: Observation) -> dict[str, Any]:
    """Mean |p_1 - p_bar| where .1 < p_1 < .9, over .92 sqrt(p_1 (1 - p_1) / N) + .02 in the mean over the same pixels.

    The mean of the hypotheses is the marginal (tower property): N of them stray from it by .80 standard deviations.
    """
    p = seen.one_step[..., 1:].sum(-1, dtype=np.float64)
    open_ = (p > CERTAIN) & (p < 1 - CERTAIN)
    gap = np.abs(p - np.mean(seen.hypotheses > 0, axis=1))[open_]
    bound = 0.92 * np.sqrt(p * (1 - p) / seen.hypotheses.shape[1])[open_] + 0.02
    value = _ratio(_mean(gap), _mean(bound))
    return _check(value, THRESHOLDS["T12"], value <= THRESHOLDS["T12"])


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if np.size(values) else float("nan")


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


def _check(value: Any, threshold: Any, passed: Any) -> dict[str, Any]:
    return {"value": value, "threshold": threshold, "pass": bool(passed)}
