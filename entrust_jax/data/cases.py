"""A case: one scan session, its files by modality; under which names files are found, and what is wrong with them."""

import dataclasses
import itertools
import os
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from entrust_jax.errors import UserError

ENDINGS = (".nii.gz", ".nii")
JPEG = (".jpg", ".jpeg")
PICTURES = (".png", *JPEG)  # read as scans of one slice
# Scans that are not read. Where one is sought they are looked for all the same, to be told from what is not there.
FOREIGN = (
    *(".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".mnc"),
    *(".hdr", ".img", ".hdr.gz", ".img.gz", ".nii.bz2", ".nii.zst", ".tif", ".tiff"),
)
SOUGHT = (*ENDINGS, *FOREIGN)
MOST_FILES = 5000
CONVERT = "convert it to NIfTI (.nii.gz)"
CONVERT_DICOM = "convert the series to NIfTI first: dcm2niix -z y -f %p_%s -o FOLDER_FOR_NIFTI FOLDER_OF_THE_SERIES"

# Groups of names under which releases and exports know one modality, as they stand in file names.
SYNONYMS = (
    ("t1", "t1n", "t1w"),
    ("t1ce", "t1c", "t1gd"),
    ("t2", "t2w"),
    ("flair", "t2f"),
    ("pet", "pt"),
    ("bssfp", "c0"),
    ("lge", "de"),
)

Names = Mapping[str, tuple[str, ...]]  # modality -> the names, in lower case, that its files carry; its own first


@dataclasses.dataclass(frozen=True)
class Case:
    """One scan session.

    images: modality -> file, without the missing ones. number: stable, from the name alone (`case_number`).
    label: the mask, or the first rater's. raters: those of the further raters who looked at the case.
    """

    name: str
    patient: str
    number: int
    images: Mapping[str, Path]
    label: Path | None
    raters: tuple[Path, ...] = ()


class Mistake(NamedTuple):
    """What a person must mend before a data set can be trained on: one line, and the files that it is about."""

    text: str
    files: tuple[Path, ...] = ()


class Listing(NamedTuple):
    """The cases of a data set. What is doubtful is in none of them, but among the mistakes.

    notes: a line for everything else that a person should know; it stops nothing.
    """

    cases: list[Case]
    mistakes: list[Mistake]
    notes: tuple[str, ...] = ()


def case_number(name: str) -> int:
    """A number in [0, 2^31) from the name alone, so that sampling keys survive any change of the listing."""
    return zlib.crc32(name.encode(errors="surrogatepass")) & 0x7FFFFFFF


def known_names(modalities: Sequence[str], names: Mapping[str, Any]) -> Names:
    """Under which names the files, channels and columns of each modality may stand.

    Its own name, and its SYNONYMS or, in their place, those that `names` (config.data.names) gives. Where a config has
    two modalities of one group of synonyms, both go by their own name alone. Raises UserError for a modality that comes
    twice or is not there, and for a name that stands for two: a file must never be two modalities.
    """
    own = [modality.lower() for modality in modalities]
    if repeated := [modality for i, modality in enumerate(modalities) if modality.lower() in own[:i]]:
        raise UserError(f"config.data.modalities has {repeated[0]} twice (names go without regard to case); remove one")
    if unknown := [modality for modality in names if modality not in modalities]:
        raise UserError(f"config.data.names: there is no modality {unknown[0]}; there are {', '.join(modalities)}")
    found: dict[str, tuple[str, ...]] = {}
    taken: dict[str, str] = {}
    for modality, name in zip(modalities, own, strict=True):
        more = names.get(modality, ())
        if not isinstance(more, list | tuple) or not all(isinstance(other, str) and other for other in more):
            raise UserError(f"config.data.names.{modality} is {more!r}; give a tuple of names, such as ('T1_MPRAGE',)")
        group = next((group for group in SYNONYMS if name in group), ())
        same = () if any(other in group for other in own if other != name) else group
        found[modality] = tuple(dict.fromkeys((name, *((other.lower() for other in more) if more else same))))
    for modality, every in found.items():
        for name in every:
            if (first := taken.setdefault(name, modality)) != modality:
                raise UserError(
                    f"config.data.names: {name} would stand for {first} and for {modality}; leave it to one of them"
                )
    return found


def one_of(there: Iterable[str], names: Sequence[str], modality: str, place: str) -> str | None:
    """Which channel or column is a modality's: the one with its own name, else the only one with another of its names;

    None when there is none. `names`: the modality's, its own first. Raises UserError for several.
    """
    every = list(there)
    found = [name for name in every if name.lower() == names[0]]
    found = found or [name for name in every if name.lower() in names]
    if len(found) > 1:
        raise UserError(f"{place}: {' and '.join(found)} may both be {modality}; rename one of them")
    return found[0] if found else None


def split_name(stem: str, kinds: Collection[str]) -> tuple[str, str, str]:
    """(case, separator, kind in lower case) of a file's name: the longest end that is one of `kinds`, else the part

    after the last _ or -. NAME_T1_MPRAGE is kind t1_mprage where that is known, else mprage.
    """
    if stem.lower() in kinds:
        return "", "", stem.lower()
    cuts = [i for i, letter in enumerate(stem) if letter in "_-"]
    if not cuts:
        return "", "", stem.lower()
    cut = next((i for i in cuts if stem[i + 1 :].lower() in kinds), cuts[-1])
    return stem[:cut], stem[cut], stem[cut + 1 :].lower()


def ending_of(name: str, endings: Sequence[str]) -> str | None:
    """Which of the endings a file name has, in any case; None for others, and for hidden files: macOS leaves a ._NAME

    beside every NAME on foreign disks.
    """
    if name.startswith("."):
        return None
    return next((ending for ending in endings if name.lower().endswith(ending.lower())), None)


def case_of(
    name: str, patient: str, images: Mapping[str, Sequence[Path]], labels: Sequence[Path]
) -> tuple[Case, list[Mistake]]:
    """The case that these files make, by modality. Mistakes and not in it: two files for one thing, one file for two,

    and a file that cannot be read (`obstacle`) where no other one is there in its place.
    """
    mistakes = []
    kept: dict[str | None, Path] = {}  # None: the label
    for what, found in (*images.items(), (None, labels)):
        readable = [path for path in found if obstacle(path) is None]
        if len(readable) > 1:
            shown = " and ".join(p.name if p.parent == readable[0].parent else str(p) for p in readable)
            said = f"case {name} has two files for {what or 'the label'}: {shown}; keep one of them"
            mistakes.append(Mistake(f"{readable[0].parent}: {said}", tuple(readable)))
        elif readable:
            kept[what] = readable[0]
        elif found:
            said = f"{what or 'the label'} of case {name} {obstacle(found[0])}"
            mistakes.append(Mistake(f"{found[0]}: {said}", tuple(found)))
    owners: dict[str, list[str | None]] = {}
    for what, path in kept.items():
        owners.setdefault(os.path.abspath(path), []).append(what)
    for several in (several for several in owners.values() if len(several) > 1):
        path = kept[several[0]]
        words = " and ".join(what or "the label" for what in several)
        mistakes.append(Mistake(f"{path}: is {words} of case {name}; give each its own file", (path,)))
        for what in several:
            del kept[what]
    own = {what: path for what, path in kept.items() if what is not None}
    return Case(name, patient, case_number(name), own, kept.get(None)), mistakes


def listing_of(found: Iterable[tuple[Case, list[Mistake]]]) -> Listing:
    """The listing of what `case_of` made."""
    pairs = list(found)
    return Listing([case for case, _ in pairs], [mistake for _, mistakes in pairs for mistake in mistakes])


def is_text(name: str) -> bool:
    """Whether a name can be written down; one of another encoding than UTF-8 cannot."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def is_there(path: Path) -> bool:
    """Whether a path that somebody wrote down is a file; one that no file can have is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, a folder that may not be read, a NUL
        return False


def leads_nowhere(path: Path) -> bool:
    """Whether a path is a link to nothing, as git-annex and DataLad leave for what was not fetched."""
    return os.path.islink(path) and not os.path.exists(path)


def obstacle(path: Path) -> str | None:
    """What keeps a file that is listed in a folder from being read, by its link and name alone, and the mend; None

    where nothing does.
    """
    if leads_nowhere(path):
        return "is a link to nothing; get the file (git annex get, datalad get)"
    ending = ending_of(path.name, FOREIGN)
    return f"is {ending}, a format that is not read; {CONVERT}" if ending else None


def why_no_scan(path: Path) -> str | None:
    """What keeps a path that somebody wrote down from being read as a scan, and the mend; None where nothing does."""
    if not is_there(path):
        if leads_nowhere(path):
            return obstacle(path)
        if not os.path.isdir(path):
            return "no such file; mend the path"
        if first_dicom(itertools.islice(files_below(path), MOST_FILES)) is not None:
            return f"is a folder of DICOM files; {CONVERT_DICOM}"
        return "is a folder; give the file of the scan"
    if path.name.lower().endswith((*ENDINGS, *PICTURES)):
        return None
    if is_dicom(path):
        return f"is a DICOM file; {CONVERT_DICOM}"
    return obstacle(path) or f"is neither NIfTI nor PNG nor JPEG by its name; {CONVERT}, or mend the name"


def files_below(folder: Path) -> Iterable[Path]:
    """Every file below a folder, sorted, and links to nothing too; none of hidden folders, as git keeps its own in.

    Folders that are links are followed, each real folder once.
    """
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (path for name in sorted(files) if is_listed(path := Path(root, name)))


def is_listed(path: Path) -> bool:
    """Whether what a folder lists is a file, or a link that should lead to one."""
    return path.is_file() or leads_nowhere(path)


def scans_below(folder: Path, endings: Sequence[str] = SOUGHT) -> Iterable[tuple[str, Path]]:
    """(name without its ending, file) of every scan below a folder, readable or not, or of those with other endings."""
    for path in files_below(folder):
        if ending := ending_of(path.name, endings):
            yield path.name[: -len(ending)], path


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its magic word."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_mistake(path: Path) -> UserError:
    """What to tell a person who gives a DICOM file, or a folder of them."""
    return UserError(f"{path}: is a DICOM file; {CONVERT_DICOM}")


def first_dicom(paths: Iterable[Path]) -> Path | None:
    """The first DICOM file of these, by its name or its magic word; None without one."""
    others = (path for path in paths if not path.name.lower().endswith((*SOUGHT, *PICTURES)))
    return next((path for path in others if path.suffix.lower() in (".dcm", ".ima") or is_dicom(path)), None)


def refuse_dicom(folder: Path, said: str = "") -> None:
    """Raises UserError where a folder without a case holds DICOM files, among its first MOST_FILES files.

    said: what else is wrong with it. It is told along where there are readable files too: a mask beside a series must
    not hide it, nor a stray series what is wrong with the files.
    """
    paths = list(itertools.islice(files_below(folder), MOST_FILES))
    if (dicom := first_dicom(paths)) is not None:
        error = dicom_mistake(dicom)
        raise UserError(f"{said}; and {error}") if said and _has_readable(paths) else error


def refuse_formats(folder: Path, said: str) -> None:
    """Raises UserError as `refuse_dicom` does, and where a folder holds scans of FOREIGN formats alone."""
    refuse_dicom(folder, said)
    paths = list(itertools.islice(files_below(folder), MOST_FILES))
    foreign = next((path for path in paths if ending_of(path.name, FOREIGN)), None)
    if foreign is not None and not _has_readable(paths):
        raise UserError(f"{foreign}: {obstacle(foreign)}")


def _has_readable(paths: Iterable[Path]) -> bool:
    return any(ending_of(path.name, (*ENDINGS, *PICTURES)) for path in paths)
