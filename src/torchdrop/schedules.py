"""Rates: what a legal one is, and the rules that spread one over depth. Plain floats, no torch."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

__all__ = ["DEPTH_RULES", "check_rate", "linear", "linear_from_zero", "over_depth", "uniform"]


def check_rate(p: object, name: str = "p") -> float:
    """Return ``p`` as a float, or say why it is no probability.

    Any real number in [0, 1] is fine, the integers 0 and 1 and NumPy scalars too.

    Raises:
        TypeError: ``p`` is a bool, a string, a tensor or anything else that is not a real number.
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
    """The paper's linear decay: block l of L gets ``p * l / L``, l = 1..L.

    Huang et al. 2016, arXiv:1603.09382, equation (4), written for the drop probability.
    """
    rate = check_rate(p)
    _check_depth(depth)
    return [rate * (block / depth) for block in range(1, depth + 1)]


def linear_from_zero(p: float, depth: int) -> list[float]:
    """Timm's rule: block l of L gets ``p * (l - 1) / (L - 1)``; a lone block gets 0."""
    rate = check_rate(p)
    _check_depth(depth)
    if depth == 1:
        return [0.0]
    return [rate * (block / (depth - 1)) for block in range(depth)]


def uniform(p: float, depth: int) -> list[float]:
    """Every block gets ``p``."""
    rate = check_rate(p)
    _check_depth(depth)
    return [rate] * depth


DEPTH_RULES: dict[str, Callable[[float, int], list[float]]] = {
    "linear": linear,
    "linear_from_zero": linear_from_zero,
    "uniform": uniform,
}


def over_depth(p: float, depth: int, schedule: str = "linear") -> list[float]:
    """The rates of ``depth`` blocks under the rule named ``schedule``, the first block first.

    Args:
        p: The drop probability of the deepest block, in [0, 1].
        depth: The number of blocks L.
        schedule: ``"linear"``, ``"linear_from_zero"`` or ``"uniform"``.

    Raises:
        ValueError: ``schedule`` is none of these, or ``p`` or ``depth`` is out of range.
        TypeError: ``p`` is no real number or ``depth`` no integer.
    """
    if not isinstance(schedule, str) or schedule not in DEPTH_RULES:
        raise ValueError(
            f"schedule has to be one of {', '.join(map(repr, DEPTH_RULES))}, but got {schedule!r}"
        )
    return DEPTH_RULES[schedule](p, depth)
