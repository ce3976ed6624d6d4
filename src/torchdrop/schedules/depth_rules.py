"""Check a drop rate, and spread one over the depth of a network.

To add a rule, write its function and add one entry to ``DEPTH_RULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

__all__ = [
    "DEPTH_RULES",
    "DepthRule",
    "check_depth_rule",
    "check_rate",
    "exponential",
    "linear",
    "linear_from_zero",
    "over_depth",
    "per_stage",
    "uniform",
]

# The name of a rule, or a function of (p, depth) that returns the rates of the blocks.
DepthRule = str | Callable[[float, int], Sequence[float]]


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


def exponential(p: float, depth: int) -> list[float]:
    """Let the rate grow exponentially from 0 to p: ``p * (2 ** ((l - 1) / (L - 1)) - 1)``.

    For block l = 1..L: ``1 + rate / p`` doubles from the first block to the last. A single block
    gets 0. LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710, section 4.1 (D(l) =
    exp(l ln 2 / (L - 1)) - 1, with l from 0).
    """
    rate = check_rate(p)
    _check_depth(depth)
    if depth == 1:
        return [0.0]
    return [rate * (2.0 ** (block / (depth - 1)) - 1.0) for block in range(depth)]


@dataclass(frozen=True)
class _PerStage:
    """The rule that :func:`per_stage` returns; a class, so that it can be pickled."""

    blocks: tuple[int, ...]
    rule: DepthRule

    def __call__(self, p: float, depth: int) -> list[float]:
        rate = check_rate(p)
        _check_depth(depth)
        if depth != sum(self.blocks):
            raise ValueError(
                f"the stages of per_stage({list(self.blocks)}) have {sum(self.blocks)} blocks, but "
                f"the model has {depth}; give the number of blocks in each of its stages"
            )
        rates = over_depth(rate, len(self.blocks), self.rule)
        return [
            rate for rate, blocks in zip(rates, self.blocks, strict=True) for _ in range(blocks)
        ]


def per_stage(
    blocks: Sequence[int], rule: DepthRule = "linear"
) -> Callable[[float, int], list[float]]:
    """Return a rule that gives each stage one rate, constant within the stage.

    Args:
        blocks: The number of blocks in each stage, such as ``[3, 4, 6, 3]`` for a ResNet-50.
        rule: The rule that spreads p over the stages, as for :func:`over_depth`.

    Returns:
        A function of (p, depth), for the argument ``schedule`` of ``add_stochastic_depth``. It
        raises a ValueError if the stages do not have ``depth`` blocks.

    Raises:
        TypeError, ValueError: ``blocks`` is not a list of numbers of blocks, or there is no such
            rule.

    Example:
        >>> from torchdrop import schedules
        >>> schedules.per_stage([2, 1])(0.5, 3)
        [0.25, 0.25, 0.5]
    """
    if isinstance(blocks, str | bytes) or not isinstance(blocks, Sequence):
        raise TypeError(f"blocks has to be a list of numbers of blocks, but got {blocks!r}")
    for number in blocks:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"a stage has a whole number of blocks, but got {number!r}")
        if number < 1:
            raise ValueError(f"a stage has at least one block, but got {number}")
    check_depth_rule(rule)
    return _PerStage(tuple(blocks), rule)


DEPTH_RULES: dict[str, Callable[[float, int], list[float]]] = {
    "linear": linear,
    "linear_from_zero": linear_from_zero,
    "uniform": uniform,
    "exponential": exponential,
}
"""The rules by name, for every argument ``schedule``. A rule maps (p, depth) to the rates of the
blocks, the first block first. No rate of these rules is above ``p``.
"""


def check_depth_rule(schedule: object, name: str = "schedule") -> None:
    """Raise ValueError unless ``schedule`` is the name of a rule or a function."""
    if callable(schedule) or (isinstance(schedule, str) and schedule in DEPTH_RULES):
        return
    raise ValueError(
        f"{name} has to be one of {', '.join(map(repr, DEPTH_RULES))}, or a function of (p, depth) "
        f"that returns a rate for each block, but got {schedule!r}"
    )


def over_depth(p: float, depth: int, schedule: DepthRule = "linear") -> list[float]:
    """Return the rates of ``depth`` blocks by the rule ``schedule``, the first block first.

    Args:
        p: The upper bound of the rates, in [0, 1]; most rules give it to the deepest block.
        depth: The number of blocks L.
        schedule: The name of a rule, a key of ``DEPTH_RULES``; or a function of (p, depth) that
            returns a rate for each block.

    Raises:
        ValueError: ``schedule`` is not a rule, ``p`` or ``depth`` is out of range, or a function
            does not return ``depth`` probabilities.
        TypeError: ``p`` is not a real number, ``depth`` is not an integer, or a function does not
            return a list of real numbers.
    """
    check_depth_rule(schedule)
    if isinstance(schedule, str):
        return DEPTH_RULES[schedule](p, depth)
    rate = check_rate(p)
    _check_depth(depth)
    found = schedule(rate, depth)
    try:
        rates = [check_rate(r, f"schedule({rate:g}, {depth})[{i}]") for i, r in enumerate(found)]
    except TypeError as error:
        raise TypeError(
            f"schedule has to return a rate for each of the {depth} blocks, but returned {found!r}"
            f": {error}"
        ) from None
    if len(rates) != depth:
        raise ValueError(
            f"schedule has to return a rate for each of the {depth} blocks, but returned "
            f"{len(rates)}: {found!r}"
        )
    return rates
