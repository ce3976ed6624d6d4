"""The sums of a block inside a graph of ``torch.compile``."""

from __future__ import annotations

import inspect
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
    from torchdrop.running.branch_state import BranchState
    from torchdrop.running.split_site import SplitSite
    from torchdrop.running.whole_site import WholeSite

__all__ = ["join_in_graph", "mask_in_graph", "run_whole_in_graph"]


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
    drawn = draw_in_graph(rate.number, batch, _computed_rows(branch, batch), skip)
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
    facts = branch.facts
    out = _masked(branch, out, skip)
    return skip.add_(out) if facts.writes_skip else skip + out


def _masked(branch: BranchState, out: Tensor, skip: Tensor) -> Tensor:
    """Return ``out``, the output of a branch, with zeros in the rows that are dropped."""
    facts, rate = branch.facts, branch.rate
    batch = skip.shape[facts.dim]
    if rate.fixed_decision is None:
        drawn = draw_in_graph(rate.number, batch, batch, skip)
        return _weighted(out, drawn.weights.index_select(0, drawn.positions), facts.dim)
    if rate.fixed_decision:
        return out * facts.gain if facts.gain != 1.0 else out
    return out * 0.0 if facts.writes_skip else zero_from([out])


def _computed_rows(branch: BranchState, batch: Any) -> Any:
    """Return how many rows of a batch are computed for a branch."""
    number, group = branch.rate.number, branch.facts.rows_per_sample
    if group == 1:
        return row_count_in_graph(number, batch, 2)  # one row might be too few for BatchNorm
    samples = row_count_in_graph(number, (batch + group - 1) // group, 1)
    return torch.sym_min(batch, samples * group)


def run_whole_in_graph(
    site: WholeSite, bound: inspect.BoundArguments, tensors: dict[str, Tensor]
) -> Any:
    """Return the output of a block that is dropped as a whole inside a compiled graph.

    Args:
        site: The site of the block.
        bound: The arguments of the call.
        tensors: The tensors in them, by path.
    """
    branch, block = site.branches[0], site.block
    facts, rate, x = branch.facts, branch.rate, tensors[site.block.x]
    dim, batch = facts.dim, x.shape[facts.dim]
    if rate.fixed_decision is False and block.sum_item == "":
        unused = site.unused(facts, x, tuple(tensors.values()))
        return x + zero_from(unused) if unused else x.clone()
    bounded = rate.fixed_decision is None and site.settings.sampling != "independent"
    masked = branch.action == "mask" or site.runs_on_all_ranks(branch)
    # What was not measured would be decided by a shape, and no test of this call confirms it.
    if not bounded or masked or site.assumes(tensors):
        # a copy, since the block may write into it; a compiler removes copies that are not needed
        site.copy_input(bound)
        out = site.run_block(bound)
        site.check_shape(x, site.sum_in(out))
        total = x + _masked(branch, site.sum_in(out) - x, x)
        return site.returned(total, out)
    drawn = draw_in_graph(rate.number, batch, _computed_rows(branch, batch), x)
    taking = partial(take_in_graph, drawn=drawn)
    shortcut = site.cut_arguments(bound, taking, batch).clone()
    out = site.run_block(bound)
    site.check_shape(shortcut, site.sum_in(out))
    added = _weighted(site.sum_in(out) - shortcut, drawn.weights, dim)
    return site.returned(x + scatter_in_graph(added, drawn, dim), out)


def _weighted(out: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Multiply each row of ``out`` by its weight; weight 0 gives 0, even for infinite values."""
    shape = [1] * out.dim()
    shape[dim] = -1
    weights = weights.view(shape)
    # multiplied in the precision of the weights: 1/0.9 in bfloat16 would be 1.109375
    return torch.where(weights != 0.0, out * weights, 0.0).to(out.dtype)


mark_uncompiled(__name__)
