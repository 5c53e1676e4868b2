"""The trainer: what a run does with its steps, what stops it, what a folder keeps and refuses."""

import contextlib
import json
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest

from configs import brats, glioma, phantom
from entrust_jax import cli, networks, train
from entrust_jax.data import dataset, pipeline
from entrust_jax.errors import UserError
from entrust_jax.runtime import checkpoint, logs, mesh
from entrust_jax.training.programs import compile_stage
from entrust_jax.training.stages import Stage, initial_state, optimiser, plan_stages, step_key


@pytest.fixture(scope="module")
def config():
    """configs/phantom.py, shrunk, with the plain U-Net for its method."""
    values = phantom.get_config()
    values.method = "unet"
    values.data.patch = (16, 16)
    values.data.phantom.update(cases=(12, 2, 2, 2), size=(20, 20), sites=1, radius=2.0, jitter=0.0)
    values.unet.widths = (4, 8)
    values.train.update(batch=8, unet_steps=6, eval_every=2, log_every=1, val_slices=8, ema=0.9)
    return values


@pytest.fixture(scope="module")
def run(config):
    """All that run_stage needs, compiled once: an object with stage, programs, network, volumes and devices."""
    devices, network = mesh.data_mesh(), networks.network_of(config)
    (stage,) = plan_stages(config, network)
    spec = dataset.phantom_spec(config.data)
    numbers = {"train": range(12), "val": range(12, 14), "calibration": range(14, 16)}
    return types.SimpleNamespace(
        devices=devices,
        network=network,
        stage=stage,
        programs=compile_stage(config, network, stage, devices),
        volumes={part: dataset.phantom_scene.volumes(spec, which, 0) for part, which in numbers.items()},
    )


def begin(config, run):
    tx = optimiser(config, run.stage)
    init = jax.jit(lambda: initial_state(config, tx), out_shardings=mesh.replicated(run.devices))
    return init()


def go(config, run, workdir, start, volumes=None, should_stop=lambda step: False):
    with (
        contextlib.closing(checkpoint.open_manager(workdir / "last")) as last,
        contextlib.closing(checkpoint.open_manager(workdir / "best")) as best,
    ):
        return train.run_stage(
            config, workdir, run.stage, run.programs, start, volumes or run.volumes, run.devices,
            last, best, should_stop,
        )  # fmt: skip


def planted(volumes, which, value):
    """The volumes, one of them with `value` all over the body in its first modality, as if reading had let it pass."""
    images = [volume.image.copy() for volume in volumes]
    images[which][0][volumes[which].body] = value
    fields = [{**vars(volume), "image": image} for volume, image in zip(volumes, images, strict=True)]
    return [type(volume)(**values) for volume, values in zip(volumes, fields, strict=True)]


def test_an_infinite_scan_skips_its_steps_and_is_named(config, run, tmp_path, capsys):
    bad = 5
    volumes = run.volumes | {"train": planted(run.volumes["train"], bad, np.inf)}
    final = go(config, run, tmp_path, begin(config, run), volumes)

    # The same steps by hand, those with the bad case left out.
    data = pipeline.training_dataset(
        volumes["train"], batch=8, patch=(16, 16), seed=config.seed, foreground_share=config.data.foreground_share
    )
    expected, skipped = begin(config, run), []
    for i in range(run.stage.steps):
        batch = pipeline.batch_at(data, i)
        if volumes["train"][bad].number in batch["case"]:
            skipped.append(i + 1)
            expected = expected.replace(step=expected.step + 1)
        else:
            placed = train.place(config, batch, run.devices)
            expected, _ = run.programs.call(expected, placed, step_key(config, run.stage))
    assert 0 < len(skipped) < run.stage.steps  # the seed shows both
    for ours, theirs in zip(jax.tree.leaves(final), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [int(line.split()[2].rstrip(":")) for line in warnings] == skipped
    assert all("not finite" in line and volumes["train"][bad].name in line for line in warnings)
    rows = logs.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, run.stage.steps + 1))
    assert [row["step"] for row in rows if row["loss"] is None] == skipped


