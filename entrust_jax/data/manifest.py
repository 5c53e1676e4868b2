"""A table of cases, for any set of scans that has no layout of its own: CSV or JSON.

CSV: a row per case; columns case, patient (optional), one per modality, label (optional); an empty cell is a missing
file. JSON: [{"case": ..., "patient": ..., "images": {"T1": path, ...}, "label": path}, ...]. Paths are relative to the
manifest's own folder, or absolute. Several raters: columns label, label2, label3, ... (JSON: a list of paths); a rater
who saw nothing has an empty mask, one who did not look at the case has an empty cell (JSON: null). A column that is
not read is named; one that looks like the patient, a mask or a split under another name is a mistake.
"""

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from entrust_jax.data.cases import (
    ENDINGS,
    PICTURES,
    SOUGHT,
    Case,
    Listing,
    Mistake,
    Names,
    case_of,
    ending_of,
    is_text,
    one_of,
    refuse_formats,
    scans_below,
    why_no_scan,
)
from entrust_jax.errors import UserError

NAMES = ("manifest.csv", "manifest.json")
OWN = ("case", "patient")  # columns that are no modalities; so are the labels
LABEL = re.compile(r"label\d{0,3}")
# Words that may stand around those of MISNAMED: patient_id, PatientName, lesion_mask, seg_path, cv_fold.
AROUND = "(?:id|no|nr|num|number|name|code|key|path|file|nii|study|anon|manual|expert|rater|lesion|tumou?r|cv)*"
# What a column that is not read must not look like, by the letters of its name, and what to do with it.
MISNAMED = {
    "patient": (
        re.compile(f"{AROUND}(?:patient|pat|subject|subj?|participant|person|pid|mrn)s?{AROUND}"),
        "call it patient, so that the cases of one stay in one part of the split, or remove it",
    ),
    "label": (
        re.compile(f"{AROUND}(?:mask|segm?|segmentation|annotation|groundtruth|gt|roi)s?{AROUND}"),
        "call it label (of further raters label2, label3, ...), or remove it",
    ),
    "split": (
        re.compile(f"{AROUND}(?:split|fold|partition)s?{AROUND}"),
        "remove it: config.data.split says who tests, by test_pattern or by folds",
    ),
}


class Row(NamedTuple):
    """One case as it is written down; paths as in the file."""

    where: str  # line 3, entry 3
    case: str
    patient: str
    images: Mapping[str, str]
    labels: Mapping[str, str]  # of the raters who looked, by column


def locate(place: Path) -> Path:
    """The manifest itself, or the one in a folder. Raises UserError where there is none, or two."""
    if place.is_file():
        return place
    found = [place / name for name in NAMES if (place / name).is_file()]
    if len(found) != 1:
        what = "two manifests" if found else "no manifest"
        said = (
            f"{place}: holds {what}; give the file itself as config.data.dir, or write one with"
            " python -m entrust_jax.manifest"
        )
        if not found:
            refuse_formats(place, said)
        raise UserError(said)
    return found[0]


