"""Blocks that set a mode in their forward, or ask for one: right under every mode of the call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, is_grad_enabled, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import torchdrop
from torchdrop.running.forward_slot import occupant_of
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.modes import Modes, contexts_between, current_modes, use_modes
from torchdrop.tracing.untraceable import UntraceableError
from written_blocks import Base, Stack, W, flat
from zoo import BARELY, assert_same


@contextmanager
def of_another_library() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        yield


class Island(Base):
    """Keeps a part in float32."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(self.n1(x))
        with torch.autocast("cpu", enabled=False):
            h = torch.softmax(h.float() @ h.float().transpose(-1, -2) * 4, -1) @ h.float()
        return x + self.g(torch.tanh(h))


class TwoIslands(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = x.float() @ x.float().transpose(-1, -2)
        x = x + self.f(torch.tanh(h) @ x.to(h.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.tanh(self.g(x) @ self.g(x).transpose(-1, -2))
            return x + torch.tanh(h @ self.g(x)).float()


class SumInside(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        with torch.autocast("cpu", enabled=False):
            return x.float() + h.float() @ h.float().transpose(-1, -2) @ h.float()


class Frozen(Base):
    """Lets no gradient into a part of the branch."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.f(x)
        return x + self.g(h)


class Decorated(Base):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.f(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(self.features(x))


class InTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            h = self.f(x)
        return x + self.g(h)


class Foreign(Base):
    def forward(self, x: Tensor) -> Tensor:
        with of_another_library():
            h = self.f(x.float())
        return x + self.g(h)


class AsksForAutocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        if torch.is_autocast_enabled("cpu"):
            h = h.float().clamp(-0.1, 0.1)
        return x + self.g(h)


class AsksForGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return x + self.g(h if is_grad_enabled() else h.clamp(-0.1, 0.1))


class AsksForTheDtype(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x).to(torch.get_default_dtype()).to(x.dtype)


class Kernel(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        with sdpa_kernel([SDPBackend.MATH]):
            h = F.scaled_dot_product_attention(h, h, h)
        return x + self.g(h)


class MadeInHalf(Base):
    def forward(self, x: Tensor) -> Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        ramp = torch.linspace(0, 1, 7) / 3
        torch.set_default_dtype(before)
        return x + self.f(x) * ramp[3].to(x.dtype)


BLOCKS = (
    Island, TwoIslands, SumInside, Frozen, Decorated, InTraining, Foreign, AsksForAutocast,
    AsksForGradients, AsksForTheDtype, Kernel, MadeInHalf,
)  # fmt: skip


@contextmanager
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "no_grad": torch.no_grad,
    "float64": in_float64,
}


def of_sites(model: Stack) -> list[Any]:
    return [occupant_of(block) for block in model.blocks]


def model_of(kind: type[Base]) -> Stack:
    torch.manual_seed(0)
    return Stack(kind(), kind()).train()


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("example", [False, True], ids=["no example", "example"])
def test_with_nothing_dropped_it_is_the_dense_block_under_every_mode(
    kind: type[Base], example: bool
) -> None:
    model, dense = model_of(kind), model_of(kind)
    x = torch.randn(5, 3, W)
    plan = torchdrop.add_stochastic_depth(
        model, [BARELY, BARELY], example_inputs=x if example else None
    )
    assert [branch.action for block in plan.blocks for branch in block.branches].count("mask") == 0
    for name in (*AROUND, "autocast", "plain"):
        with AROUND[name]():
            given, wanted = model(x), dense(x)
        assert_same(given, wanted)
        assert given.requires_grad == wanted.requires_grad
        if given.requires_grad:
            for ours, theirs in zip(gradients(model, given), gradients(dense, wanted), strict=True):
                assert (ours is None) == (theirs is None) or not bool(ours.any())
                if theirs is not None:
                    assert_same(ours, theirs)
    assert all(len(site.train) <= len(AROUND) for site in of_sites(model))
    assert current_modes() == MODES_OF_THE_TESTS


MODES_OF_THE_TESTS = current_modes()


def gradients(model: nn.Module, out: Tensor) -> list[Any]:
    model.zero_grad(set_to_none=True)
    out.float().square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", [Island, TwoIslands, SumInside, Frozen, Foreign])
def test_kept_rows_are_those_of_the_dense_block(kind: type[Base]) -> None:
    model, dense, x = model_of(kind), model_of(kind), torch.randn(6, 3, W)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    block, own = model.blocks[0], dense.blocks[0]
    for name in ("autocast", "plain"):
        with AROUND[name]():
            out, wanted = block(x), own(x)
        kept = [rows.tolist() for rows in plan.last_kept().values()]
        both = [i for i in range(6) if all(i in rows for rows in kept)]
        none = [i for i in range(6) if not any(i in rows for rows in kept)]
        assert_same(out[none].float(), x[none].float())
        if kind is not TwoIslands:  # there the second branch sees twice the first
            assert both
            assert_same((out - x)[both].float(), (2 * (wanted - x))[both].float(), 0.02)


@pytest.mark.parametrize("kind", [Base, Island, AsksForGradients])
def test_what_no_forward_asks_for_costs_no_reading(kind: type[Base]) -> None:
    class Plain(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    asks = kind is not Base
    model, x = model_of(kind if asks else Plain), flat()
    if kind is Island:
        x = torch.randn(5, 3, W)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    for around in (*AROUND.values(), *AROUND.values()):
        with around():
            model(x)
    for site in of_sites(model):
        assert bool(site.train[0].asks) == asks
        assert sum(len(p.modes) for p in site.train) > 1 if asks else len(site.train) == 1


def test_the_forward_that_is_generated_can_be_copied_and_pickled() -> None:
    model, x = model_of(Island), torch.randn(5, 3, W)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    with AROUND["autocast"]():
        wanted = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(twin(x), wanted)
            assert len(of_sites(twin)[0].train) == 2


def test_an_error_inside_leaves_the_modes_as_they_were() -> None:
    model = model_of(Frozen)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    model.blocks[1].f = nn.Linear(W + 1, W)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(flat())
    assert torch.is_grad_enabled()
    assert current_modes() == MODES_OF_THE_TESTS


def test_a_mode_of_the_users_own_is_not_read() -> None:
    class Mine(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            return func(*args, **(kw or {}))

    class Entered(Base):
        def forward(self, x: Tensor) -> Tensor:
            with Mine():
                return x + self.f(x)

    with pytest.raises(UntraceableError, match="TorchFunctionMode"):
        trace_block(Entered())
    with Mine():  # around the block it is the user's business

        class Plain(Base):
            def forward(self, x: Tensor) -> Tensor:
                return x + self.f(x)

        trace_block(Plain())


@pytest.mark.parametrize("name", ["autocast", "half", "no_grad", "float64"])
def test_under_sets_exactly_these_modes_and_restores_the_others(name: str) -> None:
    before = current_modes()
    with AROUND[name]():
        other = current_modes()
    assert other != before
    with use_modes(other):
        assert current_modes() == other
        with use_modes(before):
            assert current_modes() == before
        assert current_modes() == other
    assert current_modes() == before
    assert contexts_between(before, before) == []


def test_every_mode_can_be_changed() -> None:
    """A field of Modes that contexts_between() forgets would stay as it is."""
    before = current_modes()
    others = Modes(
        grad=False,
        inference=True,
        autocast=(("cpu", torch.bfloat16),),
        cache=False,
        dtype=torch.float64,
        device="meta",
        sdpa=("MATH",),
        priority=before.priority,
        cudnn=(False, *before.cudnn[1:]),
    )
    for field in Modes._fields:
        if field != "priority":
            wanted = before._replace(**{field: getattr(others, field)})
            if field == "inference":  # gradients are off in it
                wanted = wanted._replace(grad=False)
            with use_modes(wanted):
                assert current_modes() == wanted, field
            assert current_modes() == before, field


def test_in_a_compiled_graph_the_block_has_to_be_read_before() -> None:
    model, dense, x = model_of(Island), model_of(Island), torch.randn(5, 3, W)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY], example_inputs=x)
    run = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(run(x), dense(x))
    with AROUND["autocast"]():
        with pytest.raises(Exception, match="call the model once like this before compiling it"):
            run(x)
        model(x)
        torch.compiler.reset()
        assert_same(torch.compile(model, fullgraph=True, backend="eager")(x), dense(x))
