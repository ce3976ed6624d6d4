"""Blocks that leave their last addition to the next block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop

W, B = 8, 6


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(W), nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class Block(Mixer):
    def forward(self, h: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = h if residual is None else h + residual
        return super().forward(self.norm(residual)), residual


class StreamFirst(Mixer):
    """Returns the stream first; the stream is kept in another precision."""

    def forward(self, residual: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = residual if h is None else residual + h
        out = super().forward(self.norm(residual.to(self.norm.weight.dtype)))
        return residual.double(), out


class TwoParts(Mixer):
    """As with a feed-forward part after the mixer: one sum inside, one handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2, self.mlp = nn.LayerNorm(W), Mixer()

    def forward(self, h: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = h if residual is None else h + residual
        h = super().forward(self.norm(residual))
        residual = h + residual
        return self.mlp(self.norm2(residual)), residual


class AddNorm(nn.Module):
    """A fused addition and norm: returns both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(W)

    def forward(self, h: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = h + residual
        return self.norm(residual), residual


class FusedParts(Mixer):
    """Two parts, each after a fused addition and norm."""

    def __init__(self) -> None:
        super().__init__()
        self.add1, self.add2, self.mlp = AddNorm(), AddNorm(), Mixer()

    def forward(self, h: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h, residual = self.add1(h, residual)
        h, residual = self.add2(super().forward(h), residual)
        return self.mlp(h), residual


class Net(nn.Module):
    kind: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(self.kind() for _ in range(3)), nn.LayerNorm(W)

    def forward(self, h: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            h, residual = layer(h, residual)
        return self.last(h + residual)


class NetOfTwoParts(Net):
    kind = TwoParts


class NetWithStreamFirst(Net):
    kind = StreamFirst

    def forward(self, residual: Tensor) -> Tensor:
        h = None
        for layer in self.layers:
            residual, h = layer(residual, h)
        return self.last(residual + h)


class NetWithFusedEnd(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last = AddNorm()  # type: ignore[assignment]

    def forward(self, h: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            h, residual = layer(h, residual)
        return self.last(h, residual)[0]


class NetOfFusedParts(NetWithFusedEnd):
    kind = FusedParts

    def forward(self, h: Tensor) -> Tensor:
        residual = torch.zeros_like(h)
        for layer in self.layers:
            h, residual = layer(h, residual)
        return self.last(h, residual)[0]


NETS = [Net, NetOfTwoParts, NetWithStreamFirst, NetWithFusedEnd, NetOfFusedParts]


def _by_hand(model: Any, x: Tensor, rows: dict[str, Tensor], p: float) -> Tensor:
    """The network with every branch on all rows, and masked."""

    def masked(name: str, out: Tensor) -> Tensor:
        weights = torch.zeros(len(x), 1, dtype=x.dtype)
        weights[rows[name]] = 1.0 / (1.0 - p)
        return out * weights

    for i, layer in enumerate(model.layers):
        name = f"layers.{i}"
        if isinstance(layer, TwoParts):
            x = x + masked(f"{name}:fc1", Mixer.forward(layer, layer.norm(x)))
            x = x + masked(f"{name}:mlp", layer.mlp(layer.norm2(x)))
        elif isinstance(layer, FusedParts):
            x = x + masked(f"{name}:fc1", Mixer.forward(layer, layer.add1.norm(x)))
            x = x + masked(f"{name}:mlp", layer.mlp(layer.add2.norm(x)))
        else:
            x = x + masked(name, Mixer.forward(layer, layer.norm(x)))
    return (model.last.norm if isinstance(model.last, AddNorm) else model.last)(x)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_the_branch_that_is_handed_on_is_dropped(net: type[Net], example: bool) -> None:
    torch.manual_seed(0)
    model = net().double()
    dense, x = copy.deepcopy(model), torch.randn(B, W, dtype=torch.double)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", example_inputs=x if example else None
    )
    assert [block.name for block in plan.blocks] == [f"layers.{i}" for i in range(3)]
    if example:
        assert {branch.action for block in plan.blocks for branch in block.branches} == {"skip"}
    for size in (B, 3):
        x = torch.randn(size, W, dtype=torch.double, requires_grad=True)
        out = model(x)
        wanted = _by_hand(dense, x, plan.last_kept(), 0.5)
        torch.testing.assert_close(out, wanted)
        found, expected = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, wanted))
        torch.testing.assert_close(found, expected)
    model.eval()
    torch.testing.assert_close(model(x), dense.eval()(x))


@pytest.mark.parametrize("net", NETS)
def test_all_dropped_is_the_stream(net: type[Net]) -> None:
    model, x = net().double(), torch.randn(B, W, dtype=torch.double)
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform", example_inputs=x)
    last = model.last.norm if isinstance(model.last, AddNorm) else model.last
    torch.testing.assert_close(model(x), last(x))


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_the_branch_keeps_its_dtype(p: float) -> None:
    model, x = Net(), torch.randn(B, W)
    plan = torchdrop.add_stochastic_depth(model, p, schedule="uniform", example_inputs=x)
    found: list[torch.dtype] = []
    model.layers[0].register_forward_hook(lambda m, i, out: found.append(out[0].dtype))
    model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).sum().backward()
    assert found == [torch.float32, torch.bfloat16]
    assert {block.action for block in plan.blocks} == {"skip"}


# --- what looks like it ---------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Adds two inputs and returns an output beside the sum, which nobody adds."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        outs, stream = [], None
        for level in self.levels:
            out, stream = level(x, stream)
            outs.append(out)
        return torch.cat(outs, -1)


@pytest.mark.parametrize("example", [True, False])
def test_an_output_that_nobody_adds_is_no_branch(example: bool) -> None:
    x = torch.randn(B, W) if example else None
    with pytest.raises(ValueError, match="no residual branches found"):
        torchdrop.add_stochastic_depth(Pyramid(), 0.5, example_inputs=x)


class AlsoRead(Net):
    """The branch is also returned."""

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        residual = None
        for layer in self.layers:
            h, residual = layer(h, residual)
        return self.last(h + residual), h


def test_a_branch_with_another_use_is_left_out() -> None:
    plan = torchdrop.add_stochastic_depth(AlsoRead(), 0.5, example_inputs=torch.randn(B, W))
    assert [block.name for block in plan.blocks] == ["layers.0", "layers.1"]


class OneModule(Mixer):
    """The branch is a single child, which norms its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Sequential(nn.LayerNorm(W), nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W))

    def forward(self, h: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = h if residual is None else h + residual
        return self.mixer(residual), residual


class NetOfOneModule(Net):
    kind = OneModule


@pytest.mark.parametrize("example", [True, False])
def test_a_branch_may_be_one_module(example: bool) -> None:
    x = torch.randn(B, W) if example else None
    plan = torchdrop.add_stochastic_depth(NetOfOneModule(), 0.5, example_inputs=x)
    assert [block.name for block in plan.blocks] == [f"layers.{i}" for i in range(3)]


class Gates(nn.Module):
    """Adds a position first, and hands on a gate beside the stream, which nobody adds."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.norm, self.gate = Mixer(), nn.LayerNorm(W), Mixer()

    def forward(self, x: Tensor, gate: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        x = x + pos
        x = x + self.mixer(x) * torch.sigmoid(gate)
        return x, self.gate(self.norm(x))


class NetOfGates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gates() for _ in range(3))

    def forward(self, x: Tensor, gate: Tensor, pos: Tensor) -> Tensor:
        for layer in self.layers:
            x, gate = layer(x, gate, pos)
        return x * gate


def test_a_gate_that_is_handed_on_is_no_branch() -> None:
    torch.manual_seed(0)
    model = NetOfGates().double()
    dense = copy.deepcopy(model)
    inputs = tuple(torch.randn(B, W, dtype=torch.double) for _ in range(3))
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=inputs)
    out = model(*inputs)
    kept = plan.last_kept()
    assert list(kept) == [f"layers.{i}" for i in range(3)]
    x, gate, pos = inputs
    for layer, rows in zip(dense.layers, kept.values(), strict=True):
        weights = torch.zeros(B, 1, dtype=x.dtype).index_fill_(0, rows, 2.0)
        x = x + pos
        x = x + weights * layer.mixer(x) * torch.sigmoid(gate)
        gate = layer.gate(layer.norm(x))
    torch.testing.assert_close(out, x * gate)


class Decoder(nn.Module):
    """A decoder block with an output of its own, for supervision at each depth."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(W, W, 3, padding=1), nn.BatchNorm2d(W)
        self.head = nn.Conv2d(W, outputs, 1)

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        x = x + skip
        x = x + self.conv(x).relu()
        return x, self.head(self.norm(x).relu())


class NetOfDecoders(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Decoder(outputs) for _ in range(2))

    def forward(self, x: Tensor, one: Tensor, two: Tensor) -> list[Tensor]:
        outs = []
        for layer, skip in zip(self.layers, (one, two), strict=True):
            x, out = layer(x, skip)
            outs.append(out)
        return outs


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("outputs", [1, 3])
def test_an_output_of_another_shape_stays_as_it_is(
    outputs: int, example: bool, verify: bool
) -> None:
    model, x = NetOfDecoders(outputs), torch.randn(4, W, 5, 5)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, example_inputs=(x, x, x) if example else None, verify=verify
    )
    assert [block.name for block in plan.blocks] == ["layers.0", "layers.1"]
    assert [tuple(out.shape) for out in model(x, x, x)] == [(4, outputs, 5, 5)] * 2
    assert not plan.blocks[0].reason.startswith("the output")
