"""Rates that are delivered, decisions that are counted, states that are copied and restored."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from scipy import stats
from torch.utils.checkpoint import checkpoint

import torchdrop
from small_nets import kept_mask, net
from torchdrop.running.branch_state import BranchFacts, BranchState
from torchdrop.running.forward_slot import occupant_of

models = pytest.importorskip("torchvision.models")


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_recomputes_the_same_rows_and_is_not_counted(
    mode: str, reentrant: bool
) -> None:
    model = net(4).double()
    twin = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)
    torchdrop.add_stochastic_depth(twin, 0.5, schedule="uniform", mode=mode)
    x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    for seed in range(4):
        torch.manual_seed(seed)
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=reentrant)
        y.square().sum().backward()
        torch.manual_seed(seed)
        twin(x.detach()).square().sum().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)
    assert all(site.counts.rows_seen == 24 for b in model for site in occupant_of(b).branches)
    assert len(plan.observed()) == 4


@pytest.mark.parametrize("sampling", ["exact", "independent", "window"])
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_rows_are_dropped_at_the_rate_asked_for(sampling: str, compute: str) -> None:
    model = net(2, 1)
    plan = torchdrop.add_stochastic_depth(
        model, 0.3, schedule="uniform", sampling=sampling, compute=compute
    )
    steps, batch = 1500, 7
    per_row = torch.zeros(batch)
    with torch.no_grad():
        for _ in range(steps):
            model(torch.zeros(batch, 1))
            per_row += kept_mask(plan, "1", batch)
    dropped = plan.observed()["1"] * steps * batch
    # rows are drawn without replacement: the binomial bound is the widest of the three laws
    assert stats.binomtest(round(dropped), steps * batch, 0.3).pvalue > 1e-6
    for kept in per_row:
        assert stats.binomtest(round(float(kept)), steps, 0.7).pvalue > 1e-6


def test_the_rate_test_can_fail() -> None:
    """Its twin: a plan that takes p for the keep probability."""
    model = net(2, 1)
    plan = torchdrop.add_stochastic_depth(model, 1 - 0.3, schedule="uniform")
    with torch.no_grad():
        for _ in range(300):
            model(torch.zeros(7, 1))
    assert stats.binomtest(round(plan.observed()["1"] * 2100), 2100, 0.3).pvalue < 1e-6


def test_blocks_are_independent_and_seeds_fix_everything() -> None:
    model, x = net(2, 1), torch.zeros(10, 1)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")

    def draw(steps: int) -> list[tuple[int, ...]]:
        rows = []
        for _ in range(steps):
            model(x)
            rows += [tuple(r.tolist()) for r in plan.last_kept().values()]
        return rows

    torch.manual_seed(1)
    first = draw(200)
    torch.manual_seed(1)
    assert draw(200) == first
    same = sum(a == b for a, b in zip(first[::2], first[1::2], strict=True))
    assert same < 10  # 252 subsets: .8 expected


def facts(**given: Any) -> BranchFacts:
    """Facts about a plain branch."""
    plain: dict[str, Any] = {
        **dict.fromkeys(("name", "block", "path"), "block"),
        **dict.fromkeys(("index", "order", "dim"), 0),
        **dict.fromkeys(("children", "masks", "inner", "own"), ()),
        **dict.fromkeys(
            ("writes_skip", "branch_first", "has_batch_norm", "elementwise", "convolves"), False
        ),
        **{"shortcut": "identity", "inherited": 0.0, "gain": 0.5, "row_layouts": None},
        **{"sampling": "exact", "scale": "train"},
    }
    return BranchFacts(**{**plain, **given})


def test_facts_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        facts().dim = 1  # type: ignore[misc]


@pytest.mark.parametrize(("scale", "gain"), [("train", 1.0), ("eval", 0.5)])
def test_the_gain_in_training_follows_the_scale(scale: str, gain: float) -> None:
    state = BranchState(facts(scale=scale), "skip", "")
    state.rate.set(0.5)
    assert state.rate.gain == gain


@pytest.mark.parametrize(("p", "always"), [(0.0, True), (0.5, None), (1.0, False)])
def test_a_graph_may_hold_fixed_whether_rows_are_drawn(p: float, always: bool | None) -> None:
    state = BranchState(facts(), "skip", "")
    state.rate.set(p)
    assert state.rate.fixed_decision is always


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_counts_and_draws_for_itself(copier: Any) -> None:
    state = BranchState(facts(), "skip", "")
    state.rate.set(0.5)
    twin = copier(state)
    assert twin.rate.number != state.rate.number
    twin.rate.draw_rows(8)
    assert (twin.counts.rows_seen, twin.counts.rows_dropped) == (8, 4)
    assert state.counts.rows_seen == 0
    twin.rate.set(0.25)
    assert state.rate.p == 0.5


def test_a_state_is_restored() -> None:
    state = BranchState(facts(), "skip", "")
    state.rate.set(0.5)
    state.dtypes["known"] = torch.float32
    before = state.snapshot()
    state.rate.draw_rows(8)
    state.rate.set(1.0)
    state.action, state.reason, state.share = "mask", "a reason", 0.5
    state.dtypes["new"] = torch.float64
    state.sizes[0] = 3
    state.restore(before)
    assert (state.rate.p, state.rate.fixed_decision) == (0.5, None)
    assert (state.counts.rows_seen, state.counts.last) == (0, None)
    assert (state.action, state.reason, state.share) == ("skip", "", None)
    assert state.dtypes == {"known": torch.float32}
    assert state.sizes == {}
