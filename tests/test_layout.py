"""Who may import whom, read from the sources."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "entrust_jax"
COMMANDS = {"train", "evaluate", "predict", "check", "manifest", "cli", "benchmark.__main__"}
# As commands, without their flags.
SUITES = {
    f"benchmark.{name}"
    for name in (
        *("phantom", "disentanglement", "latency", "compilation", "volume", "trust"),
        *("conflict", "semisynthetic", "subsets", "regions", "causes"),
    )
}
# `api` is what commands and notebooks call: it reads configs, but knows neither flags nor the command line.
ENTRY_POINTS = COMMANDS | {"api"}
PARTS = ("enfuse", "segdiff", "trustmap")
MATHS = (
    "segdiff.schedule",
    "segdiff.sampler",
    "trustmap.statistics",
    "trustmap.conformal",
    "trustmap.ood",
    "metrics",
    "scores",
)
# Of the standard library only what touches no files, flags or processes.
MATHS_LIBRARIES = {
    "jax",
    "numpy",
    "scipy",
    "optax",
    "jaxtyping",
    "math",
    "functools",
    "itertools",
    "operator",
} | {
    "collections",
    "dataclasses",
    "enum",
    "typing",
    "warnings",
}
JOINED = (
    "layers",
    "model",
    "inference",
    "windows",
    "footprint",
    "features",
    "networks",
    "training",
    "api",
    "baselines",
)
NETWORKS = ("flax", *(f"entrust_jax.{name}" for name in (*PARTS, *JOINED)))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def sources() -> dict[str, Path]:
    return {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Dotted names that a source imports, inside functions too; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def is_maths(name: str) -> bool:
    """Whether a name without the package's is a maths module or something out of one."""
    return within(name, MATHS) or "objective" in name.split(".")


def offences(name: str, found: set[str]) -> list[str]:
    """What module `name` (without the package's) imports against the rules."""
    wrong = []
    for imported in found:
        inside = imported.removeprefix("entrust_jax.") if within(imported, ("entrust_jax",)) else None
        if is_maths(name):
            own = inside is not None and (within(inside, ("errors",)) or is_maths(inside))
            if not (own or imported.split(".")[0] in MATHS_LIBRARIES):
                wrong.append(f"{name} is maths and imports {imported}")
        part = next((part for part in PARTS if within(name, (part,))), None)
        others = tuple(f"entrust_jax.{other}" for other in PARTS if other != part)
        if part and within(imported, others):
            wrong.append(f"{name} imports {imported}: {', '.join(PARTS)} never import each other")
        if within(name, ("runtime",)) and within(imported, NETWORKS[1:]):
            wrong.append(f"{name} imports a network, {imported}")
        if within(name, ("data",)) and within(imported, NETWORKS):
            wrong.append(f"{name} is data and imports a network, {imported}")
        if within(imported, ("ml_collections",)) and name not in ENTRY_POINTS:
            wrong.append(f"{name} is no entry point and imports {imported}")
        if within(imported, ("absl",)) and name not in COMMANDS:
            wrong.append(f"{name} is no command and imports {imported}")
        if within(imported, ("orbax",)) and name != "runtime.checkpoint":
            wrong.append(f"{name} imports {imported}: only runtime.checkpoint may")
        if within(imported, tuple(f"entrust_jax.{entry}" for entry in ENTRY_POINTS)) and name not in COMMANDS | SUITES:
            wrong.append(f"{name} is no command and imports an entry point, {imported}")
    return wrong


@pytest.mark.parametrize("name", sources())
def test_imports(name):
    assert offences(name, imports(sources()[name])) == []


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("segdiff.schedule", "flax.linen"),
        ("segdiff.sampler", "entrust_jax.segdiff.denoiser.Denoiser"),
        ("enfuse.objective", "entrust_jax.runtime.mesh.data_mesh"),
        ("enfuse.fusion", "entrust_jax.segdiff.schedule"),
        ("trustmap.probing", "entrust_jax.enfuse"),
        ("metrics.overlap", "absl.flags"),
        ("metrics.overlap", "rich"),
        ("metrics.overlap", "pathlib.Path"),
        ("runtime.state", "entrust_jax.model.EnTrust"),
        ("data.pipeline", "flax.linen"),
        ("model", "ml_collections.ConfigDict"),
        ("train", "orbax.checkpoint"),
        ("api", "entrust_jax.cli.run"),
        ("api", "absl.flags"),
        ("inference", "entrust_jax.api.load"),
    ],
)
def test_a_forbidden_import_is_found(name, imported):
    assert offences(name, {imported}) != []


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("segdiff.sampler", "entrust_jax.segdiff.schedule.log_snr"),
        ("trustmap.conformal", "entrust_jax.errors.UserError"),
        ("segdiff.objective", "optax.softmax_cross_entropy"),
        ("enfuse.objective", "entrust_jax.metrics.overlap.dice"),
        ("runtime.checkpoint", "orbax.checkpoint"),
        ("runtime.state", "flax.struct"),
        ("train", "absl.flags"),
        ("train", "entrust_jax.api.load"),
        ("api", "ml_collections.ConfigDict"),
        ("model", "entrust_jax.enfuse.encoder.Encoder"),
    ],
)
def test_an_allowed_import_passes(name, imported):
    assert offences(name, {imported}) == []


def test_sources_are_found():
    assert {"cli", "errors", "runtime.checkpoint"} <= set(sources())
