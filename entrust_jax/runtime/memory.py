"""What this process holds of the machine's memory, and giving back what it has freed."""

import ctypes
import functools
import sys
from collections.abc import Callable


def peak() -> int:
    """The most memory, in bytes, that this process has held so far."""
    import resource  # which Windows lacks; only measurements ask

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def give_back() -> None:
    """Hands the system what has been freed; nothing where the C library is not glibc.

    The entry points tell glibc to keep it (`cli.setup_devices`), for a training step's sake. What one stage of a 3-D
    scan leaves behind would then lie beside what the next one holds: 1.3 GiB after a scan of one window.
    """
    if (trim := _trim()) is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has none without a name
        return None
