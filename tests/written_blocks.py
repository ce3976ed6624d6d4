"""Residual blocks in the many ways in which people write them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import torchdrop

W = 6


def mlp(width: int = W) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def conv(width: int = 4, out: int | None = None, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, out or width, 3, stride, 1)


class Stack(nn.Module):
    """Blocks one after the other, each called with the tensor alone."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Base(nn.Module):
    """A block with a branch ``f``; what is special is in the forward of the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()
        self.g = mlp()
        self.n1 = nn.LayerNorm(W)
        self.n2 = nn.LayerNorm(W)
        self.gamma = nn.Parameter(torch.rand(W))
        self.functional = torch.ao.nn.quantized.FloatFunctional()


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class AddedInPlaceByMethod(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        return x.add_(self.f(x.clone()))


class AddedInPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        x += self.f(x.clone())
        return x


class AddedThroughAView(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = x.view(-1, W)
        y.add_(self.f(x.clone()))
        return x


class Alpha(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.f(x), alpha=0.5)


class AlphaOnTheSkip(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.f(x), x, alpha=0.5)


class PythonSum(Base):
    def forward(self, x: Tensor) -> Tensor:
        return sum([x, self.f(x)])  # type: ignore[return-value]


class Quantizable(Base):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.functional.add(x, self.f(x))
        return out


class Subtracted(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.f(x)


class InAHelper(Base):
    def residual(self, x: Tensor) -> Tensor:
        return self.f(self.n1(x)) * self.gamma

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.residual(x))


class PostNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(x + self.f(x))
        return self.n2(x + self.g(x))


class PreNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(self.n1(x))
        return x + self.g(self.n2(x))


class Parallel(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.n1(x)) + self.g(self.n2(x))


class ParallelInBrackets(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + (self.f(self.n1(x)) + self.g(self.n2(x)))


class Gated(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.g(x)) * self.f(x) * self.gamma


class ConstantInside(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ramp", torch.rand(W))
        self.plain = torch.rand(W)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.plain = fn(self.plain)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.arange(W, dtype=x.dtype, device=x.device) / torch.full((1,), 7.0)
        return x + self.f(x * self.ramp + self.plain + made)


class ShapesAfterwards(Base):
    def forward(self, x: Tensor) -> Tensor:
        batch, width = x.shape
        x = x + self.f(x).reshape(batch, width)
        return x.view(batch, width, 1).squeeze(-1)


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(W, W, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return x + y


class Decorated(Base):
    @staticmethod
    def _noop(forward: Callable[..., Any]) -> Callable[..., Any]:
        import functools

        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        return wrapper

    def _forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    forward = _noop.__func__(_forward)  # type: ignore[attr-defined]


class Parametrised(Base):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.f[0])
        parametrizations.spectral_norm(self.f[2])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Custom(nn.Module):
    """An activation hidden in a module that looks like a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(W, W) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.weight)


class LinearAct(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class HidingItsActivation(Base):
    def __init__(self, hidden: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hidden(x)


class Shortcut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def padded_by_cat(x: Tensor) -> Tensor:
    x = F.avg_pool2d(x, 2)
    return torch.cat([x, torch.zeros_like(x)], 1)


class Conv(nn.Module):
    """A post-activation block with any shortcut."""

    def __init__(self, shortcut: nn.Module | None, out: int = 8, stride: int = 2) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(4, out, stride), conv(out, out)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu(out, inplace=True)


class PreActivation(nn.Module):
    """The shortcut of a strided block starts from the activated tensor."""

    def __init__(self, strided: bool) -> None:
        super().__init__()
        out = 8 if strided else 4
        self.norm1, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, out)
        self.conv1, self.conv2 = conv(4, out, 2 if strided else 1), conv(out, out)
        self.shortcut = nn.Conv2d(4, 8, 1, 2) if strided else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + shortcut


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = conv(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return x + y * torch.sigmoid(self.fc(y.mean((2, 3))))[:, :, None, None]


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, 1, 1, groups=4)
        self.norm, self.b, self.c = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x).permute(0, 2, 3, 1))
        return x + self.c(F.gelu(self.b(y))).permute(0, 3, 1, 2)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class LoopOfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([mlp(), mlp()]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed in self.layers:  # type: ignore[misc]
            x = attention(x) + x
            x = feed(x) + x
        return x


class SeparateLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(mlp() for _ in range(2))
        self.mlps = nn.ModuleList(mlp() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = x + self.attentions[i](x)
            x = x + self.mlps[i](x)
        return x


class SharedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = mlp()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.layer(x)
        return x


class InARow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = mlp(), mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        x = x + self.b(x)
        return x + self.c(x)


class AroundAStack(nn.Module):
    """A global skip around a loop: the loop is the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.head = mlp()
        self.layers = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        for layer in self.layers:
            y = y + layer(y)
        return x + y


class AroundAModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(W, W), nn.ReLU(), Plain(), Plain())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def shared_block() -> nn.Module:
    block = Plain()
    return Stack(block, block)


def flat() -> Tensor:
    return torch.randn(6, W)


def maps() -> Tensor:
    return torch.randn(6, 4, 8, 8)


def tokens() -> Tensor:
    return torch.randn(6, 5, W)


def two(block: Callable[..., nn.Module], *args: Any) -> Callable[[], nn.Module]:
    return lambda: Stack(block(*args), block(*args))


def stem(*shortcuts: nn.Module) -> nn.Module:
    """Each strided block on its own input, as the ends of stages are."""
    return nn.Sequential(Conv(None, 4, 1), Conv(shortcuts[0]), nn.Conv2d(8, 4, 1))


def against_mask(
    model: nn.Module, inputs: tuple[Tensor, ...], plan: torchdrop.Plan, batch_dim: int = 0
) -> None:
    """What is attached to ``model``, against the same rows as a mask on what is computed whole."""
    masked = copy.deepcopy(model)
    torchdrop.remove_stochastic_depth(masked)
    torchdrop.add_stochastic_depth(
        masked,
        0.5,
        schedule="uniform",
        compute="mask",
        batch_dim=batch_dim,
        example_inputs=inputs,
    )
    plan.set_p(torchdrop.get_plan(masked).state_dict()["p"])
    for seed in range(3):
        torch.manual_seed(seed)
        out = model(*inputs)
        torch.manual_seed(seed)
        torch.testing.assert_close(out, masked(*inputs), rtol=0, atol=1e-10)
    assert max(plan.observed().values()) > 0
