"""One residual addition of a graph, split into shortcut and branch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from torchdrop.finding.row_layout import RowLayouts
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.traced_functions import passed_through

__all__ = ["ResidualSum", "Split", "called_modules", "methods_with_sums", "outside_inputs"]


@dataclass(eq=False)
class Split:
    """How one addition of a graph is split into shortcut and branch.

    Attributes:
        order: Its index among the residual additions of its forward, counted from 0.
        add: The addition.
        skip: The operand on the shortcut, which is always computed.
        branch: The operand that can be dropped.
        inside: The nodes that only the branch needs.
        skip_gain: What the addition multiplies the shortcut by.
        branch_gain: What it multiplies the branch by.
        writes_skip: Whether the sum is written into the memory of the shortcut.
        branch_first: Whether the branch is the first of the two operands.
        pads: The dimension on which the shortcut is padded with zeros to the size of the branch;
            None if it is not padded.
        dim: The dimension of the shortcut that carries the batch; None if it is not known.
        batch_first_votes: The batch dimension according to each child with ``batch_first``, by the
            path of the child; empty where the dimension is known from example inputs.
        row_layouts: How each tensor that the branch takes from outside carries the batch, by the
            name of its node; None if that was not measured.
        partly: Whether the forward uses a value of the branch outside the branch, too. The nodes of
            that value are not in ``inside``, and are computed for every row.
        assumed: Whether how a tensor carries the batch was not measured, so that in each call its
            shape decides.
    """

    order: int
    add: fx.Node
    skip: fx.Node
    branch: fx.Node
    inside: frozenset[fx.Node]
    skip_gain: float
    branch_gain: float
    writes_skip: bool
    branch_first: bool = False
    pads: int | None = None
    dim: int | None = None
    batch_first_votes: dict[str, int] = field(default_factory=dict)
    row_layouts: RowLayouts | None = None
    partly: bool = False
    assumed: bool = False


@dataclass(eq=False)
class ResidualSum:
    """One residual addition and what can be done with its branch.

    Attributes:
        split: The addition, split into shortcut and branch.
        action: ``"skip"`` if only the kept rows of the branch have to be computed, else ``"mask"``.
        reason: Why the action is ``"mask"``, or which part is computed for all rows nevertheless.
        shortcut: ``"identity"`` or ``"projection"``.
        why_not: Why the addition is not taken by default; empty if it may be taken.
        leak: The call of a child whose output is used inside and outside the branch; None without
            such a call.
    """

    split: Split
    action: str
    reason: str
    shortcut: str
    why_not: str
    leak: fx.Node | None = None


def outside_inputs(split: Split, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return the inputs of a branch, in order: values computed outside that it reads.

    A value counts also if the branch reads only its shape. Parameters do not count, because the
    branch reads them from the module.
    """
    found: dict[fx.Node, None] = {}
    pending = [node for node in nodes if node in split.inside]
    while pending:
        node = pending.pop(0)
        sources = node.all_input_nodes
        if node.target is passed_through:  # only hooks get what is not used to compute its value
            sources = [source for source in node.args[:1] if isinstance(source, fx.Node)]
        for source in sources:
            if source in split.inside or source.op == "get_attr":
                continue
            if is_shape_node(source):
                pending.append(source)
            else:
                found[source] = None
    return list(found)


def methods_with_sums(splits: Iterable[Split]) -> list[str]:
    """Return the names of the methods, other than forward, in which the block adds branches."""
    names = (name for split in splits for name in split.add.meta.get("methods", ()))
    return list(dict.fromkeys(names))


def called_modules(split: Split) -> list[str]:
    """Return the paths, from the block, of the modules that the branch calls."""
    calls = [str(n.target) for n in split.inside if n.op == "call_module"]
    return sorted(dict.fromkeys(calls))
