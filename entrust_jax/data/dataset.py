"""The data of a config: which cases there are, how they are split, and their volumes."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entrust_jax.data import layouts, nnunet, phantom, phantom_scene, preprocess, resampling, splits
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.runtime.logs import write_json


def phantom_spec(data: Any) -> phantom.Spec:
    """The phantom of a config's data section; `correlated` is there only where a config has correlated readers."""
    p = data.phantom
    return phantom.Spec(
        size=tuple(p.size),
        depth=p.depth,
        modalities=tuple(data.modalities),
        sites=p.sites,
        prior=p.prior if isinstance(p.prior, int | float) else tuple(p.prior),
        reliability=tuple(tuple(own) if isinstance(own, tuple | list) else own for own in p.reliability),
        ignorance=tuple(p.ignorance),
        radius=p.radius,
        jitter=p.jitter,
        variant=p.variant,
        correlated=tuple(p.correlated) if "correlated" in p else None,
    )


def split(data: Any, path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Case names of train, val, calibration and test, from `path` if it is there, else drawn and written; and a line

    for everything that a person should know of the listing and of a new split.

    A phantom's parts are consecutive numbers, as many as config.data.phantom.cases says. Raises UserError when the data
    is missing or `path` was drawn for other cases.
    """
    if data.layout == "phantom":
        if path.exists():
            return splits.load(path), []
        parts, first = {}, 0
        for part, count in zip(splits.PARTS, data.phantom.cases, strict=True):
            parts[part] = [phantom_scene.case_name(number) for number in range(first, first + count)]
            first += count
        write_json(path, parts | {"drawn_with": {"cases": list(data.phantom.cases)}})
        return parts, []
    found = listing(data)
    cases = layouts.without_mistakes(found)
    draw = splits.load_or_draw(path, cases, data.split, None if path.exists() else _given(data))
    return draw.parts, [*found.notes, *draw.lines]


def check(data: Any, path: Path | None = None) -> None:
    """Raises UserError for data that cannot be there: a second's look, before the minutes of compiling.

    path: where a split may have been kept; then it must fit, and no other one has to be possible any more.
    """
    if data.layout != "phantom":
        cases = find(data)
        if path is None or not path.exists():
            drawn(data, cases)
        else:
            splits.resume(path, cases, data.split)
        return
    phantom_spec(data)
    cases = tuple(data.phantom.cases)
    if len(cases) != len(splits.PARTS) or min(cases) < 1:
        raise UserError(
            f"config.data.phantom.cases is {cases}; give one number of cases, at least 1, for each of "
            + ", ".join(splits.PARTS)
        )


def drawn(data: Any, cases: Sequence[layouts.Case]) -> splits.Draw:
    """The split that a training of these scans would draw, not written down. Raises UserError where there is none."""
    labelled = [case for case in cases if case.label is not None]
    layouts.require_complete(labelled or cases, data.dir, tuple(data.modalities))
    return splits.plan(cases, data.split, _given(data))


def _given(data: Any) -> splits.Fold | None:
    """The fold that a data set brings with it, where the config does not say who is test."""
    if data.layout != "nnunet" or data.split.test_pattern or data.split.folds == 1:
        return None
    return nnunet.fold_of(Path(data.dir), int(data.split.fold))


def find(data: Any) -> list[layouts.Case]:
    """The cases of the data folder. Raises UserError as `listing` does, and for the first mistake in it."""
    return layouts.without_mistakes(listing(data))


def listing(data: Any) -> layouts.Listing:
    """The cases of the data folder and every mistake in it. Raises UserError when there is none, naming the way to get

    the data.
    """
    if data.layout in layouts.LAYOUTS and not (data.dir and layouts.is_place(data.layout, Path(data.dir))):
        wrong = f"{data.dir}: no such folder" if data.dir else "config.data.dir is not set"
        source = f"get the data from {data.source}; " if data.source else ""
        expected, _ = layouts.LAYOUTS[data.layout]
        raise UserError(
            f"{wrong}; {source}give its folder ({data.layout} layout: {expected}) as --config.data.dir=FOLDER "
            "(evaluate: --data_dir), or train configs/brats.py:demo, which needs no data"
        )
    found = layouts.list_cases(data.layout, data.dir, tuple(data.modalities), data.names.to_dict())
    try:
        return found._replace(cases=name_patients(found.cases, data.patient_pattern))
    except UserError as error:
        return found._replace(mistakes=[*found.mistakes, layouts.Mistake(str(error))])


def name_patients(cases: Sequence[layouts.Case], pattern: str) -> list[layouts.Case]:
    """The cases with the patient that `pattern` (re.search, its first group) finds in their names; "" changes nothing.

    Raises UserError for a pattern without a group, and for a name in which it finds nothing: a scan whose patient is
    unknown could be on both sides of a split.
    """
    if not pattern:
        return list(cases)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"config.data.patient_pattern {pattern!r}: {error}; mend the pattern") from None
    if not compiled.groups:
        raise UserError(
            f"config.data.patient_pattern {pattern!r} has no group; put the patient's part in brackets: '(.+)_[0-9]+$'"
        )
    found = [compiled.search(case.name) for case in cases]
    for case, match in zip(cases, found, strict=True):
        if match is None or not match[1]:
            raise UserError(
                f"config.data.patient_pattern {pattern!r} finds no patient in the case name {case.name}; "
                "mend the pattern"
            )
    return [dataclasses.replace(case, patient=match[1]) for case, match in zip(cases, found, strict=True) if match]


def reading(data: Any) -> dict[str, Any]:
    """What `preprocess.read_volume` must know of a config's data section."""
    return {
        "modalities": tuple(data.modalities),
        "reference": data.reference,
        "label_map": tuple(map(tuple, data.label_map)),
        "classes": tuple(data.classes),
        "intensity": data.intensity.to_dict(),
        "drop_copies": data.drop_copies,
    }


def plan_spacing(data: Any, names: Iterable[str]) -> dict[str, Any]:
    """The working spacing of config.data.spacing for these training cases, as spacing.json holds it.

    spacing: mm along D, H, W, 0 where an axis stays as scanned; empty where all do. Where it is planned, from the
    headers of the cases' reference scans: planned is nnU-Net's plan (`resampling.plan`), and spacing the same, with 0
    for D where the networks see axial slices, since nothing is made up between slices (nnU-Net's 2-D configuration does
    the same). Raises UserError for a value that is none, and when no header can be read.
    """
    asked = resampling.asked_spacing(data.spacing)
    if asked != resampling.PLANNED:
        return {"spacing": list(asked)}
    found = lattices(data, names)
    planned = resampling.plan(np.array([one.spacing for one in found]), np.array([one.sizes for one in found]))
    depth = planned[0] if len(data.patch) == 3 else 0.0
    return {"spacing": [depth, *planned[1:]], "planned": list(planned), "cases": len(found)}


def plan_strides(data: Any, scales: int, fold: int) -> tuple[tuple[int, ...], ...]:
    """`resampling.plan_strides` for patches of volumes: from the working spacing, and the median over all labelled

    cases where that leaves an axis as scanned. Raises UserError where there is no data, or no header can be read.
    """
    names = [phantom_scene.case_name(0)] if data.layout == "phantom" else [case.name for case in find(data)]
    median = np.median([one.spacing for one in lattices(data, names)], axis=0)
    asked = resampling.asked_spacing(data.spacing)
    if asked == resampling.PLANNED:
        asked = tuple(plan_spacing(data, names)["spacing"])
    spacing = [own or there for own, there in zip(asked or (0.0, 0.0, 0.0), median.tolist(), strict=True)]
    return resampling.plan_strides(spacing, tuple(data.patch), scales, fold)


def lattices(data: Any, names: Iterable[str]) -> list[resampling.Lattice]:
    """The grids of the reference scans of those of these cases that have a label, from their headers alone.

    Raises UserError when none can be read.
    """
    if data.layout == "phantom":
        own = data.phantom
        found = [resampling.Lattice((own.depth, *own.size), (1.0, 1.0, 1.0)) for _ in names]
    else:
        wanted, order = set(names), sorted(data.modalities, key=lambda name: name != data.reference)
        cases = [case for case in find(data) if case.name in wanted and case.label is not None]
        files = [next((case.images[name] for name in order if name in case.images), None) for case in cases]
        read = [resampling.header_lattice(path) for path in files if path is not None]
        found = [one for one in read if one is not None]
    if not found:
        raise UserError(
            f"{data.dir}: no training case has a header to plan config.data.spacing from; set it to millimetres or ()"
        )
    return found


def working_spacing(data: Any, path: Path, names: Iterable[str] = ()) -> tuple[float, ...]:
    """Millimetres along D, H, W that the networks see, 0 where an axis stays as scanned; () where all do.

    A plan is made once, from the cases `names`, written to `path` and never made again. Raises UserError for a value of
    config.data.spacing that is none, and for a plan that is missing (without `names`) or damaged.
    """
    asked = resampling.asked_spacing(data.spacing)
    if asked != resampling.PLANNED:
        return asked
    wanted = list(names)
    if wanted and not path.exists():
        write_json(path, plan_spacing(data, wanted))
    try:
        return resampling.asked_spacing([float(value) for value in json.loads(path.read_text())["spacing"]])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train in this working folder first") from None
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(
            f"{path}: is damaged ({type(error).__name__}: {error}); restore it or use a new --workdir"
        ) from None


def read(data: Any, names: Iterable[str], seed: int, spacing: Sequence[float] = ()) -> tuple[list[Volume], list[str]]:
    """The volumes with these names, and a line for every case that had to be left out or needs a word.

    `seed` makes the phantoms; scans do not depend on it. spacing: `working_spacing`, for what networks train on; ()
    reads every case on its reference scan's own grid. Raises UserError when none can be read.
    """
    wanted = list(names)
    if data.layout == "phantom":
        numbers = [int(name.rsplit("_", 1)[1]) for name in wanted]
        made = phantom_scene.volumes(phantom_spec(data), numbers, seed)
        return [resampling.at_spacing(volume, spacing) for volume in made], []
    by_name = {found.name: found for found in find(data)}
    absent = [name for name in wanted if name not in by_name]
    if absent:
        raise UserError(
            f"{data.dir}: lacks {absent[0]} ({len(absent)} of the split's cases); "
            "restore it, or name the folder that has it"
        )
    volumes, problems = [], []
    for name in wanted:  # one by one: no more than one case is held on two grids
        found, about = preprocess.read_volumes([by_name[name]], **reading(data))
        volumes += [resampling.at_spacing(volume, spacing) for volume in found]
        problems += about
    if not volumes:
        raise UserError(f"{data.dir}: no case could be read; the first problem was: {problems[0]}")
    return volumes, problems


def export_example(data: Any, folder: Path, name: str, seed: int) -> Path:
    """Writes a phantom as a folder of NIfTI files, so that predict has a case to start from."""
    number = int(name.rsplit("_", 1)[1])
    modalities: Sequence[str] = tuple(data.modalities)
    return phantom_scene.export(folder, phantom_spec(data), number, seed, modalities, tuple(map(tuple, data.label_map)))
