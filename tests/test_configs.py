"""Every config can be trained as far as can be told without its data, and says what a person needs to know."""

import importlib
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from entrust_jax import api, networks, train
from entrust_jax.data import augment, dataset, layouts
from entrust_jax.errors import UserError

FILES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py"))
SETS = [name for name in FILES if name not in ("common", "nnunet", "__init__")]  # nnunet: below
SCANS = [name for name in SETS if name != "phantom"]


@pytest.mark.parametrize("name", SETS)
def test_a_config_passes_the_checks_of_train(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config()
    train.check(tmp_path / "nothing", config)
    assert config.is_locked and networks.network_of(config).classes == len(config.data.classes)
    assert config.data.regions and config.data.layout in {*layouts.LAYOUTS, "phantom"}


@pytest.mark.parametrize("name", SETS)
def test_its_docstring_says_how_to_run_it_how_long_it_takes_and_how_well_it_does(name):
    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    assert f"python -m entrust_jax.train --config=configs/{name}.py" in text
    assert re.search(r"\btime\b|minutes", text, re.IGNORECASE) and re.search("score|not run here", text, re.IGNORECASE)


@pytest.mark.parametrize("name", [*SCANS, "nnunet"])
def test_its_docstring_says_where_the_data_is_under_which_licence_and_how_it_must_lie(name):
    text = importlib.import_module(f"configs.{name}").__doc__ or ""
    assert re.search(r"\blicence: |\bCC BY\b|\bresearch use only\b", text, re.IGNORECASE)
    assert re.search(r"https://[\w.-]+/\S+|https://[\w-]+\.grand-challenge\.org", text)
    # What the folder holds, or the patterns that list it.
    assert re.search(r"\bfolder\s+holds\b", text, re.IGNORECASE) or re.search(r"\S+=\{\S+\.\w+|imagesTr/NAME", text)
    assert re.search(r"\btime\b", text, re.IGNORECASE) and re.search(r"\bscores?\b|not run here", text, re.IGNORECASE)


@pytest.mark.parametrize("name", SCANS)
def test_without_its_data_it_names_the_source_and_the_layout(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    with pytest.raises(UserError, match="get the data from") as error:
        dataset.find(config.data)
    assert config.data.source in str(error.value) and f"{config.data.layout} layout" in str(error.value)


def test_the_generic_config_passes_the_checks_of_train(tmp_path):
    """The others stand above; this one needs a folder."""
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "CT"}, "labels": {"bg": 0, "a": [1, 2], "b": 2}}')
    config = importlib.import_module("configs.nnunet").get_config(str(tmp_path))
    train.check(tmp_path / "nothing", config)
    assert config.is_locked and config.data.classes == ("bg", "a 1", "b")
    text = importlib.import_module("configs.nnunet").__doc__ or ""
    assert "--config=configs/nnunet.py:FOLDER" in text and "not run here" in text


def test_a_name_for_two_modalities_is_told_before_anything_is_read(tmp_path):
    config = importlib.import_module("configs.hecktor").get_config().copy_and_resolve_references()
    config.data.names = ConfigDict({"CT": ("pt",)})
    with pytest.raises(UserError, match=r"config\.data\.names: pt would stand for CT and for PET"):
        train.check(tmp_path, config)


def test_a_wrong_intensity_is_told_before_anything_is_read(tmp_path):
    config = importlib.import_module("configs.hecktor").get_config().copy_and_resolve_references()
    config.data.intensity.CT = ("window", 240.0, -160.0)
    with pytest.raises(UserError, match=r"config\.data\.intensity\.CT"):
        train.check(tmp_path, config)


def test_a_wrong_augmentation_is_told_before_anything_is_read(tmp_path):
    config = importlib.import_module("configs.sarcoma").get_config().copy_and_resolve_references()
    config.data.augmentation.noise = 30.0
    with pytest.raises(UserError, match=r"config\.data\.augmentation\.noise is 30\.0; give how often"):
        train.check(tmp_path, config)


@pytest.mark.parametrize(("name", "arg"), [("glioma", ""), ("phantom", ""), ("brats", "demo")])
def test_what_was_trained_with_few_kinds_of_augmentation_goes_on_with_them(name, arg):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    assert config.data.augmentation.to_dict() == api.ADDED["data"]["augmentation"]
    assert set(api.ADDED["data"]["augmentation"]) == set(augment.KINDS)


def test_no_config_asks_for_what_none_of_its_modalities_can_show():
    for name in SCANS:
        config = importlib.import_module(f"configs.{name}").get_config(*{"glioma": ["gpu"]}.get(name, []))
        kinds = augment.settings_of(config.data)
        used = [kind for kind, rate in kinds.rate.items() if rate]
        assert {"affine", "noise"} <= set(used) and ("shift" in used) == (len(config.data.modalities) > 1), name
        assert all(any(augment.applies(kind, rule) for rule in kinds.rules) for kind in used), name
