"""Networks whose residual sums are all in one forward: each sum is a step of depth."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from written_blocks import against_mask

W = 4


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(1, outputs), nn.ReLU()
    )


class ResNet9(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.widen = conv(3, W), conv(W, 2 * W)
        self.res1 = nn.Sequential(conv(W, W), conv(W, W))
        self.res2 = nn.Sequential(conv(2 * W, 2 * W), conv(2 * W, 2 * W))
        self.head = nn.Linear(2 * W, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.res1(x) + x
        x = self.widen(x)
        x = self.res2(x) + x
        return self.head(x.mean((2, 3)))


class Backbone(nn.Module):
    """A flat network as a part of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = ResNet9(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x).relu())


class Unnamed(nn.Module):
    """Branches that have no module of their own, and one module that two of them call."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Linear(3, W), nn.Linear(W, 2)
        self.a, self.b, self.c = nn.Linear(W, W), nn.Linear(W, 2 * W), nn.Linear(2 * W, W)

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        x = x + self.a(x).tanh()
        x = x + self.c(self.b(x).relu())
        x = x + self.c(self.b(x).tanh())
        return self.head(x)


class Layer(nn.Module):
    """One block with two branches, and norms outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(W, W), nn.Linear(W, W)
        self.n1, self.n2 = nn.LayerNorm(W), nn.LayerNorm(W)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(x + self.a(x).tanh())
        return self.n2(x + self.b(x).tanh())


class Projected(nn.Module):
    """One block with a projection on its first shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.down = nn.Linear(W, W), nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x) + self.a(x).tanh()
        return x + self.b(x).tanh()


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(
    ("kind", "names"), [(ResNet9, ["res1", "res2"]), (Backbone, ["net.res1", "net.res2"])]
)
def test_each_sum_is_a_block_at_its_depth(
    kind: type[nn.Module], names: list[str], example: bool
) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(6, 3, 8, 8).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x if example else None)
    assert [(r.name, r.p, r.module) for r in plan.blocks] == [
        (name, p, model.get_submodule(name)) for name, p in zip(names, (0.25, 0.5), strict=True)
    ]
    against_mask(model, (x,), plan)


def test_a_branch_without_a_module_has_the_name_of_its_largest_child() -> None:
    model = Unnamed()
    plan = torchdrop.add_stochastic_depth(model, 0.3)
    assert [r.name for r in plan.blocks] == ["a", "b", "c"]
    assert [r.p for r in plan.blocks] == pytest.approx([0.1, 0.2, 0.3])


def test_behind_a_feature_extractor_the_rates_are_those_of_the_model() -> None:
    models = pytest.importorskip("torchvision.models")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = models.resnet18(num_classes=3)
    nodes = {"layer2": "a", "layer4": "b"}
    extractor = extraction.create_feature_extractor(copy.deepcopy(model), nodes)
    plans = [torchdrop.add_stochastic_depth(m.train(), 0.5) for m in (model, extractor)]
    first, second = ([(r.name, r.p) for r in plan.blocks] for plan in plans)
    assert first == second


@pytest.mark.parametrize("kind", [Layer, Projected])
def test_a_block_with_two_branches_is_one_block(kind: type[nn.Module]) -> None:
    plan = torchdrop.add_stochastic_depth(kind(), 0.5, select=lambda r: True)
    assert [len(r.branches) for r in plan.blocks] == [2]


class Shared(nn.Module):
    """As ALBERT: one layer, with a projection of its own between its two branches, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = SharedLayer()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x)
        return x


class SharedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(W, W), nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x).tanh()
        x = x + self.b(x).tanh()
        return self.out(x)


@pytest.mark.parametrize("example", [True, False])
def test_a_layer_that_is_called_repeatedly_is_one_block(example: bool) -> None:
    found = torchdrop.find_residuals(Shared(), torch.randn(4, W) if example else None)
    assert [(r.name, len(r.branches)) for r in found] == [("layer", 2)]


class CallsOneLayerOften(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.layer, self.head = nn.Linear(W, W), nn.Linear(W, W), nn.Linear(W, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        for _ in range(4):
            x = x + self.layer(x).tanh()
        return self.head(x)


def test_sums_that_cannot_be_told_apart_stay_one_block() -> None:
    plan = torchdrop.add_stochastic_depth(CallsOneLayerOften(), 0.5)
    assert [len(r.branches) for r in plan.blocks] == [4]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b1, self.b2, self.head = nn.Linear(W, W), Inner(), Inner(), nn.Linear(W, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b1(x)
        x = x + self.b2(x)
        return self.head(x)


def test_a_block_inside_a_branch_keeps_its_name() -> None:
    found = torchdrop.find_residuals(Nested(), select=lambda r: True)
    names = [branch.name for r in found for branch in r.branches]
    assert len(set(names)) == len(names) == 4
    plan = torchdrop.add_stochastic_depth(Nested(), 0.5, select=lambda r: True)
    assert sum(len(r.branches) for r in plan.blocks) == 4


class Grouped(nn.Module):
    """Branches whose modules are all in one container."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(W, W)
        self.net = nn.ModuleDict({k: nn.Linear(W, W) for k in "abn"})

    def forward(self, x: Tensor) -> Tensor:
        x, net = self.stem(x), self.net
        x = x + net["a"](net["n"](x)).tanh()
        return x + net["b"](net["n"](x)).tanh()


def test_a_module_that_holds_several_branches_is_no_block_of_one() -> None:
    plan = torchdrop.add_stochastic_depth(Grouped(), 0.5)
    assert "net" not in [r.name for r in plan.blocks]
