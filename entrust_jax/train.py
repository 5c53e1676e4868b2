"""python -m entrust_jax.train --config=configs/X.py [--workdir=W] [--config.KEY=VALUE ...]

Trains a method in its stages, into a working folder that explains itself and is all that predict and evaluate need.
Started again with the same folder, it goes on where it stopped.
"""

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Array, Float

from entrust_jax import api, cli, inference, networks
from entrust_jax import model as entrust
from entrust_jax.baselines import unet
from entrust_jax.data import augment, dataset, intensity, layouts, pipeline, preprocess, resampling
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.report import output
from entrust_jax.runtime import aside, checkpoint, logs, mesh
from entrust_jax.runtime.state import TrainState, create, ema_decay, update_ema
from entrust_jax.segdiff.objective import bin_levels
from entrust_jax.trustmap import calibration, case, conformal, ood

Batch = dict[str, Array]
Loss = Callable[..., tuple[Array, dict[str, Array]]]

NETWORK_STAGES = {"entrust": ("enfuse", "segdiff"), "unet": ("unet",), "deep_ensemble": ("unet",)}
SLOW = 0.1  # learning rate of EnFuse relative to SegDiff in stage 2a
KAPPA_ALARM = 0.5  # mean conflict on training cases, relative to validation, below which overfitting has eaten it
MAX_BAD_STEPS = 20  # consecutive steps without a finite gradient before the run gives up
WORTH_A_PROCESS = 100  # steps that win back the seconds which a process of its own for compiling costs
CHECKPOINT_SECONDS = 120  # the most work that a killed run repeats
USUAL_CASES, REFERENCE_CASES = 100, 200  # at most, that say how training's scans look and how far others may lie
HELD = 4  # cases that are in memory at once for that


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage. `begin` and `steps` count global optimiser steps; `rates` maps a parameter group to its

    learning-rate factor (0 = frozen).
    """

    name: str
    begin: int
    steps: int
    loss: Loss
    rates: dict[str, float]
    learning_rate: float


def main(argv: Sequence[str]) -> None:
    """The order of events."""
    del argv
    workdir = Path(flags.FLAGS.workdir or cli.default_workdir(flags.FLAGS.config))
    cli.check_place(workdir, "--workdir")
    config = planned(flags.FLAGS.config, workdir)
    check(workdir, config)
    cli.setup_devices(at_most=config.train.batch)
    network = networks.network_of(config)
    run(config, workdir, network, plan_stages(config, network))
    guarantee(workdir)
    reference(workdir)
    print(f"\ndone: {workdir}\n  python -m entrust_jax.evaluate --workdir={workdir}", flush=True)


def run(config: Any, workdir: Path, network: Any, stages: list[Stage]) -> None:
    """Trains a network in these stages, from where the working folder stands to its end."""
    dataset.check(config.data, workdir / "splits.json")
    devices = mesh.data_mesh()
    programs = {stage.name: compile_stage(config, network, stage, devices) for stage in stages}
    print_plan(config, stages, programs, devices, workdir)

    parts, volumes, warnings = read_data(config, workdir)
    claim(workdir, config)
    logs.write_json(workdir / "warnings.json", warnings)
    if config.data.layout == "phantom":
        example = dataset.export_example(config.data, workdir / "example", parts["test"][0], config.seed)
        print(f"example case, as NIfTI files: {example}", flush=True)

    train_network(config, workdir, stages, programs, volumes, devices)
    params = best_params(config, workdir, devices)
    tau = threshold(config, network, params, volumes["val"], devices)
    calibrate(config, workdir, network, params, tau, volumes["calibration"], devices)


def planned(config: Any, workdir: Path) -> Any:
    """The config with the strides of a network on volumes, where it leaves them to the data.

    A folder that was begun keeps its own. Raises UserError where the data is missing.
    """
    patch = config.data.patch
    if not (isinstance(patch, tuple | list) and len(patch) == 3) or config.model.strides:
        return config
    check_values(config)
    own = config.copy_and_resolve_references()
    scales = len(config.model.widths if config.method == "entrust" else config.unet.widths)
    if (workdir / "config.json").exists():
        begun: Any = api.read_config(workdir)
        strides = begun.model.strides
        if len(strides) != scales:  # another network: `check` says so
            return config
    else:
        strides = dataset.plan_strides(config.data, scales, config.model.space_to_depth)
        words = ", ".join("x".join(map(str, factors)) for factors in strides)
        print(f"planned strides along D x H x W, from the spacing, a scale after the other: {words}")
    own.model.strides = tuple(tuple(factors) for factors in strides)
    return own.lock()


# Before data is touched -----------------------------------------------------------------------------------------------


def check(workdir: Path, config: Any) -> None:
    """Mistakes that can be seen at once, in the config and the folder: a folder belongs to one config."""
    if config.method not in NETWORK_STAGES:
        raise UserError(f"config.method is {config.method!r}; set it to one of {', '.join(NETWORK_STAGES)}")
    check_values(config)
    data, side = config.data, networks.coarsest(config)
    unplanned = networks.volumetric(config) and not config.model.strides  # whatever they will be, they divide the patch
    if not unplanned and any(size % unit for size, unit in zip(data.patch, side, strict=True)):
        words = " x ".join(map(str, side))
        raise UserError(f"config.data.patch is {tuple(data.patch)}; give multiples of {words}, for the coarsest scale")
    if data.reference not in data.modalities:
        raise UserError(f"config.data.reference is {data.reference!r}; set it to one of {', '.join(data.modalities)}")
    path = workdir / "config.json"
    if not path.exists() and (workdir / "checkpoints").exists():
        raise UserError(
            f"{workdir}: holds checkpoints but no config.json, so nothing says what they are of; remove the folder, or "
            "name another --workdir"
        )
    if path.exists():
        old, values = json.loads(api.read_config(workdir).to_json()), json.loads(config.to_json())
        then, now = _flat(old), _flat(values)
        changed = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
        # The data may have moved, and what is promised is found anew without training.
        changed = [key for key in changed if key != "data.dir" and not key.startswith("trust.")]
        if changed:
            key = changed[0]
            raise UserError(
                f"{path}: was trained with {key}={then.get(key)!r}, this config has {now.get(key)!r}"
                f" ({len(changed)} keys differ); use the same config to go on, or another --workdir"
            )


def check_values(config: Any) -> None:
    """Values that make no sense, also those that are needed only after hours of training."""
    data, counts = config.data, {
        "train": ("batch", "draws", "log_every", "eval_every", "val_slices", "calibration_slices", "head_steps"),
        "model": ("d_c", "d_u", "space_to_depth"),
        "unet": ("members",),
        "diffusion": ("hypotheses",),
    }  # fmt: skip
    for section, names in counts.items():
        for name in names:
            if config[section][name] < 1:
                raise UserError(f"config.{section}.{name} is {config[section][name]}; give at least 1")
    for name, value in config.trust.items():
        if not 0 < value < 1:
            raise UserError(f"config.trust.{name} is {value}; give a share between 0 and 1, both left out")
    for section in ("model", "unet"):
        if not config[section].widths or min(config[section].widths) < 1:
            raise UserError(f"config.{section}.widths is {tuple(config[section].widths)}; give one width a scale")
    if not isinstance(data.patch, tuple | list) or len(data.patch) not in (2, 3) or min(data.patch) < 1:
        raise UserError(
            f"config.data.patch is {data.patch}; give the height and width of the training patches, or depth, height "
            "and width to train on volumes"
        )
    layouts.known_names(tuple(data.modalities), data.names.to_dict())
    output.label_values(data.label_map, len(data.classes))
    for value, index in data.label_map:
        if not preprocess.IGNORED <= index < len(data.classes):
            raise UserError(
                f"config.data.label_map gives value {value} the class index {index}; config.data.classes has "
                f"{len(data.classes)}, so give 0 to {len(data.classes) - 1}, or -1 for voxels that do not count"
            )
    for name, members in data.regions.items():
        if not members or not all(0 <= index < len(data.classes) for index in members):
            raise UserError(
                f"config.data.regions.{name} is {tuple(members)}; give class indices from 0 to {len(data.classes) - 1}"
            )
    intensity.rules_of(data.intensity.to_dict(), tuple(data.modalities))
    augment.settings_of(data)
    resampling.asked_spacing(data.spacing)
    inference.sampler_of(config)


def claim(workdir: Path, config: Any) -> None:
    """Writes what the folder is for, once nothing can be wrong with config or data: from here on it has one config."""
    logs.write_json(workdir / "config.json", json.loads(config.to_json()))
    if not (workdir / "version.json").exists():  # of the code that trained, not of one that looks on later
        logs.write_json(workdir / "version.json", logs.code_version())


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {k: v for name, value in tree.items() for k, v in _flat(value, f"{prefix}{name}.").items()}


def plan_stages(config: Any, network: Any) -> list[Stage]:
    """The stages of the config's method."""
    t, d = config.train, config.diffusion
    if config.method != "entrust":
        loss = functools.partial(_unet_loss, network, dice=config.unet.dice)
        return [Stage("unet", 0, t.unet_steps, loss, {"all": 1.0}, t.learning_rate)]
    first = Stage(
        "enfuse", 0, t.enfuse_steps, functools.partial(_enfuse_loss, network, steps=t.enfuse_steps),
        {"enfuse": 1.0, "prior": 1.0, "segdiff": 0.0}, t.learning_rate,
    )  # fmt: skip
    segdiff = functools.partial(_segdiff_loss, network, low=d.lambda_min, high=d.lambda_max, draws=t.draws)
    second = Stage(
        "segdiff", t.enfuse_steps, t.segdiff_steps, segdiff,
        {"enfuse": SLOW, "prior": 0.0, "segdiff": 1.0}, t.learning_rate,
    )  # fmt: skip
    return [first, second]


