"""nnU-Net raw, version 2: dataset.json, imagesTr/NAME_0000.nii.gz, labelsTr/NAME.nii.gz, and splits_final.json.

What is read of dataset.json: "channel_names", "labels" with regions, "regions_class_order" and "ignore", "file_ending",
and "dataset", the explicit paths of each case. "modality" and labels as {"1": name}, of version 1, are understood.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from entrust_jax.data.cases import (
    ENDINGS,
    SOUGHT,
    Case,
    Listing,
    Mistake,
    Names,
    case_of,
    ending_of,
    is_listed,
    one_of,
    why_no_scan,
)
from entrust_jax.data.splits import Fold
from entrust_jax.errors import UserError

DESCRIPTION = "dataset.json"
SPLITS = "splits_final.json"
IGNORE = "ignore"  # nnU-Net's own name of the label whose voxels do not count


class Labels(NamedTuple):
    """What a label file's values are.

    classes: names, the background first. label_map: (value, class index; -1 does not count). regions: name -> classes.
    """

    classes: tuple[str, ...]
    label_map: tuple[tuple[int, int], ...]
    regions: dict[str, tuple[int, ...]]


def read_json(path: Path, absent: str) -> Any:
    """The content of a JSON file. Raises UserError where it cannot be read; `absent` says why it should be there."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {absent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); mend the file") from None


def describe(folder: Path) -> dict[str, Any]:
    """dataset.json. Raises UserError where there is none, or no object in it."""
    path = folder / DESCRIPTION
    info = read_json(path, "an nnU-Net raw folder has one beside imagesTr/")
    if not isinstance(info, dict):
        raise UserError(f"{path}: holds no object; an nnU-Net raw folder describes its channels and labels there")
    return info


def channels_of(info: Mapping[str, Any], path: Path) -> dict[int, str]:
    """The name of each channel, in their order. Raises UserError where they are not given as {"0": "T1"}."""
    given = info.get("channel_names", info.get("modality"))
    known = isinstance(given, dict) and all(index.isdecimal() and len(index) < 5 for index in given)
    if not isinstance(given, dict) or not known or not given:
        raise UserError(f'{path}: has no "channel_names"; add them, as {{"0": "T1", "1": "FLAIR"}}')
    if wrong := [name for name in given.values() if not isinstance(name, str) or not name.strip()]:
        raise UserError(f'{path}: "channel_names" has {wrong[0]!r}; give every channel a name')
    lower = [name.lower() for name in given.values()]
    if repeated := [name for i, name in enumerate(lower) if name in lower[:i]]:
        raise UserError(f'{path}: "channel_names" has {repeated[0]} twice, so files of both would be one; rename one')
    if len({int(index) for index in given}) < len(given):
        raise UserError(f'{path}: "channel_names" has one number twice ({", ".join(given)}); remove one')
    return {int(index): given[index] for index in sorted(given, key=int)}


def labels_of(info: Mapping[str, Any], path: Path) -> Labels:
    """Classes, label values and regions from "labels".

    A label is one value, or a region: a list of values. Where there are regions the classes are the values in the
    files, since a segmentation here is one class a voxel; a value without a name of its own is named after the region
    that "regions_class_order" writes it for, else after the smallest one that holds it. Without regions every class
    but the background is one. Raises UserError for what is neither.
    """
    given = info.get("labels")
    if isinstance(given, dict) and given and all(name.isdecimal() for name in given):  # version 1: {"1": "lesion"}
        given = {name: int(value) for value, name in given.items() if isinstance(name, str) and len(value) < 10}
    if not isinstance(given, dict) or not given:
        raise UserError(f'{path}: has no "labels"; add them, as {{"background": 0, "lesion": 1}}')
    values: dict[str, tuple[int, ...]] = {}
    for name, value in given.items():
        several = value if isinstance(value, list) else [value]
        if not several or not all(type(one) is int and abs(one) < 2**31 for one in several) or not name.strip():
            raise UserError(f"{path}: label {name!r} is {value!r}; give a whole number, or a list of them for a region")
        values[name] = tuple(dict.fromkeys(several))
    ignored = values.pop(IGNORE, ())
    regions = {name: own for name, own in values.items() if own != (0,)}
    if 0 in ignored:
        raise UserError(f"{path}: label {IGNORE!r} is 0, the value of the background; give it another")
    if not regions:
        raise UserError(f'{path}: "labels" has only the background; name what is to be segmented')
    if wrong := [name for name, own in regions.items() if 0 in own or set(own) & set(ignored)]:
        raise UserError(f"{path}: label {wrong[0]!r} holds the background or the ignored value; take it out")
    single = {own[0]: name for name, own in regions.items() if len(own) == 1}
    if len(single) < sum(len(own) == 1 for own in regions.values()):
        raise UserError(f'{path}: "labels" gives one value two names; remove one')
    names = dict(single)
    order = _order_of(info, path, regions)
    for value in sorted({value for own in regions.values() for value in own} - set(names)):
        around = [name for name, own in regions.items() if value in own]
        base = order.get(value) or min(around, key=lambda name: len(regions[name]))
        names[value] = f"{base} {value}"
    background = next((name for name, own in values.items() if own == (0,)), "background")
    every = sorted(names)
    classes = (background, *(names[value] for value in every))
    if len({*classes, *regions}) < len(classes) + sum(len(own) > 1 for own in regions.values()):
        raise UserError(f'{path}: "labels" has names that say two things ({", ".join(classes)}); rename one')
    index = {0: 0, **{value: i for i, value in enumerate(every, 1)}, **dict.fromkeys(ignored, -1)}
    members = {name: tuple(sorted(index[value] for value in own)) for name, own in regions.items()}
    return Labels(classes, tuple(sorted(index.items())), members)


