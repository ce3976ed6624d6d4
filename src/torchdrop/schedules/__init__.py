"""Check a drop rate, and spread one over depth or over training time. Plain floats, no torch.

Over depth, a rule maps (p, depth) to the rates of the blocks, the first block first: ``linear``,
``linear_from_zero``, ``uniform``, ``exponential`` and ``per_stage``. Over time, a rule maps the
progress of training, from 0 to 1, to a rate: see :mod:`torchdrop.schedules.over_time`.
"""

from torchdrop.schedules import over_time
from torchdrop.schedules.depth_rules import (
    DEPTH_RULES,
    DepthRule,
    check_depth_rule,
    check_rate,
    exponential,
    linear,
    linear_from_zero,
    over_depth,
    per_stage,
    uniform,
)

__all__ = [
    "DEPTH_RULES",
    "DepthRule",
    "check_depth_rule",
    "check_rate",
    "exponential",
    "linear",
    "linear_from_zero",
    "over_depth",
    "over_time",
    "per_stage",
    "uniform",
]
