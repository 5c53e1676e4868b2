"""The regions suite: what a model calls doubtful, beside the truth; ten regions for the eye, all of them in sums.

A region is told by its error probability alone, so that the mean of e over all regions of a cause should be the share
of their voxels that are wrong. Whether the cause is the true one no label knows: a person looks at the sheet and fills
the last column of the table.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from entrust_jax import api
from entrust_jax.baselines.unet import UNet
from entrust_jax.data import preprocess
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.report import curves, markdown, output, slices
from entrust_jax.report import regions as pictures
from entrust_jax.report.regions import Sight
from entrust_jax.runtime import logs
from entrust_jax.trustmap import explanation

COUNT = 10  # regions that are looked at
PER_PATIENT = 3  # of them, at most
FREE = ("data.dir", "data.split.fold")  # in which folders of one set may differ
TABLE, SHEET, RECORDS = "regions.md", "regions.png", "regions.json"


class Truth(NamedTuple):
    """Millilitres of a region: those with a true label, of these the wrong ones and those expected to be wrong (the sum

    of e). Of several raters the mean.
    """

    known: float
    wrong: float
    expected: float


@dataclasses.dataclass(frozen=True)
class Region:
    """A region of a case; record as `explanation.records` makes it, with its sentence. sight: None where it cannot be

    picked.
    """

    case: str
    patient: str
    record: dict[str, Any]
    truth: Truth
    sight: Sight | None


def check(methods: Mapping[str, api.Trained], split: str) -> None:
    """Raises UserError unless all are EnTrusts, trained alike on parts of one set and tested on different cases."""
    first, *others = methods
    for trained in methods.values():
        if isinstance(trained.network, UNet):
            raise UserError(f"{trained.workdir}: holds a U-Net, which gives no reasons; name a trained EnTrust")
    if others and split == "all":
        raise UserError("--split=all: every folder would predict every case; name one working folder")
    asked = settings(methods[first])
    for name in others:
        own = settings(methods[name])
        for key in sorted(asked.keys() | own.keys()):
            if own.get(key) != asked.get(key):
                raise UserError(f"--workdir: {name} and {first} differ in config.{key}; name folds of one training")
    owners: dict[str, str] = {}
    for name, trained in methods.items():
        for case in trained.splits["test"]:
            if owners.setdefault(case, name) != name:
                raise UserError(f"--workdir: {owners[case]} and {name} both test {case}; name different folds")


def check_new(folder: Path) -> None:
    """Raises UserError where a table lies that a person may have filled."""
    if (folder / TABLE).exists():
        raise UserError(f"{folder / TABLE}: is there, and a person may have filled it; name another --output")


def settings(trained: api.Trained) -> dict[str, Any]:
    """A folder's config by dotted names, without what the folds of a set differ in."""
    return {name: value for name, value in api.flat(trained.config.to_dict()).items() if name not in FREE}


def regions_of(
    volume: Volume, prediction: Mapping[str, Any], modalities: Sequence[str], classes: Sequence[str], reference: str
) -> list[Region]:
    """Every region of a labelled case, not the ten largest alone, most expected errors first."""
    error, delivered = prediction["error_probability"], prediction["label"]
    records = explanation.records(
        error, delivered, volume.spacing, modalities, classes, preprocess.shown(volume),
        cause=prediction["cause"],
        conflict_pairs=prediction["kappa_pairs"],
        support=prediction["support"],
        unimodal=prediction["unimodal"],
        attribution=prediction["attribution"],
        counterfactual=prediction["counterfactual"],
        conflict_uncertainty=prediction["conflict_uncertainty"],
        largest=error.size,
    )  # fmt: skip
    numbered = explanation.components(error, prediction["cause"])
    raters = preprocess.labels_of(volume)
    known = np.mean(raters >= 0, axis=0)
    wrong = np.mean((raters >= 0) & (raters != delivered), axis=0)
    voxel_ml = float(np.prod(volume.spacing)) / 1000
    sums = [voxel_ml * np.bincount(numbered.ravel(), each.ravel()) for each in (known, wrong, error * known)]
    base = modalities.index(reference)
    scans = [slices.window(image, volume.body) for image in volume.image]
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for record in records:
        z, h, w = (record["place"][axis] for axis in ("slice", "row", "column"))
        number = numbered[z, h, w]
        seen[record["cause"]] += 1
        sight = None
        if seen[record["cause"]] <= PER_PATIENT:  # later ones of this cause are never picked
            sight = pictures.look(volume, scans, prediction, numbered[z] == number, z, base)
        where = output.located(record, volume.reference) if volume.reference is not None else {}
        truth = Truth(*(float(each[number]) for each in sums))
        found.append(Region(volume.name, volume.patient, record | where, truth, sight))
    return found


def pick(regions: Sequence[Region]) -> list[Region]:
    """At most COUNT regions: in turn one of each cause that occurs, of its the one with most expected errors, at most

    PER_PATIENT of a patient.
    """
    order = sorted(regions, key=lambda one: (-one.record["expected_error_ml"], one.case, one.record["index"]))
    queues = [[one for one in order if one.record["cause"] == cause] for cause in explanation.CAUSES[1:]]
    taken: collections.Counter[str] = collections.Counter()
    chosen: list[Region] = []
    while any(queues):
        for queue in queues:
            while queue and taken[queue[0].patient] == PER_PATIENT:
                queue.pop(0)
            if queue and len(chosen) < COUNT:
                chosen.append(queue.pop(0))
                taken[chosen[-1].patient] += 1
        if len(chosen) == COUNT:
            break
    return chosen


