"""How a tensor carries the batch, from its shapes and values with two batch sizes."""

from __future__ import annotations

import pytest
import torch

from torchdrop.finding.row_layout import RowLayout, differing_dims, entries_are_adjacent, row_layout


@pytest.mark.parametrize(
    ("few", "many", "dims"),
    [
        ((2, 3), (4, 3), [0]),
        ((5, 2, 3), (5, 4, 3), [1]),
        ((2, 2), (4, 4), [0, 1]),
        ((2, 3), (2, 3), []),
        ((2, 3), (4, 3, 1), []),
    ],
)
def test_dimensions_that_differ(few: list[int], many: list[int], dims: list[int]) -> None:
    assert differing_dims(few, many) == dims


@pytest.mark.parametrize(
    ("few", "many", "expected"),
    [
        ((2, 3), (4, 3), RowLayout(0, 1)),
        ((5, 2, 3), (5, 4, 3), RowLayout(1, 1)),
        ((6, 7, 7), (12, 7, 7), RowLayout(0, 3)),  # three heads a row
        ((7, 7), (7, 7), RowLayout(0, 0)),  # no rows
        ((2, 2), (4, 4), None),  # a matrix of rows with rows
        ((3, 3), (6, 3), None),  # not a whole number of entries a row
        ((2, 3), (6, 3), None),  # one entry a row first, one and a half then
        ((4, 3), (6, 3), None),  # two a row first, one and a half then
        ((2, 3), (4, 3, 1), None),
    ],
)
def test_layout_of_a_batch_of_two_and_of_four(
    few: tuple[int, ...], many: tuple[int, ...], expected: RowLayout | None
) -> None:
    assert row_layout(few, many, (2, 4)) == expected


def test_entries_of_one_row_stand_together_where_the_smaller_batch_begins_the_larger() -> None:
    x = torch.arange(4.0).view(4, 1)
    assert entries_are_adjacent(x, torch.cat([x, x]), 0)
    assert not entries_are_adjacent(x, x.repeat_interleave(2, 0), 0)  # rows inside, heads outside
    # all entries are alike, so the order cannot be told
    assert not entries_are_adjacent(torch.ones(4, 1), torch.ones(8, 1), 0)
    assert not entries_are_adjacent(x, x[:2], 0)
    assert not entries_are_adjacent(None, x, 0)
