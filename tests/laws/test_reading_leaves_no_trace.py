"""Looking at a model leaves everything as it was, except what one plain call leaves in caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop
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
    with pytest.raises(UntraceableError, match=r"checkpoint|no_grad"):
        trace_block(model.blocks[0])
    if closure and reentrant:
        return  # no gradients in the plain model either
    runs: list[bool] = []
    for block in model.blocks:
        block.f[0].register_forward_hook(lambda *args: runs.append(True))
    plan = torchdrop.add_stochastic_depth(model, [0.5, 0.5], example_inputs=flat())
    assert [b.action for b in plan.blocks] == ["layer", "layer"]
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
