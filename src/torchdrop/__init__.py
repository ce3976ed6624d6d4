"""Stochastic depth that really skips the work, for any PyTorch model, in one line."""

from torchdrop import cost, diagnostics, functional, schedules
from torchdrop.attaching.attach import (
    add_stochastic_depth,
    has_stochastic_depth,
    remove_stochastic_depth,
)
from torchdrop.attaching.plan import Plan, get_plan, paused
from torchdrop.finding.residual import Residual
from torchdrop.finding.survey import find_residuals
from torchdrop.layers import (
    Cutout,
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    DropPath,
    GaussianDropout,
    PathDrop,
    ShakeDrop,
    SpatialDropout,
    StochasticDepth,
    UniformDropout,
)

__version__ = "0.1.0"

__all__ = [
    "Cutout",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropPath",
    "GaussianDropout",
    "PathDrop",
    "Plan",
    "Residual",
    "ShakeDrop",
    "SpatialDropout",
    "StochasticDepth",
    "UniformDropout",
    "add_stochastic_depth",
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
