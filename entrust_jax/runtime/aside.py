"""Compiling aside: on CPU, in a process of its own, so that the process that trains keeps an orderly heap.

LLVM leaves tens of thousands of holes in the heap, and the C library then searches them for every temporary of every
training step: with them a step takes 1.5 (slices of 32 x 32) to 1.8 (96 x 96) times as long. A child takes its holes
with it, and what it compiled comes back through the compilation cache.
"""

import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

Lower = Callable[..., Sequence[jax.stages.Lowered]]


def compiled(lower: Lower, *arguments: Any, child: bool = True) -> list[jax.stages.Compiled]:
    """The programs that lower(*arguments) traces, compiled by a child process unless the compilation cache knows them.

    Without a cache, with an accelerator, among several hosts, or if the child cannot do it, this process compiles.

    Args:
      lower: it and its arguments are pickled, so functions must be those of an importable module.
      child: False where too little is run to win back the seconds that a process takes to start.
    """
    lowered = lower(*arguments)
    config: Any = jax.config  # its options are made at run time
    cache = config.jax_compilation_cache_dir
    if child and cache and jax.default_backend() == "cpu" and jax.process_count() == 1:
        traits = jax.__version__, os.environ.get("XLA_FLAGS", ""), jax.device_count(), *(x.as_text() for x in lowered)
        mark = Path(cache) / "aside" / hashlib.sha256(repr(traits).encode()).hexdigest()
        if not mark.exists() and _in_child(lower, arguments, cache):
            with contextlib.suppress(OSError):  # a cache that cannot be written: the next start takes a child again
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
    return [program.compile() for program in lowered]


def _in_child(lower: Lower, arguments: tuple[Any, ...], cache: str) -> bool:
    """Whether a child has compiled the programs into the cache. What went wrong, if anything, the parent will say."""
    try:
        task = pickle.dumps((lower, arguments))
    except (pickle.PicklingError, AttributeError, TypeError):  # a function made inside another one
        return False
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        environment["JAX_NUM_CPU_DEVICES"] = str(jax.device_count())
    done = subprocess.run([sys.executable, "-m", __name__], input=task, env=environment, capture_output=True)
    return done.returncode == 0


if __name__ == "__main__":
    function, values = pickle.load(sys.stdin.buffer)  # from the parent alone
    for program in function(*values):
        program.compile()
