"""Checkpoints on Orbax, and the notice to stop. The only module that knows Orbax.

A working folder has two managers, each with a folder of its own: `last` (the whole state, to go on training)
and `best` (EMA parameters, to predict). A step is written beside and renamed, so after kill -9 a folder holds
complete steps only.
"""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import FixedIntervalPolicy, preservation_policy

from entrust_jax.errors import UserError

READ_SECONDS = 30  # how long the other reads of a damaged checkpoint may take to end


def open_manager(folder: Path, *, keep: int = 1, read_only: bool = False) -> ocp.CheckpointManager:
    """Opens a checkpoint folder; close() it, or use contextlib.closing, before the process leaves.

    Args:
      folder: made if absent; what an interrupted save left is removed by the next save.
      keep: how many of the latest steps stay.
      read_only: for prediction: nothing is made, removed or saved.

    Raises:
      UserError: read_only and there is no such folder.
    """
    folder = Path(folder).absolute()
    if read_only and not folder.is_dir():
        raise UserError(f"{folder}: no checkpoint here; train first, or name another working folder")
    options = ocp.CheckpointManagerOptions(
        # The trainer decides when to save (a preemption included), so every call of save saves.
        save_decision_policy=FixedIntervalPolicy(1),
        preservation_policy=preservation_policy.LatestN(keep),
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
    )
    return ocp.CheckpointManager(folder, options=options)


def save_last(manager: ocp.CheckpointManager, step: int, state: Any, meta: dict, *, wait: bool = True) -> None:
    """Saves the whole training state, with `meta` (JSON), under `step`.

    Args:
      manager: of the folder `last`.
      step: larger than any step saved before; a step that is there already stays as it is.
      state: any pytree of arrays.
      meta: JSON values only.
      wait: return when the step is complete on disk. Otherwise writing goes on in the background (the arrays
        have been copied and may be donated); close() and the next save wait for it.

    Raises:
      ValueError: a step below the latest one, which would be dropped at once as the oldest.
    """
    _save(manager, step, "state", state, meta, wait)


def save_best(manager: ocp.CheckpointManager, step: int, ema: Any, meta: dict, *, wait: bool = True) -> None:
    """Saves EMA parameters with `meta`: at least `step`, `metric` and `stage`. As save_last otherwise.

    Whether a metric is better than the one kept is the caller's decision (read_meta): metrics of different
    stages are not comparable.
    """
    _save(manager, step, "params", ema, meta, wait)


def restore_last(manager: ocp.CheckpointManager, abstract_state: Any) -> tuple[Any, dict] | None:
    """The latest saved (state, meta), or None where nothing is saved.

    Args:
      manager: of the folder `last`.
      abstract_state: tree of jax.ShapeDtypeStruct as jax.eval_shape gives it; a leaf with a sharding is
        restored to it (another device count than at saving is fine), one without to the first device.

    Raises:
      UserError: the checkpoint is damaged, or holds other arrays than abstract_state.
    """
    return _restore(manager, "state", abstract_state)


def restore_best(manager: ocp.CheckpointManager, abstract_params: Any) -> tuple[Any, dict] | None:
    """The (EMA parameters, meta) saved by save_best. As restore_last otherwise."""
    return _restore(manager, "params", abstract_params)


def read_meta(manager: ocp.CheckpointManager) -> dict | None:
    """The meta of the latest step without its arrays, or None where nothing is saved.

    Raises:
      UserError: it cannot be read.
    """
    step = manager.latest_step()
    if step is None:
        return None
    try:
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    except Exception as error:
        raise _damaged(manager, step, error) from error


def drop_after(manager: ocp.CheckpointManager, step: int) -> None:
    """Removes the steps beyond `step`, which a run that goes on from there makes again."""
    manager.wait_until_finished()
    for later in [saved for saved in manager.all_steps() if saved > step]:
        manager.delete(later)


@contextlib.contextmanager
def preemption_watch() -> Iterator[Callable[[int], bool]]:
    """Listens for SIGTERM inside the block and yields should_stop(step), to be asked after every step.

    With several processes JAX's preemption service agrees on one step at which all of them answer True, so
    that they save together; it is there after jax.distributed.initialize. Enter it in the main thread. After
    the block SIGTERM does what it did before: nobody would ask any more, and the process would not end.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield lambda step: stop.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def _save(manager: ocp.CheckpointManager, step: int, item: str, tree: Any, meta: dict, wait: bool) -> None:
    manager.wait_until_finished()
    latest = manager.latest_step()
    if latest is not None and step < latest:
        raise ValueError(f"{manager.directory}: step {step} after step {latest}")
    if step != latest:
        items = {item: ocp.args.StandardSave(tree), "meta": ocp.args.JsonSave(meta)}
        manager.save(step, args=ocp.args.Composite(**items))
    if wait:
        manager.wait_until_finished()


def _restore(manager: ocp.CheckpointManager, item: str, abstract: Any) -> tuple[Any, dict] | None:
    manager.wait_until_finished()
    step = manager.latest_step()
    if step is None:
        return None
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first),
        abstract,
    )
    items = {item: ocp.args.StandardRestore(placed), "meta": ocp.args.JsonRestore()}
    try:
        with _patient_loops():
            restored = manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax, tensorstore and json raise a dozen kinds for one fact: it cannot be read
        raise _damaged(manager, step, error) from error
    return restored[item], restored["meta"]


@contextlib.contextmanager
def _patient_loops() -> Iterator[None]:
    """Event loops made inside the block are closed when their tasks are done.

    When one read fails, Orbax closes the loop of all the others, and TensorStore prints a traceback for each of
    them when it comes back: noise around the one line that a person should read.
    """
    make = asyncio.new_event_loop

    def patient() -> asyncio.AbstractEventLoop:
        loop = make()
        close = loop.close

        def finish_and_close() -> None:
            with contextlib.suppress(Exception):
                if pending := asyncio.all_tasks(loop):
                    finished = asyncio.gather(*pending, return_exceptions=True)
                    loop.run_until_complete(asyncio.wait_for(finished, READ_SECONDS))
            close()

        loop.close = finish_and_close
        return loop

    asyncio.new_event_loop = patient
    try:
        yield
    finally:
        asyncio.new_event_loop = make


def _damaged(manager: ocp.CheckpointManager, step: int, error: Exception) -> UserError:
    if any(word in str(error) for word in ("stored shape", "tree structures")):
        return UserError(
            f"{manager.directory / str(step)}: the checkpoint is from another config ({_first_line(error)}); "
            "put back the config.json that it was trained with, or use another working folder"
        )
    return UserError(
        f"{manager.directory / str(step)}: the checkpoint is damaged "
        f"({_first_line(error)}); remove this folder and run train again, "
        "or train into a new working folder"
    )


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:160]}"