def _enfuse_loss(network: Any, params: Any, batch: Batch, key: Array, step: Array, *, steps: int, **options: Any):
    return entrust.enfuse_loss(network, params, batch, key, step / max(steps, 1), **options)


def _segdiff_loss(network: Any, params: Any, batch: Batch, key: Array, step: Array, **options: Any):
    del step
    return entrust.segdiff_loss(network, params, batch, key, **options)


def _unet_loss(network: Any, params: Any, batch: Batch, key: Array, step: Array, *, dice: float):
    del step
    return unet.loss(network, params, batch, key, dice=dice)


def parameter_group(path: tuple[Any, ...]) -> str:
    """Which of a stage's `rates` a parameter of EnTrust follows."""
    names = [entry.key for entry in path]
    if "prior" in names:
        return "prior"
    return "segdiff" if {"denoiser", "projection"} & set(names) else "enfuse"


def optimiser(config: Any, stage: Stage) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay, gradients clipped to norm 1, each group at its rate."""
    warmup = min(100, max(1, stage.steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, stage.learning_rate, warmup, max(stage.steps, warmup + 1), 0.02 * stage.learning_rate
    )
    groups: dict[Hashable, optax.GradientTransformation] = {
        name: optax.scale(rate) if rate else optax.set_to_zero() for name, rate in stage.rates.items()
    }
    label = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: parameter_group(path))
    if set(groups) == {"all"}:
        label = functools.partial(jax.tree.map, lambda _: "all")
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=config.train.weight_decay),
        optax.partition(groups, label),
    )


def train_step(
    state: TrainState, batch: Batch, key: Array, *, loss: Loss, tx: optax.GradientTransformation, decay: float
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step of one network: pure. A loss or gradient that is not finite changes nothing but `step`."""
    key = jax.random.fold_in(key, state.step)
    (value, figures), gradient = jax.value_and_grad(loss, has_aux=True, argnums=0)(state.params, batch, key, state.step)
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema, params, ema_decay(state.step, decay))
    new = (params, ema, opt_state)
    params, ema, opt_state = jax.tree.map(
        lambda a, b: jnp.where(finite, a, b), new, (state.params, state.ema, state.opt_state)
    )
    figures = figures | {"gradient_norm": norm, "finite": finite}
    return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state), figures


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A stage's programs, compiled for the mesh: the step, the validation of a batch, shapes and cost."""

    call: Callable[..., tuple[TrainState, dict[str, Array]]]
    validate: Callable[..., Any]
    abstract: TrainState
    compile_seconds: float
    step_seconds: float
    memory_mb: float