def test_a_run_that_only_fails_gives_up_and_names_the_cases(config, run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MAX_BAD_STEPS", 3)
    volumes = run.volumes["train"]
    for which in range(len(volumes)):
        volumes = planted(volumes, which, np.nan)
    with pytest.raises(UserError, match=r"3 steps in a row were not finite.*PHANTOM_000") as error:
        go(config, run, tmp_path, begin(config, run), run.volumes | {"train": volumes})
    assert "\n" not in str(error.value)


def test_a_stage_that_is_stopped_goes_on_to_the_same_bits(config, run, tmp_path, capsys):
    whole = go(config, run, tmp_path / "whole", begin(config, run))
    with pytest.raises(SystemExit) as left:
        go(config, run, tmp_path / "parts", begin(config, run), should_stop=lambda step: step == 3)
    assert left.value.code == cli.TERMINATED
    assert "stopped at step 3 and saved; run the same command to go on" in capsys.readouterr().err
    with contextlib.closing(checkpoint.open_manager(tmp_path / "parts" / "last")) as last:
        restored, meta = checkpoint.restore_last(last, run.programs.abstract)
    assert meta == {"stage": "unet", "step": 3}
    parts = go(config, run, tmp_path / "parts", restored)
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert rows[0] == rows[1]


def test_validation_keeps_its_own_pace(config, run, tmp_path):
    paced = config.copy_and_resolve_references()
    paced.train.update(log_every=4, eval_every=3)
    go(paced, run, tmp_path, begin(config, run))
    rows = logs.read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], "val/score" in row) for row in rows] == [(3, True), (4, False), (6, True)]


def test_a_stop_at_the_last_step_is_left_to_the_end_of_the_stage(config, run, tmp_path):
    asked = []
    go(config, run, tmp_path, begin(config, run), should_stop=asked.append)
    assert asked == [1, 2, 3, 4, 5]  # train_network asks at 6, after the next stage's state is saved


def network_run(config, run, workdir):
    train.train_network(
        config, workdir, [run.stage], {run.stage.name: run.programs}, run.volumes, run.devices
    )  # fmt: skip
    with contextlib.closing(checkpoint.open_manager(workdir / "checkpoints" / "last")) as last:
        return checkpoint.restore_last(last, run.programs.abstract)


def test_a_run_that_lost_its_last_checkpoint_starts_over(config, run, tmp_path):
    whole, meta = network_run(config, run, tmp_path)
    assert meta == {"stage": "done", "step": 6}
    rows = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints" / "last")
    again, _ = network_run(config, run, tmp_path)  # its best is older than the one that lies there
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_a_damaged_last_checkpoint_is_one_line(config, run, tmp_path):
    network_run(config, run, tmp_path)
    (step,) = (tmp_path / "checkpoints" / "last").iterdir()
    shutil.rmtree(step / "meta")
    with pytest.raises(UserError, match=r"last/6: the checkpoint is damaged.*remove this folder") as error:
        network_run(config, run, tmp_path)
    assert "\n" not in str(error.value)


def test_sigterm_is_ours_only_while_there_is_a_state_to_save(config, run, tmp_path, monkeypatch):
    before, seen = signal.getsignal(signal.SIGTERM), []

    def stage(*_):
        seen.append(signal.getsignal(signal.SIGTERM))
        return begin(config, run)

    monkeypatch.setattr(train, "run_stage", stage)
    network_run(config, run, tmp_path)
    assert seen[0] is not before and signal.getsignal(signal.SIGTERM) is before


def test_only_a_better_score_of_the_stage_is_kept(tmp_path):
    stages = [Stage(name, 0, 10, lambda *_: (jnp.zeros(()), {}), {"all": 1.0}, 1e-3) for name in ("enfuse", "segdiff")]
    kept = []
    with contextlib.closing(checkpoint.open_manager(tmp_path)) as best:
        scores = [(0, 2.0), (0, 3.0), (0, float("nan")), (0, 1.0), (1, 5.0), (1, 6.0), (1, 4.0)]
        for step, (stage, score) in enumerate(scores):
            train.keep_best(best, stages[stage], step, {"w": jnp.float32(step)}, score)
            kept.append(checkpoint.read_meta(best)["step"])
    assert kept == [0, 0, 0, 3, 4, 4, 6]


def test_figures_of_a_step():
    figures = {
        "loss": jnp.asarray([1.0, 3.0]),
        "ce_sum": jnp.asarray([2.0, 0.0, 6.0]),
        "ce_count": jnp.asarray([4.0, 0.0, 2.0]),
    }
    assert train.summarise(figures) == {"loss": 2.0, "ce/bin_0": 0.5, "ce/bin_2": 3.0}  # no case in bin 1


