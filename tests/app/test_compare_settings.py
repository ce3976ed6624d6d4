from __future__ import annotations

import pytest

from torchdrop.app.compare_settings import DEFAULT_METHODS, Settings, config_of, set_up
from torchdrop.app.methods import METHODS


def test_the_default_list_is_as_long_as_it_was(tmp_path):
    setup = set_up(Settings(out=tmp_path))
    assert setup.methods == list(METHODS)[:6] == list(DEFAULT_METHODS)
    assert setup.left_out == []


@pytest.mark.parametrize(
    ("asked", "threads"),
    [({}, 1), ({"model": "resnet-56"}, None), ({"data": "mnist5k"}, None), ({"threads": 3}, 3)],
)
def test_the_embedded_run_takes_one_thread(tmp_path, asked, threads):
    settings = Settings(out=tmp_path, **asked)
    assert config_of(settings, set_up(settings))["threads"] == threads


def test_the_paper_s_preset_is_the_paper_s_recipe(tmp_path):
    settings = Settings(out=tmp_path, preset="paper-cifar10")
    setup = set_up(settings)
    config = config_of(settings, setup)
    assert config["model"] == "resnet-110"
    assert config["data"] == "torchvision:CIFAR10"
    assert (config["train_size"], config["val_size"]) == (45_000, 5_000)
    assert config["methods"] == {"none": None, "stochastic_depth_batch": 0.5}
    assert config["recipe"] == {
        "epochs": 500,
        "phases": ((0, 0.1), (250, 0.01), (375, 0.001)),
        "batch_size": 128,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "augment": "flip-shift",
        "select": "best_validation",
    }


def test_the_paper_s_preset_knows_its_1202_layers(tmp_path):
    setup = set_up(Settings(out=tmp_path, preset="paper-cifar10", model="resnet-1202"))
    assert setup.recipe.epochs == 300
    assert setup.recipe.learning_rate(0) == 0.01
