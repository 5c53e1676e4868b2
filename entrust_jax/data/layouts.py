"""Where a data set keeps its files: cases with their modalities by name."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from entrust_jax.data.cases import (
    ENDINGS,
    PICTURES,
    SOUGHT,
    Case,
    Listing,
    Mistake,
    Names,
    case_number,
    case_of,
    ending_of,
    is_listed,
    is_text,
    known_names,
    listing_of,
    refuse_formats,
    scans_below,
    split_name,
)
from entrust_jax.data.manifest import manifest_cases
from entrust_jax.data.nnunet import nnunet_cases
from entrust_jax.errors import UserError

NO_NAMES: Mapping[str, Any] = MappingProxyType({})
# BraTS 2020 has one case whose label is W39_1998.09.19_Segm.nii.gz; MEN-RT's are gross tumour volumes.
BRATS_LABELS = ("seg", "segm", "gtv")
# The number of a patient and that of one of his sessions: BraTS-GLI-00002-000, BraTS-MEN-RT-0001-1.
BRATS_SESSION = re.compile(r"(BraTS-.+-\d+)-\d{1,3}", re.IGNORECASE)
SESSION = re.compile(r"(.+-\d+)-\d{3}")  # of other folders whose files are named like those of 2023


def kinds_of(known: Names) -> frozenset[str]:
    """Every name of every modality."""
    return frozenset(name for names in known.values() for name in names)


def brats_case(folder: Path, known: Names, *, labelled: bool = True) -> tuple[Case, list[Mistake]]:
    """A BraTS folder: NAME_t1.nii.gz, ... NAME_seg.nii.gz (2020, 2021) or NAME-t1n.nii.gz, ... (2023, 2024)."""
    name = folder.name
    files: dict[str, list[Path]] = {}
    kinds = kinds_of(known)
    dashed = False
    for path in sorted(folder.iterdir()):
        ending = ending_of(path.name, SOUGHT)
        if ending is None or not is_listed(path):
            continue
        # The part after the last separator is the modality; the part before need not be the folder's name.
        _, separator, kind = split_name(path.name[: -len(ending)], kinds)
        dashed |= separator == "-"
        files.setdefault(kind, []).append(path)
    session = BRATS_SESSION.fullmatch(name) or (SESSION.fullmatch(name) if dashed else None)
    patient = session[1] if session else name
    labels = [path for kind in BRATS_LABELS if kind not in kinds for path in files.get(kind, [])]
    return case_of(name, patient, images_of(files, known), labels if labelled else [])


def images_of(files: Mapping[str, list[Path]], known: Names) -> dict[str, list[Path]]:
    """The files of each modality, from those by kind as their names say it."""
    return {modality: [p for name in names for p in files.get(name, [])] for modality, names in known.items()}


def brats_cases(folder: Path, known: Names) -> Listing:
    """Every sub-folder that holds at least one of the modalities or a label."""
    return listing_of(brats_case(path, known) for path in sorted(folder.iterdir()) if path.is_dir())


def named(
    found: Iterable[tuple[str, str, Path]],
    labels: Iterable[tuple[str, Path]],
    known: Names,
    patient: Callable[[str], str] = str,
) -> Listing:
    """Cases from (case, modality as in the file's name, file) and (case, its label's file).

    Modalities are matched without regard to case, by any of their names.
    """
    files: dict[str, dict[str, list[Path]]] = {}
    for name, kind, path in found:
        files.setdefault(name, {}).setdefault(kind.lower(), []).append(path)
    drawn: dict[str, list[Path]] = {}
    for name, path in labels:
        drawn.setdefault(name, []).append(path)
    return listing_of(
        case_of(name, patient(name), images_of(files.get(name, {}), known), drawn.get(name, []))
        for name in sorted({*files, *drawn})
    )


BIDS = re.compile(r"(sub-[A-Za-z0-9]+(?:_ses-[A-Za-z0-9]+)?)_(.*_)?([A-Za-z0-9]+)")
BIDS_LESION = re.compile(r"(label|desc)-(lesions?|tumou?r)_", re.IGNORECASE)
BIDS_CONTRAST = re.compile(r"(^|_)ce-")


def bids_cases(folder: Path, known: Names) -> Listing:
    """BIDS as ISLES 2022 ships it: rawdata/sub-X/ses-Y/.../sub-X_ses-Y_dwi.nii.gz; below derivatives/ ..._msk.nii.gz.

    A case is a session, its patient the subject. Without rawdata/ the subjects lie in the folder itself. A T1w with a
    contrast agent (ce-) is T1ce. Labels are ..._msk, and masks that say lesion or tumor (label-lesion_mask); other
    masks below derivatives/, of the brain for instance, are none. A name in config.data.names may be the suffix or
    end in it: acq-mprage_T1w.
    """
    kinds = kinds_of(known)
    raw = folder / "rawdata"
    subjects = sorted(path for path in (raw if raw.is_dir() else folder).glob("sub-*") if path.is_dir())
    images, labels = [], []
    for name, path in (found for subject in subjects for found in scans_below(subject)):
        if match := BIDS.fullmatch(name):
            _, _, kind = split_name((match[2] or "") + match[3], kinds)
            contrast = kind == "t1w" and BIDS_CONTRAST.search(match[2] or "")
            images.append((match[1], "t1ce" if contrast else kind, path))
    for name, path in scans_below(folder / "derivatives"):
        match = BIDS.fullmatch(name)
        if match and (match[3].lower() == "msk" or BIDS_LESION.search(match[2] or "")):
            labels.append((match[1], path))
    return named(images, labels, known, lambda name: name.partition("_")[0])


def hecktor_cases(folder: Path, known: Names) -> Listing:
    """HECKTOR 2022: imagesTr/NAME__CT.nii.gz, imagesTr/NAME__PT.nii.gz, labelsTr/NAME.nii.gz."""
    split = [(name.rpartition("__"), path) for name, path in scans_below(folder / "imagesTr")]
    images = [(name, kind, path) for (name, _, kind), path in split if name]
    return named(images, scans_below(folder / "labelsTr"), known)


def myops_cases(folder: Path, known: Names) -> Listing:
    """MyoPS 2020: NAME_C0.nii.gz, NAME_DE.nii.gz, NAME_T2.nii.gz, NAME_gd.nii.gz, in one folder or several beside each

    other (train25, train25_myops_gd).
    """
    kinds = kinds_of(known)
    split = [(split_name(name, kinds), path) for name, path in scans_below(folder)]
    images = [(name, kind, path) for (name, _, kind), path in split if name and kind != "gd"]
    labels = [(name, path) for (name, _, kind), path in split if name and kind == "gd"]
    return named(images, labels, known)


LAYOUTS: dict[str, tuple[str, Callable[[Path, Names], Listing]]] = {
    "brats": ("one folder per case with NAME_flair.nii.gz ... NAME_seg.nii.gz", brats_cases),
    "nnunet": ("dataset.json, imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz", nnunet_cases),
    "bids": ("rawdata/sub-X/ses-Y/.../sub-X_ses-Y_dwi.nii.gz, derivatives/.../sub-X_ses-Y_msk.nii.gz", bids_cases),
    "hecktor": ("imagesTr/NAME__CT.nii.gz, imagesTr/NAME__PT.nii.gz, labelsTr/NAME.nii.gz", hecktor_cases),
    "myops": ("NAME_C0.nii.gz, NAME_DE.nii.gz, NAME_T2.nii.gz, NAME_gd.nii.gz", myops_cases),
    "manifest": ("manifest.csv, a row per case: case, patient, one column per modality, label", manifest_cases),
}


def list_cases(
    layout: str, place: Path | str, modalities: Sequence[str], names: Mapping[str, Any] = NO_NAMES
) -> Listing:
    """The cases of a data set, sorted by name, and every mistake in it; those without any modality are left out, and

    files that two cases claim.
    place: its folder, or a manifest's file. names: config.data.names. Raises UserError when the folder is not there, or
    nothing in it can be read as this layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"config.data.layout is {layout!r}; set it to one of {', '.join(LAYOUTS)}")
    known = known_names(modalities, names)
    expected, find = LAYOUTS[layout]
    place = Path(place)
    if not is_place(layout, place):
        raise UserError(f"{place}: no such folder; set config.data.dir to a folder in the {layout} layout ({expected})")
    try:
        found = find(place, known)
    except UserError as error:
        if layout != "manifest":  # a table that is there is what is wrong, whatever lies beside it
            refuse_formats(place, str(error))
        raise
    except OSError as error:
        raise UserError(f"{error.filename or place}: cannot be read ({error.strerror}); mend its rights") from None
    cases = [case for case in found.cases if case.images]
    odd = {case.name for case in cases if not (is_text(case.name) and is_text(case.patient))}
    said = "its name, or its patient's, is no text; rename it"
    mistakes = found.mistakes + [Mistake(f"{place}: case {name!r}: {said}") for name in sorted(odd)]
    cases, shared = without_shared([case for case in cases if case.name not in odd])
    mistakes += shared
    if not cases and not mistakes:
        below = _below(place, find, known)
        shown = f"{', '.join(below[:3])}{', ...' if len(below) > 3 else ''}"
        mend = f"but folders in it do: {shown}; give one of them, or put their cases into one"
        mend = mend if below else f"the {layout} layout expects {expected}"
        said = f"{place}: holds no case with any of {', '.join(modalities)}; {mend}"
        refuse_formats(place, said)
        raise UserError(said)
    return Listing(cases, mistakes, found.notes)


