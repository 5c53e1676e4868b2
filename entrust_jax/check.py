"""python -m entrust_jax.check --config=configs/X.py [--config.data.dir=D] [--output=O]

Reads every case as training would and says what there is, all that is wrong with which file and what a training would
cost, before anything is trained. Writes O/check.png (a contact sheet: look at it), O/augmented.png (a training patch as
augmentation changes it) and O/check.json. Leaves with 2 where a case cannot be read or no training is possible, with 0
where there are only warnings. Of a phantom the first 16.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from entrust_jax import cli
from entrust_jax.errors import UserError

FLAGS = flags.FLAGS
PICTURED = 12  # cases on the contact sheet


def define_flags() -> None:
    """The command line of this entry point."""
    cli.config_flag()
    flags.DEFINE_string("output", None, "Folder for the pictures and check.json; runs/<config name>_check by default.")


def main(argv: Sequence[str]) -> None:
    """Checks the config, looks at every case, draws the sheet, plans the training."""
    del argv
    config: Any = FLAGS.config
    output = Path(FLAGS.output or cli.default_workdir(config).with_name(f"{config.name}_check"))
    cli.check_place(output, "--output")

    from entrust_jax import train  # after the cheap checks: it takes seconds to load

    with contextlib.suppress(UserError):  # where strides cannot be planned the inspection says everything that is wrong
        config = train.planned(config, output)
    train.check(output, config)
    cli.setup_devices(at_most=config.train.batch)
    found, errors = inspect(config, output)
    from entrust_jax.runtime import logs

    logs.write_json(output / "check.json", found | {"errors": errors})  # whatever comes of the plan
    if not errors:
        found["plan"] = plan(config, found)
        logs.write_json(output / "check.json", found | {"errors": errors})
    print(f"\n{output}/check.png: look at it: orientation, outlines, modalities in their columns")
    if (output / "augmented.png").exists():
        print(f"{output}/augmented.png: look at it too: augmentation should make what scanners make of a patch")
    if errors:
        raise UserError(f"{len(errors)} to mend, listed above and in {output}/check.json; the first: {errors[0]}")
    print(f"ready to be trained; {len(found['warnings'])} warnings")


def inspect(config: Any, output: Path) -> tuple[dict[str, Any], list[str]]:
    """Looks at every case, draws the sheet and says what was found: (figures and warnings, errors)."""
    import numpy as np

    from entrust_jax.data import dataset, survey
    from entrust_jax.report import contact, curves
    from entrust_jax.runtime import logs

    data = config.data
    modalities, classes = tuple(data.modalities), tuple(data.classes)
    cases, mistakes, notes = survey.cases_of(data)
    pictured = set(np.linspace(0, len(cases) - 1, min(PICTURED, len(cases))).round().astype(int).tolist())
    findings, glimpses = [], []
    with logs.progress("cases", len(cases)) as show:
        for i, case in enumerate(cases):
            finding, one = survey.look(data, case, config.seed)
            findings.append(finding)
            if one is not None and i in pictured:
                glimpses.append(one)
            show(i + 1)
    output.mkdir(parents=True, exist_ok=True)
    title = f"{config.name}: {len(glimpses)} of {len(cases)} cases"
    curves.save(contact.sheet(glimpses, modalities, classes, title), output / "check.png")

    found = survey.summary(findings, modalities, classes)
    warnings = [*notes, *(line for finding in findings for line in finding.warnings)]
    errors = [mistake.text for mistake in mistakes] + [finding.error for finding in findings if finding.error]
    warnings += survey.exchanged(findings, modalities) + survey.odd_spacings(findings)
    warnings += survey.repeated(findings) + survey.absent(findings, classes)
    if data.layout == "phantom":
        found["working_spacing"] = dataset.plan_spacing(data, [finding.name for finding in findings])["spacing"]
        one = [finding.name for finding in findings[:1]]
        found["epoch"] = data.phantom.cases[0] * survey.epoch(
            findings, one, found["working_spacing"], tuple(data.patch)
        )
    else:
        scans = [case for case in cases if not isinstance(case, str)]
        warnings += survey.unused(data, scans, mistakes)
        try:
            if scans:  # else there are mistakes alone
                draw = dataset.drawn(data, scans)
                warnings += draw.lines
                errors += survey.impossible(findings, modalities, draw.parts)
                if not mistakes:
                    found["working_spacing"] = dataset.plan_spacing(data, draw.parts["train"])["spacing"]
                found["epoch"] = survey.epoch(
                    findings, draw.parts["train"], found.get("working_spacing", ()), tuple(data.patch)
                )
        except UserError as error:
            errors.append(str(error))
    found["shown"] = None if mistakes else survey.telling(findings)
    picture_changes(config, found["shown"], tuple(found.get("working_spacing", ())), output)
    print_found(found | {"warnings": warnings, "errors": errors})
    return found | {"warnings": warnings}, errors


def picture_changes(config: Any, name: str | None, spacing: tuple[float, ...], output: Path) -> None:
    """Draws what augmentation does to a training patch of the case `name`; no picture is left where it does nothing."""
    from entrust_jax.data import dataset, survey
    from entrust_jax.report import contact, curves

    data, path = config.data, output / "augmented.png"
    path.unlink(missing_ok=True)
    if name is None or not data.augment:
        return
    (volume, *_), _ = dataset.read(data, [name], config.seed, spacing)
    if not volume.body.any():
        return
    samples = survey.samples(data, volume, config.seed)
    title = f"{config.name}: a training patch of {name} and what augmentation makes of it (how often)"
    picture = contact.changes(samples, tuple(data.modalities), tuple(data.classes), volume.spacing, title)
    curves.save(picture, path)


def print_found(found: dict[str, Any]) -> None:
    """What there is, what needs a word, and what must be mended."""
    from entrust_jax.data import resampling

    print(f"{found['cases']} cases of {found['patients']} patients, {found['unreadable']} of them unreadable")
    print("  " + ", ".join(f"{name} in {count}" for name, count in found["modalities"].items()))
    for what, unit in (("size", "voxels, D H W"), ("spacing", "mm along D H W")):
        if found[what]:
            spans = (" x ".join(f"{v:g}" for v in found[what][word]) for word in ("least", "median", "most"))
            print(f"  {what}: " + " / ".join(spans) + f" (least / median / most, {unit})")
    if found.get("working_spacing"):
        print(f"  working spacing: {resampling.in_words(found['working_spacing'])}")
    elif "working_spacing" in found and found["spacing"]:
        least, most = (" x ".join(f"{v:g}" for v in found["spacing"][word]) for word in ("least", "most"))
        print(f"  working spacing: as scanned, {least}{f' to {most}' if most != least else ''} (mm along D H W)")
    for name, own in found["labels"].items():
        print(f"  {name}: {own['voxels']:,} voxels in {own['cases']} cases")
    for kind in ("warning", "error"):
        for line in found[f"{kind}s"]:
            print(f"  {kind}: {line}")


def plan(config: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Compiles every stage, times its step on two batches of a case, and says what training costs: that of a batch of

    so many patches, and by stage.

    An epoch is `survey.epoch` of the labelled cases in the training part. Batches are
    made beside the steps, so the slower of the two sets the pace.
    """
    from entrust_jax import networks, train
    from entrust_jax.runtime import mesh
    from entrust_jax.training.programs import compile_stage, step_seconds
    from entrust_jax.training.stages import plan_stages

    devices, network = mesh.data_mesh(), networks.network_of(config)
    stages = plan_stages(config, network)
    programs = {stage.name: compile_stage(config, network, stage, devices) for stage in stages}
    batches, making = two_batches(config, found, devices)
    if batches:
        for stage in stages:
            own = programs[stage.name]
            seconds = max(making, step_seconds(config, stage, own.call, devices, batches))
            programs[stage.name] = dataclasses.replace(own, step_seconds=seconds)
    train.print_plan(config, stages, programs, devices, cli.default_workdir(config))
    unit = "patches" if networks.volumetric(config) else "slices"
    slices, size = found["epoch"], mesh.round_to_devices(config.train.batch, devices)
    source = f"measured on two batches of {found['shown']}" if batches else "measured on empty batches"
    costs: dict[str, Any] = {"patch": list(config.data.patch), "batch": size}
    for stage in stages:
        own = programs[stage.name]
        minutes, passes = slices / size * own.step_seconds / 60, stage.steps * size / max(slices, 1)
        print(
            f"  {stage.name}: an epoch of {slices} {unit} takes {minutes:.1f} min, {source}; "
            f"the plan is {passes:.1f} epochs"
        )
        costs[stage.name] = {
            "steps": stage.steps,
            "seconds_per_step": own.step_seconds,
            "compile_seconds": own.compile_seconds,
            "megabytes_per_device": own.memory_mb,
        }
    return costs


def two_batches(config: Any, found: dict[str, Any], devices: Any) -> tuple[list[Any], float]:
    """Two training batches of the case shown, where the step wants them, and the seconds after which there is one more.

    None of a case without a body.
    """
    from entrust_jax import train
    from entrust_jax.data import dataset, pipeline

    (volume, *_), _ = dataset.read(config.data, [found["shown"]], config.seed, tuple(found["working_spacing"]))
    if not volume.body.any():
        return [], 0.0
    data, batches = train.training_data(config, [volume], devices), []
    pipeline.batch_at(data, 0)  # the first one also loads what making needs
    began = time.perf_counter()
    for i in range(2):
        batches.append(train.place(config, pipeline.batch_at(data, i), devices))
    return batches, (time.perf_counter() - began) / 2 / pipeline.THREADS


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=["config"])
