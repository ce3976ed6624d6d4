"""A small residual network, and which of its rows were kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import torchdrop


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.act = nn.Tanh()
        self.b = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))


def net(depth: int = 3, width: int = 6, block: type[nn.Module] = Block) -> nn.Sequential:
    return nn.Sequential(*(block(width) for _ in range(depth)))


def kept_mask(plan: torchdrop.Plan, name: str, batch: int) -> Tensor:
    mask = torch.zeros(batch, dtype=torch.float64)
    mask[plan.last_kept()[name]] = 1.0
    return mask


class Auxiliary(nn.Module):
    """A head for training alone, and one that is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.extra, self.never = (nn.BatchNorm1d(2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.extra(x)
        out: Tensor = self.main(x)
        return out
