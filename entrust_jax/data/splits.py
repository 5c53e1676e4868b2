"""Who trains, who validates, who calibrates, who tests: drawn once, by patient, and kept in splits.json."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from entrust_jax.data.cases import Case
from entrust_jax.errors import UserError

PARTS = ("train", "val", "calibration", "test")
NAMED = 3  # cases in a line that is about many


class Fold(NamedTuple):
    """Who trains and who tests as somebody else has drawn it: fold `number` of `count` in a file, case names."""

    file: Path
    number: int
    count: int
    train: tuple[str, ...]
    val: tuple[str, ...]


class Draw(NamedTuple):
    """A split: case names by part, what it was drawn with, and a line for everything a person should know of it."""

    parts: dict[str, list[str]]
    drawn_with: dict[str, Any]
    lines: list[str]


def draw(
    names_and_patients: Iterable[tuple[str, str]], *, seed: int, folds: int, fold: int, test_pattern: str
) -> dict[str, list[str]]:
    """Case names of train, val, calibration and test; all cases of a patient in one part.

    test: fold `fold` of `folds`, or every patient with a case whose name matches `test_pattern` (re.search).
    Of the others val takes an eighth and calibration a quarter (at least one patient each): with five folds
    about half train, a tenth val, a fifth calibration and a fifth test. One fold is no split: every case in every part,
    for a set too small to divide, to see that it runs.
    The order is that of a hash of seed and patient, so it depends neither on the listing nor on the machine.
    Raises UserError when a part would be empty or a value makes no sense.
    """
    patients = _by_patient(names_and_patients)
    if test_pattern:
        try:
            pattern = re.compile(test_pattern)
        except re.error as error:
            raise UserError(f"config.data.split.test_pattern {test_pattern!r}: {error}; mend the pattern") from None
        test = [patient for patient, names in patients.items() if any(map(pattern.search, names))]
        if not test:
            raise UserError(f"config.data.split.test_pattern {test_pattern!r} matches no case name; mend the pattern")
    else:
        if not 0 <= fold < folds:
            raise UserError(
                f"config.data.split: fold {fold} of {folds} folds; set folds >= 1 and fold to 0 ... folds - 1"
            )
        if folds == 1:
            return {part: sorted(name for names in patients.values() for name in names) for part in PARTS}
        test = _shuffled(patients, seed, "folds")[fold::folds]
    mend = (
        "add patients, change folds or test_pattern, say by config.data.patient_pattern who is one, or set folds=1 to"
        " see that it runs (all cases in all parts)"
    )
    return _divide(patients, test, seed, fold, "config.data.split", mend)


def draw_within(
    names_and_patients: Iterable[tuple[str, str]], given: Fold, *, seed: int
) -> tuple[dict[str, list[str]], list[str]]:
    """The parts where a fold is given: its val is test; val and calibration are drawn from its train as `draw` does.

    Also the names of the cases that the fold does not name; they are in no part. Raises UserError for a patient on both
    sides, and when a part would be empty.
    """
    pairs = list(names_and_patients)
    train, val = set(given.train), set(given.val)
    patients = _by_patient((name, patient) for name, patient in pairs if name in train | val)
    test = [patient for patient, names in patients.items() if val & set(names)]
    if both := [patient for patient in test if train & set(patients[patient])]:
        raise UserError(
            f"{given.file}: fold {given.number} has patient {sorted(both)[0]} in train and in val; mend the file, or"
            " draw by patient: move it away or set config.data.split.test_pattern"
        )
    left = sorted(name for name, _ in pairs if name not in train | val)
    whose = f"{given.file}: fold {given.number}"
    return _divide(patients, test, seed, given.number, whose, "mend the file or move it away"), left


def _by_patient(names_and_patients: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    patients: dict[str, list[str]] = {}
    for name, patient in names_and_patients:
        patients.setdefault(patient, []).append(name)
    return patients


def _shuffled(people: Iterable[str], seed: int, salt: str) -> list[str]:
    return sorted(people, key=lambda p: (hashlib.sha256(f"{seed}/{salt}/{p}".encode()).digest(), p))


def _divide(
    patients: dict[str, list[str]], test: list[str], seed: int, fold: int, whose: str, mend: str
) -> dict[str, list[str]]:
    """The four parts, once it is known which patients are test. Raises UserError when one is empty."""
    chosen = set(test)
    # Salted with the fold, so that five folds do not share their val patients.
    rest = _shuffled((patient for patient in patients if patient not in chosen), seed, f"rest {fold}")
    val, calibration = max(1, round(len(rest) / 8)), max(1, round(len(rest) / 4))
    people = {
        "train": rest[val + calibration :],
        "val": rest[:val],
        "calibration": rest[val : val + calibration],
        "test": test,
    }
    for part in PARTS:
        if not people[part]:
            raise UserError(
                f"{whose} leaves no patient for {part} ({len(patients)} patients, {len(test)} of them test); {mend}"
            )
    return {part: sorted(name for patient in people[part] for name in patients[patient]) for part in PARTS}


def load(path: Path) -> dict[str, list[str]]:
    """The four parts of a splits.json. Raises UserError as `read` does."""
    return read(path)[0]


def read(path: Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The four parts of a splits.json and the values it was drawn with.

    Raises UserError when it is missing or damaged, and for a case in two parts: only one fold has it everywhere.
    """
    try:
        content = json.loads(Path(path).read_text())
        parts = {part: [str(name) for name in content[part]] for part in PARTS}
        drawn_with = dict(content["drawn_with"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train in this working folder first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is damaged ({type(error).__name__}: {error}); restore it or use a new --workdir"
        ) from None
    if not _everywhere(drawn_with) and (both := _in_two(parts, {name: name for own in parts.values() for name in own})):
        name, *where = both
        raise UserError(
            f"{path}: case {name} is in {where[0][0]} and in {where[1][0]}, so it is no split any more; restore the"
            " file or use a new --workdir"
        )
    return parts, drawn_with


def _everywhere(drawn_with: Mapping[str, Any]) -> bool:
    """Whether a split was drawn as one fold, with every case in every part."""
    return drawn_with.get("folds") == 1 and not drawn_with.get("test_pattern")


def _in_two(
    parts: Mapping[str, Sequence[str]], whose: Mapping[str, str]
) -> tuple[str, tuple[str, str], tuple[str, str]] | None:
    """The first owner (`whose`, by case) who is in two parts, and (part, case) of two; None where nobody is."""
    first: dict[str, tuple[str, str]] = {}
    for part in PARTS:
        for name in parts[part]:
            found = first.setdefault(whose[name], (part, name))
            if found[0] != part:
                return whose[name], found, (part, name)
    return None


def plan(cases: Sequence[Case], split: Any, given: Fold | None = None) -> Draw:
    """The split that would be drawn of these cases: of those with a label, for the others can be in no part.

    split: attributes seed, folds, fold, test_pattern (config.data.split). given: the fold that a data set brings with
    it; it goes before a draw by `folds`. Raises UserError where no split is possible, and where the fold names a case
    that is not there.
    """
    labelled = [case for case in cases if case.label is not None]
    if not labelled:
        raise UserError(
            f"none of the {len(cases)} cases in config.data.dir has a label, and training needs them; add the labels"
        )
    bare = sorted(case.name for case in cases if case.label is None)
    lines = [f"no label, so in no part of the split (predict can still read them): {some(bare)}"] if bare else []
    pairs, values = [(case.name, case.patient) for case in labelled], _values(split)
    if given is None:
        if values["folds"] == 1 and not values["test_pattern"]:
            lines.append("config.data.split.folds is 1: every case is in every part, so no score says anything")
        return Draw(draw(pairs, **values), values, lines)
    if absent := sorted({*given.train, *given.val} - {case.name for case in cases}):
        raise UserError(
            f"{given.file}: fold {given.number} names what is not there: {some(absent)}; restore it or mend the file"
        )
    parts, left = draw_within(pairs, given, seed=values["seed"])
    lines.append(
        f"{given.file}: val of its fold {given.number} of {given.count} is the test part;"
        " our val and calibration are drawn from its train"
    )
    if left:
        lines.append(f"{given.file}: fold {given.number} does not name, so in no part of the split: {some(left)}")
    return Draw(parts, values | {given.file.name: f"fold {given.number} of {given.count}"}, lines)


def some(names: Sequence[str]) -> str:
    """How many and the first of them, for a line: 5 cases (a, b, c, ...)."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} case{'s' if len(names) > 1 else ''} ({', '.join(names[:NAMED])}{more})"


def _values(split: Any) -> dict[str, Any]:
    return {
        "seed": int(split.seed),
        "folds": int(split.folds),
        "fold": int(split.fold),
        "test_pattern": str(split.test_pattern),
    }


def resume(path: Path, cases: Sequence[Case], split: Any) -> Draw:
    """The split in `path`, for cases that must be those it was drawn for: a split is never redrawn.

    Cases without a label may be in it (they once were) or not. Raises UserError when it was drawn for other cases or
    with other values, or leaves a patient in two parts: who is whose was said otherwise then.
    """
    parts, drawn_with = read(path)
    values = _values(split)
    # Beside these values it names the file of a given fold, which decided when it was drawn and is not read again.
    if values != {key: drawn_with.get(key) for key in values}:
        changed = ", ".join(f"{k} {drawn_with.get(k)!r} -> {v!r}" for k, v in values.items() if drawn_with.get(k) != v)
        raise UserError(f"{path}: was drawn with other values of config.data.split ({changed}); use a new --workdir")
    kept = {name for part in PARTS for name in parts[part]}
    chosen = bool(set(drawn_with) - set(values))  # a fold may leave cases out
    new = set() if chosen else {case.name for case in cases if case.label is not None} - kept
    gone = kept - {case.name for case in cases}
    changed = [f"{name} is gone" for name in sorted(gone)] + [f"{name} is new" for name in sorted(new)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{path}: the cases on disk are not those of this split ({', '.join(changed[:3])}{more});"
            " restore the data or use a new --workdir"
        )
    if not _everywhere(drawn_with) and (both := _in_two(parts, {case.name: case.patient for case in cases})):
        patient, (part, name), (other, second) = both
        raise UserError(
            f"{path}: patient {patient} is in {part} (case {name}) and in {other} (case {second}), for it was drawn"
            " when these were two patients; use a new --workdir, or remove the file where nothing was trained on it yet"
        )
    return Draw(parts, drawn_with, [])


def load_or_draw(path: Path, cases: Sequence[Case], split: Any, given: Fold | None = None) -> Draw:
    """The split in `path` (`resume`), drawn (`plan`) and written when there is none yet."""
    path = Path(path)
    if path.exists():
        return resume(path, cases, split)
    draw = plan(cases, split, given)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        beside.write_text(json.dumps({"drawn_with": draw.drawn_with, **draw.parts}, indent=1) + "\n")
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
    return draw
