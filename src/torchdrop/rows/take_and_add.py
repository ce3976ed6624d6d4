"""Take the kept rows of a batch, add a branch's rows back. Memory formats, dtypes, gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_rows", "add_whole", "skip_and_rows", "take", "with_zero_grads"]

# From this many elements on, a pass over the tensor that is saved takes longer than the Python of a
# function of our own: on a CPU 130 us against 90 for 16,000 elements, 3.3 ms against 3.8 for 10**6.
MIN_ELEMENTS_FOR_OWN_FUNCTION = 2**18

# Neither is public; without them gradients are copied where autograd would add in place.
_COUNTABLE = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")


def _memory_order(x: Tensor) -> list[int] | None:
    """The permutation that makes ``x`` contiguous, or None where it is, or none exists.

    On CPU ``index_select`` turns channels_last into contiguous and ``index_add`` on channels_last
    is several times slower; on the permuted view, which is contiguous, neither happens.
    """
    if x.is_contiguous():
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return order if x.permute(order).is_contiguous() else None


def _inverse(order: list[int]) -> list[int]:
    inverse = [0] * len(order)
    for place, dim in enumerate(order):
        inverse[dim] = place
    return inverse


def take(x: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """The slices ``rows`` of ``x`` along ``dim``, a copy in the memory format of ``x``."""
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
    """``skip + gain * branch``; the plain sum, bit for bit, where ``gain`` is 1.

    ``branch_first`` is for a model that adds them in that order: where their memory formats differ,
    the sum has that of the first, and what follows rounds accordingly.
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
    """``skip`` with ``gain * branch`` added to its slices ``rows`` along ``dim``.

    The result is a new tensor (``skip`` itself with ``inplace``) in the memory format of ``skip``
    and in the dtype that ``skip + branch`` has. With ``spent`` nobody reads ``skip`` after this,
    also not in a backward pass, and the new tensor takes over its memory.

    Raises:
        ValueError: ``branch`` neither has the shape of those slices, nor 1 in place of other
            dimensions than ``dim``.
    """
    expected = (*skip.shape[:dim], rows.numel(), *skip.shape[dim + 1 :])
    if branch.shape != expected:
        # one value for all steps or channels of a row may stand for them, as in skip + branch
        fits = branch.dim() == skip.dim() and all(
            size == wanted or (size == 1 and place != dim)
            for place, (size, wanted) in enumerate(zip(branch.shape, expected, strict=True))
        )
        if fits:
            whole = branch.expand(expected)
            return add_rows(skip, whole, rows, gain, dim, inplace=inplace, reuses_skip=reuses_skip)
        raise ValueError(
            f"the branch of a residual has to have the shape of its skip: on {rows.numel()} kept "
            f"rows of a skip of shape {tuple(skip.shape)} expected {expected}, "
            f"but got {tuple(branch.shape)}; leave this block out with select="
        )
    if gain != 1.0 and branch.dtype in (torch.float16, torch.bfloat16):
        # index_add_ rounds alpha to the dtype first: in bfloat16 1/0.9 would become 1.109375.
        branch, gain = branch * gain, 1.0
    if branch.dtype != skip.dtype:
        dtype = skip.dtype if inplace else torch.promote_types(skip.dtype, branch.dtype)
        skip, branch = skip.to(dtype), branch.to(dtype)
    if inplace or _in_torch_func():
        return _add(skip, branch, rows, gain, dim, _memory_order(skip), inplace=inplace)
    out: Tensor = _AddRows.apply(skip, branch, (rows, gain, dim), reuses_skip)
    return out


def _add(
    x: Tensor,
    some: Tensor,
    rows: Tensor,
    gain: float,
    dim: int,
    order: list[int] | None,
    *,
    inplace: bool = False,
) -> Tensor:
    """``index_add`` with dimensions in ``order``, see :func:`_memory_order`."""
    if order is None:
        add = x.index_add_ if inplace else x.index_add
        return add(dim, rows, some, alpha=gain)
    if inplace:
        x.permute(order).index_add_(order.index(dim), rows, some.permute(order), alpha=gain)
        return x
    out = x.permute(order).index_add(order.index(dim), rows, some.permute(order), alpha=gain)
    return out.permute(_inverse(order))


# The functions below are written with ``forward(ctx, ...)``: of one with ``setup_context`` torch
# inspects the signature in every call, which takes about as long as a small layer. What is lost
# with that is torch.func, for which torch's own operations are used.


