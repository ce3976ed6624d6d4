"""What proxies answer, and what the tracer records."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchdrop
from written_blocks import Base, Stack, W, flat, two
from zoo import BARELY, assert_same


class DrawnFromNothing(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * torch.rand(W)


FACTORIES = {"rand": torch.rand}


class DrawnFromATable(Base):
    """Takes the factory from where torch.fx does not look for functions that it wraps."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * FACTORIES["rand"](W)


@pytest.mark.parametrize("kind", [DrawnFromNothing, DrawnFromATable])
def test_random_tensors_are_drawn_in_every_call(kind: type[nn.Module]) -> None:
    model, x = two(kind)(), flat()
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, [1e-30, 1e-30], mode="batch", compute="mask")
    outs = []
    for seed in range(3):
        torch.manual_seed(seed)
        outs.append(model(x))
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])
    assert_same(model.eval()(x)[:0], dense.eval()(x)[:0])


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
        f"import sys; sys.path[:0] = {folders!r}; import test_tracer; "
        "from torchdrop.tracing.block_graph import trace_block; "
        "print(trace_block(test_tracer.Power()).tensors)"
    )
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)
    assert run.stdout.strip() == "['x']", run.stderr