def without_shared(cases: Sequence[Case]) -> tuple[list[Case], list[Mistake]]:
    """The cases without the files that several claim, and a mistake for each group of cases that share some: they might

    come to lie on both sides of a split. A link is the file that it leads to.
    """
    owners: dict[str, dict[str, Path]] = {}  # real path -> case -> as its own listing has it
    for case in cases:
        for path in files_of(case):
            owners.setdefault(os.path.realpath(path), {})[case.name] = path
    groups: dict[tuple[str, ...], list[dict[str, Path]]] = {}
    for own in owners.values():
        if len(own) > 1:
            groups.setdefault(tuple(own), []).append(own)
    mistakes, lost = [], set()
    for (one, other, *rest), files in groups.items():
        first, second = files[0][one], files[0][other]
        there = f", as {second}, of case {other}" if second != first else f" of case {other}"
        more = f" and {len(rest)} more" if rest else ""
        also = f" ({len(files) - 1} more too)" if len(files) > 1 else ""
        said = f"is a file of case {one} and{there}{more}{also}; give each its own files, or remove one"
        paths = tuple(path for own in files for path in own.values())
        mistakes.append(Mistake(f"{first}: {said}", paths))
        lost.update((name, path) for own in files for name, path in own.items())
    left = []
    for case in cases:
        images = {what: path for what, path in case.images.items() if (case.name, path) not in lost}
        drawn = [path for path in (case.label, *case.raters) if path and (case.name, path) not in lost]
        label = drawn[0] if drawn else None
        left.append(dataclasses.replace(case, images=images, label=label, raters=tuple(drawn[1:])))
    return [case for case in left if case.images], mistakes


