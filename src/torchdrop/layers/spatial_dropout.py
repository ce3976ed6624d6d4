"""Spatial dropout: drop whole channels of a sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdrop.checks import check_dim, check_generator, check_input
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.layers.draws import (
    divisor_of_kept,
    in_memory_format_of,
    keep_mask,
    shape_of_decisions,
)
from torchdrop.schedules import check_rate

__all__ = ["SpatialDropout", "spatial_dropout"]


def check_channels(x: Tensor, batch_dim: object, channel_dim: object) -> tuple[int, int]:
    """Return the batch and the channel dimension of ``x``, counted from the front.

    Raises:
        TypeError: One of them is not an integer.
        ValueError: ``x`` has no such dimension, or both are the same.
    """
    if x.dim() < 2:
        raise ValueError(
            "input has to have at least 2 dimensions, one of samples and one of channels, "
            f"but got {x.dim()}"
        )
    batch = check_dim(batch_dim, x.dim())
    channel = check_dim(channel_dim, x.dim(), "channel_dim")
    if batch == channel:
        raise ValueError(f"batch_dim and channel_dim have to differ, but both are {channel}")
    return batch, channel


def spatial_dropout(
    x: Tensor,
    p: float,
    training: bool = True,
    *,
    channel_dim: int = 1,
    batch_dim: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Set whole channels to zero, and scale the others so that the mean stays.

    With ``b ~ Bernoulli(1 - p)`` drawn for each channel of each sample::

        spatial_dropout(x) = x / (1 - p)  where b = 1,  and exactly 0  where b = 0

    ``channel_dim`` names the dimension of channels; it is never guessed from the shape.
    (``torch.nn.functional.dropout2d`` takes a 3-d input for a batch today, and warns that it will
    take it for one image later.)

    Args:
        x: A tensor with a dimension of samples, a dimension of channels, and any others, of any
            floating-point dtype. Its memory format is kept.
        p: The probability of dropping a channel, in [0, 1]. With ``p=1`` the result is zero.
        training: If False, or if ``p=0``, ``x`` itself is returned.
        channel_dim: The dimension that counts channels: 1 for (batch, channels, height, width) and
            (batch, channels, length), -1 for (batch, length, channels).
        batch_dim: The dimension that counts samples.
        generator: Draws the mask, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``p`` is not a real number (bools and
            strings are not accepted), or a dimension is not an integer.
        ValueError: ``p`` is NaN or outside [0, 1]; ``x`` has fewer than two dimensions, or does
            not have those named; or both are the same.

    Reference:
        Tompson et al. 2015, Efficient Object Localization Using Convolutional Networks,
        arXiv:1411.4280.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            spatial_dropout,
            (x,),
            x,
            p,
            training,
            channel_dim=channel_dim,
            batch_dim=batch_dim,
            generator=generator,
        )
    rate = check_rate(p)
    check_input(x)
    check_generator(generator)
    batch, channel = check_channels(x, batch_dim, channel_dim)
    if not training or rate == 0.0:
        return x
    shape = shape_of_decisions(x, batch, channel)
    mask = keep_mask(shape, rate, device=x.device, generator=generator)
    return torch.where(in_memory_format_of(x, mask), x, 0.0).div_(divisor_of_kept(rate))


class SpatialDropout(LayerWithRate):
    """Set whole channels to zero.

    With ``b ~ Bernoulli(1 - p)`` for each channel of each sample::

        y = b * x / (1 - p)   in training,     y = x   in evaluation and with p = 0

    The layer works on sequences, images and volumes, with their dimensions in any order:
    ``channel_dim`` says which one counts channels. Inputs always have a batch dimension.

    Args:
        p: The probability of dropping a channel, in [0, 1].
        channel_dim: The dimension that counts channels: -1 for (batch, length, channels).
        batch_dim: The dimension that counts samples.

    Shape:
        Any number of dimensions from 2; the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``p`` is not a real number (bools and strings are not accepted), or a dimension
            is not an integer.
        ValueError: ``p`` is NaN or outside [0, 1], or both dimensions are the same. A call can
            also raise the errors of :func:`torchdrop.functional.spatial_dropout`.

    Reference:
        Tompson et al. 2015, Efficient Object Localization Using Convolutional Networks,
        arXiv:1411.4280.
    """

    def __init__(self, p: float, channel_dim: int = 1, batch_dim: int = 0) -> None:
        super().__init__()
        self.p = p
        self.channel_dim = check_dim(channel_dim, name="channel_dim")
        self.batch_dim = check_dim(batch_dim)
        if self.channel_dim == self.batch_dim:
            raise ValueError(
                f"batch_dim and channel_dim have to differ, but both are {self.batch_dim}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with channels dropped, or ``x`` itself in evaluation."""
        node = fx_node_of_call(self, (x,), {})
        if node is not None:
            return node
        return spatial_dropout(
            x, self.p, self.training, channel_dim=self.channel_dim, batch_dim=self.batch_dim
        )

    def extra_repr(self) -> str:
        """Return the rate and the dimensions."""
        text = f"p={self.p}, channel_dim={self.channel_dim}"
        return text if self.batch_dim == 0 else text + f", batch_dim={self.batch_dim}"
