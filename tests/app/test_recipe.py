from __future__ import annotations

import pytest

from torchdrop.app.recipe import PRESETS, default_recipe, preset


def test_the_paper_trains_500_epochs_and_divides_by_ten_twice():
    paper = preset("paper-cifar10")
    rates = [paper.recipe.learning_rate(epoch) for epoch in range(500)]
    assert paper.recipe.epochs == 500
    assert rates == [0.1] * 250 + [0.01] * 125 + [0.001] * 125


def test_the_paper_trains_1202_layers_by_a_recipe_of_its_own():
    paper = preset("paper-cifar10", "resnet-1202")
    rates = [paper.recipe.learning_rate(epoch) for epoch in range(300)]
    assert (paper.model, paper.recipe.epochs) == ("resnet-1202", 300)
    assert rates == [0.01] * 10 + [0.1] * 140 + [0.01] * 75 + [0.001] * 75


def test_the_rest_of_the_paper():
    paper = PRESETS["paper-cifar10"]
    recipe = paper.recipe
    assert (paper.model, paper.data) == ("resnet-110", "torchvision:CIFAR10")
    assert (paper.train_size, paper.val_size) == (45_000, 5_000)
    assert paper.methods == {"none": None, "stochastic_depth_batch": 0.5}
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay) == (128, 0.9, 1e-4)
    assert (recipe.augment, recipe.select) == ("flip-shift", "best_validation")


def test_other_lengths_keep_the_share_of_each_phase():
    recipe = preset("paper-cifar10").recipe.with_epochs(20)
    assert [recipe.learning_rate(epoch) for epoch in range(20)] == (
        [0.1] * 10 + [0.01] * 5 + [0.001] * 5
    )


@pytest.mark.parametrize("model", ["resnet-110", "resnet-1202"])
@pytest.mark.parametrize("rates", [[0.1], [0.1, 0.01], [0.1, 0.1, 0.001]])
def test_very_short_runs_begin_at_the_highest_learning_rate(model, rates):
    recipe = preset("paper-cifar10", model).recipe.with_epochs(len(rates))
    assert recipe.epochs == len(rates)
    assert [recipe.learning_rate(epoch) for epoch in range(len(rates))] == rates


def test_another_learning_rate_keeps_the_ratios():
    recipe = preset("paper-cifar10", "resnet-1202").recipe.with_learning_rate(0.2)
    rates = [recipe.learning_rate(epoch) for epoch in (0, 10, 150, 225)]
    assert rates == pytest.approx([0.02, 0.2, 0.02, 0.002])


def test_the_default_is_the_paper_in_proportion():
    recipe = default_recipe()
    highest = recipe.learning_rate(0)
    assert recipe.learning_rate(recipe.epochs // 2) == pytest.approx(highest / 10)
    assert recipe.learning_rate(recipe.epochs - 1) == pytest.approx(highest / 100)