def members(config: Any) -> int:
    """Networks trained at once."""
    return 1 if config.method == "entrust" else unet.members(config)


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
    empty = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), batch)
    seconds = step_seconds(config, stage, call, devices, [empty, empty])
    memory = call.memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0
    return Compiled(call, validate, abstract, compile_seconds, seconds, used / 2**20)


def step_seconds(config: Any, stage: Stage, call: Callable[..., Any], devices: Any, batches: Sequence[Batch]) -> float:
    """Seconds of a step: the least of one on each of these batches, after a first one that also faults memory in."""
    tx, whole = optimiser(config, stage), mesh.replicated(devices)
    state, key = jax.jit(lambda: initial_state(config, tx), out_shardings=whole)(), step_key(config, stage)
    times = []
    for batch in (batches[0], *batches):
        began = time.perf_counter()
        state, _ = call(state, batch, key)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def initial_state(config: Any, tx: optax.GradientTransformation) -> TrainState:
    """Random parameters and optimiser state; call inside jit."""
    params = networks.init_params(config, jax.random.key(config.seed))
    return create(params, tx) if config.method == "entrust" else jax.vmap(lambda p: create(p, tx))(params)


def step_key(config: Any, stage: Stage) -> Array:
    """The key that a stage folds its step into; one per member for U-Nets."""
    key = jax.random.fold_in(jax.random.key(config.seed), stage.begin + 1)
    return key if config.method == "entrust" else jax.random.split(key, members(config))


