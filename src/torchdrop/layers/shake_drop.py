"""ShakeDrop: scale a residual branch by a random factor, and its gradient by another one."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from torchdrop.checks import check_dim, check_generator, check_input, check_mode
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.layers.draws import (
    draw_noise,
    keep_mask,
    multiply_and_round_once,
    shape_of_decisions,
)
from torchdrop.schedules import check_rate

__all__ = ["ShakeDrop", "shake_drop"]


def check_range(ends: Any, name: str) -> tuple[float, float]:
    """Return both ends of a range as floats.

    Raises:
        TypeError: ``ends`` is not a pair of real numbers.
        ValueError: One of them is not finite, or the first is above the second.
    """
    pair = isinstance(ends, (tuple, list)) and len(ends) == 2
    if not pair or any(isinstance(e, bool) or not isinstance(e, Real) for e in ends):
        raise TypeError(f"{name} has to be a pair of real numbers, but got {ends!r}")
    low, high = float(ends[0]), float(ends[1])
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(
            f"{name} has to be a range from low to high, both of them finite, but got {ends!r}"
        )
    return low, high


class _Shake(torch.autograd.Function):
    """Compute ``forward_factor * x``; multiply the gradient by ``backward_factor`` instead."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, forward_factor: Tensor, backward_factor: Tensor) -> Tensor:
        return multiply_and_round_once(x, forward_factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (backward_factor,) = ctx.saved_tensors
        return multiply_and_round_once(grads[0], backward_factor), None, None


def shake_drop(
    x: Tensor,
    p: float,
    training: bool = True,
    *,
    alpha: tuple[float, float] = (-1.0, 1.0),
    beta: tuple[float, float] = (0.0, 1.0),
    mode: str = "row",
    batch_dim: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Multiply a residual branch by one random factor, and its gradient by another.

    With ``b ~ Bernoulli(1 - p)``, and a and c uniform in ``alpha`` and ``beta``, drawn for each
    sample ("row") or once ("batch")::

        forward   (b + a - b * a) * x        x itself where b = 1,   a * x where b = 0
        backward  (b + c - b * c) * grad
        evaluation  (1 - p + p * E[a]) * x,  which is (1 - p) * x for the paper's alpha

    A dropped branch is scaled, not removed: with p=1 every branch is shaken (Shake-Shake for one
    branch). By design, the gradient is not the derivative of the forward. It is linear in
    ``grad``, so a second derivative (``create_graph=True``) passes through ``grad``, multiplied by
    the backward factor again. torch raises an error for forward-mode derivatives, since none is
    defined.

    Args:
        x: The output of a residual branch, of any shape with at least one dimension and of any
            floating-point dtype. Its memory format is kept.
        p: The probability of shaking, in [0, 1]: 1 - p_l of the paper, where it grows linearly
            with depth up to .5.
        training: If False, ``x`` is multiplied by the expectation of the forward factor.
        alpha: The range (low, high) of the forward factor a.
        beta: The range (low, high) of the backward factor c.
        mode: ``"row"`` (the paper's image level) or ``"batch"``.
        batch_dim: The dimension that counts samples.
        generator: Draws the factors, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``; with ``p=0``, ``x`` itself.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``p`` is not a real number (bools and
            strings are not accepted), ``alpha`` or ``beta`` is not a pair of real numbers, or
            ``batch_dim`` is not an integer.
        ValueError: ``p`` is NaN or outside [0, 1], ``alpha`` or ``beta`` is not a range from low
            to high, ``mode`` is unknown, or ``x`` is 0-d or has no dimension ``batch_dim``.

    Reference:
        Yamada et al. 2018, ShakeDrop Regularization for Deep Residual Learning, arXiv:1802.02375.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            shake_drop,
            (x,),
            x,
            p,
            training,
            alpha=alpha,
            beta=beta,
            mode=mode,
            batch_dim=batch_dim,
            generator=generator,
        )
    rate = check_rate(p)
    low, high = check_range(alpha, "alpha")
    back_low, back_high = check_range(beta, "beta")
    check_mode(mode)
    check_input(x)
    check_generator(generator)
    dim = check_dim(batch_dim, x.dim())
    if rate == 0.0:
        return x
    if not training:
        return x * (1.0 - rate + rate * (low + high) / 2.0)
    shape = shape_of_decisions(x, dim) if mode == "row" else shape_of_decisions(x)
    kept = keep_mask(shape, rate, device=x.device, generator=generator)
    a = draw_noise(torch.rand, x, generator, shape) * (high - low) + low
    c = draw_noise(torch.rand, x, generator, shape) * (back_high - back_low) + back_low
    shaken: Tensor = _Shake.apply(x, torch.where(kept, 1.0, a), torch.where(kept, 1.0, c))
    return shaken


class ShakeDrop(LayerWithRate):
    """Multiply a residual branch by one random factor, and its gradient by another, in training.

    With ``b ~ Bernoulli(1 - p)``, and a and c uniform in ``alpha`` and ``beta``, for each sample
    (``mode="row"``) or once (``"batch"``)::

        y    = (b + a - b * a) * x,    dx = (b + c - b * c) * dy    in training
        y    = (1 - p + p * E[a]) * x                               in evaluation

    Evaluation multiplies by the expectation, so the layer has to stay in the network that is used.

    Args:
        p: The probability of shaking, in [0, 1]; in the paper it grows linearly with depth to .5
            (:func:`torchdrop.schedules.linear`).
        alpha: The range (low, high) of the forward factor a.
        beta: The range (low, high) of the backward factor c.
        mode: ``"row"`` or ``"batch"``.
        batch_dim: The dimension that counts samples.

    Shape:
        Any number of dimensions from 1; the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``p`` is not a real number (bools and strings are not accepted), ``alpha`` or
            ``beta`` is not a pair of real numbers, or ``batch_dim`` is not an integer.
        ValueError: ``p`` is NaN or outside [0, 1], ``alpha`` or ``beta`` is not a range from low
            to high, or ``mode`` is unknown. A call can also raise the errors of
            :func:`torchdrop.functional.shake_drop`.

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
        self.alpha = check_range(alpha, "alpha")
        self.beta = check_range(beta, "beta")
        check_mode(mode)
        self.mode = mode
        self.batch_dim = check_dim(batch_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, shaken in training, and times the expected factor in evaluation."""
        node = fx_node_of_call(self, (x,), {})
        if node is not None:
            return node
        return shake_drop(
            x,
            self.p,
            self.training,
            alpha=self.alpha,
            beta=self.beta,
            mode=self.mode,
            batch_dim=self.batch_dim,
        )

    def extra_repr(self) -> str:
        """Return the rate, the mode, and the ranges that differ from the paper's."""
        text = f"p={self.p}, mode={self.mode!r}"
        if self.alpha != (-1.0, 1.0):
            text += f", alpha={self.alpha}"
        if self.beta != (0.0, 1.0):
            text += f", beta={self.beta}"
        return text if self.batch_dim == 0 else text + f", batch_dim={self.batch_dim}"
