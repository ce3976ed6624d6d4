"""Gather the kept rows of a batch and add the rows of a branch back, with their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torchdrop.error_pages import see
from torchdrop.internals import (
    DisableTorchFunction,
    count_references,
    disable_dispatch_modes,
    functorch_transforms_active,
)

__all__ = [
    "HALF",
    "MIN_ELEMENTS_FOR_OWN_FUNCTION",
    "add_rows",
    "add_whole",
    "skip_and_rows",
    "take",
    "with_zero_grads",
]

# The dtypes to which ``index_add`` rounds its factor: in bfloat16 1/0.9 would become 1.109375.
HALF = (torch.float16, torch.bfloat16)

# The number of elements from which autograd functions of torchdrop's own are used. They save a pass
# over the tensor and keep nothing of the branch for backward, but cost time in Python. Taking rows
# on a CPU: 130 us instead of 90 us for 16,000 elements, 3.3 ms instead of 3.8 ms for a million.
MIN_ELEMENTS_FOR_OWN_FUNCTION = 2**18


def _memory_order(x: Tensor) -> list[int] | None:
    """Return the permutation of dimensions that makes ``x`` contiguous.

    On a CPU ``index_select`` turns channels_last into contiguous, and ``index_add`` is several
    times slower on channels_last. Neither happens on the permuted view, which is contiguous.

    Returns:
        None if ``x`` is contiguous as it is, or if no permutation makes it contiguous.
    """
    if x.is_contiguous():
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return order if x.permute(order).is_contiguous() else None


def _inverse(order: list[int]) -> list[int]:
    """Return the inverse of the permutation ``order``."""
    inverse = [0] * len(order)
    for position, dim in enumerate(order):
        inverse[dim] = position
    return inverse


def take(x: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """Return the slices ``rows`` of ``x`` along ``dim``: a copy in the memory format of ``x``."""
    order = _memory_order(x)
    if order is None:
        return x.index_select(dim, rows)
    return x.permute(order).index_select(order.index(dim), rows).permute(_inverse(order))


def add_whole(
    skip: Tensor,
    branch: Tensor,
    gain: float,
    *,
    inplace: bool = False,
    branch_first: bool = False,
) -> Tensor:
    """Return ``skip + gain * branch``; bit for bit the plain sum if ``gain`` is 1.

    Args:
        skip: The skip of a residual sum.
        branch: Its branch, for all rows.
        gain: The factor of the branch.
        inplace: Whether to write the sum into ``skip``.
        branch_first: Whether the model adds ``branch + skip``. If their memory formats differ, the
            sum has that of the first operand, and operations on it round as in the model only in
            the same format.
    """
    if inplace:
        return skip.add_(branch, alpha=gain)
    if gain != 1.0:
        return torch.add(skip, branch, alpha=gain)
    return branch + skip if branch_first else skip + branch


def add_rows(
    skip: Tensor,
    branch: Tensor,
    rows: Tensor,
    gain: float,
    dim: int = 0,
    *,
    inplace: bool = False,
    reuses_skip: bool = False,
) -> Tensor:
    """Return ``skip`` with ``gain * branch`` added to its slices ``rows`` along ``dim``.

    The result is a new tensor in the memory format of ``skip`` and in the dtype of
    ``skip + branch``.

    Args:
        skip: The skip of a residual sum.
        branch: Its branch, computed on ``rows``. A dimension other than ``dim`` may have size 1.
        rows: The indices of the slices.
        gain: The factor of the branch.
        dim: The dimension of the rows.
        inplace: Whether to write the sum into ``skip`` and return ``skip``.
        reuses_skip: Whether nothing reads ``skip`` later, not even a backward pass. The new tensor
            then uses the memory of ``skip``.

    Raises:
        ValueError: The shape of ``branch`` is not that of the slices.
    """
    expected = (*skip.shape[:dim], rows.numel(), *skip.shape[dim + 1 :])
    if branch.shape != expected:
        # As in skip + branch, a branch may be broadcast, but never over the rows.
        broadcasts = branch.dim() == skip.dim() and all(
            size == wanted or (size == 1 and axis != dim)
            for axis, (size, wanted) in enumerate(zip(branch.shape, expected, strict=True))
        )
        if broadcasts:
            whole = branch.expand(expected)
            return add_rows(skip, whole, rows, gain, dim, inplace=inplace, reuses_skip=reuses_skip)
        raise ValueError(
            f"the branch of a residual sum has to have the shape of its skip: for {rows.numel()} "
            f"kept rows of a skip of shape {tuple(skip.shape)} that is {expected}, but the branch "
            f"has {tuple(branch.shape)}; leave this block out with select="
            + see("cannot-be-skipped")
        )
    if gain != 1.0 and branch.dtype in HALF:
        branch, gain = branch * gain, 1.0
    if branch.dtype != skip.dtype:
        dtype = skip.dtype if inplace else torch.promote_types(skip.dtype, branch.dtype)
        skip, branch = skip.to(dtype), branch.to(dtype)
    order = _memory_order(skip)
    small = order is None and skip.numel() < MIN_ELEMENTS_FOR_OWN_FUNCTION
    if small or inplace or functorch_transforms_active():
        return _add(skip, branch, rows, gain, dim, order, inplace=inplace)
    out: Tensor = _AddRows.apply(skip, branch, (rows, gain, dim), reuses_skip)
    return out


def _add(
    x: Tensor,
    values: Tensor,
    rows: Tensor,
    gain: float,
    dim: int,
    order: list[int] | None,
    *,
    inplace: bool = False,
) -> Tensor:
    """Add ``gain * values`` to the slices ``rows`` of ``x`` along ``dim``.

    Args:
        x: The tensor that is added to.
        values: One slice for each of ``rows``.
        rows: The indices of the slices.
        gain: The factor of ``values``.
        dim: The dimension of the rows.
        order: The permutation of dimensions in which to add: that of :func:`_memory_order`.
        inplace: Whether to write the sum into ``x`` and return ``x``.
    """
    if order is None:
        add = x.index_add_ if inplace else x.index_add
        return add(dim, rows, values, alpha=gain)
    if inplace:
        x.permute(order).index_add_(order.index(dim), rows, values.permute(order), alpha=gain)
        return x
    out = x.permute(order).index_add(order.index(dim), rows, values.permute(order), alpha=gain)
    return out.permute(_inverse(order))


# The autograd functions below have no ``setup_context``: PyTorch would inspect their signatures in
# every call, which takes about as long as a small layer. Without it they do not work under
# torch.func, where PyTorch's own operations are used instead.


class _AddRows(torch.autograd.Function):
    """``index_add`` that does not save the branch for backward.

    PyTorch's own ``index_add`` saves the whole branch, although it needs only its shape.
    """

    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor,
        branch: Tensor,
        rows_gain_dim: tuple[Tensor, float, int],
        reuses_skip: bool,
    ) -> Tensor:
        # Stored as an attribute: saving a tensor for backward takes longer than a small sum, and
        # the indices need none of its checks.
        rows, gain, dim = ctx.rows_gain_dim = rows_gain_dim
        order = _memory_order(skip)
        if reuses_skip and (order is not None or skip.is_contiguous()):
            # The detached tensor shares the version counter of the skip. If the skip was saved for
            # a backward pass after all, that pass raises an error.
            return _add(skip.detach(), branch, rows, gain, dim, order, inplace=True)
        if order is None:
            return skip.index_add(dim, rows, branch, alpha=gain)
        # Return a copy, not a view: an in-place activation after the sum would turn a view into a
        # chain of copies.
        return _add(skip.clone(), branch, rows, gain, dim, order, inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, gain, dim = ctx.rows_gain_dim
        grad_branch = None
        if ctx.needs_input_grad[1]:
            grad_branch = take(grad, rows, dim)
            grad_branch = grad_branch if gain == 1.0 else grad_branch.mul_(gain)
        return grad, grad_branch, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        skip, branch = tangents[:2]
        rows, gain, dim = ctx.rows_gain_dim
        return _add(skip, branch, rows, gain, dim, _memory_order(skip))


class _SkipAndRows(torch.autograd.Function):
    """A tensor and some of its rows; their gradients are added in one pass over the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        ctx.rows, ctx.dim = rows, dim
        order = ctx.order = _memory_order(x)
        if order is None:
            return x.view_as(x), x.index_select(dim, rows)
        # Not take(), which returns a view: an operation in place on an output that is a view is an
        # error where an autograd function has several outputs.
        shape = (*x.shape[:dim], rows.numel(), *x.shape[dim + 1 :])
        gathered = torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)
        torch.index_select(x.permute(order), order.index(dim), rows, out=gathered.permute(order))
        return x.view_as(x), gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # If nothing else refers to the first gradient, it may be written into, as autograd does
        # when it accumulates gradients.
        references = count_references(grads)
        may_write = references is not None and references == _UnsharedGradient.references
        # With create_graph=True an operation may have saved it for the second derivative.
        may_write = may_write and not torch.is_grad_enabled()
        whole, gathered = grads
        # An expanded gradient, as of sum(), cannot be written into: its elements share memory.
        in_order = whole if ctx.order is None else whole.permute(ctx.order)
        may_write = may_write and in_order.is_contiguous()
        out = _add(whole, gathered, ctx.rows, 1.0, ctx.dim, ctx.order, inplace=may_write)
        return out, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        (tangent, *_) = tangents
        return tangent.view_as(tangent), take(tangent, ctx.rows, ctx.dim)


