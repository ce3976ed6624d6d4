"""Multiplicative noise that drops nothing: Gaussian and uniform, both with mean 1."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdrop.checks import check_generator, check_input
from torchdrop.draws import draw
from torchdrop.schedules import check_rate

__all__ = ["check_beta", "check_finite_rate", "gaussian_dropout", "uniform_dropout"]


def check_finite_rate(p: object) -> float:
    """:func:`check_rate`, and refuse 1, for which the noise would have infinite variance.

    Raises:
        TypeError: ``p`` is no real number.
        ValueError: ``p`` is NaN or outside [0, 1).
    """
    rate = check_rate(p)
    if rate == 1.0:
        raise ValueError(
            f"p has to be below 1, since the noise has variance p / (1 - p), but got {p}"
        )
    return rate


def check_beta(beta: object) -> float:
    """Return the half-width of uniform noise as a float.

    Raises:
        TypeError: ``beta`` is no real number (a bool or a string is none).
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


def _times(x: Tensor, noise: Tensor) -> Tensor:
    """``x * noise``, multiplied in the precision of the noise and rounded once."""
    return (x * noise).to(x.dtype)


def gaussian_dropout(
    x: Tensor, p: float, training: bool = True, *, generator: torch.Generator | None = None
) -> Tensor:
    """Multiply by normal noise with the mean and the variance that dropout's mask has.

    With ``n ~ N(0, 1)`` for each element::

        gaussian_dropout(x) = x * (1 + sqrt(p / (1 - p)) * n)

    A mask of dropout, 0 with probability p and else 1 / (1 - p), has mean 1 and variance
    p / (1 - p) too. So the mean stays, and the variance of an element with mean m and variance v
    becomes v + p / (1 - p) * (v + m**2).

    Args:
        x: Of any shape with at least one dimension and of any floating-point dtype. Its memory
            format is kept. The noise is float32 (float64 for float64) and the product is rounded
            once.
        p: The probability of dropping whose noise this is, in [0, 1).
        training: False returns ``x`` itself. So does ``p=0``.
        generator: Draws the noise, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or ``p`` no real number (a bool or a string
            is none).
        ValueError: ``p`` is NaN, outside [0, 1], or 1, which has infinite variance; ``x`` is 0-d.

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
    # Not math.sqrt, which torch.compile does not take for a rate that changes.
    return _times(x, draw(torch.randn, x, generator).mul_((rate / (1.0 - rate)) ** 0.5).add_(1.0))


def uniform_dropout(
    x: Tensor, beta: float, training: bool = True, *, generator: torch.Generator | None = None
) -> Tensor:
    """Multiply by uniform noise around 1 ("Uout").

    With ``u`` uniform in [-1, 1) for each element::

        uniform_dropout(x) = x * (1 + beta * u)

    The mean stays, and the variance of an element with mean m and variance v becomes
    v + beta**2 / 3 * (v + m**2): at most a third of what dropout with p=.5 adds, which is why it
    does less harm in front of a batch normalization.

    Args:
        x: As for :func:`gaussian_dropout`.
        beta: The half-width of the noise, in [0, 1]. It is no probability.
        training: False returns ``x`` itself. So does ``beta=0``.
        generator: Draws the noise, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or ``beta`` no real number (a bool or a
            string is none).
        ValueError: ``beta`` is NaN or outside [0, 1]; ``x`` is 0-d.

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
    return _times(x, draw(torch.rand, x, generator).mul_(2.0 * width).add_(1.0 - width))
