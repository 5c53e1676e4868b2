"""python -m entrust_jax.train --config=configs/X.py [--workdir=W] [--config.KEY=VALUE ...]

Trains a method in its stages, into a working folder that explains itself and is all that predict and evaluate need.
Started again with the same folder, it goes on where it stopped. This file is the order of events; what a stage
minimises, its compiled programs, its validation and what calibrators are fitted on lie in `training`.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jaxtyping import Array

from entrust_jax import api, cli, networks
from entrust_jax.data import augment, dataset, pipeline, preprocess, resampling
from entrust_jax.data.preprocess import Volume
from entrust_jax.errors import UserError
from entrust_jax.runtime import checkpoint, logs, mesh
from entrust_jax.runtime.state import TrainState
from entrust_jax.training.calibration_data import calibration_set
from entrust_jax.training.programs import Compiled, compile_stage
from entrust_jax.training.stages import (
    Batch,
    Stage,
    initial_state,
    members,
    optimiser,
    plan_stages,
    start_from,
    step_key,
)
from entrust_jax.training.validation import validate, validation_batches, warn_of_lost_conflict
from entrust_jax.training.values import check_values
from entrust_jax.trustmap import calibration, case, conformal, explanation, ood

NETWORK_STAGES = {"entrust": ("enfuse", "segdiff"), "unet": ("unet",), "deep_ensemble": ("unet",)}
MAX_BAD_STEPS = 20  # consecutive steps without a finite gradient before the run gives up
CHECKPOINT_SECONDS = 120  # the most work that a killed run repeats
USUAL_CASES, REFERENCE_CASES = 100, 200  # at most, that say how training's scans look and how far others may lie
HELD = 4  # cases that are in memory at once for that


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
    unplanned = networks.volumetric(config) and not config.model.strides  # `planned` plans them where there is data
    for name in ("patch", "window"):
        if not unplanned and data[name] and any(size % unit for size, unit in zip(data[name], side, strict=True)):
            words, value = " x ".join(map(str, side)), tuple(data[name])
            raise UserError(f"config.data.{name} is {value}; give multiples of {words}, for the coarsest scale")
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
        api.check_format(workdir, old["method"])
        then, now = api.flat(old), api.flat(values)
        changed = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
        # The data may have moved, and what is promised is found anew without training.
        changed = [key for key in changed if key != "data.dir" and not key.startswith("trust.")]
        if changed:
            key = changed[0]
            raise UserError(
                f"{path}: was trained with {key}={then.get(key)!r}, this config has {now.get(key)!r}"
                f" ({len(changed)} keys differ); use the same config to go on, or another --workdir"
            )


def claim(workdir: Path, config: Any) -> None:
    """Writes what the folder is for, once nothing can be wrong with config or data: from here on it has one config."""
    path = workdir / "config.json"
    if not path.exists():  # of the code that trained, not of one that looks on later; first, for a folder lasts by this
        logs.write_json(workdir / "version.json", {"format": api.FORMATS[config.method]} | logs.code_version())
    logs.write_json(path, json.loads(config.to_json()))


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
        if not any((preprocess.labels_of(volume) > 0).any() for volume in read["train"][0]):
            raise UserError(
                f"{config.data.dir or config.name}: no mask in the part train holds anything but background, so nothing"
                " can be learnt; python -m entrust_jax.check says which values the masks hold"
            )
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
                row = {"step": stage.begin + now, "stage": stage.name} | summarise(figures)
                if evaluate:
                    row |= validate(stage, programs.validate, state.ema, validation)
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


def summarise(figures: dict[str, Array]) -> dict[str, float]:
    """Figures of one step as floats: the mean over members, CE per bin of log SNR, kappa of slots without dropout."""
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
    meta = {"tau": tau, "chosen": found["chosen"], "table": table, "note": found["note"], "patients": found["patients"]}
    logs.write_json(workdir / "calibration.json", meta | {"thresholds": explanation.THRESHOLDS})
    print(f"calibration: {found['patients']} patients, {time.perf_counter() - began:.0f} s; {found['note']}")
    for name, row in table.items():
        mark = " <- chosen" if name == found["chosen"] else ""
        print(f"  {name:18s} NLL {row['nll']:.5f}{mark}")


def guarantee(workdir: Path) -> None:
    """Stage 5: what can be promised of a new patient, from whole predictions of the calibration patients.

    Also for a folder that was finished before this stage existed, and again where the config's levels have changed or
    the file does not say what it was made with (`conformal.unlike_calibration`).
    """
    config: Any = api.read_config(workdir)
    path, levels, regions = workdir / api.CONFORMAL, config.trust.to_dict(), tuple(config.data.regions)
    found = api.read_conformal(path, regions)
    if found is not None and found["levels"] == levels and "made_with" in found:
        return
    began = time.perf_counter()
    trained = api.load(workdir)
    parts = trained.splits
    cases, note = [], ""
    made_with: dict[str, Any] = {"hypotheses": config.diffusion.hypotheses, "modalities": []}
    if set(parts["calibration"]) & {*parts["train"], *parts["val"]}:
        note = "the calibration patients had a part in training, too (config.data.split.folds=1)"
    else:
        volumes, _ = api.read_cases(trained, split="calibration")
        with logs.progress("guarantees", len(volumes)) as show:
            for i, volume in enumerate(volumes):
                cases.append(api.observe_volume(trained, volume))
                show(i + 1)
        made_with["modalities"] = sorted({tuple(api.modalities_of(trained, volume)) for volume in volumes})
    found = conformal.fit(cases, regions, **levels, note=note) | {"made_with": made_with}
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
    define_flags()
    cli.run(main, required=["config"])
