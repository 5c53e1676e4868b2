"""Memory of this process: what it held at most, and what it gives back."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from entrust_jax.runtime import memory

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the system's own count is read from /proc"
)


def held() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_peak_stays_after_memory_is_freed():
    before = memory.peak()
    block = np.ones((before - held() + (512 << 20)) // 8)  # others may give some back meanwhile
    most = memory.peak()
    del block
    assert most >= before + (50 << 20) and memory.peak() >= most


def test_freed_blocks_go_back_to_the_system():
    blocks = [np.ones(30_000) for _ in range(1000)]  # 240 kB each: too small for pages of their own
    ends = blocks[::100]  # which keep the heap from shrinking by itself
    full = held()
    del blocks
    memory.give_back()
    assert held() < full - (150 << 20) and len(ends) == 10


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_large_then_goes_back_as_soon_as_it_is_freed(asked):
    """A hole below what is still held: the heap alone would keep it, as the entry points have told it to."""
    text = (
        "import numpy as np\n"
        "from entrust_jax import cli\n"
        "from entrust_jax.runtime import memory\n"
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "cli._keep_memory()\n"
        f"{'memory.give_back()' if asked else ''}\n"
        "large, above = np.ones(2**25), np.ones(2**17)\n"  # 256 MB and 1 MB
        "full = held()\n"
        "del large\n"
        "print(full - held(), len(above))\n"
    )
    done = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True)
    returned = int(done.stdout.split()[0])
    assert returned > 200 * 2**20 if asked else returned < 50 * 2**20
