"""Looking at a model leaves everything as it was, except what one plain call leaves in caches."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import torchdrop
from torchdrop.tracing import block_graph, calls_of_forward, left_behind
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.shape_facts import _RealTensorsApart
from torchdrop.tracing.untraceable import UntraceableError
from written_blocks import Base, Stack, W, flat, two

# ---------------------------------------------------------------------- buffers, hooks and lists


class Seeing(nn.Sequential):
    """A child with all that a run of it would change."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nn.Linear(W, W), nn.BatchNorm1d(W, **options), nn.Tanh())
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        self.seen.append(x)
        return x


class ShapeOfComputed(Base):
    """Asks for the shape of what a child returns, so that the child is run without data."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.h = Seeing(**options)

    def forward(self, x: Tensor) -> Tensor:
        h = self.h(x)
        return x + self.f(h.view(*h.shape[:-1], W))


def state_of(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


@pytest.mark.parametrize("options", [{}, {"momentum": None}])
def test_nothing_counts_a_run_without_data(options: dict[str, Any]) -> None:
    model = Stack(ShapeOfComputed(**options), ShapeOfComputed(**options))
    called: list[object] = []
    for block in model.blocks:
        block.h[1].register_forward_hook(lambda *args: called.append(args))
    before = state_of(model)
    trace_block(model.blocks[0], arguments={"x": flat()})
    assert all(map(torch.equal, before, state_of(model)))
    assert called == []
    assert model.blocks[0].h.seen == []


def test_a_run_would_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(_RealTensorsApart, "__torch_dispatch__", run)
    model = two(ShapeOfComputed)()
    trace_block(model.blocks[0], arguments={"x": flat()})
    assert model.blocks[0].h[1].num_batches_tracked > 0


# ---------------------------------------------------------------------- checkpoints


class InCheckpoint(Base):
    """A branch under a checkpoint, as a function of its input or as a closure."""

    reentrant, closure = False, False

    def forward(self, x: Tensor) -> Tensor:
        function: Callable[..., Tensor] = (lambda: self.f(x)) if self.closure else self.f
        args = () if self.closure else (x,)
        return x + checkpoint(function, *args, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_a_checkpoint_in_a_block_stays(
    closure: bool, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InCheckpoint, "reentrant", reentrant)
    monkeypatch.setattr(InCheckpoint, "closure", closure)
    model = two(InCheckpoint)()
    if closure and reentrant:
        return  # no gradients in the plain model either
    runs: list[bool] = []
    for block in model.blocks:
        block.f[0].register_forward_hook(lambda *args: runs.append(True))
    plan = torchdrop.add_stochastic_depth(model, [0.5, 0.5], example_inputs=flat())
    assert [b.action for block in plan.blocks for b in block.branches] == ["skip", "skip"]
    model(flat().requires_grad_())  # the proof is over
    runs.clear()
    model(flat().requires_grad_()).sum().backward()
    assert len(runs) == 4  # once forward and once again, for each block


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class AsksForShapes(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return x + self.g(h.reshape(-1, W)).view(*h.shape[:-1], W)


def test_a_block_may_be_read_inside_a_checkpoint() -> None:
    model = Checkpointed(AsksForShapes(), AsksForShapes())
    torchdrop.add_stochastic_depth(model, [0.5, 0.5], example_inputs=torch.randn(2, 3, W))
    for rows in (8, 5):
        model(torch.randn(rows, 3, W, requires_grad=True)).sum().backward()


# ---------------------------------------------------------------------- imports


class Imports(Base):
    """Imports modules in its forward: one that patches nothing, and one that does not exist."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            import module_that_does_not_exist  # type: ignore[import-not-found]

            x = module_that_does_not_exist.changed(x)
        except ImportError:
            pass
        import imported_by_a_forward  # type: ignore[import-not-found]

        return x + imported_by_a_forward.activation(self.f(x))


MODULE = """
import torch
from torch import arange, finfo, zeros
COUNT = 0
TABLE = torch.arange(3)
def count():
    global COUNT
    COUNT += 1
count()
activation = torch.tanh
"""


