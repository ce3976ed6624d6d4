"""DropBlock: whole blocks of a map are set to zero, at an exact rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdrop.checks import check_choice, check_flag, check_generator, check_input
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.layers.draws import (
    can_read_on_host,
    in_memory_format_of,
    keep_mask,
    random_hit_indices,
)
from torchdrop.layers.drop_block_gamma import (
    RATES,
    check_block_size,
    law,
    law_of_tensor,
)
from torchdrop.schedules import check_rate

__all__ = [
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "drop_block1d",
    "drop_block2d",
    "drop_block3d",
]

SCALES = ("expectation", "count", "unit")

_AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}

# Drawing the gaps between seeds and writing blocks one by one is faster than drawing every place
# on maps of at least this many units together, while blocks cover less than the maps once.
_WORTH_WRITING = 1 << 16

# Units that are written at a time. Their indices, eight bytes each, stay in a cache, and up to this
# many torch does not wake its other threads.
_WRITTEN = 1 << 15

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    hits = random_hit_indices(math.prod(maps) * math.prod(places), gamma, generator)
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
    if shared and isinstance(keep, float) and x.is_contiguous() and can_read_on_host(x):
        return _SelectShared.apply(x, dropped, keep)  # type: ignore[no-any-return]
    # The division is in place on a tensor that is ours, and that vmap has made a batch of.
    return torch.where(in_memory_format_of(x, dropped), 0.0, x).div_(keep)


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
    if can_read_on_host(
        dropped
    ):  # count_nonzero of a whole tensor needs no memory, a sum 8 bytes a unit
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
        gamma, keep = law_of_tensor(given, spatial, block, rate).unbind()
    else:
        gamma, keep = law(spatial, block, share, rate)
    if isinstance(gamma, float) and can_read_on_host(x) and _few(maps, spatial, block, gamma):
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


class _DropBlock(LayerWithRate):
    _ndim: ClassVar[int]
    _function: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        p: float,
        block_size: int | Sequence[int] = 7,
        *,
        rate: str = "exact",
        per_channel: bool = True,
        scale: str = "expectation",
    ) -> None:
        super().__init__()
        self.p = p
        check_block_size(block_size, self._ndim)
        self.block_size = block_size
        check_choice(rate, RATES, "rate")
        self.rate = rate
        check_flag(per_channel, "per_channel")
        self.per_channel = per_channel
        check_choice(scale, SCALES, "scale")
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with blocks dropped; ``x`` itself in evaluation."""
        node = fx_node_of_call(self, (x,), {})
        if node is not None:
            return node
        return type(self)._function(
            x,
            self.p,
            self.block_size,
            self.training,
            rate=self.rate,
            per_channel=self.per_channel,
            scale=self.scale,
        )

    def extra_repr(self) -> str:
        """p, the block, and the rules that differ from their defaults."""
        text = f"p={self.p}, block_size={self.block_size}"
        if self.rate != "exact":
            text += f", rate={self.rate!r}"
        if not self.per_channel:
            text += ", per_channel=False"
        return text if self.scale == "expectation" else text + f", scale={self.scale!r}"


class DropBlock1d(_DropBlock):
    """:class:`DropBlock2d` for sequences: inputs of shape (batch, channels, length)."""

    _ndim = 1
    _function = staticmethod(drop_block1d)


class DropBlock2d(_DropBlock):
    """Sets whole blocks of the maps of a convolutional network to zero, at an exact rate.

    Neighbouring units of a map tell much the same, so that dropping units one by one takes little
    away. With N the number of places where a block would cover a unit, and gamma the probability
    that a block is at a place::

        1 - mean over units of (1 - gamma)**N = p
        y = 0 in a block,   x / (1 - p) elsewhere   in training
        y = x                                       in evaluation and with p = 0

    ``p`` can be set later and is checked then; the paper raises it over training. Other
    implementations deliver another rate than they are asked for: timm .93 for p=.1 with block 7
    on 7x7 maps, torchvision .175 for .2 on 14x14.

    Args:
        p: The share of units to drop, in [0, 1].
        block_size: An integer or one a dimension; odd or even, clipped to the map.
        rate: ``"exact"``, or ``"paper"``: the gamma of the paper, which delivers less than p.
        per_channel: Whether each channel has blocks of its own; else a sample's channels share
            them.
        scale: ``"expectation"``, ``"count"`` or ``"unit"``
            (:func:`torchdrop.functional.drop_block2d`).

    Shape:
        (batch, channels, height, width); the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``p`` is no real number (a bool or a string is none), or ``block_size`` no
            integer or sequence of them.
        ValueError: ``p`` is NaN or outside [0, 1], ``block_size`` below 1 or for another number of
            axes, ``rate`` or ``scale`` unknown. When called, also as
            :func:`torchdrop.functional.drop_block2d`.

    Reference:
        Ghiasi et al. 2018, DropBlock, arXiv:1810.12890.
    """

    _ndim = 2
    _function = staticmethod(drop_block2d)


class DropBlock3d(_DropBlock):
    """:class:`DropBlock2d` for volumes: inputs of shape (batch, channels, depth, height, width)."""

    _ndim = 3
    _function = staticmethod(drop_block3d)
