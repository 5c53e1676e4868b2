"""Compiling aside: on CPU, in a process of its own, so that the process that trains keeps an orderly heap.

LLVM leaves about a hundred thousand holes in the heap, and the C library then searches them for every temporary of
every training step: with them a step takes 1.5 (slices of 32 x 32) to 1.8 (96 x 96) times as long. A child takes its
holes with it, and what it compiled comes back through the compilation cache.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

Lower = Callable[..., Sequence[jax.stages.Lowered]]
MISS = "/jax/compilation_cache/cache_misses"  # jax's own event


def compiled(lower: Lower, *arguments: Any, child: bool = True) -> list[jax.stages.Compiled]:
    """The programs that lower(*arguments) traces, compiled by a child process unless the compilation cache knows them.

    Without a cache that can be written, with an accelerator, among several hosts, or if the child cannot do it, this
    process compiles.

    Args:
      lower: it and its arguments are pickled, so functions must be those of an importable module.
      child: False where too little is run to win back the seconds that a process takes to start.
    """
    lowered = lower(*arguments)
    config: Any = jax.config  # its options are made at run time
    cache = config.jax_compilation_cache_dir
    usable = cache and config.jax_enable_compilation_cache and os.access(cache, os.W_OK)
    if not (child and usable and jax.default_backend() == "cpu" and jax.process_count() == 1):
        return [program.compile() for program in lowered]

    versions = (
        jax.__version__,
        importlib.metadata.version("jaxlib"),
        os.environ.get("XLA_FLAGS", ""),
        jax.device_count(),
    )
    traits = repr((*versions, *(program.as_text() for program in lowered)))
    mark = Path(cache) / "aside" / hashlib.sha256(traits.encode()).hexdigest()
    if not mark.exists():
        _in_child(lower, arguments, cache)
    with _cache_misses() as missed:
        programs = [program.compile() for program in lowered]
    with contextlib.suppress(OSError):  # at worst the next start takes a child again
        if missed:
            mark.unlink(missing_ok=True)
        else:
            mark.parent.mkdir(exist_ok=True)
            mark.touch()
    return programs


@contextlib.contextmanager
def _cache_misses():
    """A list that grows by every program that the cache did not have."""
    missed: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == MISS:
            missed.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield missed
    finally:
        jax.monitoring.unregister_event_listener(listen)


def _in_child(lower: Lower, arguments: tuple[Any, ...], cache: str) -> None:
    """Has a child compile the programs into the cache; says so in a line where it cannot."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        environment["JAX_NUM_CPU_DEVICES"] = str(jax.device_count())
    try:
        task = pickle.dumps((lower, arguments))
        # -P: modules are the parent's, not those that happen to lie in the current folder.
        command = [sys.executable, "-P", "-m", __name__]
        done = subprocess.run(command, input=task, env=environment, capture_output=True)
        problem = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["?"] if done.returncode else []
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError, OSError) as error:
        problem = [f"{type(error).__name__}: {error}"]  # a function made inside another one; no memory for a process
    if problem:
        print(f"note: compiling in this process, steps will be slower ({problem[0][:200]})", flush=True)


def _end_with_parent() -> None:
    """On Linux, a parent that is killed takes this process along."""
    if sys.platform == "linux":
        parent_death = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(parent_death, signal.SIGKILL)


if __name__ == "__main__":
    _end_with_parent()
    function, values = pickle.load(sys.stdin.buffer)  # from the parent alone
    for program in function(*values):
        program.compile()
