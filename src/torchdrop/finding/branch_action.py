"""Decide whether rows of a branch can be skipped, or the branch has to be masked."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from torch import fx
from torch.nn.parameter import is_lazy

from torchdrop.finding.existing_drops import is_mask
from torchdrop.finding.linearity import depends_on_input
from torchdrop.finding.read_graph import ReadGraph
from torchdrop.finding.row_layout import (
    RowLayout,
    RowLayouts,
    differing_dims,
    entries_are_adjacent,
    layout_if_broadcast,
    row_layout,
)
from torchdrop.finding.split import Split, outside_inputs
from torchdrop.tracing.modes import modes_of
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.operations import callee
from torchdrop.tracing.traced_functions import passed_through

__all__ = ["BranchAction", "Decision"]

_EXAMPLE_MAY_SHOW = (
    "; give example_inputs: if what is used there is None, this part is skipped, too"
)


class Decision(NamedTuple):
    """What is done with a branch, and why.

    The attributes are those of :class:`ResidualSum`, and ``drops_more``: whether a drop path of the
    model covers more than the branch.
    """

    split: Split
    action: str
    reason: str
    leak: fx.Node | None
    drops_more: bool


class BranchAction:
    """Decides what is done with the branches of one graph.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: ReadGraph) -> None:
        self._graph = graph

    def decide(self, split: Split) -> Decision:
        """Decide whether rows of the branch can be skipped; if not, say why."""
        writes = self._writes_inside(split)
        if writes:
            more = replace(split, inside=split.inside | writes)
            _, used_outside = self._inside_and_shared(more)
            # A write into something that is used outside the branch has to happen for every row.
            if not any(self._written(node) in used_outside for node in writes):
                split = more
        inside, used_outside = self._inside_and_shared(split)
        drops_more = any(map(self._is_drop_path, used_outside))
        leak, reason = None, ""
        if used_outside:
            computed = {n for n in used_outside if n.target is not operator.getitem}
            last = max(computed or used_outside, key=self._graph.order.__getitem__)
            leak = last if last.op == "call_module" else None
            reason = f"{self._described(last)} is used outside the branch, too"
            if split.branch in used_outside or not self._graph.has_parameters(inside):
                return Decision(split, "mask", reason, leak, drops_more)
            reason += ": computed for every row"
            part, whole = (self._count_parameters(nodes) for nodes in (used_outside, split.inside))
            if whole:
                reason += f", {part / whole:.0%} of the parameters of the branch"
            if leak is not None and self._returns_items_outside(leak, split.inside):
                reason += _EXAMPLE_MAY_SHOW
            split = replace(split, inside=frozenset(inside), partly=True)
        refusal = self._why_not_deferred(split)
        row_layouts = None
        if not refusal:
            row_layouts, refusal = self._row_layouts(split)
        if refusal:
            return Decision(split, "mask", refusal, leak, drops_more)
        split = replace(split, row_layouts=row_layouts, assumed=self._has_assumed_layout(split))
        return Decision(split, "skip", reason, leak, drops_more)

    def _count_parameters(self, nodes: Iterable[fx.Node]) -> int:
        """Count the parameters that ``nodes`` read, or that the modules in them have."""
        owner = self._graph.owner
        paths = {str(node.target) for node in nodes if node.op == "call_module"}
        modules = {owner.get_submodule(path) for path in paths}
        tensors = {p for module in modules for p in module.parameters()}
        sources = (source for node in nodes for source in (node, *node.all_input_nodes))
        tensors |= {attrgetter(str(s.target))(owner) for s in sources if s.op == "get_attr"}
        return sum(tensor.numel() for tensor in tensors if not is_lazy(tensor))

    def _returns_items_outside(self, call: fx.Node, inside: Collection[fx.Node]) -> bool:
        """Whether all that is used of ``call`` outside the branch is items of a tuple.

        Without an example it is not known whether these are tensors: an attention returns None in
        place of weights that nobody asked for.
        """
        outside = [user for user in self._readers(call) if user not in inside]
        return self._graph.shapes() is None and all(
            user.target is operator.getitem for user in outside
        )

    def _described(self, node: fx.Node) -> str:
        """Return a name for the value of ``node`` in words of the user's code."""
        if node.op == "call_module":
            return f"{type(self._graph.owner).__name__}.{node.target}"
        if node.op in ("placeholder", "get_attr"):
            return str(node.target)
        return f"the result of {callee(node)}"

    def _writes_inside(self, split: Split) -> set[fx.Node]:
        """Return the nodes that write into tensors which the branch makes, and what only they need.

        ``m = torch.zeros(n); m[0] = 1.0``: the result of the assignment is used by no node, so that
        it is not among those from which the branch is computed.
        """
        found: set[fx.Node] = set()
        memo: dict[fx.Node, bool] = {}
        inside_bits = sum(1 << self._graph.order[node] for node in split.inside)
        start = min((self._graph.order[node] for node in split.inside), default=0)
        for node in reversed(self._graph.nodes[start : self._graph.order[split.add]]):
            readers = self._readers(node)
            if node in split.inside or node.op == "get_attr" or readers - found - split.inside:
                continue
            writes = self._written(node) in split.inside
            # what is computed from the shortcut alone stays outside
            follows = self._graph.ancestors[node] & inside_bits or not depends_on_input(node, memo)
            if writes or (readers and readers <= found and follows):
                found.add(node)
        return found

    def _inside_and_shared(self, split: Split) -> tuple[set[fx.Node], set[fx.Node]]:
        """Return the nodes that only the branch uses, and those that are used outside it, too."""
        inside = set(split.inside)
        used_outside: set[fx.Node] = set()
        for node in sorted(inside, key=self._graph.order.__getitem__, reverse=True):
            allowed = inside | {split.add} if node is split.branch else inside
            if node in used_outside or self._readers(node) - allowed:
                needed = self._graph.nodes_in(self._graph.ancestors[node]) & inside
                used_outside |= needed
                inside -= needed
        for node in sorted(inside, key=self._graph.order.__getitem__):
            # rows cannot be selected from a tuple, only from its items
            if node.target is operator.getitem and node.args[0] in used_outside:
                used_outside.add(node)
                inside.remove(node)
        return inside, used_outside

    def _is_drop_path(self, node: fx.Node) -> bool:
        return node.op == "call_module" and is_mask(
            self._graph.owner.get_submodule(str(node.target))
        )

    def _written(self, node: fx.Node) -> fx.Node | None:
        """Return the tensor that ``node`` writes into; None if it writes into none."""
        return self._graph.children.written(node, self._graph.owner)

    @staticmethod
    def _readers(node: fx.Node) -> set[fx.Node]:
        """Return the nodes that use ``node`` or its shape.

        Nodes that only compare it with a known value, or only hand it to the hooks of a child, do
        not count.
        """
        found: set[fx.Node] = set()
        pending = list(node.users)
        while pending:
            user = pending.pop()
            if is_shape_node(user):
                pending.extend(user.users)
            elif "expected" not in user.meta and not (
                user.target is passed_through and user.args[0] is not node
            ):
                found.add(user)
        return found

    def _why_not_deferred(self, split: Split) -> str:
        """Say why the branch cannot be computed later, when it is added; empty if it can."""
        modes = [modes_of(node, self._graph.block.modes) for node in (*split.inside, split.add)]
        if len({found.inference for found in modes if found is not None}) > 1:
            return "a part of it runs in inference mode, and another part does not"
        for node in split.inside:
            target = self._written(node)
            if target is not None and target not in split.inside:
                return f"{callee(node)} writes into its input, which the shortcut uses"
        inputs = {
            self._graph.children.storage(i, self._graph.owner)
            for i in [*outside_inputs(split, self._graph.nodes), split.skip]
        }
        start = min(self._graph.order[n] for n in split.inside)
        for node in self._graph.nodes[start : self._graph.order[split.add]]:
            if node in split.inside:
                continue
            target = self._written(node)
            if target is not None and target in inputs:
                return f"{callee(node)} writes into an input of the branch while it is computed"
        return ""

    def _row_layouts(self, split: Split) -> tuple[RowLayouts | None, str]:
        """Return how each input of the branch carries the batch; or why that is not known.

        ``(None, "")`` if the skip is the only input: nothing has to be known then.
        """
        inputs = outside_inputs(split, self._graph.nodes)
        dim = split.dim or 0
        if inputs == [split.skip]:
            return None, ""
        sources = self._sources(inputs)
        shapes = self._graph.shapes()
        if shapes is None:
            memo: dict[fx.Node, bool] = {}
            for row_layouts in self._graph.known_layouts:
                if set(row_layouts) == {node.name for node in inputs}:
                    return row_layouts, ""
            if len(sources) <= 1:
                vary = {node.name: depends_on_input(node, memo) for node in inputs}
                return {n: RowLayout(dim, 1) if v else None for n, v in vary.items()}, ""
            if self._graph.assume:
                return {
                    node.name: self._assumed_layout(node, split.skip, dim) for node in inputs
                }, ""
            return None, (
                f"it takes several tensors ({', '.join(sorted(sources))}), and which of them "
                "carry the batch is not known; give example_inputs, with which the model can be "
                "called for batches of two sizes"
            )
        few, many = (s.shapes[split.skip] for s in shapes)
        if differing_dims(few, many) != [dim]:
            return None, f"dimension {dim} of its shortcut is not the batch"
        batches = few[dim], many[dim]
        measured: RowLayouts = {}
        for node in inputs:
            one, two = (s.shapes.get(node, ()) for s in shapes)
            layout = row_layout(one, two, batches)
            if layout is None:
                return (
                    None,
                    f"how its input ({self._described(node)}) carries the batch is not clear",
                )
            one_value, two_value = (s.values.get(node) for s in shapes)
            if layout.entries > 1 and not entries_are_adjacent(one_value, two_value, layout.dim):
                return None, (
                    f"its input ({self._described(node)}) holds several rows for each sample, "
                    f"and their order is not known"
                )
            measured[node.name] = layout if layout.entries else layout_if_broadcast(one, dim)
        return measured, ""

    def _sources(self, inputs: Iterable[fx.Node]) -> set[str]:
        """Return the names of the arguments that ``inputs`` are computed from."""
        return {
            self._graph.nodes[i].name
            for node in inputs
            for i in range(len(self._graph.nodes))
            if self._graph.ancestors[node] >> i & 1 and self._graph.nodes[i].op == "placeholder"
        }

    def _layouts_of_argument(self, node: fx.Node) -> RowLayouts | None:
        """Return the known layouts with the argument ``node``; None if there are none."""
        known = (layouts for layouts in self._graph.known_layouts if node.name in layouts)
        return next(known, None) if node.op == "placeholder" else None

    def _assumed_layout(self, node: fx.Node, skip: fx.Node, dim: int) -> RowLayout | None:
        """Return how an input of a branch is assumed to carry the batch."""
        if node is skip:
            return RowLayout(dim, 1)
        measured = self._layouts_of_argument(node)
        return RowLayout(dim, 0) if measured is None else measured[node.name]

    def _has_assumed_layout(self, split: Split) -> bool:
        """Whether the layout of an input of the branch is assumed, because it was not measured."""
        inputs = outside_inputs(split, self._graph.nodes)
        if not self._graph.assume or inputs == [split.skip] or len(self._sources(inputs)) <= 1:
            return False
        if any(
            set(layouts) == {node.name for node in inputs} for layouts in self._graph.known_layouts
        ):
            return False
        return any(n is not split.skip and self._layouts_of_argument(n) is None for n in inputs)
