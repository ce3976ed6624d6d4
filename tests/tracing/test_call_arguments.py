"""The arguments of a call: other arguments than at first, and tensors inside containers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchdrop
from torchdrop.tracing.call_arguments import flatten_arguments
from written_blocks import Base, Stack, W, flat
from zoo import BARELY, assert_same


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
