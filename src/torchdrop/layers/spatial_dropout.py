"""Spatial dropout: whole channels of a sample are set to zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdrop.checks import check_dim, check_generator, check_input
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.layers.draws import in_memory_format_of, keep_mask
from torchdrop.schedules import check_rate

__all__ = ["SpatialDropout", "spatial_dropout"]


def check_channels(x: Tensor, batch_dim: object, channel_dim: object) -> tuple[int, int]:
    """Return both dimensions, counted from the front.

    Raises:
        TypeError: One of them is no integer.
        ValueError: ``x`` has no such dimension, or they are the same.
    """
    if x.dim() < 2:
        raise ValueError(
            f"input has to have at least 2 dimensions, of samples and channels, but got {x.dim()}"
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

    Which dimension counts channels is said, never guessed from the shape: of a 3-d input
    ``torch.nn.functional.dropout2d`` drops channels too, with a warning that it will drop rows.

    Args:
        x: Of at least two dimensions, one of samples and one of channels, the others of any number
            and place, of any floating-point dtype. Its memory format is kept.
        p: The probability of dropping a channel, in [0, 1]. ``p=1`` gives zeros.
        training: False returns ``x`` itself. So does ``p=0``.
        channel_dim: The dimension that counts channels: 1 for (batch, channels, height, width) and
            (batch, channels, length), -1 for (batch, length, channels).
        batch_dim: The dimension that counts samples.
        generator: Draws the mask, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is no floating-point tensor, ``p`` no real number (a bool or a string is
            none), or a dimension no integer.
        ValueError: ``p`` is NaN or outside [0, 1]; ``x`` has fewer than two dimensions, or not
            those named; or they are the same.

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
    shape = [1] * x.dim()
    shape[batch], shape[channel] = x.shape[batch], x.shape[channel]
    mask = keep_mask(shape, rate, device=x.device, generator=generator)
    keep = 1.0 - rate if rate < 1.0 else 1.0
    return torch.where(in_memory_format_of(x, mask), x, 0.0).div_(keep)


class SpatialDropout(LayerWithRate):
    """Sets whole channels to zero.

    With ``b ~ Bernoulli(1 - p)`` for each channel of each sample::

        y = b * x / (1 - p)   in training,     y = x   in evaluation and with p = 0

    One layer for sequences, images and volumes, whatever the order of their dimensions:
    ``channel_dim`` says where the channels are, and 3-d inputs are batches.

    Args:
        p: The probability of dropping a channel, in [0, 1].
        channel_dim: The dimension that counts channels: -1 for (batch, length, channels).
        batch_dim: The dimension that counts samples.

    Shape:
        Any number of dimensions from 2; the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``p`` is no real number (a bool or a string is none), or a dimension no integer.
        ValueError: ``p`` is NaN or outside [0, 1], or both dimensions are the same. When called,
            also as :func:`torchdrop.functional.spatial_dropout`.

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
        """Return ``x`` with channels dropped; ``x`` itself in evaluation."""
        node = fx_node_of_call(self, (x,), {})
        if node is not None:
            return node
        return spatial_dropout(
            x, self.p, self.training, channel_dim=self.channel_dim, batch_dim=self.batch_dim
        )

    def extra_repr(self) -> str:
        """The rate and the layout."""
        text = f"p={self.p}, channel_dim={self.channel_dim}"
        return text if self.batch_dim == 0 else text + f", batch_dim={self.batch_dim}"
