"""Segments one patient: python -m entrust_jax.predict --workdir=W --output=O T1=a.nii.gz FLAIR=b.nii.gz ...

Any subset of the model's modalities will do, each by any of its names; --case=FOLDER takes a folder in BraTS naming
instead of files. Writes the segmentation, its uncertainty, the reasons and what is guaranteed as NIfTI maps in the
reference scan's geometry, report.json and overview.png.

--cases=FOLDER predicts every folder in it, each into a folder of its own name under --output, and writes referral.csv:
the cases in the order in which a person should look at them, the least trusted first. The lower the predicted Dice,
the less a case is trusted; those in which nothing was found come before all others.

Before anything is predicted, a line warns of every scan that does not look like those of training.
"""

import csv
import importlib.metadata
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from entrust_jax import cli
from entrust_jax.data.cases import refuse_dicom
from entrust_jax.errors import UserError

FLAGS = flags.FLAGS
REFERRAL = "referral.csv"
PACKAGES = ("scipy", "nibabel", "matplotlib")  # beyond those that every result names


def define_flags() -> None:
    """The command line of this entry point."""
    flags.DEFINE_string("workdir", None, "Working folder of a trained model.")
    flags.DEFINE_string("output", None, "Folder for the results; an earlier prediction there is replaced.")
    flags.DEFINE_string("case", None, "Folder of one case in BraTS naming, instead of MODALITY=FILE arguments.")
    flags.DEFINE_string("cases", None, "Folder of many such folders; what to review first is in referral.csv.")
    flags.DEFINE_bool("hypotheses", False, "Write hypotheses.nii.gz, every plausible segmentation, as well.")


def main(argv: Sequence[str]) -> None:
    """Checks the arguments, reads the scans, predicts, writes."""
    start = time.perf_counter()
    workdir, output = Path(FLAGS.workdir), Path(FLAGS.output)
    folders = parse_folders(argv[1:], FLAGS.case, FLAGS.cases)
    files = {} if folders else parse_files(argv[1:], FLAGS.case)
    cli.check_place(output, "--output")
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: no such folder; give the working folder of a training run")

    # After the cheap checks: these take seconds to load, which a wrong argument should not cost.
    from entrust_jax import api
    from entrust_jax.data import layouts
    from entrust_jax.report import output as report

    for place in [output / folder.name for folder in folders] or [output]:
        report.check_output(place)
    cli.setup_devices()
    config: Any = api.read_config(workdir)
    if folders:
        predict_folders(config, workdir, folders, output)
        print(f"{time.perf_counter() - start:.1f} s")
        return
    modalities, names = tuple(config.data.modalities), config.data.names.to_dict()
    if FLAGS.case is not None:
        case = layouts.case_from_folder(Path(FLAGS.case), modalities, names)
    else:
        case = layouts.case_from_files(files, modalities, names)
    volume, lost = read(config, case)
    prediction = write(config, api.load(workdir), volume, lost, output)
    for line in prediction["conformal"]["statements"] if "conformal" in prediction else ():
        print(f"  {line}")
    if FLAGS.hypotheses and "hypotheses" not in prediction:
        print(f"  hypotheses.nii.gz is not written: the method {config.method} draws none")
    print(f"picture: {output / report.PICTURE}")
    print(f"maps:    {output}/*.nii.gz")
    print(f"report:  {output / report.REPORT}")
    print(f"{time.perf_counter() - start:.1f} s, of which prediction {prediction['seconds']:.1f} s")


def read(config: Any, case: Any) -> tuple[Any, list[str]]:
    """The scans of a case, and a sentence for whatever is lost with those that are missing."""
    from entrust_jax.data import dataset, preprocess, scans

    data = config.data
    modalities = tuple(data.modalities)
    volume = preprocess.read_volume(case, **dataset.reading(data))
    present = [name for name, there in zip(modalities, volume.present, strict=True) if there]
    lost = losses(present, modalities, data.reference)
    if volume.reference is not None and scans.is_picture(volume.reference):
        lost.append("A picture does not say how large its pixels are: 1 mm is taken, so no volume or distance is real.")
    return volume, lost


def announce(volume: Any, modalities: Sequence[str], lines: Sequence[str], unlike: Sequence[str]) -> None:
    """Prints what was given: first which scans are unlike those of training, for all that follows rests on them."""
    for line in unlike:
        print(f"warning: {volume.name}: {line}", flush=True)
    named = {here: [m for m, there in zip(modalities, volume.present, strict=True) if there == here] for here in (1, 0)}
    print(f"{volume.name}: present {', '.join(named[1])}; missing {', '.join(named[0]) or 'none'}", flush=True)
    for line in lines:
        print(f"  {line}", flush=True)