def manifest_cases(place: Path, known: Names) -> Listing:
    """The cases of a manifest, `place` being the file or its folder; a column may have any of its modality's names.

    Mistakes are lines with too many cells, a case without a name or named twice, a scan that is not there or cannot be
    read, and a column whose name is not the one that is read (MISNAMED). Raises UserError for a file that cannot be
    read and a modality without a column.
    """
    path = locate(place)
    rows, mistakes = _json_rows(path) if path.suffix.lower() == ".json" else _csv_rows(path)
    there = {name.lower(): name for row in rows for name in row.images}
    for modality, own in known.items():
        if not there.keys() & set(own) and (rows or not mistakes):  # else it is the mistakes that leave no modality
            raise UserError(
                f"{path}: has no modality {modality}, it has {', '.join(sorted(there)) or 'none'};"
                " set config.data.modalities to some of these, or name the column in config.data.names"
            )
    cases: dict[str, Case] = {}
    read: set[str] = set()
    for row in rows:
        if not row.case:
            mistakes.append(Mistake(f"{path}, {row.where}: the case has no name; fill in its case"))
        elif row.case in cases:
            mistakes.append(Mistake(f"{path}, {row.where}: a second case {row.case}; give each its own name"))
        else:
            # A JSON entry may name its modalities otherwise than the one before it.
            chosen = {modality: one_of(row.images, own, modality, str(path)) for modality, own in known.items()}
            given = [(modality, row.images[column]) for modality, column in chosen.items() if column is not None]
            read |= {column.lower() for column in chosen.values() if column is not None}
            found: dict[str, list[Path]] = {}
            for what, file in (*given, *row.labels.items()):
                said = why_no_scan(path.parent / file) if file else None
                found[what] = [path.parent / file] if file and said is None else []
                if said is not None:
                    where = f"{path}, {row.where}: {what} of case {row.case}"
                    mistakes.append(Mistake(f"{where}: {_shown(file)}: {said}"))
            first, *more = row.labels or ("label",)
            label = found.pop(first, [])
            # Further raters go along with the images, so that one file for two of them is seen.
            case, wrong = case_of(row.case, row.patient or row.case, found, label)
            images = {what: file for what, file in case.images.items() if what not in more}
            raters = tuple(case.images[what] for what in more if what in case.images)
            cases[row.case] = dataclasses.replace(case, images=images, raters=raters)
            mistakes += [Mistake(f"{path}, {row.where}: {mistake.text}", mistake.files) for mistake in wrong]
    wrong, notes = _unread(path, rows, [name for lower, name in sorted(there.items()) if lower not in read])
    return Listing([cases[name] for name in sorted(cases)], wrong + mistakes, notes)


