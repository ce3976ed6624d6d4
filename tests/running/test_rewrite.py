"""The generated forwards: their text, what they compute, that they can be copied and pickled."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from generated_programs import Recorder, program_of
from torch import Tensor, nn

from torchdrop.running.rewrite import without_keywords
from written_blocks import Base, Parallel, W, flat
from zoo import assert_same


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


class Keywords(Base):
    """Children and a parameter whose names are keywords, or no identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.ModuleDict({"in": nn.Linear(W, W), "out-1": nn.ModuleDict({"is": self.g})})
        self.p = nn.ParameterDict({"lambda": torch.rand(W)})

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.d["in"](x)) * self.p["lambda"]
        return x + self.d["out-1"]["is"](h)


@pytest.mark.parametrize("action", ["skip", "mask"])
def test_a_child_may_be_named_like_a_keyword(action: str) -> None:
    block, x = Keywords(), flat()
    program = program_of(block, action, first=0)
    site = Recorder(block, program)
    assert_same(program.forward.function(block, site, x), block(x))
    assert_same(pickle.loads(pickle.dumps(program)).forward.function(block, site, x), block(x))


def test_a_keyword_inside_a_string_stays() -> None:
    text = "y = self.a('of.in')\nz = self.b.in(self.c.is, x)\n"
    expected = "y = self.a('of.in')\nz = self.b.__getattr__('in')(self.c.__getattr__('is'), x)\n"
    assert without_keywords(text) == expected