class _AddRows(torch.autograd.Function):
    """``index_add``, whose own backward keeps the source only to know its shape."""

    @staticmethod
    def forward(
        ctx: Any, skip: Tensor, branch: Tensor, to: tuple[Tensor, float, int], reuses_skip: bool
    ) -> Tensor:
        # The indices need none of what saving a tensor does, which takes longer than a small sum.
        rows, gain, dim = ctx.to = to
        order = _memory_order(skip)
        if reuses_skip and (order is not None or skip.is_contiguous()):
            # It shares the version of the skip: who kept the skip for backward is told.
            return _add(skip.detach(), branch, rows, gain, dim, order, inplace=True)
        if order is None:
            return skip.index_add(dim, rows, branch, alpha=gain)
        # Not a view, which an activation in place after the sum would make a chain of copies.
        return _add(skip.clone(), branch, rows, gain, dim, order, inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, gain, dim = ctx.to
        of_branch = None
        if ctx.needs_input_grad[1]:
            of_branch = take(grad, rows, dim)
            of_branch = of_branch if gain == 1.0 else of_branch.mul_(gain)
        return grad, of_branch, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        of_skip, of_branch = tangents[:2]
        rows, gain, dim = ctx.to
        return _add(of_skip, of_branch, rows, gain, dim, _memory_order(of_skip))


class _Fork(torch.autograd.Function):
    """A tensor and some of its rows. Their gradients meet here, in one pass over the tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        ctx.rows, ctx.dim = rows, dim
        order = ctx.order = _memory_order(x)
        if order is None:
            return x.view_as(x), x.index_select(dim, rows)
        shape = (*x.shape[:dim], rows.numel(), *x.shape[dim + 1 :])
        some = torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)
        torch.index_select(x.permute(order), order.index(dim), rows, out=some.permute(order))
        return x.view_as(x), some

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Where nobody else has it, the first is written into: autograd adds up gradients likewise.
        alone = _references(grads) == _Owned.references and not torch.is_grad_enabled()
        whole, some = grads
        alone = alone and (whole if ctx.order is None else whole.permute(ctx.order)).is_contiguous()
        return _add(whole, some, ctx.rows, 1.0, ctx.dim, ctx.order, inplace=alone), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        of_x = tangents[0]
        return of_x.view_as(of_x), take(of_x, ctx.rows, ctx.dim)


def _references(grads: tuple[Tensor, ...]) -> tuple[int, int, int] | None:
    """To the first of ``grads``, by Python and by C++, and to its memory; None if not countable."""
    first: Any = grads[0]
    plain = type(first) is Tensor and not torch._C._functorch.is_legacy_batchedtensor(first)
    if not (plain and _COUNTABLE):
        return None
    memory = torch._C._storage_Use_Count(first.untyped_storage()._cdata)
    return sys.getrefcount(first), first._use_count(), memory


class _Owned(torch.autograd.Function):
    """Looks up how many references there are to a gradient that a backward pass has for itself.

    The numbers depend on torch and Python. Whoever else has the tensor, or a part of it, adds one.
    """

    references: tuple[int, int, int] | None = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _Owned.references = _references(grads)
        return grads[0]

    @classmethod
    def look_up(cls) -> None:
        with torch.enable_grad():
            x = torch.zeros(1, device="cpu", requires_grad=True)
            torch.autograd.grad(cls.apply(x).neg(), x, torch.zeros(1, device="cpu"))


def skip_and_rows(x: Tensor, rows: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """``x`` and ``take(x, rows, dim)``, for an ``x`` that is both the skip and the branch's input.

    The same values as apart from each other; but in the backward pass the gradient of the rows is
    added to that of the skip, instead of being spread over zeros first.
    """
    small = x.numel() < MIN_ELEMENTS_FOR_OWN_FUNCTION
    if small or _in_torch_func() or not (x.requires_grad and torch.is_grad_enabled()):
        return x, take(x, rows, dim)
    if _Owned.references is None:
        _Owned.look_up()
    whole, some = _Fork.apply(x, rows, dim)
    return whole, some


def _in_torch_func() -> bool:
    return torch._C._are_functorch_transforms_active()


class _Touch(torch.autograd.Function):
    """A copy of the first tensor; every other one gets a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *tensors: Tensor) -> Tensor:
        # Not the tensors themselves, whose data may be set to others before the backward.
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
    """A copy of ``out`` through which each of ``tensors`` gets a gradient of zeros.

    For what was skipped: DDP and FSDP wait for the gradient of every parameter, and an optimizer
    treats None otherwise than zero, so a parameter that no row used must look as if masked.
    """
    # torch.func gives zeros to what was not used, without being told.
    if not torch.is_grad_enabled() or _in_torch_func():
        return out.clone()
    wanted = [t for t in tensors if t.requires_grad]
    if not wanted:
        return out.clone()
    copy: Tensor = _Touch.apply(out, *wanted)
    return copy
