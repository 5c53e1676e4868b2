"""A case: one scan session, its files by modality."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from entrust_jax.errors import UserError

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