def files_of(case: Case) -> list[Path]:
    """Every file of a case, scans and masks."""
    return [*case.images.values(), *([case.label] if case.label else []), *case.raters]


def _below(place: Path, find: Callable[[Path, Names], Listing], known: Names) -> list[str]:
    """The folders in another one that hold cases: BraTS 2019 came as HGG/ and LGG/, archives unpack into one."""
    found = []
    for folder in sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []:
        try:
            if any(case.images for case in find(folder, known).cases):
                found.append(folder.name)
        except (UserError, OSError):  # not this layout either
            continue
    return found


def find_cases(
    layout: str, place: Path | str, modalities: Sequence[str], names: Mapping[str, Any] = NO_NAMES
) -> list[Case]:
    """The cases of `list_cases`. Raises UserError for the first mistake, saying how many there are."""
    return without_mistakes(list_cases(layout, place, modalities, names))


def without_mistakes(listing: Listing) -> list[Case]:
    """The cases of a listing. Raises UserError where it has mistakes: what is doubtful is not trained on."""
    if listing.mistakes:
        more = len(listing.mistakes) - 1
        said = f" ({more} more; python -m entrust_jax.check lists them all)" if more else ""
        raise UserError(listing.mistakes[0].text + said)
    return listing.cases


def is_place(layout: str, place: Path) -> bool:
    """Whether a data set of this layout can lie there: a folder, or a manifest's own file."""
    return place.is_dir() or (layout == "manifest" and place.is_file())


