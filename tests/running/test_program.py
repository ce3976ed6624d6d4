"""Generated forwards: copies and pickles, tracebacks, the calls that they are valid for."""

from __future__ import annotations

import copy
import pickle
import traceback
from typing import Any

import pytest
from generated_programs import Recorder, program_of
from torch import Tensor

import torchdrop
from torchdrop.running.program import MismatchError
from written_blocks import Base, Plain, Stack, W, flat, mlp
from zoo import BARELY, assert_same


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