def print_plan(config: Any, stages: list[Stage], programs: dict[str, Compiled], devices: Any, workdir: Path) -> None:
    """Shapes, memory and minutes, before data is touched."""
    data = config.data
    size = mesh.round_to_devices(config.train.batch, devices)
    print(f"{config.name}: {config.method} -> {workdir}")
    print(
        f"  {len(data.modalities)} modalities ({', '.join(data.modalities)}), {len(data.classes)} classes "
        f"({', '.join(data.classes)}); batches of {size} patches {tuple(data.patch)} on {devices.size} device(s)"
    )
    total = 0.0
    for stage in stages:
        s = programs[stage.name]
        count = sum(x.size for x in jax.tree.leaves(s.abstract.params))
        minutes = stage.steps * s.step_seconds / 60
        total += minutes
        print(
            f"  {stage.name}: {count:,} parameters, {stage.steps} steps of {s.step_seconds:.2f} s = {minutes:.1f} min, "
            f"{s.memory_mb:.0f} MB per device (compiled in {s.compile_seconds:.0f} s)"
        )
    print(f"  planned: {total:.0f} min of training, then validation threshold and calibration", flush=True)


# Training -------------------------------------------------------------------------------------------------------------


def read_data(config: Any, workdir: Path) -> tuple[dict[str, list[str]], dict[str, list[Volume]], dict[str, list[str]]]:
    """The split, the volumes of its parts, and what was wrong with any of them.

    A new split that cannot be read is not kept: the mend may change it.
    """
    path = workdir / "splits.json"
    found, drawn = workdir.exists(), not path.exists()
    try:
        parts, lines = dataset.split(config.data, path)
        for line in lines:
            print(line)
        spacing = dataset.working_spacing(config.data, workdir / api.SPACING, parts["train"])
        if spacing:
            print(f"working spacing: {resampling.in_words(spacing)}")
        read = {part: read_part(config, parts, part, spacing) for part in ("train", "val", "calibration")}
        return parts, {part: found[0] for part, found in read.items()}, {part: found[1] for part, found in read.items()}
    except UserError:
        if drawn:
            path.unlink(missing_ok=True)
            (workdir / api.SPACING).unlink(missing_ok=True)
            if workdir.exists() and not found:
                workdir.rmdir()
        raise


def read_part(
    config: Any, parts: dict[str, list[str]], part: str, spacing: tuple[float, ...]
) -> tuple[list[Volume], list[str]]:
    """The volumes of one part of the split on their working grids, and a line for what is wrong with any of them,

    printed too.
    """
    began = time.perf_counter()
    volumes, problems = dataset.read(config.data, parts[part], config.seed, spacing)
    print(f"{part}: {len(volumes)} of {len(parts[part])} cases read in {time.perf_counter() - began:.1f} s")
    for line in problems:
        print(f"  warning: {line}")
    return volumes, problems


def train_network(
    config: Any,
    workdir: Path,
    stages: list[Stage],
    programs: dict[str, Compiled],
    volumes: dict[str, list[Volume]],
    devices: Any,
) -> None:
    """Runs the stages that are not done yet; `checkpoints/last` always holds a state to go on from."""
    folder = workdir / "checkpoints"
    with (
        contextlib.closing(checkpoint.open_manager(folder / "last")) as last,
        contextlib.closing(checkpoint.open_manager(folder / "best")) as best,
        checkpoint.preemption_watch() as should_stop,
    ):
        meta = checkpoint.read_meta(last)
        state, stage = None, stages[0]
        if meta is not None:
            if meta["stage"] == "done":
                return
            stage = next(s for s in stages if s.name == meta["stage"])
            restored = checkpoint.restore_last(last, programs[stage.name].abstract)
            assert restored is not None
            state = restored[0]
            print(f"resumed at step {meta['step']} ({stage.name})", flush=True)
        checkpoint.drop_after(best, meta["step"] if meta else 0)
        if state is None:
            tx = optimiser(config, stage)
            init = jax.jit(lambda: initial_state(config, tx), out_shardings=mesh.replicated(devices))
            state = init()
        index = stages.index(stage)
        for stage, following in zip(stages[index:], [*stages[index + 1 :], None], strict=True):
            state = run_stage(
                config, workdir, stage, programs[stage.name], state, volumes, devices, last, best, should_stop
            )
            # The next stage starts from the best of this one. Its first state is saved before it can have a best.
            restored = checkpoint.restore_best(best, programs[stage.name].abstract.params)
            params = restored[0] if restored else state.ema
            end = stage.begin + stage.steps
            if following is None:
                checkpoint.save_last(last, end, state, {"stage": "done", "step": end})
            else:
                state = start_from(config, following, params, devices)
                checkpoint.save_last(last, end, state, {"stage": following.name, "step": end})
            if should_stop(end):
                stop(workdir, end)


