"""Infer how a tensor carries the rows of the batch, from its shapes for two batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "RowLayout",
    "RowLayouts",
    "differing_dims",
    "entries_are_adjacent",
    "layout_if_broadcast",
    "row_layout",
]


class RowLayout(NamedTuple):
    """How a tensor carries the batch.

    Attributes:
        dim: The dimension that carries the batch.
        entries: How many entries each sample has on that dimension, next to each other. A tensor of
            shape (batch * heads, length, length) has ``heads`` of them. 0 if each call decides: the
            tensor has one entry for each row if its size on ``dim`` is the batch size, and does
            not carry the batch otherwise.
    """

    dim: int
    entries: int


# By the name of a node or the path of an argument; None if the tensor does not carry the batch.
RowLayouts = dict[str, RowLayout | None]


def differing_dims(one: Sequence[int], two: Sequence[int]) -> list[int]:
    """Return the dimensions in which two shapes differ; none if they have different lengths."""
    if len(one) != len(two):
        return []
    return [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]


def row_layout(
    few: tuple[int, ...], many: tuple[int, ...], batches: tuple[int, int]
) -> RowLayout | None:
    """Return how a tensor carries the batch; None if its shapes do not tell.

    Args:
        few: Its shape for the smaller batch.
        many: Its shape for the larger batch.
        batches: The two batch sizes.

    Returns:
        The layout, with 0 entries if the tensor does not carry the batch in these two calls.
    """
    differ = [i for i, (a, b) in enumerate(zip(few, many, strict=False)) if a != b]
    if len(few) != len(many) or len(differ) > 1:
        return None
    if not differ:
        return RowLayout(0, 0)
    (dim,) = differ
    entries, rest = divmod(few[dim], batches[0])
    return RowLayout(dim, entries) if not rest and many[dim] == entries * batches[1] else None


def layout_if_broadcast(shape: tuple[int, ...], dim: int) -> RowLayout | None:
    """Return the layout, in other calls, of a tensor that carried no batch; None if it never does.

    Positions of shape (1, length), for example, are broadcast over the batch, but another call may
    pass positions of shape (batch, length).

    Args:
        shape: Its shape, the same for both batch sizes.
        dim: The dimension of the residual that carries the batch.
    """
    of_size_1 = [d for d in dict.fromkeys((dim, 0)) if d < len(shape) and shape[d] == 1]
    return RowLayout(of_size_1[0], 0) if of_size_1 else None


def entries_are_adjacent(few: Tensor | None, many: Tensor | None, dim: int) -> bool:
    """Whether the entries of one sample are next to each other, as in (batch * heads, ...).

    The larger batch repeats the smaller one. So if the entries of a sample are next to each other,
    the tensor for the larger batch begins with that for the smaller one. In the other order,
    (heads * batch, ...), it does not. If all entries are equal, the order cannot be told, and the
    result is False.

    Args:
        few: The tensor for the smaller batch.
        many: The tensor for the larger batch.
        dim: The dimension that carries the batch.
    """
    if few is None or many is None or many.shape[dim] < few.shape[dim]:
        return False  # a detector may resize its images, so that a larger batch has fewer entries
    begins = torch.equal(many.narrow(dim, 0, few.shape[dim]), few)
    return begins and not bool((few == few.narrow(dim, 0, 1)).all())
