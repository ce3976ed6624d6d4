"""Global variables that a forward names are compared in each call, like attributes."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import torchdrop
from torchdrop.running.forward_slot import occupant_of
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.untraceable import UntraceableError
from written_blocks import Base, Stack, flat
from zoo import BARELY, assert_same

ALPHA = 1.0
SETTINGS: dict[str, Any] = {"alpha": 1.0, "nested": [1.0, {"beta": 1.0}]}
CACHE: dict[str, Tensor] = {"table": torch.ones(1)}
CALLS = 0
UNUSED = 1.0
config = ModuleType("config_of_the_tests")
config.ALPHA = 1.0  # type: ignore[attr-defined]


class Holder:
    gain = 1.0

    def __init__(self) -> None:
        self.own = 1.0

    @property
    def counted(self) -> float:
        raise AssertionError("reading a model runs no property of the user's")


HOLDER = Holder()


def helper(x: Tensor) -> Tensor:
    return x * SETTINGS["alpha"]


class Named(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * ALPHA


class Item(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * SETTINGS["alpha"]


class NestedItem(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * SETTINGS["nested"][1]["beta"]


class OfAModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * config.ALPHA  # type: ignore[attr-defined]


class OfAClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * Holder.gain


class OfAnObject(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * HOLDER.own


class InAHelper(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + helper(self.f(x))


class InAMethod(Base):
    def scaled(self, x: Tensor) -> Tensor:
        return sum(x * a for a in (ALPHA, 0.5))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scaled(self.f(x))


def set_name(value: float) -> None:
    global ALPHA
    ALPHA = value


def set_nested(value: float) -> None:
    SETTINGS["nested"][1]["beta"] = value


WAYS: list[tuple[type[Base], Callable[[float], Any]]] = [
    (Named, set_name),
    (Item, lambda value: SETTINGS.update(alpha=value)),
    (NestedItem, set_nested),
    (OfAModule, lambda value: setattr(config, "ALPHA", value)),
    (OfAClass, lambda value: setattr(Holder, "gain", value)),
    (OfAnObject, lambda value: setattr(HOLDER, "own", value)),
    (InAHelper, lambda value: SETTINGS.update(alpha=value)),
    (InAMethod, set_name),
]


@pytest.mark.parametrize(("kind", "change"), WAYS, ids=lambda found: getattr(found, "__name__", ""))
def test_a_change_is_followed_at_once_and_costs_one_reading(
    kind: type[Base], change: Callable[[float], Any]
) -> None:
    model = Stack(kind(), kind())
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    try:
        for value in (1.0, 0.25, 1.0, 0.25):
            change(value)
            x = flat()
            for ours in (model, pickle.loads(pickle.dumps(model))):
                assert_same(ours(x), dense(x))
    finally:
        change(1.0)
    assert len(occupant_of(model.blocks[0]).train) == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [Named, InAHelper])
def test_a_forward_that_watches_nothing_would_go_on_as_before(kind: type[Base]) -> None:
    model = Stack(kind(), kind())
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY], verify=False)
    for block in model.blocks:
        occupant_of(block).train[0].watched_globals = None  # type: ignore[union-attr]
    try:
        set_name(0.25), SETTINGS.update(alpha=0.25)
        x = flat()
        assert not torch.allclose(model(x), dense(x))
    finally:
        set_name(1.0), SETTINGS.update(alpha=1.0)


def test_a_variable_of_the_function_around_the_class_is_watched() -> None:
    alpha = 1.0

    class Inner(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * alpha

    model = Stack(Inner(), Inner())
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    alpha = 0.25
    x = flat()
    assert_same(model(x), dense(x))


def test_caches_and_what_is_not_named_are_not_watched() -> None:
    class Caching(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * len(CACHE)

    assert trace_block(Caching()).watched_globals is None
    block = trace_block(Named())
    assert block.watched_globals is not None
    assert [name for _, name in block.watched_globals.known] == ["ALPHA"]


def test_no_property_runs() -> None:
    class Reads(Base):
        def forward(self, x: Tensor) -> Tensor:
            if False:
                return x * HOLDER.counted
            return x + self.f(x)

    class Names(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * (HOLDER.counted if x.dim() > 9 else 1.0)

    trace_block(Reads())
    assert trace_block(Names(), arguments={"x": flat()}).watched_globals is None


def test_a_forward_that_sets_a_global_is_not_read() -> None:
    class Counts(Base):
        def forward(self, x: Tensor) -> Tensor:
            global CALLS
            CALLS += 1
            return x + self.f(x)

    with pytest.raises(UntraceableError, match="it sets the global variable CALLS"):
        trace_block(Counts())
    assert CALLS == 0


COLLECTIONS = 0


def _count_collections(phase: str, info: dict[str, int]) -> None:
    global COLLECTIONS
    COLLECTIONS += 1


def test_a_callback_of_the_garbage_collector_is_no_part_of_a_forward() -> None:
    """It runs at any time, and Python would end with a crash if it raised an error."""

    class Collects(Base):
        def forward(self, x: Tensor) -> Tensor:
            gc.collect()
            return x + self.f(x)

    before = COLLECTIONS
    gc.callbacks.append(_count_collections)
    try:
        block = trace_block(Collects())
    finally:
        gc.callbacks.remove(_count_collections)
    assert before < COLLECTIONS
    assert block.watched_globals is None  # nor are its global variables those of the forward


def test_with_a_profiler_of_somebody_else_every_mode_counts_and_the_profiler_stays() -> None:
    def profiler(*event: Any) -> None:
        pass

    sys.setprofile(profiler)
    try:
        block = trace_block(Named())
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    assert "grad" in block.asks
    assert block.watched_globals is not None
    assert trace_block(Named()).asks == ()
    assert sys.getprofile() is None


def test_a_compiled_graph_follows_the_variable() -> None:
    model = Stack(Named(), Item())
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY], select=lambda found: True)
    x = flat()
    run = torch.compile(model, fullgraph=True, backend="eager")
    try:
        for value in (1.0, 0.25, 1.0):
            set_name(value), SETTINGS.update(alpha=value)
            model(x)  # read before it is compiled
            assert_same(run(x), dense(x))
    finally:
        set_name(1.0), SETTINGS.update(alpha=1.0)
