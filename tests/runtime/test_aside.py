import contextlib

import jax
import jax.numpy as jnp
import pytest

from entrust_jax.runtime import aside


def lower(scale):
    """A program small enough for a child of a test, and large enough to be one."""
    return (jax.jit(lambda x: jnp.sin(x @ x) * scale).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)),)


@pytest.fixture
def cache(tmp_path):
    """A compilation cache of its own."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path))
    jax.config.update(names[1], 0.0)
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def misses(call):
    """The programs that `call` had to compile in this process."""
    found = []

    def listen(event, **_):
        found.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        result = call()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return result, found.count("/jax/compilation_cache/cache_misses")


def test_a_child_compiles_what_the_parent_then_finds_in_the_cache(cache):
    (program,), compiled_here = misses(lambda: aside.compiled(lower, 2.0))
    assert compiled_here == 0
    x = jnp.ones((8, 8))
    assert jnp.allclose(program(x), 2 * jnp.sin(x @ x))
    marks = list((cache / "aside").iterdir())
    assert len(marks) == 1
    _, compiled_here = misses(lambda: aside.compiled(lower, 2.0))
    assert compiled_here == 0 and list((cache / "aside").iterdir()) == marks


def test_what_is_known_needs_no_child(cache, monkeypatch):
    aside.compiled(lower, 2.0)
    monkeypatch.setattr(aside, "_in_child", lambda *_: pytest.fail("a child for a program that is in the cache"))
    aside.compiled(lower, 2.0)
    with pytest.raises(pytest.fail.Exception, match="a child"):
        aside.compiled(lower, 3.0)


@pytest.mark.parametrize("broken", ["unpicklable", "child", "interpreter"])
def test_what_a_child_cannot_do_is_done_here_and_said(cache, broken, monkeypatch, capsys):
    if broken != "unpicklable":
        monkeypatch.setattr(aside.sys, "executable", "false" if broken == "child" else "/nowhere/python")
    function = (lambda s: lower(s)) if broken == "unpicklable" else lower
    (program,), compiled_here = misses(lambda: aside.compiled(function, 2.0))
    assert compiled_here == 1 and program(jnp.zeros((8, 8))).shape == (8, 8)
    assert "steps will be slower" in capsys.readouterr().out


def test_an_emptied_cache_is_filled_by_a_child_at_the_next_start(cache):
    aside.compiled(lower, 2.0)
    for path in cache.iterdir():
        if path.is_file():
            path.unlink()
    assert misses(lambda: aside.compiled(lower, 2.0))[1] == 1  # the mark was wrong
    for path in cache.iterdir():
        if path.is_file():
            path.unlink()
    assert misses(lambda: aside.compiled(lower, 2.0))[1] == 0


def test_modules_of_the_current_folder_are_not_the_childs(cache, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "jax.py").write_text("raise ImportError('foreign')")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(aside.sys, "path", [path for path in aside.sys.path if path])
    assert misses(lambda: aside.compiled(lower, 2.0))[1] == 0


def test_a_cache_switched_off_needs_no_child(cache, monkeypatch):
    monkeypatch.setattr(aside, "_in_child", lambda *_: pytest.fail("a child"))
    with off():
        assert aside.compiled(lower, 2.0)[0](jnp.zeros((8, 8))).shape == (8, 8)


@contextlib.contextmanager
def off():
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_short_work_is_compiled_here(cache, monkeypatch):
    monkeypatch.setattr(aside, "_in_child", lambda *_: pytest.fail("a child"))
    _, compiled_here = misses(lambda: aside.compiled(lower, 2.0, child=False))
    assert compiled_here == 1
