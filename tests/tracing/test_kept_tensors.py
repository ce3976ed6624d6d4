"""A tensor from somebody's table is used while it is kept there, and no longer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.tracing.kept_tensors import Constant

W = 4
TABLES: dict[str, Any] = {}
LISTED: list[Tensor] = []


class Holder:
    scale: Tensor


HOLDER = Holder()


@lru_cache
def cached(size: int) -> Tensor:
    return torch.linspace(1.0, 2.0, size)


def from_cell() -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    kept = torch.ones(W)

    def get() -> Tensor:
        return kept

    def put(value: Tensor) -> None:
        nonlocal kept
        kept = value

    return get, put


GET, PUT = from_cell()

# How the forward gets the tensor, and how somebody puts another one in its place.
PLACES: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Any]]] = {
    "dict": (lambda: TABLES["scale"], lambda value: TABLES.update(scale=value)),
    "tuple in a dict": (lambda: TABLES["both"][0], lambda value: TABLES.update(both=(value, 1))),
    "list": (lambda: LISTED[0], lambda value: LISTED.__setitem__(slice(None), [value])),
    "object": (lambda: HOLDER.scale, lambda value: setattr(HOLDER, "scale", value)),
    "closure": (GET, PUT),
}


class Block(nn.Module):
    def __init__(self, get: Callable[[], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(W, W), nn.Linear(W, W)
        self.get = get

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x))) * self.get()


def stack(get: Callable[[], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(get), Block(get))


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_another_tensor_in_the_table_is_seen(place: str, example: bool) -> None:
    get, put = PLACES[place]
    put(torch.full((W,), 2.0))
    model, x = stack(get), torch.randn(8, W)
    dense = copy.deepcopy(model)
    given = {"example_inputs": x} if example else {}
    torchdrop.add_stochastic_depth(model, 1e-12, **given)
    for value in (2.0, 3.0, 5.0):
        put(torch.full((W,), value))
        for _ in range(2):
            torch.testing.assert_close(model(x), dense(x), rtol=0, atol=0)
    for factor in (2.0, 3.0):  # written into, it is the same tensor
        get().mul_(factor)
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=0)


def test_without_that_look_an_old_tensor_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the test above can fail."""
    monkeypatch.setattr(Constant, "is_current", lambda self: True)
    TABLES["scale"] = torch.full((W,), 2.0)
    model, x = stack(PLACES["dict"][0]), torch.randn(8, W)
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, 1e-12)
    assert torch.equal(model(x), dense(x))
    TABLES["scale"] = torch.full((W,), 3.0)
    assert not torch.equal(model(x), dense(x))


@pytest.mark.parametrize("place", [*PLACES, "lru_cache"])
def test_a_table_that_stays_is_read_once(place: str) -> None:
    if place in PLACES:
        get, put = PLACES[place]
        put(torch.full((W,), 2.0))
    else:
        get = lambda: cached(W)  # noqa: E731
    model, x = stack(get), torch.randn(8, W)
    torchdrop.add_stochastic_depth(model, 1e-12)
    for _ in range(5):
        model(x)
    assert len(model[0].__dict__["forward"].train) == 1


def function_of_module() -> Tensor:
    return cached(W)


def test_a_pickled_model_looks_into_the_tables_of_its_process() -> None:
    model, x = stack(function_of_module), torch.randn(8, W)
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, 1e-12)
    model(x)
    loaded = pickle.loads(pickle.dumps(model))
    cached.cache_clear()
    cached(W).mul_(2.0)
    assert torch.equal(loaded(x), dense(x))
    cached.cache_clear()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor, by: Holder) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x))) * by.scale


class ScaledNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scaled(), Scaled()])

    def forward(self, x: Tensor, by: Holder) -> Tensor:
        for block in self.blocks:
            x = block(x, by)
        return x


def test_a_tensor_in_an_object_that_is_an_argument_is_that_of_the_call() -> None:
    model, x = ScaledNet(), torch.randn(8, W)
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, 1e-12)
    one, other = Holder(), Holder()
    for by in (one, one, other):
        by.scale = torch.rand(W)
        torch.testing.assert_close(model(x, by), dense(x, by), rtol=0, atol=0)
