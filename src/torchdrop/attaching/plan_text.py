"""What ``print(plan)`` shows: a table of the branches, and lines on what cannot be seen in it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torchdrop.finding.residual import Branch, Residual
from torchdrop.text_table import text_table

__all__ = ["lines_of", "not_taken_lines", "table_of"]

# The longest line. The names of blocks in the table are shortened to fit.
WIDTH = 100

# Fewer blocks of one form are not folded into one row.
_FEWEST_FOLDED = 3

_UNREACHED = (
    "the forward pass of example_inputs did not call this branch, so its share of the FLOPs is "
    "unknown; in a forward pass like that nothing is dropped here"
)

_HEADER = ("block", "branch", "shortcut", "p", "action", "FLOPs")


def lines_of(paragraphs: Iterable[str]) -> list[str]:
    """Return the lines of ``paragraphs``, each of which is broken to the width of the plan."""
    return [
        line
        for paragraph in paragraphs
        for line in textwrap.wrap(
            paragraph,
            WIDTH,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def table_of(blocks: Sequence[Residual], measured: bool) -> list[str]:
    """Return the lines of the table, followed by those of its numbered reasons.

    Consecutive blocks of one form whose names differ in a number become one row for each branch.
    Branches that are masked, computed in part for all rows, or not proved come first.

    Args:
        blocks: The blocks in the order of depth.
        measured: Whether the FLOPs of the branches were measured.
    """
    reasons: dict[str, int] = {}
    runs: list[_Run] = []
    for block in blocks:
        form = [_cells(block, branch, measured, reasons) for branch in block.branches]
        if not runs or not runs[-1].takes(block, form):
            runs.append(_Run(form))
        runs[-1].blocks.append(block)
    rows = sorted((row for run in runs for row in run.rows()), key=lambda row: row[0], reverse=True)
    cells = [_HEADER, *(row[1] for row in rows)]
    over = max(map(len, text_table(cells))) - WIDTH
    if over > 0:
        longest = max(len(row[0]) for row in cells)
        cells = [(_shortened(row[0], longest - over), *row[1:]) for row in cells]
    table = text_table(cells, right={3, 5})
    return [*table, *lines_of(f"[{number}] {reason}" for reason, number in reasons.items())]


def not_taken_lines(not_taken: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each reason why sums of the model are not dropped.

    Args:
        not_taken: The path of each module with such a sum, and the reason.
    """
    names: dict[str, list[str]] = {}
    for name, why in not_taken:
        names.setdefault(why, []).append(name or "the model")
    return [f"not taken: {_listed(paths)} ({why})" for why, paths in names.items()]


def _listed(names: Sequence[str]) -> str:
    """Return ``names`` as text; ``a.0, a.1, a.2`` becomes ``a.0 to 2``."""
    runs: list[list[str]] = []
    for name in names:
        run = runs[-1] if runs else []
        if not run or not _follows(run[-1], name, run[0]):
            runs.append([name])
        else:
            run.append(name)
    return ", ".join(_span(run[0], run[-1]) for run in runs)


# The branch, its shortcut, its action, and whether it comes first.
_Form = tuple[str, str, str, bool]


def _cells(block: Residual, branch: Branch, measured: bool, reasons: dict[str, int]) -> _Form:
    """Return what the table says of a branch besides its rate, and number its reasons."""
    label = branch.name[len(block.name) + 1 :] or "-"
    action = "partly" if branch.partly and branch.action == "skip" else branch.action
    first = action in ("mask", "partly") or branch.proved is False
    unreached = measured and branch.share is None and branch.action != "mask"
    for reason in filter(None, (branch.reason, _UNREACHED if unreached else "")):
        action += f" [{reasons.setdefault(reason, len(reasons) + 1)}]"
    return label, branch.shortcut, action, first


@dataclass
class _Run:
    """Consecutive blocks of one form.

    Attributes:
        form: What the table says of each branch besides its rate.
        blocks: The blocks.
    """

    form: list[_Form]
    blocks: list[Residual] = field(default_factory=list)

    def takes(self, block: Residual, form: list[_Form]) -> bool:
        """Whether ``block`` continues the run."""
        if form != self.form or type(block.module) is not type(self.blocks[-1].module):
            return False
        return _follows(self.blocks[-1].name, block.name, self.blocks[0].name)

    def rows(self) -> list[tuple[bool, tuple[str, ...]]]:
        """Return the rows of the table, each with whether it comes first."""
        if len(self.blocks) >= _FEWEST_FOLDED:
            return self._folded(self.blocks)
        return [row for block in self.blocks for row in self._folded([block])]

    def _folded(self, blocks: Sequence[Residual]) -> list[tuple[bool, tuple[str, ...]]]:
        """Return one row for each branch of ``blocks``."""
        found: list[tuple[bool, tuple[str, ...]]] = []
        for i, (label, shortcut, action, first) in enumerate(self.form):
            rates = [f"{block.branches[i].p:.3f}" for block in blocks]
            shares = [block.branches[i].share for block in blocks]
            known = ["-" if share is None else f"{share:.1%}" for share in shares]
            each = len({*known}) == 1 < len(blocks) and known[0] != "-"
            flops = f"{known[0]} each" if each else _range(known)
            name = _span(blocks[0].name, blocks[-1].name)
            cells = (name, label, shortcut, _range(rates), action, flops)
            found.append((first, cells))
        return found


def _range(values: Sequence[str]) -> str:
    """Return the first and the last of ``values``, or the least and the largest; or one."""
    if len({*values}) == 1:
        return values[0]
    ordered = sorted(values, key=lambda value: float(value.strip("-%") or 0))
    ends = values if list(values) in (ordered, ordered[::-1]) else ordered
    return f"{ends[0]} to {ends[-1]}"


def _span(first: str, last: str) -> str:
    """Return the names of consecutive blocks, from ``first`` to ``last``."""
    if first == last:
        return first
    place = _place_of_number(first, last)
    number = "" if place is None else _split(last)[place]
    return f"{first} to {number if number and last.endswith(number) else last}"


def _follows(one: str, other: str, first: str) -> bool:
    """Whether ``other`` follows ``one`` in the names from ``first`` on, as layers.3 layers.2."""
    place = _place_of_number(one, other)
    if place is None or place != _place_of_number(first, other):
        return False
    before, after = (int(_split(name)[place]) for name in (one, other))
    return after == before + 1


def _place_of_number(one: str, other: str) -> int | None:
    """Return the part in which two names differ, if that is one part and a number; else None."""
    parts, others = _split(one), _split(other)
    places = [i for i, both in enumerate(zip(parts, others, strict=False)) if both[0] != both[1]]
    if len(parts) != len(others) or len(places) != 1:
        return None
    numbers = parts[places[0]].isdigit() and others[places[0]].isdigit()
    return places[0] if numbers else None


def _split(name: str) -> list[str]:
    """Split ``name`` into its numbers and the text between them."""
    return re.split(r"(\d+)", name)


def _shortened(name: str, width: int) -> str:
    """Return the end of ``name``, so that it has at most ``width`` characters."""
    return name if len(name) <= width else "..." + name[3 - width :]
