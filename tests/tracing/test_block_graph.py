"""Reading one forward: what it shows, what it would freeze, and what cannot be read."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import torchdrop
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.call_arguments import flatten_arguments
from torchdrop.tracing.untraceable import UntraceableError
from written_blocks import Base, Stack, W, flat, mlp, two
from zoo import BARELY, assert_same, instance_names

# --- what a trace would freeze ---------------------------------------------------------------


class Told(Base):
    """Its parent sets H and W before each call, as Swin for detection and PVT do."""

    H: int | None = None
    W: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.H is not None
        assert self.W is not None
        y = self.f(x).view(-1, self.H, self.W, x.shape[-1])
        return x + y.roll(1, 1).view(x.shape)


class Telling(Stack):
    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = x.view(batch, height * width, channels)
        for block in self.blocks:
            block.H, block.W = height, width
            x = block(x)
        return x


def test_attributes_that_a_parent_sets_are_read_again() -> None:
    model = Telling(Told(), Told())
    dense = copy.deepcopy(model)
    example = torch.randn(2, 2, 3, W)
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=example)
    plan.set_p([BARELY, BARELY])
    for height, width in ((2, 3), (3, 2), (6, 1), (1, 1), (2, 3)):
        x = torch.randn(4, height, width, W)
        assert_same(model(x), dense(x))
    plan.set_p([0.5, 0.5])
    twin = copy.deepcopy(dense)
    torchdrop.add_stochastic_depth(twin, [0.5, 0.5], example_inputs=example, compute="mask")
    torch.manual_seed(3)
    out = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(twin(x), out)


def test_too_many_settings_of_a_block_are_an_error_not_a_leak() -> None:
    class Warming(Base):
        step = 0

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * self.scale

        scale = 1.0

    model = Stack(Warming(), Warming())
    for block in model.blocks:
        block.scale = 1.0
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    for step in range(16):
        for block in model.blocks:
            block.scale = 1.0 / (step + 1)
        x = flat()
        assert_same(model(x), copy.deepcopy(model).eval()(x))
    block.scale = model.blocks[0].scale = 3.0
    with pytest.raises(RuntimeError, match=r"blocks\.0 was read with self\.scale = 1\.0.*select="):
        model(x)


class Listed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = [1.0, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.sizes[0]


def test_a_list_that_is_changed_in_place_is_noticed() -> None:
    model = Stack(Listed(), Listed())
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    x = flat()
    model(x)
    model.blocks[0].sizes[0] = 5.0
    assert_same(model.blocks[0](x), Listed.forward(model.blocks[0], x))


class Scaled(Base):
    def forward(self, x: Tensor, scale: float = 1.0, *more: Tensor, flip: bool = False) -> Tensor:
        y = self.f(x) * scale
        for extra in more:
            y = y + extra
        return x + (y.flip(-1) if flip else y)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((2.0,), {}),
        ((), {"scale": 3.0}),
        ((), {"flip": True}),
        ((2.0, torch.ones(6, W)), {"flip": True}),
        ((2.0, torch.ones(6, W), torch.ones(6, 1)), {}),
    ],
)
def test_other_arguments_than_it_was_read_with(args: Any, kwargs: Any) -> None:
    model, x = Stack(Scaled(), Scaled()), flat()
    torchdrop.add_stochastic_depth(model, [BARELY, 0.5])
    block = model.blocks[0]
    for _ in range(2):
        assert_same(block(x, *args, **kwargs), Scaled.forward(block, x, *args, **kwargs))
    assert len(block.__dict__["forward"].train) == (2 if args or kwargs else 1)


def test_training_is_passed_on_as_it_is() -> None:
    class Dropping(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x + F.dropout(self.f(x), 0.5, self.training)

    model, x = Stack(Dropping(), Dropping()), flat()
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY], sampling="window")
    torch.manual_seed(0)
    assert not torch.equal(model(x), dense.eval()(x))
    assert_same(model.eval()(x), dense(x))


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
    torchdrop.add_stochastic_depth(model, 0.5, example_inputs=flat())
    assert not any(buffer.any() for buffer in model.buffers())
    model(flat())
    assert int(model.blocks[0].calls) == 1
    assert bool(model.blocks[0].mean.any())


# --- random numbers --------------------------------------------------------------------------


class InlinedDropPath(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.training:
            y = y * (torch.rand(x.shape[0], 1) < 0.5)
        return x + y


class DrawnFromNothing(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * torch.rand(W)


def test_random_tensors_are_drawn_in_every_call() -> None:
    model, x = two(DrawnFromNothing)(), flat()
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, [1e-30, 1e-30], mode="batch", compute="mask")
    outs = []
    for seed in range(3):
        torch.manual_seed(seed)
        outs.append(model(x))
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])
    assert_same(model.eval()(x)[:0], dense.eval()(x)[:0])


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """As timm has it."""
    if p == 0.0 or not training:
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random_tensor = x.new_empty(shape).bernoulli_(1 - p)
    random_tensor.div_(1 - p)
    return x * random_tensor


class CallingDropPath(Base):
    p = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return x + drop_path(self.f(x), self.p, self.training)


class CallingStochasticDepth(CallingDropPath):
    def forward(self, x: Tensor) -> Tensor:
        return x + torchvision.ops.stochastic_depth(self.f(x), self.p, "batch", self.training)


@pytest.mark.parametrize("kind", [InlinedDropPath, CallingDropPath, CallingStochasticDepth])
@pytest.mark.parametrize("p", [0.2, None])
def test_a_drop_path_in_the_forward_itself_is_refused(kind: type[Base], p: float | None) -> None:
    model = two(kind)()
    names = instance_names(model)
    with pytest.raises(
        ValueError,
        match=r"'blocks\.0' \(.*drops the branch blocks\.0 itself.*"
        r"add to p; set it to 0, use a layer like torchdrop\.DropPath",
    ):
        torchdrop.add_stochastic_depth(model, p)
    assert instance_names(model) == names
    if isinstance(model.blocks[0], CallingDropPath):
        for block in model.blocks:
            block.p = 0.0
        plan = torchdrop.add_stochastic_depth(model, 0.2)
        assert [r.action for r in plan.blocks] == ["skip", "skip"]


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


class WithoutGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.f(x)
        return x + self.g(y)


class UnderAutocast(Base):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
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
    WithoutGradients: r"torch\.no_grad, autocast or the like",
    UnderAutocast: r"torch\.no_grad, autocast or the like",
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


# --- what is written -------------------------------------------------------------------------


class Starting(nn.Module):
    """A composite child that begins by writing into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(x.shape)
        y.relu_()
        return self.inner(y)


