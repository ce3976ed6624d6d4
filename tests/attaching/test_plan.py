"""The plan: rates, what was delivered, and what that saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import net
from torchdrop.attaching.observed_rates import ObservedRate

models = pytest.importorskip("torchvision.models")


def test_observed_counts_since_the_last_call() -> None:
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, [0.0, 0.5])
    model(torch.randn(6, 6))
    assert plan.observed() == {"0": 0.0, "1": 0.5}
    model(torch.randn(6, 6))
    assert plan.observed() == {"0": 0.0, "1": 0.5}


def test_what_no_row_has_reached_is_left_out_with_one_warning() -> None:
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, [0.0, 0.5])
    assert plan.observed() == {"0": 0.0}  # there was no forward pass yet
    model(torch.randn(6, 6))
    assert plan.observed() == {"0": 0.0, "1": 0.5}
    model.eval()(torch.randn(6, 6))
    with pytest.warns(UserWarning, match=r"nothing was dropped in 1 since .* is in evaluation"):
        assert plan.observed() == {"0": 0.0}
    assert plan.observed() == {"0": 0.0}  # one warning


def test_the_warning_says_why_no_row_has_reached_a_branch() -> None:
    model = net(3).eval()
    plan = torchdrop.add_stochastic_depth(model, [0.5] * 3)
    model(torch.randn(6, 6))
    with pytest.warns(UserWarning, match=r"0, 1, 2 since .* the model is in evaluation"):
        plan.observed()
    model = net(3)
    plan = torchdrop.add_stochastic_depth(model, [0.5] * 3)
    model[:2](torch.randn(6, 6))
    with pytest.warns(UserWarning, match=r"in 2 since .* the forward pass did not reach"):
        assert set(plan.observed()) == {"0", "1"}


@pytest.mark.filterwarnings("error")
def test_there_is_no_warning_where_rates_were_delivered_or_paused() -> None:
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, [0.5, 0.5])
    with torchdrop.paused(model):
        model(torch.randn(6, 6))
        assert plan.observed() == {}
    model(torch.randn(6, 6))
    plan.observed_rates()
    plan.set_p(0.0)
    plan.observed()
    plan.observed()


def test_observed_rates_have_rows_and_an_interval() -> None:
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, [0.25, 0.5])
    for _ in range(10):
        model(torch.randn(8, 6))
    found = plan.observed_rates()
    assert found.branches["0"].rate == 0.25
    assert found.branches["0"].rows == 80
    assert found.total.rate == 0.375
    assert found.total.rows == 160
    assert plan.observed_rates() == found  # nothing was reset
    assert plan.observed_rates(reset=True) == found
    assert plan.observed_rates().total == ObservedRate(0.0, 0, 0.0, 1.0)


@pytest.mark.parametrize(("dropped", "rows"), [(0, 10), (3, 10), (10, 10), (50, 1000), (1, 1)])
def test_the_interval_is_that_of_wilson(dropped: int, rows: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(dropped, rows).proportion_ci(method="wilson")
    found = ObservedRate.of(dropped, rows)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0.0 <= found.low <= found.rate <= found.high <= 1.0


def test_the_interval_covers_the_rate_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    counts = torch.binomial(torch.full((4000,), 200.0), torch.tensor(0.3)).int().tolist()
    inside = sum(f.low <= 0.3 <= f.high for f in (ObservedRate.of(n, 200) for n in counts))
    assert inside / 4000 == pytest.approx(0.95, abs=0.012)
    # the twin: another rate lies outside more often
    others = sum(f.low <= 0.36 <= f.high for f in (ObservedRate.of(n, 200) for n in counts))
    assert others / 4000 < 0.7


def test_last_kept_is_a_copy() -> None:
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, [0.5, 1.0])
    assert plan.last_kept() == {}
    model(torch.randn(6, 6))
    plan.last_kept()["0"].zero_()
    assert len(set(plan.last_kept()["0"].tolist())) == 3
    assert len(plan.last_kept()["1"]) == 0


def test_state_dict_goes_round_and_refuses_strangers() -> None:
    plan = torchdrop.add_stochastic_depth(net(3), [0.1, 0.2, 0.3])
    state = plan.state_dict()
    plan.set_p(0.0)
    plan.load_state_dict(state)
    assert [r.p for r in plan.blocks] == [0.1, 0.2, 0.3]
    other = torchdrop.add_stochastic_depth(net(2), 0.5)
    with pytest.raises(ValueError, match="another model: 2 is not in both"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"Plan\.state_dict\(\) returned, of version 1"):
        other.load_state_dict({**state, "version": 2})
    with pytest.raises(ValueError, match="between 0 and 1"):
        plan.load_state_dict({"version": 1, "p": {"0": 0.5, "1": 0.5, "2": 2.0}})
    assert [r.p for r in plan.blocks] == [0.1, 0.2, 0.3]


def test_a_plan_of_what_was_removed_does_not_pretend() -> None:
    model = net(3)
    old = torchdrop.add_stochastic_depth(model, 0.5)
    state = old.state_dict()
    torchdrop.remove_stochastic_depth(model[1])
    for call in (lambda: old.set_p(0.1), lambda: old.load_state_dict(state)):
        with pytest.raises(
            ValueError, match="stochastic depth was removed from some or all blocks"
        ):
            call()
    torchdrop.get_plan(model).set_p([0.1, 0.2])
    torchdrop.remove_stochastic_depth(model)
    new = torchdrop.add_stochastic_depth(model, 0.5)
    with pytest.raises(
        ValueError, match=r"torchdrop.get_plan\(model\) returns the plan of what is"
    ):
        old.set_p(0.1)
    new.set_p(0.1)
    assert new.blocks[-1].p == 0.1
    with pytest.raises(ValueError, match="was removed from some or all blocks"):
        old.observed()
    model(torch.randn(6, 6))
    torchdrop.remove_stochastic_depth(model)
    assert 0.0 <= new.observed()["2"] <= 1.0  # what was delivered before is still told, once
    with pytest.raises(ValueError, match="was removed from some or all blocks"):
        new.observed()


def test_the_table_shows_blocks_branches_rates_and_shares() -> None:
    model = models.vit_b_32(image_size=64)
    plan = torchdrop.add_stochastic_depth(model, 0.2)
    text = repr(plan)
    assert "12 blocks, 24 branches; row mode, exact sampling" in text
    assert "give example_inputs" in text
    torchdrop.remove_stochastic_depth(model)
    x = torch.randn(2, 3, 64, 64)
    plan = torchdrop.add_stochastic_depth(model, 0.2, example_inputs=x)
    text = repr(plan)
    assert "self_attention" in text
    assert "expected FLOPs of a forward pass in training:" in text
    shares = [b.share for r in plan.blocks for b in r.branches]
    assert 0.9 < sum(s for s in shares if s is not None) < 1.0


class Counting(nn.Module):
    """Sets an attribute in its forward, so that it can only be dropped as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x + self.f(x)


