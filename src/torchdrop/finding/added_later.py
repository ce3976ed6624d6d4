"""Check that the branch which a block hands on is added to its stream by what follows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection

from torch import fx, nn

from torchdrop.finding.residual_sums import ResidualSums
from torchdrop.tracing.block_graph import BlockGraph
from torchdrop.tracing.handed_on_sums import adds_inputs
from torchdrop.tracing.nodes import summands
from torchdrop.tracing.traced_functions import passed_through
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["leave_out_branches_that_nobody_adds"]


def leave_out_branches_that_nobody_adds(
    finders: Collection[ResidualSums], read: Callable[[nn.Module], BlockGraph]
) -> None:
    """Do not take branches that blocks hand on, unless each call of the block adds them afterwards.

    Args:
        finders: The residual additions of all forwards of a model.
        read: Returns the graph of another module.
    """
    known = {finder.owner: finder.block for finder in finders}

    def adds(module: nn.Module) -> bool:
        """Whether ``module`` adds two of its arguments."""
        try:
            block = known.get(module) or read(module)
        except UntraceableError:
            return False
        return block.handed is not None or any(map(adds_inputs, block.graph.nodes))

    for finder in finders:
        entry = finder.handed_on
        if entry is None or entry.why_not:
            continue
        calls = [
            (parent.owner, node)
            for parent in finders
            for node in parent.nodes
            if node.op == "call_module"
            and parent.owner.get_submodule(str(node.target)) is finder.owner
        ]
        if not calls or not all(_is_added(finder, owner, node, adds) for owner, node in calls):
            entry.why_not = "nothing shows that the next block adds what it returns"


def _is_added(
    finder: ResidualSums, owner: nn.Module, call: fx.Node, adds: Callable[[nn.Module], bool]
) -> bool:
    """Whether the branch that a call hands on is added to the stream, and not used otherwise.

    Args:
        finder: The residual additions of the block that is called.
        owner: The module whose forward calls it.
        call: The call.
        adds: Whether a module adds two of its arguments.
    """
    handed = finder.block.handed
    items = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    if handed is None or len(items) != len(call.users) or handed.branch not in items:
        return False
    branch, stream = items[handed.branch], items.get(handed.stream)
    if stream is None:
        return False
    # the first block may return its argument as the stream; an example shows that
    streams = {stream, stream.meta.get("expected")}
    users = [user for user in branch.users if user.target is not passed_through]
    for user in users:
        if streams.isdisjoint(user.all_input_nodes):
            return False
        if user.op == "call_module":
            if not adds(owner.get_submodule(str(user.target))):
                return False
        elif summands(user) is None:
            return False
    return bool(users)
