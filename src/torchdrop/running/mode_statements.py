"""Put the operations that were recorded under other modes into ``with`` statements.

fx writes one statement a line. A graph holds two markers around such operations, and in its text
the first becomes the head of a ``with`` statement, and what follows up to the second its body.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import torch
from torch import fx

from torchdrop.tracing import modes as contexts
from torchdrop.tracing.modes import Modes, changes

__all__ = ["ModeWriter", "with_statements"]

# The name of the module with the contexts in generated code.
_MODULE = "modes_of_torchdrop"


def enter_modes(head: str) -> None:
    """Stand in a graph for the head of a ``with`` statement."""


def leave_modes() -> None:
    """Stand in a graph for the end of a ``with`` statement."""


_ENTER = re.compile(rf"(\s*)\w+ = [\w.]*{enter_modes.__name__}\((.*?)\)(;.*)?")
_LEAVE = re.compile(rf"\s*\w+ = [\w.]*{leave_modes.__name__}\(\)(;.*)?")


class ModeWriter:
    """Writes the markers into a graph while its nodes are copied one by one.

    Args:
        graph: The generated graph.
        base: The modes in which its code will be called.
    """

    def __init__(self, graph: fx.Graph, base: Modes | None) -> None:
        self._graph = graph
        self._outside = self._now = base

    def switch(self, modes: Modes | None) -> None:
        """Let what is written from now on stand under ``modes``; None: they do not matter."""
        if modes is None or self._outside is None or modes == self._now:
            return
        self.end()
        entered = changes(self._outside, modes)
        if entered:
            calls = [f"{_MODULE}.{name}({', '.join(map(_text, args))})" for name, args in entered]
            self._graph.call_function(enter_modes, (f"with {', '.join(calls)}:",))
            self._now = modes

    def end(self) -> None:
        """Let what is written from now on stand under the modes of the call."""
        if self._now != self._outside:
            self._graph.call_function(leave_modes)
            self._now = self._outside


def _text(value: Any) -> str:
    return f"{_MODULE}.{value}" if isinstance(value, torch.dtype) else repr(value)


def with_statements(text: str, names: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the text of a generated function with ``with`` in place of markers, and its names."""
    if enter_modes.__name__ not in text:
        return text, names
    lines: list[str] = []
    inside = ""
    for line in text.splitlines():
        entered = _ENTER.fullmatch(line)
        if entered:
            lines.append(entered[1] + ast.literal_eval(entered[2]))
            inside = "    "
        elif _LEAVE.fullmatch(line):
            inside = ""
        else:
            lines.append(inside + line)
    kept = {k: v for k, v in names.items() if v not in (enter_modes, leave_modes)}
    return "\n".join(lines) + "\n", {**kept, _MODULE: contexts}
