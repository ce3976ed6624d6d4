"""Measure the share of each branch in the FLOPs of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from torchdrop import cost
from torchdrop.finding.example_calls import run_once
from torchdrop.finding.residual import Branch
from torchdrop.running.block_site import BlockSite

__all__ = ["measure_shares", "share_skipped"]


def share_skipped(branches: Iterable[Branch], rates: Iterable[float]) -> float:
    """Return the part of the FLOPs of a pass that is not computed at these drop rates.

    Branches that are masked are computed for all rows.
    """
    return sum(
        branch.share * rate
        for branch, rate in zip(branches, rates, strict=True)
        if branch.share and branch.action != "mask"
    )


def measure_shares(model: nn.Module, sites: Sequence[BlockSite], example_inputs: Any) -> None:
    """Set ``share`` of every branch: its part of the FLOPs of a pass in which all rows are kept.

    It stays None for a branch that the pass does not reach.
    """
    branches = [branch for site in sites for branch in site.branches]
    for branch in branches:
        branch.share = None
    sites[0].settings.measured = True
    with cost.FlopCounter() as counter, ExitStack() as stack:
        for site in sites:
            stack.enter_context(site.metering(lambda: counter.total))
        run_once(model, example_inputs)
    for branch in branches:
        if branch.share is not None and counter.total:
            branch.share /= counter.total
