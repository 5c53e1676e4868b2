"""The figures of the conflict suite from what was found in each subject: the patient is the unit. Definitions: ours.

A: a change in one modality; A': the same change in all of them.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from entrust_jax.data import injection
from entrust_jax.metrics import conflict, statistics, usefulness
from entrust_jax.report import markdown

RIM = 2  # voxels: where a lesion's outline is, samples disagree about the outline, conflict or not
OVERLAP = 0.1  # share of a region that may lie in another patient's own one, for his map to be a null
HEADLINE = "disagreement"  # of EnTrust's hypotheses: what should follow conflict
PARTS = ("auroc", "ratio", "inner_auroc", "inner_ratio")  # of the figures, those given for parts of the injections
AIMS = {"auroc": 0.85, "ratio": 2.0}
RESAMPLES = statistics.RESAMPLES


class Result(NamedTuple):
    """What was found in one subject. rows: one for each injection and modality; pictures: what the figure shows."""

    patient: str
    rows: list[dict[str, Any]]
    faith: dict[str, float]
    pictures: list[dict[str, Any]]


def placed(
    region: Bool[np.ndarray, "d h w"], source: Bool[np.ndarray, "d h w"], target: Bool[np.ndarray, "e i j"]
) -> Bool[np.ndarray, "e i j"]:
    """A region of one body at the same place of another, by the bounding boxes of both."""
    result = np.zeros(target.shape, bool)
    if not (source.any() and target.any() and region.any()):
        return result
    moved = []
    for axis, at in enumerate(np.nonzero(region)):
        ends = []
        for body in (source, target):
            hit = np.flatnonzero(body.any(axis=tuple(a for a in range(3) if a != axis)))
            ends.append((int(hit[0]), int(hit[-1])))
        (low, high), (new_low, new_high) = ends
        share = (at - low) / max(high - low, 1)
        moved.append(np.clip(np.rint(new_low + share * (new_high - new_low)).astype(int), 0, target.shape[axis] - 1))
    result[tuple(moved)] = True
    return result & target


def foreign(results: Sequence[Result], method: str, measure: str) -> Float[np.ndarray, "n n"]:
    """The AUROC for each patient's regions, A against A', read from the maps of each other one in whom the same

    modality was altered elsewhere: what the measure would score without seeing the patient. NaN where it was not, and
    for the patient himself.
    """
    found = np.full((len(results), len(results)), np.nan)
    for i, j in itertools.permutations(range(len(results)), 2):
        values = [borrowed(row, results[j].rows, method, measure) for row in results[i].rows]
        found[i, j] = statistics.finite_mean(values)
    return found


def borrowed(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]], method: str, measure: str) -> float:
    """The AUROC of `foreign` for one injection, by the first of another patient's that fits; NaN where none does."""
    for theirs in others:
        if theirs["modality"] != row["modality"]:
            continue
        region = placed(row["region"], row["body"], theirs["body"])
        if region.any() and np.mean(theirs["region"][region]) <= OVERLAP:
            one, all_ = theirs["maps"][method][measure]
            score = np.concatenate([one[region], all_[region]])
            return usefulness.auroc(score, np.arange(len(score)) < region.sum())
    return math.nan


def by_patient(results: Sequence[Result], value: Callable[[dict[str, Any]], Any]) -> Float[np.ndarray, " n"]:
    """Mean over each patient's rows; NaN where none has the value."""
    found = []
    for result in results:
        own = [value(row) for row in result.rows]
        own = [x for x in own if x is not None and np.isfinite(x)]
        found.append(np.mean(own) if own else math.nan)
    return np.array(found, float)


