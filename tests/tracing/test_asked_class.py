"""isinstance is told from the other ways in which the class of an object is asked for."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch

from torchdrop.tracing.asked_class import asked_by_isinstance


class Asked:
    """Notes for each question about its class whether isinstance asks."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        self.answers.append(asked_by_isinstance(sys._getframe(1)))
        return Asked


def asks(question: Any) -> set[bool]:
    asked = Asked()
    question(asked)
    return set(asked.answers)


def pattern(x: Any) -> bool:
    match x:
        case torch.Tensor():
            return True
        case _:
            return False


def test_isinstance_asks() -> None:
    assert asks(lambda x: isinstance(x, torch.Tensor)) == {True}
    assert asks(lambda x: not isinstance(x, (int, torch.nn.Module, *[str]))) == {True}
    assert asks(lambda x: [isinstance(y, torch.Tensor) for y in (x, x)]) == {True}
    assert asks(lambda x: all(isinstance(y, torch.Tensor) for y in [x])) == {True}
    assert asks(pattern) == {True}


def test_others_ask_beside_isinstance_in_the_same_code() -> None:
    def reads_memory(x: Any) -> None:
        if not isinstance(1, int):
            return
        x.__class__  # noqa: B018
        with contextlib.suppress(TypeError):
            torch.pow(x, 3.0)

    assert asks(reads_memory) == {False}
