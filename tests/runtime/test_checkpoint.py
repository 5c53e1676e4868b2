"""Checkpoints: complete or absent, whatever kills the process."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from entrust_jax.errors import UserError
from entrust_jax.runtime import checkpoint, state
from entrust_jax.runtime.mesh import data_mesh, replicated

SAVE_FOREVER = """
import sys
from pathlib import Path
import jax.numpy as jnp
from entrust_jax.runtime import checkpoint

manager = checkpoint.open_manager(Path(sys.argv[1]), keep=2)
step = (manager.latest_step() or 0) + 1
while True:
    tree = {"w": jnp.full((512, 512), step, jnp.float32), "n": [jnp.full((3,), step, jnp.int32)]}
    checkpoint.save_last(manager, step, tree, {"step": step}, wait=step % 2 == 0)
    print(step, flush=True)
    step += 1
"""


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def opened(folder, **options):
    return contextlib.closing(checkpoint.open_manager(folder, **options))


def test_a_state_comes_back_to_the_last_bit(tmp_path):
    import optax

    mesh = data_mesh()
    init = jax.jit(
        lambda key: state.create({"w": jax.random.normal(key, (5, 3)), "b": jnp.zeros(3)}, optax.adamw(1e-3)),
        out_shardings=replicated(mesh),
    )
    saved = init(jax.random.key(1))
    meta = {"stage": "2a", "metric": 0.25, "name": None}
    with opened(tmp_path / "last", keep=2) as manager:
        assert checkpoint.restore_last(manager, abstract(saved)) is None
        assert checkpoint.read_meta(manager) is None
        for step in (1, 5, 9):
            checkpoint.save_last(manager, step, saved.replace(step=jnp.asarray(step, jnp.int32)), meta | {"s": step})
        checkpoint.save_last(manager, 9, saved, {})  # there already: stays
        with pytest.raises(ValueError, match="step 3 after step 9"):
            checkpoint.save_last(manager, 3, saved, {})
        assert list(manager.all_steps()) == [5, 9]
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), saved)
    with opened(tmp_path / "last", read_only=True) as manager:
        assert checkpoint.read_meta(manager) == meta | {"s": 9}
        restored, found = checkpoint.restore_last(manager, placed)
    assert found == meta | {"s": 9} and int(restored.step) == 9
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for old, new in zip(jax.tree.leaves(saved.replace(step=restored.step)), jax.tree.leaves(restored), strict=True):
        assert old.dtype == new.dtype and new.sharding.is_equivalent_to(replicated(mesh), new.ndim)
        np.testing.assert_array_equal(old, new)


def test_best_keeps_parameters_and_goes_to_one_device(tmp_path):
    ema = jax.device_put({"w": jnp.arange(6.0)}, replicated(data_mesh()))
    with opened(tmp_path / "best") as manager:
        for step in (10, 20):
            checkpoint.save_best(manager, step, ema, {"step": step, "metric": 1 / step, "stage": "1"})
    with opened(tmp_path / "best", read_only=True) as manager:
        restored, meta = checkpoint.restore_best(manager, abstract(ema))
        assert list(manager.all_steps()) == [20]
    assert meta == {"step": 20, "metric": 0.05, "stage": "1"}
    assert restored["w"].devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(restored["w"], np.arange(6.0))


def test_a_state_saved_in_the_background_may_be_donated(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    tree = {"w": jnp.full((1024, 1024), 3.0)}
    expected = abstract(tree)
    with opened(tmp_path) as manager:
        checkpoint.save_last(manager, 1, tree, {}, wait=False)
        jax.block_until_ready(overwrite(tree))
        restored, _ = checkpoint.restore_last(manager, expected)
    assert np.all(np.asarray(restored["w"]) == 3.0)


def test_kill_9_while_saving_leaves_a_complete_step(tmp_path, repository):
    folder = tmp_path / "last"
    expected = {
        "w": jax.ShapeDtypeStruct((512, 512), jnp.float32),
        "n": [jax.ShapeDtypeStruct((3,), jnp.int32)],
    }
    before = 0
    for delay in (0.05, 0.173):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(repository)},
        )
        for _ in range(4):
            said = int(process.stdout.readline())
        time.sleep(delay)
        process.kill()
        process.wait(timeout=30)
        process.stdout.close()
        with opened(folder, read_only=True) as manager:
            (tree, meta) = checkpoint.restore_last(manager, expected)
        step = meta["step"]
        assert step >= said - 1 > before  # an odd step was saved in the background when its number was said
        for leaf in jax.tree.leaves(tree):
            assert np.all(np.asarray(leaf) == step)
        before = step
    with opened(folder) as manager:  # a writer clears what the kill left
        checkpoint.save_last(manager, before + 1, tree, {})
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(map(str, manager.all_steps()))


def test_steps_beyond_the_restored_one_are_dropped(tmp_path):
    tree = {"w": jnp.arange(4.0)}
    with opened(tmp_path / "best", keep=3) as manager:
        for step in (1, 5, 9):
            checkpoint.save_best(manager, step, tree, {"step": step}, wait=False)
        checkpoint.drop_after(manager, 5)
        assert checkpoint.read_meta(manager) == {"step": 5}
        checkpoint.drop_after(manager, 0)
        assert checkpoint.read_meta(manager) is None
        checkpoint.save_best(manager, 1, tree, {"step": 1})
    with opened(tmp_path / "best", read_only=True) as manager:
        assert list(manager.all_steps()) == [1]


def test_a_damaged_checkpoint_is_an_error_for_people(tmp_path):
    tree = {"w": jnp.arange(4096.0)}
    with opened(tmp_path / "last") as manager:
        checkpoint.save_last(manager, 3, tree, {"a": 1})
    files = [p for p in (tmp_path / "last" / "3").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with opened(tmp_path / "last", read_only=True) as manager, pytest.raises(UserError) as error:
        checkpoint.restore_last(manager, abstract(tree))
    assert str(tmp_path / "last" / "3") in str(error.value) and "remove" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", [{"w": jnp.zeros(5)}, {"w": jnp.zeros(4), "b": jnp.zeros(1)}, {"v": jnp.zeros(4)}])
def test_a_checkpoint_of_another_config_is_an_error_for_people(tmp_path, other):
    with opened(tmp_path / "last") as manager:
        checkpoint.save_last(manager, 3, {"w": jnp.arange(4.0)}, {})
        with pytest.raises(UserError, match="another config"):
            checkpoint.restore_last(manager, abstract(other))


def test_a_missing_folder_is_an_error_for_people(tmp_path):
    with pytest.raises(UserError, match="no checkpoint here"):
        checkpoint.open_manager(tmp_path / "best", read_only=True)
    assert not (tmp_path / "best").exists()


def test_a_damaged_checkpoint_is_one_error_and_no_noise(tmp_path, monkeypatch):
    """When one array cannot be read, the reads of the others must not end in a closed event loop, each with a

    traceback of its own on the terminal.
    """
    tree = {f"kernel_{i}": jnp.ones((30, 30 + i)) for i in range(60)}
    with opened(tmp_path / "best") as manager:
        checkpoint.save_best(manager, 1, tree, {"step": 1})
    damaged = [path for path in (tmp_path / "best").rglob("*") if path.parent.name == "d"]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    noise = []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    for _ in range(3):
        with opened(tmp_path / "best", read_only=True) as manager, pytest.raises(UserError, match="damaged"):
            checkpoint.restore_best(manager, abstract(tree))
        time.sleep(0.2)  # for the other reads to come back
    assert not noise


def test_sigterm_asks_to_stop():
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with checkpoint.preemption_watch() as should_stop:
            assert not should_stop(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert should_stop(2)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
