"""metrics.jsonl, progress, JSON files."""

import io
import json
import re
import stat

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from entrust_jax.runtime import logs


def test_no_step_stands_twice_after_a_resume(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    logs.append_row(path, {"note": "start"})
    for step in (10, 20, 30):
        logs.append_row(path, {"step": step, "loss": jnp.float32(step), "bins": np.arange(2)})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # what kill -9 leaves
    logs.drop_rows_after(path, 20)
    logs.append_row(path, {"step": 30, "loss": float("nan")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"note": "start"},
        {"step": 10, "loss": 10.0, "bins": [0, 1]},
        {"step": 20, "loss": 20.0, "bins": [0, 1]},
        {"step": 30, "loss": None},
    ]
    assert [path.name for path in path.parent.iterdir()] == ["metrics.jsonl"]


def test_drop_rows_without_a_file(tmp_path):
    logs.drop_rows_after(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir()) and logs.read_rows(tmp_path / "metrics.jsonl") == []


def test_write_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.json"
    logs.write_json(path, {"x": (1, np.float32(0.5)), "y": jnp.inf, "p": tmp_path, "ok": np.bool_(True)})
    expected = {"x": [1, 0.5], "y": None, "p": str(tmp_path), "ok": True}
    assert json.loads(path.read_text()) == expected
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    with pytest.raises(TypeError, match="no JSON form"):
        logs.write_json(path, {"x": object()})
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError):
        logs.write_json(tmp_path / "folder.json", {})
    assert json.loads(path.read_text()) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "folder.json"]


def test_progress_without_a_terminal_is_plain_lines():
    out = io.StringIO()
    with logs.progress("stage 1", 100, start=90, console=Console(file=out)) as update:
        for step in range(91, 101):
            update(step, 0.25)
    assert re.fullmatch(r"stage 1 100/100  loss 0\.2500  [\d.]+ steps/s  0:00 left\n", out.getvalue())


def test_progress_on_a_terminal_shows_loss_and_time_left():
    out = io.StringIO()
    with logs.progress("stage 2a", 4, console=Console(file=out, force_terminal=True, width=120)) as update:
        update(1)
        update(2, 1.5)
    assert "stage 2a" in out.getvalue() and "loss 1.5000" in out.getvalue() and "left" in out.getvalue()


def events(folder):
    """The events of a TensorBoard folder: records of u64 length, u32 crc, payload, u32 crc."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_purges_what_a_resume_repeats(tmp_path):
    writer = logs.open_tensorboard(tmp_path)
    logs.write_scalars(writer, 7, {"loss": jnp.float32(2), "stage": "1", "bad": float("nan"), "none": None})
    writer.close()
    found = [(v.tag, v.simple_value, e.step) for e in events(tmp_path) for v in e.summary.value]
    assert found == [("loss", 2.0, 7)]
    logs.open_tensorboard(tmp_path / "again", resume_step=5).close()
    assert [e.step for e in events(tmp_path / "again") if e.HasField("session_log")] == [6]


def test_code_version_names_the_libraries():
    version = logs.code_version()
    assert version["jax"] and version["python"].startswith("3.")
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", version["commit"])
