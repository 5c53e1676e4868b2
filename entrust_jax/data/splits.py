"""Who trains, who validates, who calibrates, who tests: drawn once, by patient, and kept in splits.json."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from entrust_jax.data.cases import Case
from entrust_jax.errors import UserError

PARTS = ("train", "val", "calibration", "test")


def draw(
    names_and_patients: Iterable[tuple[str, str]], *, seed: int, folds: int, fold: int, test_pattern: str
) -> dict[str, list[str]]:
    """Case names of train, val, calibration and test; all cases of a patient in one part.

    test: fold `fold` of `folds`, or every patient with a case whose name matches `test_pattern` (re.search).
    Of the others val takes an eighth and calibration a quarter (at least one patient each): with five folds
    about half train, a tenth val, a fifth calibration and a fifth test.
    The order is that of a hash of seed and patient, so it depends neither on the listing nor on the machine.
    Raises UserError when a part would be empty or a value makes no sense.
    """
    patients: dict[str, list[str]] = {}
    for name, patient in names_and_patients:
        patients.setdefault(patient, []).append(name)

    def shuffled(people: Iterable[str], salt: object) -> list[str]:
        return sorted(people, key=lambda p: (hashlib.sha256(f"{seed}/{salt}/{p}".encode()).digest(), p))

    if test_pattern:
        try:
            pattern = re.compile(test_pattern)
        except re.error as error:
            raise UserError(
                f"config.data.split.test_pattern {test_pattern!r}: {error}; mend the pattern"
            ) from None
        test = [patient for patient, names in patients.items() if any(map(pattern.search, names))]
        if not test:
            raise UserError(
                f"config.data.split.test_pattern {test_pattern!r} matches no case name; mend the pattern"
            )
    else:
        if folds < 2 or not 0 <= fold < folds:
            raise UserError(
                f"config.data.split: fold {fold} of {folds} folds; set folds >= 2 and fold to 0 ... folds - 1"
            )
        test = shuffled(patients, "folds")[fold::folds]
    chosen = set(test)
    # Salted with the fold, so that five folds do not share their val patients.
    rest = shuffled((patient for patient in patients if patient not in chosen), f"rest {fold}")
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
                f"config.data.split leaves no patient for {part} ({len(patients)} patients,"
                f" {len(test)} of them test); add patients or change config.data.split.folds or test_pattern"
            )
    return {part: sorted(name for patient in people[part] for name in patients[patient]) for part in PARTS}


def load(path: Path) -> dict[str, list[str]]:
    """The four parts of a splits.json. Raises UserError when it is missing or damaged."""
    return read(path)[0]


def read(path: Path) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The four parts of a splits.json and the values it was drawn with."""
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
    return parts, drawn_with


def load_or_draw(path: Path, cases: Sequence[Case], split: Any) -> dict[str, list[str]]:
    """The split in `path`, drawn and written when there is none yet.

    split: attributes seed, folds, fold, test_pattern (config.data.split).
    Raises UserError when the file was drawn for other cases or with other values: a split is never redrawn.
    """
    path = Path(path)
    values = {
        "seed": int(split.seed),
        "folds": int(split.folds),
        "fold": int(split.fold),
        "test_pattern": str(split.test_pattern),
    }
    if path.exists():
        parts, drawn_with = read(path)
        if drawn_with != values:
            changed = ", ".join(
                f"{k} {drawn_with.get(k)!r} -> {v!r}" for k, v in values.items() if drawn_with.get(k) != v
            )
            raise UserError(
                f"{path}: was drawn with other values of config.data.split ({changed}); use a new --workdir"
            )
        kept, there = {name for part in PARTS for name in parts[part]}, {case.name for case in cases}
        if kept != there:
            changed = [f"{name} is gone" for name in sorted(kept - there)] + [
                f"{name} is new" for name in sorted(there - kept)
            ]
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{path}: the cases on disk are not those of this split ({', '.join(changed[:3])}{more});"
                " restore the data or use a new --workdir"
            )
        return parts
    parts = draw(((case.name, case.patient) for case in cases), **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        beside.write_text(json.dumps({"drawn_with": values, **parts}, indent=1) + "\n")
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
    return parts
