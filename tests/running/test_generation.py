"""Calls in training mode that only generate: with a key/value cache and without gradients.

tests/zoo/test_transformers.py has the same with models of transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop

NOTHING_IS_DROPPED = r"nothing is dropped in such calls.*torchdrop\.paused\(model\)"


class Layer(nn.Module):
    """Keeps what it has seen in a list that its caller owns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, kv_cache: Any = None) -> Tensor:
        seen = x
        if kv_cache is not None:
            kv_cache.append(x)
            seen = torch.stack(list(kv_cache)).mean(0)
        return x + self.fc2(torch.tanh(self.fc1(seen)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, caches: Any = (None, None)) -> Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, kv_cache=cache)
        return x


def filled(x: Tensor) -> list[list[Tensor]]:
    return [[x], [x]]


def test_a_list_that_is_named_as_a_cache_is_left_alone() -> None:
    model, x = Net(), torch.randn(4, 4)
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform")
    mine, theirs = filled(x), filled(x)
    with torch.no_grad(), pytest.warns(UserWarning, match=NOTHING_IS_DROPPED):
        out = model(x, mine)
    torch.testing.assert_close(out, dense(x, theirs))
    assert [len(cache) for cache in mine] == [2, 2]


@pytest.mark.parametrize("grad", [True, False])
def test_calls_without_a_cache_are_dropped_with_and_without_gradients(grad: bool) -> None:
    model, x = Net(), torch.randn(4, 4)
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), x)


class Rotates(nn.Module):
    """An argument whose name holds "cache" but is a table of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, rope_cache: tuple[Tensor, Tensor]) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x * rope_cache[0] + rope_cache[1])))


class NetThatRotates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Rotates() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.ones(4), torch.zeros(4)
        for layer in self.layers:
            x = layer(x, table)
        return x


def test_a_table_that_is_named_after_a_cache_is_none() -> None:
    model, x = NetThatRotates(), torch.randn(4, 4)
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform", example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), x)
