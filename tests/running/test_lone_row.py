"""A single kept row, in front of a BatchNorm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchdrop
from torchdrop.running.lone_row import RowValues

C, B = 4, 4


class Squeeze(nn.Module):
    """Gates of channels; its BatchNorm gets one value a channel for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.fc, self.bn = nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.bn(self.fc(self.pool(x))))


class Flat(nn.Module):
    """A BatchNorm of vectors after pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.bn(x.mean((2, 3)))[:, :, None, None]


class Strided(nn.Module):
    """A BatchNorm on a map of one position, which the input is added to after upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bn = nn.Conv2d(C, C, 8, 8), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return functional.interpolate(self.bn(self.down(x)), x.shape[2:])


BRANCHES: dict[str, Any] = {
    "after global pooling": Squeeze,
    "of vectors": Flat,
    "after large strides": Strided,
    "on the whole map": lambda: nn.BatchNorm2d(C),
}


class Block(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.conv, self.branch = nn.Conv2d(C, C, 3, padding=1), branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.conv(x).relu())


def stack(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(BRANCHES[name]()) for _ in range(3)))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", BRANCHES)
def test_a_single_kept_row_trains(name: str, size: int, example: bool, verify: bool) -> None:
    model, x = stack(name), torch.randn(B, C, size, size)
    given = {"example_inputs": x if example else None, "verify": verify}
    plan = torchdrop.add_stochastic_depth(model, 0.75, schedule="uniform", **given)
    for side in (size, 8, size):  # a smaller map than in the call that was tested
        model(torch.randn(B, C, side, side)).sum().backward()
        assert [len(rows) for rows in plan.last_kept().values()] == [1] * 3


def test_a_row_of_many_values_is_computed_alone() -> None:
    computed: dict[str, list[int]] = {}
    for name in ("on the whole map", "after global pooling"):
        model, x = stack(name), torch.randn(B, C, 4, 4)
        torchdrop.add_stochastic_depth(model, 0.75, schedule="uniform", example_inputs=x)
        seen: list[int] = []
        for block in model:
            conv: Any = block.conv
            conv.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(len(args[0])))
        computed[name] = seen
        model(x)
    assert computed == {"on the whole map": [1] * 3, "after global pooling": [2] * 3}


def test_without_the_second_row_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: BatchNorm itself refuses a single value."""
    monkeypatch.setattr(RowValues, "suffice", lambda self, sizes: True)
    model, x = stack("after global pooling"), torch.randn(B, C, 16, 16)
    torchdrop.add_stochastic_depth(model, 0.75, schedule="uniform", example_inputs=x)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(x)


@pytest.mark.parametrize(
    ("fewest", "sizes", "enough"),
    [
        (1, (3, 16, 16), False),
        (2, (3, 16, 16), True),
        (2, (3, 32, 16), True),
        (200, (3, 15, 16), False),
        (200, (3, 256), False),
    ],
)
def test_of_a_smaller_input_nothing_is_known(
    fewest: int, sizes: tuple[int, ...], enough: bool
) -> None:
    assert RowValues(fewest, (3, 16, 16)).suffice(sizes) is enough


class Tokens(nn.Module):
    """BatchNorm over a fourth of the tokens of all samples, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x[:, ::4])
        y = self.bn(y.flatten(0, 1)).view_as(y).relu()
        return x + self.fc2(y).repeat_interleave(4, 1)


class ChannelsLast(nn.Module):
    """A branch that permutes its input and has a large stride."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bn = nn.Conv2d(C, C, 4, 4), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.down(x.permute(0, 3, 1, 2))).relu()
        return x + functional.interpolate(y, x.shape[1:3]).permute(0, 2, 3, 1)


class Valid(nn.Module):
    """A pooling whose map shrinks faster than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(functional.avg_pool2d(self.conv(x), 7, 1)).relu()
        return x + functional.interpolate(y, x.shape[2:])


@pytest.mark.parametrize(
    ("kind", "large", "small"),
    [
        (Tokens, (16, C), (4, C)),
        (ChannelsLast, (16, 4, C), (4, 4, C)),
        (Valid, (C, 14, 14), (C, 7, 7)),
    ],
)
def test_a_single_row_of_a_smaller_input_trains(
    kind: type[nn.Module], large: tuple[int, ...], small: tuple[int, ...]
) -> None:
    model = nn.Sequential(*(kind() for _ in range(3)))
    torchdrop.add_stochastic_depth(model, 0.75, schedule="uniform")
    for sizes in (large, small, large):
        model(torch.randn(4, *sizes)).sum().backward()
