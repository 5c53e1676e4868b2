"""Where a data set keeps its files: cases with their modalities by name."""

import dataclasses
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from entrust_jax.errors import UserError

# Other names under which BraTS releases and exports know a modality, as they stand in file names.
BRATS_NAMES = {
    "t1": ("t1", "t1n"),
    "t1n": ("t1", "t1n"),
    "t1ce": ("t1ce", "t1c"),
    "t1c": ("t1ce", "t1c"),
    "t1gd": ("t1ce", "t1c"),
    "t2": ("t2", "t2w"),
    "t2w": ("t2", "t2w"),
    "flair": ("flair", "t2f"),
    "t2f": ("flair", "t2f"),
}
ENDINGS = (".nii.gz", ".nii")


@dataclasses.dataclass(frozen=True)
class Case:
    """One scan session.

    images: modality -> file, without the missing ones. number: stable, from the name alone (`case_number`).
    """

    name: str
    patient: str
    number: int
    images: Mapping[str, Path]
    label: Path | None


def case_number(name: str) -> int:
    """A number in [0, 2^31) from the name alone, so that sampling keys survive any change of the listing."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def ending_of(name: str, endings: Sequence[str]) -> str | None:
    """Which of the endings a file name has, in any case; None for others, and for hidden files: macOS leaves a ._NAME

    beside every NAME on foreign disks.
    """
    if name.startswith("."):
        return None
    return next((ending for ending in endings if name.lower().endswith(ending.lower())), None)


def one_file(found: Sequence[Path], case: str, what: str) -> Path | None:
    """The only file of a list, None when empty. Raises UserError for two."""
    if len(found) > 1:
        raise UserError(
            f"{found[0].parent}: case {case} has two files for {what}: {' and '.join(p.name for p in found)};"
            " keep one of them"
        )
    return found[0] if found else None


def brats_case(folder: Path, modalities: Sequence[str]) -> Case:
    """A BraTS folder: NAME_t1.nii.gz, ... NAME_seg.nii.gz (2020, 2021) or NAME-t1n.nii.gz, ... (2023)."""
    name = folder.name
    files: dict[str, list[Path]] = {}
    dashed = False
    for path in sorted(folder.iterdir()):
        ending = ending_of(path.name, ENDINGS)
        if ending is None or not path.is_file():
            continue
        stem = path.name[: -len(ending)]
        # The part after the last separator is the modality; the part before need not be the folder's name.
        cut = max(stem.rfind("_"), stem.rfind("-"))
        dashed |= cut >= 0 and stem[cut] == "-"
        files.setdefault(stem[cut + 1 :].lower(), []).append(path)
    images = {}
    for modality in modalities:
        known = BRATS_NAMES.get(modality.lower(), (modality.lower(),))
        path = one_file([p for suffix in known for p in files.get(suffix, [])], name, modality)
        if path is not None:
            images[modality] = path
    label = one_file(files.get("seg", []), name, "the label")
    # BraTS 2023 names end in a time point, BraTS-GLI-00002-000: several sessions of one patient.
    head, _, last = name.rpartition("-")
    patient = head if dashed and head and last.isdigit() and len(last) == 3 else name
    return Case(name, patient, case_number(name), images, label)


def brats_cases(folder: Path, modalities: Sequence[str]) -> list[Case]:
    """Every sub-folder that holds at least one of the modalities or a label."""
    cases = [brats_case(path, modalities) for path in sorted(folder.iterdir()) if path.is_dir()]
    return [case for case in cases if case.images or case.label]


def nnunet_cases(folder: Path, modalities: Sequence[str]) -> list[Case]:
    """nnU-Net raw: dataset.json names the channels, imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz.

    The config's modalities are matched to the channel names without regard to case.
    """
    description = folder / "dataset.json"
    try:
        info = json.loads(description.read_text())
    except FileNotFoundError:
        raise UserError(f"{description}: no such file; an nnU-Net raw folder has one beside imagesTr/") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{description}: cannot be read ({error}); mend the file") from None
    named = info.get("channel_names", info.get("modality")) if isinstance(info, dict) else None
    if not isinstance(named, dict) or not all(str(index).isdigit() for index in named):
        raise UserError(f'{description}: has no "channel_names"; add them, as {{"0": "T1", "1": "FLAIR"}}')
    channels = {str(name).lower(): int(index) for index, name in named.items()}
    for modality in modalities:
        if modality.lower() not in channels:
            raise UserError(
                f"{description}: has no channel {modality}, it has {', '.join(map(str, named.values()))};"
                " set config.data.modalities to some of these"
            )
    main = str(info.get("file_ending", ".nii.gz"))
    endings = tuple(dict.fromkeys((main, *ENDINGS)))
    images = folder / "imagesTr"
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; an nnU-Net raw folder keeps its scans there")
    found: dict[str, dict[int, list[Path]]] = {}
    for path in sorted(images.iterdir()):
        ending = ending_of(path.name, endings)
        if ending is None:
            continue
        name, _, channel = path.name[: -len(ending)].rpartition("_")
        if name and channel.isdigit():
            found.setdefault(name, {}).setdefault(int(channel), []).append(path)
    labels: dict[str, list[Path]] = {}
    for path in sorted((folder / "labelsTr").iterdir()) if (folder / "labelsTr").is_dir() else []:
        if ending := ending_of(path.name, endings):
            labels.setdefault(path.name[: -len(ending)], []).append(path)
    cases = []
    for name, by_channel in sorted(found.items()):
        files = {}
        for modality in modalities:
            path = one_file(by_channel.get(channels[modality.lower()], []), name, modality)
            if path is not None:
                files[modality] = path
        label = one_file(labels.get(name, []), name, "the label")
        cases.append(Case(name, name, case_number(name), files, label))
    return cases


LAYOUTS: dict[str, tuple[str, Callable[[Path, Sequence[str]], list[Case]]]] = {
    "brats": ("one folder per case with NAME_flair.nii.gz ... NAME_seg.nii.gz", brats_cases),
    "nnunet": ("dataset.json, imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz", nnunet_cases),
}


def find_cases(layout: str, folder: Path | str, modalities: Sequence[str]) -> list[Case]:
    """The cases of a data set, sorted by name; those without any of the modalities are left out.

    Raises UserError when the folder or its cases are not there, and for two files of one modality.
    """
    if layout not in LAYOUTS:
        raise UserError(f"config.data.layout is {layout!r}; set it to one of {', '.join(LAYOUTS)}")
    expected, find = LAYOUTS[layout]
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; set config.data.dir to a folder in the {layout} layout ({expected})"
        )
    cases = [case for case in find(folder, modalities) if case.images]
    if not cases:
        raise UserError(
            f"{folder}: holds no case with any of {', '.join(modalities)}; the {layout} layout expects {expected}"
        )
    return cases


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


def case_from_folder(folder: Path | str, modalities: Sequence[str]) -> Case:
    """One BraTS folder (`predict --case=FOLDER`). Raises UserError when it holds none of the modalities."""
    # Resolved, so that "." and "case/" have the folder's name.
    path = Path(folder).resolve()
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of one case, with NAME_flair.nii.gz and so on")
    case = brats_case(path, modalities)
    if not case.images:
        raise UserError(
            f"{folder}: holds none of {', '.join(modalities)};"
            f" name the files as NAME_{modalities[0].lower()}.nii.gz or give them one by one as MODALITY=FILE"
        )
    return case


def case_from_files(files: Mapping[str, Path | str], modalities: Sequence[str]) -> Case:
    """A case from files given one by one, {"T1": path}; names without regard to case.

    Its name is that of the first file in model order, less a channel number or modality at its end. Raises UserError
    for an unknown or repeated modality, a missing file, or none at all.
    """
    known = {modality.lower(): modality for modality in modalities}
    given: dict[str, Path] = {}
    for name, file in files.items():
        if name.lower() not in known:
            raise UserError(f"{name}={file}: the model has no modality {name}; it knows {', '.join(modalities)}")
        modality, path = known[name.lower()], Path(file)
        if modality in given:
            raise UserError(f"{name}={file}: two files for {modality}, {given[modality]} too; keep one of them")
        if not path.is_file():
            raise UserError(f"{path}: no such file; give the path of the {modality} scan")
        given[modality] = path
    if not given:
        raise UserError(f"no scan given; give at least one of {', '.join(modalities)} as MODALITY=FILE")
    images = {modality: given[modality] for modality in modalities if modality in given}
    first = next(iter(images.values())).name
    ending = ending_of(first, ENDINGS) or ""
    name = first[: len(first) - len(ending)]
    # NAME_0001 and NAME_flair are NAME, as in a data set: so the sampling noise does not depend on the first file.
    name = re.sub(rf"(?<=.)[_-](\d{{4}}|{'|'.join(map(re.escape, modalities))})$", "", name, flags=re.IGNORECASE)
    return Case(name, name, case_number(name), images, None)
