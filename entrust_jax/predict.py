"""Segments one patient: python -m entrust_jax.predict --workdir=W --output=O T1=a.nii.gz FLAIR=b.nii.gz ...

Any subset of the model's modalities will do, each by any of its names; --case=FOLDER takes a folder in BraTS naming
instead of files. Writes the segmentation, its uncertainty and the reasons as NIfTI maps in the reference scan's
geometry, report.json and overview.png.
"""

import importlib.metadata
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from entrust_jax import cli
from entrust_jax.errors import UserError

FLAGS = flags.FLAGS
PACKAGES = ("scipy", "nibabel", "matplotlib")  # beyond those that every result names


def define_flags() -> None:
    """The command line of this entry point."""
    flags.DEFINE_string("workdir", None, "Working folder of a trained model.")
    flags.DEFINE_string("output", None, "Folder for the results; an earlier prediction there is replaced.")
    flags.DEFINE_string("case", None, "Folder of one case in BraTS naming, instead of MODALITY=FILE arguments.")
    flags.DEFINE_bool("hypotheses", False, "Write hypotheses.nii.gz, every plausible segmentation, as well.")


def main(argv: Sequence[str]) -> None:
    """Checks the arguments, reads the scans, predicts, writes."""
    start = time.perf_counter()
    workdir, output = Path(FLAGS.workdir), Path(FLAGS.output)
    files = parse_files(argv[1:], FLAGS.case)
    cli.check_place(output, "--output")
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such folder; give the working folder of a training run")

    # After the cheap checks: these take seconds to load, which a wrong argument should not cost.
    from entrust_jax import api
    from entrust_jax.data import dataset, layouts, preprocess
    from entrust_jax.report import output as report
    from entrust_jax.runtime import logs

    report.check_output(output)
    cli.setup_devices()
    config: Any = api.read_config(workdir)
    data = config.data
    modalities, classes = tuple(data.modalities), tuple(data.classes)
    if FLAGS.case is not None:
        case = layouts.case_from_folder(Path(FLAGS.case), modalities, data.names.to_dict())
    else:
        case = layouts.case_from_files(files, modalities, data.names.to_dict())
    volume = preprocess.read_volume(case, **dataset.reading(data))
    present = [name for name, there in zip(modalities, volume.present, strict=True) if there]
    lost = losses(present, modalities, data.reference)
    if volume.reference is not None and preprocess.is_picture(volume.reference):
        lost.append("A picture does not say how large its pixels are: 1 mm is taken, so no volume or distance is real.")
    missing = [name for name in modalities if name not in present]
    print(f"{volume.name}: present {', '.join(present)}; missing {', '.join(missing) or 'none'}")
    for line in (*volume.warnings, *lost):
        print(f"  {line}")

    prediction = api.predict_volume(api.load(workdir), volume)
    report.write_prediction(
        output,
        prediction,
        volume,
        name=config.name,
        method=config.method,
        modalities=modalities,
        reference=data.reference,
        classes=classes,
        label_map=data.label_map,
        regions=dict(data.regions.items()),
        hypotheses=FLAGS.hypotheses,
        versions=logs.code_version() | {name: importlib.metadata.version(name) for name in PACKAGES},
        warnings=(*volume.warnings, *lost),
    )
    if FLAGS.hypotheses and "hypotheses" not in prediction:
        print(f"  hypotheses.nii.gz is not written: the method {config.method} draws none")
    print(f"picture: {output / report.PICTURE}")
    print(f"maps:    {output}/*.nii.gz")
    print(f"report:  {output / report.REPORT}")
    print(f"{time.perf_counter() - start:.1f} s, of which prediction {prediction['seconds']:.1f} s")


def parse_files(arguments: Sequence[str], case: str | None) -> dict[str, Path]:
    """The MODALITY=FILE arguments; none with --case. That the model knows them is checked later.

    Raises UserError for an argument of another form, a modality given twice, a missing file, no scan at all,
    and both forms at once.
    """
    if case is not None:
        if arguments:
            raise UserError(f"{arguments[0]}: goes not together with --case; give either a folder or single files")
        if not Path(case).is_dir():
            raise UserError(f"--case={case}: no such folder; give the folder of one case")
        return {}
    if not arguments:
        raise UserError("no scan given; add MODALITY=FILE arguments such as FLAIR=flair.nii.gz, or --case=FOLDER")
    files: dict[str, Path] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not (name and equals and file):
            raise UserError(f"{argument}: is not of the form MODALITY=FILE, such as FLAIR=flair.nii.gz")
        if any(name.lower() == known.lower() for known in files):
            raise UserError(f"{argument}: {name} is given twice; keep one of the files")
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file; give the path of the {name} scan")
        files[name] = Path(file)
    return files


def losses(present: Sequence[str], modalities: Sequence[str], reference: str) -> list[str]:
    """What a prediction from these modalities lacks, one sentence each."""
    missing = [name for name in modalities if name not in present]
    lines = []
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        lines.append(f"{', '.join(missing)} {verb} missing: what only such a scan shows is lost.")
    if reference in missing:
        lines.append(f"Without {reference} the maps take the geometry of {present[0]}.")
    if len(present) == 1:
        lines.append(f"With {present[0]} alone no conflict between scans can be seen.")
    return lines


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("workdir", "output"), words="MODALITY=FILE")