class _UnsharedGradient(torch.autograd.Function):
    """Counts the references to a gradient that only the backward pass itself refers to.

    The numbers depend on the versions of PyTorch and Python, so they are measured once. Every other
    reference to the tensor, or to a part of it, adds one.
    """

    measured = False
    references: tuple[int, int, int] | None = None  #: None if they cannot be counted

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _UnsharedGradient.references = count_references(grads)
        return grads[0]

    @classmethod
    def measure(cls) -> None:
        # A mode of the caller sees every operation and might keep a reference to the gradient.
        with DisableTorchFunction(), disable_dispatch_modes(), torch.enable_grad():
            x = torch.zeros(1, device="cpu", requires_grad=True)
            torch.autograd.grad(cls.apply(x).neg(), x, torch.zeros(1, device="cpu"))
        cls.measured = True


def skip_and_rows(x: Tensor, rows: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Return ``x`` and ``take(x, rows, dim)``, for a branch that takes the skip as its input.

    The backward pass adds the gradient of the rows directly to that of the skip. Two separate
    operations would scatter it into zeros first, one pass over the tensor more.
    """
    small = x.numel() < MIN_ELEMENTS_FOR_OWN_FUNCTION
    if small or functorch_transforms_active() or not (x.requires_grad and torch.is_grad_enabled()):
        return x, take(x, rows, dim)
    if not _UnsharedGradient.measured:
        _UnsharedGradient.measure()
    whole, gathered = _SkipAndRows.apply(x, rows, dim)
    return whole, gathered


class _WithZeroGrads(torch.autograd.Function):
    """Copies the first tensor, and gives every other tensor a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *tensors: Tensor) -> Tensor:
        # Detached: the data of the tensors themselves may be replaced before the backward pass.
        ctx.like = [t.detach() for t in tensors]
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (
            torch.zeros_like(like) if needed else None
            for like, needed in zip(ctx.like, ctx.needs_input_grad[1:], strict=True)
        )
        return (grads[0], *zeros)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].clone()


def with_zero_grads(out: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Return a copy of ``out`` whose backward pass gives each of ``tensors`` a gradient of zeros.

    The parameters of a skipped branch need one, as if the branch had been masked: DDP and FSDP wait
    for the gradient of every parameter, and an optimizer treats None differently from zero.
    """
    # torch.func gives gradients of zeros to unused tensors by itself.
    if not torch.is_grad_enabled() or functorch_transforms_active():
        return out.clone()
    wanted = [t for t in tensors if t.requires_grad]
    if not wanted:
        return out.clone()
    copy: Tensor = _WithZeroGrads.apply(out, *wanted)
    return copy
