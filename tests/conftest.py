"""JAX for the tests: eight virtual CPU devices, a persistent compilation cache, no rank promotion."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# In the environment, so that the processes that tests start share them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling is most of what tests do
os.environ.setdefault("MPLBACKEND", "agg")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real scans: $ENTRUST_DATA, else ../shared/data beside the repository."""
    root = Path(os.environ.get("ENTRUST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real scans in {root}; set ENTRUST_DATA to their folder")
    return root


# configs/brats.py:demo with sizes and durations that a test can afford. All else is as it is.
SMALL = (
    "--config=configs/brats.py:demo",
    "--config.data.phantom.cases=(8,4,9,4)",
    "--config.data.phantom.size=(48,48)",
    "--config.data.phantom.radius=4.0",
    "--config.data.patch=(48,48)",
    "--config.model.widths=(4,8)",
    "--config.model.d_c=4",
    "--config.model.d_u=4",
    "--config.unet.widths=(4,8)",
    "--config.unet.members=2",
    "--config.diffusion.steps=3",
    "--config.diffusion.hypotheses=4",
    "--config.train.batch=4",
    "--config.train.enfuse_steps=6",
    "--config.train.segdiff_steps=10",
    "--config.train.unet_steps=8",
    "--config.train.eval_every=5",
    "--config.train.log_every=1",
    "--config.train.val_slices=8",
    "--config.train.calibration_slices=4",
    "--config.train.head_steps=20",
)


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Flags of a training run that takes seconds, once its steps are compiled."""
    return SMALL


@pytest.fixture(scope="session")
def command(repository):
    """command("train", ...) runs `python -m entrust_jax.train ...`, or a script given with `-c`, as a person does."""
    # Compiling is most of what these runs do.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}

    def run(module, *arguments, code=0, script=None):
        start = ["-m", f"entrust_jax.{module}"] if script is None else ["-c", script]
        done = subprocess.run(
            [sys.executable, *start, *map(str, arguments)],
            cwd=repository,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done

    return run


@pytest.fixture(scope="session")
def trained(command, small, tmp_path_factory):
    """trained(method) -> the working folder of the small run, trained once a session; its output in <method>.log."""
    root = tmp_path_factory.mktemp("trained")

    @functools.cache
    def train(method) -> Path:
        workdir = root / method
        done = command("train", *small, f"--config.method={method}", f"--workdir={workdir}")
        workdir.with_suffix(".log").write_text(done.stdout)
        return workdir

    return train
