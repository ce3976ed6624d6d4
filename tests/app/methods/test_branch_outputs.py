from __future__ import annotations

import pytest
import torch
import torchvision
from method_nets import applied_to, small_vit, watch
from torch import nn

import torchdrop
from torchdrop.app.errors import UserError
from torchdrop.app.methods import METHODS
from torchdrop.app.models import CifarResNet


def test_shake_drop_shakes_each_branch_with_a_rate_that_grows():
    torch.manual_seed(0)
    model, applied = applied_to("shake_drop", 0.6)
    assert [hook.change.keywords["p"] for hook in applied.hooks] == pytest.approx([0.2, 0.4, 0.6])
    assert applied.asked == pytest.approx(0.4)
    with torch.no_grad():
        for _ in range(40):
            model.train()(torch.randn(50, 1, 8, 8))
    observed = [hook.observed() for hook in applied.hooks]
    assert observed == pytest.approx([0.2, 0.4, 0.6], abs=0.04)


def test_shake_drop_multiplies_the_branch_and_not_the_sum():
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1)
    block = model.layer3[-1]
    dense = watch(block.bn2, "out")  # before the method changes it
    applied_to("shake_drop", 0.9, model)
    branch, skip, out = (watch(m, "out") for m in (block.bn2, block.shortcut, block))
    model.eval()(torch.randn(4, 1, 8, 8))
    torch.testing.assert_close(branch[0], 0.1 * dense[0])  # the expectation
    torch.testing.assert_close(out[0], torch.relu(branch[0] + skip[0]))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "vit"])
def test_shake_drop_finds_the_branches_of_torchvision_models(name):
    model = small_vit() if name == "vit" else torchvision.models.get_model(name, weights=None)
    branches = [b for block in torchdrop.find_residuals(model) for b in block.branches]
    applied = METHODS["shake_drop"].build(model, 0.5)
    assert len(applied.hooks) == len(branches)


def test_shake_drop_on_a_branch_that_is_no_module_s_output_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + torch.relu(self.fc(x))

    with pytest.raises(
        UserError,
        match=r"branch 0 does not end in a module that is called only there; leave shake_drop out",
    ):
        METHODS["shake_drop"].build(nn.Sequential(Block(), Block()), 0.5)


def test_shake_drop_on_a_module_that_is_called_twice_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.1)

        def forward(self, x):
            x = x + self.last(torch.relu(self.one(x)))
            return x + self.last(torch.relu(self.two(x)))

    with pytest.raises(
        UserError, match=r"branch 0:one does not end in a module that is called only there; leave"
    ):
        METHODS["shake_drop"].build(nn.Sequential(Block(), Block()), 0.5)
