"""Stochastic depth by torchdrop: residual branches dropped for single samples or whole batches."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from torch import nn

import torchdrop

from ..errors import value_errors_for_user
from .registry import Applied, Method, register


class PlanApplied(Applied):
    """Stochastic depth at work on a network, described by its plan."""

    def __init__(self, plan: torchdrop.Plan) -> None:
        self.plan = plan
        self.asked = fmean(block.p for block in plan.blocks)

    def observed(self) -> float | None:
        """Return the mean drop rate over branches that training delivered since the last call."""
        delivered: Mapping[str, float] = self.plan.observed()
        return fmean(delivered.values()) if delivered else None


def _stochastic_depth(model: nn.Module, p: float, **options: Any) -> Applied:
    with value_errors_for_user():
        plan = torchdrop.add_stochastic_depth(model, p, schedule="linear", **options)
    return PlanApplied(plan)


def _drop_path(model: nn.Module, p: float) -> Applied:
    return _stochastic_depth(model, p, mode="row", sampling="independent", compute="mask")


register(
    Method(
        "drop_path",
        "each sample drops its own branches by a mask: every branch is computed in full",
        _drop_path,
        p=0.5,
        default=True,
    )
)


def _stochastic_depth_row(model: nn.Module, p: float) -> Applied:
    return _stochastic_depth(model, p, mode="row", sampling="exact")


register(
    Method(
        "stochastic_depth_row",
        "each sample drops its own branches, and only the kept rows are computed",
        _stochastic_depth_row,
        p=0.5,
        default=True,
    )
)


def _stochastic_depth_batch(model: nn.Module, p: float) -> Applied:
    return _stochastic_depth(model, p, mode="batch", scale="eval")


register(
    Method(
        "stochastic_depth_batch",
        "the whole batch drops a branch, as in the paper",
        _stochastic_depth_batch,
        p=0.5,
        default=True,
    )
)