def write(config: Any, trained: Any, volume: Any, lost: Sequence[str], output: Path) -> Any:
    """Says what was given, predicts it into the folder `output`; returns the prediction."""
    from entrust_jax import api
    from entrust_jax.report import output as report
    from entrust_jax.runtime import logs
    from entrust_jax.trustmap import conformal, ood

    data = config.data
    compared = api.compare_volume(trained, volume)
    unlike = ood.sentences(compared) if compared else []
    lines = [*volume.warnings, *lost]
    if compared and compared["note"]:
        lines.append(f"Not compared with the scans of training: {compared['note']}.")
    announce(volume, tuple(data.modalities), lines, unlike)
    if (expected := api.memory_in_words(trained, volume)) is not None:
        print(f"  {expected}", flush=True)
    prediction = api.predict_volume(trained, volume) | {"compared": compared}
    if unlike and (promised := prediction.get("conformal")):
        prediction["conformal"] = conformal.doubted(promised, ["a scan is unlike those of training"])
    report.write_prediction(
        output,
        prediction,
        volume,
        name=config.name,
        method=config.method,
        modalities=tuple(data.modalities),
        reference=data.reference,
        classes=tuple(data.classes),
        label_map=data.label_map,
        regions=dict(data.regions.items()),
        hypotheses=FLAGS.hypotheses,
        versions=logs.code_version() | {name: importlib.metadata.version(name) for name in PACKAGES},
        warnings=(*unlike, *lines),
    )
    return prediction


def predict_folders(config: Any, workdir: Path, folders: Sequence[Path], output: Path) -> None:
    """Predicts case after case, and writes the order of referral.

    A case that cannot be predicted is said and left out; UserError at the end, when the others are written.
    """
    from entrust_jax import api
    from entrust_jax.data import layouts
    from entrust_jax.runtime import logs

    modalities, names = tuple(config.data.modalities), config.data.names.to_dict()
    trained = api.load(workdir)
    rows, failed = [], []
    for folder in folders:
        try:
            volume, lost = read(config, layouts.case_from_folder(folder, modalities, names))
            prediction = write(config, trained, volume, lost, output / folder.name)
        except UserError as error:
            print(f"{folder.name}: not predicted: {error}", flush=True)
            failed.append(str(error))
            continue
        unlike = {} if prediction["compared"] is None else {"unlike": " ".join(prediction["compared"]["unlike"])}
        rows.append({"case": folder.name} | prediction["trust"] | unlike)
        trust = prediction["trust"]
        words = "nothing found" if trust["nothing_found"] else f"trust {trust['score']:.4f}"
        print(f"  {words}, {prediction['seconds']:.1f} s", flush=True)
    if rows:
        logs.write_bytes(output / REFERRAL, referral(rows).encode())
        print(f"least trusted first: {output / REFERRAL}")
    if failed:
        raise UserError(f"{len(failed)} of {len(folders)} cases were not predicted; the first: {failed[0]}")


def referral(rows: Sequence[dict[str, Any]]) -> str:
    """The cases as CSV in order of review, the least trusted first; see `trustmap.case.trust`."""
    ordered = sorted(rows, key=lambda row: (row["score"], -row["mean_error"], row["case"]))
    text = io.StringIO()
    table = csv.DictWriter(text, ["review", *ordered[0]], lineterminator="\n")
    table.writeheader()
    table.writerows({"review": number, **row} for number, row in enumerate(ordered, 1))
    return text.getvalue()


def parse_folders(arguments: Sequence[str], case: str | None, cases: str | None) -> list[Path]:
    """The folders of cases in --cases; none without it.

    Raises UserError for another form beside it, and where there is no folder in it.
    """
    if cases is None:
        return []
    if other := [*arguments, *(["--case"] if case is not None else [])]:
        raise UserError(f"{other[0]}: goes not together with --cases; give a folder of cases, or one case")
    root = Path(cases)
    if not root.is_dir():
        raise UserError(f"--cases={cases}: no such folder; give the folder in which the folders of cases are")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"--cases={cases}: has no folder in it; for the files of one case give --case={cases}")
    return folders


def parse_files(arguments: Sequence[str], case: str | None) -> dict[str, Path]:
    """The MODALITY=FILE arguments; none with --case. Whether they make a case of the model is checked later.

    Raises UserError for an argument of another form, a modality given twice, a missing file, a folder, no scan at all,
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
        path = Path(file)
        if path.is_dir():
            refuse_dicom(path)
            raise UserError(f"{file}: is a folder; give the {name} scan itself, a .nii.gz file, or --case=FOLDER")
        if not path.is_file():
            raise UserError(f"{file}: no such file; give the path of the {name} scan")
        files[name] = path
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
