"""A stage's programs, compiled ahead of time: from shapes alone, before data is touched, with their cost."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from entrust_jax import networks
from entrust_jax.baselines import unet
from entrust_jax.runtime import aside, mesh
from entrust_jax.runtime.state import TrainState
from entrust_jax.training.stages import Batch, Stage, initial_state, members, optimiser, step_key, train_step
from entrust_jax.training.validation import validate_batch

WORTH_A_PROCESS = 100  # steps that win back the seconds which a process of its own for compiling costs


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A stage's programs, compiled for the mesh: the step, the validation of a batch, shapes and cost."""

    call: Callable[..., tuple[TrainState, dict[str, Array]]]
    validate: Callable[..., Any]
    abstract: TrainState
    compile_seconds: float
    step_seconds: float
    memory_mb: float


def step_shapes(config: Any, stage: Stage, devices: Any) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """The state and the batch of a stage's step, as shapes on the mesh."""
    whole, split = mesh.replicated(devices), mesh.batch_sharding(devices)
    state = jax.eval_shape(lambda: initial_state(config, optimiser(config, stage)))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)
    batch = networks.example_batch(config, mesh.round_to_devices(config.train.batch, devices))
    if config.method != "entrust":
        n = members(config)
        split = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(None, *split.spec))
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), batch)
    return state, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), batch)


def lower_stage(config: Any, network: Any, stage: Stage, devices: int) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """A stage's step and its validation on the first `devices` devices, traced from shapes alone."""
    on = mesh.data_mesh(jax.devices()[:devices])
    step = functools.partial(train_step, loss=stage.loss, tx=optimiser(config, stage), decay=config.train.ema)
    if config.method != "entrust":
        step = unet.over_members(step)
    state, batch = step_shapes(config, stage, on)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=mesh.replicated(on)).lower(
        state, batch, step_key(config, stage)
    )
    one = networks.example_batch(config, mesh.round_to_devices(config.train.batch, on))
    split = mesh.batch_sharding(on)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), one)
    validation = functools.partial(validate_batch, config, network, stage)
    return lowered, jax.jit(validation, out_shardings=mesh.replicated(on)).lower(state.ema, one)


def compile_stage(config: Any, network: Any, stage: Stage, devices: Any) -> Compiled:
    """Compiles a stage's step and validation, and times two steps on an empty batch."""
    began = time.perf_counter()
    call, validate = aside.compiled(
        lower_stage, config, network, stage, devices.size, child=stage.steps >= WORTH_A_PROCESS
    )
    compile_seconds = time.perf_counter() - began

    abstract, batch = step_shapes(config, stage, devices)
    empty = zeros(batch)
    seconds = step_seconds(config, stage, call, devices, [empty, empty])
    memory = call.memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0
    return Compiled(call, validate, abstract, compile_seconds, seconds, used / 2**20)


def zeros(shapes: Any) -> Any:
    """Arrays of these shapes, types and places."""
    return jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), shapes)


def step_seconds(config: Any, stage: Stage, call: Callable[..., Any], devices: Any, batches: Sequence[Batch]) -> float:
    """Seconds of a step: the least of one on each of these batches, after a first one that also faults memory in.

    The state is all zeros: a step costs the same, and the program that draws a first state need not be compiled.
    """
    state, key = zeros(step_shapes(config, stage, devices)[0]), step_key(config, stage)
    times = []
    for batch in (batches[0], *batches):
        began = time.perf_counter()
        state, _ = call(state, batch, key)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - began)
    return min(times[1:])
