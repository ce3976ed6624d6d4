from __future__ import annotations

import pytest
import torch
from method_nets import applied_to, small_vit, watch
from torch import nn

from torchdrop.app.errors import UserError
from torchdrop.app.methods import METHODS, block_outputs
from torchdrop.app.models import CifarResNet
from torchdrop.functional import drop_block_gamma

NOISE = ("gaussian_dropout", "uniform_dropout")
BEHIND_BLOCKS = ("drop_block", "spatial_dropout", *NOISE)


@pytest.mark.parametrize("name", BEHIND_BLOCKS)
def test_the_deeper_half_of_the_blocks_is_changed(name):
    model = CifarResNet(20, 10, 1)
    x = torch.randn(8, 1, 8, 8)
    blocks = [*model.layer1, *model.layer2, *model.layer3]
    seen = [watch(block, "out") for block in blocks]  # before the method changes it
    applied_to(name, 0.5, model)
    changed = [watch(block, "out") for block in blocks]
    model.train()(x)
    differ = [not torch.equal(a[0], b[0]) for a, b in zip(seen, changed, strict=True)]
    assert differ == [False] * 4 + [True] * 5
    model.eval()(x)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(seen, changed, strict=True))


@pytest.mark.parametrize("name", BEHIND_BLOCKS)
def test_a_network_without_residual_blocks_is_refused_by_each(name):
    with pytest.raises(UserError, match=rf"this one has none .* leave {name} out of --methods$"):
        METHODS[name].build(nn.Sequential(nn.Conv2d(1, 1, 1)), 0.5)


@pytest.mark.parametrize("side", [14, 8, 7, 4, 2, 1])
def test_blocks_are_half_a_map_and_one_at_most_seven(side, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        block_outputs.functional,
        "drop_block2d",
        lambda x, p, size, training: sizes.append(size) or x,
    )
    model, _ = applied_to("drop_block", 0.1)
    model.layer3[0](torch.randn(2, 32, 2 * side, 2 * side))
    assert sizes == [(min(side // 2 + 1, 7),) * 2]
    assert 0 < drop_block_gamma((side, side), sizes[0], 0.1) <= 0.1


def test_drop_block_drops_blocks():
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1)
    before = watch(model.layer3[0], "out")
    applied_to("drop_block", 0.3, model)
    after = watch(model.layer3[0], "out")
    model.train()(torch.randn(50, 1, 8, 8))
    dropped = (before[0] != 0) & (after[0] == 0)
    # Maps of 2x2 and blocks of 2x2: a map is dropped whole, or not at all.
    maps = dropped.flatten(2).any(-1)
    assert float(maps.float().mean()) == pytest.approx(0.3, abs=0.05)
    assert not after[0].flatten(2)[maps].any()


def test_channels_are_where_the_blocks_have_them():
    """Dimension 1 behind convolutions; the last one of tokens, where DropBlock has no place."""
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1)
    METHODS["spatial_dropout"].build(model, 0.5)
    maps = watch(model.layer3[0], "out")
    model.train()(torch.rand(8, 1, 16, 16))
    gone = (maps[0] == 0).flatten(2).all(-1)
    assert 0.3 < float(gone.float().mean()) < 0.9

    vit = small_vit()
    METHODS["spatial_dropout"].build(vit, 0.5)
    tokens = watch(vit.encoder.layers[-1], "out")
    vit.train()(torch.randn(8, 3, 32, 32))
    gone = (tokens[0] == 0).all(1)
    assert gone.shape == (8, 48)
    assert float(gone.float().mean()) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UserError, match="with a convolution, and this network has none in its"):
        METHODS["drop_block"].build(small_vit(), 0.5)


def test_drop_block_behind_blocks_without_maps_says_so():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.fc(self.bn(x).relu())

    model, _ = applied_to("drop_block", 0.5, nn.Sequential(Block(), Block()))
    with pytest.raises(UserError, match=r"drop_block needs maps, .* but got \(3, 4\); leave"):
        model(torch.randn(3, 4))


def test_noise_has_the_variance_asked_for():
    for name, variance in (("gaussian_dropout", 1.0), ("uniform_dropout", 0.25 / 3)):
        torch.manual_seed(0)
        model = CifarResNet(8, 10, 1)
        seen = watch(model.layer3[0], "out")
        model, applied = applied_to(name, 0.5, model)
        noisy = watch(model.layer3[0], "out")
        with torch.no_grad():
            model.train()(torch.randn(200, 1, 8, 8))
        kept = seen[0] != 0
        factor = noisy[0][kept] / seen[0][kept]
        assert float(factor.mean()) == pytest.approx(1, abs=0.02)
        assert float(factor.var()) == pytest.approx(variance, rel=0.05)
        # Nothing is dropped, and no drop rate is made up.
        assert (applied.asked, applied.observed()) == (None, None)


def test_gaussian_noise_of_infinite_variance_is_refused():
    with pytest.raises(UserError, match="gaussian_dropout: p has to be below 1"):
        METHODS["gaussian_dropout"].build(CifarResNet(8), 1.0)
