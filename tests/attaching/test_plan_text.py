"""What print(plan) shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.attaching.plan_text import WIDTH, table_of
from torchdrop.finding.residual import Branch, Residual

W = 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Linear(W, W))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x)


class Reused(Block):
    """What ``f`` returns is used again, and only what follows is the branch's own."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return x + self.g(h) + h.mean()


class Returned(Block):
    """The block returns its branch, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = self.f(x)
        return x + h, h


class Net(nn.Module):
    def __init__(self, blocks: int = 4, kind: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def lines(plan: torchdrop.Plan) -> list[str]:
    return repr(plan).splitlines()


def test_blocks_of_one_form_are_one_row_for_each_branch() -> None:
    plan = torchdrop.add_stochastic_depth(Net(4), 0.4, example_inputs=torch.randn(2, W))
    assert lines(plan)[1:4] == [
        "block          branch  shortcut               p  action       FLOPs",
        "layers.0 to 3  f       identity  0.100 to 0.400  skip    12.5% each",
        "layers.0 to 3  g       identity  0.100 to 0.400  skip    12.5% each",
    ]
    assert len(plan.blocks) == 4


def test_two_blocks_are_not_folded() -> None:
    plan = torchdrop.add_stochastic_depth(Net(2), 0.4)
    names = [line.split()[0] for line in lines(plan)[2:6]]
    assert names == ["layers.0", "layers.0", "layers.1", "layers.1"]


def block(name: str, p: float = 0.5, module: nn.Module | None = None, **given: object) -> Residual:
    options = {"shortcut": "identity", "action": "skip", "reason": "", **given}
    branch = Branch(name=name, p=p, children=(), masks=(), **options)  # type: ignore[arg-type]
    return Residual(name, module or nn.Identity(), [branch])


def names_of(blocks: list[Residual]) -> list[str]:
    table = table_of(blocks, measured=False)
    return [line[: table[0].index("branch")].strip() for line in table[1:]]


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["a.0", "a.1", "a.2"], ["a.0 to 2"]),
        (["layer_8", "layer_9", "layer_10"], ["layer_8 to 10"]),
        (["a.0.x", "a.1.x", "a.2.x"], ["a.0.x to a.2.x"]),
        (["a.0.0", "a.0.1", "a.0.2", "a.1.0", "a.1.1", "a.1.2"], ["a.0.0 to 2", "a.1.0 to 2"]),
        (["a.0", "b.1", "b.2", "b.3"], ["a.0", "b.1 to 3"]),
        (["a", "b", "c"], ["a", "b", "c"]),
        (["a.0", "a.2", "a.4", "a.6"], ["a.0", "a.2", "a.4", "a.6"]),
        (["a.0", "a.1", "a.2", "a.4"], ["a.0 to 2", "a.4"]),
        (["a.2", "a.1", "a.0"], ["a.2", "a.1", "a.0"]),
        (["a.0", "a.1"], ["a.0", "a.1"]),
    ],
)
def test_names_that_differ_in_one_number_are_folded(names: list[str], rows: list[str]) -> None:
    assert names_of([block(name) for name in names]) == rows


def test_blocks_of_another_form_are_rows_of_their_own() -> None:
    odd = [{}, {"shortcut": "projection"}, {"action": "layer"}, {"module": nn.ReLU()}]
    for given in odd:
        blocks = [block("a.0"), block("a.1", **given), block("a.2")]  # type: ignore[arg-type]
        assert len(names_of(blocks)) == (3 if given else 1)


def test_what_is_masked_or_not_proved_comes_first() -> None:
    blocks = [
        block("a.0"),
        block("a.1", action="mask"),
        block("a.2", proved=True),
        block("a.3", partly=True),
        block("a.4", proved=False),
    ]
    assert names_of(blocks) == ["a.1", "a.3", "a.4", "a.0", "a.2"]


def test_a_branch_that_is_computed_in_part_is_not_called_skipped() -> None:
    plan = torchdrop.add_stochastic_depth(Net(4, Reused), 0.4, example_inputs=torch.randn(2, W))
    assert " partly [1] " in lines(plan)[2]
    reason = (
        "Reused.f is used outside the branch, too: computed for every row, 50% of the parameters"
    )
    assert reason in " ".join(repr(plan).split())
    assert {b.action for r in plan.blocks for b in r.branches} == {"skip"}
    assert all(b.partly for r in plan.blocks for b in r.branches)


class WithWeights(nn.Module):
    """Returns weights beside its output, or None in place of them."""

    def __init__(self, returns_weights: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)
        self.returns_weights = returns_weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.fc(x).tanh()
        return y, (y if self.returns_weights else None)


class Attends(nn.Module):
    def __init__(self, returns_weights: bool) -> None:
        super().__init__()
        self.attend = WithWeights(returns_weights)
        self.out = nn.Linear(W, W, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y, weights = self.attend(x)
        return x + self.out(y), weights


@pytest.mark.parametrize("returns_weights", [False, True])
def test_the_plan_says_that_an_example_may_make_a_branch_whole(returns_weights: bool) -> None:
    model = Net(3, partial(Attends, returns_weights))
    text = repr(torchdrop.add_stochastic_depth(model, 0.4))
    assert " partly [1] " in text
    share = (W + 1) / (2 * W + 1)
    told = f"computed for every row, {share:.0%} of the parameters of the branch; give example_"
    assert told in " ".join(text.split())
    torchdrop.remove_stochastic_depth(model)
    text = repr(torchdrop.add_stochastic_depth(model, 0.4, example_inputs=torch.randn(2, W)))
    assert (" partly " in text) == returns_weights
    assert "; give example_inputs" not in " ".join(text.split())


def test_a_branch_that_is_returned_is_masked_and_reached() -> None:
    plan = torchdrop.add_stochastic_depth(Net(4, Returned), 0.4, example_inputs=torch.randn(2, W))
    assert "did not call" not in repr(plan)
    assert "Returned.f is used outside the branch, too" in repr(plan)
    assert "expected FLOPs of a forward pass in training: 100.0% of dense" in repr(plan)


def test_a_plan_fits_its_width() -> None:
    reason = "because " * 40
    long = "a_module_with_quite_a_long_name.encoder.stages.3.layers_of_the_stage.blocks"
    blocks = [block(f"{long}.{i}", p=i / 20, reason=reason) for i in range(12)]
    blocks += [block(f"{long}.{i}.another_part_of_it") for i in (12, 14)]
    table = table_of(blocks, measured=True)
    assert max(map(len, table)) <= WIDTH
    assert table[1].startswith("...")
    assert "blocks.0 to 11 " in table[1]
    assert " ".join(" ".join(table).split()).count(reason.strip()) == 1


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ([0.1, 0.2, 0.3], "0.100 to 0.300"),
        ([0.3, 0.2, 0.1], "0.300 to 0.100"),
        ([0.1, 0.9, 0.1], "0.100 to 0.900"),
        ([0.5, 0.5, 0.5], "0.500  "),
    ],
)
def test_rates_that_neither_rise_nor_fall_show_the_least_and_the_largest(
    rates: list[float], told: str
) -> None:
    table = table_of([block(f"a.{i}", p=p) for i, p in enumerate(rates)], measured=False)
    assert told in table[1]