# The folder ---------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_config_but_its_data_may_move(config, tmp_path):
    train.check(tmp_path, config)
    train.claim(tmp_path, config)
    assert json.loads((tmp_path / "version.json").read_text())["jax"] == jax.__version__
    moved = config.copy_and_resolve_references()
    moved.data.dir = "elsewhere"
    moved.trust.fnr = 0.05  # is found anew without training
    train.check(tmp_path, moved)
    moved.train.learning_rate = 7.0
    assert json.loads((tmp_path / "version.json").read_text())["format"] == 1
    moved.seed = 1
    with pytest.raises(UserError, match=r"config.json: was trained with seed=0, this config has 1 \(2 keys differ\)"):
        train.check(tmp_path, moved)


def test_checkpoints_of_nobody_knows_what_are_not_gone_on_from(config, tmp_path):
    train.check(tmp_path, config)
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json"):
        train.check(tmp_path, config)
    train.claim(tmp_path, config)
    train.check(tmp_path, config)


def test_an_unknown_method_names_those_there_are(config, tmp_path):
    odd = config.copy_and_resolve_references()
    odd.method = "magic"
    with pytest.raises(UserError, match=r"config.method is 'magic'.*entrust, unet, deep_ensemble"):
        train.check(tmp_path / "w", odd)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("cases", [(8, 4, 9), (8, 4, 9, 0)])
def test_a_phantom_needs_cases_in_every_part(config, cases):
    data = config.data.copy_and_resolve_references()
    data.phantom.cases = cases
    with pytest.raises(UserError, match=r"config.data.phantom.cases is .*train, val, calibration, test"):
        dataset.check(data)


@pytest.mark.parametrize("folder", ["", "nowhere"])
@pytest.mark.parametrize(
    ("module", "source", "layout"),
    [(brats, "synapse.org/Synapse", "NAME_flair.nii.gz"), (glioma, "Cancer Imaging Archive", "imagesTr/")],
)
def test_without_data_one_line_says_where_it_is_and_what_goes_without(module, source, layout, folder):
    data = module.get_config().data
    data.dir = folder
    with pytest.raises(UserError) as error:
        dataset.check(data)
    for words in (source, layout, "--config.data.dir=FOLDER", "configs/brats.py:demo", folder):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def scans(tmp_path):
    """Ten cases in nnU-Net layout, 8 x 8 x 3 voxels, and the config that reads them."""
    config = glioma.get_config()
    config.data.dir = str(tmp_path / "data")
    folder = tmp_path / "data"
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    names = {"0": "T1", "1": "FLAIR", "2": "T1ce"}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": names, "file_ending": ".nii.gz"}))
    for i in range(10):
        for channel in range(3):
            values = rng.normal(100, 20, (8, 8, 3)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "imagesTr" / f"P{i}_000{channel}.nii.gz")
        label = np.zeros((8, 8, 3), np.uint8)
        label[2:5, 2:5, 1] = 1
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / "labelsTr" / f"P{i}.nii.gz")
    return config


def test_a_truncated_scan_is_named_and_the_rest_is_read(scans, tmp_path, capsys):
    parts, _, clean = train.read_data(scans, tmp_path / "clean")
    assert clean == {"train": [], "val": [], "calibration": []}
    capsys.readouterr()
    victim = parts["train"][0]
    path = tmp_path / "data" / "imagesTr" / f"{victim}_0001.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    again, volumes, warnings = train.read_data(scans, tmp_path / "w")
    assert again == parts and json.loads((tmp_path / "w" / "splits.json").read_text())["train"] == parts["train"]
    assert [volume.name for volume in volumes["train"]] == parts["train"][1:]
    assert len(volumes["val"]) == len(parts["val"]) and len(volumes["calibration"]) == len(parts["calibration"])
    printed = capsys.readouterr().out
    (warning,) = [line for line in printed.splitlines() if "warning" in line]
    assert str(path) in warning and "truncated" in warning and "left out" in warning
    assert len(warnings["train"]) == 1 and warnings["train"][0] in warning and not warnings["val"]


def test_what_a_split_leaves_out_is_said_once(scans, tmp_path, capsys):
    (tmp_path / "data" / "labelsTr" / "P3.nii.gz").unlink()
    parts, _, _ = train.read_data(scans, tmp_path / "w")
    assert not any("P3" in names for names in parts.values())
    assert "so in no part of the split (predict can still read them): 1 case (P3)" in capsys.readouterr().out
    assert train.read_data(scans, tmp_path / "w")[0] == parts and "P3" not in capsys.readouterr().out


