"""Measure each branch's share of the FLOPs of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from torchdrop import cost
from torchdrop.finding.example_calls import run_once
from torchdrop.running.block_site import BlockSite

__all__ = ["measure_shares"]


@contextmanager
def _metering(sites: Sequence[BlockSite], meter: Callable[[], int]) -> Iterator[None]:
    settings = sites[0].settings
    active = [site.active for site in sites]
    settings.meter = meter
    try:
        for site in sites:
            site.active = True
        yield
    finally:
        settings.meter = None
        for site, was in zip(sites, active, strict=True):
            site.active = was


def measure_shares(model: nn.Module, sites: Sequence[BlockSite], example_inputs: Any) -> None:
    """Set ``share`` of every branch: its part of the FLOPs of one forward pass, nothing dropped."""
    for site in sites:
        for branch in site.branches:
            branch.share = None
    sites[0].settings.measured = True
    with cost.FlopCounter() as counter, _metering(sites, lambda: counter.total):
        run_once(model, example_inputs)
    for site in sites:
        for branch in site.branches:
            if branch.share is not None and counter.total:
                branch.share /= counter.total
