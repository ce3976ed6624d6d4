"""DropBlock with an exact rate: the probability of a seed, the masks, and what they do.

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
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdrop.checks import check_choice, check_flag, check_generator, check_input
from torchdrop.draws import keep_mask, laid_out_like, rare_hits, readable
from torchdrop.schedules import check_rate

__all__ = [
    "RATES",
    "SCALES",
    "check_block_size",
    "drop_block1d",
    "drop_block2d",
    "drop_block3d",
    "drop_block_gamma",
]

RATES = ("exact", "paper")
SCALES = ("expectation", "count", "unit")

_AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}

# Drawing the gaps between seeds and writing blocks one by one is faster than drawing every place
# on maps of at least this many units together, while blocks cover less than the maps once.
_WORTH_WRITING = 1 << 16

# Units that are written at a time. Their indices, eight bytes each, stay in a cache, and up to this
# many torch does not wake its other threads.
_WRITTEN = 1 << 15

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# The rate


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
def _law(
    shape: tuple[int, ...], block: tuple[int, ...], p: float, rate: str
) -> tuple[float, float]:
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
    return _law(sizes, check_block_size(block_size, len(sizes)), check_rate(p), rate)[0]


@torch.library.custom_op("torchdrop::drop_block_law", mutates_args=())
def _law_of_tensor(p: Tensor, shape: Sequence[int], block: Sequence[int], rate: str) -> Tensor:
    """:func:`_law` of a rate that is a tensor on the host, as one node of a compiled graph.

    The equation is solved at run time, so a rate that changes every step recompiles nothing.
    """
    return torch.tensor(_law(tuple(shape), tuple(block), float(p), rate), dtype=torch.float64)


@_law_of_tensor.register_fake
def _(p: Tensor, shape: Sequence[int], block: Sequence[int], rate: str) -> Tensor:
    return p.new_empty(2)


# The masks


def _few(
    maps: tuple[int, ...], spatial: tuple[int, ...], block: tuple[int, ...], gamma: float
) -> bool:
    units = math.prod(maps) * math.prod(spatial)
    return units >= _WORTH_WRITING and gamma * math.prod(block) <= 1.0


def _few_blocks(
    maps: tuple[int, ...],
    spatial: tuple[int, ...],
    block: tuple[int, ...],
    gamma: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Where blocks lie, True, written one seed after the other."""
    places = [length - b + 1 for length, b in zip(spatial, block, strict=True)]
    hits = rare_hits(math.prod(maps) * math.prod(places), gamma, generator)
    # From the index among the places of seeds to the index among the units, axis by axis.
    first = torch.zeros_like(hits)
    stride = 1
    for length, fit in zip(reversed(spatial), reversed(places), strict=True):
        rest = hits.div(fit, rounding_mode="floor")
        first.add_(hits.sub_(rest, alpha=fit), alpha=stride)
        hits, stride = rest, stride * length
    first.add_(hits, alpha=stride)
    inside = torch.zeros(1, dtype=torch.int64)
    stride = 1
    for length, b in zip(reversed(spatial), reversed(block), strict=True):
        inside = (torch.arange(b)[:, None] * stride + inside).flatten()
        stride *= length
    dropped = torch.zeros(math.prod(maps) * math.prod(spatial), dtype=torch.bool)
    for part in torch.split(first, max(1, _WRITTEN // inside.numel())):
        dropped.index_fill_(0, (part[:, None] + inside).flatten(), True)
    return dropped.view(*maps, *spatial)


def _any_blocks(
    maps: tuple[int, ...],
    spatial: tuple[int, ...],
    block: tuple[int, ...],
    gamma: float | Tensor,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Where blocks lie, on any device and under any transform: a seed drawn in every place."""
    places = [length - b + 1 for length, b in zip(spatial, block, strict=True)]
    seeds = ~keep_mask((*maps, *places), gamma, device=device, generator=generator)
    # As bytes: of padded booleans torch's compiler makes C++ that does not compile (2.14).
    covered = seeds.to(torch.uint8)
    ndim = len(spatial)
    covered = F.pad(covered, [n for b in reversed(block) for n in (0, b - 1)])
    for axis, b in enumerate(block):
        # Runs of 1, 2, 4, ... and at last b: a maximum over b values in log2(b) passes.
        run = 1
        while run < b:
            shift = min(run, b - run)
            pad = [0] * (2 * ndim)
            pad[2 * (ndim - 1 - axis)], pad[2 * (ndim - 1 - axis) + 1] = shift, -shift
            covered = covered | F.pad(covered, pad)
            run += shift
    return covered != 0


# What they do


class _SelectShared(torch.autograd.Function):
    """``where(dropped, 0, x) / keep`` for a mask that channels share, in half the time.

    All bits of a mask set where kept and none where dropped select as ``where`` does: an inf or NaN
    that is dropped is gone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, keep: float) -> Tensor:
        ctx.save_for_backward(dropped)
        ctx.save_for_forward(dropped)
        ctx.keep = keep
        bits = _BITS[x.element_size()]
        return torch.bitwise_and(x.view(bits), dropped.to(bits).sub_(1)).view(x.dtype).div_(keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dropped,) = ctx.saved_tensors
        # Linear in its input, hence its own derivative, of whatever order.
        return _select(grads[0], dropped, ctx.keep), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (dropped,) = ctx.saved_tensors
        return _select(tangents[0], dropped, ctx.keep)


def _select(x: Tensor, dropped: Tensor, keep: float | Tensor) -> Tensor:
    """``where(dropped, 0, x) / keep``."""
    shared = dropped.shape[1] < x.shape[1]
    if shared and isinstance(keep, float) and x.is_contiguous() and readable(x):
        return _SelectShared.apply(x, dropped, keep)  # type: ignore[no-any-return]
    # The division is in place on a tensor that is ours, and that vmap has made a batch of.
    return torch.where(laid_out_like(x, dropped), 0.0, x).div_(keep)


def _kept_of_units(
    spatial: tuple[int, ...], block: tuple[int, ...], gamma: float | Tensor, like: Tensor
) -> Tensor:
    """For each unit of a map the probability that it is kept; 1 where that is 0."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    covering = torch.ones((), dtype=dtype, device=like.device)
    for length, b in zip(spatial, block, strict=True):
        i = torch.arange(length, dtype=dtype, device=like.device)
        n = torch.minimum(i + 1, length - i).clamp(max=min(b, length - b + 1))
        covering = covering.unsqueeze(-1) * n
    log = torch.as_tensor(gamma, dtype=torch.float64).neg().log1p().to(like.device, dtype)
    kept = (covering * log).exp()
    return kept.where(kept > 0, 1.0)


def _kept_of_samples(dropped: Tensor) -> Tensor:
    """For each sample the share of units that was kept; 1 where none was."""
    units = math.prod(dropped.shape[1:])
    # Counted as integers: in float16 a sum beyond 65504 is inf.
    if readable(dropped):  # count_nonzero of a whole tensor needs no memory, a sum 8 bytes a unit
        count = torch.stack([mask.count_nonzero() for mask in dropped])
    else:
        count = dropped.flatten(1).sum(1)
    kept = (units - count).float() / units
    return kept.where(kept > 0, 1.0).view(-1, *[1] * (dropped.dim() - 1))


def _drop_block(
    x: Tensor,
    p: float,
    block_size: int | Sequence[int],
    training: bool,
    ndim: int,
    rate: str,
    per_channel: bool,
    scale: str,
    generator: torch.Generator | None,
) -> Tensor:
    share = check_rate(p)
    sizes = check_block_size(block_size, ndim)
    check_choice(rate, RATES, "rate")
    check_choice(scale, SCALES, "scale")
    check_flag(per_channel, "per_channel")
    check_input(x)
    check_generator(generator)
    if x.dim() != ndim + 2:
        raise ValueError(
            f"input has to have {ndim + 2} dimensions (batch, channels, {_AXES[ndim]}), "
            f"but got {x.dim()}"
        )
    if not training or share == 0.0:
        return x
    if x.numel() == 0:
        return x.clone()
    spatial = tuple(x.shape[2:])
    block = tuple(min(b, n) for b, n in zip(sizes, spatial, strict=True))
    maps = (x.shape[0], x.shape[1] if per_channel else 1)
    gamma: float | Tensor
    keep: float | Tensor
    if torch.compiler.is_compiling():
        given = torch.zeros((), dtype=torch.float64, device="cpu") + share
        gamma, keep = _law_of_tensor(given, spatial, block, rate).unbind()
    else:
        gamma, keep = _law(spatial, block, share, rate)
    if isinstance(gamma, float) and readable(x) and _few(maps, spatial, block, gamma):
        dropped = _few_blocks(maps, spatial, block, gamma, generator)
    else:
        dropped = _any_blocks(maps, spatial, block, gamma, x.device, generator)
    if scale == "count":
        keep = _kept_of_samples(dropped)
    elif scale == "unit":
        keep = _kept_of_units(spatial, block, gamma, x)
    elif rate == "exact":
        keep = 1.0 - share
    if isinstance(keep, float) and not keep > 0.0:
        keep = 1.0  # nothing is kept: divided by one, zeros stay zeros
    return _select(x, dropped, keep)


def drop_block1d(
    x: Tensor,
    p: float,
    block_size: int | Sequence[int] = 7,
    training: bool = True,
    *,
    rate: str = "exact",
    per_channel: bool = True,
    scale: str = "expectation",
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`drop_block2d` on maps of one axis: an input of shape (batch, channels, length)."""
    if has_torch_function_unary(x):
        return handle_torch_function(
            drop_block1d,
            (x,),
            x,
            p,
            block_size,
            training,
            rate=rate,
            per_channel=per_channel,
            scale=scale,
            generator=generator,
        )
    return _drop_block(x, p, block_size, training, 1, rate, per_channel, scale, generator)


def drop_block2d(
    x: Tensor,
    p: float,
    block_size: int | Sequence[int] = 7,
    training: bool = True,
    *,
    rate: str = "exact",
    per_channel: bool = True,
    scale: str = "expectation",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Set whole blocks of a map to zero, and scale the others so that the mean stays.

    Every place where a block fits starts one with probability gamma, solved for the map so that a
    share of exactly ``p`` of its units is dropped on average (:func:`drop_block_gamma`)::

        y = 0 in a block,   x / (1 - p) elsewhere

    Dropped values are selected away, not multiplied by zero: an inf or NaN among them is gone.
    Seeds do not depend on the dtype of ``x``.

    Args:
        x: Of shape (batch, channels, height, width), of any floating-point dtype. Its memory
            format is kept.
        p: The share of units to drop, in [0, 1]. ``p=1`` gives zeros, and zeros as gradients.
        block_size: Height and width of a block, an integer for both; odd or even, clipped to the
            map. A block of the size of the map drops whole channels.
        training: False returns ``x`` itself. So does ``p=0``.
        rate: ``"exact"``, or ``"paper"``: the gamma of the paper, with which published results
            were obtained and which drops less than ``p``.
        per_channel: Whether each channel has blocks of its own; else a sample's channels share
            them.
        scale: What kept units are divided by. ``"expectation"``: the share that is kept on average,
            1 - p. ``"count"``: the share that was kept in this sample, as in the paper, which
            counts the whole batch and so couples samples. ``"unit"``: the probability that this
            unit is kept, which near borders, where fewer blocks reach, is more than in the centre;
            the mean of each unit is then exact, not just that of the map.
        generator: Draws the seeds, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is no floating-point tensor, ``p`` no real number (a bool or a string is
            none), or ``block_size`` no integer or tuple of them.
        ValueError: ``p`` is NaN or outside [0, 1], ``x`` is not 4-d, ``block_size`` below 1 or for
            another number of axes, ``rate`` or ``scale`` unknown.

    Reference:
        Ghiasi et al. 2018, DropBlock, arXiv:1810.12890.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            drop_block2d,
            (x,),
            x,
            p,
            block_size,
            training,
            rate=rate,
            per_channel=per_channel,
            scale=scale,
            generator=generator,
        )
    return _drop_block(x, p, block_size, training, 2, rate, per_channel, scale, generator)


def drop_block3d(
    x: Tensor,
    p: float,
    block_size: int | Sequence[int] = 7,
    training: bool = True,
    *,
    rate: str = "exact",
    per_channel: bool = True,
    scale: str = "expectation",
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`drop_block2d` on volumes: (batch, channels, depth, height, width)."""
    if has_torch_function_unary(x):
        return handle_torch_function(
            drop_block3d,
            (x,),
            x,
            p,
            block_size,
            training,
            rate=rate,
            per_channel=per_channel,
            scale=scale,
            generator=generator,
        )
    return _drop_block(x, p, block_size, training, 3, rate, per_channel, scale, generator)
