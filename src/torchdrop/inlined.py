"""INLINED: a drop path that a forward has written into itself, instead of a layer.

``x + drop_path(f(x), p, training)``, or what such a function does: the branch is multiplied by
random numbers, one for each row or one for the batch. Its rate would add to ours.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from torchdrop.layers.drop_path import drop_path
from torchdrop.tracing.nodes import callee, is_shape_node
from torchdrop.tracing.padded_sums import ancestors

__all__ = ["inlined_drop"]

_DRAWN = {"rand", "bernoulli", "bernoulli_", "uniform_", "empty", "new_empty", "ones", "new_ones"}
_RANDOM = {"rand", "bernoulli", "bernoulli_", "uniform_"}
_PRODUCTS = {"mul", "imul", "mul_", "truediv", "div", "div_", "multiply", "where"}


def inlined_drop(graph: fx.Graph, branch: fx.Node, skip: fx.Node) -> fx.Node | None:
    """What drops rows on the way from ``skip`` to ``branch``, if anything does.

    It is a call of torchdrop's own function, or the random numbers that others multiply by.

    Numbers of any other shape (noise, dropout) are something else.
    """
    inside = (ancestors(branch) | {branch}) - ancestors(skip) - {skip}
    node: fx.Node
    for node in graph.nodes:
        if node not in inside:
            continue
        if node.target is drop_path and _rate(node) != 0.0:
            return node
        if _name(node) not in _PRODUCTS:
            continue
        for factor in node.all_input_nodes:
            drawn = _drawn_by_row(factor, inside)
            if drawn is not None:
                return drawn
    return None


def _rate(node: fx.Node) -> Any:
    return node.kwargs.get("p", node.args[1] if len(node.args) > 1 else None)


def _name(node: fx.Node) -> str:
    return callee(node) if node.op in ("call_function", "call_method") else ""


def _drawn_by_row(factor: fx.Node, inside: set[fx.Node]) -> fx.Node | None:
    """The node that draws what ``factor`` is made of, if that is one number for each row."""
    random = None
    pending, seen = [factor], set()
    while pending:
        node = pending.pop()
        if node in seen or is_shape_node(node) or node.op == "get_attr":
            continue
        seen.add(node)
        if node.op in ("placeholder", "call_module"):
            return None  # an activation is in it
        name = _name(node)
        random = node if random is None and name in _RANDOM else random
        if name in _DRAWN and not name.endswith("_") and name != "bernoulli":
            sizes = node.args[1:] if name.startswith("new_") else node.args
            if not _is_row_shape(_sizes(sizes, node)):
                return None
            continue  # its other inputs give their dtype and device only
        pending.extend(node.all_input_nodes)
    return random


def _sizes(args: Iterable[Any], node: fx.Node) -> Any:
    given = list(args) or [node.kwargs.get("size", ())]
    return given[0] if len(given) == 1 else given


def _is_row_shape(sizes: Any) -> bool:
    """Whether all sizes are 1, but for the first, which may be anything."""
    if isinstance(sizes, fx.Node) and sizes.target is operator.add:
        first, rest = sizes.args
        return _is_row_shape(first) and _are_ones(rest)
    if isinstance(sizes, list | tuple):
        return len(sizes) > 0 and all(_are_ones(size) for size in sizes[1:])
    return _are_ones(sizes)


def _are_ones(sizes: Any) -> bool:
    if isinstance(sizes, list | tuple | torch.Size):
        return all(size == 1 for size in sizes)
    if isinstance(sizes, fx.Node):
        # (1,) * (x.ndim - 1)
        many = sizes.target is operator.mul
        return many and any(isinstance(a, list | tuple) and _are_ones(a) for a in sizes.args)
    return bool(sizes == 1)
