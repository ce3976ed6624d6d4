"""The batch dimension of a residual, as the layers around it tell it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from written_blocks import against_mask
from zoo import BARELY, assert_same


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_transformer_layers_of_torch(norm_first: bool, batch_first: bool) -> None:
    options: dict[str, Any] = {"batch_first": batch_first, "norm_first": norm_first}
    dim = 0 if batch_first else 1
    shape = (6, 5, 8) if batch_first else (5, 6, 8)
    x, memory = torch.randn(shape).double(), torch.randn(shape).double()
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, **options), 2, enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, 0.0, **options), 2)
    models: list[tuple[nn.Module, tuple[Tensor, ...], int]] = [
        (encoder, (x,), 2),
        (decoder, (x, memory), 3),
    ]
    for model, inputs, branches in models:
        model.double()
        dense = copy.deepcopy(model)
        plan = torchdrop.add_stochastic_depth(model, 0.5, batch_dim=dim, example_inputs=inputs)
        assert [[b.action for b in r.branches] for r in plan.blocks] == [["skip"] * branches] * 2
        plan.set_p([BARELY, BARELY])
        assert_same(model(*inputs), dense(*inputs))
        assert_same(model.eval()(*inputs), dense.eval()(*inputs))
        against_mask(model.train(), inputs, plan, dim)


class AroundAttention(nn.Module):
    """Self-attention that returns one tensor; it may move the batch to another dimension."""

    def __init__(self, batch_first: bool, moves: bool) -> None:
        super().__init__()
        self.attn, self.moves = nn.MultiheadAttention(8, 2, batch_first=batch_first), moves

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.moves:
            x = x.transpose(0, 1)
        x = self.attn(x, x, x, attn_mask=mask, need_weights=False)[0]
        return x.transpose(0, 1) if self.moves else x


class WrappedLayer(nn.Module):
    def __init__(self, batch_first: bool, moves: bool, wraps: int) -> None:
        super().__init__()
        attn: nn.Module = AroundAttention(batch_first, moves)
        for _ in range(wraps):
            attn = nn.Sequential(nn.LayerNorm(8), attn)
        self.attn, self.mlp = attn, nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


@pytest.mark.parametrize("wraps", [0, 1, 2])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_attention_inside_a_child_tells_the_batch_dimension(
    batch_first: bool, wraps: int
) -> None:
    model = nn.Sequential(*(WrappedLayer(batch_first, False, wraps) for _ in range(2))).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    x = torch.randn((6, 5, 8) if batch_first else (5, 6, 8)).double()
    model(x)  # nothing is masked: the warning about dependent rows would be an error
    assert [b.action for r in plan.blocks for b in r.branches] == ["skip"] * 4
    against_mask(model, (x,), plan, 0 if batch_first else 1)


def test_an_attention_inside_a_child_that_moves_the_batch_tells_nothing() -> None:
    model = nn.Sequential(*(WrappedLayer(False, True, 0) for _ in range(2))).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    x = torch.randn(6, 5, 8).double()
    model(x)
    assert [b.action for r in plan.blocks for b in r.branches] == ["skip"] * 4
    against_mask(model, (x,), plan, 0)
