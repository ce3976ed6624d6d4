"""What is not dropped is listed with its reason."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchdrop

W = 4


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W))
        self.g = nn.Linear(W, W)


class Plain(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Gated(Parts):
    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.g(x))
        return gate * self.f(x) + (1.0 - gate) * x


class Lerped(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.f(x), 0.5)


class LerpedInPlace(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 1.0).lerp_(self.f(x), torch.sigmoid(self.g(x)))


class GatedInside(Parts):
    """A residual whose branch holds a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Gated()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class ParallelLinear(nn.Module):
    """Two linear layers that are added, as in RepVGG: no residual, and nothing to say about."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def stack(*kinds: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(kind() for kind in kinds for _ in range(3)))


def lines(plan: torchdrop.Plan) -> list[str]:
    text = " ".join(repr(plan).split())
    return [f"not taken: {part.strip()}" for part in text.split("not taken: ")[1:]]


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("kind", [Gated, Lerped, LerpedInPlace])
def test_blends_are_listed_with_file_and_line(kind: type[nn.Module], example: bool) -> None:
    model, x = stack(Plain, kind), torch.randn(6, W)
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x if example else None)
    assert [r.name for r in plan.blocks] == ["0", "1", "2"]
    line = kind.forward.__code__.co_firstlineno
    (told,) = lines(plan)
    assert told.startswith(f"not taken: 3 to 5 ({kind.__name__}, test_not_taken.py:{line}: ")


def test_a_lone_residual_and_what_select_leaves_out_are_listed() -> None:
    model = nn.ModuleDict({"one": stack(Plain), "two": nn.Sequential(Parts(), GatedInside())})
    plan = torchdrop.add_stochastic_depth(model, 0.5, select=lambda r: r.name.startswith("one"))
    assert any("two.1 (GatedInside: " in line for line in lines(plan))
    plan = torchdrop.add_stochastic_depth(stack(Plain), 0.5, select=lambda r: r.name != "1")
    assert lines(plan) == ["not taken: 1 (Plain: select left it out)"]


@pytest.mark.parametrize("kinds", [(Plain,), (GatedInside,), (Plain, ParallelLinear)])
def test_there_is_no_word_on_what_is_taken_or_no_sum(kinds: tuple[type[nn.Module], ...]) -> None:
    assert lines(torchdrop.add_stochastic_depth(stack(*kinds), 0.5)) == []


def test_copies_know_it_too() -> None:
    model = stack(Plain, Gated)
    told = lines(torchdrop.add_stochastic_depth(model, 0.5))
    assert told
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert lines(torchdrop.get_plan(other)) == told


def test_a_model_of_gates_alone_is_not_called_one_without_branches() -> None:
    with pytest.raises(ValueError, match=r"gates and other sums .* '0' \(Gated, test_not") as error:
        torchdrop.add_stochastic_depth(stack(Gated), 0.5)
    assert "no branches to drop" not in str(error.value)


class BranchesOnData(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + self.f(x)
        return x - self.f(x)


@pytest.mark.parametrize("every", [True, False])
def test_find_residuals_lists_what_it_leaves_out(every: bool) -> None:
    linear = ParallelLinear()
    model = nn.Sequential(Plain(), Plain(), Gated(), Lerped(), BranchesOnData(), linear)
    found = torchdrop.find_residuals(model, select=(lambda r: True) if every else None)
    assert [residual.name for residual in found] == ["0", "1"]
    reasons = dict(found.not_taken)
    assert list(reasons) == ["2", "3", "4"]
    file = Path(__file__).name
    for path, kind in (("2", Gated), ("3", Lerped)):
        line = kind.forward.__code__.co_firstlineno
        assert reasons[path].startswith(f"{kind.__name__}, {file}:{line}: neither side")
    line = BranchesOnData.forward.__code__.co_firstlineno + 1
    assert reasons["4"].startswith("BranchesOnData: it cannot be read: ")
    assert f"{file}:{line} (if x.sum() > 0:)" in reasons["4"]
    assert all(why in repr(found) for why in reasons.values())


def test_a_residual_that_select_leaves_out_is_listed() -> None:
    found = torchdrop.find_residuals(nn.Sequential(Plain(), Plain()), select=lambda r: r.name > "0")
    assert found.not_taken == (("0", "Plain: select left it out"),)
    assert torchdrop.find_residuals(nn.Linear(2, 2)).not_taken == ()
