"""How a tensor carries the rows of a batch, from its shapes with two batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RowLayout", "RowLayouts", "differing_dims", "row_layout", "same_rows"]


class RowLayout(NamedTuple):
    """How a tensor carries the batch: on which dimension, and how many entries each row has there.

    The entries of one row stand together: (batch * heads, length, length) has ``heads`` of them.
    """

    dim: int
    entries: int


# By the name of a node or the path of an argument; None where the tensor does not carry the batch.
RowLayouts = dict[str, RowLayout | None]


def differing_dims(one: Sequence[int], two: Sequence[int]) -> list[int]:
    """The places in which two shapes differ; none where they have different lengths."""
    if len(one) != len(two):
        return []
    return [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]


def row_layout(
    few: tuple[int, ...], many: tuple[int, ...], batches: tuple[int, int]
) -> RowLayout | None:
    """How a tensor carries the batch, from its shapes with both batch sizes.

    Returns:
        The dimension, and how many entries each row has there; (0, 0) where it does not carry the
        batch; None where that cannot be told.
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
    """Whether the entries of one row stand together, as in (batch * heads, length, length).

    The larger batch is the smaller one twice, so where the rows are outermost it starts like that.
    Where all entries are alike, nothing can be told.
    """
    if few is None or many is None or many.shape[dim] < few.shape[dim]:
        return False  # it did not grow: detectors do with an image as they like
    begins = torch.equal(many.narrow(dim, 0, few.shape[dim]), few)
    return begins and not bool((few == few.narrow(dim, 0, 1)).all())
