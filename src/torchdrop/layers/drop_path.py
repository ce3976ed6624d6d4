"""What drops whole slices: samples of a branch, also while it is added, and channels."""

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
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.layers.draws import can_read_on_host, keep_mask, under_transform
from torchdrop.schedules import check_rate

__all__ = ["DropPath", "drop_path", "drop_path_add"]

# Fewer elements a row than this, and one elementwise kernel over everything beats one kernel a run
# of rows (about 4 microseconds each, against .8 nanoseconds an element that a second pass costs).
_ROW_WORTH_A_KERNEL = 4096

# The names under which a node of autograd holds its own output (ReLU, sigmoid, softmax, ...).
# Only their presence on the class is looked at: reading one would unpack it, and in a
# checkpointed region that runs the recompute.
_SAVED_OUTPUT = ("_saved_result", "_saved_result0", "_saved_output", "_saved_out", "saved_tensors")


def _mask(
    x: Tensor, p: float, mode: str, batch_dim: int, generator: torch.Generator | None
) -> Tensor:
    """What is kept, in a shape that broadcasts against ``x`` whatever its number of dimensions."""
    shape = [1] * x.dim()
    if mode == "row":
        shape[batch_dim] = x.shape[batch_dim]
    return keep_mask(shape, p, device=x.device, generator=generator)


def _in_runs(x: Tensor, mask: Tensor, dim: int) -> bool:
    """Whether to work on runs of rows, each in one pass, with the mask read on the host."""
    return (
        can_read_on_host(x)
        and x.numel() >= _ROW_WORTH_A_KERNEL * mask.numel()
        and (mask.numel() > 1 or x.shape[dim] > 0)
    )