class LeafStarting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(W, W))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True) @ self.weight


class Writes(Base):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return x + self.child(x)


@pytest.mark.parametrize(
    "child",
    [
        lambda: nn.Sequential(nn.ReLU(inplace=True), mlp()),
        lambda: nn.Sequential(nn.Sequential(nn.Identity(), nn.ReLU6(inplace=True)), mlp()),
        Starting,
        LeafStarting,
        lambda: nn.Sequential(nn.Identity(), Starting()),
    ],
)
def test_a_branch_that_writes_into_its_input_is_masked(child: Any) -> None:
    model, x = Stack(Writes(child()), Writes(child())), flat()
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    assert all(r.action == "mask" and "writes into its input" in r.reason for r in plan.blocks)
    with torch.no_grad():
        assert_same(model(x.clone()), dense(x.clone()))
        plan.set_p([1.0, 1.0])
        assert_same(model(x.clone()), x.relu())


class ReturnsMore(Base):
    """An attention weight that is returned: the branch is needed by others."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.f(x)
        return x + y, y


def test_a_branch_that_is_used_elsewhere_is_masked_with_the_reason() -> None:
    model = nn.ModuleDict({"a": ReturnsMore(), "b": ReturnsMore()})
    plan = torchdrop.add_stochastic_depth(model, [1.0, 1.0])
    assert all(r.reason == "f is used outside the branch, too" for r in plan.blocks)
    x = flat()
    out, y = model["a"](x)
    assert_same(out, x)
    assert bool(y.any())


# --- parameters ------------------------------------------------------------------------------


def test_frozen_and_tied_parameters() -> None:
    model, x = two(Base.__subclasses__()[0])(), flat()
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


# --- threads, containers ---------------------------------------------------------------------


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
    model = Stack(*(Base.__subclasses__()[0]() for _ in range(30)))
    try:
        for _ in range(5):
            assert len(survey(model).residuals) == 30
    finally:
        stop.set()
        thread.join()
    assert wrong == []


def test_unfold_looks_into_containers() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    given = {"x": a, "states": (b, [a, 3]), "options": {"k": b, "flag": True}, "n": None}
    replaced, tensors, constants = flatten_arguments(given, lambda path, value: path)
    assert list(tensors) == ["x", "states.0", "states.1.0", "options.k"]
    assert replaced["states"] == ("states.0", ["states.1.0", 3])
    assert replaced["options"] == {"k": "options.k", "flag": True}
    assert constants == {
        "states": ("tuple", 2),
        "states.1": ("list", 2),
        "states.1.1": 3,
        "options": ("dict", ("k", "flag")),
        "options.flag": True,
        "n": None,
    }


class ByShape(Base):
    """Control flow on what a call tells before anything is computed."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 or x.dim() == 5:
            return x
        if x.shape[0] > 4 and not x.is_nested:
            return x + self.f(x)
        return x + self.g(x)


def test_control_flow_on_shapes_and_dtypes_is_decided_by_the_call() -> None:
    model = two(ByShape)()
    with pytest.raises(ValueError, match=r"give example_inputs.*if x\.dtype == torch\.float16"):
        torchdrop.add_stochastic_depth(model, 0.5)
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, [BARELY, BARELY], example_inputs=flat())
    assert [r.action for r in plan.blocks] == ["skip", "skip"]
    for rows in (6, 3, 6):
        x = torch.randn(rows, W)
        assert_same(model(x), dense(x))
    assert len(model.blocks[0].__dict__["forward"].train) == 2


# --- other tracers ---------------------------------------------------------------------------


def test_other_tracers_work_in_evaluation_or_say_why_not() -> None:
    kind = Base.__subclasses__()[0]
    model, x = two(kind)().eval(), flat()
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


class Power(nn.Module):
    """torch.pow asks of its first argument whether it could be a number."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.f(torch.pow(x, 3.0)) * torch.where(torch.eq(x, x), x, 0.0)


def test_functions_in_c_are_not_told_that_an_argument_is_a_tensor():
    # in a process of its own: it would be a segmentation fault
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    folders += [str(Path(__file__).parents[1] / "zoo")]
    code = (
        f"import sys; sys.path[:0] = {folders!r}; import test_block_graph as t; "
        f"print(t.trace_block(t.Power()).tensors)"
    )
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)
    assert run.stdout.strip() == "['x']", run.stderr
