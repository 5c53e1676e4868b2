"""A table of cases, for any set of scans that has no layout of its own: CSV or JSON.

CSV: a row per case; columns case, patient (optional), one per modality, label (optional); an empty cell is a missing
file. JSON: [{"case": ..., "patient": ..., "images": {"T1": path, ...}, "label": path}, ...]. Paths are relative to the
manifest's own folder, or absolute.
"""

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from entrust_jax.data.cases import ENDINGS, Case, case_number, ending_of
from entrust_jax.errors import UserError

NAMES = ("manifest.csv", "manifest.json")
OWN = ("case", "patient", "label")  # columns that are no modalities


class Row(NamedTuple):
    """One case as it is written down; paths as in the file."""

    where: str  # line 3, entry 3
    case: str
    patient: str
    images: Mapping[str, str]
    label: str


def locate(place: Path) -> Path:
    """The manifest itself, or the one in a folder. Raises UserError where there is none, or two."""
    if place.is_file():
        return place
    found = [place / name for name in NAMES if (place / name).is_file()]
    if len(found) != 1:
        what = "two manifests" if found else "no manifest"
        raise UserError(
            f"{place}: holds {what}; give the file itself as config.data.dir, or write one with"
            " python -m entrust_jax.manifest"
        )
    return found[0]


def manifest_cases(place: Path, modalities: Sequence[str]) -> list[Case]:
    """The cases of a manifest, `place` being the file or its folder; modalities without regard to case.

    Raises UserError for a file that cannot be read, a modality without a column, a case named twice and a scan that is
    not there, naming the line.
    """
    path = locate(place)
    rows = _json_rows(path) if path.suffix.lower() == ".json" else _csv_rows(path)
    known = {name.lower() for row in rows for name in row.images}
    if absent := [m for m in modalities if m.lower() not in known]:
        raise UserError(
            f"{path}: has no modality {absent[0]}, it has {', '.join(sorted(known)) or 'none'};"
            " set config.data.modalities to some of these"
        )
    cases: dict[str, Case] = {}
    for row in rows:
        if not row.case:
            raise UserError(f"{path}, {row.where}: the case has no name; fill in its case")
        if row.case in cases:
            raise UserError(f"{path}, {row.where}: a second case {row.case}; give each its own name")
        own = {name.lower(): file for name, file in row.images.items() if file}
        images = {m: _existing(path, row, m, own[m.lower()]) for m in modalities if m.lower() in own}
        label = _existing(path, row, "label", row.label) if row.label else None
        cases[row.case] = Case(row.case, row.patient or row.case, case_number(row.case), images, label)
    return [cases[name] for name in sorted(cases)]


def _existing(manifest: Path, row: Row, what: str, file: str) -> Path:
    path = manifest.parent / file
    if not path.is_file():
        raise UserError(f"{manifest}, {row.where}: {what} of case {row.case}: {path}: no such file; mend the path")
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None


def _csv_rows(path: Path) -> list[Row]:
    lines = io.StringIO(_text(path), newline="")
    first = lines.readline()
    lines.seek(0)
    separator = max(",;\t", key=first.count)  # spreadsheets write what their country writes
    reader = csv.DictReader(lines, delimiter=separator)
    head = [(name or "").strip() for name in reader.fieldnames or []]
    lower = [name.lower() for name in head]
    if "case" not in lower:
        raise UserError(f"{path}: has no column case; its first line must name the columns: case, label, T1, ...")
    if repeated := [name for i, name in enumerate(lower) if name in lower[:i]]:
        raise UserError(f"{path}: has two columns {repeated[0]}; rename one")
    reader.fieldnames = head
    rows = []
    try:
        for cells in reader:
            where = f"line {reader.line_num}"
            if None in cells or None in cells.values():
                raise UserError(f"{path}, {where}: has not as many cells as the first line; mend the line")
            own = {name: cell.strip() for name, cell in cells.items()}
            if not any(own.values()):
                continue
            given = {name: next((own[n] for n in head if n.lower() == name), "") for name in OWN}
            images = {name: file for name, file in own.items() if name and name.lower() not in OWN}
            rows.append(Row(where, given["case"], given["patient"], images, given["label"]))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; mend the line") from None
    return rows


def _json_rows(path: Path) -> list[Row]:
    try:
        entries = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({error}); mend the file") from None
    if not isinstance(entries, list):
        raise UserError(f'{path}: must be a list of cases, [{{"case": ..., "images": {{...}}, "label": ...}}]')
    rows = []
    for number, entry in enumerate(entries, 1):
        where = f"entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("images"), dict):
            raise UserError(f'{path}, {where}: is no case with "images"; write {{"case": ..., "images": {{...}}}}')
        if unknown := sorted(set(entry) - {*OWN, "images"}):
            raise UserError(f"{path}, {where}: unknown key {unknown[0]!r}; there are case, patient, images, label")
        values: dict[str, Any] = {name: entry.get(name) or "" for name in OWN}
        images = {name: file or "" for name, file in entry["images"].items()}
        if wrong := [v for v in (*values.values(), *images.values()) if not isinstance(v, str)]:
            raise UserError(f"{path}, {where}: {wrong[0]!r} is no text; put names and paths in quotes")
        rows.append(Row(where, values["case"], values["patient"], images, values["label"]))
    return rows


# --- writing one --------------------------------------------------------------------------------------------


def template(text: str) -> re.Pattern[str]:
    """The expression of a path template: {case} and {patient} stand for a name, * for any part of a file name.

    Raises UserError without a {case}, and for other names in braces.
    """
    parts, seen = [], set()
    for piece in re.split(r"(\{\w*\}|\*)", text):
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
    return re.compile("".join(parts))


def collect(folder: Path, templates: Mapping[str, str]) -> list[dict[str, str]]:
    """Rows {case, patient, modality: path, ..., label} of the NIfTI files whose paths below `folder` fit a template.

    Raises UserError where two files fit for one case, where a template fits none, or a case has two patients.
    """
    expressions = {name: template(text) for name, text in templates.items()}
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if ending_of(path.name, ENDINGS))
    rows: dict[str, dict[str, str]] = {}
    for name, expression in expressions.items():
        fitting = [(path, match) for path in paths if (match := expression.fullmatch(path))]
        if not fitting:
            raise UserError(f"{folder}: no NIfTI file fits {name}={templates[name]}; mend the pattern")
        for path, match in fitting:
            row = rows.setdefault(match["case"], {"case": match["case"], "patient": ""})
            if name in row:
                raise UserError(f"{folder}: {row[name]} and {path} are both {name} of case {match['case']}; narrow it")
            row[name] = path
            patient = match.groupdict().get("patient") or ""
            if patient and row["patient"] not in ("", patient):
                raise UserError(f"{folder}: case {match['case']} has two patients, {row['patient']} and {patient}")
            row["patient"] = row["patient"] or patient
    return [rows[name] for name in sorted(rows)]


def as_csv(rows: Sequence[Mapping[str, str]], names: Sequence[str], base: str) -> str:
    """A manifest's text; `base` is put before every path, the way from the manifest to the folder."""
    patient = any(row["patient"] for row in rows)
    head = ["case", *(["patient"] if patient else []), *names]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, head, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        paths = {name: Path(os.path.normpath(os.path.join(base, row[name]))).as_posix() for name in {*names} & {*row}}
        writer.writerow({"case": row["case"], "patient": row["patient"] or row["case"], **paths})
    return out.getvalue()
