"""The compile suite: what a step takes, from programs that are not run."""

import json

import pytest

from configs import brats
from entrust_jax.benchmark import compilation


@pytest.fixture(scope="module")
def config():
    config = brats.get_config("demo").copy_and_resolve_references()
    config.method = "unet"  # compiles in a second
    config.data.patch = (16, 16)
    config.unet.widths = (4, 8)
    config.train.batch = 2
    return config


@pytest.fixture(scope="module")
def found(config):
    return list(compilation.measure(config, (1, 4)))


def test_devices_share_the_work(found):
    one, four = found
    assert (one["batch"], four["batch"]) == (2, 8)
    assert one["parameters"] == four["parameters"] > 500
    assert one["tflops_per_device"] > 0
    assert four["tflops_per_device"] == pytest.approx(one["tflops_per_device"], rel=0.1)
    assert four["arguments_gib"] == pytest.approx(one["arguments_gib"], rel=0.1)
    assert one["temporaries_gib"] > 0


def test_it_says_what_was_compiled(config, tmp_path, monkeypatch, capsys):
    rows = [{"stage": "unet", "devices": 1}, {"stage": "other", "devices": 1}]
    monkeypatch.setattr(compilation, "measure", lambda config, known: iter(row for row in rows if row not in known))
    monkeypatch.setattr(compilation, "in_words", lambda row: row["stage"])
    written = json.loads(compilation.run(config, tmp_path / "new").read_text())
    assert capsys.readouterr().out.split() == ["unet", "other"]
    assert written["steps"] == rows
    assert (written["method"], written["patch"], written["batch_per_device"]) == ("unet", [16, 16], 2)
    assert written["strides"] == [[2, 2], [2, 2]] and written["compute"] == "float32"
    rows += [{"stage": "more", "devices": 1}]
    assert json.loads(compilation.run(config, tmp_path / "new").read_text())["steps"] == rows
    *kept, new = capsys.readouterr().out.splitlines()
    assert new == "more" and [line.split()[-1] for line in kept] == ["unet", "other"]
    assert all(line.startswith("kept from an earlier run; remove ") for line in kept)
    other = config.copy_and_resolve_references()
    other.train.batch = 3
    compilation.run(other, tmp_path / "new")
    assert capsys.readouterr().out.split() == ["unet", "other", "more"]  # a program of its own, nothing is kept


def test_what_is_known_is_not_compiled_again(config):
    known = [{"stage": "unet", "devices": 1}]
    assert list(compilation.measure(config, (1,), known)) == []


def test_a_wider_network_takes_more(found, config):
    wide = config.copy_and_resolve_references()
    wide.unet.widths = (16, 32)
    (more,) = compilation.measure(wide, (1,))
    assert more["tflops_per_device"] > 4 * found[0]["tflops_per_device"]
    assert more["temporaries_gib"] > found[0]["temporaries_gib"]
    assert "TFLOP a step and device" in compilation.in_words(more)
