"""Read a sum over tensors that were stacked as a chain of additions.

``torch.stack([x, f(x)]).sum(0)`` equals ``x + f(x)``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from torchdrop.tracing.operations import operation_of, writes_first_argument

__all__ = ["unstack_sums"]


def unstack_sums(graph: fx.Graph) -> None:
    """Replace each sum over a stack of tensors by additions of these tensors."""
    for node in list(graph.nodes):
        tensors = _summed_tensors(node)
        if tensors is None:
            continue
        stack = node.all_input_nodes[0]
        with graph.inserting_before(node):
            total = tensors[0]
            for tensor in tensors[1:]:
                total = graph.call_function(operator.add, (total, tensor))
                total.meta.update(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        graph.erase_node(stack)


def _summed_tensors(node: fx.Node) -> list[fx.Node] | None:
    """Return the tensors that ``node`` adds, if it is the sum over a stack of them; else None."""
    if not operation_of(node).adds_entries or not node.args:
        return None
    stack = node.args[0]
    if not isinstance(stack, fx.Node) or not operation_of(stack).stacks:
        return None
    summed = _dim(node, None)
    # the stack has no other use, and the sum is over the dimension that it added
    if list(stack.users) != [node] or summed is None or summed != _dim(stack, 0):
        return None
    if any(map(writes_first_argument, _between(stack, node))):
        return None  # one of the tensors may have changed
    given: Any = stack.args[0] if stack.args else stack.kwargs.get("tensors")
    tensors = list(given) if isinstance(given, list | tuple) else []
    several = len(tensors) > 1 and all(isinstance(t, fx.Node) for t in tensors)
    return tensors if several else None


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes after ``first`` and before ``last``."""
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _dim(node: fx.Node, default: int | None) -> int | None:
    """Return the one dimension that a sum or a stack names; None if it has other arguments."""
    given: dict[Any, Any] = {**dict(enumerate(node.args[1:])), **node.kwargs}
    given.pop("tensors", None)
    dim = given.pop("dim", given.pop(0, default))
    if isinstance(dim, list | tuple) and len(dim) == 1:
        (dim,) = dim
    return dim if isinstance(dim, int) and not given else None
