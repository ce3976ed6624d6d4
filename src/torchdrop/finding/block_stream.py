"""Follow the stream of a block: from its input, through its residual sums, to its output.

If every sum is on the stream, and nothing else changes it, the block without its branches returns
its input. All its branches are then one branch, ``block(x) - x``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from torchdrop.finding.residual import Branch, Residual
from torchdrop.tracing.block_graph import BlockGraph
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.operations import callee, layers_with, operation_of
from torchdrop.tracing.traced_functions import passed_through

__all__ = ["BlockStream", "follow_stream"]


@dataclass
class BlockStream:
    """The stream of a block.

    Attributes:
        why_not: Why the branches of the block are not one branch; empty if they are.
        x: The argument in which the stream begins, as ``flatten_arguments`` names it.
        sum_item: The item of the output in which it ends: "" if the output is a tensor, "0" for
            the first item of a tuple.
        returns: The output, with None in place of the stream.
        changes: What the block applies to the stream besides its sums, such as a norm after them:
            the paths of children and the names of functions, from the input to the output.
    """

    why_not: str = ""
    x: str = ""
    sum_item: str = ""
    returns: Any = None
    changes: list[str] = field(default_factory=list)


class _NotOneStreamError(Exception):
    """The stream cannot be followed; the message says why."""


def follow_stream(residual: Residual) -> BlockStream:
    """Return the stream of the block ``residual``, whose own forward was read."""
    follower = _Follower(residual)
    try:
        stream = follower.stream_of(residual.owner)
        missed = [b.name for b in residual.branches if b not in follower.met]
        if missed:
            raise _NotOneStreamError(f"{missed[0]} is not added to the stream of the block")
    except _NotOneStreamError as error:
        return BlockStream(why_not=str(error))
    return replace(stream, changes=follower.changes[::-1])


class _Follower:
    """Follows the stream of one block from its output to its input.

    Attributes:
        met: The branches that are added on the way.
        changes: What else is applied to the stream, from the output to the input.
    """

    def __init__(self, residual: Residual) -> None:
        self.met: list[Branch] = []
        self.changes: list[str] = []
        self._path = residual.owner
        self._graphs: dict[str, BlockGraph] = {}
        self._sums: dict[fx.Node, Branch] = {}
        for branch in residual.branches:
            source = branch.source
            if source.graph is not None and source.split is not None:
                self._graphs[source.owner] = source.graph
                self._sums[source.split.add] = branch

    def stream_of(self, owner: str) -> BlockStream:
        """Return the stream in the forward of the module ``owner``, as far as it is followed."""
        block = self._graphs.get(owner)
        if block is None:
            raise _NotOneStreamError("its branches are added in the forwards of several modules")
        nodes = list(block.graph.nodes)
        returned = nodes[-1].args[0]
        sum_item, rest = "", []
        node = returned
        if isinstance(returned, tuple | list) and returned:
            sum_item, node, rest = "0", returned[0], list(returned[1:])
        if not isinstance(node, fx.Node):
            raise _NotOneStreamError("it returns neither a tensor nor a tuple that begins with one")
        if _has_node(rest):
            raise _NotOneStreamError("it returns several tensors")
        while node.op != "placeholder":
            node = self._before(owner, block.module, node)
        placeholders = [n for n in nodes if n.op == "placeholder"]
        returns = (
            (list if isinstance(returned, list) else tuple)([None, *rest]) if sum_item else None
        )
        return BlockStream("", block.tensors[placeholders.index(node)], sum_item, returns)

    def _before(self, owner: str, module: nn.Module, node: fx.Node) -> fx.Node:
        """Return the value of the stream from which ``node``, the value after it, is computed."""
        if node in self._sums:
            branch = self._sums[node]
            split = branch.source.split
            assert split is not None
            if branch.shortcut != "identity":
                raise _NotOneStreamError("its shortcut is a projection")
            if split.skip_gain != 1.0 or split.pads is not None:
                raise _NotOneStreamError(f"the shortcut of {branch.name} is scaled or padded")
            self.met.append(branch)
            return split.skip
        if isinstance(node.target, type):
            raise _NotOneStreamError(f"it returns a {node.target.__name__}")
        given = self._before_child(owner, node)
        if given is not None:
            return given
        if node.target is passed_through:  # its other inputs are for hooks only
            return _first_input(node)
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_shape_node(n)]
        if len(inputs) != 1:
            raise _NotOneStreamError(
                f"its branches are added to the result of {callee(node)}, which has several inputs"
            )
        if not _keeps_values(module, node):
            self._note_change(owner, node)
        return inputs[0]

    def _before_child(self, owner: str, node: fx.Node) -> fx.Node | None:
        """Return the input of the child that returned ``node``; None if it adds no branches."""
        item = node.op == "call_function" and callee(node) == "getitem" and node.args[1] == 0
        call = node.args[0] if item else node
        if not isinstance(call, fx.Node) or call.op != "call_module":
            return None
        path = f"{owner}.{call.target}" if owner else str(call.target)
        if path not in self._graphs:
            return None
        inner = self.stream_of(path)
        if inner.x != self._graphs[path].tensors[0] or inner.sum_item != ("0" if item else ""):
            raise _NotOneStreamError(f"the stream is not the first argument and result of {path}")
        return _first_input(call)

    def _note_change(self, owner: str, node: fx.Node) -> None:
        """Note that ``node`` changes the stream."""
        within = owner[len(self._path) :].lstrip(".")
        called = within and node.op == "call_module"
        name = f"{within}.{callee(node)}" if called else callee(node)
        if name not in self.changes:
            self.changes.append(name)


def _first_input(node: fx.Node) -> fx.Node:
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        raise _NotOneStreamError(f"{callee(node)} does not get a tensor as its first argument")
    return first


def _has_node(value: Any) -> bool:
    """Whether a value of a graph contains a tensor that the graph computes."""
    found: list[fx.Node] = []
    fx.map_arg(value, lambda node: found.append(node))
    return bool(found)


def _keeps_values(module: nn.Module, node: fx.Node) -> bool:
    """Whether ``node`` returns the entries of its input in their order."""
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return isinstance(child, layers_with("copies", "keeps_order"))
    entry = operation_of(node)
    return entry.copies or entry.keeps_order
