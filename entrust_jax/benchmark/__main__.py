"""python -m entrust_jax.benchmark --suite=phantom --output=O [--seeds=3] [--quick | --ablation="A0 mean fusion" ...]
python -m entrust_jax.benchmark --suite=steps
python -m entrust_jax.benchmark --suite=latency --config=configs/glioma.py
python -m entrust_jax.benchmark --suite=conflict --workdir=W[,U,...] [--output=O] [--data_dir=D] [--slices=N]

phantom: trains EnTrust and its ablations on the phantom and holds them against the exact posterior. Finished trainings
in O/runs are not repeated. --quick: one seed, the reference alone; --ablation: the reference and those named.
steps: what few steps and the scale b cost with an exact denoiser, as markdown.
latency: seconds of one slice with all its hypotheses and probes, beside U-Net passes.
conflict: whether the uncertainty of a trained EnTrust, W, follows conflict injected into one modality of its test
cases; the same figures of the U-Nets and ensembles named after it.
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


def main(argv: Sequence[str]) -> None:
    """Runs one suite."""
    del argv
    config = FLAGS.config.copy_and_resolve_references()
    cli.setup_devices(at_most=config.train.batch)
    suites = {"phantom": phantom_suite, "steps": steps_suite, "latency": latency_suite, "conflict": conflict_suite}
    suites[FLAGS.suite](config)


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


def conflict_suite(config: Any) -> None:
    """Writes conflict.json, conflict.md and conflict.png into --output, by default W/conflict."""
    del config
    from entrust_jax import evaluate
    from entrust_jax.benchmark import conflict
    from entrust_jax.runtime import logs

    if not FLAGS.workdir:
        raise UserError("--workdir is missing: name the working folder of a trained EnTrust, --workdir=runs/NAME")
    output = Path(FLAGS.output) if FLAGS.output else Path(FLAGS.workdir[0]) / "conflict"
    cli.check_place(output, "--output")
    methods = evaluate.load_methods([Path(workdir) for workdir in FLAGS.workdir])
    conflict.check(methods)
    volumes, _ = evaluate.read_volumes(methods, FLAGS.data_dir, FLAGS.split)
    first = next(iter(methods))
    cases = conflict.selected(volumes[first], FLAGS.cases)
    about = {
        "command": shlex.join(["python", "-m", "entrust_jax.benchmark", *sys.argv[1:]]),
        "code_version": logs.code_version(),
        "methods": {name: trained.config.method for name, trained in methods.items()},
        "trained_on": [case.name for case in cases if case.name not in methods[first].splits["test"]],
    }
    output.mkdir(parents=True, exist_ok=True)
    conflict.run(methods, conflict.subjects_of(methods[first], cases, FLAGS.slices), output, about)
    print((output / "conflict.md").read_text())


if __name__ == "__main__":
    flags.DEFINE_enum("suite", "phantom", ["phantom", "steps", "latency", "conflict"], "What to measure.")
    flags.DEFINE_string("output", None, "Folder for the results of the phantom and the conflict suite.")
    flags.DEFINE_integer("seeds", 3, "Trainings of every variant.", lower_bound=1)
    flags.DEFINE_multi_string("ablation", [], "phantom: an ablation to train beside the reference; all by default.")
    flags.DEFINE_bool("quick", False, "The reference alone, one seed.")
    flags.DEFINE_integer("size", 128, "latency: height and width of the slice, a multiple of 16.")
    flags.DEFINE_integer("repeats", 5, "latency: timed calls after the first.")
    flags.DEFINE_list("workdir", None, "conflict: working folders, a trained EnTrust first.")
    flags.DEFINE_string("data_dir", None, "conflict: folder of labelled scans; the one trained on if left out.")
    flags.DEFINE_enum("split", "test", ["test", "all"], "conflict: held-out test cases, or every labelled case.")
    flags.DEFINE_integer("cases", 0, "conflict: so many cases, evenly spaced; 0 means all.", lower_bound=0)
    flags.DEFINE_integer("slices", 2, "conflict: slices of a scan that are changed and looked at.", lower_bound=1)
    config_flags.DEFINE_config_file("config", "configs/phantom.py", "Config of the suite.", lock_config=True)
    cli.run(main)
