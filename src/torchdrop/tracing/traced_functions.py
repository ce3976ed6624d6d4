"""Functions of torchdrop that a graph calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "add_padded",
    "add_product",
    "add_product_",
    "no_shortcut",
    "pad_like",
    "passed_through",
]


def passed_through(value: Any, path: str, args: Any, kwargs: Any, rest: Any) -> Any:
    """Return ``value``, the output of a child whose own forward is part of the graph.

    The node of this call marks where the forward hooks of the child have to be called.

    Args:
        value: The output, or the first item of it if the child returned a tuple.
        path: The path of the child from the block.
        args: The positional arguments that the child was called with.
        kwargs: Its keyword arguments.
        rest: The other items of that tuple.
    """
    return value


def no_shortcut(stream: Tensor) -> Tensor:
    """Return zeros in the shape of ``stream``, to which a branch is added that has no shortcut.

    They are of the type bool, so that the sum has the dtype of the branch.
    """
    return torch.zeros_like(stream, dtype=torch.bool)


def pad_like(x: Tensor, size: int, dim: int) -> Tensor:
    """Return ``x`` with zeros appended on dimension ``dim``, up to ``size`` entries there."""
    from_the_end = dim if dim < 0 else dim - x.dim()
    return functional.pad(x, [0, 0] * (-from_the_end - 1) + [0, size - x.shape[dim]])


def add_padded(left: Tensor, right: Tensor, dim: int) -> Tensor:
    """Return the sum of two tensors, the smaller one padded with zeros at the end of ``dim``."""
    size = max(left.shape[dim], right.shape[dim])
    return pad_like(left, size, dim) + pad_like(right, size, dim)


def add_product(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1) -> Tensor:
    """Compute ``torch.addcmul`` in plain operations: ``input + value * tensor1 * tensor2``."""
    return input + _product(tensor1, tensor2, value)


def add_product_(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1) -> Tensor:
    """Compute ``Tensor.addcmul_`` in plain operations: ``input += value * tensor1 * tensor2``."""
    return input.add_(_product(tensor1, tensor2, value))


def _product(tensor1: Tensor, tensor2: Tensor, value: Any) -> Tensor:
    product = tensor1 * tensor2
    return product if value == 1 else value * product