def require_complete(cases: Sequence[Case], folder: Path | str, modalities: Sequence[str]) -> None:
    """Raises UserError when no case has every modality: nothing could be learnt of how they go together."""
    if not any(len(case.images) == len(modalities) for case in cases):
        present = [name for name in modalities if any(name in case.images for case in cases)]
        missing = [name for name in modalities if name not in present]
        mend = (
            f"set config.data.modalities to those present: {', '.join(present)}"
            if missing
            else ("add the missing files or set config.data.modalities to fewer")
        )
        why = f"; all of them lack {', '.join(missing)}" if missing else ""
        raise UserError(f"{folder}: none of its {len(cases)} cases has every modality{why}; {mend}")


def case_from_folder(folder: Path | str, modalities: Sequence[str], names: Mapping[str, Any] = NO_NAMES) -> Case:
    """One BraTS folder (`predict --case=FOLDER`). Raises UserError when it holds none of the modalities."""
    # Resolved, so that "." and "case/" have the folder's name.
    path = Path(folder).resolve()
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of one case, with NAME_flair.nii.gz and so on")
    # A mask is not needed here, and two of them must not stop a prediction.
    (case,) = without_mistakes(listing_of([brats_case(path, known_names(modalities, names), labelled=False)]))
    if not case.images:
        said = (
            f"{folder}: holds none of {', '.join(modalities)};"
            f" name the files as NAME_{modalities[0].lower()}.nii.gz or give them one by one as MODALITY=FILE"
        )
        refuse_formats(path, said)
        raise UserError(said)
    return case


def case_from_files(
    files: Mapping[str, Path | str], modalities: Sequence[str], names: Mapping[str, Any] = NO_NAMES
) -> Case:
    """A case from files given one by one, {"T1": path}; by any of a modality's names, without regard to case.

    Its name is that of the first file in model order, less a channel number or modality at its end. Raises UserError
    for an unknown or repeated modality, a missing file, one file for two modalities, or none at all.
    """
    known = known_names(modalities, names)
    by_name = {name: modality for modality, own in known.items() for name in own}
    given: dict[str, Path] = {}
    for name, file in files.items():
        if name.lower() not in by_name:
            raise UserError(f"{name}={file}: the model has no modality {name}; it knows {', '.join(modalities)}")
        modality, path = by_name[name.lower()], Path(file)
        if modality in given:
            raise UserError(f"{name}={file}: two files for {modality}, {given[modality]} too; keep one of them")
        if not path.is_file():
            raise UserError(f"{path}: no such file; give the path of the {modality} scan")
        if same := next((known for known, other in given.items() if other.samefile(path)), None):
            raise UserError(f"{path}: is given for {same} and for {modality}; give each its own file")
        given[modality] = path
    if not given:
        raise UserError(f"no scan given; give at least one of {', '.join(modalities)} as MODALITY=FILE")
    images = {modality: given[modality] for modality in modalities if modality in given}
    first = next(iter(images.values())).name
    ending = ending_of(first, (*ENDINGS, *PICTURES)) or ""
    name = first[: len(first) - len(ending)]
    # NAME_0001 and NAME_flair are NAME, as in a data set: so the sampling noise does not depend on the first file.
    name = re.sub(rf"(?<=.)[_-]+(\d{{4}}|{'|'.join(map(re.escape, by_name))})$", "", name, flags=re.IGNORECASE)
    return Case(name, name, case_number(name), images, None)
