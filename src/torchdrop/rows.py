"""Take the kept rows of a batch, add a branch's rows back. Memory formats, dtypes, gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["add_rows", "add_whole", "take", "touch"]


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


def add_whole(skip: Tensor, branch: Tensor, gain: float, *, inplace: bool = False) -> Tensor:
    """``skip + gain * branch``; the plain sum, bit for bit, where ``gain`` is 1."""
    if inplace:
        return skip.add_(branch, alpha=gain)
    return torch.add(skip, branch, alpha=gain) if gain != 1.0 else skip + branch


def add_rows(
    skip: Tensor, branch: Tensor, rows: Tensor, gain: float, dim: int = 0, *, inplace: bool = False
) -> Tensor:
    """``skip`` with ``gain * branch`` added to its slices ``rows`` along ``dim``.

    The result is a new tensor (``skip`` itself with ``inplace``) in the memory format of ``skip``
    and in the dtype that ``skip + branch`` has.

    Raises:
        ValueError: ``branch`` does not have the shape of those slices.
    """
    expected = (*skip.shape[:dim], rows.numel(), *skip.shape[dim + 1 :])
    if tuple(branch.shape) != expected:
        raise ValueError(
            f"the branch of a residual has to have the shape of its skip: on {rows.numel()} kept "
            f"rows of a skip of shape {tuple(skip.shape)} expected {expected}, "
            f"but got {tuple(branch.shape)}; leave this block out with select="
        )
    if gain != 1.0 and branch.dtype in (torch.float16, torch.bfloat16):
        # index_add_ rounds alpha to the dtype first: in bfloat16 1/0.9 would become 1.109375.
        branch, gain = branch * gain, 1.0
    if not inplace:
        dtype = torch.promote_types(skip.dtype, branch.dtype)
        skip = skip.to(dtype)
    branch = branch.to(skip.dtype)
    order = _memory_order(skip)
    if order is not None:
        skip, branch, dim = skip.permute(order), branch.permute(order), order.index(dim)
    if inplace:
        out = skip.index_add_(dim, rows, branch, alpha=gain)
    else:
        out = _AddRows.apply(skip, branch, rows, gain, dim)
    return out if order is None else out.permute(_inverse(order))


class _AddRows(torch.autograd.Function):
    """``index_add``, whose own backward keeps the source only to know its shape."""

    generate_vmap_rule = True

    @staticmethod
    def forward(skip: Tensor, branch: Tensor, rows: Tensor, gain: float, dim: int) -> Tensor:
        return skip.index_add(dim, rows, branch, alpha=gain)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, rows, ctx.gain, ctx.dim = inputs
        ctx.save_for_backward(rows)
        ctx.save_for_forward(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (rows,) = ctx.saved_tensors
        of_branch = None
        if ctx.needs_input_grad[1]:
            of_branch = take(grad, rows, ctx.dim)
            of_branch = of_branch * ctx.gain if ctx.gain != 1.0 else of_branch
        return grad, of_branch, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (rows,) = ctx.saved_tensors
        of_skip, of_branch = tangents[:2]
        moved: Tensor = of_skip.index_add(ctx.dim, rows, of_branch, alpha=ctx.gain)
        return moved


class _Touch(torch.autograd.Function):
    """A copy of the first tensor; every other one gets a gradient of zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, *tensors: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Not the tensors themselves: an optimizer may change them before the backward.
        ctx.like = [(t.shape, t.dtype, t.device) for t in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(
                ctx.like, ctx.needs_input_grad[1:], strict=True
            )
        )
        return (grads[0], *zeros)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].clone()


def touch(out: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """A copy of ``out`` through which each of ``tensors`` gets a gradient of zeros.

    For what was skipped: DDP and FSDP wait for the gradient of every parameter, and an optimizer
    treats None otherwise than zero, so a parameter that no row used must look as if masked.
    """
    if not torch.is_grad_enabled():
        return out.clone()
    wanted = [t for t in tensors if t.requires_grad]
    if not wanted:
        return out.clone()
    copy: Tensor = _Touch.apply(out, *wanted)
    return copy
