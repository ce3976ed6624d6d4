"""Uniform dropout ("Uout"): multiplicative uniform noise around 1."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdrop.checks import check_generator, check_input
from torchdrop.layers.base import LayerWithCheckedProperties, fx_node_of_call
from torchdrop.layers.draws import draw_noise, multiply_and_round_once

__all__ = ["UniformDropout", "uniform_dropout"]


def check_beta(beta: object) -> float:
    """Return ``beta``, the half-width of the noise, as a float.

    Raises:
        TypeError: ``beta`` is not a real number (bools and strings are not accepted).
        ValueError: ``beta`` is NaN or outside [0, 1].
    """
    if isinstance(beta, bool) or not isinstance(beta, Real):
        raise TypeError(
            f"beta has to be a real number between 0 and 1, but got {beta!r} "
            f"of type {type(beta).__name__}"
        )
    value = float(beta)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"beta has to be between 0 and 1, but got {beta}")
    return value


def uniform_dropout(
    x: Tensor, beta: float, training: bool = True, *, generator: torch.Generator | None = None
) -> Tensor:
    """Multiply by uniform noise around 1 ("Uout").

    With ``u`` uniform in [-1, 1) for each element::

        uniform_dropout(x) = x * (1 + beta * u)

    The mean of an element stays, and its variance, with mean m and variance v before, becomes
    v + beta**2 / 3 * (v + m**2). That adds at most a third of the variance that dropout with p=.5
    adds, and so does less harm in front of a batch normalization.

    Args:
        x: As for :func:`gaussian_dropout`.
        beta: The half-width of the noise, in [0, 1]. It is not a probability.
        training: If False, or if ``beta=0``, ``x`` itself is returned.
        generator: Draws the noise, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, or ``beta`` is not a real number (bools
            and strings are not accepted).
        ValueError: ``beta`` is NaN or outside [0, 1], or ``x`` is 0-d.

    Reference:
        Li et al. 2019, Understanding the Disharmony between Dropout and Batch Normalization by
        Variance Shift, arXiv:1801.05134.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(uniform_dropout, (x,), x, beta, training, generator=generator)
    width = check_beta(beta)
    check_input(x)
    check_generator(generator)
    if not training or width == 0.0:
        return x
    noise = draw_noise(torch.rand, x, generator).mul_(2.0 * width).add_(1.0 - width)
    return multiply_and_round_once(x, noise)


class UniformDropout(LayerWithCheckedProperties):
    """Multiply by uniform noise around 1 ("Uout").

    With ``u`` uniform in [-1, 1) for each element::

        y = x * (1 + beta * u)   in training,     y = x   in evaluation and with beta = 0

    The noise has variance beta**2 / 3, at most a third; dropout's mask has p / (1 - p), which is 1
    for p=.5. ``beta`` can be set at any time and is checked then.

    Args:
        beta: The half-width of the noise, in [0, 1]. It is not a probability.

    Shape:
        Any number of dimensions from 1; the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``beta`` is not a real number (bools and strings are not accepted).
        ValueError: ``beta`` is NaN or outside [0, 1]. A call can also raise the errors of
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
        self._beta = check_beta(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times the noise, or ``x`` itself in evaluation."""
        node = fx_node_of_call(self, (x,), {})
        if node is not None:
            return node
        return uniform_dropout(x, self.beta, self.training)

    def extra_repr(self) -> str:
        """Return the half-width of the noise."""
        return f"beta={self.beta}"
