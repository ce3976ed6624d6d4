"""Columns line up, and no line ends in spaces."""

import pytest

from torchdrop.text_table import text_table


def test_columns_line_up():
    rows = [("name", "p", "why"), ("a", "0.5", ""), ("longer", "10.25", "x")]
    assert text_table(rows, right={1}) == [
        "name        p  why",
        "a         0.5",
        "longer  10.25  x",
    ]


def test_no_rows_are_no_lines():
    assert text_table([]) == []


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        text_table([("a", "b"), ("c",)])
