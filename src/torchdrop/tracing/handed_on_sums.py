"""Read a block that leaves its last addition to the next block.

Networks with a fused addition and norm hand two tensors on: ``block(h, stream)`` computes
``stream = stream + h`` and returns ``f(norm(stream)), stream``. The branch ``f`` is added at the
start of the next block. In the graph, it becomes ``no_shortcut(stream) + f(norm(stream))``, a
residual addition of this block, whose dropped rows are zero.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from torchdrop.tracing.nodes import summands
from torchdrop.tracing.operations import operation_of
from torchdrop.tracing.padded_sums import ancestors
from torchdrop.tracing.traced_functions import no_shortcut

__all__ = [
    "Handed",
    "add_handed_on",
    "adds_inputs",
    "branch_handed_on",
    "copied_from",
    "handed_on",
    "returns_sum_of_inputs",
]


class Handed:
    """A branch and the stream that a block hands on to the next one.

    Attributes:
        branch: The number of the item of the output that is the branch.
        stream: The number of the item that is the stream.
    """

    def __init__(self, branch: int, stream: int) -> None:
        self.branch, self.stream = branch, stream


def handed_on(graph: fx.Graph, reads_sum: Callable[[], bool]) -> Handed | None:
    """Return which items of the output are a branch and the stream that it belongs to.

    Args:
        graph: The forward of a block.
        reads_sum: Returns whether the block adds its inputs if it gets all of them. It is asked
            where it was called without one, as a first block may be, and returns its input as the
            stream.
    """
    items = _output_items(graph)
    for number, stream in enumerate(items):
        if not isinstance(stream, fx.Node):
            continue
        roots = list(_roots(stream))
        if not roots:
            continue
        source = copied_from(stream)[-1]  # the stream may be cast before it is returned
        for other, branch in enumerate(items):
            if not isinstance(branch, fx.Node) or source not in ancestors(branch):
                continue
            if not _calls_modules_between(source, branch):
                continue
            if any(map(adds_inputs, roots)) or reads_sum():
                return Handed(other, number)
    return None


def add_handed_on(graph: fx.Graph, found: Handed) -> None:
    """Make the branch that is handed on a residual addition of the block."""
    output = next(node for node in graph.nodes if node.op == "output")
    items: list[Any] = list(_output_items(graph))
    stream, branch = items[found.stream], items[found.branch]
    with graph.inserting_before(output):
        nothing = graph.call_function(no_shortcut, (stream,))
        total = graph.call_function(operator.add, (nothing, branch))
    items[found.branch] = total
    output.args = (tuple(items),)


def branch_handed_on(node: fx.Node) -> fx.Node | None:
    """Return the branch that ``node`` adds to ``no_shortcut``; None for any other node."""
    if node.target is not operator.add or len(node.args) != 2:
        return None
    shortcut, branch = node.args
    found = isinstance(shortcut, fx.Node) and shortcut.target is no_shortcut
    return branch if found and isinstance(branch, fx.Node) else None


def adds_inputs(node: fx.Node) -> bool:
    """Whether ``node`` is the sum of two arguments of the forward."""
    added = summands(node)
    if added is None:
        return False
    given = [copied_from(n) for n in added[:2]]
    return all(any(n.op == "placeholder" for n in found) for found in given)


def returns_sum_of_inputs(graph: fx.Graph) -> bool:
    """Whether a forward returns the sum of two arguments, and beside it what follows from the sum.

    A fused addition and norm does so.
    """
    items = [item for item in _output_items(graph) if isinstance(item, fx.Node)]
    return len(items) > 1 and any(
        adds_inputs(total) and all(item is total or total in ancestors(item) for item in items)
        for total in items
    )


def _output_items(graph: fx.Graph) -> tuple[object, ...]:
    output = next(node for node in graph.nodes if node.op == "output")
    (value,) = output.args
    return tuple(value) if isinstance(value, tuple | list) else ()


def copied_from(node: fx.Node) -> list[fx.Node]:
    """Return ``node``, and the nodes whose values it only copies or casts, the nearest first."""
    found = [node]
    entry = operation_of(node)
    while (entry.copies or (entry.view and entry.keeps_layout)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        entry = operation_of(node)
        found.append(node)
    return found


def _roots(stream: fx.Node) -> Iterator[fx.Node]:
    """Yield the arguments, and the sums of arguments, to which ``stream`` adds branches."""
    pending, seen = [stream], set[fx.Node]()
    while pending:
        node = copied_from(pending.pop())[-1]
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" or adds_inputs(node):
            yield node
        elif (added := summands(node)) is not None:
            pending += added[:2]


def _calls_modules_between(stream: fx.Node, branch: fx.Node) -> bool:
    between = {branch, *ancestors(branch)} - ancestors(stream)
    return any(node.op == "call_module" for node in between)
