from __future__ import annotations

import pytest
import torch
from method_nets import applied_to, watch
from torch import nn

from torchdrop.app.errors import UserError
from torchdrop.app.methods import METHODS
from torchdrop.app.models import CifarResNet


def test_dropout_goes_in_front_of_the_last_linear():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 50), nn.Linear(50, 3)

        def forward(self, x):
            self.hidden = self.first(x)
            return self.last(self.hidden)

    model, applied = applied_to("dropout", 0.4, Net())
    seen = []
    model.last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    model.train()(torch.randn(100, 4))
    dropped = seen[0] == 0
    torch.testing.assert_close(seen[0][~dropped], (model.hidden / 0.6)[~dropped])
    assert applied.observed() == pytest.approx(float(dropped.float().mean()))
    model.eval()(torch.randn(100, 4))
    assert torch.equal(seen[1], model.hidden)


def test_dropout_does_not_count_what_was_zero_before():
    model, applied = applied_to("dropout", 0.5, nn.Linear(2, 1))
    torch.manual_seed(0)
    x = torch.ones(2000, 2)
    x[:, 0] = 0
    model.train()(x)
    assert applied.observed() == pytest.approx(0.5, abs=0.05)


def test_dropout_without_a_linear_is_refused():
    with pytest.raises(UserError, match=r"last nn\.Linear .* has none; leave dropout out"):
        METHODS["dropout"].build(nn.Conv2d(1, 1, 1), 0.5)


def test_dropout_skips_the_projection_inside_attention():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    METHODS["dropout"].build(model, 0.5)
    assert model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "side"), [("dropout_before_bn", "in"), ("dropout_after_bn", "out")]
)
def test_dropout_stands_next_to_the_last_batch_norm(name, side):
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1)
    last = model.layer3[-1].bn2
    before = watch(last, side)
    model, applied = applied_to(name, 0.4, model)
    after = watch(last, side)
    model.train()(torch.randn(50, 1, 8, 8))
    dropped = after[0] == 0
    assert applied.observed() == pytest.approx(float(dropped.float().mean()), abs=1e-6)
    assert float(dropped.float().mean()) == pytest.approx(0.4, abs=0.02)
    torch.testing.assert_close(after[0][~dropped], before[0][~dropped] / 0.6)
    other = watch(last, "out" if side == "in" else "in")
    model(torch.randn(50, 1, 8, 8))
    assert not (other[0] == 0).any()


@pytest.mark.parametrize("name", ["dropout_before_bn", "dropout_after_bn"])
def test_dropout_without_a_batch_norm_is_refused(name):
    with pytest.raises(UserError, match=rf"last BatchNorm .* has none; leave {name} out of --meth"):
        METHODS[name].build(nn.Sequential(nn.Conv2d(1, 1, 1)), 0.5)
