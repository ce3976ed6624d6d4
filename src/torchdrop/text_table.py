"""A table as plain text: what the representations of reports print."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["text_table"]


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Align ``rows`` in columns that are two spaces apart, one line of text a row.

    Args:
        rows: The cells. All rows have the same number of them; the first row is the header.
        right: The numbers of the columns that are aligned to the right, counted from 0.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines
