"""Stochastic depth that really skips the work, for any PyTorch model, in one line."""

from torchdrop import cost, diagnostics, functional, layers, schedules
from torchdrop.attaching.apply_schedule import apply_schedule
from torchdrop.attaching.attach import (
    add_stochastic_depth,
    has_stochastic_depth,
    remove_stochastic_depth,
)
from torchdrop.attaching.pause import paused
from torchdrop.attaching.plan import Plan, get_plan
from torchdrop.finding.find_residuals import find_residuals
from torchdrop.finding.residual import Residual
from torchdrop.layers import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Residual",
    "add_stochastic_depth",
    "apply_schedule",
    "cost",
    "diagnostics",
    "find_residuals",
    "functional",
    "get_plan",
    "has_stochastic_depth",
    "paused",
    "remove_stochastic_depth",
    "schedules",
]
__all__ += layers.__all__
