"""Several methods on the same patients: differences with intervals and tests, and their table."""

from collections.abc import Mapping, Sequence
from typing import Any

from entrust_jax.metrics import statistics
from entrust_jax.metrics.scoring import Scores
from entrust_jax.metrics.summary import (
    AREAS,
    RATER_METRICS,
    Quantity,
    join_patients,
    order_bounds,
    quantities,
    set_sizes,
)

COMPARED = {  # metric -> +1 where more is better, -1 where less is, 0 where neither
    "dice": 1,
    "location_dice": 0,
    "hd95": -1,
    "nsd": 1,
    "lesion_dice": 1,
    "lesion_f1": 1,
    "ece_classwise_roi/before": -1,
    "ece_classwise_roi/after": -1,
    "ece_classwise_body/after": -1,
    "nll/after": -1,
    "brier/after": -1,
    "error_auroc": 1,
    "error_auprc": 1,
    "aurc_referral": -1,
    "aurc": -1,
    "predicted_dice_mae": -1,
    "predicted_dice_spearman": 1,
    "hypothesis_diversity": 0,
    "hypothesis_dice": 0,
    "interslice_dice": 0,
    "interslice_dice_truth": 0,
    "ged2": -1,
    "hm_iou": 1,
    "d_max": 1,
    "ci_score": 1,
    "diversity": 0,
    "rater_diversity": 0,
    "seconds_per_case": -1,
}


def compare(methods: Mapping[str, Sequence[Scores]], *, resamples: int = statistics.RESAMPLES) -> dict[str, Any]:
    """Every method against the first, on the same patients.

    {"reference", "figures": {method: {metric: figure}}, "differences": {method: {metric: {"value", "ci95",
    "n", "p", "p_holm", "rank_biserial"}}}} where a difference is method less reference over the patients
    that both score, its interval from resampling those patients for both at once, p from the Wilcoxon test
    of per-patient differences (Holm over the metrics). Figures against several raters carry N and R, and have a
    difference at equal N only; areas under risk-coverage carry those of a random and of the best order. Raises
    ValueError unless all methods scored the same cases.
    """
    reference, *others = methods
    cases = {name: [(case.name, case.patient) for case in scores] for name, scores in methods.items()}
    if any(cases[name] != cases[reference] for name in others):
        raise ValueError("methods scored different cases")
    patients = {name: join_patients(scores) for name, scores in methods.items()}
    tables = {name: quantities(own) for name, own in patients.items()}
    sizes = {name: set_sizes(scores) for name, scores in methods.items()}
    figures = {
        name: {
            metric: statistics.figure(
                table[metric].statistic(table[metric].valid),
                int(table[metric].valid.sum()),
                resamples=resamples,
            )
            | (sizes[name] if metric in RATER_METRICS else order_bounds(patients[name]) if metric in AREAS else {})
            for metric in COMPARED
            if metric in table
        }
        for name, table in tables.items()
    }
    differences = {}
    for name in others:
        shared = [metric for metric in COMPARED if metric in tables[name] and metric in tables[reference]]
        if sizes[name] != sizes[reference]:
            shared = [metric for metric in shared if metric not in RATER_METRICS]
        rows = {metric: _difference(tables[name][metric], tables[reference][metric], resamples) for metric in shared}
        for metric, p in zip(shared, statistics.holm([rows[metric]["p"] for metric in shared]), strict=True):
            rows[metric]["p_holm"] = p
        differences[name] = rows
    return {"reference": reference, "figures": figures, "differences": differences}


def _difference(ours: Quantity, theirs: Quantity, resamples: int) -> dict[str, Any]:
    both = ours.valid & theirs.valid
    first, second = ours.statistic(both), theirs.statistic(both)
    found = statistics.figure(lambda w: first(w) - second(w), int(both.sum()), resamples=resamples)
    tested = ours.paired and theirs.paired
    result = (
        statistics.paired_test((ours.each() - theirs.each())[both]) if tested else {"p": None, "rank_biserial": None}
    )
    return {**found, "p": result["p"], "rank_biserial": result["rank_biserial"]}


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table: a row per metric, value with interval and difference to the first
    method."""
    reference, figures, differences = (
        comparison["reference"],
        comparison["figures"],
        comparison["differences"],
    )
    heads = ["metric", reference]
    for name in differences:
        heads += [name, f"{name} - {reference}", "p (Holm)"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for metric, better in COMPARED.items():
        if not any(metric in one for one in figures.values()):
            continue
        arrow = {1: " (higher is better)", -1: " (lower is better)", 0: ""}[better]
        row = [metric.replace("/", ", ") + arrow, _cell(figures[reference].get(metric))]
        for name, rows in differences.items():
            p = rows.get(metric, {}).get("p_holm")
            row += [
                _cell(figures[name].get(metric)),
                _cell(rows.get(metric), sign="+"),
                "–" if p is None else f"{p:.3g}",
            ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _cell(figure: Mapping[str, Any] | None, sign: str = "") -> str:
    if figure is None or figure["value"] is None:
        return "–"
    text = f"{figure['value']:{sign}.4g}"
    if figure["ci95"] is not None:
        text += f" [{figure['ci95'][0]:{sign}.4g}, {figure['ci95'][1]:{sign}.4g}]"
    more = f", N={figure['hypotheses']}" if "hypotheses" in figure else ""
    more += f", random {figure['random']:.4g}, best {figure['oracle']:.4g}" if "random" in figure else ""
    return text + f" (n={figure['n']}{more})"
