"""Check a drop rate, and spread one over depth or over training time. Plain floats, no torch.

Over depth, a rule maps (p, depth) to the rates of the blocks, the first block first: ``linear``,
``linear_from_zero``, ``uniform``, ``exponential`` and ``per_stage``. Over time, a rule maps the
progress of training, from 0 to 1, to a rate: see :mod:`torchdrop.schedules.over_time`.
"""

from torchdrop.schedules import depth_rules, over_time
from torchdrop.schedules.depth_rules import *  # noqa: F403

__all__ = [*depth_rules.__all__, "over_time"]
