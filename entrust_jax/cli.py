"""What every entry point shares: one-line errors, the --config flag, devices and the compilation cache."""

import ctypes
import importlib.util
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from entrust_jax.errors import UserError

# Read by jax's C++ libraries when they load: entry points import this module before jax.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
TERMINATED = 143  # 128 + SIGTERM


def config_flag() -> flags.FlagHolder:
    """Defines --config=FILE.py[:ARGUMENT] with overrides such as --config.train.batch=4; it is locked."""
    return config_flags.DEFINE_config_file(
        "config",
        help_string="Config file, with an argument after a colon if it takes one: configs/brats.py:demo. "
        "--config.KEY=VALUE overrides a key.",
        lock_config=True,
    )


def default_workdir(config: Any) -> Path:
    """The working folder of a config when the user names none: runs/<config.name>."""
    return Path("runs") / config.name


def cores() -> int:
    """CPU cores this process may use: its affinity mask, cut by a container's CPU quota (cgroup v2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        pass
    return count


def _keep_memory() -> None:
    """Tells glibc to keep what is freed. By default it hands XLA's large temporaries back to the system after every

    step, and faulting them in again takes a quarter of the step. It lasts until a 3-D scan is examined, which no
    training step follows (`memory.give_back`). Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    one_heap, no_mmap, never_trim = (-8, 1), (-4, 0), (-1, 2**31 - 1)  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
    for option, value in (one_heap, no_mmap, never_trim):
        mallopt(option, value)


def setup_devices(at_most: int | None = None, cpu_devices: int | None = None) -> None:
    """Sets up JAX before its first use: a virtual CPU device per core, and the compilation cache.

    XLA on CPU leaves cores half idle in convolutions when one device owns them all; a mesh of one device per
    core with the batch sharded over it does not. With an accelerator the default backend is not the CPU, so
    the number of CPU devices changes nothing. A number set by XLA_FLAGS or JAX_NUM_CPU_DEVICES stays.

    The cache lies in $JAX_COMPILATION_CACHE_DIR, else $ENTRUST_CACHE/xla, else ~/.cache/entrust_jax/xla. A
    folder that cannot be made means no cache.

    Args:
      at_most: upper limit for the number of CPU devices, such as the batch size.
      cpu_devices: so many CPU devices, whatever cores there are: to compile for more devices than there are.
    """
    xla = os.environ.get("XLA_FLAGS", "")
    if not _has_accelerator() and "xla_backend_optimization_level" not in xla:
        # Compiling is a CPU user's whole experience: half the seconds, and steps no slower where measured.
        os.environ["XLA_FLAGS"] = f"{xla} --xla_backend_optimization_level=1".strip()
    if not _has_accelerator():
        _keep_memory()
    import jax  # here, so that a mistyped flag is answered without waiting for jax to load

    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    config: Any = jax.config  # its options are made at run time
    if not chosen and config.jax_num_cpu_devices < 0:
        config.update("jax_num_cpu_devices", cpu_devices or min(cores(), at_most or sys.maxsize))
    if config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("ENTRUST_CACHE") or Path.home() / ".cache" / "entrust_jax") / "xla"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        config.update("jax_compilation_cache_dir", str(cache))
    config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _has_accelerator() -> bool:
    """Whether a JAX plugin for a GPU or TPU is installed."""
    return any(importlib.util.find_spec(f"jax_{name}_plugin") for name in ("cuda12", "cuda13", "rocm7")) or bool(
        importlib.util.find_spec("libtpu")
    )


def check_place(path: Path, flag: str) -> None:
    """Raises UserError where `path`, a folder to be made or used, is impossible: hours later would be too late."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{flag}={path}: is a file; name a folder")
    above = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not above.is_dir():
        raise UserError(f"{flag}={path}: {above} is a file; name another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{flag}={path}: you may not write in {above}; name another folder")


def run(main: Callable[[list[str]], Any], required: Sequence[str] = (), *, words: str = "") -> None:
    """Parses the flags, calls main(argv) and leaves the process.

    A mistake of the user (UserError, an unknown or missing flag, an unknown config key, a config file that
    does not exist) becomes one line `error: ...` on stderr and exit code 2; ctrl-C gives 130, SIGTERM 143, both after
    what was begun is cleared away. Any other exception is a bug and keeps its traceback.

    Args:
      main: takes the positional arguments, argv[0] being the program.
      required: flags that must have a value.
      words: what arguments without dashes are here; "": there are none, and one is a mistake.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path of another encoding must not stop what only names it
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app.run(main, flags_parser=lambda argv: _parse(argv, required, words))
    except UserError as error:
        _leave(f"error: {_one_line(str(error))}", USER_ERROR)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)


def _leave(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _parse(argv: Sequence[str], required: Sequence[str], words: str) -> list[str]:
    config = _config_argument(argv)
    file = config.split(":", 1)[0] if config is not None else None
    if file is not None and not (Path(file).is_file() and file.endswith(".py")):
        what = "is no Python file" if Path(file).is_file() else "no such config file"
        raise UserError(f"{file or '--config='}: {what}; give a config such as configs/brats.py")
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        if _raised_in(error.__context__, file):
            raise
        raise UserError(f"{_one_line(str(error))} (--help lists the flags)") from error
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections raises these for an override that does not fit; in the config file they are bugs.
        if config is None or _raised_in(error, file):
            raise
        # ml_collections quotes its own message once more, line breaks spelt out.
        message = str(error.args[0] if error.args else error).replace("\\n", "; ").replace("\\'", "").strip("'")
        only = re.fullmatch(r"\W*(\w+)\W*", message)
        if only and isinstance(error, KeyError | AttributeError):  # an empty ConfigDict names the key alone
            message = f"no key {only[1]} here; what a config file does not list is added in a copy of that file"
        raise UserError(f"{config}: {_override(argv, message)}{_one_line(message)}") from error
    except SystemExit:  # absl leaves with 1 after --help, which is no failure
        sys.exit(0)
    if len(rest) > 1 and not words:
        hint = f"; did you mean --{rest[1]}?" if "=" in rest[1] else "; options begin with --"
        raise UserError(f"{rest[1]}: this command takes no words without dashes{hint}")
    if missing := [f"--{name}" for name in required if flags.FLAGS[name].value is None]:
        raise UserError(f"{', '.join(missing)}: missing; --help lists the flags")
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.ERROR  # else app.run turns on orbax's and grain's chatter
    return rest


def _config_argument(argv: Sequence[str]) -> str | None:
    for i, argument in enumerate(argv[1:], 1):
        if argument == "--":
            return None
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            return match[1] if match[1] is not None else "".join(argv[i + 1 : i + 2])
    return None


def _override(argv: Sequence[str], message: str) -> str:
    """The override that an error is about, `--config.train.bach: `, where that can be told."""
    keys = [argument.split("=", 1)[0] for argument in argv[1:] if re.match(r"--?(no)?config\.", argument)]
    meant = keys if len(keys) == 1 else [key for key in keys if key.rsplit(".", 1)[1] in re.findall(r"\w+", message)]
    return f"{meant[0]}: " if len(meant) == 1 else ""


def _raised_in(error: BaseException | None, file: str | None) -> bool:
    frames = traceback.extract_tb(error.__traceback__) if error is not None and file else []
    return any(Path(frame.filename).resolve() == Path(file or "").resolve() for frame in frames)
