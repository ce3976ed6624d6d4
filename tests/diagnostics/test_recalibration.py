"""Recalibration: running statistics are the means over batches, without noise."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchdrop
from small_nets import Auxiliary
from torchdrop.app.models import CifarResNet
from torchdrop.diagnostics import recalibrate_batch_norm, variance_shift

ERRORS = 5.0  # how many standard errors a figure may be off its closed form
APART = 10.0  # and how many at least it has to be off a wrong one


class Cumulative(nn.Module):
    """Dropout of all kinds in front of BatchNorm."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.first = nn.BatchNorm1d(3, momentum=0.3)
        self.second = nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.first(F.dropout(self.drop(x), 0.5, self.training))
        return self.second(x.relu())


def test_recalibration_is_the_mean_over_batches_without_noise():
    model = Cumulative().double()
    x = torch.randn(5, 20, 3, dtype=torch.float64) + 1
    assert recalibrate_batch_norm(model, list(x)) == ["first", "second"]
    hidden = torch.stack([((b - b.mean(0)) / (b.var(0, correction=0) + 1e-5) ** 0.5) for b in x])
    for layer, values in ((model.first, x), (model.second, hidden.relu())):
        torch.testing.assert_close(layer.running_mean, values.mean(1).mean(0))
        torch.testing.assert_close(layer.running_var, values.var(1).mean(0))
        assert layer.num_batches_tracked == 5
    assert (model.first.momentum, model.second.momentum) == (0.3, 0.1)
    # the twin: with the noise of training on, the variance is another
    twin = copy.deepcopy(model).train()
    twin.first.momentum = None
    twin.first.reset_running_stats()
    for batch in x:
        twin(batch)
    assert (twin.first.running_var > 1.5 * model.first.running_var).all()


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("scale", ["train", "eval"])
def test_recalibration_runs_stochastic_depth_as_in_evaluation(mode, scale):
    x = [torch.randn(16, 1, 8, 8) for _ in range(3)]
    model = CifarResNet(8, 10, 1)
    torchdrop.add_stochastic_depth(model, 0.9, schedule="uniform", mode=mode, scale=scale)
    recalibrate_batch_norm(model, x)
    found = {layer.name: layer for layer in variance_shift(model, x)}
    # in evaluation each BatchNorm divides by what it finds there, but for its rounding
    assert found["bn1"].running_ratio == pytest.approx(1.0, rel=1e-3)
    for name in ("layer1.0.bn1", "layer2.0.bn1", "layer3.0.bn2"):
        assert found[name].running_ratio == pytest.approx(1.0, rel=0.15)


def test_a_layer_that_is_not_reached_keeps_its_statistics():
    model = Auxiliary()
    model.never.running_mean.fill_(7.0)
    assert recalibrate_batch_norm(model, [torch.randn(10, 2)]) == ["main"]
    assert model.never.running_mean.tolist() == [7.0, 7.0]
    assert model.extra.num_batches_tracked == 0


def test_a_batch_of_one_value_is_refused_and_nothing_changes():
    model = nn.Sequential(nn.BatchNorm1d(2))
    x = torch.randn(10, 2)
    model(x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate_batch_norm(model, [x, x[:1]])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model[0].momentum == 0.1