@pytest.mark.parametrize(("compute", "expected"), [("skip", "50.0%"), ("mask", "100.0%")])
def test_what_is_masked_saves_no_operations(compute: str, expected: str) -> None:
    model = nn.Sequential(Counting(), Counting())
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", compute=compute, example_inputs=torch.randn(4, 6)
    )
    assert [(b.share, b.action) for r in plan.blocks for b in r.branches] == [
        (0.5, "layer" if compute == "skip" else "mask")
    ] * 2
    assert f"expected FLOPs of a forward pass in training: {expected} of dense" in repr(plan)


def test_a_block_prints_in_one_line() -> None:
    found = torchdrop.find_residuals(models.resnet18())
    assert repr(found[2]) == "<layer2.0 (BasicBlock): 1 branch, projection shortcut, skip, p=0>"


class Masked(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.f, self.drop_path = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), torchdrop.DropPath(p)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop_path(self.f(x))
        return out


def test_the_plan_says_that_other_rates_rest() -> None:
    model = nn.Sequential(Masked(0.05), Masked(0.1))
    plan = torchdrop.add_stochastic_depth(model, 0.2)
    assert "own drop path layers (rates up to 0.1) are inactive, p replaces their rates" in str(
        plan
    )
    plan.set_p(None)
    assert "inactive" not in str(plan)
    assert "sampling='independent' draws as they do" in " ".join(str(plan).split())
    assert "inactive" not in str(torchdrop.add_stochastic_depth(net(2), 0.2))


def test_a_schedule_for_rates_that_the_model_has_is_refused() -> None:
    model = nn.Sequential(Masked(0.05), Masked(0.1))
    with pytest.raises(ValueError, match="leave out schedule="):
        torchdrop.add_stochastic_depth(model, None, schedule="uniform")
    assert not torchdrop.has_stochastic_depth(model)
    plan = torchdrop.add_stochastic_depth(model, None, sampling="independent")
    assert "draw each row independently" not in str(plan)
    plan.set_p(0.2)
    assert "draw each row independently" not in str(plan)


def test_the_plan_says_that_it_rests_or_is_gone() -> None:
    model = net(2)
    plan = torchdrop.add_stochastic_depth(model, 0.2)
    with torchdrop.paused(model):
        assert str(plan).endswith("paused: nothing is dropped now")
    assert "paused" not in str(plan)
    assert "removed" not in str(plan)
    torchdrop.remove_stochastic_depth(model)
    assert "removed from the model" in str(plan)


class Drops(nn.Module):
    """A block that calls the function by itself."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear, self.p = nn.Linear(6, 6), p

    def forward(self, x: Tensor) -> Tensor:
        return x + torchdrop.functional.drop_path(self.linear(x).relu(), self.p, self.training)


def test_a_plan_whose_block_was_replaced_refuses_rates() -> None:
    model = nn.Sequential(Drops(0.0), Drops(0.0))
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    model[1] = Drops(0.0)
    with pytest.raises(ValueError, match="blocks of the model were replaced"):
        plan.set_p(0.1)
    torchdrop.get_plan(model).set_p({"0": 0.1})


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class KeepsPartsInLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions, self.ffns = nn.ModuleList([Adds()]), nn.ModuleList([Adds()])

    def forward(self, x: Tensor) -> Tensor:
        return self.ffns[0](self.attentions[0](x))


def test_a_plan_prints_after_a_layer_was_replaced() -> None:
    model = nn.Sequential(*(KeepsPartsInLists() for _ in range(3)))
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    model[1] = KeepsPartsInLists()
    assert "removed from the model, or from some blocks" in " ".join(str(plan).split())
