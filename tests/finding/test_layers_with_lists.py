"""Which module is the block, where layers keep their parts in lists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from written_blocks import against_mask

W, L = 4, 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(W, 2 * W), nn.GELU(), nn.Linear(2 * W, W))


class Mix(nn.Module):
    """Mixes the tokens of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(W, 3 * W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).chunk(3, -1)
        out: Tensor = self.o(torch.softmax(q @ k.transpose(1, 2), -1) @ v)
        return out


class Adding(nn.Module):
    """A part that adds for itself."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        out: Tensor = (x if identity is None else identity) + self.f(x)
        return out


class NormsInAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(2))
        self.attn, self.ff = Mix(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norms[0](x))
        out: Tensor = x + self.ff(self.norms[1](x))
        return out


class PartsInLists(nn.Module):
    def __init__(self, attentions: int = 1) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Adding(Mix()) for _ in range(attentions))
        self.ffns = nn.ModuleList([Adding(mlp())])
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(attentions + 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = [*self.attentions, *self.ffns]
        for norm, part in zip(self.norms, parts, strict=True):
            x = norm(part(x))
        return x


class TwoAttentions(PartsInLists):
    def __init__(self) -> None:
        super().__init__(2)


class Stage(nn.Module):
    """Two lists of equal length, whose elements alternate: each is a block."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(Adding(Mix()) for _ in range(2))
        self.ffns = nn.ModuleList(Adding(mlp()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for mixer, ffn in zip(self.mixers, self.ffns, strict=True):
            x = ffn(mixer(x))
        return x


class Loop(nn.Module):
    """A model whose own forward adds in a loop over two lists: each step is a block."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(L))
        self.shared = mlp() if shared else None
        self.parts = nn.ModuleList() if shared else nn.ModuleList(mlp() for _ in range(L))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts or [self.shared] * L
        for norm, part in zip(self.norms, parts, strict=True):
            x = x + part(norm(x))
        return x


class Uneven(nn.Module):
    """A stage whose lists differ in length."""

    def __init__(self, adding: int, layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Adding(mlp()) for _ in range(adding))
        self.layers = nn.ModuleList(NormsInAList() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.convs, *self.layers]:
            x = layer(x)
        return x


class Down(nn.Module):
    def __init__(self, adding: int, mixing: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Adding(mlp()) for _ in range(adding))
        self.mixers = nn.ModuleList(Adding(Mix()) for _ in range(mixing))

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.convs, *self.mixers]:
            x = layer(x)
        return x


@pytest.mark.parametrize(("kind", "blocks"), [(Uneven, 14), (Down, 14)])
def test_stages_of_a_stack_are_treated_alike(kind: type[nn.Module], blocks: int) -> None:
    stages = nn.Sequential(kind(2, 1), kind(1, 6), kind(2, 2))  # type: ignore[call-arg]
    plan = torchdrop.add_stochastic_depth(stages, 0.5)
    assert len(plan.blocks) == blocks


def stack(kind: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(kind() for _ in range(L))).double()


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(
    ("kind", "branches"), [(NormsInAList, 2), (PartsInLists, 2), (TwoAttentions, 3)]
)
def test_the_layer_is_the_block_and_its_branches_share_its_rate(
    kind: Callable[[], nn.Module], branches: int, example: bool
) -> None:
    model, x = stack(kind), torch.randn(6, 5, W).double()
    plan = torchdrop.add_stochastic_depth(model, 0.3, example_inputs=x if example else None)
    assert [r.name for r in plan.blocks] == ["0", "1", "2"]
    assert [type(r.module) for r in plan.blocks] == [type(m) for m in model]
    rates = [[b.p for b in r.branches] for r in plan.blocks]
    assert rates == [pytest.approx([p] * branches) for p in (0.1, 0.2, 0.3)]
    names = [b.name for r in plan.blocks for b in r.branches]
    assert len(set(names)) == len(names) == L * branches
    against_mask(model, (x,), plan)


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (lambda: stack(Stage), 4 * L),  # each element of its lists
        (lambda: Loop().double(), L),
        (lambda: Loop(shared=True).double(), L),
        (lambda: PartsInLists().double(), 2),  # no element of a stack of layers
    ],
)
def test_elements_that_are_steps_of_depth_stay_blocks(
    model: Callable[[], nn.Module], blocks: int
) -> None:
    torch.manual_seed(0)
    net, x = model(), torch.randn(6, 5, W).double()
    plan = torchdrop.add_stochastic_depth(net, 0.5, select=lambda r: True)
    assert [len(r.branches) for r in plan.blocks] == [1] * blocks
    against_mask(net, (x,), plan)


def test_a_part_of_the_model_knows_its_block() -> None:
    model = stack(PartsInLists)
    torchdrop.add_stochastic_depth(model, 0.3)
    layer: nn.Module = model[1]
    for part, block in ((layer, layer), (model, layer)):
        assert block in [r.module for r in torchdrop.get_plan(part).blocks]
    ffn = layer.get_submodule("ffns.0")  # a part of a block: there is no module of the block
    assert [r.module for r in torchdrop.get_plan(ffn).blocks] == [ffn]
