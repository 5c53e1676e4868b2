"""Entry points as a person meets them: exit codes and one-line errors, in a process of their own."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from entrust_jax import cli
from entrust_jax.errors import UserError

PROGRAM = """
import json, os, signal, sys
from absl import flags
from entrust_jax import cli
from entrust_jax.errors import UserError

flags.DEFINE_string("out", None, "where to")
config = cli.config_flag()

def main(argv):
    if "mistake" in argv:
        raise UserError("scan.nii.gz: is truncated;\\n   copy it again")
    if "bug" in argv:
        raise RuntimeError("a bug")
    if "interrupt" in argv:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
        os.kill(os.getpid(), signal.SIGINT)
    if "terminate" in argv:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            print("cleared", flush=True)
    if "devices" in argv:
        cli.setup_devices(at_most=int(argv[2]) if len(argv) > 2 else None)
        import jax
        print(json.dumps([jax.device_count(), jax.config.jax_compilation_cache_dir]))
        return
    value = config.value
    print(json.dumps([argv[1:], value.to_dict() if value is not None else None], sort_keys=True))

cli.run(main, required=("out",), words="" if "plain" in sys.argv else "WORDS")
"""

CONFIG = """
from ml_collections import ConfigDict
from entrust_jax.errors import UserError

def get_config(arg=""):
    if arg == "bug":
        raise AttributeError("a bug in the config")
    if arg:
        raise UserError(f"config.py:{arg}: no such variant; there is none")
    return ConfigDict({"name": "x", "data": {"modalities": ("A",), "names": {}, "patch": 4}, "rate": 0.1})
"""


@pytest.fixture(scope="module")
def call(tmp_path_factory, repository):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "config.py").write_text(CONFIG)

    def run(*arguments, **environment):
        inherited = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")}
        return subprocess.run(
            [sys.executable, "program.py", *arguments],
            cwd=folder,
            env=inherited | {"PYTHONPATH": str(repository)} | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out=o", "mistake"], ["scan.nii.gz: is truncated; copy it again"]),
        ([], ["--out", "missing"]),
        (["--out=o", "--outt=3"], ["outt", "Did you mean: out"]),
        (["--out=o", "--config=absent.py"], ["absent.py", "no such config file"]),
        (["--out=o", "--config=config.py", "--config.data.patchh=1"], ["data.patchh", '"patch"']),
        (["--out=o", "--config=config.py", "--config.rate=2", "--config.data.patchh=1"], ["data.patchh: ", '"patch"']),
        (["--out=o", "--config=config.py", "--config.data.patch=many"], ["data.patch", "many"]),
        (
            ["--out=o", "--config=config.py", "--config.data.names.A=x"],
            ["data.names.A: no key A here", "copy of that file"],
        ),
        (["--out=o", "--config=config.py:odd"], ["config.py:odd", "no such variant"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(call, arguments, words):
    done = call(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("arguments", [["bug"], ["--config=config.py:bug"]])
def test_a_bug_keeps_its_traceback(call, arguments):
    done = call("--out=o", *arguments)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "a bug" in done.stderr


def test_overrides_and_positional_arguments_reach_main(call):
    done = call("--out=o", "--config=config.py", "--config.data.patch=8", "--config.rate=1e-3", "T1=a.nii.gz")
    assert done.returncode == 0, done.stderr
    value = '[["T1=a.nii.gz"], {"data": {"modalities": ["A"], "names": {}, "patch": 8}, "name": "x", "rate": 0.001}]'
    assert done.stdout.strip() == value
    assert done.stderr == ""


def test_interrupt_gives_130(call):
    done = call("--out=o", "interrupt")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_words_where_none_belong_are_a_mistake(call):
    done = call("--out=o", "config.rate=1", "plain")
    assert done.returncode == 2
    assert "config.rate=1" in done.stderr and "did you mean --config.rate=1" in done.stderr


@pytest.mark.parametrize("name", ["there", "new", "new/deep"])
def test_a_place_that_can_be_made_passes_and_stays_as_it_is(tmp_path, name):
    (tmp_path / "there").mkdir()
    cli.check_place(tmp_path / name, "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("name", ["file", "file/x", "closed", "closed/deep/x"])
def test_an_impossible_place_is_named_before_the_work(tmp_path, name, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir()
    access = os.access  # a superuser may write anywhere, so permissions are made up
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "closed" and access(path, mode))
    with pytest.raises(UserError, match="--workdir=") as error:
        cli.check_place(tmp_path / name, "--workdir")
    assert "name" in str(error.value)


def test_sigterm_clears_away_what_was_begun(call):
    done = call("--out=x", "terminate")
    assert done.returncode == cli.TERMINATED
    assert done.stdout == "cleared\n"
    assert "Traceback" not in done.stderr


def test_help_is_no_failure(call):
    done = call("--help")
    assert done.returncode == 0
    assert "where to" in done.stdout


def test_one_device_per_core_and_a_cache(call, tmp_path):
    done = call("--out=o", "devices", ENTRUST_CACHE=str(tmp_path))
    assert done.stdout.strip() == f'[{cli.cores()}, "{tmp_path / "xla"}"]'
    done = call("--out=o", "devices", "1", ENTRUST_CACHE=str(tmp_path))
    assert done.stdout.startswith("[1, ")
    done = call("--out=o", "devices", XLA_FLAGS="--xla_force_host_platform_device_count=3")
    assert done.stdout.startswith("[3, ")


def test_default_workdir():
    assert str(cli.default_workdir(SimpleNamespace(name="glioma"))) == "runs/glioma"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_stays_with_the_process():
    """Large arrays made and freed again and again, as a training step's temporaries: no page is faulted in twice."""
    work = (
        "import resource, numpy as np\n"
        "def faults(n):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(n): np.ones(2**23)\n"  # 64 MB
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(2); print(faults(10))\n"
    )
    kept = "from entrust_jax import cli; cli._keep_memory()\n"
    counts = [
        int(subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout)
        for text in (work, kept + work)
    ]
    assert counts[1] < 1000 and counts[1] < counts[0] / 10, counts
