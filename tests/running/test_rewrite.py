"""The generated forwards: their text, what they compute, that they can be copied and pickled."""

from __future__ import annotations

import copy
import pickle
import traceback
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.running.forward_slot import occupant_of
from torchdrop.running.program import MismatchError, Program
from torchdrop.running.rewrite import rewrite
from torchdrop.tracing.block_graph import trace_block
from written_blocks import Base, Parallel, Plain, Stack, W, flat, mlp
from zoo import BARELY, assert_same


class Recorder:
    """Stands for a site: adds what is joined, and notes what it was given."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        self.module, self.program = module, program
        self.joined: list[tuple[int, int]] = []

    def join(self, k: int, skip: Tensor, *inputs: Any) -> Tensor:
        self.joined.append((k, len(inputs)))
        out: Tensor = skip + self.program.branches[k].function(self.module, self, *inputs)
        return out

    def mask(self, k: int, skip: Tensor, branch: Tensor) -> Tensor:
        self.joined.append((k, -1))
        return skip + branch


def program_of(module: nn.Module, action: str = "skip", first: int = 0) -> Program:
    block = trace_block(module)
    splits = [(entry.split, action) for entry in read_residual_sums(block)]
    return rewrite(block, splits, "block", first)


@pytest.mark.parametrize("action", ["skip", "mask"])
def test_every_branch_is_joined_once_in_order(action: str) -> None:
    block, x = Parallel(), flat()
    program = program_of(block, action, first=4)
    site = Recorder(block, program)
    assert_same(program.forward.function(block, site, x), block(x))
    inputs = 1 if action == "skip" else -1
    assert site.joined == [(4, inputs), (5, inputs)]
    assert sorted(program.branches) == ([4, 5] if action == "skip" else [])


class Two(Base):
    """Two branches, one after the other, and what else may be done with the first sum."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use

    def forward(self, x: Tensor) -> Any:
        if self.use == "written":
            y = x * 1.0
            y += self.f(x)
        else:
            y = x + self.f(x)
        if self.use == "activated":
            y = torch.relu(y)
        z = y + self.g(y)
        if self.use == "returned":
            return z, y
        return z * y.mean() if self.use == "read" else z


@pytest.mark.parametrize(
    ("use", "reuses_skip"),
    [("", {3}), ("returned", set()), ("read", set()), ("activated", set()), ("written", set())],
)
@pytest.mark.parametrize("action", ["skip", "mask"])
def test_a_skip_is_spent_where_it_is_a_sum_that_nothing_else_uses(
    use: str, reuses_skip: set[int], action: str
) -> None:
    program = program_of(Two(use), action, first=2)
    assert program.reuses_skip == (reuses_skip if action == "skip" else set())


def test_what_a_branch_reads_of_shapes_it_reads_of_its_rows() -> None:
    class Reading(Base):
        def forward(self, x: Tensor) -> Tensor:
            rows, width = x.shape
            return x + self.f(x).reshape(rows, 1, width).expand(rows, 2, width).mean(1)

    block, x = Reading(), flat()
    program = program_of(block)
    branch = program.branches[0].function
    torch.testing.assert_close(branch(block, None, x[:2]), block(x)[:2] - x[:2])


def test_nested_residuals_are_deferred_inside_a_deferred_branch() -> None:
    class Nested(Base):
        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            y = y + self.g(y)
            return x + self.n1(y)

    block, x = Nested(), flat()
    program = program_of(block)
    site = Recorder(block, program)
    assert_same(program.forward.function(block, site, x), block(x))
    assert [k for k, _ in site.joined] == [1, 0]


def test_a_source_pickles_and_is_shared_by_copies() -> None:
    program = program_of(Plain())
    twin = pickle.loads(pickle.dumps(program))
    assert twin.forward.text == program.forward.text
    assert copy.deepcopy(program).forward is program.forward
    block, x = Plain(), flat()
    assert_same(twin.forward.function(block, Recorder(block, twin), x), block(x))


def test_a_traceback_shows_the_generated_line() -> None:
    model = Stack(Plain(), Plain())
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    model.blocks[0].f = mlp(2 * W)
    try:
        model(flat())
    except RuntimeError as error:
        lines = "".join(traceback.format_tb(error.__traceback__))
    assert "<torchdrop blocks.0, branch 0>" in lines
    assert "self.f(x)" in lines


def test_what_is_held_fixed_is_compared() -> None:
    class Held(Base):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0

        def forward(self, x: Tensor, gain: float = 1.0, *, last: Any = None) -> Tensor:
            return x + self.f(x) * self.scale * gain

    import inspect

    block, x = Held(), flat()
    program = program_of(block)
    signature = inspect.signature(block.forward)
    assert program.bind(signature, (x,), {})[0] is x
    assert program.bind(signature, (), {"x": x, "gain": 1.0})[0] is x
    for args, kwargs in [((x, 2.0), {}), ((x,), {"last": 1}), ((x, x), {}), ((None,), {})]:
        with pytest.raises(MismatchError):
            program.bind(signature, args, kwargs)
    program.check_attributes(block)
    block.scale = 3.0
    with pytest.raises(MismatchError, match=r"self\.scale = 2\.0.*self\.scale = 3\.0"):
        program.check_attributes(block)


def test_the_site_knows_the_program_of_each_branch() -> None:
    class Held(Base):
        def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
            x = x + self.f(x) * gain
            return x + self.g(x) * gain

    model, x = Stack(Held(), Held()), flat()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    block = model.blocks[0]
    for gain in (1.0, 2.0, 3.0, 1.0):
        assert_same(block(x, gain), Held.forward(block, x, gain))
    site = occupant_of(block)
    assert [sorted(p.branches) for p in site.train] == [[0, 1], [2, 3], [4, 5]]  # type: ignore[union-attr]
    assert_same(copy.deepcopy(block)(x, 3.0), Held.forward(block, x, 3.0))
