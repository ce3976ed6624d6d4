"""The sums of a split block inside a graph of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchdrop.finding.row_layout import RowLayout
from torchdrop.rows.in_graph import (
    draw_in_graph,
    mark_uncompiled,
    row_count_in_graph,
    scatter_in_graph,
    take_in_graph,
    zero_from,
)

if TYPE_CHECKING:
    from torchdrop.running.split_site import SplitSite

__all__ = ["join_in_graph", "mask_in_graph"]


def join_in_graph(site: SplitSite, k: int, skip: Tensor, inputs: Sequence[Any]) -> Tensor:
    """Return ``skip`` plus branch ``k``, computed on the kept rows inside a compiled graph.

    The number of computed rows follows from the rate, so that it is known before rows are drawn.
    """
    branch = site.branch(k)
    facts, rate = branch.facts, branch.rate
    dim, batch = facts.dim, skip.shape[facts.dim]
    if rate.fixed_decision is False:
        unused = site.unused(facts, skip, inputs)
        if facts.writes_skip:
            return skip.add_(zero_from(unused)) if unused else skip
        return skip + zero_from(unused) if unused else skip.clone()
    # With "independent" each row is drawn alone, so any number of rows may be kept.
    bounded = rate.fixed_decision is None and site.settings.sampling != "independent"
    if not bounded or branch.depends or site.runs_on_all_ranks(branch):
        return site.mask(k, skip, site.compute(site.train, k, inputs))
    group = facts.rows_per_sample
    if group == 1:
        size = row_count_in_graph(rate.number, batch, 2)  # one row might be too few for BatchNorm
    else:
        samples = row_count_in_graph(rate.number, (batch + group - 1) // group, 1)
        size = torch.sym_min(batch, samples * group)
    drawn = draw_in_graph(rate.number, batch, size, skip)
    known = site.train[k // len(site.branches)].row_layouts[k]
    taking = partial(take_in_graph, drawn=drawn)
    layouts = known or [RowLayout(dim, 1)] * len(inputs)
    cut = [
        site.cut(facts, value, taking, layout, batch, known is not None)
        for value, layout in zip(inputs, layouts, strict=True)
    ]
    out = _weighted(site.compute(site.train, k, cut), drawn.weights, dim)
    out = scatter_in_graph(out, drawn, dim)
    return skip.add_(out) if facts.writes_skip else skip + out


def mask_in_graph(site: SplitSite, k: int, skip: Tensor, out: Tensor) -> Tensor:
    """Return ``skip`` plus ``out``, the output of branch ``k``, masked inside a compiled graph."""
    branch = site.branch(k)
    facts, rate = branch.facts, branch.rate
    batch = skip.shape[facts.dim]
    if rate.fixed_decision is None:
        drawn = draw_in_graph(rate.number, batch, batch, skip)
        out = _weighted(out, drawn.weights.index_select(0, drawn.positions), facts.dim)
    elif rate.fixed_decision:
        out = out * facts.gain if facts.gain != 1.0 else out
    else:
        out = out * 0.0 if facts.writes_skip else zero_from([out])
    return skip.add_(out) if facts.writes_skip else skip + out


def _weighted(out: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Multiply each row of ``out`` by its weight; weight 0 gives 0, even for infinite values."""
    shape = [1] * out.dim()
    shape[dim] = -1
    weights = weights.view(shape)
    # multiplied in the precision of the weights: 1/0.9 in bfloat16 would be 1.109375
    return torch.where(weights != 0.0, out * weights, 0.0).to(out.dtype)


mark_uncompiled(__name__)
