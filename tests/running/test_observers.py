"""Observers of sites: each sum is reported, once, with the rows that were kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import torchdrop
from small_nets import Block, kept_mask, net
from torchdrop.running.block_site import BlockSite, sites_of
from torchdrop.running.observers import SumEvent
from zoo import assert_same


class Setting(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.times = 1  # sets an attribute: the block cannot be split
        return x + self.b(self.act(self.a(x)))


def observed(block: type[Block] = Block, **options: Any) -> tuple[Any, Any, list[SumEvent]]:
    """A model, its plan, and the events of its first site."""
    model = net(2, block=block)
    rates = options.pop("p", [0.5, 0.5])
    plan = torchdrop.add_stochastic_depth(model, rates, example_inputs=torch.randn(4, 6), **options)
    events: list[SumEvent] = []
    sites_of(model)[0].observe(events.append)
    return model, plan, events


@pytest.mark.parametrize("compute", ["auto", "mask"])
@pytest.mark.parametrize("block", [Block, Setting])
def test_the_sum_and_the_kept_rows_are_reported(compute: str, block: type[Block]) -> None:
    model, plan, events = observed(block, compute=compute)
    x = torch.randn(6, 6)
    out = model[0](x)
    (event,) = events
    assert event.index == 0
    assert event.batch == 6
    assert_same(event.skip, x)
    assert event.total is out
    assert isinstance(event.rows, Tensor)
    kept = torch.zeros(6).index_fill(0, event.rows, 1.0)
    assert torch.equal(kept, kept_mask(plan, "0", 6).float())


@pytest.mark.parametrize("compute", ["auto", "mask"])
@pytest.mark.parametrize("block", [Block, Setting])
@pytest.mark.parametrize(("p", "rows"), [(1.0, False), (1e-30, True)])
def test_all_or_no_rows_are_reported_as_a_flag(
    compute: str, block: type[Block], p: float, rows: bool
) -> None:
    model, _, events = observed(block, compute=compute, p=[p, p])
    model[0](torch.randn(6, 6))
    assert [event.rows for event in events] == [rows]


@pytest.mark.parametrize("compute", ["auto", "mask"])
@pytest.mark.parametrize("block", [Block, Setting])
def test_evaluation_is_reported_where_the_site_scales_it(compute: str, block: type[Block]) -> None:
    model, _, events = observed(block, compute=compute, scale="eval")
    out = model.eval()[0](torch.randn(6, 6))
    (event,) = events
    assert event.rows is True
    assert event.total is out
    model, _, events = observed(block, compute=compute, scale="train")
    model.eval()[0](torch.randn(6, 6))
    assert events == []


def test_an_observation_ends_and_others_go_on() -> None:
    model, _, events = observed()
    site, others = sites_of(model)[0], []
    handle = site.observe(others.append)
    model(torch.randn(6, 6))
    handle.remove()
    handle.remove()
    model(torch.randn(6, 6))
    assert (len(events), len(others)) == (2, 1)
    with site.observe(others.append):
        model(torch.randn(6, 6))
    model(torch.randn(6, 6))
    assert (len(events), len(others)) == (4, 2)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_not_observed(copier: Any) -> None:
    model, _, events = observed()
    twin = copier(model)
    twin(torch.randn(6, 6))
    assert events == []
    model(torch.randn(6, 6))
    assert len(events) == 1


def test_nothing_is_made_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(2)
    torchdrop.add_stochastic_depth(model, 0.5)
    monkeypatch.setattr(BlockSite, "_report", None)  # calling it would raise
    model(torch.randn(6, 6))
    sites_of(model)[0].observe(lambda event: None)
    with pytest.raises(TypeError):
        model(torch.randn(6, 6))