def start_from(config: Any, stage: Stage, params: Any, devices: Any) -> TrainState:
    """A fresh optimiser and average on given parameters."""
    tx = optimiser(config, stage)
    make = create if config.method == "entrust" else jax.vmap(create, in_axes=(0, None))
    return jax.jit(lambda p: make(p, tx), out_shardings=mesh.replicated(devices))(params)


def run_stage(
    config: Any,
    workdir: Path,
    stage: Stage,
    programs: Compiled,
    state: TrainState,
    volumes: dict[str, list[Volume]],
    devices: Any,
    last: Any,
    best: Any,
    should_stop: Callable[[int], bool],
) -> TrainState:
    """Trains one stage to its end: log rows every `log_every` steps, validation and `best` every `eval_every`."""
    t = config.train
    done = int(np.max(np.asarray(state.step)))
    names = {volume.number: volume.name for part in volumes.values() for volume in part}
    train_data = training_data(config, volumes["train"], devices)
    validation = validation_batches(config, volumes["val"], devices)
    rows = workdir / "metrics.jsonl"
    logs.drop_rows_after(rows, stage.begin + done)
    board = logs.open_tensorboard(workdir / "tensorboard", stage.begin + done)
    key = step_key(config, stage)
    saved, bad = time.monotonic(), 0
    batches = pipeline.iterate(train_data, stage.begin + done)
    with logs.progress(stage.name, stage.steps, done) as show:
        for i in range(done, stage.steps):
            batch = next(batches)
            state, figures = programs.call(state, place(config, batch, devices), key)
            finite = bool(np.all(np.asarray(figures.pop("finite"))))
            bad = 0 if finite else bad + 1
            if not finite:
                cases = ", ".join(sorted({names[int(c)] for c in batch["case"]}))
                print(f"warning: step {stage.begin + i + 1}: loss or gradient not finite, step skipped; cases: {cases}")
                if bad >= MAX_BAD_STEPS:
                    raise UserError(
                        f"{workdir}: {bad} steps in a row were not finite, the last with cases {cases}; "
                        "look at these scans, or lower config.train.learning_rate"
                    )
            now = i + 1
            evaluate = now % t.eval_every == 0 or now == stage.steps
            if evaluate or now % t.log_every == 0:
                row = {"step": stage.begin + now, "stage": stage.name} | summarise(figures, config)
                if evaluate:
                    row |= validate(stage, programs, state.ema, validation)
                    warn_of_lost_conflict([*logs.read_rows(rows), row], stage, t.eval_every)
                    keep_best(best, stage, stage.begin + now, state.ema, row["val/score"])
                logs.append_row(rows, row)
                logs.write_scalars(board, stage.begin + now, row)
                show(now, row["loss"])
            else:
                show(now)
            # At the stage's end it is train_network that saves and stops.
            stopping = now < stage.steps and should_stop(stage.begin + now)
            if now < stage.steps and (stopping or time.monotonic() - saved > CHECKPOINT_SECONDS):
                checkpoint.save_last(last, stage.begin + now, state, {"stage": stage.name, "step": stage.begin + now})
                saved = time.monotonic()
            if stopping:
                board.close()
                stop(workdir, stage.begin + now)
    board.close()
    return state


def stop(workdir: Path, step: int) -> NoReturn:
    """Leaves after SIGTERM, the state being saved."""
    print(f"{workdir}: stopped at step {step} and saved; run the same command to go on", file=sys.stderr, flush=True)
    sys.exit(cli.TERMINATED)


def training_data(config: Any, volumes: list[Volume], devices: Any) -> Any:
    """The endless, seeded batches of training patches, one batch a member."""
    return pipeline.training_dataset(
        volumes, batch=mesh.round_to_devices(config.train.batch, devices) * members(config),
        patch=tuple(config.data.patch), seed=config.seed, foreground_share=config.data.foreground_share,
        augment=config.data.augment, kinds=augment.settings_of(config.data),
    )  # fmt: skip


