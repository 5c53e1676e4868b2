"""A table of cases:

    python -m entrust_jax.manifest --dir=D T1={case}/T1.nii.gz label={case}/seg.nii.gz

One NAME=PATTERN for each modality, and label=PATTERN. {case} stands for the case's name, * for any part of a file's
name. Where a patient has several cases write {patient}/{case}/... in all of them. Where several raters drew masks give
label=, label2=, label3=, ... The manifest is what config.data.layout=manifest reads.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from entrust_jax import cli
from entrust_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command line of this entry point."""
    flags.DEFINE_string("dir", None, "Folder below which the scans lie.")
    flags.DEFINE_string("output", None, "The manifest; by default manifest.csv in that folder.")


def main(argv: Sequence[str]) -> None:
    """Checks the arguments, looks for the files, writes the table and says what it holds."""
    from entrust_jax.data import manifest
    from entrust_jax.runtime import logs

    folder = Path(FLAGS.dir)
    if not folder.is_dir():
        raise UserError(f"--dir={folder}: no such folder; give the folder below which the scans lie")
    output = Path(FLAGS.output) if FLAGS.output else folder / manifest.NAMES[0]
    if output.suffix.lower() != ".csv":
        raise UserError(f"--output={output}: must end in .csv")
    if output.exists():
        raise UserError(f"{output}: is there already; remove it, or name another file with --output")
    cli.check_place(output.parent, "--output")
    templates = parse_templates(argv[1:], manifest.LABEL)
    rows = manifest.collect(folder, templates)
    base = os.path.relpath(folder.resolve(), output.parent.resolve())
    output.parent.mkdir(parents=True, exist_ok=True)
    logs.write_bytes(output, manifest.as_csv(rows, list(templates), base).encode())
    counts = ", ".join(f"{name} {sum(name in row for row in rows)}" for name in templates)
    print(f"{output}: {len(rows)} cases; {counts}")
    if left := manifest.unfitting(folder, rows):
        fit = "1 scan fits" if len(left) == 1 else f"{len(left)} scans fit"
        print(f"  {fit} no pattern and {'is' if len(left) == 1 else 'are'} not in it, such as {left[0]}")


def parse_templates(words: Sequence[str], label: re.Pattern[str]) -> dict[str, str]:
    """{modality or label: pattern} from NAME=PATTERN, `label` being what names of labels look like.

    Raises UserError for other words and a name given twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, pattern = word.partition("=")
        if not equals or not name or not pattern:
            raise UserError(f"{word}: is no NAME=PATTERN, such as T1={{case}}/T1.nii.gz")
        if name.lower() in {other.lower() for other in (*found, "case", "patient")}:
            raise UserError(f"{word}: {name} is taken; give every modality one pattern")
        if name.lower().startswith("label") and not label.fullmatch(name.lower()):
            raise UserError(f"{word}: name the labels of several raters label, label2, label3, ...")
        found[name.lower() if label.fullmatch(name.lower()) else name] = pattern
    if all(label.fullmatch(name) for name in found):
        raise UserError("no modality given; write at least one NAME=PATTERN, such as T1={case}/T1.nii.gz")
    return found


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=["dir"], words="NAME=PATTERN")
