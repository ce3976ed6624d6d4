"""Gaussian dropout: multiplicative normal noise with mean 1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdrop.checks import check_generator, check_input
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.layers.draws import draw_noise, multiply_and_round_once
from torchdrop.schedules import check_rate

__all__ = ["GaussianDropout", "gaussian_dropout"]


def check_finite_rate(p: object) -> float:
    """Return ``p`` as a float. Unlike :func:`check_rate`, refuse 1, where the variance is infinite.

    Raises:
        TypeError: ``p`` is not a real number.
        ValueError: ``p`` is NaN or outside [0, 1).
    """
    rate = check_rate(p)
    if rate == 1.0:
        raise ValueError(
            f"p has to be below 1, since the noise has variance p / (1 - p), but got {p}"
        )
    return rate


def gaussian_dropout(
    x: Tensor, p: float, training: bool = True, *, generator: torch.Generator | None = None
) -> Tensor:
    """Multiply by normal noise with the mean and the variance that dropout's mask has.

    With ``n ~ N(0, 1)`` for each element::

        gaussian_dropout(x) = x * (1 + sqrt(p / (1 - p)) * n)

    The mask of dropout, 0 with probability p and 1 / (1 - p) otherwise, has the same mean, 1, and
    the same variance, p / (1 - p). So the mean of an element stays, and its variance, with mean m
    and variance v before, becomes v + p / (1 - p) * (v + m**2).

    Args:
        x: Of any shape with at least one dimension and of any floating-point dtype. Its memory
            format is kept. The noise is float32 (float64 for float64), and the product is rounded
            to the dtype of ``x`` once.
        p: The drop probability of the dropout that has this variance, in [0, 1).
        training: If False, or if ``p=0``, ``x`` itself is returned.
        generator: Draws the noise, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``p`` is not a real number (bools and
            strings are not accepted).
        ValueError: ``p`` is NaN, outside [0, 1], or 1, where the variance is infinite; or ``x`` is
            0-d.

    Reference:
        Srivastava et al. 2014, Dropout, section 10.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(gaussian_dropout, (x,), x, p, training, generator=generator)
    rate = check_finite_rate(p)
    check_input(x)
    check_generator(generator)
    if not training or rate == 0.0:
        return x
    # Not math.sqrt: torch.compile cannot trace it for a rate that is a symbol of the graph.
    deviation = (rate / (1.0 - rate)) ** 0.5
    noise = draw_noise(torch.randn, x, generator).mul_(deviation).add_(1.0)
    return multiply_and_round_once(x, noise)


class GaussianDropout(LayerWithRate):
    """Multiply by normal noise with mean 1 and the variance of dropout's mask.

    With ``n ~ N(0, 1)`` for each element::

        y = x * (1 + sqrt(p / (1 - p)) * n)   in training
        y = x                                 in evaluation and with p = 0

    Args:
        p: The drop probability of the dropout that has this variance, in [0, 1).

    Shape:
        Any number of dimensions from 1; the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``p`` is not a real number (bools and strings are not accepted).
        ValueError: ``p`` is NaN, outside [0, 1], or 1, where the variance is infinite. A call can
            also raise the errors of :func:`torchdrop.functional.gaussian_dropout`.

    Reference:
        Srivastava et al. 2014, Dropout, section 10.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def p(self) -> float:
        """The drop probability of the dropout that has this variance, in [0, 1)."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = check_finite_rate(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times the noise, or ``x`` itself in evaluation."""
        node = fx_node_of_call(self, (x,), {})
        if node is not None:
            return node
        return gaussian_dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        """Return the rate."""
        return f"p={self.p}"
