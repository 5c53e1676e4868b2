"""What a run writes about itself: metrics.jsonl, TensorBoard events, progress on the terminal, JSON files."""

import contextlib
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

import entrust_jax

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: beside it, to disk, then renamed. The folder is made if absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a result is as readable as any other file of the user.
        os.chmod(beside, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all. Arrays become lists, paths strings, and NaN and infinities null."""
    write_bytes(path, (json.dumps(plain(value), indent=2) + "\n").encode())


def plain(value: Any) -> Any:
    """`value` with only JSON's types: arrays to lists, paths to strings, non-finite numbers to None.

    Raises:
      TypeError: a value that has no such form.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "to_dict"):  # a ConfigDict
        return plain(value.to_dict())
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one line of JSON (step and numbers) to metrics.jsonl, on disk when this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; [] without the file. A torn last line, left by kill -9, is no row."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows of metrics.jsonl beyond `step`, and a torn last line: a resumed run repeats none.

    Args:
      path: the file; nothing happens without it.
      step: the step of the restored checkpoint; rows without a step stay.
    """
    if not Path(path).exists():
        return
    kept = [json.dumps(row) + "\n" for row in read_rows(path) if row.get("step", step) <= step]
    write_bytes(path, "".join(kept).encode())


def open_tensorboard(folder: Path, resume_step: int | None = None) -> SummaryWriter:
    """A TensorBoard writer; with resume_step, events of later steps are hidden. close() it at the end."""
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder), purge_step=purge)


def write_scalars(writer: SummaryWriter, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes the finite numbers of `scalars` under `step`; other values (names, None) are passed over."""
    for name, value in scalars.items():
        if isinstance(value, bool | str) or value is None or np.ndim(value) or not math.isfinite(float(value)):
            continue
        writer.add_scalar(name, float(value), step)


@contextlib.contextmanager
def progress(title: str, total: int, start: int = 0, console: Console | None = None) -> Iterator[Callable]:
    """Shows progress with loss, speed and time left: a bar on a terminal, a line every ten seconds elsewhere.

    Args:
      title: such as the stage's name.
      total: steps in all.
      start: steps done before, which do not count for the speed.
      console: default: stderr.

    Yields:
      update(step, loss=None): `step` steps are done now; `loss` is a float.
    """
    console = console or Console(stderr=True)
    began = time.monotonic()

    def figures(step: int, loss: float | None) -> str:
        seconds = time.monotonic() - began
        speed = (step - start) / seconds if seconds > 0 else 0.0
        left = _duration((total - step) / speed) if speed > 0 else "?"
        return f"{'' if loss is None else f'loss {loss:.4f}  '}{speed:.2f} steps/s  {left} left"

    if not console.is_terminal:
        shown = began

        def line(step: int, loss: float | None = None) -> None:
            nonlocal shown
            if step >= total or time.monotonic() - shown >= PLAIN_SECONDS:
                shown = time.monotonic()
                # rich would break a long line at 80 columns in a log file
                print(f"{title} {step}/{total}  {figures(step, loss)}", file=console.file, flush=True)

        yield line
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=start, note="")

        def move(step: int, loss: float | None = None) -> None:
            bar.update(task, completed=step, note=figures(step, loss))

        yield move


def code_version() -> dict[str, str]:
    """What made a result: the package's version and commit (with `+` if changed since), and the libraries'.

    `commit` is "unknown" outside a git checkout of this package.
    """
    names = ("flax", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")
    libraries = {name: metadata.version(name) for name in names}
    try:
        version = metadata.version("entrust_jax")
    except metadata.PackageNotFoundError:  # run from a checkout without an install
        version = "unknown"
    return {"entrust_jax": version, "commit": _commit(), "python": platform.python_version(), **libraries}


def _commit() -> str:
    root = Path(entrust_jax.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed into somebody else's repository: that commit is not ours
        return "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
