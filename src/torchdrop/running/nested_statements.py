"""Write ``with`` statements and checkpointed functions into generated code.

fx writes one statement a line. So a graph holds a marker before and after the operations that were
recorded under other modes or in a checkpoint, and the text of these markers is replaced: the first
by the head of a ``with`` statement or of a function, the second by what ends it. ::

    def checkpointed_0(site, x):
        with modes_of_torchdrop.autocast('cpu', None, True):
            h = self.fc(x);  x = None
        return h
    h = checkpoint_of_torch(checkpointed_0, site, x, use_reentrant=False)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import check_backward_validity, checkpoint

from torchdrop.tracing import modes as contexts
from torchdrop.tracing.checkpoint import Checkpoint
from torchdrop.tracing.modes import Modes, contexts_between

__all__ = ["CheckpointWriter", "ModeWriter", "nested_statements"]

# The names in generated code of the module with the contexts, and of checkpoint functions.
_MODULE = "modes_of_torchdrop"
_CHECKPOINT = "checkpoint_of_torch"
_REENTRANT = "reentrant_checkpoint_of_torchdrop"


# The markers. They stand in a graph and are never called.


def enter_modes(head: str) -> None:
    """Mark where a ``with`` statement begins."""


def leave_modes() -> None:
    """Mark where a ``with`` statement ends."""


def enter_checkpoint(number: int, *inputs: Any) -> None:
    """Mark where a checkpointed function begins."""


def leave_checkpoint(number: int, *outputs: Any) -> None:
    """Mark where a checkpointed function ends."""


_MARKERS = (enter_modes, leave_modes, enter_checkpoint, leave_checkpoint)
_MARKER = re.compile(rf"\s*\w+ = [\w.]*({'|'.join(m.__name__ for m in _MARKERS)})\((.*?)\)(;.*)?")


def reentrant_checkpoint(
    function: Callable[..., Any], *args: Any, takes_tensors: bool, **options: Any
) -> Any:
    """Compute what a reentrant checkpoint computes in the block's own forward.

    If no tensor among the arguments requires a gradient, the result has none either. Otherwise a
    checkpoint that is not reentrant is used, since a reentrant one computes no gradients for
    tensors in a tuple, and generated code hands on such tuples.

    Args:
        function: The function.
        args: Its arguments.
        takes_tensors: Whether the function took tensors in the block's own forward. If not, the
            result has no gradient, although generated code may pass tensors.
        options: Other arguments of ``checkpoint``.
    """
    given = [a for a in args if isinstance(a, Tensor)] if takes_tensors else []
    if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in given):
        check_backward_validity(given)  # warns
        with torch.no_grad():
            return function(*args)
    return checkpoint(function, *args, use_reentrant=False, **options)


class ModeWriter:
    """Writes the markers of ``with`` statements while nodes are copied into a graph one by one.

    Args:
        graph: The generated graph.
        base: The modes in which its code will be called.
    """

    def __init__(self, graph: fx.Graph, base: Modes | None) -> None:
        self._graph = graph
        self._outside = self._now = base

    def switch(self, modes: Modes | None) -> None:
        """Write the following nodes under ``modes``; None if their modes do not matter."""
        if modes is None or self._outside is None or modes == self._now:
            return
        self.end()
        entered = contexts_between(self._outside, modes)
        if entered:
            calls = [f"{_MODULE}.{name}({', '.join(map(_text, args))})" for name, args in entered]
            self._graph.call_function(enter_modes, (f"with {', '.join(calls)}:",))
            self._now = modes

    def end(self) -> None:
        """Write the following nodes under the modes of the call."""
        if self._now != self._outside:
            self._graph.call_function(leave_modes)
            self._now = self._outside


def _text(value: Any) -> str:
    return f"{_MODULE}.{value}" if isinstance(value, torch.dtype) else repr(value)


class CheckpointWriter:
    """Writes the markers of checkpointed functions while nodes are copied into a graph one by one.

    Args:
        graph: The generated graph.
        base: The checkpoints in which its code will be called, from the outermost to the innermost.

    Attributes:
        options: The options of each checkpoint that was written, by number.
    """

    def __init__(self, graph: fx.Graph, base: tuple[Checkpoint, ...]) -> None:
        self._graph = graph
        self._now = self._outside = base
        self._open: list[fx.Node] = []  # markers of the functions that have not ended
        self._pairs: list[tuple[fx.Node, fx.Node]] = []
        self.options: list[dict[str, Any]] = []

    def would_switch(self, checkpoints: tuple[Checkpoint, ...]) -> bool:
        """Whether :meth:`switch` to ``checkpoints`` would begin or end a function.

        Also true, which does no harm, for some nodes that are outside the checkpoint in which their
        branch is added.
        """
        return checkpoints[len(self._outside) :] != self._now[len(self._outside) :]

    def switch(self, checkpoints: tuple[Checkpoint, ...]) -> None:
        """Write the following nodes in ``checkpoints``."""
        if checkpoints[: len(self._outside)] != self._outside:
            # the node is outside the checkpoint in which its branch is added
            checkpoints = self._outside
        common = 0
        for one, other in zip(self._now, checkpoints, strict=False):
            if one is not other:
                break
            common += 1
        for _ in self._now[common:]:
            opened = self._open.pop()
            closed = self._graph.call_function(leave_checkpoint, (opened.args[0],))
            self._pairs.append((opened, closed))
        for entered in checkpoints[common:]:
            number = len(self.options)
            self.options.append(_options_of(entered))
            self._open.append(self._graph.call_function(enter_checkpoint, (number,)))
        self._now = checkpoints

    def end(self, is_sum: Callable[[fx.Node], bool]) -> None:
        """End all functions, and give each its arguments and what it returns.

        Args:
            is_sum: Returns whether a node adds a branch, and so draws random numbers.
        """
        self.switch(self._outside)
        for opened, closed in self._pairs:  # the innermost first
            place = {node: k for k, node in enumerate(self._graph.nodes)}
            first, last = place[opened], place[closed]
            inside = [node for node, k in place.items() if first < k < last]
            if any(map(is_sum, inside)):
                # With preserve_rng_state=False other rows would be drawn when the function is run
                # again.
                self.options[cast("int", opened.args[0])].pop("preserve_rng_state", None)
            inputs = dict.fromkeys(
                given for node in inside for given in node.all_input_nodes if place[given] < first
            )
            outputs = [node for node in inside if any(place[user] > last for user in node.users)]
            opened.args = (opened.args[0], *inputs)
            closed.args = (opened.args[0], *outputs)


def _options_of(part: Checkpoint) -> dict[str, Any]:
    """Return the keyword arguments with which generated code calls a checkpoint."""
    options = dict(part.options)
    if options.pop("use_reentrant", False):
        return {"takes_tensors": part.takes_tensors, **options}
    return {"use_reentrant": False, **options}


_NAMES = {_MODULE: contexts, _CHECKPOINT: checkpoint, _REENTRANT: reentrant_checkpoint}


def nested_statements(
    text: str, names: dict[str, Any], options: list[dict[str, Any]]
) -> tuple[str, dict[str, Any]]:
    """Replace the markers in the text of a generated function.

    Args:
        text: The text.
        names: The values of the global names in it.
        options: The options of each checkpoint, by number.

    Returns:
        The new text, and the values of the names in that.
    """
    if not any(marker.__name__ in text for marker in _MARKERS):
        return text, names
    lines: list[str] = []
    depth = 0
    inputs: dict[str, str] = {}
    kept = {k: v for k, v in names.items() if v not in _MARKERS}
    for line in text.splitlines():
        found = _MARKER.fullmatch(line)
        indent = line[: len(line) - len(line.lstrip())] + "    " * depth
        if not found:
            lines.append("    " * depth + line)
        elif found[1] == enter_modes.__name__:
            lines.append(indent + ast.literal_eval(found[2]))
            depth += 1
        elif found[1] == leave_modes.__name__:
            depth -= 1
        elif found[1] == enter_checkpoint.__name__:
            number, _, inputs[number] = found[2].partition(", ")
            lines.append(f"{indent}def checkpointed_{number}({inputs[number]}):")
            depth += 1
        else:
            number, _, outputs = found[2].partition(", ")
            depth -= 1
            given, values = _keywords(number, options[int(number)])
            kept.update(values)
            call = ", ".join(filter(None, (f"checkpointed_{number}", inputs[number], given)))
            runs = _CHECKPOINT if "use_reentrant" in given else _REENTRANT
            lines.append(f"{indent}return {outputs or None}")
            to = f"{outputs} = " if outputs else ""
            lines.append(f"{indent[:-4]}{to}{runs}({call})")
    return "\n".join(lines) + "\n", {**kept, **_NAMES}


def _keywords(number: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return options as the text of keyword arguments, and the values of the names in it."""
    texts: list[str] = []
    names: dict[str, Any] = {}
    for name, value in options.items():
        if value is None or isinstance(value, bool | str):
            texts.append(f"{name}={value!r}")
        else:
            names[f"{name}_{number}"] = value
            texts.append(f"{name}={name}_{number}")
    return ", ".join(texts), names
