"""python -m entrust_jax.benchmark --suite=phantom --output=O [--seeds=3] [--quick | --ablation="A0 mean fusion" ...]
python -m entrust_jax.benchmark --suite=steps
python -m entrust_jax.benchmark --suite=latency --config=configs/glioma.py
python -m entrust_jax.benchmark --suite=volume --config=configs/brats.py [--shape=155,240,240]
python -m entrust_jax.benchmark --suite=volume --workdir=W [--window=D,H,W]
python -m entrust_jax.benchmark --suite=compile --config=configs/brats.py --output=O
python -m entrust_jax.benchmark --suite=trust --workdir=W --output=O [--patients=512] [--spoilt=64]
python -m entrust_jax.benchmark --suite=subsets --workdir=W --output=O [--split=test|all] [--hypotheses=N]
python -m entrust_jax.benchmark --suite=regions --workdir=W[,W2,...] --output=O [--data_dir=D] [--split=test|all]
python -m entrust_jax.benchmark --suite=causes --workdir=W --output=O [--cases=N]
python -m entrust_jax.benchmark --suite=conflict --workdir=W[,U,...] [--output=O] [--slices=N] [--hypotheses=N]
python -m entrust_jax.benchmark --suite=semisynthetic --config=C --config.data.dir=D --output=O [--slices=N]
python -m entrust_jax.benchmark --suite=semisynthetic --workdir=W [--hypotheses=N]

phantom: trains EnTrust and its ablations on the phantom and holds them against the exact posterior. Finished trainings
in O/runs are not repeated. --quick: one seed, the reference alone; --ablation: the reference and those named.
steps: what few steps and the scale b cost with an exact denoiser, as markdown.
latency: seconds of one slice with all its hypotheses and probes, beside U-Net passes.
volume: minutes and peak memory of one 3-D scan of random weights; with --workdir, what the windows of a trained network
leave to be seen in its test cases.
compile: memory and FLOPs of a training step on one device and on eight, compiled without data and not run: O/NAME.json.
trust: whether a trained EnTrust tells spoilt scans, keeps its guarantees over random divisions of its calibration and
test patients, and predicts its Dice. Writes trust.json and trust.md.
subsets: masks, calibration and guarantees of a trained model on its test cases from every subset of their modalities.
regions: what a trained EnTrust calls doubtful in its test cases, beside the truth: a sheet of ten regions for the eye,
sums over all of them by cause. Several W: folds of one set.
causes: whether an EnTrust trained on a phantom gives the reasons that the phantom planted.
conflict: whether the uncertainty of a trained EnTrust, W, follows conflict injected into one modality of its test
cases; the same figures of the U-Nets, with dropout or without, and the ensembles named after it.
semisynthetic: makes a set of D's scans, in which each modality shows or hides a lesion with known --reliability, to be
trained on with --config.data.layout=manifest --config.data.dir=O; then judges a model trained on it by the exact
posterior.

--hypotheses (conflict, semisynthetic, subsets): so many hypotheses of a case, and passes of a U-Net with dropout,
whatever the config says. What an AUROC can reach depends on them: 16 draws from the phantom's own law reach .84, 64
draws .98.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from entrust_jax import cli
from entrust_jax.errors import UserError

FLAGS = flags.FLAGS
TEST_CASES = 256
SLICES = 2  # of a scan that the conflict suite changes and looks at
COMPILED_FOR = 8  # devices, virtual ones on CPU


def main(argv: Sequence[str]) -> None:
    """Runs one suite."""
    del argv
    config = FLAGS.config.copy_and_resolve_references()
    cli.setup_devices(at_most=config.train.batch, cpu_devices=COMPILED_FOR if FLAGS.suite == "compile" else None)
    SUITES[FLAGS.suite](config)


def phantom_suite(config: Any) -> None:
    """Writes summary.json, phantom.md and one working folder a training into --output."""
    from entrust_jax.benchmark import phantom  # after the devices are set up

    if not FLAGS.output:
        raise UserError("--output is missing: name a folder for the results, --output=runs/phantom_suite")
    if FLAGS.quick and FLAGS.ablation:
        raise UserError("--quick trains the reference alone; leave out --ablation, or --quick")
    names = phantom.chosen([phantom.REFERENCE] if FLAGS.quick else FLAGS.ablation)
    seeds = 1 if FLAGS.quick else FLAGS.seeds
    output = Path(FLAGS.output)
    cli.check_place(output, "--output")
    phantom.run(config, output, names, seeds, TEST_CASES)
    print((output / "phantom.md").read_text())


def steps_suite(config: Any) -> None:
    """Prints markdown."""
    del config
    from entrust_jax.benchmark import steps

    print(steps.table())


def latency_suite(config: Any) -> None:
    """Prints JSON."""
    from entrust_jax.benchmark import latency

    print(json.dumps(latency.measure(config, FLAGS.size, FLAGS.repeats), indent=2))


def volume_suite(config: Any) -> None:
    """Prints JSON."""
    from entrust_jax import api
    from entrust_jax.benchmark import volume

    if FLAGS.window and not FLAGS.workdir:
        raise UserError("--window is of a trained model, --workdir; without one give --config.data.window")
    if FLAGS.workdir:
        trained = volume.with_windows(api.load(one_folder()), FLAGS.window)
        cases, _ = api.read_cases(trained)
        found: Any = [volume.trace_of_windows(trained, one) for one in cases]
    else:
        if not api.volumetric(config):
            raise UserError(f"config.data.patch is {config.data.patch}: name a config of three numbers, of volumes")
        depth, height, width = (int(size) for size in FLAGS.shape)
        found = volume.measure(config, (depth, height, width))
    print(json.dumps(found, indent=2))


def compile_suite(config: Any) -> None:
    """Prints a line a stage and number of devices, and writes them into --output."""
    import jax

    from entrust_jax.benchmark import compilation

    if not FLAGS.output:
        raise UserError("--output is missing: name a folder for the results, --output=runs/compile")
    output = Path(FLAGS.output)
    cli.check_place(output, "--output")
    options: Any = jax.config  # its options are made at run time
    options.update("jax_enable_compilation_cache", False)  # the seconds should be those of compiling
    print(compilation.run(config, output))


def trust_suite(config: Any) -> None:
    """Writes trust.json and trust.md into --output, and prints the latter."""
    del config  # the working folder has its own
    from entrust_jax.benchmark import trust

    output = output_of("trust")
    trust.run(Path(one_folder()), output, FLAGS.patients, FLAGS.spoilt, made_by())
    print((output / "trust.md").read_text())


def subsets_suite(config: Any) -> None:
    """Writes subsets.json and subsets.md into --output, and prints the latter."""
    del config
    from entrust_jax import api, evaluate
    from entrust_jax.benchmark import subsets

    output = output_of("subsets")
    methods = evaluate.load_methods([Path(one_folder())])
    if FLAGS.hypotheses:
        methods = {name: api.with_hypotheses(trained, FLAGS.hypotheses) for name, trained in methods.items()}
    targets = evaluate.common_targets({name: trained.config for name, trained in methods.items()}, "glioma")
    volumes, _ = evaluate.read_volumes(methods, FLAGS.data_dir, FLAGS.split)
    ((name, trained),) = methods.items()
    about = made_by() | {"calibrator": trained.rung, "hypotheses": trained.config.diffusion.hypotheses}
    subsets.run(trained, volumes[name], targets, output, about)
    print((output / "subsets.md").read_text())


def regions_suite(config: Any) -> None:
    """Writes regions.png, regions.json and regions.md into --output, and prints the latter."""
    del config
    from entrust_jax import evaluate
    from entrust_jax.benchmark import regions

    output = output_of("regions")
    regions.check_new(output)
    methods = evaluate.load_methods([Path(workdir) for workdir in FLAGS.workdir])
    regions.check(methods, FLAGS.split)
    cases = (
        (name, volume)
        for name, trained in methods.items()
        for volume in evaluate.read_volumes({name: trained}, FLAGS.data_dir, FLAGS.split)[0][name]
    )
    about = made_by() | {"split": FLAGS.split}
    about |= {"calibrator": {name: trained.rung for name, trained in methods.items()}}
    regions.run(methods, cases, output, about)
    print((output / "regions.md").read_text())


def causes_suite(config: Any) -> None:
    """Writes causes.json and causes.md into --output, and prints the latter."""
    del config
    from entrust_jax import api
    from entrust_jax.benchmark import causes

    output = output_of("causes")
    trained = api.load(one_folder())
    causes.check(trained)
    causes.run(trained, FLAGS.cases, output, made_by())
    print((output / "causes.md").read_text())


def conflict_suite(config: Any) -> None:
    """Writes conflict.json, conflict.md and conflict.png into --output, by default W/conflict."""
    del config
    from entrust_jax import api, evaluate
    from entrust_jax.benchmark import conflict

    if not FLAGS.workdir:
        raise UserError("--workdir is missing: name the working folder of a trained EnTrust, --workdir=runs/NAME")
    output = Path(FLAGS.output) if FLAGS.output else Path(FLAGS.workdir[0]) / "conflict"
    cli.check_place(output, "--output")
    methods = evaluate.load_methods([Path(workdir) for workdir in FLAGS.workdir])
    if FLAGS.hypotheses:
        methods = {name: api.with_hypotheses(trained, FLAGS.hypotheses) for name, trained in methods.items()}
    conflict.check(methods)
    volumes, _ = evaluate.read_volumes(methods, FLAGS.data_dir, FLAGS.split)
    first = next(iter(methods))
    cases = conflict.selected(volumes[first], FLAGS.cases)
    about = made_by() | {
        "methods": {name: trained.config.method for name, trained in methods.items()},
        "hypotheses": methods[first].config.diffusion.hypotheses,
        "dropout": {name: one.config.unet.dropout for name, one in methods.items() if one.config.method != "entrust"},
        "trained_on": {name: evaluate.seen_in_training(trained, cases) for name, trained in methods.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    conflict.run(methods, conflict.subjects_of(methods[first], cases, FLAGS.slices or SLICES), output, about)
    print((output / "conflict.md").read_text())


def semisynthetic_suite(config: Any) -> None:
    """Makes the set in --output, or judges --workdir and writes semisynthetic.json and .md into --output."""
    from entrust_jax import api, evaluate
    from entrust_jax.benchmark import semisynthetic
    from entrust_jax.runtime import logs

    if not FLAGS.workdir:
        if not FLAGS.output:
            raise UserError("--output is missing: name a folder for the set, or a trained model with --workdir")
        output = Path(FLAGS.output)
        cli.check_place(output, "--output")
        hypotheses = config.diffusion.hypotheses = FLAGS.hypotheses or config.diffusion.hypotheses
        reliability = semisynthetic.reliabilities(FLAGS.reliability, tuple(config.data.modalities), hypotheses)
        law = semisynthetic.make(config, output, reliability, FLAGS.draws, FLAGS.slices)
        print(f"wrote {len(law['cases'])} cases to {output}; left out: {', '.join(law['left_out']) or 'none'}")
        auroc, aim = law["exact"]["auroc"], semisynthetic.AIMS["auroc"]
        print(f"AUROC of contradiction by {hypotheses} hypotheses from the exact law: {auroc:.3f}, aim {aim:g}")
        return
    trained = api.load(one_folder())
    if FLAGS.hypotheses:
        trained = api.with_hypotheses(trained, FLAGS.hypotheses)
    folder = Path(FLAGS.data_dir or trained.config.data.dir)
    law = semisynthetic.read_law(folder)
    output = Path(FLAGS.output) if FLAGS.output else Path(FLAGS.workdir[0]) / "semisynthetic"
    cli.check_place(output, "--output")
    volumes, _ = api.read_cases(trained, FLAGS.data_dir, FLAGS.split)
    found, rows = semisynthetic.evaluate(trained, volumes, law, folder.parent if folder.is_file() else folder)
    output.mkdir(parents=True, exist_ok=True)
    about = made_by() | {"reliability": law["reliability"], "method": trained.config.method}
    about |= {"trained_on": evaluate.seen_in_training(trained, volumes)}
    logs.write_json(output / "semisynthetic.json", about | found | {"rows": rows})
    logs.write_bytes(output / "semisynthetic.md", semisynthetic.table(found).encode())
    print(semisynthetic.table(found))


def output_of(suite: str) -> Path:
    """--output of a suite that writes what it finds in --workdir. Raises UserError where one of them is missing."""
    for name in ("workdir", "output"):
        if not FLAGS[name].value:
            raise UserError(f"--{name} is missing: --suite={suite} --workdir=FOLDER_OF_A_TRAINING --output=FOLDER")
    output = Path(FLAGS.output)
    cli.check_place(output, "--output")
    return output


def made_by() -> dict[str, Any]:
    """The command and the version of the code, as every result holds them."""
    from entrust_jax.runtime import logs

    command = shlex.join(["python", "-m", "entrust_jax.benchmark", *sys.argv[1:]])
    return {"command": command, "code_version": logs.code_version()}


def one_folder() -> str:
    """The one working folder of a suite that is about one model."""
    if len(FLAGS.workdir) > 1:
        raise UserError("--workdir: name one trained model")
    return FLAGS.workdir[0]


SUITES = {
    "phantom": phantom_suite,
    "steps": steps_suite,
    "latency": latency_suite,
    "volume": volume_suite,
    "compile": compile_suite,
    "trust": trust_suite,
    "subsets": subsets_suite,
    "regions": regions_suite,
    "causes": causes_suite,
    "conflict": conflict_suite,
    "semisynthetic": semisynthetic_suite,
}

if __name__ == "__main__":
    flags.DEFINE_enum("suite", "phantom", list(SUITES), "What to measure.")
    flags.DEFINE_list("shape", ["155", "240", "240"], "volume: voxels of the scan along D, H, W.")
    flags.DEFINE_list("window", [], "volume: voxels of a trained model's windows along D, H, W; its own if left out.")
    flags.DEFINE_string("output", None, "Folder for the results, or for the set.")
    flags.DEFINE_integer("patients", 512, "trust: patients whose guarantees are tried, of a phantom.", lower_bound=1)
    flags.DEFINE_integer("spoilt", 64, "trust: test cases whose scans are spoilt, at most.", lower_bound=1)
    flags.DEFINE_integer("seeds", 3, "Trainings of every variant.", lower_bound=1)
    flags.DEFINE_multi_string("ablation", [], "phantom: an ablation to train beside the reference; all by default.")
    flags.DEFINE_bool("quick", False, "The reference alone, one seed.")
    flags.DEFINE_integer("size", 128, "latency: height and width of the slice, a multiple of 16.")
    flags.DEFINE_integer("repeats", 5, "latency: timed calls after the first.")
    flags.DEFINE_list(
        "workdir",
        None,
        "conflict: working folders, a trained EnTrust first; regions: folds of one set; other suites: one.",
    )
    flags.DEFINE_string("data_dir", None, "Folder of labelled scans, or of the set; the one trained on if left out.")
    flags.DEFINE_enum("split", "test", ["test", "all"], "Held-out test cases, or every labelled case.")
    flags.DEFINE_integer(
        "cases", 0, "conflict: so many cases, evenly spaced; causes: the first of them; 0 means all.", lower_bound=0
    )
    flags.DEFINE_integer(
        "slices", None, f"Slices of a scan that are changed; conflict: {SLICES}, semisynthetic: all if left out.",
        lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_integer(
        "hypotheses", None, "conflict, semisynthetic, subsets: as the config says if left out.", lower_bound=2
    )
    flags.DEFINE_integer("draws", 4, "semisynthetic: cases made of each scan.", lower_bound=1)
    flags.DEFINE_list("reliability", [], "semisynthetic: one for each modality; what the aim allows if left out.")
    config_flags.DEFINE_config_file("config", "configs/phantom.py", "Config of the suite.", lock_config=True)
    cli.run(main)
