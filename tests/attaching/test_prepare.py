"""What is known of a branch before it is attached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import net
from torchdrop.running.block_site import sites_of

torchvision = pytest.importorskip("torchvision")


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).relu()


@pytest.mark.parametrize(
    ("layer", "x", "convolves"),
    [
        (lambda: nn.Conv1d(2, 2, 3, padding=1), (4, 2, 5), True),
        (lambda: nn.Conv2d(2, 2, 1), (4, 2, 5, 5), True),
        (lambda: nn.ConvTranspose2d(2, 2, 1), (4, 2, 5, 5), True),
        (lambda: nn.Linear(5, 5), (4, 2, 5), False),
        (lambda: nn.LayerNorm((2, 5)), (4, 2, 5), False),
        (lambda: nn.GroupNorm(1, 2), (4, 2, 5), False),
    ],
)
def test_whether_a_branch_convolves(
    layer: type[nn.Module], x: tuple[int, ...], convolves: bool
) -> None:
    # inductor must know the number of rows of a convolution, and of nothing else
    model = nn.Sequential(Around(layer()), Around(layer()))
    torchdrop.add_stochastic_depth(model, 0.5, example_inputs=torch.randn(x))
    assert [branch.facts.convolves for site in sites_of(model) for branch in site.branches] == [
        convolves
    ] * 2


@pytest.mark.parametrize("compute", ["skip", "mask"])
def test_compute_is_an_order(compute: str) -> None:
    plan = torchdrop.add_stochastic_depth(net(), 0.5, compute=compute)
    assert {r.action for r in plan.blocks} == {compute}


class Pointwise(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.seen: list[int] = []
        norm.register_forward_pre_hook(lambda module, args: self.seen.append(len(args[0])))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(x))


def _pointwise(rows: int, make: Any = nn.LayerNorm, **given: Any) -> tuple[nn.Module, Any, Tensor]:
    model = nn.Sequential(*(Pointwise(make(16)) for _ in range(2)))
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", **given)
    return model, plan, torch.randn(rows, 16)


def test_a_small_branch_without_matrices_is_masked_and_the_plan_says_so() -> None:
    model, plan, x = _pointwise(8)
    out = model(x)
    assert [block.seen for block in model] == [[8], [8]]
    assert {block.action for block in plan.blocks} == {"mask"}
    assert "no weight matrices: masked where p times the number of elements is below 16384" in str(
        plan
    )
    kept = plan.last_kept()
    assert [len(rows) for rows in kept.values()] == [4, 4]
    assert plan.observed() == {"0": 0.5, "1": 0.5}
    torch.manual_seed(20161009)
    skipping, plan, x = _pointwise(8, compute="skip")
    torch.testing.assert_close(skipping(x), out)  # the same rows
    assert [block.seen for block in skipping] == [[4], [4]]
    assert {block.action for block in plan.blocks} == {"skip"}
    assert "masked" not in str(plan)


def test_a_large_branch_without_matrices_is_skipped() -> None:
    model, plan, x = _pointwise(2048)
    model(x)
    assert [block.seen for block in model] == [[1024], [1024]]
    assert {block.action for block in plan.blocks} == {"skip"}
    model(x[:1024])
    assert [block.seen[1:] for block in model] == [[1024], [1024]]
    assert {block.action for block in plan.blocks} == {"mask"}


def test_what_is_always_dropped_is_not_computed_and_masked() -> None:
    model, plan, x = _pointwise(8)
    plan.set_p([0.0, 1.0])
    model(x)
    assert [block.seen for block in model] == [[8], []]
    assert {block.action for block in plan.blocks} == {"skip"}


@pytest.mark.parametrize("make", [lambda n: nn.Linear(n, n), nn.BatchNorm1d])
def test_matrices_and_batch_norm_are_never_masked_by_choice(make: Any) -> None:
    model, plan, x = _pointwise(8, make)
    model(x)
    assert [block.seen for block in model] == [[4], [4]]
    assert {block.action for block in plan.blocks} == {"skip"}


class Drops(nn.Module):
    """A block that calls the function by itself."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear, self.p = nn.Linear(6, 6), p

    def forward(self, x: Tensor) -> Tensor:
        return x + torchdrop.functional.drop_path(self.linear(x).relu(), self.p, self.training)


def test_a_function_that_drops_in_the_forward_is_refused_as_its_rate_would_add() -> None:
    model = nn.Sequential(Drops(0.5), Drops(0.5))
    with pytest.raises(ValueError, match=r"drops the branch .* itself \(drop_path\)"):
        torchdrop.add_stochastic_depth(model, 0.5)
    assert not torchdrop.has_stochastic_depth(model)
    plan = torchdrop.add_stochastic_depth(nn.Sequential(Drops(0.0), Drops(0.0)), 0.5)
    assert len(plan.blocks) == 2  # it does nothing
