"""Blocks that are called in several ways: one generated forward for each."""

from __future__ import annotations

import copy

from torch import Tensor

import torchdrop
from torchdrop.running.forward_slot import occupant_of
from written_blocks import Base, Stack, flat
from zoo import BARELY, assert_same


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
