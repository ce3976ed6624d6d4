from __future__ import annotations

import copy
import dataclasses
import io
import re
import signal

import pytest
import torch
from rich.console import Console
from torch import nn

from torchdrop.app import training
from torchdrop.app.data import open_source
from torchdrop.app.methods import METHODS
from torchdrop.app.models import CifarResNet
from torchdrop.app.recipe import Recipe, preset
from torchdrop.app.training import Run, evaluate, loss_of, make_optimizer, mean_observed, train

RECIPE = Recipe(epochs=4, phases=((0, 0.05), (2, 0.01)), batch_size=20)


@pytest.fixture(scope="module")
def source():
    return open_source("digits", test_size=100)


def _run(source, folder, method="stochastic_depth_row", **changes):
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1)
    recipe = changes.pop("recipe", RECIPE)
    return Run(
        label="",
        model=model,
        channels=1,
        applied=METHODS[method].build(model, changes.pop("p", 0.5)),
        data=source.draw(0, 60, changes.pop("val_size", 0)),
        recipe=recipe,
        seed=0,
        folder=folder,
        accelerator="cpu",
        show=False,
        **changes,
    )


class _Stop(training.Observer):
    """The observer, and the user who presses Ctrl-C at the end of an epoch."""

    at = 0

    def on_train_epoch_start(self, trainer, task):
        if trainer.current_epoch == self.at:
            raise KeyboardInterrupt
        super().on_train_epoch_start(trainer, task)


def test_training_lowers_the_loss_and_keeps_a_history(source, tmp_path):
    run = _run(source, tmp_path, "none")
    history = train(run)
    assert len(history.train_loss) == 4
    assert history.train_loss[-1] < history.train_loss[0]
    assert history.test_epoch == [1, 2, 3, 4]
    assert history.test_error[-1] == evaluate(run.model, run.data.test, run.data, 1).error
    assert mean_observed(history) is None
    # What it hands over, until that is in the results; nothing half written.
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.pt"]


def test_the_same_seed_gives_the_same_figures(source, tmp_path):
    first, again = (_run(source, tmp_path) for _ in range(2))
    assert train(first) == train(again)
    _assert_equal(first.model, again.model)


def test_the_history_has_the_delivered_drop_rate_of_each_epoch(source, tmp_path):
    run = _run(source, tmp_path, p=0.6)
    history = train(run)
    assert len(history.observed) == 4
    assert mean_observed(history) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(
    "method", ["stochastic_depth_row", "subsample", "dropout", "shake_drop", "cutout"]
)
def test_an_interrupted_run_ends_like_one_that_was_not(source, tmp_path, monkeypatch, method):
    whole = _run(source, tmp_path / "whole", method)
    expected = train(whole)
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(training, "Observer", _Stop)
    monkeypatch.setattr(_Stop, "at", 2)
    with pytest.raises(KeyboardInterrupt):
        train(_run(source, tmp_path / "part", method, checkpoint_seconds=0.0))
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    resumed = _run(source, tmp_path / "part", method)
    seen = []
    monkeypatch.setattr(
        training, "loss_of", lambda model, x, y: seen.append(len(y)) or loss_of(model, x, y)
    )
    assert train(resumed, resume=True) == expected
    assert len(seen) == 2 * 3  # two epochs of three batches were left
    _assert_equal(resumed.model, whole.model)


def _assert_equal(first, second):
    wanted = second.state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(value, wanted[key]), key


def test_the_learning_rate_of_each_epoch_is_the_recipe_s(source, tmp_path, monkeypatch):
    seen = []

    class Watch(training.Observer):
        def on_train_batch_end(self, trainer, *args):
            seen.append((trainer.current_epoch, trainer.optimizers[0].param_groups[0]["lr"]))
            super().on_train_batch_end(trainer, *args)

    monkeypatch.setattr(training, "Observer", Watch)
    recipe = preset("paper-cifar10").recipe.with_epochs(4)
    train(_run(source, tmp_path, "none", recipe=recipe, val_size=20))
    # 60 images in batches of 128: a step an epoch.
    assert seen == [(0, 0.1), (1, 0.1), (2, 0.01), (3, 0.001)]


def test_the_optimizer_is_the_paper_s():
    optimizer = make_optimizer(nn.Linear(2, 2), preset("paper-cifar10").recipe)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["dampening"]) == (0.1, 0.9, 0.0)
    assert (group["nesterov"], group["weight_decay"]) == (True, 1e-4)
    assert len(group["params"]) == 2


def test_the_epoch_of_lowest_validation_error_is_what_is_reported(source, tmp_path, monkeypatch):
    run = _run(
        source,
        tmp_path,
        "none",
        recipe=Recipe(5, ((0, 0.05),), 20, select="best_validation"),
        val_size=40,
    )
    weights = []
    errors = iter([0.5, 0.2, 0.4, 0.2, 0.3])  # the first of the two lowest counts

    def scripted(model, images, *args):
        scores = evaluate(model, images, *args)
        if images is run.data.val:
            weights.append(copy.deepcopy(model.state_dict()))
            return training.Scores(next(errors), scores.nll)
        return scores

    monkeypatch.setattr(training, "evaluate", scripted)
    history = train(run)
    assert history.best_epoch == 2
    assert history.val_error == [0.5, 0.2, 0.4, 0.2, 0.3]
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, weights[1][key]), key
    assert evaluate(run.model, run.data.test, run.data, 1).error == history.test_error[1]


def test_all_methods_see_the_same_images_in_the_same_order(source, tmp_path, monkeypatch):
    seen = {}
    for method in ("none", "stochastic_depth_row", "stochastic_depth_batch", "dropout"):
        labels = seen[method] = []

        def watch(model, x, y, labels=labels):
            labels.append(y.tolist())
            return loss_of(model, x, y)

        monkeypatch.setattr(training, "loss_of", watch)
        train(_run(source, tmp_path, method))
    assert all(labels == seen["none"] for labels in seen.values())
    assert seen["none"][:3] != seen["none"][3:6]


def test_evaluation_leaves_every_mode_as_it_was(source):
    model = CifarResNet(8, 10, 1).train()
    model.bn1.eval()
    data = source.draw(0, 60)
    evaluate(model, data.test, data, 1)
    assert model.training
    assert not model.bn1.training


def test_progress_shows_method_seed_epoch_loss_and_time_left(source, tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        training, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100)
    )
    monkeypatch.setattr(training, "SHOW_SECONDS", 0.0)
    run = _run(source, tmp_path, "none", total=8, done=4)
    train(dataclasses.replace(run, label="none  seed 0", show=True))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert re.search(r"none  seed 0  epoch \d/4  loss \d\.\d{3} +\S* +\d+ %  left +\S+", shown)
    assert "100 %" in shown


def test_two_devices_share_the_batches(source, tmp_path):
    """Two processes with gloo. Without BatchNorm's statistics they train like one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data = source.draw(0, 60)
    recipe = Recipe(2, ((0, 0.01),), 20)

    def run(devices):
        net = copy.deepcopy(model)
        applied = METHODS["none"].build(net, 0.0)
        history = train(
            Run("", net, 1, applied, data, recipe, 0, tmp_path, devices, "cpu", show=False)
        )
        return net, history

    (one, alone), (two, shared) = run(1), run(2)
    assert shared.train_loss == pytest.approx(alone.train_loss, rel=1e-5)
    torch.testing.assert_close(two[1].weight, one[1].weight)
