"""What the source of a class tells about a forward that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from torchdrop.finding.source_code import source_has_addition


class Plus(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class InPlace(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x += y
        return x


class ByMethod(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.add_(y)


class ByFunction(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y)


class InAMethodOfItsOwn(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.joined(x, y)

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x


class Inherited(InPlace):
    pass


@pytest.mark.parametrize(
    "kind", [Plus, InPlace, ByMethod, ByFunction, InAMethodOfItsOwn, Inherited]
)
def test_additions_of_tensors(kind: type[nn.Module]) -> None:
    assert source_has_addition(kind())


class Counts(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        last = self.calls + 1
        return x * last


class AddsALength(nn.Module):
    def forward(self, x: Tensor, parts: list[Tensor]) -> Iterator[Tensor]:
        count = len(parts)
        for i in range(count):
            yield parts[i + count]


class OnlyInItsInit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = self.training + self.training

    def forward(self, x: Tensor) -> Tensor:
        return x - self.width


class Overridden(Plus):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


@pytest.mark.parametrize("kind", [Counts, AddsALength, OnlyInItsInit, Overridden])
def test_what_is_no_addition_of_tensors(kind: type[nn.Module]) -> None:
    assert not source_has_addition(kind())


def test_without_a_source_anything_may_be_in_it() -> None:
    hidden = type("Hidden", (nn.Module,), {"forward": lambda self, x: x})
    assert source_has_addition(hidden())
