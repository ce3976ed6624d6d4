"""Check a drop rate, and spread one over the depth of a network. Plain floats, no torch.

To add a rule, write its function and add one entry to ``DEPTH_RULES``.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

__all__ = ["DEPTH_RULES", "check_rate", "linear", "linear_from_zero", "over_depth", "uniform"]


def check_rate(p: object, name: str = "p") -> float:
    """Return ``p`` as a float, or raise an error if it is not a probability.

    Any real number in [0, 1] is accepted, also the integers 0 and 1 and NumPy scalars.

    Raises:
        TypeError: ``p`` is a bool, a string, a tensor or another object that is not a real number.
        ValueError: ``p`` is NaN or lies outside [0, 1].
    """
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(
            f"{name} has to be a real number between 0 and 1, but got {p!r} "
            f"of type {type(p).__name__}"
        )
    value = float(p)
    if not 0.0 <= value <= 1.0:  # NaN fails both comparisons
        raise ValueError(f"drop probability {name} has to be between 0 and 1, but got {p}")
    return value


def _check_depth(depth: int) -> None:
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth has to be a number of blocks, but got {depth!r}")
    if depth < 0:
        raise ValueError(f"depth has to be 0 or more, but got {depth}")


def linear(p: float, depth: int) -> list[float]:
    """Let the rate grow linearly from the input, as in the paper: block l of L gets ``p * l / L``.

    For l = 1..L. Huang et al. 2016, arXiv:1603.09382, equation (4), written for the drop
    probability.
    """
    rate = check_rate(p)
    _check_depth(depth)
    return [rate * (block / depth) for block in range(1, depth + 1)]


def linear_from_zero(p: float, depth: int) -> list[float]:
    """Let the rate grow linearly from 0, as in timm: block l of L gets ``p * (l - 1) / (L - 1)``.

    For l = 1..L. A single block gets 0.
    """
    rate = check_rate(p)
    _check_depth(depth)
    if depth == 1:
        return [0.0]
    return [rate * (block / (depth - 1)) for block in range(depth)]


def uniform(p: float, depth: int) -> list[float]:
    """Give every block the rate ``p``."""
    rate = check_rate(p)
    _check_depth(depth)
    return [rate] * depth


DEPTH_RULES: dict[str, Callable[[float, int], list[float]]] = {
    "linear": linear,
    "linear_from_zero": linear_from_zero,
    "uniform": uniform,
}
"""The rules by name, for every argument ``schedule``. A rule maps (p, depth) to the rates of the
blocks, the first block first. No rate is above ``p``.
"""


def over_depth(p: float, depth: int, schedule: str = "linear") -> list[float]:
    """Return the rates of ``depth`` blocks by the rule ``schedule``, the first block first.

    Args:
        p: The upper bound of the rates, in [0, 1]; most rules give it to the deepest block.
        depth: The number of blocks L.
        schedule: The name of a rule, a key of ``DEPTH_RULES``.

    Raises:
        ValueError: ``schedule`` is not the name of a rule, or ``p`` or ``depth`` is out of range.
        TypeError: ``p`` is not a real number, or ``depth`` is not an integer.
    """
    if not isinstance(schedule, str) or schedule not in DEPTH_RULES:
        raise ValueError(
            f"schedule has to be one of {', '.join(map(repr, DEPTH_RULES))}, but got {schedule!r}"
        )
    return DEPTH_RULES[schedule](p, depth)
