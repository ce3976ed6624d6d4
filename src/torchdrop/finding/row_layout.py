"""Infer from the shapes for two batch sizes how a tensor carries the rows of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RowLayout", "RowLayouts", "differing_dims", "row_layout", "same_rows"]


class RowLayout(NamedTuple):
    """How a tensor carries the batch.

    Attributes:
        dim: The dimension that carries it.
        entries: How many entries each sample has on that dimension, next to each other. A tensor of
            shape (batch * heads, length, length) has ``heads`` of them. 0 if the tensor does not
            carry the batch.
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
    """
    differ = [i for i, (a, b) in enumerate(zip(few, many, strict=False)) if a != b]
    if len(few) != len(many) or len(differ) > 1:
        return None
    if not differ:
        return RowLayout(0, 0)
    (dim,) = differ
    entries, rest = divmod(few[dim], batches[0])
    return RowLayout(dim, entries) if not rest and many[dim] == entries * batches[1] else None


def same_rows(few: Tensor | None, many: Tensor | None, dim: int) -> bool:
    """Whether the entries of one sample are next to each other, as in (batch * heads, ...).

    The larger batch is the smaller one twice. So in this order it begins with the entries of the
    smaller one. If all entries are equal, the order is not known, and the answer is False.
    """
    if few is None or many is None or many.shape[dim] < few.shape[dim]:
        return False  # a detector may resize its images, so that a larger batch has fewer entries
    begins = torch.equal(many.narrow(dim, 0, few.shape[dim]), few)
    return begins and not bool((few == few.narrow(dim, 0, 1)).all())
