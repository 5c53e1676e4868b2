"""python -m entrust_jax.benchmark --suite=phantom --output=O [--seeds=3] [--quick | --ablation="A0 mean fusion" ...]
python -m entrust_jax.benchmark --suite=steps
python -m entrust_jax.benchmark --suite=latency --config=configs/glioma.py
python -m entrust_jax.benchmark --suite=volume --config=configs/brats.py [--shape=155,240,240 | --workdir=W]
python -m entrust_jax.benchmark --suite=compile --config=configs/brats.py --output=O
python -m entrust_jax.benchmark --suite=trust --workdir=W --output=O [--cases=512] [--spoilt=64]

phantom: trains EnTrust and its ablations on the phantom and holds them against the exact posterior. Finished trainings
in O/runs are not repeated. --quick: one seed, the reference alone; --ablation: the reference and those named.
steps: what few steps and the scale b cost with an exact denoiser, as markdown.
latency: seconds of one slice with all its hypotheses and probes, beside U-Net passes.
volume: minutes and peak memory of one 3-D scan of random weights; with --workdir, what the windows of a trained network
leave to be seen in its test cases.
compile: memory and FLOPs of a training step on one device and on eight, compiled without data and not run: O/NAME.json.
trust: whether a trained EnTrust tells spoilt scans, keeps its guarantees over random divisions of its calibration and
test patients, and predicts its Dice. Writes trust.json and trust.md.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from entrust_jax import cli
from entrust_jax.errors import UserError

FLAGS = flags.FLAGS
TEST_CASES = 256
COMPILED_FOR = 8  # devices, virtual ones on CPU


def main(argv: Sequence[str]) -> None:
    """Runs one suite."""
    del argv
    config = FLAGS.config.copy_and_resolve_references()
    cli.setup_devices(at_most=config.train.batch, cpu_devices=COMPILED_FOR if FLAGS.suite == "compile" else None)
    suites = {
        "phantom": phantom_suite,
        "steps": steps_suite,
        "latency": latency_suite,
        "volume": volume_suite,
        "compile": compile_suite,
        "trust": trust_suite,
    }
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


def volume_suite(config: Any) -> None:
    """Prints JSON."""
    from entrust_jax import api
    from entrust_jax.benchmark import volume

    if FLAGS.workdir:
        trained = api.load(FLAGS.workdir)
        cases, _ = api.read_cases(trained)
        found: Any = [volume.seams(trained, one) for one in cases]
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

    for name in ("workdir", "output"):
        if not FLAGS[name].value:
            raise UserError(f"--{name} is missing: --suite=trust --workdir=FOLDER_OF_A_TRAINING --output=FOLDER")
    output = Path(FLAGS.output)
    cli.check_place(output, "--output")
    command = f"python -m entrust_jax.benchmark --suite=trust --workdir=W --output=O --cases={FLAGS.cases}"
    trust.run(Path(FLAGS.workdir), output, FLAGS.cases, FLAGS.spoilt, f"{command} --spoilt={FLAGS.spoilt}")
    print((output / "trust.md").read_text())


if __name__ == "__main__":
    suites = ["phantom", "steps", "latency", "volume", "compile", "trust"]
    flags.DEFINE_enum("suite", "phantom", suites, "What to measure.")
    flags.DEFINE_string("workdir", None, "volume, trust: a finished working folder.")
    flags.DEFINE_list("shape", ["155", "240", "240"], "volume: voxels of the scan along D, H, W.")
    flags.DEFINE_string("output", None, "phantom, compile, trust: folder for the results.")
    flags.DEFINE_integer("cases", 512, "trust: patients whose guarantees are tried, of a phantom.", lower_bound=1)
    flags.DEFINE_integer("spoilt", 64, "trust: test cases whose scans are spoilt, at most.", lower_bound=1)
    flags.DEFINE_integer("seeds", 3, "Trainings of every variant.", lower_bound=1)
    flags.DEFINE_multi_string("ablation", [], "phantom: an ablation to train beside the reference; all by default.")
    flags.DEFINE_bool("quick", False, "The reference alone, one seed.")
    flags.DEFINE_integer("size", 128, "latency: height and width of the slice, a multiple of 16.")
    flags.DEFINE_integer("repeats", 5, "latency: timed calls after the first.")
    config_flags.DEFINE_config_file("config", "configs/phantom.py", "Config of the suite.", lock_config=True)
    cli.run(main)