def place(config: Any, batch: dict[str, np.ndarray], devices: Any) -> Batch:
    """A batch on the mesh; U-Nets get one of their own per member."""
    if config.method == "entrust":
        return mesh.shard_batch(batch, devices)
    n, split = members(config), jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(None, mesh.AXIS))
    return {name: jax.device_put(value.reshape(n, -1, *value.shape[1:]), split) for name, value in batch.items()}


def summarise(figures: dict[str, Array], config: Any) -> dict[str, float]:
    """Figures of one step as floats: the mean over members, CE per bin of log SNR, kappa of slots without dropout."""
    del config
    values = {name: np.asarray(value, np.float64) for name, value in figures.items()}
    row: dict[str, float] = {}
    if "ce_sum" in values:
        sums, counts = values.pop("ce_sum"), values.pop("ce_count")
        for i, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count > 0:
                row[f"ce/bin_{i}"] = float(total / count)
    if "kappa_sum" in values:
        total, count = float(values.pop("kappa_sum")), float(values.pop("kappa_count"))
        if count > 0:
            row["kappa"] = total / count
    return {name: float(np.mean(value)) for name, value in values.items()} | row


def warn_of_lost_conflict(rows: list[dict[str, Any]], stage: Stage, interval: int) -> None:
    """Says so when the unimodal heads have fitted the training cases so well that their conflict is gone there.

    `rows` are those of metrics.jsonl, the last of them validated; training's kappa is the mean over the last
    `interval` steps.
    """
    last = rows[-1]
    begin = max(stage.begin, last["step"] - interval)
    seen = [row["kappa"] for row in rows if row.get("step", 0) > begin and row.get("kappa") is not None]
    if seen and last.get("val/kappa") and np.mean(seen) < KAPPA_ALARM * last["val/kappa"]:
        print(
            f"warning: step {last['step']}: mean conflict is {np.mean(seen):.4f} on training cases and "
            f"{last['val/kappa']:.4f} on validation cases: the modality heads overfit; train fewer steps, or on more "
            "cases",
            flush=True,
        )