def by_cause(regions: Sequence[Region]) -> dict[str, dict[str, Any]]:
    """Sums over the regions of each cause that occurs and over all: their number, patients, ml, mean e and true share

    wrong, the latter two over the voxels with a true label (None where there is none).
    """
    groups = {cause: [one for one in regions if one.record["cause"] == cause] for cause in explanation.CAUSES[1:]}
    groups["all"] = list(regions)
    found = {}
    for cause, own in groups.items():
        if own:
            known, wrong, expected = (sum(values) for values in zip(*(one.truth for one in own), strict=True))
            found[cause] = {
                "regions": len(own),
                "patients": len({one.patient for one in own}),
                "volume_ml": sum(one.record["volume_ml"] for one in own),
                "mean_error": expected / known if known else None,
                "share_wrong": wrong / known if known else None,
            }
    return found


def share_wrong(region: Region) -> float | None:
    """The true share of a region's voxels that are wrong; None where no label is known."""
    return region.truth.wrong / region.truth.known if region.truth.known else None


def run(
    methods: Mapping[str, api.Trained], cases: Iterable[tuple[str, Volume]], folder: Path, about: Mapping[str, Any]
) -> None:
    """Predicts every case by the method named with it, and writes the sheet, the table and the records into `folder`.

    Raises UserError where nothing is doubtful.
    """
    data = next(iter(methods.values())).config.data
    modalities, classes = tuple(data.modalities), tuple(data.classes)
    found: list[Region] = []
    names, trained_on = [], []
    for name, volume in cases:
        prediction = api.predict_volume(methods[name], volume)
        own = regions_of(volume, prediction, modalities, classes, data.reference)
        print(f"{volume.name}: {len(own)} regions", flush=True)
        names.append(volume.name)
        if any(volume.name in methods[name].splits[part] for part in ("train", "val", "calibration")):
            trained_on.append(volume.name)
        found += own
    if not found:
        raise UserError(f"no region of {len(names)} cases is doubtful enough for review: there is nothing to look at")
    chosen, sums = pick(found), by_cause(found)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{len(chosen)} of {len(found)} regions to review"
    picture = pictures.sheet([row(i, one) for i, one in enumerate(chosen, 1)], modalities, len(classes), title)
    curves.save(picture, folder / SHEET, palette=True)
    logs.write_json(
        folder / RECORDS,
        {
            **about,
            "cases": names,
            "trained_on": trained_on,
            "places": output.PLACES,
            "by_cause": sums,
            "regions": [*map(as_record, chosen)],
        },
    )
    logs.write_bytes(folder / TABLE, table(chosen, sums).encode())


def as_record(region: Region) -> dict[str, Any]:
    """A region for JSON."""
    share = share_wrong(region)
    really = None if share is None else share >= 0.5
    return {"case": region.case, "share_wrong": share, "mostly_wrong": really, "truth_ml": region.truth._asdict()} | (
        region.record
    )


def row(number: int, region: Region) -> pictures.Row:
    """A region for the sheet."""
    record, share = region.record, share_in_words(share_wrong(region))
    return pictures.Row(
        heading=f"{number}   {region.case}   {record['cause']}",
        cause=record["cause"],
        words=[f"wrong: {share} in truth, {record['mean_error']:.2f} expected (mean e)", record["sentence"]],
        sight=picked_sight(region),
    )


def picked_sight(region: Region) -> Sight:
    """The sight of a region that `pick` chose."""
    assert region.sight is not None, "only the first regions of a cause in a case can be picked"
    return region.sight


def table(chosen: Sequence[Region], sums: Mapping[str, Mapping[str, Any]]) -> str:
    """The regions and the sums as markdown; the last column is for a person."""
    head = ["", "case", "cause", "slice, row, column", "ml", "mean e", "true share wrong", "blamed (nats)", "sentence"]
    rows = []
    for number, one in enumerate(chosen, 1):
        record = one.record
        place = ", ".join(str(record["place"][axis]) for axis in ("slice", "row", "column"))
        blame = record["blame"]
        blamed = "-" if blame is None else f"{blame} ({record['attribution'][blame]:+.2f})"
        figures = [f"{record['volume_ml']:.2f}", f"{record['mean_error']:.2f}", share_in_words(share_wrong(one))]
        rows.append([str(number), one.case, record["cause"], place, *figures, blamed, record["sentence"], ""])
    lines = markdown.table([*head, "seen by eye"], rows)
    lines += ["", "All regions of all cases, by their cause:", ""]
    counted = [
        [
            *(cause, str(one["regions"]), str(one["patients"]), f"{one['volume_ml']:.1f}"),
            *map(share_in_words, (one["mean_error"], one["share_wrong"])),
        ]
        for cause, one in sums.items()
    ]
    lines += markdown.table(["cause", "regions", "patients", "ml", "mean e", "true share wrong"], counted)
    return "\n".join(lines) + "\n"


def share_in_words(share: float | None) -> str:
    """Two decimals; '-' where it is not known."""
    return "-" if share is None else f"{share:.2f}"
