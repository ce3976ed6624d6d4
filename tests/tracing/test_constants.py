"""What a forward computes from constants is run while it is read, and made anew in each call."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

import torchdrop
from torchdrop.tracing import block_graph
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.constants import Constant, Constants
from torchdrop.tracing.untraceable import DataDependentError, UntraceableError
from written_blocks import Base, W, flat, two
from zoo import BARELY, assert_same

TABLES: dict[Any, Tensor] = {}
COUNT = torch.zeros(1)


@lru_cache
def ramp(n: int) -> Tensor:
    table = torch.zeros(n)
    table[1:] = torch.arange(1.0, n)
    return table


@lru_cache
def noise() -> Tensor:
    return torch.randn(W)


def table(n: int) -> Tensor:
    if n not in TABLES:
        TABLES[n] = torch.cos(torch.arange(n) / n)
    return TABLES[n]


class Ramp(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * ramp(W)


class Dict(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x * table(2 * W)[::2])


class FixedNoise(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * noise()


class Method(Base):
    @lru_cache  # noqa: B019
    def mask(self, n: int) -> Tensor:
        return torch.ones(n, n).tril()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) @ self.mask(W)


class FreshNoise(Base):
    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.rand(W), torch.zeros(W).normal_()
        return x + self.f(x) * b.add(1.0) + a


class Accumulates(Base):
    def forward(self, x: Tensor) -> Tensor:
        total, marks = torch.zeros(x.shape[-1]), torch.zeros(W)
        total += x.mean()
        marks[0] = 1.0
        marks.view(2, -1)[1].fill_(2.0)
        marks[2] = x.amin()
        marks *= 2.0
        return x + self.f(x) * total + marks


class Grid(Base):
    def forward(self, x: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
        places = torch.stack([rows, columns]).flatten(1).sum(0)
        scale = 2.0 if places.max().item() == 3 and places.tolist()[0] == 0 else 1.0
        return x + self.f(x) * torch.where(places > 1, x, scale)


class Mixed(Base):
    def forward(self, x: Tensor) -> Tensor:
        lookup = torch.arange(W)
        return (
            x + self.f(x)[:, lookup] * lookup[(x * 0).long()] + torch.cat([x, torch.ones(1, W)])[1:]
        )


class Elsewhere(Base):
    """Keeps a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(2 * W)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.scale[:W].exp()


KINDS = [Ramp, Dict, FixedNoise, Method, FreshNoise, Accumulates, Grid, Mixed, Elsewhere]


def forget() -> None:
    TABLES.clear()
    for cached in (ramp, noise, Method.mask):
        cached.cache_clear()


def held() -> list[Any]:
    return [sorted(TABLES), ramp.cache_info().currsize, noise.cache_info().currsize]


@pytest.fixture(autouse=True)
def empty_caches() -> Any:
    forget()
    yield
    forget()


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not FreshNoise])
def test_with_nothing_dropped_it_is_the_dense_block(kind: type[Base], example: bool) -> None:
    torch.manual_seed(0)
    model = two(kind)()
    dense = copy.deepcopy(model)
    given = flat() if example else None
    plan = torchdrop.add_stochastic_depth(
        model, [BARELY, BARELY], example_inputs=given, verify=False
    )
    assert [b.action for b in plan.blocks] == ["skip", "skip"] or kind is Accumulates
    loaded = pickle.loads(pickle.dumps(model))
    for seed in range(3):
        x = flat()
        outs = []
        for net in (dense, model, loaded):
            torch.manual_seed(seed)
            outs.append(net(x))
        assert_same(outs[1], outs[0])
        if kind is not FixedNoise or seed:
            assert_same(outs[2], outs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_draws_and_computes_what_the_forward_does(kind: type[Base]) -> None:
    block = kind()
    graph = trace_block(block).graph
    for seed in range(2):
        x = flat()
        torch.manual_seed(seed)
        expected = block(x)
        torch.manual_seed(seed)
        assert_same(fx.Interpreter(block, graph=graph).run(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_hold_what_a_plain_call_leaves(kind: type[Base]) -> None:
    block = kind()
    block(flat())
    expected = held()
    forget()
    state = torch.get_rng_state()
    trace_block(block)
    assert torch.equal(torch.get_rng_state(), state)
    assert held() == expected
    kept = [*TABLES.values(), ramp(W), noise()]
    assert {type(t) for t in kept} == {Tensor}
    assert not any(t.is_inference() for t in kept)
    block(flat())


def test_recorded_operations_would_stay_in_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._tracer.create_proxy("call_function", func, args, kwargs or {})

    monkeypatch.setattr(Constants, "__torch_function__", record)
    monkeypatch.setattr(block_graph, "remove_stored_proxies", lambda proxies: "")
    with contextlib.suppress(UntraceableError):
        trace_block(Ramp())
    assert type(ramp(W)) is not Tensor


def test_inference_mode_leaves_tensors_for_training() -> None:
    with torch.inference_mode():
        trace_block(Dict(), training=False)
    Dict()(flat()).sum().backward()


def test_what_somebody_keeps_is_used_and_the_rest_is_made_anew() -> None:
    def constants(kind: type[Base]) -> list[Tensor | None]:
        nodes = trace_block(kind()).graph.nodes
        return [n.target.value for n in nodes if isinstance(n.target, Constant)]

    assert constants(FreshNoise) == constants(Grid) == constants(Elsewhere) == []
    (kept,) = constants(Ramp)
    assert kept is ramp(W)
    (kept,) = constants(FixedNoise)
    assert kept is noise()


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        COUNT.add_(1)
        return x + self.f(x) * COUNT


def test_a_tensor_of_others_is_written_into_in_each_call_only() -> None:
    COUNT.zero_()
    model = two(Counts)()
    torchdrop.find_residuals(model)
    assert COUNT.item() == 0
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY], verify=False)
    model(flat())
    model(flat())
    assert COUNT.item() == 4


class Coin(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if (torch.rand(2) * 2.0)[0] < 0.5 else x


class OfWeights(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * next(self.f[0].parameters()).detach().sum().item()


class FromArray(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * torch.from_numpy(np.ones(W, dtype=np.float32))


@pytest.mark.parametrize(
    ("kind", "error", "why"),
    [
        (Coin, UntraceableError, "it draws random numbers in Python"),
        (OfWeights, DataDependentError, "a value of a tensor as a Python number"),
        (FromArray, UntraceableError, "a tensor that does not come from its inputs"),
    ],
)
def test_values_that_may_change_are_not_fixed(
    kind: type[Base], error: type[Exception], why: str
) -> None:
    block, state = kind(), torch.get_rng_state()
    with pytest.raises(error, match=why):
        trace_block(block)
    assert torch.equal(torch.get_rng_state(), state)


class OwnGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * torch.rand(W, generator=self.generator)


def test_a_generator_of_the_user_does_not_move() -> None:
    block = OwnGenerator()
    state = block.generator.get_state()
    with pytest.raises(UntraceableError):
        trace_block(block)
    assert torch.equal(block.generator.get_state(), state)


def test_threads_read_at_the_same_time() -> None:
    errors: list[BaseException] = []

    def read(kind: type[Base]) -> None:
        try:
            for _ in range(3):
                trace_block(kind())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(kind,)) for kind in (Ramp, Dict, Grid, Mixed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {type(t) for t in (*TABLES.values(), ramp(W))} == {Tensor}
