"""SPLIT: the residual additions of one graph, each into its skip and its branch."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx, nn

from torchdrop.finding.batch_dim import batch_dim_from_layers, values_with_same_layout
from torchdrop.finding.example_calls import ArgumentShapes, Shapes
from torchdrop.finding.existing_drops import is_mask
from torchdrop.finding.linearity import ModuleProperties, depends_on_input
from torchdrop.finding.row_layout import (
    RowLayout,
    RowLayouts,
    differing_dims,
    row_layout,
    same_rows,
)
from torchdrop.tracing.block_graph import BlockGraph
from torchdrop.tracing.nodes import Summands, is_shape_node, summands
from torchdrop.tracing.operations import operation_of
from torchdrop.tracing.traced_functions import passed_through

__all__ = [
    "ResidualSum",
    "ResidualSums",
    "Split",
    "called_modules",
    "outside_inputs",
    "read_residual_sums",
]  # fmt: skip


@dataclass(eq=False)
class Split:
    """How one addition of a graph falls into skip and branch.

    Attributes:
        order: Which of the residual additions of its forward it is, counted from 0.
        add: The addition.
        skip: Its operand that is always there.
        branch: Its operand that can be dropped.
        inside: The nodes that only the branch needs.
        skip_gain: What the addition multiplies the skip by.
        branch_gain: What it multiplies the branch by.
        writes_skip: Whether the sum is written into the memory of the skip.
        branch_first: Whether the branch is the first of the two operands.
        pads: The dimension on which the skip is padded with zeros to the size of the branch.
        dim: The dimension of the skip that carries the batch; None where nothing tells it.
        batch_first_votes: The batch dimension that each child with ``batch_first`` implies, by
            its path, where nothing else told it.
        row_layouts: How each value that the branch takes from outside carries the batch, by the
            name of its node; None where that was not measured.
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



@dataclass(eq=False)
class ResidualSum:
    """One residual addition: what to do with it and why; why it is not taken by default, if so."""

    split: Split
    action: str
    reason: str
    shortcut: str
    why_not: str
    leak: fx.Node | None = None


def read_residual_sums(
    block: BlockGraph, known_layouts: Sequence[RowLayouts] = (), batch_dim: int | None = None
) -> list[ResidualSum]:
    """Every residual addition of one block's forward, in order.

    Args:
        block: The graph of the forward.
        known_layouts: ``Split.row_layouts`` of the same block, measured in another call.
        batch_dim: Which dimension of its residuals is the batch, where that is known.
    """
    return ResidualSums(
        block, ModuleProperties(), known_layouts=known_layouts, batch_dim=batch_dim
    ).entries


