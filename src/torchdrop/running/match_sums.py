"""Find the branches of a site in a new graph of its block."""

from __future__ import annotations

from collections.abc import Sequence

from torchdrop.finding.split import ResidualSum, called_modules
from torchdrop.running.branch_state import BranchState
from torchdrop.tracing.block_graph import BlockGraph

__all__ = ["is_used", "match_sums"]


def match_sums(
    entries: Sequence[ResidualSum], branches: Sequence[BranchState], orders: Sequence[int]
) -> list[ResidualSum | None]:
    """Return the residual sum of each branch; None for a branch that the new graph lacks.

    A branch is recognised by the modules that it calls and the parameters that it reads: by all of
    them, or else by the largest share. Where several branches have the same, their order decides.

    Args:
        entries: The residual sums of the new graph.
        branches: The branches that were attached.
        orders: The position of each branch among the residual sums when it was attached.
    """
    keys = [_key_of_branch(branch) for branch in branches]
    offered = [_key_of_sum(entry) for entry in entries]
    if all(o < len(entries) and offered[o] == key for o, key in zip(orders, keys, strict=True)):
        return [entries[order] for order in orders]
    found: list[ResidualSum | None] = [None] * len(keys)
    for key in set(keys):
        mine = [i for i, k in enumerate(keys) if k == key]
        theirs = [i for i, k in enumerate(offered) if k == key]
        if len(mine) == len(theirs):
            for i, j in zip(mine, theirs, strict=True):
                found[i] = entries[j]
    taken = {entry for entry in found if entry is not None}
    for i, key in enumerate(keys):
        if found[i] is not None or keys.count(key) > 1:
            continue
        best = [
            (_likeness(key, other), entry)
            for other, entry in zip(offered, entries, strict=True)
            if entry not in taken and key & other
        ]
        best.sort(key=lambda pair: -pair[0])
        if best and (len(best) == 1 or best[0][0] > best[1][0]):
            found[i] = best[0][1]
            taken.add(best[0][1])
    return found


def is_used(block: BlockGraph, branch: BranchState) -> bool:
    """Whether a forward calls a module of ``branch``, or reads one of its parameters."""
    names = _key_of_branch(branch)
    return any(
        node.op in ("call_module", "get_attr") and str(node.target) in names
        for node in block.graph.nodes
    )


def _key_of_branch(branch: BranchState) -> frozenset[str]:
    """Return the paths of the modules and parameters that a branch calls and reads."""
    return frozenset((*branch.facts.inner, *branch.facts.own))


def _key_of_sum(entry: ResidualSum) -> frozenset[str]:
    """Return the paths of the modules and parameters that the branch of a sum calls and reads."""
    sources = (s for node in entry.split.inside for s in (node, *node.all_input_nodes))
    own = (str(source.target) for source in sources if source.op == "get_attr")
    return frozenset((*called_modules(entry.split), *own))


def _likeness(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the share of the names in the union of two sets that are in both."""
    return len(one & other) / len(one | other)
