"""With an example, the inputs of a branch are known to carry the batch, or not to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchdrop
from written_blocks import W, against_mask, conv, mlp


class Conditioned(nn.Module):
    """A U-Net's block: a time embedding is added inside the branch."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.time = nn.Linear(W, out)
        self.norm1, self.norm2 = nn.GroupNorm(2, width), nn.GroupNorm(2, out)
        self.conv1, self.conv2 = conv(width, out), conv(out, out)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time(F.silu(t))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(y))) + self.shortcut(x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, W), nn.SiLU(), nn.Linear(W, W))
        self.down1, self.down2 = Conditioned(4, 4), Conditioned(4, 8)
        self.middle = Conditioned(8, 8)
        self.up = Conditioned(12, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.embed(t[:, None])
        one = self.down1(x, t)
        low = self.middle(self.down2(F.avg_pool2d(one, 2), t), t=t)
        return self.up(torch.cat([F.interpolate(low, scale_factor=2.0), one], 1), t)


class Attention(nn.Module):
    """A block with a mask for all samples or one for each, and rotary angles in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(W, 3 * W), nn.Linear(W, W), nn.LayerNorm(W)
        self.f = mlp()

    def forward(self, x: Tensor, mask: Tensor | None, *, angles: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        cos, sin = angles
        q, k = q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin
        scores = q @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask
        x = x + self.out(scores.softmax(-1) @ v)
        return x + self.f(x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        steps = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        for layer in self.layers:
            x = layer(x, mask, angles=(steps.cos(), steps.sin()))
        return x


@pytest.mark.parametrize("batch", [1, 6])
def test_a_unet_with_a_time_embedding(batch: int) -> None:
    inputs = torch.randn(6, 4, 8, 8).double(), torch.rand(6).double()
    model = UNet().double()
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert {b.action for r in plan.blocks for b in r.branches} == {"mask"}
    assert "(t, x), and which of them carry the batch is not known" in repr(plan)
    torchdrop.remove_stochastic_depth(model)
    example = tuple(t[:batch] for t in inputs)
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=example)
    assert [r.action for r in plan.blocks] == ["skip"] * 4
    assert [r.shortcut for r in plan.blocks] == ["identity", "projection", "identity", "projection"]
    against_mask(model, inputs, plan)


@pytest.mark.parametrize("kind", ["none", "shared", "own", "one of a batch"])
def test_a_size_that_happens_to_match_decides_nothing(kind: str) -> None:
    batch = tokens = 6
    x = torch.randn(batch, tokens, W).double()
    mask = {
        "none": None,
        "shared": torch.randn(tokens, tokens).double(),
        "own": torch.randn(batch, tokens, tokens).double(),
        "one of a batch": torch.randn(1, tokens, tokens).double(),
    }[kind]
    model = Encoder().double()
    inputs = (x,) if mask is None else (x, mask)
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=inputs)
    assert {b.action for r in plan.blocks for b in r.branches} == {"skip"}
    against_mask(model, inputs, plan)
