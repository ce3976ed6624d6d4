"""Drop path: set whole samples of a residual branch to zero, and perhaps add it to the skip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_unary,
)

from torchdrop.checks import check_dim, check_flag, check_generator, check_input, check_mode
from torchdrop.internals import base_of, may_be_saved_by_producer
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.layers.draws import (
    can_read_on_host,
    divisor_of_kept,
    keep_mask,
    shape_of_decisions,
    under_transform,
)
from torchdrop.schedules import check_rate

__all__ = ["DropPath", "drop_path", "drop_path_add"]

# Below this many elements a row, one elementwise kernel over the whole tensor is faster than one
# kernel for each run of rows: a kernel takes about 4 microseconds to start, and the second pass
# over memory that it saves takes about .8 nanoseconds an element.
_MIN_ROW_SIZE_FOR_RUNS = 4096


def _draw_mask(
    x: Tensor, p: float, mode: str, batch_dim: int, generator: torch.Generator | None
) -> Tensor:
    """Draw which samples are kept: a mask with the dimensions of ``x`` that broadcasts to it."""
    shape = shape_of_decisions(x, batch_dim) if mode == "row" else shape_of_decisions(x)
    return keep_mask(shape, p, device=x.device, generator=generator)


def _use_runs(x: Tensor, mask: Tensor) -> bool:
    """Whether to read the mask on the host and handle each run of equal decisions at once."""
    return (
        can_read_on_host(x)
        and x.numel() >= _MIN_ROW_SIZE_FOR_RUNS * mask.numel()
        and mask.numel() > 0  # an empty batch has no runs
    )


def _runs(mask: Tensor, rows: int) -> tuple[list[bool], list[int]]:
    """Return, for each run of equal decisions, whether its rows are kept, and its length."""
    kept: list[bool] = mask.flatten().tolist()
    if len(kept) == 1:
        return kept, [rows]
    decisions: list[bool] = []
    lengths: list[int] = []
    for decision in kept:
        if decisions and decision is decisions[-1]:
            lengths[-1] += 1
        else:
            decisions.append(decision)
            lengths.append(1)
    return decisions, lengths


class _KeepRuns(torch.autograd.Function):
    """Compute ``where(mask, x, 0) / divisor`` with one kernel, one pass, for each run of rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, divisor: float, dim: int, inplace: bool
    ) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)
        ctx.divisor, ctx.dim = divisor, dim
        if inplace:
            ctx.mark_dirty(x)
        out = x if inplace else torch.empty_like(x)
        decisions, lengths = _runs(mask, x.shape[dim])
        # torch.split calls this method as well, but first runs code in Python.
        parts = (t.split_with_sizes(lengths, dim) for t in (out, x))
        for kept, part, old in zip(decisions, *parts, strict=True):
            if kept:
                torch.div(old, divisor, out=part)
            else:
                part.zero_()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        # The function is linear in x, so it is its own derivative, of any order.
        return _keep(grads[0], mask, ctx.divisor, ctx.dim), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return _keep(tangents[0], mask, ctx.divisor, ctx.dim)


def _keep(x: Tensor, mask: Tensor, divisor: float, dim: int, inplace: bool = False) -> Tensor:
    """Return ``where(mask, x, 0) / divisor``.

    Dropped values are replaced, not multiplied by 0: an inf or NaN among them does not stay.
    """
    if _use_runs(x, mask):
        return _KeepRuns.apply(x, mask, divisor, dim, inplace)  # type: ignore[no-any-return]
    if inplace:
        return x.masked_fill_(~mask, 0.0).div_(divisor)
    # In place is safe: `where` made a new tensor. Under vmap it has the batch dimension, also where
    # only the mask had one.
    return torch.where(mask, x, 0.0).div_(divisor)


class _AddRuns(torch.autograd.Function):
    """Compute ``skip + where(mask, branch, 0) / divisor`` in one pass for each run of rows."""

    @staticmethod
    def forward(
        ctx: Any, skip: Tensor, branch: Tensor, mask: Tensor, divisor: float, dim: int
    ) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)
        ctx.divisor, ctx.dim = divisor, dim
        out = torch.empty_like(skip)
        decisions, lengths = _runs(mask, skip.shape[dim])
        parts = (t.split_with_sizes(lengths, dim) for t in (out, skip, branch))
        for kept, part, old, new in zip(decisions, *parts, strict=True):
            if not kept:
                part.copy_(old)
            elif skip.dtype in (torch.float16, torch.bfloat16):
                # torch.add would round `alpha` to half precision; torch.div does not round the
                # divisor.
                torch.div(new, divisor, out=part).add_(old)
            else:
                torch.add(old, new, alpha=1.0 / divisor, out=part)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        branch = _keep(grads[0], mask, ctx.divisor, ctx.dim) if ctx.needs_input_grad[1] else None
        return grads[0] if ctx.needs_input_grad[0] else None, branch, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return tangents[0] + _keep(tangents[1], mask, ctx.divisor, ctx.dim)


