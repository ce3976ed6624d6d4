"""The peers that torchdrop is measured against do what they are said to do."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import ResNet

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
peers = pytest.importorskip("peers", reason="timm")

from torchdrop.app.models import CifarResNet  # noqa: E402
from torchdrop.cost import flops  # noqa: E402


def _networks():
    vit = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
    images = torch.randn(6, 3, 32, 32)
    small = peers.create_model(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(8,) * 4, ls_init_value=1.0
    )
    return {
        "vit": (peers.create_model("vit_tiny_patch16_224", **vit), images),
        "convnext": (small, images),
        "resnet50": (ResNet(peers.Bottleneck, [1, 1, 1, 1]), images),
        "cifar": (CifarResNet(8), images),
        "encoder": (peers.Encoder(tokens=5, depth=2), torch.randint(1000, (6, 5))),
    }


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("add", ["add_masks", "add_subsets"])
@pytest.mark.parametrize("name", ["vit", "convnext", "resnet50", "cifar", "encoder"])
def test_without_dropping_a_peer_is_the_network_and_with_p_1_its_skips(name, add, mode):
    model, x = _networks()[name]
    model.train()
    blocks = peers.blocks_of(model)
    assert len(blocks) in (2, 3, 4)
    dense = model(x)
    none, every = copy.deepcopy(model), copy.deepcopy(model)
    getattr(peers, add)(none, [0.0] * len(blocks), mode)
    assert torch.allclose(none(x), dense, atol=1e-5)
    getattr(peers, add)(every, [1.0] * len(blocks), mode)
    cheaper = flops(every, x) < 0.7 * flops(model, x)
    assert cheaper == (add == "add_subsets")
    assert not torch.allclose(every(x), dense, atol=1e-4)


def test_a_subset_has_the_mean_of_the_rows_that_were_asked_for():
    torch.manual_seed(0)
    x, seen = torch.ones(5, 3), []

    def branch(rows):
        seen.append(len(rows))
        return rows

    total = sum(peers.add_rows(x, 0 * x, branch, 0.3) for _ in range(2000)) / 2000
    assert set(seen) == {3, 4}  # 3.5 rows
    assert torch.allclose(total, x, atol=0.06)


def test_every_row_names_blocks_that_its_network_has():
    steps = pytest.importorskip("steps")
    for row in steps.ROWS:
        assert len(row.rates) == {"vit": 12, "conv": 12, "resnet50": 16, "resnet110": 54}.get(
            row.name.partition("-")[0].removesuffix("next"), 24
        )
        assert max(row.rates) == pytest.approx(row.p)
    assert isinstance(steps.ROWS[0].model("dense"), nn.Module)