def mean_figure(values: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """Mean over the patients that have a value, with its interval."""
    used = values[np.isfinite(values)]
    return statistics.figure(lambda w: statistics.weighted_mean(used, w), len(used), resamples=RESAMPLES)


def ratio_figure(top: Float[np.ndarray, " n"], bottom: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """Ratio of two means over patients, with its interval."""
    both = np.stack([top, bottom], axis=1)[np.isfinite(top + bottom)]
    return statistics.figure(lambda w: statistics.pooled_ratio(both, w), len(both), resamples=RESAMPLES)


def inner(region: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """The region without its rim; the region itself where that leaves nothing."""
    rest = ~injection.grown(~region, RIM)
    return rest if rest.any() else region


def inside(row: Mapping[str, Any], method: str, measure: str) -> dict[str, float]:
    """AUROC and means of A and A' away from the rim."""
    one, all_ = row["maps"][method][measure]
    region = inner(row["region"])
    values = np.concatenate([one[region], all_[region]])
    auroc = usefulness.auroc(values, np.arange(len(values)) < region.sum())
    return {"auroc": auroc, "one": float(one[region].mean()), "all": float(all_[region].mean())}


def figures(results: Sequence[Result], method: str, measure: str) -> dict[str, Any]:
    """All figures of one measure of one method; those called inner are taken away from the region's rim."""

    def of(key: str) -> Float[np.ndarray, " n"]:
        return by_patient(results, lambda row: row["methods"][method][measure][key])

    one, all_, none, other = (of(key) for key in ("one", "all", "none", "unrelated"))
    difference = (one - all_)[np.isfinite(one - all_)]
    core = {
        key: by_patient(results, lambda row, key=key: inside(row, method, measure)[key])
        for key in ("auroc", "one", "all")
    }
    return {
        "inner_auroc": mean_figure(core["auroc"]),
        "inner_ratio": ratio_figure(core["one"], core["all"]),
        "auroc": mean_figure(of("auroc")),
        "ratio": ratio_figure(one, all_),
        "ratio_to_untouched": ratio_figure(one, none),
        "ratio_to_unrelated": ratio_figure(one, other),
        "auroc_to_unrelated": mean_figure(of("auroc_unrelated")),
        "kendall_tau": mean_figure(of("tau")),
        "p_sign_flip": statistics.sign_flip_p(difference) if difference.size else None,
        "null": conflict.shift_null(of("auroc"), foreign(results, method, measure)),
        "line": np.mean([row["methods"][method][measure]["line"] for r in results for row in r.rows], axis=0).tolist(),
    }


def subset(results: Sequence[Result], keep: Callable[[dict[str, Any]], bool]) -> list[Result]:
    """The rows that fulfil a condition, of the patients that have any."""
    kept = [result._replace(rows=[row for row in result.rows if keep(row)]) for result in results]
    return [result for result in kept if result.rows]


def blame_figures(results: Sequence[Result]) -> dict[str, Any]:
    """How often the altered modality is blamed: in all, and where the label stood against it or followed it.

    Where the exact law is known, as_exact: the share of the injections in which the same modality is blamed as by the
    exact posterior, or both times another one. Not its rate over the exact rate: where each of two readers is turned
    round once at every site one of both is blamed whatever is said, and even the reverse of Bayes has his rate.
    """
    found: dict[str, Any] = {"all": mean_figure(by_patient(results, lambda row: row.get("blamed")))}
    for name, moved in (("overruled", False), ("followed", True)):
        part = subset(results, lambda row, moved=moved: row["moved"] == moved)
        found[name] = mean_figure(by_patient(part, lambda row: row.get("blamed")))
    found["chance"] = float(np.nanmean(by_patient(results, lambda row: row.get("chance"))))
    part = subset(results, lambda row: "exact" in row)
    if part:
        found["as_exact"] = mean_figure(by_patient(part, lambda row: row["blamed"] == row["exact"]["blamed"]))
        by_chance = by_patient(part, lambda row: row["chance"] if row["exact"]["blamed"] else 1 - row["chance"])
        found["as_exact_by_chance"] = float(np.mean(by_chance))
    return found


def summarise(
    results: Sequence[Result], names: Mapping[str, Sequence[str]], modalities: Sequence[str]
) -> dict[str, Any]:
    """conflict.json without what it was made with. names: the measures of each method, EnTrust first."""
    first = next(iter(names))
    table = {f"{name}: {key}": figures(results, name, key) for name, keys in names.items() for key in keys}
    baselines = [f"{name}: {key}" for name, keys in names.items() if name != first for key in keys]

    def of_patients(name: str, key: str) -> Float[np.ndarray, " n"]:
        return by_patient(results, lambda row: row["methods"][name][key]["auroc"])

    ours = of_patients(first, HEADLINE)
    above = {label: mean_figure(ours - of_patients(*label.rsplit(": ", 1))) for label in baselines}
    groups = {kind: subset(results, lambda row, kind=kind: row["kind"] == kind) for kind in kinds(results)}
    for m, modality in enumerate(modalities):
        groups[f"altered in {modality}"] = subset(results, lambda row, m=m: row["modality"] == m)
    groups["where the change in all modalities moved the label"] = subset(results, lambda row: row["moved_by_all"])
    parts = {
        name: {
            "rows": sum(len(result.rows) for result in part),
            **{key: value for key, value in figures(part, first, HEADLINE).items() if key in PARTS},
            "kappa_auroc": mean_figure(
                by_patient(part, lambda row: row["methods"][first].get("conflict", {}).get("auroc"))
            ),
            "label_moved": mean_figure(by_patient(part, lambda row: row["moved"])),
            "blame": blame_figures(part)["all"],
        }
        for name, part in groups.items()
        if part
    }
    head = table[f"{first}: {HEADLINE}"]
    summary: dict[str, Any] = {
        "patients": len(results),
        "injections": sum(len(result.rows) for result in results),
        "measures": table,
        "above_baselines": above,
        "parts": parts,
        "blame": blame_figures(results),
        "hypotheses_moved": mean_figure(by_patient(results, lambda row: row.get("hypotheses_moved"))),
        "label_moved": mean_figure(by_patient(results, lambda row: row["moved"])),
        "label_moved_by_all": mean_figure(by_patient(results, lambda row: row["moved_by_all"])),
        "spearman": mean_figure(by_patient(results, lambda row: row.get("spearman"))),
        "partial_spearman": mean_figure(by_patient(results, lambda row: row.get("partial_spearman"))),
        "faithfulness": faith_figures(results),
    }
    rows = [row for result in results for row in result.rows if "exact" in row]
    if rows:
        one, all_, auroc = (float(np.mean([row["exact"][key] for row in rows])) for key in ("one", "all", "auroc"))
        summary["exact"] = {"one": one, "all": all_, "ratio": one / all_, "auroc_of_as_many_draws": auroc}
    return summary | {"aims": aims(head, above, summary["blame"])}


def faith_figures(results: Sequence[Result]) -> dict[str, Any]:
    """Deletion and randomised weights over the patients in whom something was found."""
    top, other, alike = (
        np.array([result.faith.get(key, math.nan) for result in results])
        for key in ("deleted_top", "deleted_other", "randomised")
    )
    return {
        "label_changed_without_top_modality": mean_figure(top),
        "label_changed_without_another": mean_figure(other),
        "difference": mean_figure(top - other),
        "correlation_with_shuffled_weights": mean_figure(alike),
    }


def aims(head: Mapping[str, Any], above: Mapping[str, Any], blame: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, and whether it was reached."""

    def low(one: Mapping[str, Any]) -> float:
        return one["ci95"][0] if one.get("ci95") else -math.inf

    found: dict[str, Any] = {}
    for where, prefix in (("", ""), (f", {RIM} voxels inside the region", "inner_")):
        auroc, ratio = head[f"{prefix}auroc"], head[f"{prefix}ratio"]
        found[f"AUROC of A against A' at least {AIMS['auroc']:g}{where}"] = _met(auroc, auroc["value"], AIMS["auroc"])
        value = ratio["value"] if low(ratio) > 1 else None
        found[f"divergence ratio at least {AIMS['ratio']:g}, interval above 1{where}"] = _met(
            ratio, value, AIMS["ratio"]
        )
    if above:
        least = min(above.values(), key=low)
        found["AUROC above every baseline's, all intervals of the differences above 0"] = _met(least, low(least), 0.0)
    if "as_exact" in blame:
        found["blame as the exact posterior's in at least .95"] = _met(
            blame["as_exact"], blame["as_exact"]["value"], 0.95
        )
    return found


def _met(figure: Mapping[str, Any], value: float | None, aim: float) -> dict[str, Any]:
    return {**figure, "met": bool(value is not None and value >= aim)}


def kinds(results: Sequence[Result]) -> list[str]:
    """What was injected, in order of appearance."""
    return list(dict.fromkeys(row["kind"] for result in results for row in result.rows))


def in_words(figure: Mapping[str, Any]) -> str:
    """0.87 [0.81, 0.92]: with its interval, or the null's outer 5 %."""
    if figure.get("value") is None:
        return "–"
    text, ends = f"{figure['value']:.3g}", figure.get("ci95") or figure.get("quantiles")
    return f"{text} [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else text


def table(summary: Mapping[str, Any]) -> str:
    """conflict.md."""
    lines = ["# Conflict suite", "", f"{summary['patients']} patients, {summary['injections']} injections. ", ""]
    lines[2] += "A: a change in one modality; A': the same change in all. Means over patients with 95 % intervals."
    lines[2] += " Null: every patient read from the maps of the k-th after him, for all k; its mean and outer 5 %."
    rows = [[name, in_words(one), "yes" if one["met"] else "**no**"] for name, one in summary["aims"].items()]
    lines += markdown.table(["aim", "value", "met"], rows)
    head = ["method: measure", "AUROC A against A'", "A over A'", f"AUROC {RIM} voxels inside", "A over A' there"]
    head += ["A over untouched", "A over unrelated texture"]
    head += [
        "AUROC against texture",
        "Kendall tau of the dose",
        "p (sign flips)",
        "null: another patient's map",
        "p of shifts",
    ]
    keys = (*PARTS, "ratio_to_untouched", "ratio_to_unrelated", "auroc_to_unrelated", "kendall_tau")
    rows = [
        [
            name,
            *(in_words(one[key]) for key in keys),
            "–" if one["p_sign_flip"] is None else f"{one['p_sign_flip']:.2g}",
            in_words(one["null"]),
            "–" if one["null"]["p"] is None else f"{one['null']['p']:.2g}",
        ]
        for name, one in summary["measures"].items()
    ]
    lines += ["", *markdown.table(head, rows), ""]
    if summary["above_baselines"]:
        rows = [[name, in_words(one)] for name, one in summary["above_baselines"].items()]
        lines += [*markdown.table(["baseline", "AUROC of EnTrust's disagreement less the baseline's"], rows), ""]
    head = ["part", "injections", "AUROC A against A'", "A over A'", f"AUROC {RIM} voxels inside", "A over A' there"]
    head += ["AUROC of kappa", "label moved", "blame is right"]
    rows = [
        [name, str(one["rows"]), *(in_words(one[k]) for k in (*PARTS, "kappa_auroc", "label_moved", "blame"))]
        for name, one in summary["parts"].items()
    ]
    lines += [*markdown.table(head, rows), ""]
    blame, faith = summary["blame"], summary["faithfulness"]
    rows = [
        ["blame falls on the altered modality", in_words(blame["all"])],
        ["by chance", f"{blame['chance']:.3g}"],
        ["where the label stood against it", in_words(blame["overruled"])],
        ["where the label followed it", in_words(blame["followed"])],
    ]
    if "as_exact" in blame:
        rows.append(["blame as the exact posterior's", in_words(blame["as_exact"])])
        rows.append(["the same by chance", f"{blame['as_exact_by_chance']:.3g}"])
    if "exact" in summary:
        rows.append(["exact divergence ratio", f"{summary['exact']['ratio']:.3g}"])
        best = f"{summary['exact']['auroc_of_as_many_draws']:.3g}"
        rows.append(["AUROC of the disagreement of as many draws from the exact law", best])
    rows += [
        ["label moved by the change in one modality", in_words(summary["label_moved"])],
        ["label moved by the change in all", in_words(summary["label_moved_by_all"])],
        ["hypotheses moved by the change in one", in_words(summary["hypotheses_moved"])],
        ["Spearman of disagreement and kappa near the region", in_words(summary["spearman"])],
        ["the same given distance to the border and unimodal entropy", in_words(summary["partial_spearman"])],
        ["deletion: label changed without the modality of the highest phi",
         in_words(faith["label_changed_without_top_modality"])],
        ["deletion: label changed without another one", in_words(faith["label_changed_without_another"])],
        ["deletion: difference", in_words(faith["difference"])],
        ["rank correlation of phi with that of shuffled weights", in_words(faith["correlation_with_shuffled_weights"])],
    ]  # fmt: skip
    return "\n".join([*lines, *markdown.table(["reasons", "value"], rows)]) + "\n"


def flat_rows(results: Sequence[Result], modalities: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each injection, as the JSON keeps it."""
    left_out = ("methods", "maps", "region", "body", "modality")
    return [
        {"patient": result.patient, "modality": modalities[row["modality"]]}
        | {key: value for key, value in row.items() if key not in left_out}
        | {f"{name}: {key}": {k: v for k, v in one.items() if k in ("auroc", "one", "all", "none", "unrelated", "tau")}
           for name, keys in row["methods"].items() for key, one in keys.items()}
        for result in results
        for row in result.rows
    ]  # fmt: skip