def _may_overwrite(x: Tensor) -> bool:
    """Whether ``x`` may be overwritten: as far as ``x`` shows, autograd has not saved its values.

    False under a compiler or a torch.func transform, which plan memory themselves.
    """
    if under_transform():
        return False
    if not (torch.is_grad_enabled() and x.requires_grad):
        return True
    # Writing to a view writes to its base: flatten(relu(z)) is no safer than relu(z).
    base = base_of(x)
    owners = (x,) if base is None else (x, base)
    return not any(owner.is_leaf or may_be_saved_by_producer(owner) for owner in owners)


def drop_path(
    x: Tensor,
    p: float,
    training: bool = True,
    *,
    mode: str = "row",
    batch_dim: int = 0,
    inplace: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Set whole samples to zero, and scale the others so that the mean stays.

    With ``b ~ Bernoulli(1 - p)`` drawn for each sample ("row") or once ("batch")::

        drop_path(x) = x / (1 - p)  where b = 1,  and exactly 0  where b = 0

    Kept values are ``x / (1 - p)``, rounded once, in every dtype: the activation is divided. A
    mask that holds 1 / (1 - p) would be rounded first (in bfloat16, 1/0.9 becomes 1.109375).
    Dropped values are replaced by 0, not multiplied by 0, so an inf or NaN among them does not
    stay. Only the mask, one boolean a sample, is saved for backward. Derivatives of every order,
    in forward and reverse mode, are those of the equation.

    Args:
        x: The output of a residual branch, of any shape with at least one dimension and of any
            floating-point dtype. Its memory format is kept.
        p: The probability of dropping, in [0, 1]. With ``p=1`` values and gradients are zero.
        training: If False, or if ``p=0``, ``x`` itself is returned.
        mode: ``"row"``: one decision for each sample along ``batch_dim``. ``"batch"``: one for
            the whole batch.
        batch_dim: The dimension that counts samples: 1 for tensors of (tokens, batch, features).
        inplace: Allow the result to overwrite ``x``. Where autograd needs the values of ``x`` (for
            instance after a branch that ends in ReLU or softmax), and under ``torch.compile`` and
            ``torch.func``, which plan memory themselves, a new tensor is returned nevertheless.
        generator: Draws the mask, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is not a floating-point tensor, ``p`` is not a real number (bools and
            strings are not accepted), or ``batch_dim`` is not an integer.
        ValueError: ``p`` is NaN or outside [0, 1], ``mode`` is unknown, or ``x`` is 0-d or has no
            dimension ``batch_dim``.

    Reference:
        Huang et al. 2016, Deep Networks with Stochastic Depth, arXiv:1603.09382 ("batch"); Larsson
        et al. 2017, FractalNet, arXiv:1605.07648 (the name).
    """
    if has_torch_function_unary(x):  # torch.fx and tensor subclasses handle the call
        return handle_torch_function(
            drop_path,
            (x,),
            x,
            p,
            training,
            mode=mode,
            batch_dim=batch_dim,
            inplace=inplace,
            generator=generator,
        )
    check_flag(inplace, "inplace")
    rate = check_rate(p)
    check_mode(mode)
    check_input(x)
    check_generator(generator)
    dim = check_dim(batch_dim, x.dim())
    if not training or rate == 0.0:
        return x
    mask = _draw_mask(x, rate, mode, dim, generator)
    return _keep(x, mask, divisor_of_kept(rate), dim, inplace and _may_overwrite(x))


def drop_path_add(
    skip: Tensor,
    branch: Tensor,
    p: float,
    training: bool = True,
    *,
    mode: str = "row",
    batch_dim: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Add a residual branch with whole samples dropped: ``skip + drop_path(branch, p)``.

    On CPU no intermediate tensor is made: each run of kept rows is one fused multiply and add, and
    each run of dropped rows is one copy, so memory is passed over once. ``torch.compile`` fuses
    the sum into one pass on any device. Otherwise, and for rows of few elements, the function is
    composed of :func:`drop_path` and a sum. The same seed drops the same rows as
    :func:`drop_path`. The values agree up to rounding, since the fused product is not rounded
    before it is added.

    Args:
        skip: The other side of the residual sum.
        branch: The side that is dropped, of the shape of ``skip``. Dtypes promote as in a sum.
        p: The probability of dropping, in [0, 1]. With ``p=1`` the result is a copy of ``skip``.
        training: If False, or if ``p=0``, the result is ``skip + branch``, bit for bit.
        mode: ``"row"`` or ``"batch"``, as in :func:`drop_path`.
        batch_dim: The dimension that counts samples.
        generator: Draws the mask, on the device of ``branch``. Eager mode only.

    Returns:
        A new tensor that shares no memory with ``skip``: an in-place activation may follow it.

    Raises:
        TypeError: As :func:`drop_path`, for ``skip`` and ``branch``.
        ValueError: As :func:`drop_path`, or the shapes differ. Shapes are not broadcast, because
            unequal shapes are nearly always a mistake in a residual block.
    """
    if has_torch_function((skip, branch)):
        return handle_torch_function(
            drop_path_add,
            (skip, branch),
            skip,
            branch,
            p,
            training,
            mode=mode,
            batch_dim=batch_dim,
            generator=generator,
        )
    rate = check_rate(p)
    check_mode(mode)
    check_input(skip, "skip")
    check_input(branch, "branch")
    check_generator(generator)
    if skip.shape != branch.shape:
        raise ValueError(
            f"skip and branch have to have the same shape, but got {tuple(skip.shape)} "
            f"and {tuple(branch.shape)}; expand one of them if it is meant to be broadcast"
        )
    dim = check_dim(batch_dim, branch.dim())
    if not training or rate == 0.0:
        return skip + branch
    mask = _draw_mask(branch, rate, mode, dim, generator)
    divisor = divisor_of_kept(rate)
    same_layout = skip.dtype == branch.dtype and skip.stride() == branch.stride()
    if same_layout and type(skip) in (Tensor, torch.nn.Parameter) and _use_runs(branch, mask):
        return _AddRuns.apply(skip, branch, mask, divisor, dim)  # type: ignore[no-any-return]
    return skip + _keep(branch, mask, divisor, dim)


class DropPath(LayerWithRate):
    """Set whole samples of a residual branch to zero: stochastic depth as a mask.

    With ``b ~ Bernoulli(1 - p)`` for each sample (``mode="row"``) or once (``"batch"``)::

        y = b * x / (1 - p)   in training,     y = x   in evaluation and with p = 0

    The layer regularises, but saves no time, since the branch is computed before it is dropped.
    :class:`StochasticDepth` and :func:`torchdrop.add_stochastic_depth` skip the computation.

    ``p`` can be set at any time and is checked then. Under ``torch.compile``, a rate that changes
    every step causes two compilations (one for the first value, one for all others), and one more
    each for the values 0 and 1. torch.fx records the layer as one node, which follows ``train()``
    and ``eval()``.

    Args:
        p: The probability of dropping, in [0, 1].
        mode: ``"row"`` or ``"batch"``.
        batch_dim: The dimension that counts samples: 1 for tensors of (tokens, batch, features).
        inplace: Allow the result to overwrite the input where autograd does not need it
            (:func:`torchdrop.functional.drop_path`).

    Shape:
        Any number of dimensions from 1; the output has the shape, dtype and memory format of the
        input.

    Raises:
        TypeError: ``p`` is not a real number (bools and strings are not accepted), or
            ``batch_dim`` is not an integer.
        ValueError: ``p`` is NaN or outside [0, 1], or ``mode`` is unknown. A call can also raise
            the errors of :func:`torchdrop.functional.drop_path`.

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
        """Return ``x`` with samples dropped, or ``x`` itself in evaluation."""
        node = fx_node_of_call(self, (x,), {})
        if node is not None:
            return node
        return drop_path(
            x,
            self.p,
            self.training,
            mode=self.mode,
            batch_dim=self.batch_dim,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        """Return p, the mode, and the other arguments that differ from their defaults."""
        text = f"p={self.p}, mode={self.mode!r}"
        if self.batch_dim != 0:
            text += f", batch_dim={self.batch_dim}"
        return text + (", inplace=True" if self.inplace else "")
