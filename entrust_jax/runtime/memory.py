"""What this process holds of the machine's memory, and giving back what it has freed."""

import ctypes
import functools
import sys

LARGE = 32 * 2**20  # bytes; the most that glibc takes as the bound of what is mapped apart
M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # of malloc.h


def peak() -> int:
    """The most memory, in bytes, that this process has held so far."""
    import resource  # which Windows lacks; only measurements ask

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def give_back() -> None:
    """Hands the system what has been freed, and from now on whatever is LARGE as soon as it is freed; nothing where the

    C library is not glibc.

    The entry points tell glibc to keep it all in one heap (`cli.setup_devices`), for a training step's sake. What one
    stage of a 3-D scan leaves behind would then lie beside what the next one holds (1.3 GiB after a scan of one
    window), and so would holes between what programs return, into which their next temporaries do not fit.
    """
    if (library := _glibc()) is not None:
        library.mallopt(M_MMAP_MAX, 1 << 16)  # its default
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has none without a name
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
