"""Gamma: the probability that a block starts at a position, solved so that DropBlock drops p.

Along an axis of length L, a block of length b = min(block_size, L) can start at L - b + 1
positions. Unit i lies in n_i = min(i + 1, L - i, b, L - b + 1) of these blocks, and a unit of a
map in N blocks, the product of the n of its axes. If each block is drawn with probability gamma,
a unit is dropped with probability 1 - (1 - gamma)**N. The drop rate is the mean over the map.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchdrop.checks import check_choice
from torchdrop.schedules import check_rate

__all__ = ["drop_block_gamma"]

RATES = ("exact", "paper")


def _blocks_over_each_unit(length: int, block: int) -> list[int]:
    """Return, for each unit of an axis, the number of blocks that fit the axis and cover it."""
    b = min(block, length)
    return [min(i + 1, length - i, b, length - b + 1) for i in range(length)]


@lru_cache(maxsize=256)
def _cover_histogram(
    shape: tuple[int, ...], block: tuple[int, ...]
) -> tuple[tuple[int, float], ...]:
    """Return pairs of N and the share of the units of a map that lie in N blocks."""
    found = {1: 1}
    for length, b in zip(shape, block, strict=True):
        axis = Counter(_blocks_over_each_unit(length, b))
        product: Counter[int] = Counter()
        for n, units in found.items():
            for m, more in axis.items():
                product[n * m] += units * more
        found = product
    total = math.prod(shape)
    return tuple((n, units / total) for n, units in sorted(found.items()))


@lru_cache(maxsize=4096)
def seed_and_keep_probability(
    shape: tuple[int, ...], block: tuple[int, ...], p: float, rate: str
) -> tuple[float, float]:
    """Return gamma, and the share of units that is kept on average."""
    if p in (0.0, 1.0):
        return p, 1.0 - p
    histogram = _cover_histogram(shape, block)
    if rate == "paper":
        gamma = p / sum(share * n for n, share in histogram)
        t = math.log1p(-gamma)
        return gamma, sum(share * math.exp(n * t) for n, share in histogram)
    # With t = log(1 - gamma), the equation reads log(mean of exp(N t)) = log(1 - p). Its left side
    # is increasing and convex, so Newton's method from t = 0, right of the root, never steps
    # beyond it, and needs no bracket. The slope lies between 1 (the corners) and the largest N.
    aim, t = math.log1p(-p), 0.0
    for _ in range(200):
        mean = sum(share * math.exp(n * t) for n, share in histogram)
        slope = sum(share * n * math.exp(n * t) for n, share in histogram) / mean
        # Near 1, log1p of the difference to 1 is used, since the mean itself rounds it away.
        less = sum(share * math.expm1(n * t) for n, share in histogram)
        step = ((math.log1p(less) if mean > 0.5 else math.log(mean)) - aim) / slope
        t -= step
        if step <= 4e-16 * -t:
            break
    return -math.expm1(t), 1.0 - p


def check_block_size(block_size: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return the length of the block along each of ``ndim`` axes.

    Raises:
        TypeError: ``block_size`` is neither an integer nor a sequence of them.
        ValueError: It is for another number of axes, or has a length below 1.
    """
    given: Any = block_size
    sizes: tuple[Any, ...] = tuple(given) if isinstance(given, (tuple, list)) else (given,) * ndim
    if any(isinstance(b, bool) or not isinstance(b, int) for b in sizes):
        raise TypeError(
            f"block_size has to be an integer or a tuple of {ndim}, but got {block_size!r}"
        )
    if len(sizes) != ndim:
        raise ValueError(
            f"block_size has to be an integer or a tuple of {ndim}, but got {block_size!r}"
        )
    if any(b < 1 for b in sizes):
        raise ValueError(f"block_size has to be 1 or more, but got {block_size!r}")
    return sizes


def drop_block_gamma(
    shape: int | Sequence[int], block_size: int | Sequence[int], p: float, *, rate: str = "exact"
) -> float:
    """Return the probability gamma that a block starts at a position, for a drop rate of ``p``.

    With N the number of blocks that fit in the map and cover a unit, gamma solves::

        1 - mean over units of (1 - gamma)**N = p

    The equation has one root for every p, since its left side increases from 0 to 1 with gamma.
    The root is accurate to 1e-9 or better.

    Args:
        shape: The size of the map: ``(H, W)``, ``(D, H, W)``, or a length.
        block_size: The size of a block, an integer or one for each axis; clipped to the map.
        p: The share of units to drop, in [0, 1].
        rate: ``"exact"``, or ``"paper"``: ``p / mean of N``, the first step of Newton's method on
            the equation. As blocks overlap, it always drops less than p.

    Raises:
        TypeError: ``p`` is not a real number, or a length is not an integer.
        ValueError: ``p`` is outside [0, 1], a length is below 1, ``rate`` is unknown, or
            ``block_size`` is for another number of axes than ``shape``.

    Example:
        >>> round(drop_block_gamma((14, 14), 7, 0.1), 5)
        0.00723
    """
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
        raise TypeError(f"shape has to be an integer or a tuple of integers, but got {shape!r}")
    if not sizes or any(n < 1 for n in sizes):
        raise ValueError(f"shape has to have lengths of 1 or more, but got {shape!r}")
    check_choice(rate, RATES, "rate")
    block = check_block_size(block_size, len(sizes))
    return seed_and_keep_probability(sizes, block, check_rate(p), rate)[0]


@torch.library.custom_op("torchdrop::drop_block_law", mutates_args=())
def seed_and_keep_probability_op(
    p: Tensor, shape: Sequence[int], block: Sequence[int], rate: str
) -> Tensor:
    """Return both results of :func:`seed_and_keep_probability`, as one node of a compiled graph.

    ``p`` is a tensor on the host. The equation is solved when the graph runs, so a rate that
    changes every step does not recompile the graph.
    """
    both = seed_and_keep_probability(tuple(shape), tuple(block), float(p), rate)
    return torch.tensor(both, dtype=torch.float64)


@seed_and_keep_probability_op.register_fake
def _(p: Tensor, shape: Sequence[int], block: Sequence[int], rate: str) -> Tensor:
    return p.new_empty(2)
