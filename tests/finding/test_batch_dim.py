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
