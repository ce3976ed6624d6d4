"""Check that the branch which a block hands on is added to its stream by what follows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence

from torch import fx, nn

from torchdrop.finding.residual_sums import ResidualSums
from torchdrop.tracing.block_graph import BlockGraph, trace_block
from torchdrop.tracing.call_arguments import A_TENSOR
from torchdrop.tracing.handed_on_sums import copied_from
from torchdrop.tracing.nodes import is_shape_node, summands
from torchdrop.tracing.own_forward import signature_of_forward
from torchdrop.tracing.traced_functions import passed_through
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["leave_out_branches_that_nobody_adds"]

# A function that reads a module; the arguments with these names are tensors in its graph.
_ReadWith = Callable[[nn.Module, Sequence[str]], BlockGraph]


def leave_out_branches_that_nobody_adds(
    finders: Collection[ResidualSums], read: Callable[[nn.Module], BlockGraph]
) -> None:
    """Remove branches that blocks hand on, unless each call of the block adds them afterwards.

    Args:
        finders: The residual additions of all forwards of a model.
        read: Returns the graph of another module.
    """
    known = {finder.owner: finder.block for finder in finders}

    def read_with(module: nn.Module, names: Sequence[str]) -> BlockGraph:
        block = known.get(module) or read(module)
        missing = set(names) - set(block.tensors)
        if not missing:
            return block
        given = {**block.arguments, **dict.fromkeys(missing, A_TENSOR)}
        inlined = [module.get_submodule(path) for path in block.inlined]
        return trace_block(module, arguments=given, inlined=inlined)

    for finder in finders:
        entry = finder.handed_on
        if entry is None:
            continue
        calls = [
            (parent.owner, node)
            for parent in finders
            for node in parent.nodes
            if node.op == "call_module"
            and parent.owner.get_submodule(str(node.target)) is finder.owner
        ]
        if not calls or not all(_is_added(finder, owner, node, read_with) for owner, node in calls):
            finder.entries.remove(entry)


def _is_added(finder: ResidualSums, owner: nn.Module, call: fx.Node, read_with: _ReadWith) -> bool:
    """Whether the branch that a call hands on is added to the stream, and not used otherwise.

    Args:
        finder: The residual additions of the block that is called.
        owner: The module whose forward calls it.
        call: The call.
        read_with: Reads the modules that get the branch.
    """
    handed = finder.block.handed
    items = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    if handed is None or len(items) != len(call.users) or handed.branch not in items:
        return False
    branch, stream = items[handed.branch], items.get(handed.stream)
    if stream is None:
        return False
    # the first block may return its argument as the stream; an example shows that
    streams = [stream, stream.meta.get("expected")]
    users = _readers(branch)
    return bool(users) and all(
        _adds_both(owner.get_submodule(str(user.target)), user, branch, streams, read_with)
        if user.op == "call_module"
        else any(_is_sum_of(user, branch, other) for other in streams)
        for user in users
    )


def _adds_both(
    child: nn.Module,
    call: fx.Node,
    branch: fx.Node,
    streams: Sequence[object],
    read_with: _ReadWith,
) -> bool:
    """Whether a child adds the branch and the stream that it gets, and uses only their sum."""
    try:
        bound = signature_of_forward(child).bind(*call.args, **call.kwargs)
        names = [name for name, value in bound.arguments.items() if value is branch]
        others = [
            name
            for name, value in bound.arguments.items()
            if value is not None and any(value is stream for stream in streams)
        ]
        if len(names) != 1 or len(others) != 1:
            return False
        block = read_with(child, (*names, *others))
    except (TypeError, UntraceableError):
        return False
    given = dict(zip(block.tensors, block.graph.find_nodes(op="placeholder"), strict=True))
    mine, theirs = given.get(names[0]), given.get(others[0])
    if mine is None or theirs is None:
        return False
    users = _readers(mine)
    return bool(users) and all(_is_sum_of(user, mine, theirs) for user in users)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the users of ``node`` that compute with it; a copy of it counts as itself."""
    found: list[fx.Node] = []
    for user in node.users:
        if is_shape_node(user) or user.target is passed_through:
            continue
        copy = summands(user) is None and node in copied_from(user)
        found += _readers(user) if copy else [user]
    return found


def _is_sum_of(node: fx.Node, one: fx.Node, other: object) -> bool:
    """Whether ``node`` adds these two values, or copies of them."""
    added = summands(node)
    if added is None or not isinstance(other, fx.Node):
        return False
    left, right = (copied_from(operand) for operand in added[:2])
    return (one in left and other in right) or (one in right and other in left)