class ResidualSums:
    """The residual additions of one graph."""

    def __init__(
        self,
        block: BlockGraph,
        children: ModuleProperties,
        shapes: Callable[[], tuple[Shapes, Shapes] | None] = lambda: None,
        arguments: Callable[[], ArgumentShapes] = dict,
        batch_dim: int | None = None,
        known_layouts: Sequence[RowLayouts] = (),
    ) -> None:
        self.known_layouts = known_layouts
        self.block = block
        self.owner = block.module
        self.nodes: list[fx.Node] = list(block.graph.nodes)
        self.children = children
        self.shapes = shapes
        self.arguments = arguments
        self.batch_dim = batch_dim
        self.contradicted = False
        self.order = {node: i for i, node in enumerate(self.nodes)}
        # Ancestors as bit sets, so that a forward with thousands of nodes stays cheap.
        self.ancestors: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            mine = 1 << i
            for source in node.all_input_nodes:
                mine |= self.ancestors[source]
            self.ancestors[node] = mine
        self.entries: list[ResidualSum] = []
        for node in self.nodes:
            operands = summands(node)
            entry = None if operands is None else self._entry(node, operands)
            if entry is not None:
                self.entries.append(entry)

    def nodes_in(self, bits: int) -> set[fx.Node]:
        """The nodes of a bit set, those apart that read shapes only."""
        found = set()
        while bits:
            low = bits & -bits
            node = self.nodes[low.bit_length() - 1]
            if not is_shape_node(node):
                found.add(node)
            bits ^= low
        return found

    def has_parameters(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether any of ``nodes`` is a parameter, or calls a module that has some."""
        for node in nodes:
            if node.op == "call_module":
                module = self.owner.get_submodule(str(node.target))
                if next(module.parameters(), None) is not None:
                    return True
            elif node.op == "get_attr":
                return True
        return False

    def _entry(self, add: fx.Node, operands: Summands) -> ResidualSum | None:
        left, right, gain, writes_left, pad_dim = operands
        left_bits, right_bits = self.ancestors[left], self.ancestors[right]
        memo: dict[fx.Node, bool] = {}
        common = self.nodes_in(left_bits & right_bits)
        if not any(depends_on_input(n, memo) and not _is_container(n) for n in common):
            return None  # a bias, a positional embedding: nothing that both sides come from
        only_left = self.nodes_in(left_bits & ~right_bits)
        only_right = self.nodes_in(right_bits & ~left_bits)
        kind, why_not = "identity", ""
        if only_left and only_right:
            # A branch that was added to one side before belongs to neither:
            # x + f(x) + g(x) are two branches of x.
            sides = [self._without_earlier(side) for side in (only_left, only_right)]
            linear = [self.children.linear_nodes(side, self.owner) for side in sides]
            if linear[0] == linear[1]:
                return None  # two branches side by side, or RepVGG's parallel convolutions
            branch_is_right = linear[0]
            if not all(map(self._does_nothing, sides[0 if branch_is_right else 1])):
                kind = "projection"
        else:
            branch_is_right = not only_left
            inside = only_right if branch_is_right else only_left
            if self.has_parameters(inside) and self.children.linear_nodes(inside, self.owner):
                why_not = "its branch is linear"
        skip, branch = (left, right) if branch_is_right else (right, left)
        # an argument that only the branch reads comes from outside all the same
        inside = {
            n for n in (only_right if branch_is_right else only_left) if n.op != "placeholder"
        }
        if not self.has_parameters(inside) or not depends_on_input(branch, memo):
            return None
        if all(node.op == "get_attr" for node in inside):
            return None
        split = Split(
            order=len(self.entries),
            add=add,
            skip=skip,
            branch=branch,
            inside=frozenset(inside),
            skip_gain=1.0 if branch_is_right else gain,
            branch_gain=gain if branch_is_right else 1.0,
            writes_skip=branch_is_right and writes_left,
            branch_first=not branch_is_right,
        )
        if pad_dim is not None:
            split.pads, kind = pad_dim, "projection"
        split.dim, split.batch_first_votes = self._dimension(split.skip)
        if split.skip_gain < 0.0:
            why_not = "its skip is subtracted"
        split, action, reason = self._closed(split)
        if self._drops_more:
            why_not = "its own drop path covers more than the branch"
        return ResidualSum(split, action, reason, kind, why_not, self._leak)

    def _dimension(self, skip: fx.Node) -> tuple[int | None, dict[str, int]]:
        """The dimension of ``skip`` that carries the batch; and what layers say, if they must."""
        if self.batch_dim is not None:
            return self.batch_dim, {}
        dim, votes = batch_dim_from_layers(self.nodes, self.owner, skip)
        if not self.arguments():
            return dim, votes
        varying = self._varying(skip)
        if len(varying) != 1:
            return dim, votes
        self.contradicted |= dim is not None and varying != [dim]
        return varying[0], {}

    def _varying(self, value: fx.Node) -> list[int]:
        """The dimensions of ``value`` that grow with the batch, as far as that was measured."""
        # An argument tells without running anything, and so does what is laid out like one.
        arguments = self.arguments()
        placeholders = self.block.graph.find_nodes(op="placeholder")
        paths = dict(zip(placeholders, self.block.tensors, strict=True))
        alike = values_with_same_layout(value, self.owner) & paths.keys()
        known = [arguments[paths[node]] for node in alike if paths[node] in arguments]
        rank = max((len(one) for one, _ in known), default=0)
        found = {tuple(differing_dims(one, two)) for one, two in known if len(one) == rank}
        if len(found) == 1 and len(next(iter(found))) == 1:
            return list(found.pop())
        shapes = self.shapes()
        if shapes is None or any(value not in s.shapes for s in shapes):
            return []
        return differing_dims(shapes[0].shapes[value], shapes[1].shapes[value])

    def _without_earlier(self, side: set[fx.Node]) -> set[fx.Node]:
        left = set(side)
        for entry in self.entries:
            if entry.split.add in side and not entry.why_not:
                left -= entry.split.inside | {entry.split.add}
        return left

    def _does_nothing(self, node: fx.Node) -> bool:
        """Whether ``node`` only hands on its input: sum() starts from the number 0, for one."""
        if node.op == "call_module":
            return isinstance(self.owner.get_submodule(str(node.target)), nn.Identity)
        if node.target is operator.add:
            return any(type(a) in (int, float) and a == 0 for a in node.args)
        return operation_of(node).copies

    def _closed(self, split: Split) -> tuple[Split, str, str]:
        """The part of the branch that nothing outside uses, the action for it, and the reason."""
        inside = set(split.inside)
        kept_out: set[fx.Node] = set()
        for node in sorted(inside, key=self.order.__getitem__, reverse=True):
            allowed = inside | {split.add} if node is split.branch else inside
            if node in kept_out or self._readers(node) - allowed:
                outside = self.nodes_in(self.ancestors[node]) & inside
                kept_out |= outside
                inside -= outside
        for node in sorted(inside, key=self.order.__getitem__):
            if node.target is operator.getitem and node.args[0] in kept_out:
                kept_out.add(node)  # of a tuple, the item is what can be cut
                inside.remove(node)
        reason = ""
        self._leak = None
        self._drops_more = any(
            node.op == "call_module" and is_mask(self.owner.get_submodule(str(node.target)))
            for node in kept_out
        )
        if kept_out:
            first = max(
                (n for n in kept_out if n.target is not operator.getitem),
                key=self.order.__getitem__,
            )
            self._leak = first if first.op == "call_module" else None
            reason = f"{first.name} is used outside the branch, too"
            if split.branch in kept_out or not self.has_parameters(inside):
                return split, "mask", reason
            split = replace(split, inside=frozenset(inside))
            reason += ": computed for every row"
        refusal = self._refusal(split)
        if refusal:
            return split, "mask", refusal
        row_layouts, refusal = self._row_layouts(split)
        if refusal:
            return split, "mask", refusal
        return replace(split, row_layouts=row_layouts), "skip", reason

    @cached_property
    def elements(self) -> dict[ResidualSum, str | None]:
        """The element of a loop over a ModuleList that each addition belongs to, if any."""
        found = {entry: _element(called_modules(entry.split), self.owner) for entry in self.entries}
        containers = Counter(e.rpartition(".")[0] for e in set(found.values()) if e is not None)
        return {
            entry: e if e is not None and containers[e.rpartition(".")[0]] > 1 else None
            for entry, e in found.items()
        }

    @staticmethod
    def _readers(node: fx.Node) -> set[fx.Node]:
        """The nodes that use ``node``, directly or through its shape."""
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

    def _refusal(self, split: Split) -> str:
        """Why the branch cannot be deferred and cut by rows, or nothing."""
        for node in split.inside:
            target = self.children.written(node, self.owner)
            if target is not None and target not in split.inside:
                return f"{node.name} writes into its input, which the skip uses"
        inputs = {
            self.children.storage(i, self.owner) for i in [*self.outside_inputs(split), split.skip]
        }
        start = min(self.order[n] for n in split.inside)
        for node in self.nodes[start : self.order[split.add]]:
            if node in split.inside:
                continue
            target = self.children.written(node, self.owner)
            if target is not None and target in inputs:
                return f"{node.name} writes into an input of the branch while it is computed"
        return ""

    def _row_layouts(self, split: Split) -> tuple[RowLayouts | None, str]:
        """On which dimension each input of the branch is cut by rows; or why that is not known."""
        inputs = self.outside_inputs(split)
        dim = split.dim or 0
        if inputs == [split.skip]:
            return None, ""
        sources = {
            self.nodes[i].name
            for node in inputs
            for i in range(len(self.nodes))
            if self.ancestors[node] >> i & 1 and self.nodes[i].op == "placeholder"
        }
        shapes = self.shapes()
        if shapes is None:
            memo: dict[fx.Node, bool] = {}
            for row_layouts in self.known_layouts:
                if set(row_layouts) == {node.name for node in inputs}:
                    return row_layouts, ""
            if len(sources) <= 1:
                vary = {node.name: depends_on_input(node, memo) for node in inputs}
                return {n: RowLayout(dim, 1) if v else None for n, v in vary.items()}, ""
            return None, (
                f"it takes several tensors ({', '.join(sorted(sources))}), and which of them "
                "carry the batch is not known: example_inputs may tell, where the model takes "
                "them with a batch of any size"
            )
        few, many = (s.shapes[split.skip] for s in shapes)
        if differing_dims(few, many) != [dim]:
            return None, f"dimension {dim} of its skip is not the batch"
        batches = few[dim], many[dim]
        measured: RowLayouts = {}
        for node in inputs:
            one, two = (s.shapes.get(node, ()) for s in shapes)
            cut = row_layout(one, two, batches)
            if cut is None:
                return None, f"how its input {node.name} carries the batch is not clear"
            place, entries = cut
            one_value, two_value = (s.values.get(node) for s in shapes)
            if entries > 1 and not same_rows(one_value, two_value, place):
                return None, f"its input {node.name} holds several rows for each of the batch"
            measured[node.name] = cut if entries else None
        return measured, ""

    def outside_inputs(self, split: Split) -> list[fx.Node]:
        """See :func:`outside_inputs`."""
        return outside_inputs(split, self.nodes)


def _is_container(node: fx.Node) -> bool:
    """Whether ``node`` is an argument that only hands out its items: a list of feature maps."""
    return (
        node.op == "placeholder"
        and len(node.users) > 0
        and all(
            user.target in (operator.getitem, operator.setitem)
            and isinstance(user.args[1], int | str)
            for user in node.users
        )
    )


def outside_inputs(split: Split, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The values from outside that a branch reads, through their shapes as well, in order.

    Parameters are not among them: a branch reads those itself.
    """
    found: dict[fx.Node, None] = {}
    pending = [node for node in nodes if node in split.inside]
    while pending:
        for source in pending.pop(0).all_input_nodes:
            if source in split.inside or source.op == "get_attr":
                continue
            if is_shape_node(source):
                pending.append(source)
            else:
                found[source] = None
    return list(found)


def _element(paths: Iterable[str], owner: nn.Module) -> str | None:
    """The element of a ModuleList that a branch belongs to: a loop's "layers.3"."""
    elements: Counter[str] = Counter()
    for path in paths:
        atoms = path.split(".")
        for i in range(1, len(atoms)):
            container = owner.get_submodule(".".join(atoms[:i]))
            if isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                module = owner.get_submodule(path)
                weight = sum(p.numel() for p in module.parameters())
                elements[".".join(atoms[: i + 1])] += weight + 1
                break
    return elements.most_common(1)[0][0] if elements else None


def called_modules(split: Split) -> list[str]:
    """The paths of the modules that the branch calls, from the block."""
    calls = [str(n.target) for n in split.inside if n.op == "call_module"]
    return sorted(dict.fromkeys(calls))
