"""The compile suite: what one training step of each stage takes on one device and on eight, without data, from the

compiled programs alone. Nothing is run.

The program is the accelerator's also where the CPU compiles it (3-D convolutions whole, members by vmap). Memory is
then XLA:CPU's buffer assignment, which is no promise for another backend: the CPU computes bfloat16 convolutions in
float32 copies and fuses less, so an accelerator should need less.
"""

import json
import time
import unittest.mock
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from entrust_jax import api, networks
from entrust_jax.runtime import logs, memory, mesh
from entrust_jax.training.programs import lower_stage, step_shapes
from entrust_jax.training.stages import Stage, plan_stages

DEVICES = (1, 8)
GIB = 2**30


def described(config: Any) -> dict[str, Any]:
    """What is compiled, and by what."""
    network = networks.network_of(config)
    return {
        "config": config.name,
        "method": config.method,
        "format": api.FORMATS[config.method],
        "patch": list(config.data.patch),
        "widths": list(network.widths),
        "strides": [list(factor) for factor in network.strides],
        "modalities": len(config.data.modalities),
        "classes": len(config.data.classes),
        "draws": config.train.draws,
        "compute": network.compute,
        "remat": network.remat,
        "batch_per_device": config.train.batch,
        "compiled_on": jax.devices()[0].device_kind,
        "program": "the accelerator's: 3-D convolutions whole, members by vmap",
        "jax": jax.__version__,
        "flops": "by XLA's cost analysis of the compiled program, and of the traced one before XLA optimises it",
    }


def measure(
    config: Any, counts: Sequence[int] = DEVICES, known: Sequence[Mapping[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """Memory and floating-point operations of a step, by number of devices and stage, but those known already.

    The config's batch is that of one device; n devices share one n times as large.
    """
    done = {(row["stage"], row["devices"]) for row in known}
    config = config.copy_and_resolve_references()
    batch, network = config.train.batch, networks.network_of(config)
    for count in counts:
        config.train.batch = batch * count
        for stage in plan_stages(config, network):
            if (stage.name, count) not in done:
                yield step(config, network, stage, count)


def step(config: Any, network: Any, stage: Stage, count: int) -> dict[str, Any]:
    """One stage's step on the first `count` devices: bytes and operations per device, seconds to trace and compile."""
    began = time.perf_counter()
    with unittest.mock.patch.object(jax, "default_backend", lambda: "accelerator"):
        lowered, _ = lower_stage(config, network, stage, count)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    reserved: Any = compiled.memory_analysis()
    state, _ = step_shapes(config, stage, mesh.data_mesh(jax.devices()[:count]))
    return {
        "stage": stage.name,
        "devices": count,
        "batch": config.train.batch,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "arguments_gib": reserved.argument_size_in_bytes / GIB,
        "temporaries_gib": reserved.temp_size_in_bytes / GIB,
        "tflops_per_device": flops(compiled) / 1e12,
        # The program before XLA optimises and divides it: every operation once, those of rematerialisation twice.
        "tflops_traced_per_device": flops(lowered) / 1e12 / count,
        "trace_seconds": round(traced - began, 1),
        "compile_seconds": round(done - traced, 1),
        "host_gib": round(memory.peak() / GIB, 1),
    }


def flops(program: jax.stages.Lowered | jax.stages.Compiled) -> float:
    """Floating-point operations of one call as XLA counts them."""
    found: Any = program.cost_analysis()
    return float((found[0] if isinstance(found, list) else found)["flops"])


def in_words(row: dict[str, Any]) -> str:
    """A row as a line."""
    return (
        f"{row['stage']} on {row['devices']} device(s), batch {row['batch']}: "
        f"{row['arguments_gib']:.2f} GiB of arguments and {row['temporaries_gib']:.2f} of temporaries a device, "
        f"{row['tflops_per_device']:.3f} TFLOP a step and device, compiled in {row['compile_seconds']:.0f} s"
    )


def run(config: Any, output: Path) -> Path:
    """Writes <output>/<config's name>.json and returns its path; what it says of the same program already is kept."""
    output.mkdir(parents=True, exist_ok=True)
    path, about = output / f"{config.name}.json", described(config)
    rows = earlier(path, about)
    for row in rows:
        print(f"kept from an earlier run; remove {path} to compile it again: {in_words(row)}", flush=True)
    for row in measure(config, known=rows):
        print(in_words(row), flush=True)
        rows.append(row)
        logs.write_json(path, about | {"steps": rows})  # the next one may be too large for this machine
    return path


def earlier(path: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run that compiled the same; none where it compiled something else, or is damaged."""
    try:
        found = json.loads(path.read_text())
        rows = found.pop("steps")
        known = all({"stage", "devices"} <= set(row) for row in rows)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
    return rows if known and isinstance(rows, list) and found == json.loads(json.dumps(about)) else []