def _runs(mask: Tensor, rows: int) -> tuple[list[bool], list[int]]:
    """For each run of equal decisions: whether it is kept, and its length."""
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
    """``where(mask, x, 0) / keep``, each run of rows in one pass over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, keep: float, dim: int, inplace: bool) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)
        ctx.keep, ctx.dim = keep, dim
        if inplace:
            ctx.mark_dirty(x)
        out = x if inplace else torch.empty_like(x)
        decisions, lengths = _runs(mask, x.shape[dim])
        # The method that torch.split calls, without its Python.
        parts = (t.split_with_sizes(lengths, dim) for t in (out, x))
        for kept, part, old in zip(decisions, *parts, strict=True):
            if kept:
                torch.div(old, keep, out=part)
            else:
                part.zero_()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        # Linear in its input, hence its own derivative, of whatever order.
        return _keep(grads[0], mask, ctx.keep, ctx.dim), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return _keep(tangents[0], mask, ctx.keep, ctx.dim)


def _keep(x: Tensor, mask: Tensor, keep: float, dim: int, inplace: bool = False) -> Tensor:
    """``where(mask, x, 0) / keep``: selected, so that an inf or NaN that is dropped is gone."""
    if _in_runs(x, mask, dim):
        return _KeepRuns.apply(x, mask, keep, dim, inplace)  # type: ignore[no-any-return]
    if inplace:
        return x.masked_fill_(~mask, 0.0).div_(keep)
    # The division is in place on a tensor that is ours, and that vmap has made a batch of.
    return torch.where(mask, x, 0.0).div_(keep)


class _AddRuns(torch.autograd.Function):
    """``skip + where(mask, branch, 0) / keep``, each run of rows in one pass over memory."""

    @staticmethod
    def forward(
        ctx: Any, skip: Tensor, branch: Tensor, mask: Tensor, keep: float, dim: int
    ) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)
        ctx.keep, ctx.dim = keep, dim
        out = torch.empty_like(skip)
        decisions, lengths = _runs(mask, skip.shape[dim])
        parts = (t.split_with_sizes(lengths, dim) for t in (out, skip, branch))
        for kept, part, old, new in zip(decisions, *parts, strict=True):
            if not kept:
                part.copy_(old)
            elif skip.dtype in (torch.float16, torch.bfloat16):
                # `alpha` would be rounded to the dtype first, the divisor is not.
                torch.div(new, keep, out=part).add_(old)
            else:
                torch.add(old, new, alpha=1.0 / keep, out=part)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        branch = _keep(grads[0], mask, ctx.keep, ctx.dim) if ctx.needs_input_grad[1] else None
        return grads[0] if ctx.needs_input_grad[0] else None, branch, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return tangents[0] + _keep(tangents[1], mask, ctx.keep, ctx.dim)


def _may_overwrite(x: Tensor) -> bool:
    """Whether autograd, as far as it can be seen from ``x``, does not need its values."""
    if under_transform():
        return False
    if not (torch.is_grad_enabled() and x.requires_grad):
        return True
    # A view writes into its base: flatten(relu(z)) is no safer than relu(z).
    owners = (x,) if x._base is None else (x, x._base)
    return not any(
        owner.is_leaf or any(hasattr(type(owner.grad_fn), name) for name in _SAVED_OUTPUT)
        for owner in owners
    )


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

    The kept value is ``x / (1 - p)`` to one rounding in every dtype: the activation is divided, not
    multiplied by a mask that was rounded first (in bfloat16 1/0.9 would become 1.109375). Dropped
    values are selected away, not multiplied by zero, so an inf or NaN among them is gone too.
    Nothing but the mask, one boolean a sample, is kept for backward; derivatives of every order,
    forward and backward, are those of the equation.

    Args:
        x: The output of a residual branch, of any shape with at least one dimension and of any
            floating-point dtype. Its memory format is kept.
        p: The probability of dropping, in [0, 1]. ``p=1`` gives zeros, and zeros as gradients.
        training: False returns ``x`` itself. So does ``p=0``.
        mode: ``"row"``: each sample along ``batch_dim`` has its own draw. ``"batch"``: one draw.
        batch_dim: The dimension that counts samples: 1 for tensors of (tokens, batch, features).
        inplace: Let the result overwrite ``x``. Done where autograd does not need the values of
            ``x``; a new tensor is returned where it does (a branch that ends in ReLU or softmax),
            and under ``torch.compile`` and ``torch.func``, which plan memory themselves.
        generator: Draws the mask, on the device of ``x``. Eager mode only.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: ``x`` is no floating-point tensor, ``p`` no real number (a bool or a string is
            none), or ``batch_dim`` no integer.
        ValueError: ``p`` is NaN or outside [0, 1], ``mode`` is unknown, ``x`` is 0-d or has no
            dimension ``batch_dim``.

    Reference:
        Huang et al. 2016, Deep Networks with Stochastic Depth, arXiv:1603.09382 ("batch"); Larsson
        et al. 2017, FractalNet, arXiv:1605.07648 (the name).
    """
    if has_torch_function_unary(x):  # fx records one node; a tensor subclass takes over
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
    mask = _mask(x, rate, mode, dim, generator)
    # With p=1 nothing is kept: divided by one, zeros stay zeros, forward and backward.
    keep = 1.0 - rate if rate < 1.0 else 1.0
    return _keep(x, mask, keep, dim, inplace and _may_overwrite(x))


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
    """``skip + drop_path(branch, p)`` without the tensor in between.

    On CPU each run of kept rows is one fused multiply and add, each run of dropped rows one copy,
    so the whole is one pass over memory. ``torch.compile`` fuses it into one pass on any device.
    Elsewhere, and for rows of few elements, it is composed of :func:`drop_path` and a sum. The
    same seed drops the same rows as :func:`drop_path`; the values agree to rounding, since a
    fused product is not rounded before it is added.

    Args:
        skip: The other side of the residual sum.
        branch: The side that is dropped, of the shape of ``skip``. Dtypes promote as in a sum.
        p: The probability of dropping, in [0, 1]. ``p=1`` gives a copy of ``skip``.
        training: False gives ``skip + branch``, bit for bit. So does ``p=0``.
        mode: ``"row"`` or ``"batch"``, as in :func:`drop_path`.
        batch_dim: The dimension that counts samples.
        generator: Draws the mask, on the device of ``branch``. Eager mode only.

    Returns:
        A new tensor, which shares no memory with ``skip``: an in-place activation may follow.

    Raises:
        TypeError: As :func:`drop_path`, for ``skip`` and ``branch``.
        ValueError: As :func:`drop_path`; or the shapes differ. They are not broadcast: a sum of
            unlike shapes is nearly always a mistake in a residual block.
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
            f"and {tuple(branch.shape)}"
        )
    dim = check_dim(batch_dim, branch.dim())
    if not training or rate == 0.0:
        return skip + branch
    mask = _mask(branch, rate, mode, dim, generator)
    keep = 1.0 - rate if rate < 1.0 else 1.0
    alike = skip.dtype == branch.dtype and skip.stride() == branch.stride()
    if alike and type(skip) in (Tensor, torch.nn.Parameter) and _in_runs(branch, mask, dim):
        return _AddRuns.apply(skip, branch, mask, keep, dim)  # type: ignore[no-any-return]
    return skip + _keep(branch, mask, keep, dim)


class DropPath(LayerWithRate):
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
        """The arguments that differ from their defaults, and p and mode."""
        text = f"p={self.p}, mode={self.mode!r}"
        if self.batch_dim != 0:
            text += f", batch_dim={self.batch_dim}"
        return text + (", inplace=True" if self.inplace else "")
