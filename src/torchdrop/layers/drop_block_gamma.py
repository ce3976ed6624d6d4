"""The probability of a seed with which DropBlock drops exactly the share p of a map.

Along an axis of length L, blocks of length b = min(block_size, L) start at the L - b + 1 places
where a whole one fits. Unit i is covered by n_i = min(i + 1, L - i, b, L - b + 1) of them, a unit
of a map by the product N of the n of its axes. With seeds drawn with probability gamma, a unit is
dropped with probability 1 - (1 - gamma)**N, and the mean of that over the map is the rate.
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

__all__ = ["RATES", "check_block_size", "drop_block_gamma", "law", "law_of_tensor"]

RATES = ("exact", "paper")


def _covering(length: int, block: int) -> list[int]:
    """For each unit of an axis, in how many blocks that fit it lies."""
    b = min(block, length)
    return [min(i + 1, length - i, b, length - b + 1) for i in range(length)]


@lru_cache(maxsize=256)
def _histogram(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
    """For each N, the share of the units of a map that lie in N blocks."""
    found = {1: 1}
    for length, b in zip(shape, block, strict=True):
        axis = Counter(_covering(length, b))
        product: Counter[int] = Counter()
        for n, units in found.items():
            for m, more in axis.items():
                product[n * m] += units * more
        found = product
    total = math.prod(shape)
    return tuple((n, units / total) for n, units in sorted(found.items()))


@lru_cache(maxsize=4096)
def law(shape: tuple[int, ...], block: tuple[int, ...], p: float, rate: str) -> tuple[float, float]:
    """The probability of a seed, and the share of units that is kept on average."""
    if p in (0.0, 1.0):
        return p, 1.0 - p
    histogram = _histogram(shape, block)
    if rate == "paper":
        gamma = p / sum(share * n for n, share in histogram)
        t = math.log1p(-gamma)
        return gamma, sum(share * math.exp(n * t) for n, share in histogram)
    # In t = log(1 - gamma) the equation is log(mean of exp(N t)) = log(1 - p). Its left side is
    # increasing and convex, so Newton's steps from t = 0, right of the root, go left and never
    # beyond it: no bracket is needed. Its slope lies between 1 (the corners) and the largest N.
    aim, t = math.log1p(-p), 0.0
    for _ in range(200):
        mean = sum(share * math.exp(n * t) for n, share in histogram)
        slope = sum(share * n * math.exp(n * t) for n, share in histogram) / mean
        # Near 1 the logarithm is taken of the difference to it, which is not rounded away.
        less = sum(share * math.expm1(n * t) for n, share in histogram)
        step = ((math.log1p(less) if mean > 0.5 else math.log(mean)) - aim) / slope
        t -= step
        if step <= 4e-16 * -t:
            break
    return -math.expm1(t), 1.0 - p


def check_block_size(block_size: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return the block's length along each of ``ndim`` axes.

    Raises:
        TypeError: ``block_size`` is neither an integer nor a sequence of them.
        ValueError: It has another number of axes, or a length below 1.
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
    """The probability of a seed with which DropBlock drops the share ``p`` of a map.

    Solves, with N the number of blocks that fit in the map and cover a unit::

        1 - mean over units of (1 - gamma)**N = p

    which has one root for every p, since its left side increases from 0 to 1. To 1e-9 and better.

    Args:
        shape: The map: ``(H, W)``, ``(D, H, W)``, or a length.
        block_size: The block, an integer or one a axis; clipped to the map.
        p: The share of units to drop, in [0, 1].
        rate: ``"exact"``, or ``"paper"``: ``p / mean of N``, which is the first step of Newton's
            method on the equation. As blocks overlap, it always delivers less than p.

    Raises:
        TypeError: ``p`` is no real number, or a length no integer.
        ValueError: ``p`` is outside [0, 1], a length below 1, ``rate`` unknown, or ``block_size``
            has another number of axes than ``shape``.

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
    return law(sizes, check_block_size(block_size, len(sizes)), check_rate(p), rate)[0]


@torch.library.custom_op("torchdrop::drop_block_law", mutates_args=())
def law_of_tensor(p: Tensor, shape: Sequence[int], block: Sequence[int], rate: str) -> Tensor:
    """:func:`law` of a rate that is a tensor on the host, as one node of a compiled graph.

    The equation is solved at run time, so a rate that changes every step recompiles nothing.
    """
    return torch.tensor(law(tuple(shape), tuple(block), float(p), rate), dtype=torch.float64)


@law_of_tensor.register_fake
def _(p: Tensor, shape: Sequence[int], block: Sequence[int], rate: str) -> Tensor:
    return p.new_empty(2)
