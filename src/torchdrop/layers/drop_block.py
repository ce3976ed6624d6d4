"""DropBlock: drop whole blocks of a feature map, at an exact rate."""

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
    seed_and_keep_probability,
    seed_and_keep_probability_op,
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

# From this many units on (all maps together), it is faster to draw the gaps between seeds and to
# write the blocks one by one than to draw a number for each position, as long as the blocks
# together have at most as many units as the maps.
_UNITS_WORTH_WRITING = 1 << 16

# The number of units written at a time. Their indices, eight bytes each, fit into a cache, and up
# to this many torch uses one thread only.
_UNITS_PER_WRITE = 1 << 15

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# The masks


def _writing_blocks_is_faster(
    maps: tuple[int, ...], spatial: tuple[int, ...], block: tuple[int, ...], gamma: float
) -> bool:
    units = math.prod(maps) * math.prod(spatial)
    return units >= _UNITS_WORTH_WRITING and gamma * math.prod(block) <= 1.0


def _mask_by_writing_blocks(
    maps: tuple[int, ...],
    spatial: tuple[int, ...],
    block: tuple[int, ...],
    gamma: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the mask of dropped units, on the host: draw the seeds' indices, write each block."""
    places = [length - b + 1 for length, b in zip(spatial, block, strict=True)]
    hits = random_hit_indices(math.prod(maps) * math.prod(places), gamma, generator)
    # Convert each seed's index among all positions to the index of its first unit, axis by axis.
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
    for part in torch.split(first, max(1, _UNITS_PER_WRITE // inside.numel())):
        dropped.index_fill_(0, (part[:, None] + inside).flatten(), True)
    return dropped.view(*maps, *spatial)


def _mask_by_dilating_seeds(
    maps: tuple[int, ...],
    spatial: tuple[int, ...],
    block: tuple[int, ...],
    gamma: float | Tensor,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the mask of dropped units: draw a seed at each position, and widen it to a block.

    This works on any device, and under compilers and transforms.
    """
    places = [length - b + 1 for length, b in zip(spatial, block, strict=True)]
    seeds = ~keep_mask((*maps, *places), gamma, device=device, generator=generator)
    # Bytes: for padded booleans, torch.compile generates C++ that does not compile (2.14).
    covered = seeds.to(torch.uint8)
    ndim = len(spatial)
    covered = F.pad(covered, [n for b in reversed(block) for n in (0, b - 1)])
    for axis, b in enumerate(block):
        # Widen to runs of 1, 2, 4, ... and at last b: a maximum over b values in log2(b) passes.
        run = 1
        while run < b:
            shift = min(run, b - run)
            pad = [0] * (2 * ndim)
            pad[2 * (ndim - 1 - axis)], pad[2 * (ndim - 1 - axis) + 1] = shift, -shift
            covered = covered | F.pad(covered, pad)
            run += shift
    return covered != 0


# Selecting and scaling


class _ZeroSharedBlocks(torch.autograd.Function):
    """Compute ``where(dropped, 0, x) / keep`` for a mask that channels share, in half the time.

    ``x`` is combined bitwise (AND) with an integer that has all bits set where a unit is kept, and
    none where it is dropped. As with ``where``, a dropped inf or NaN becomes 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, keep: float) -> Tensor:
        ctx.save_for_backward(dropped)
        ctx.save_for_forward(dropped)
        ctx.keep = keep
        bits = _INTEGER_OF_SIZE[x.element_size()]
        return torch.bitwise_and(x.view(bits), dropped.to(bits).sub_(1)).view(x.dtype).div_(keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dropped,) = ctx.saved_tensors
        # The function is linear in x, so it is its own derivative, of any order.
        return _zero_dropped_and_divide(grads[0], dropped, ctx.keep), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (dropped,) = ctx.saved_tensors
        return _zero_dropped_and_divide(tangents[0], dropped, ctx.keep)


def _zero_dropped_and_divide(x: Tensor, dropped: Tensor, keep: float | Tensor) -> Tensor:
    """Return ``where(dropped, 0, x) / keep``."""
    shared = dropped.shape[1] < x.shape[1]
    if shared and isinstance(keep, float) and x.is_contiguous() and can_read_on_host(x):
        return _ZeroSharedBlocks.apply(x, dropped, keep)  # type: ignore[no-any-return]
    # In place is safe: `where` made a new tensor. It also has the batch dimension of vmap.
    return torch.where(in_memory_format_of(x, dropped), 0.0, x).div_(keep)


def _keep_probability_of_units(
    spatial: tuple[int, ...], block: tuple[int, ...], gamma: float | Tensor, like: Tensor
) -> Tensor:
    """Return the probability that each unit of a map is kept, and 1 in place of 0."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    covering = torch.ones((), dtype=dtype, device=like.device)
    for length, b in zip(spatial, block, strict=True):
        i = torch.arange(length, dtype=dtype, device=like.device)
        n = torch.minimum(i + 1, length - i).clamp(max=min(b, length - b + 1))
        covering = covering.unsqueeze(-1) * n
    log = torch.as_tensor(gamma, dtype=torch.float64).neg().log1p().to(like.device, dtype)
    kept = (covering * log).exp()
    return kept.where(kept > 0, 1.0)


def _kept_share_of_samples(dropped: Tensor) -> Tensor:
    """Return the share of units that was kept in each sample, and 1 where none was."""
    units = math.prod(dropped.shape[1:])
    # The count is an integer: in float16, a sum above 65504 would be inf.
    if can_read_on_host(dropped):  # count_nonzero allocates nothing, sum 8 bytes for each unit
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
        gamma, keep = seed_and_keep_probability_op(given, spatial, block, rate).unbind()
    else:
        gamma, keep = seed_and_keep_probability(spatial, block, share, rate)
    if (
        isinstance(gamma, float)
        and can_read_on_host(x)
        and _writing_blocks_is_faster(maps, spatial, block, gamma)
    ):
        dropped = _mask_by_writing_blocks(maps, spatial, block, gamma, generator)
    else:
        dropped = _mask_by_dilating_seeds(maps, spatial, block, gamma, x.device, generator)
    if scale == "count":
        keep = _kept_share_of_samples(dropped)
    elif scale == "unit":
        keep = _keep_probability_of_units(spatial, block, gamma, x)
    elif rate == "exact":
        keep = 1.0 - share
    if isinstance(keep, float) and not keep > 0.0:
        keep = 1.0  # nothing is kept: the zeros have to stay zeros
    return _zero_dropped_and_divide(x, dropped, keep)


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
    """Drop blocks of sequences, of shape (batch, channels, length): see :func:`drop_block2d`."""
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
    """Set whole blocks of a map to zero, and scale the other units so that the mean stays.

    A block starts with probability gamma at each position where it fits. Gamma is solved for the
    size of the map, so that exactly a share ``p`` of its units is dropped on average
    (:func:`drop_block_gamma`)::

        y = 0 in a block,   x / (1 - p) elsewhere

    Dropped values are replaced by 0, not multiplied by 0, so an inf or NaN among them does not
    stay. The positions of the blocks do not depend on the dtype of ``x``.

    Args:
        x: Of shape (batch, channels, height, width), of any floating-point dtype. Its memory
            format is kept.
        p: The share of units to drop, in [0, 1]. With ``p=1`` values and gradients are zero.
        block_size: The height and width of a block, or one integer for both; odd or even, clipped
            to the map. A block of the size of the map drops whole channels.
        training: If False, or if ``p=0``, ``x`` itself is returned.
        rate: ``"exact"``, or ``"paper"``: the gamma of the paper, with which published results
            were obtained and which drops less than ``p``.
        per_channel: Whether each channel has its own blocks. If False, the channels of a sample
            share them.
        scale: The divisor of kept units. ``"expectation"``: the share that is kept on average,
            1 - p. ``"count"``: the share that was kept in this sample. (The paper counts over the
            whole batch, which makes samples depend on each other.) ``"unit"``: the probability
            that this unit is kept. Fewer blocks reach a unit near a border, so it is higher there
            than in the centre; the mean of each unit is then exact, not only that of the map.
        generator: Draws the positions of the blocks, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``p`` is not a real number (bools and
            strings are not accepted), or ``block_size`` is not an integer or a tuple of them.
        ValueError: ``p`` is NaN or outside [0, 1], ``x`` is not 4-d, ``block_size`` is below 1 or
            for another number of axes, or ``rate`` or ``scale`` is unknown.

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
    """Drop blocks of volumes, of shape (batch, channels, depth, height, width).

    See :func:`drop_block2d`.
    """
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
        """Return ``x`` with blocks dropped, or ``x`` itself in evaluation."""
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
        """Return p, the block size, and the other arguments that differ from their defaults."""
        text = f"p={self.p}, block_size={self.block_size}"
        if self.rate != "exact":
            text += f", rate={self.rate!r}"
        if not self.per_channel:
            text += ", per_channel=False"
        return text if self.scale == "expectation" else text + f", scale={self.scale!r}"


class DropBlock1d(_DropBlock):
    """Drop blocks of sequences, of shape (batch, channels, length): see :class:`DropBlock2d`."""

    _ndim = 1
    _function = staticmethod(drop_block1d)


class DropBlock2d(_DropBlock):
    """Set whole blocks of the maps of a convolutional network to zero, at an exact rate.

    Neighbouring units of a map are correlated, so dropping single units removes little
    information. With N the number of positions at which a block covers a unit, and gamma the
    probability that a block starts at a position::

        1 - mean over units of (1 - gamma)**N = p
        y = 0 in a block,   x / (1 - p) elsewhere   in training
        y = x                                       in evaluation and with p = 0

    ``p`` can be set at any time and is checked then; the paper raises it during training. Other
    implementations do not drop the share asked for: with block 7, timm drops .93 instead of .1 on
    7x7 maps, torchvision .175 instead of .2 on 14x14.

    Args:
        p: The share of units to drop, in [0, 1].
        block_size: An integer, or one for each axis; odd or even, clipped to the map.
        rate: ``"exact"``, or ``"paper"``: the gamma of the paper, which drops less than p.
        per_channel: Whether each channel has its own blocks. If False, the channels of a sample
            share them.
        scale: ``"expectation"``, ``"count"`` or ``"unit"``
            (:func:`torchdrop.functional.drop_block2d`).

    Shape:
        (batch, channels, height, width); the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``p`` is not a real number (bools and strings are not accepted), or
            ``block_size`` is not an integer or a sequence of them.
        ValueError: ``p`` is NaN or outside [0, 1], ``block_size`` is below 1 or for another number
            of axes, or ``rate`` or ``scale`` is unknown. A call can also raise the errors of
            :func:`torchdrop.functional.drop_block2d`.

    Reference:
        Ghiasi et al. 2018, DropBlock, arXiv:1810.12890.
    """

    _ndim = 2
    _function = staticmethod(drop_block2d)


class DropBlock3d(_DropBlock):
    """Drop blocks of volumes, of shape (batch, channels, depth, height, width).

    See :class:`DropBlock2d`.
    """

    _ndim = 3
    _function = staticmethod(drop_block3d)
