"""Stochastic depth that really skips the work, for any PyTorch model, in one line."""

from torchdrop.attach import (
    add_stochastic_depth,
    has_stochastic_depth,
    remove_stochastic_depth,
)
from torchdrop.plan import Plan, get_plan
from torchdrop.residual import Residual, find_residuals

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Residual",
    "add_stochastic_depth",
    "find_residuals",
    "get_plan",
    "has_stochastic_depth",
    "remove_stochastic_depth",
]
