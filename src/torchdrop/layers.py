"""Layers for your own model: nn.Module shells, validated when they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from torchdrop import cutout, drop_block, functional, noise, shake_drop
from torchdrop.checks import check_choice, check_dim, check_flag, check_mode
from torchdrop.path_drop import PathDrop
from torchdrop.rated import Checked, Rated, traced
from torchdrop.stochastic_depth import StochasticDepth

__all__ = [
    "Cutout",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropPath",
    "GaussianDropout",
    "PathDrop",
    "ShakeDrop",
    "SpatialDropout",
    "StochasticDepth",
    "UniformDropout",
]


class DropPath(Rated):
    """Stochastic depth as a mask: sets whole samples of a residual branch to zero.

    With ``b ~ Bernoulli(1 - p)`` for each sample (``mode="row"``) or once (``"batch"``)::

        y = b * x / (1 - p)   in training,     y = x   in evaluation and with p = 0

    It changes what a network learns, not how long that takes: the branch is computed first. See
    :class:`StochasticDepth` and :func:`torchdrop.add_stochastic_depth` for the time.

    ``p`` can be set later and is checked then. Under ``torch.compile`` a rate that changes every
    step compiles twice (once for the first value, once for any); going to exactly 0 or 1 and
    back compiles once more for each. torch.fx records the layer as one node, which honours
    ``eval()``.

    Args:
        p: The probability of dropping, in [0, 1].
        mode: ``"row"`` or ``"batch"``.
        batch_dim: The dimension that counts samples: 1 for tensors of (tokens, batch, features).
        inplace: Let the result overwrite the input where autograd does not need it
            (:func:`torchdrop.functional.drop_path`).

    Shape:
        Any number of dimensions from 1; the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``p`` is no real number (a bool or a string is none), or ``batch_dim`` is no
            integer.
        ValueError: ``p`` is NaN or outside [0, 1], or ``mode`` is unknown. When called, also as
            :func:`torchdrop.functional.drop_path`.

    Reference:
        Huang et al. 2016, Deep Networks with Stochastic Depth, arXiv:1603.09382.
    """

    def __init__(
        self, p: float, mode: str = "row", batch_dim: int = 0, inplace: bool = False
    ) -> None:
        super().__init__()
        self.p = p
        check_mode(mode)
        self.mode = mode
        self.batch_dim = check_dim(batch_dim)
        check_flag(inplace, "inplace")
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with samples dropped; ``x`` itself in evaluation."""
        node = traced(self, (x,), {})
        if node is not None:
            return node
        return functional.drop_path(
            x,
            self.p,
            self.training,
            mode=self.mode,
            batch_dim=self.batch_dim,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults, and p and mode."""
        text = f"p={self.p}, mode={self.mode!r}"
        if self.batch_dim != 0:
            text += f", batch_dim={self.batch_dim}"
        return text + (", inplace=True" if self.inplace else "")


class _DropBlock(Rated):
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
        drop_block.check_block_size(block_size, self._ndim)
        self.block_size = block_size
        check_choice(rate, drop_block.RATES, "rate")
        self.rate = rate
        check_flag(per_channel, "per_channel")
        self.per_channel = per_channel
        check_choice(scale, drop_block.SCALES, "scale")
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with blocks dropped; ``x`` itself in evaluation."""
        node = traced(self, (x,), {})
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
    _function = staticmethod(functional.drop_block1d)


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
    _function = staticmethod(functional.drop_block2d)


class DropBlock3d(_DropBlock):
    """:class:`DropBlock2d` for volumes: inputs of shape (batch, channels, depth, height, width)."""

    _ndim = 3
    _function = staticmethod(functional.drop_block3d)


class SpatialDropout(Rated):
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
        node = traced(self, (x,), {})
        if node is not None:
            return node
        return functional.spatial_dropout(
            x, self.p, self.training, channel_dim=self.channel_dim, batch_dim=self.batch_dim
        )

    def extra_repr(self) -> str:
        """The rate and the layout."""
        text = f"p={self.p}, channel_dim={self.channel_dim}"
        return text if self.batch_dim == 0 else text + f", batch_dim={self.batch_dim}"


class GaussianDropout(Rated):
    """Multiplies by normal noise with mean 1 and the variance of dropout's mask.

    With ``n ~ N(0, 1)`` for each element::

        y = x * (1 + sqrt(p / (1 - p)) * n)   in training
        y = x                                 in evaluation and with p = 0

    Args:
        p: The probability of dropping whose noise this is, in [0, 1).

    Shape:
        Any number of dimensions from 1; the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``p`` is no real number (a bool or a string is none).
        ValueError: ``p`` is NaN, outside [0, 1], or 1, which has infinite variance. When called,
            also as :func:`torchdrop.functional.gaussian_dropout`.

    Reference:
        Srivastava et al. 2014, Dropout, section 10.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def p(self) -> float:
        """The probability of dropping, in [0, 1)."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = noise.check_finite_rate(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with noise; ``x`` itself in evaluation."""
        node = traced(self, (x,), {})
        if node is not None:
            return node
        return functional.gaussian_dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        """The rate."""
        return f"p={self.p}"


class UniformDropout(Checked):
    """Multiplies by uniform noise around 1 ("Uout").

    With ``u`` uniform in [-1, 1) for each element::

        y = x * (1 + beta * u)   in training,     y = x   in evaluation and with beta = 0

    Its noise has variance beta**2 / 3, a third at most; dropout's has p / (1 - p), 1 at p=.5.
    ``beta`` can be set later and is checked then.

    Args:
        beta: The half-width of the noise, in [0, 1]. It is no probability.

    Shape:
        Any number of dimensions from 1; the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``beta`` is no real number (a bool or a string is none).
        ValueError: ``beta`` is NaN or outside [0, 1]. When called, also as
            :func:`torchdrop.functional.uniform_dropout`.

    Reference:
        Li et al. 2019, Understanding the Disharmony between Dropout and Batch Normalization by
        Variance Shift, arXiv:1801.05134.
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    @property
    def beta(self) -> float:
        """The half-width of the noise, in [0, 1]."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._beta = noise.check_beta(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with noise; ``x`` itself in evaluation."""
        node = traced(self, (x,), {})
        if node is not None:
            return node
        return functional.uniform_dropout(x, self.beta, self.training)

    def extra_repr(self) -> str:
        """The half-width."""
        return f"beta={self.beta}"


class Cutout(Rated):
    """Cuts rectangular holes into images, every sample its own.

    With the centre (cy, cx) of each hole uniform over the image, these rows and columns, as far as
    they lie in it, are replaced by ``fill`` in training::

        cy - h // 2, ..., cy - h // 2 + h - 1        cx - w // 2, ..., cx - w // 2 + w - 1

    In evaluation, and with p = 0, the input comes back as it is. Works on a batch on any device,
    and as a transform among those of torchvision.transforms.v2: on PIL images, tensors and
    tv_tensors.Image, alone or in a sample, whose labels, boxes and masks are left alone. There,
    ``fill`` is in the units of the image (0 to 255 for PIL and uint8)::

        >>> train = v2.Compose([v2.RandomHorizontalFlip(), Cutout(16)])
        >>> image, label = train(image, label)

    Random numbers are torch's own, on the device of the images: not NumPy's, which the workers of
    a loader share.

    Args:
        size: Of a hole: an integer is pixels, a float a fraction of each side; or a pair
            (height, width) of these.
        holes: How many holes a sample gets.
        p: The probability that a sample is cut at all, in [0, 1].
        place: ``"clipped"``: holes reach over the border and are cut off there (the paper).
            ``"inside"``: they lie within the image.
        fill: A number, one number a channel, ``"mean"`` or ``"noise"``
            (:func:`torchdrop.functional.cutout`, which also replays holes).

    Shape:
        (channels, height, width) or (batch, channels, height, width); the output has the shape,
        dtype and memory format of the input.

    Raises:
        TypeError: ``size``, ``holes``, ``p`` or ``fill`` is none of these.
        ValueError: One of them is out of range, or ``place`` unknown. When called, also as
            :func:`torchdrop.functional.cutout`.

    Reference:
        DeVries & Taylor 2017, Improved Regularization of Convolutional Neural Networks with
        Cutout, arXiv:1708.04552.
    """

    def __init__(
        self,
        size: int | float | tuple[int | float, int | float],
        holes: int = 1,
        *,
        p: float = 1.0,
        place: str = "clipped",
        fill: float | Sequence[float] | str = 0.0,
    ) -> None:
        super().__init__()
        cutout.check_size(size)
        self.size = size
        self.holes = cutout.check_count(holes)
        self.p = p
        check_choice(place, cutout.PLACES, "place")
        self.place = place
        cutout.check_fill(fill)
        self.fill = fill

    def forward(self, *sample: Any) -> Any:
        """Return an image, a batch or a sample with holes; the very object in evaluation."""
        node = traced(self, sample, {})
        if node is not None:
            return node
        x: Any = sample[0] if len(sample) == 1 else sample
        if type(x) in (Tensor, nn.Parameter):
            return functional.cutout(
                x, self.size, self.holes, self.p, self.training, place=self.place, fill=self.fill
            )
        if not self.training or self.p == 0.0:
            cutout.check_sample(x)
            return x
        return cutout.cut_sample(x, self.size, self.holes, self.p, place=self.place, fill=self.fill)

    def extra_repr(self) -> str:
        """The size, the number of holes, p, and the rules that differ from their defaults."""
        text = f"size={self.size}, holes={self.holes}, p={self.p}"
        if self.place != "clipped":
            text += f", place={self.place!r}"
        return text if self.fill == 0.0 else text + f", fill={self.fill!r}"


class ShakeDrop(Rated):
    """Multiplies a residual branch by one random factor, and its gradient by another.

    With ``b ~ Bernoulli(1 - p)``, and a and c uniform in ``alpha`` and ``beta``, for each sample
    (``mode="row"``) or once (``"batch"``)::

        y    = (b + a - b * a) * x,    dx = (b + c - b * c) * dy    in training
        y    = (1 - p + p * E[a]) * x                               in evaluation

    Evaluation multiplies by the expectation, so a branch's ShakeDrop stays in the network.

    Args:
        p: The probability of shaking, in [0, 1]; with depth, the paper lets it grow linearly to .5
            (:func:`torchdrop.schedules.linear`).
        alpha: The range of the factor forward.
        beta: The range of the factor backward.
        mode: ``"row"`` or ``"batch"``.
        batch_dim: The dimension that counts samples.

    Shape:
        Any number of dimensions from 1; the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``p`` is no real number (a bool or a string is none), ``alpha`` or ``beta`` no
            pair of them, or ``batch_dim`` no integer.
        ValueError: ``p`` is NaN or outside [0, 1], ``alpha`` or ``beta`` no range, or ``mode`` is
            unknown. When called, also as :func:`torchdrop.functional.shake_drop`.

    Reference:
        Yamada et al. 2018, ShakeDrop Regularization for Deep Residual Learning, arXiv:1802.02375.
    """

    def __init__(
        self,
        p: float,
        alpha: tuple[float, float] = (-1.0, 1.0),
        beta: tuple[float, float] = (0.0, 1.0),
        *,
        mode: str = "row",
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        self.p = p
        self.alpha = shake_drop.check_range(alpha, "alpha")
        self.beta = shake_drop.check_range(beta, "beta")
        check_mode(mode)
        self.mode = mode
        self.batch_dim = check_dim(batch_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, shaken in training, times the expectation in evaluation."""
        node = traced(self, (x,), {})
        if node is not None:
            return node
        return functional.shake_drop(
            x,
            self.p,
            self.training,
            alpha=self.alpha,
            beta=self.beta,
            mode=self.mode,
            batch_dim=self.batch_dim,
        )

    def extra_repr(self) -> str:
        """The rate, the mode, and the ranges that differ from the paper's."""
        text = f"p={self.p}, mode={self.mode!r}"
        if self.alpha != (-1.0, 1.0):
            text += f", alpha={self.alpha}"
        if self.beta != (0.0, 1.0):
            text += f", beta={self.beta}"
        return text if self.batch_dim == 0 else text + f", batch_dim={self.batch_dim}"