def test_a_module_that_a_forward_imports_is_imported_as_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_by_a_forward.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    model = two(Imports)()
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert len(plan.blocks) == 2
    module = sys.modules.pop("imported_by_a_forward")
    assert module.arange is torch.arange
    assert module.finfo is torch.finfo
    assert module.zeros is torch.zeros
    assert type(module.TABLE) is Tensor
    assert module.COUNT == 1


def test_an_import_that_is_traced_would_keep_what_fx_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls_of_forward.CallWatch, "_note_import", lambda *args: None)
    with pytest.raises((AssertionError, ValueError)):
        test_a_module_that_a_forward_imports_is_imported_as_always(tmp_path, monkeypatch)
    sys.modules.pop("imported_by_a_forward", None)


# ---------------------------------------------------------------------- tensors without data


class AddsInPlaceAndAsks(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.add_(self.f(torch.tanh(x * 0.5)))
        h = self.g(x)
        return x + self.f(h.reshape(-1, W)).view(*h.shape[:-1], W)


def test_what_another_operation_returned_may_be_written_into() -> None:
    stem, model = nn.Linear(W, W), two(AddsInPlaceAndAsks)()
    torchdrop.add_stochastic_depth(model, [0.5, 0.5], example_inputs=torch.randn(2, 3, W))
    model(stem(torch.randn(8, 3, W))).sum().backward()
    assert stem.weight.grad is not None


# ---------------------------------------------------------------------- keys of caches


@lru_cache
def positions(n: int, device: Any = None, dtype: Any = None) -> Tensor:
    return torch.arange(n, device=device, dtype=dtype)


SIZES: dict[int, Tensor] = {}


class KeyOfArgument(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * positions(x.shape[-1], x.device, x.dtype)


class KeyOfComputed(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        n = h.size(-1)
        if n not in SIZES:
            SIZES[n] = torch.arange(n)
        return x + h * SIZES[n] * positions(W, h.device)


class KeyWithoutSize(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * positions(W, x.device, dtype=x.dtype)


class KeyOfBatch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * positions(x.shape[0])[:, None]


KEYED = [KeyOfArgument, KeyOfComputed, KeyWithoutSize]


@pytest.fixture
def empty_caches() -> Any:
    positions.cache_clear()
    SIZES.clear()
    yield
    positions.cache_clear()
    SIZES.clear()


@pytest.mark.usefixtures("empty_caches")
@pytest.mark.parametrize("kind", KEYED)
def test_a_size_dtype_or_device_as_a_key_is_the_one_of_the_call(kind: type[Base]) -> None:
    model = two(kind)()
    dense = copy.deepcopy(model)
    x = flat()
    dense(x)
    expected = positions.cache_info().currsize, list(SIZES)
    positions.cache_clear()
    SIZES.clear()
    assert len(torchdrop.find_residuals(model, x)) == 2
    assert (positions.cache_info().currsize, list(SIZES)) == expected
    plan = torchdrop.add_stochastic_depth(model, [1e-30, 1e-30], example_inputs=x)
    assert [b.action for b in plan.blocks] == ["skip", "skip"]
    for rows, dtype in ((6, torch.float32), (3, torch.float32), (4, torch.float64)):
        x = torch.randn(rows, W, dtype=dtype)
        torch.testing.assert_close(model.to(dtype)(x), dense.to(dtype)(x))


@pytest.mark.usefixtures("empty_caches")
def test_keys_that_are_not_known_or_depend_on_the_batch_are_refused() -> None:
    assert len(torchdrop.find_residuals(two(KeyWithoutSize)())) == 2
    positions.cache_clear()
    with pytest.raises(UntraceableError, match=r"as a key .* not known; give example_inputs"):
        trace_block(KeyOfArgument())
    with pytest.raises(UntraceableError, match=r"that depends on the batch as a key"):
        trace_block(KeyOfBatch(), arguments={"x": flat()})
    assert positions.cache_info().currsize == 0


# ---------------------------------------------------------------------- what is kept


KEPT: dict[str, Any] = {}
LISTED: list[Any] = []


class Holder:
    last: Any = None


HOLDER = Holder()


@lru_cache(None)
def of_block(block: nn.Module) -> Any:
    return torch.ones(W) * PARAMETERS[0].f[0].bias[:W]


PARAMETERS: list[Any] = []


class KeepsInDict(Base):
    def forward(self, x: Tensor) -> Tensor:
        KEPT["last"] = {"h": (self.f(x), 1)}["h"]
        return x + self.f(x)


class KeepsInList(Base):
    def forward(self, x: Tensor) -> Tensor:
        LISTED.append(x)
        return x + self.f(x)


class KeepsInObject(Base):
    def forward(self, x: Tensor) -> Tensor:
        HOLDER.last = self.f(x)
        return x + self.f(x)


class KeepsInClass(Base):
    last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.__class__.last = self.f(x)
        return x + self.f(x)


class KeepsInType(Base):
    last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        type(self).last = self.f(x)
        return x + self.f(x)


class KeepsInCache(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * of_block(PARAMETERS[0])


class KeepsAndFails(Base):
    def forward(self, x: Tensor) -> Tensor:
        KEPT["last"] = self.f(x)
        return x + self.f(x) if x.sum() > 0 else x


def proxies() -> list[Any]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), fx.Proxy)]


KEEPING = {
    KeepsInDict: "it keeps what it computes in a dict, under 'last'",
    KeepsInList: "it keeps what it computes in a list",
    KeepsInObject: "it keeps what it computes in .*last",
    KeepsInClass: "it keeps what it computes in the attribute last of KeepsInClass",
    KeepsInType: "it sets the attribute last of its class",
    KeepsInCache: "it keeps what it computes in the cache of of_block",
    KeepsAndFails: "x.sum",
}


@pytest.mark.parametrize("kind", KEEPING)
def test_what_a_forward_keeps_is_taken_out_again(kind: type[Base]) -> None:
    block = kind()
    PARAMETERS[:] = [block]
    with pytest.raises(UntraceableError, match=KEEPING[kind]):
        trace_block(block)
    assert proxies() == []
    assert KEPT == {}
    assert LISTED == []
    assert of_block.cache_info().currsize == 0
    assert (HOLDER.last, KeepsInClass.last, KeepsInType.last) == (None, None, None)
    with pytest.raises(ValueError, match=r"no residual branches|could not be read"):
        torchdrop.add_stochastic_depth(two(kind)(), 0.5)
    assert proxies() == []
    if kind is not KeepsAndFails:
        block(flat())
        assert of_block.cache_info().currsize == (kind is KeepsInCache)
    KEPT.clear()
    LISTED.clear()
    of_block.cache_clear()
    HOLDER.last = KeepsInClass.last = KeepsInType.last = None


@pytest.mark.parametrize("repeats", [True, False])
def test_a_collection_in_another_thread_does_not_look_like_something_kept(
    repeats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Python collects garbage in another thread, ``gc.collect`` does nothing."""
    missed: list[Any] = []
    collect = gc.collect

    def collects_later(*args: Any) -> int:
        missed.append(args)
        return 0 if len(missed) < 4 else collect(*args)

    class InACycle(Base):
        def forward(self, x: Tensor) -> Tensor:
            cycle: list[Any] = [self.f(x)]
            cycle.append(cycle)
            return x + cycle[0]  # type: ignore[no-any-return]

    monkeypatch.setattr(gc, "collect", collects_later)
    if not repeats:  # the twin
        monkeypatch.setattr(left_behind, "_COLLECTIONS", 1)
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    gc.disable()
    try:
        if repeats:
            trace_block(InACycle())
        else:
            with pytest.raises(UntraceableError, match="it keeps what it computes"):
                trace_block(InACycle())
    finally:
        gc.enable()
        waiting.set()
        thread.join()


def test_what_is_kept_would_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_graph, "remove_stored_proxies", lambda proxies: "")
    trace_block(KeepsInDict())
    assert proxies() != []
    KEPT.clear()