def _order_of(info: Mapping[str, Any], path: Path, regions: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Value -> the region for which nnU-Net writes it ("regions_class_order": one value a region, in their order)."""
    order = info.get("regions_class_order")
    if order is None or all(len(own) == 1 for own in regions.values()):
        return {}
    fits = isinstance(order, list) and len(order) == len(regions)
    if not fits or any(type(v) is not int or v not in own for v, own in zip(order, regions.values(), strict=True)):
        raise UserError(
            f'{path}: "regions_class_order" is {order!r}; give one value of each of {", ".join(regions)}, in this order'
        )
    return dict(zip(order, regions, strict=True))


def nnunet_cases(folder: Path, known: Names) -> Listing:
    """The training cases: those that "dataset" lists, else the files of imagesTr/ and labelsTr/.

    Modalities are matched to the channel names by any of their names. Raises UserError for a dataset.json that does not
    say what the channels are, or lacks one.
    """
    description = folder / DESCRIPTION
    info = describe(folder)
    names = channels_of(info, description)
    numbers = {name: index for index, name in names.items()}
    channels: dict[str, int] = {}
    for modality, own in known.items():
        name = one_of(names.values(), own, modality, str(description))
        if name is None:
            raise UserError(
                f"{description}: has no channel {modality}, it has {', '.join(names.values())};"
                " set config.data.modalities to some of these"
            )
        channels[modality] = numbers[name]
    ending = info.get("file_ending", ENDINGS[0])
    if not isinstance(ending, str) or ending.lower() not in ENDINGS:
        raise UserError(
            f'{description}: "file_ending" is {ending!r}; only {" and ".join(ENDINGS)} are read, convert the files'
        )
    if "dataset" in info:
        return _entries(folder, info["dataset"], channels, 1 + max(names))
    return _files(folder, channels)


def _files(folder: Path, channels: Mapping[str, int]) -> Listing:
    """The cases of imagesTr/."""
    place = folder / "imagesTr"
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; an nnU-Net raw folder keeps its scans there")
    found: dict[str, dict[int, list[Path]]] = {}
    for name, path in _scans(place):
        case, _, channel = name.rpartition("_")
        if case and channel.isdecimal():
            found.setdefault(case, {}).setdefault(int(channel), []).append(path)
    labels: dict[str, list[Path]] = {}
    for name, path in _scans(folder / "labelsTr"):
        labels.setdefault(name, []).append(path)
    cases, mistakes = [], []
    for name, own in sorted(found.items()):
        images = {modality: own.get(channel, []) for modality, channel in channels.items()}
        case, wrong = case_of(name, name, images, labels.get(name, []))
        cases.append(case)
        mistakes += wrong
    return Listing(cases, mistakes)


def _scans(folder: Path) -> list[tuple[str, Path]]:
    """(name without its ending, file) of the scans in a folder; none where there is no such folder."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        ending = ending_of(path.name, SOUGHT)
        if ending and is_listed(path):
            found.append((path.name[: -len(ending)], path))
    return found


def _entries(folder: Path, entries: Any, channels: Mapping[str, int], count: int) -> Listing:
    """The cases of "dataset": {NAME: {"images": [a path a channel, null for a missing one], "label": path}}; paths may

    be relative to the folder and hold environment variables, as nnU-Net reads them.
    """
    where = f'{folder / DESCRIPTION}: "dataset"'
    if not isinstance(entries, dict) or not entries:
        raise UserError(f'{where} is no object of cases; write {{NAME: {{"images": [...], "label": ...}}}}')
    cases: list[Case] = []
    mistakes: list[Mistake] = []

    def path_of(name: str, what: str, given: Any) -> list[Path]:
        if given is None or given == "":
            return []
        path = folder / os.path.expandvars(given) if isinstance(given, str) else None
        said = why_no_scan(path) if path is not None else "no such file; mend the path"
        if path is not None and said is None:
            return [path]
        mistakes.append(Mistake(f"{where}: {what} of case {name}: {str(given)[:200]}: {said}"))
        return []

    for name, entry in sorted(entries.items()):
        images = entry.get("images") if isinstance(entry, dict) else None
        if not name or not isinstance(images, list) or len(images) != count:
            said = f"{count} images, a path a channel and null for a missing one"
            mistakes.append(Mistake(f"{where}: case {name!r} must have {said}; mend it"))
            continue
        found = {modality: path_of(name, modality, images[channel]) for modality, channel in channels.items()}
        case, wrong = case_of(name, name, found, path_of(name, "label", entry.get("label")))
        cases.append(case)
        mistakes += wrong
    return Listing(cases, mistakes)


def fold_of(folder: Path, number: int) -> Fold | None:
    """Fold `number` of splits_final.json beside dataset.json, [{"train": [...], "val": [...]}, ...]; None without one.

    Raises UserError for a damaged file and a fold that it does not have.
    """
    path = folder / SPLITS
    if not path.exists():
        return None
    folds = read_json(path, "it was there a moment ago")
    if not isinstance(folds, list) or not folds:
        raise UserError(f'{path}: holds no list of folds, [{{"train": [...], "val": [...]}}]; mend or remove it')
    if not 0 <= number < len(folds):
        raise UserError(f"config.data.split.fold is {number}; {path} has {len(folds)}, give 0 to {len(folds) - 1}")
    fold = folds[number]
    lists: list[Any] = [fold.get(part) for part in ("train", "val")] if isinstance(fold, dict) else []
    if not lists or not all(isinstance(own, list) and all(isinstance(name, str) for name in own) for own in lists):
        raise UserError(f'{path}: fold {number} has no lists "train" and "val" of case names; mend or remove the file')
    return Fold(path, number, len(folds), tuple(lists[0]), tuple(lists[1]))