def _unread(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> tuple[list[Mistake], tuple[str, ...]]:
    """What is said of columns that nothing reads: those that must have another name, and a line for the rest.

    Beside a patient, or a label, that is read a second one is nothing but a column more.
    """
    has = {"patient": any(row.patient for row in rows), "label": any(row.labels for row in rows), "split": False}
    mistakes, others = [], []
    for column in columns:
        letters = re.sub("[^a-z]", "", column.lower())
        mends = [mend for what, (like, mend) in MISNAMED.items() if not has[what] and like.fullmatch(letters)]
        if mends:
            mistakes.append(Mistake(f"{path}: column {_shown(column)} is not read; {mends[0]}"))
        else:
            others.append(_shown(column))
    words = (
        f"columns {', '.join(others)} are no modalities"
        if len(others) > 1
        else f"column {''.join(others)} is no modality"
    )
    return mistakes, ((f"{path}: {words} of the config; not read",) if others else ())


def _shown(text: str) -> str:
    """What a cell says, as far as it goes into a line."""
    first = text.splitlines()[0] if text.splitlines() else ""
    return text if text == first[:200] else f"{first[:200]}..."


def in_order(labels: Iterable[str]) -> list[str]:
    """Label columns by their number; label itself comes first."""
    return sorted(labels, key=lambda name: int(name[len("label") :] or -1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None


def _csv_rows(path: Path) -> tuple[list[Row], list[Mistake]]:
    """The rows, and the lines that are none."""
    whole = _text(path)
    text = whole.lstrip()
    if text.lower().startswith("sep="):  # a spreadsheet's word to itself
        text = text.partition("\n")[2].lstrip()
    before = whole[: len(whole) - len(text)].count("\n")  # lines, so that a mistake is named with the file's own
    separator = max(",;\t", key=text.partition("\n")[0].count)  # spreadsheets write what their country writes
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows: list[Row] = []
    mistakes: list[Mistake] = []
    try:
        head = [name.strip() for name in next(reader, [])]
        lower = [name.lower() for name in head]
        if "case" not in lower:
            raise UserError(f"{path}: has no column case; its first line must name the columns: case, label, T1, ...")
        if repeated := [name for i, name in enumerate(lower) if name and name in lower[:i]]:
            raise UserError(f"{path}: has two columns {repeated[0]}; rename one")
        if odd := [name for name in lower if name.startswith("label") and not LABEL.fullmatch(name)]:
            raise UserError(f"{path}: column {odd[0]}: name those of several raters label, label2, label3, ...")
        labels = in_order(name for name in lower if LABEL.fullmatch(name))
        for cells in reader:
            where = f"line {before + reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(head):
                said = f"has {len(cells)} cells, the first line {len(head)}; mend the line"
                mistakes.append(Mistake(f"{path}, {where}: {said}"))
                continue
            own = dict(zip(lower, (cell.strip() for cell in cells), strict=True))
            if own.get(""):
                said = f"{own['']} stands in a column without a name; name the column"
                mistakes.append(Mistake(f"{path}, {where}: {said}"))
                continue
            images = {name: own[name.lower()] for name in head if name and name.lower() not in (*OWN, *labels)}
            drawn = {name: own[name] for name in labels if own[name]}
            rows.append(Row(where, own["case"], own.get("patient", ""), images, drawn))
    except csv.Error as error:
        raise UserError(f"{path}, line {before + reader.line_num}: {error}; mend the line") from None
    return rows, mistakes


def _json_rows(path: Path) -> tuple[list[Row], list[Mistake]]:
    """The cases, and the entries that are none."""
    try:
        entries = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({error}); mend the file") from None
    if not isinstance(entries, list):
        raise UserError(f'{path}: must be a list of cases, [{{"case": ..., "images": {{...}}, "label": ...}}]')
    rows, mistakes = [], []
    for number, entry in enumerate(entries, 1):
        where = f"entry {number}"
        row = _row_of(where, entry)
        if isinstance(row, str):
            mistakes.append(Mistake(f"{path}, {where}: {row}"))
        else:
            rows.append(row)
    return rows, mistakes


def _row_of(where: str, entry: Any) -> Row | str:
    """An entry of a JSON manifest, or what is wrong with it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("images"), dict):
        return 'is no case with "images"; write {"case": ..., "images": {...}}'
    if unknown := sorted(set(entry) - {*OWN, "images", "label"}):
        return f"unknown key {unknown[0]!r}; there are case, patient, images, label"
    values: dict[str, Any] = {name: entry.get(name) or "" for name in OWN}
    images = {name: file or "" for name, file in entry["images"].items()}
    if len({name.lower() for name in images}) < len(images):
        return f"two images of one modality ({', '.join(images)}); keep one"
    given = entry.get("label") or []
    files = [given] if not isinstance(given, list) else [file or "" for file in given]
    if wrong := [v for v in (*values.values(), *images.values(), *files) if not isinstance(v, str)]:
        return f"{wrong[0]!r} is no text; put names and paths in quotes"
    labels = {f"label{number}" if number > 1 else "label": file for number, file in enumerate(files, 1) if file}
    return Row(where, values["case"], values["patient"], images, labels)


# --- writing one --------------------------------------------------------------------------------------------


def template(text: str) -> re.Pattern[str]:
    """The expression of a path template: {case} and {patient} stand for a name, * for any part of a file's name.

    The ending matches in any case. Raises UserError without a {case}, for other names in braces, and for a * in a
    folder's name: it would put files of different folders into one case.
    """
    plain = text.removeprefix("./")
    if "*" in plain.rpartition("/")[0]:
        raise UserError(f"{text}: * stands for a part of a file's name; write {{case}} or {{patient}} for a folder")
    ending = ending_of("x" + plain.rpartition("/")[2], (*ENDINGS, *PICTURES)) or ""
    parts, seen = [], set()
    for piece in re.split(r"(\{\w*\}|\*)", plain[: len(plain) - len(ending)]):
        if piece == "*":
            parts.append("[^/]*")
        elif piece in ("{case}", "{patient}"):
            name = piece[1:-1]
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+)")
            seen.add(name)
        elif piece.startswith("{"):
            raise UserError(f"{text}: {piece} stands for nothing; use {{case}}, {{patient}} and *")
        else:
            parts.append(re.escape(piece))
    if "case" not in seen:
        raise UserError(f"{text}: does not say where the case's name stands; write it as {{case}}/T1.nii.gz")
    return re.compile("".join(parts) + f"(?i:{re.escape(ending)})")


def collect(folder: Path, templates: Mapping[str, str]) -> list[dict[str, str]]:
    """Rows {case, patient, modality: path, ..., label} of the scans, NIfTI or PNG or JPEG, that fit a template.

    With {patient}, which all of the templates must then have, a case is PATIENT_CASE. Raises UserError where two files
    fit for one case, where a template fits none, or a case has a label and no scan.
    """
    expressions = {name: template(text) for name, text in templates.items()}
    with_patient = {name for name, expression in expressions.items() if "patient" in expression.groupindex}
    if with_patient and with_patient != set(templates):
        name = next(name for name in templates if name not in with_patient)
        raise UserError(f"{name}={templates[name]}: has no {{patient}}, others have; write it in all or in none")
    paths = [path.relative_to(folder).as_posix() for _, path in scans_below(folder, (*ENDINGS, *PICTURES))]
    rows: dict[str, dict[str, str]] = {}
    for name, expression in expressions.items():
        fitting = [(path, match) for path in paths if (match := expression.fullmatch(path))]
        if not fitting:
            said = f"{folder}: no NIfTI, PNG or JPEG file fits {name}={templates[name]}; mend the pattern"
            refuse_formats(folder, said)
            raise UserError(said)
        for path, match in fitting:
            patient = match["patient"] if with_patient else ""
            case = f"{patient}_{match['case']}" if with_patient else match["case"]
            row = rows.setdefault(case, {"case": case, "patient": patient})
            if name in row:
                raise UserError(f"{folder}: {row[name]} and {path} are both {name} of case {case}; narrow it")
            row[name] = path
    modalities = {name for name in templates if not LABEL.fullmatch(name)}
    if bare := [row for row in rows.values() if not set(row) & modalities]:
        mask = next(bare[0][name] for name in templates if name in bare[0])
        raise UserError(f"{folder}: {mask} is the label of case {bare[0]['case']}, which has no scan")
    return [rows[case] for case in sorted(rows)]


def unfitting(folder: Path, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The scans of a folder that are in none of the rows that were collected from it; pictures only where rows have

    some. Those in folders without a scan that is in a row come first: their cases are missing as a whole.
    """
    taken = {row[name] for row in rows for name in row if name not in OWN}
    pictures = PICTURES if any(ending_of(path, PICTURES) for path in taken) else ()
    below = (path.relative_to(folder) for _, path in scans_below(folder, (*SOUGHT, *pictures)))
    left = [path for path in below if path.as_posix() not in taken]
    used = {Path(path).parent for path in taken}
    return [path.as_posix() for path in sorted(left, key=lambda path: (path.parent in used, path))]


def as_csv(rows: Sequence[Mapping[str, str]], names: Sequence[str], base: str) -> str:
    """A manifest's text; `base` is put before every path, the way from the manifest to the folder.

    Raises UserError for a path that is no text: a table cannot hold it.
    """
    patient = any(row["patient"] for row in rows)
    head = ["case", *(["patient"] if patient else []), *names]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, head, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        paths = {name: Path(os.path.normpath(os.path.join(base, row[name]))).as_posix() for name in {*names} & {*row}}
        if odd := [path for path in paths.values() if not is_text(path)]:
            raise UserError(
                f"{odd[0]!r}: this path is no text (not UTF-8), so no table can name it; rename the folders"
            )
        writer.writerow({"case": row["case"], "patient": row["patient"] or row["case"], **paths})
    return out.getvalue()