def test_data_that_cannot_be_read_leaves_no_split_behind(scans, tmp_path):
    kept = train.read_data(scans, tmp_path / "trained")[0]
    for path in (tmp_path / "data" / "labelsTr").iterdir():
        label = np.full((8, 8, 3), 3, np.uint8)
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), path)
    with pytest.raises(UserError, match=r"label value 3 is not in config.data.label_map"):
        train.read_data(scans, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    with pytest.raises(UserError, match="label value 3"):
        train.read_data(scans, tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / "splits.json").read_text())["test"] == kept["test"]
    scans.data.label_map = ((0, 0), (3, 1))  # the mend that the message names, in the same folder
    assert train.read_data(scans, tmp_path / "w")[0] == kept


def test_empty_masks_alone_are_not_trained_on(scans, tmp_path):
    for path in (tmp_path / "data" / "labelsTr").iterdir():
        nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 3), np.uint8), np.eye(4)), path)
    with pytest.raises(UserError, match=r"data: no mask in the part train holds anything but background.*check says"):
        train.read_data(scans, tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("diffusion.sampler", "ddmi", "diffusion.sampler"),
        ("diffusion.steps", 0, "diffusion.steps"),
        ("diffusion.hypotheses", 0, "diffusion.hypotheses"),
        ("diffusion.lambda_min", 9.0, "lambda_min"),
        ("train.calibration_slices", 0, "calibration_slices"),
        ("train.eval_every", 0, "eval_every"),
        ("model.space_to_depth", 0, "space_to_depth"),
        ("model.widths", (), "model.widths"),
        ("unet.members", 0, "unet.members"),
        ("unet.passes", 0, "unet.passes"),
        ("unet.dropout", 1.0, "unet.dropout is 1.0; give a share"),
        ("data.patch", (0, 0), "data.patch"),
        ("data.patch", (8, 8, 8, 8), "data.patch"),
        ("data.patch", (100, 100), "multiples of 16 x 16"),
        ("data.window", (8, 96, 96), "slices have none"),
        ("data.classes", ("a", "b", "c"), "label_map"),
        ("data.label_map", ((0, 0), (1, 1), (2, 5)), "label_map"),
        ("data.label_map", (), "label_map"),
        ("data.regions", {"lesion": (1, 7)}, "regions.lesion"),
        ("trust.fnr", 0.0, "config.trust.fnr is 0.0; give a share"),
        ("trust.coverage", 1.0, "trust.coverage"),
    ],
)
def test_a_value_that_would_fail_after_training_fails_before_it(key, value, said, tmp_path):
    config = glioma.get_config().copy_and_resolve_references()
    train.check(tmp_path / "w", config)
    section, name = key.split(".")
    with config.ignore_type():
        config[section][name] = value
    with pytest.raises(UserError) as error:
        train.check(tmp_path / "w", config)
    assert said in str(error.value) and chr(10) not in str(error.value)


def test_strides_of_volumes_are_planned_once_and_kept(scans, tmp_path, capsys):
    scans.data.patch = (4, 16, 16)
    found = train.planned(scans, tmp_path / "w")
    assert len(found.model.strides) == len(scans.model.widths) and not scans.model.strides
    assert "planned strides along D x H x W, from the spacing" in capsys.readouterr().out
    train.check(tmp_path / "w", found)
    for window, said in (((4, 16, 17), r"data\.window is .*give multiples of"), ((2, 16, 16), "none less than")):
        other = found.copy_and_resolve_references()
        other.data.window = window
        with pytest.raises(UserError, match=said):
            train.check(tmp_path / "w", other)
    train.claim(tmp_path / "w", found)
    again = train.planned(scans, tmp_path / "w")
    assert again.model.strides == found.model.strides and not capsys.readouterr().out
    train.check(tmp_path / "w", again)  # the same config goes on
    given = scans.copy_and_resolve_references()
    given.model.strides = ((1, 1, 1),) * len(scans.model.widths)
    assert train.planned(given, tmp_path / "w") is given
    with pytest.raises(UserError, match=r"model\.strides"):
        train.check(tmp_path / "w", given)
    scans.data.dir = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        train.planned(scans, tmp_path / "other")


def test_a_split_that_cannot_be_drawn_is_said_before_compiling(scans):
    dataset.check(scans.data)
    for key, value in (("test_pattern", "NOPE"), ("test_pattern", "("), ("fold", 7)):
        own = scans.copy_and_resolve_references()
        own.data.split[key] = value
        with pytest.raises(UserError, match=f"config.data.split.*{key}|{key}"):
            dataset.check(own.data)
