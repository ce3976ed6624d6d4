"""Reading one forward: what it shows, what it would freeze, and what cannot be read."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchdrop
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.untraceable import UntraceableError
from written_blocks import Base, Plain, Stack, W, flat, mlp, two
from zoo import assert_same, instance_names


def test_looking_leaves_buffers_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = mlp()
            self.register_buffer("mean", torch.zeros(W))
            self.register_buffer("var", torch.zeros(W))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + F.batch_norm(self.f(x), self.mean, self.var, training=True)

    model = Stack(Counting(), Counting())
    # its rows depend on each other, which a proof would find
    torchdrop.add_stochastic_depth(model, 0.5, example_inputs=flat(), verify=False)
    assert not any(buffer.any() for buffer in model.buffers())
    model(flat())
    assert int(model.blocks[0].calls) == 1
    assert bool(model.blocks[0].mean.any())


class CoinInPython(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x
        return x + self.f(x)


class CoinInNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * float(np.random.rand())


class CoinInTorch(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1) < 0.5:
            return x
        return x + self.f(x)


class Storing(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.f(x)
        return x + self.last


class Counting(Base):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.f(x)


class Appending(Base):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x + self.f(x)


class TellingItsChild(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.f.size = x.shape
        return x + self.f(x)


class Branching(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return x + self.f(x)
        return x


UNREADABLE: dict[type[Base], str] = {
    CoinInPython: "draws random numbers in Python",
    CoinInNumpy: "draws random numbers in Python",
    CoinInTorch: r"if self\.training and torch\.rand\(1\) < 0\.5",
    Storing: r"self\.last = self\.f\(x\)\): it sets self\.last",
    Counting: r"it sets self\.calls",
    Appending: r"it changes self\.seen",
    TellingItsChild: r"it sets size of a Sequential",
    Branching: r"test_block_graph\.py:\d+ \(if x\.mean\(\) > 0:\)",
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_said_with_the_line(kind: type[Base]) -> None:
    model = two(kind)()
    names, torch_state, state = instance_names(model), torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()[2]
    with pytest.raises(ValueError, match=UNREADABLE[kind]):
        torchdrop.add_stochastic_depth(model, 0.5)
    assert instance_names(model) == names
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == state
    assert np.random.get_state()[2] == numpy_state
    with pytest.raises(UntraceableError, match=kind.__name__ + "|test_block_graph"):
        trace_block(model.blocks[0])


def test_frozen_and_tied_parameters() -> None:
    model, x = two(Plain)(), flat()
    first, second = model.blocks
    second.f = first.f
    first.g.requires_grad_(False)
    first.gamma.requires_grad_(False)
    plan = torchdrop.add_stochastic_depth(model, [1.0, 0.0])
    model(x).sum().backward()
    assert first.g[0].weight.grad is None
    assert bool(first.f[0].weight.grad.any())
    plan.set_p([1.0, 1.0])
    model.zero_grad()
    model(x).sum().backward()
    assert not first.f[0].weight.grad.any()


def test_other_threads_run_models_while_one_is_read() -> None:
    from torchdrop.finding.survey import survey

    runner, x = two(Branching)(), flat()
    expected = runner(x)
    wrong: list[object] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                if not torch.equal(runner(x), expected):
                    wrong.append("another result")
            except BaseException as error:
                wrong.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    model = Stack(*(Plain() for _ in range(30)))
    try:
        for _ in range(5):
            assert len(survey(model).residuals) == 30
    finally:
        stop.set()
        thread.join()
    assert wrong == []


def test_other_tracers_work_in_evaluation_or_say_why_not() -> None:
    model, x = two(Plain)().eval(), flat()
    torchdrop.add_stochastic_depth(model, 0.5)
    expected = model(x)
    assert_same(torch.fx.symbolic_trace(model)(x), expected)
    assert_same(torch.export.export(model, (x,)).module()(x), expected)
    with (
        pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"),
        pytest.raises(AttributeError, match=r"script cannot compile.*remove_stochastic_depth"),
    ):
        torch.jit.script(model.blocks[0])
    model.train()
    with pytest.raises(RuntimeError, match=r"fx cannot trace blocks\.0 while stochastic depth"):
        torch.fx.symbolic_trace(model)