def validation_batches(config: Any, volumes: list[Volume], devices: Any) -> list[Batch]:
    """A fixed set of validation patches, drawn and weighted as in training but not augmented."""
    size = mesh.round_to_devices(config.train.batch, devices)
    data = pipeline.training_dataset(
        volumes, batch=size, patch=tuple(config.data.patch), seed=config.seed + 1,
        foreground_share=config.data.foreground_share, augment=False,
    )  # fmt: skip
    count = max(1, -(-config.train.val_slices // size))
    return [mesh.shard_batch(pipeline.batch_at(data, i), devices) for i in range(count)]


def levels_of(config: Any, stage: Stage) -> Float[np.ndarray, " levels"]:
    """The levels of log SNR at which EnTrust is validated: the first alone while the denoiser is not trained yet."""
    levels = bin_levels(config.diffusion.lambda_min, config.diffusion.lambda_max)
    return levels[:1] if stage.name == "enfuse" else levels


def validate_batch(config: Any, network: Any, stage: Stage, params: Any, batch: Batch) -> Any:
    """What `validate` averages, of one batch: cross-entropy by level, of the modality heads, and kappa; of U-Nets, by

    member, the cross-entropy.
    """
    if stage.name == "unet":
        return unet.over_members(lambda p: unet.validate(network, p, batch))(params)
    levels = jnp.asarray(levels_of(config, stage))
    return entrust.validate(network, params, batch, levels, jax.random.key(config.seed))


def validate(stage: Stage, programs: Compiled, ema: Any, batches: list[Batch]) -> dict[str, float]:
    """Validation figures of EMA parameters. `val/score` is what `best` goes by: CE of the unimodal heads in stage 1,

    of the denoiser at lambda_min in stage 2a, of the (mean) member for U-Nets.
    """
    weight = np.concatenate([np.asarray(b["weight"] * b["valid"]) for b in batches])
    found = [jax.tree.map(np.asarray, programs.validate(ema, batch)) for batch in batches]

    def mean(parts):
        return float(np.sum(weight * np.concatenate(parts)) / np.sum(weight))

    if stage.name == "unet":
        score = mean([by_member.mean(axis=0) for by_member in found])
        return {"val/ce": score, "val/score": score}
    row = {"val/unimodal": mean([u for _, u, _ in found]), "val/kappa": mean([k for _, _, k in found])}
    if stage.name == "enfuse":
        return row | {"val/score": row["val/unimodal"]}
    levels = len(found[0][0])
    per_level = {f"val/ce_bin_{i}": mean([ce[i] for ce, _, _ in found]) for i in range(levels)}
    return row | per_level | {"val/score": per_level["val/ce_bin_0"]}


def keep_best(best: Any, stage: Stage, step: int, ema: Any, score: float) -> None:
    """Saves EMA parameters that are better than any of this stage's before."""
    meta = checkpoint.read_meta(best)
    if np.isfinite(score) and (meta is None or meta["stage"] != stage.name or score < meta["metric"]):
        checkpoint.save_best(best, step, ema, {"step": step, "metric": score, "stage": stage.name})


# After training -------------------------------------------------------------------------------------------------------


def best_params(config: Any, workdir: Path, devices: Any) -> Any:
    """The EMA parameters of `best`, whole on every device."""
    abstract = jax.eval_shape(lambda: networks.init_params(config, jax.random.key(config.seed)))
    with contextlib.closing(checkpoint.open_manager(workdir / "checkpoints" / "best", read_only=True)) as manager:
        restored = checkpoint.restore_best(manager, abstract)
    if restored is None:
        raise UserError(f"{workdir}/checkpoints/best: holds no checkpoint; train into a new working folder")
    return jax.device_put(restored[0], mesh.replicated(devices))


def threshold(config: Any, network: Any, params: Any, volumes: list[Volume], devices: Any) -> float:
    """Stage 3: the one-step foreground threshold with the best Dice on validation cases."""
    pairs = []
    for volume in volumes:
        p = networks.one_step_with(config, network, params, devices, volume)
        pairs.append((p, np.where(volume.body, preprocess.labels_of(volume), -1)))
    tau, dice = case.choose_threshold(pairs)
    print(f"threshold: {tau:.2f} (validation Dice {np.max(dice):.3f}, {len(volumes)} cases)", flush=True)
    return float(tau)


def calibrate(
    config: Any, workdir: Path, network: Any, params: Any, tau: float, volumes: list[Volume], devices: Any
) -> None:
    """Stage 4: fits the ladder of calibrators on the calibration patients, frozen network, and keeps the best."""
    if (workdir / "calibration.json").exists():
        return
    began = time.perf_counter()
    data = calibration_set(config, network, params, tau, volumes, devices)
    found = calibration.select(data, jax.random.key(config.seed), config.train.head_steps)
    logs.write_bytes(workdir / "calibration.npz", _npz(found["params"]))
    table = found["table"]
    logs.write_json(
        workdir / "calibration.json",
        {"tau": tau, "chosen": found["chosen"], "table": table, "note": found["note"], "patients": found["patients"]},
    )
    print(f"calibration: {found['patients']} patients, {time.perf_counter() - began:.0f} s; {found['note']}")
    for name, row in table.items():
        mark = " <- chosen" if name == found["chosen"] else ""
        print(f"  {name:18s} NLL {row['nll']:.5f}{mark}")


def calibration_set(
    config: Any, network: Any, params: Any, tau: float, volumes: list[Volume], devices: Any
) -> calibration.CalibrationSet:
    """What the frozen network says of the calibration patients, with what is true."""
    slices = []
    patients = sorted({volume.patient for volume in volumes})
    with logs.progress("calibration", len(volumes)) as show:
        for i, volume in enumerate(volumes):
            raw = networks.examine_with(config, network, params, devices, tau, volume, config.train.calibration_slices)
            slices.append(calibration_slices(raw, volume, patients.index(volume.patient), config.seed))
            show(i + 1)
    return join(slices)


def join(parts: Sequence[calibration.CalibrationSet]) -> calibration.CalibrationSet:
    """One set of the slices of many cases, padded to the largest in-plane size with voxels of weight 0 and label -1."""
    size = np.max([part.label.shape[1:] for part in parts], axis=0)

    def padded(part: calibration.CalibrationSet, name: str) -> np.ndarray:
        value = getattr(part, name)
        if value.ndim == 1:
            return value
        more = [(0, 0), *((0, int(n - m)) for n, m in zip(size, value.shape[1:3], strict=True))]
        more += [(0, 0)] * (value.ndim - 3)
        return np.pad(value, more, constant_values=-1 if name == "label" else 0)

    names = [f.name for f in dataclasses.fields(calibration.CalibrationSet)]
    return calibration.CalibrationSet(*(np.concatenate([padded(part, name) for part in parts]) for name in names))


def calibration_slices(raw: inference.Raw, volume: Volume, patient: int, seed: int) -> calibration.CalibrationSet:
    """The examined slices of one case, with importance-sampled pixels; for R raters R times, at 1 / R of the weight."""
    kept = raw["kept"]
    body, labels = volume.body[kept], preprocess.labels_of(volume)
    delivered = raw["label"]
    inputs, _ = calibration.features(raw, volume.present)
    rng = np.random.default_rng([seed, volume.number])
    weight = calibration.importance_weights(raw["entropy"], raw["border"], body, rng)
    first = calibration.CalibrationSet(
        features=inputs,
        one_step=calibration.log_probability(raw["one_step"]),
        mean=calibration.log_probability(raw["mean"]),
        label=labels[0][kept],
        delivered=delivered.astype(np.int32),
        weight=weight * raw["slice_weight"][:, None, None] / len(labels),
        patient=np.full(len(kept), patient),
    )
    return join([dataclasses.replace(first, label=label[kept]) for label in labels]) if len(labels) > 1 else first


def guarantee(workdir: Path) -> None:
    """Stage 5: what can be promised of a new patient, from whole predictions of the calibration patients.

    Also for a folder that was finished before this stage existed, and again where the config's levels have changed.
    """
    config: Any = api.read_config(workdir)
    path, levels, regions = workdir / api.CONFORMAL, config.trust.to_dict(), tuple(config.data.regions)
    found = api.read_conformal(path, regions)
    if found is not None and found["levels"] == levels:
        return
    began = time.perf_counter()
    trained = api.load(workdir)
    parts = trained.splits
    cases, note = [], ""
    if set(parts["calibration"]) & {*parts["train"], *parts["val"]}:
        note = "the calibration patients had a part in training, too (config.data.split.folds=1)"
    else:
        volumes, _ = api.read_cases(trained, split="calibration")
        with logs.progress("guarantees", len(volumes)) as show:
            for i, volume in enumerate(volumes):
                cases.append(api.observe_volume(trained, volume))
                show(i + 1)
    found = conformal.fit(cases, regions, **levels, note=note)
    logs.write_json(path, found)
    print(f"guarantees: {found['patients']} patients, {time.perf_counter() - began:.0f} s")
    for line in conformal.statements(found):
        print(f"  {line}")


def reference(workdir: Path) -> None:
    """Stage 6: what is usual in the scans of training, and how far the patients lie from it who had no part in it.

    Those are the validation and calibration patients: no parameter has seen them, and one checkpoint in a few was
    chosen on the former. Also for a folder that was finished before this stage existed. Only for EnTrust, which sees
    each modality by itself.
    """
    config: Any = api.read_config(workdir)
    record, arrays = (workdir / name for name in api.UNUSUAL)
    if config.method != "entrust" or api.read_usual(workdir, len(config.data.modalities)) is not None:
        return
    began = time.perf_counter()
    trained = api.load(workdir)
    parts, note = trained.splits, ""
    others = [*parts["val"], *parts["calibration"]]
    if set(parts["train"]) & set(others):
        note = "all patients had a part in training (config.data.split.folds=1)"
    described: list[list[tuple[str, ood.Features]]] = []
    for names in ([], []) if note else (spaced(parts["train"], USUAL_CASES), spaced(others, REFERENCE_CASES)):
        own: list[tuple[str, ood.Features]] = []
        with logs.progress("reference", len(names)) as show:
            for i in range(0, len(names), HELD):
                own += [(v.patient, api.describe_volume(trained, v)) for v in readable(config, names[i : i + HELD])]
                show(min(i + HELD, len(names)))
        described.append(own)
    laws, found = ood.fit(*(described or ([], [])), note=note)
    logs.write_bytes(arrays, _npz(ood.arrays_of(laws)))
    logs.write_json(record, found)
    print(
        f"usual scans: {found['training']} training patients, {found['patients']} reference patients, "
        f"{time.perf_counter() - began:.0f} s" + (f"; {found['note']}" if found["note"] else "")
    )


def spaced(names: Sequence[str], most: int) -> list[str]:
    """At most so many of the names, evenly spaced."""
    return [names[i * len(names) // most] for i in range(most)] if len(names) > most else list(names)


def readable(config: Any, names: Sequence[str]) -> list[Volume]:
    """The cases on their scans' own grids, without those that cannot be read, which the training has said."""
    try:
        return dataset.read(config.data, names, config.seed)[0]
    except UserError:  # none of them
        return []


def _npz(params: dict[str, np.ndarray]) -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **params)  # type: ignore[arg-type]
    return buffer.getvalue()


def define_flags() -> None:
    """The command line of this entry point."""
    cli.config_flag()
    flags.DEFINE_string("workdir", None, "Working folder; runs/<config name> by default.")


if __name__ == "__main__":
    from entrust_jax import train  # under its own name, by which a process that compiles finds its functions

    train.define_flags()
    cli.run(train.main, required=["config"])
