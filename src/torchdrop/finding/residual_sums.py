"""Find the residual additions of one graph, and split each into shortcut and branch."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from torch import fx, nn

from torchdrop.finding.batch_dim import batch_dim_from_layers, values_with_same_layout
from torchdrop.finding.branch_action import BranchAction
from torchdrop.finding.example_calls import ArgumentShapes, Shapes
from torchdrop.finding.linearity import ModuleProperties, depends_on_input
from torchdrop.finding.read_graph import ReadGraph
from torchdrop.finding.row_layout import (
    RowLayouts,
    differing_dims,
)
from torchdrop.finding.split import ResidualSum, Split, called_modules
from torchdrop.tracing.block_graph import BlockGraph
from torchdrop.tracing.nodes import Summands, is_shape_node, summands
from torchdrop.tracing.operations import layers_with, operation_of
from torchdrop.tracing.traced_functions import no_shortcut, passed_through

__all__ = [
    "ResidualSums",
    "read_residual_sums",
]  # fmt: skip


class _Sides(NamedTuple):
    """Which operand of an addition is the branch.

    Attributes:
        branch_is_right: Whether the right operand is the branch.
        inside: The nodes that only the branch needs.
        shortcut: ``"identity"`` or ``"projection"``.
        why_not: Why the addition is not taken by default; empty if it may be taken.
    """

    branch_is_right: bool
    inside: set[fx.Node]
    shortcut: str
    why_not: str


# The reason for leaving out a running total of the outputs of blocks.
_TOTAL = "it totals the outputs of successive blocks"


def read_residual_sums(
    block: BlockGraph,
    known_layouts: Sequence[RowLayouts] = (),
    batch_dim: int | None = None,
    *,
    assume: bool = False,
) -> list[ResidualSum]:
    """Return every residual addition of one block's forward, in order.

    Args:
        block: The graph of the forward.
        known_layouts: ``Split.row_layouts`` of the same block, measured in another call.
        batch_dim: Which dimension of its residual tensors is the batch; None if it is not known.
        assume: Whether, where the layout of an input was not measured, the shape of the input may
            decide in each call.
    """
    return ResidualSums(
        block,
        ModuleProperties(),
        known_layouts=known_layouts,
        batch_dim=batch_dim,
        assume=assume,
    ).entries


class ResidualSums(ReadGraph):
    """The residual additions of one graph.

    Args:
        block: The graph.
        children: Tells the properties of the modules that the graph calls.
        shapes: Returns the shapes of all nodes for two batch sizes, or None if there is no example.
        arguments: Returns the shapes of the arguments of the forward for two batch sizes.
        batch_dim: Which dimension of the residual tensors is the batch; None: to be found out.
        known_layouts: ``Split.row_layouts`` of the same block, measured in another call.
        assume: As for :func:`read_residual_sums`.

    Attributes:
        entries: The residual additions in order.
        blends: Other operations that combine two values of the input, none of which is a shortcut.
        contradicted: Whether layers name another batch dimension than the example inputs do.
    """

    def __init__(
        self,
        block: BlockGraph,
        children: ModuleProperties,
        shapes: Callable[[], tuple[Shapes, Shapes] | None] = lambda: None,
        arguments: Callable[[], ArgumentShapes] = dict,
        batch_dim: int | None = None,
        known_layouts: Sequence[RowLayouts] = (),
        assume: bool = False,
    ) -> None:
        super().__init__(block, children, shapes, arguments, known_layouts, assume)
        self.batch_dim = batch_dim
        self.contradicted = False
        self._action = BranchAction(self)
        # The same, but of an earlier residual addition only what its shortcut is computed from.
        self._ancestors_on_stream: dict[fx.Node, int] = {}
        # The first argument, and what is the sum of it and of something else.
        self._first = next((n for n in self.nodes if n.op == "placeholder"), None)
        self._sums_of_first: set[fx.Node] = set()
        self.entries: list[ResidualSum] = []
        self.blends: list[fx.Node] = []
        # Sums that total the outputs of successive blocks.
        self._totals: set[fx.Node] = set()
        # Sums that are no residuals, so that others are.
        self._not_taken: set[fx.Node] = set()
        while not self._find_entries():
            pass

    def _find_entries(self) -> bool:
        """Find all residual additions.

        Returns:
            False if one of them made clear that an earlier one is none, which is noted for the next
            attempt.
        """
        self.entries, self.blends = [], []
        self._sums_of_first = set()
        for i, node in enumerate(self.nodes):
            added = summands(node)
            operands = None if node in self._not_taken else added
            entry = None if operands is None else self._entry(node, operands)
            if entry is None and self._blends(node, operands):
                self.blends.append(node)
            if entry is not None and (before := self._earlier_total(entry.split)) is not None:
                if before.why_not != _TOTAL:
                    self._totals |= {before.split.add, node}
                    return False
                entry.why_not = _TOTAL
            if operands is not None and entry is None:
                other = self._shortcut_beside_the_stream(node, operands)
                if other is not None:
                    self._not_taken.add(other)
                    return False
            sources = node.all_input_nodes
            if node.target is passed_through:  # it holds the arguments of a child, for its hooks
                sources = sources[:1]
            if entry is not None:
                self.entries.append(entry)
                if not entry.why_not:
                    sources = [entry.split.skip]
            if node is self._first or self._sums_of_first.intersection(
                [entry.split.skip] if entry is not None else (added or ())[:2]
            ):
                self._sums_of_first.add(node)
            on_stream = 1 << i
            # A size is no data that flows: a table that is cut to it is no shortcut.
            for source in () if is_shape_node(node) else sources:
                on_stream |= self._ancestors_on_stream[source]
            self._ancestors_on_stream[node] = on_stream
        return True

    @property
    def handed_on(self) -> ResidualSum | None:
        """The branch that the block returns and the next block adds; None if there is none."""
        if self.block.handed is None:
            return None
        return next((e for e in self.entries if e.split.skip.target is no_shortcut), None)

    def _blends(self, node: fx.Node, operands: Summands | None) -> bool:
        """Whether ``node`` combines two values of the input by layers that are not linear."""
        if operands is None:
            blends = operation_of(node).blends
            return blends and self.has_parameters(self.nodes_in(self.ancestors[node]))
        left, right = (self.ancestors[n] for n in operands[:2])
        sides = [self.nodes_in(left & ~right), self.nodes_in(right & ~left)]
        memo: dict[fx.Node, bool] = {}
        return (
            any(depends_on_input(n, memo) for n in self.nodes_in(left & right))
            and any(map(self.has_parameters, sides))
            and not any(self.children.linear_nodes(side, self.owner) for side in sides)
        )

    def _earlier_total(self, split: Split) -> ResidualSum | None:
        """Return an earlier sum, if it and ``split`` only total what successive blocks return.

        ``x, aux = block(x); total = total + aux``: each block computes its ``x`` from that of the
        block before, not from the total, which is no stream of residuals.
        """
        shortcut = self.ancestors[split.skip] & ~self.ancestors[split.branch]
        for entry in self.entries:
            if not shortcut >> self.order[entry.split.add] & 1:
                continue
            if not self._is_beside_its_branch(entry.split):
                continue
            # A norm or projection that two parallel branches share is no block before this one.
            # Also what is used outside of its branch, too, and is not inside the split any more.
            branch = self.ancestors[entry.split.branch] & ~self.ancestors[entry.split.skip]
            shared = self.nodes_in(branch & self.ancestors[split.branch])
            if self.has_parameters(shared) and not self.children.linear_nodes(shared, self.owner):
                return entry
        return None

    def _is_beside_its_branch(self, split: Split) -> bool:
        """Whether the branch of a sum does not come from its shortcut, as in a total of outputs.

        In ``x1 + x2`` of two blocks ``x2 = block(x1)`` it does, but there both sides are outputs of
        modules of one class.
        """
        if not self.ancestors[split.branch] >> self.order[split.skip] & 1:
            return True
        kinds = [self._class_of_output(node) for node in (split.skip, split.branch)]
        return kinds[0] is not None and kinds[0] is kinds[1]

    def _class_of_output(self, node: fx.Node) -> type[nn.Module] | None:
        """Return the class of the module whose output, or an item of it, ``node`` is."""
        if _is_item(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return (
            type(self.owner.get_submodule(str(node.target))) if node.op == "call_module" else None
        )

    def _shortcut_beside_the_stream(self, add: fx.Node, operands: Summands) -> fx.Node | None:
        """Return an addition that has to be no residual, so that ``add`` is one.

        ``h = f(x + bias) + bias; x + h``: if the first argument is added after all, the branch is
        ``h``, and ``bias`` is no shortcut.
        """
        if self._first is None:
            return None
        bit, stream = 1 << self.order[self._first], self._ancestors_on_stream
        for skip, branch in (operands[:2], operands[1::-1]):
            if not stream[skip] & bit or stream[branch] & bit:
                continue
            for entry in self.entries:
                split = entry.split
                inside = self.ancestors[branch] & ~self.ancestors[skip]
                taken = inside >> self.order[split.add] & 1 and not entry.why_not
                # a second stream is used by others, too
                users = set(split.add.users) - {add}
                taken = taken and all(inside >> self.order[n] & 1 for n in users)
                if taken and self.ancestors[split.branch] & bit and not stream[split.skip] & bit:
                    return split.add
        return None

    def _entry(self, add: fx.Node, operands: Summands) -> ResidualSum | None:
        """Return the addition ``add`` as a residual; None if it is not one."""
        left, right, gain, writes_left, pad_dim = operands
        sides = self._sides(left, right)
        if sides is None:
            return None
        branch_is_right, inside, shortcut, why_not = sides
        skip, branch = (left, right) if branch_is_right else (right, left)
        if not self.has_parameters(inside) or not depends_on_input(branch, {}):
            return None
        if branch in self._sums_of_first and skip.op == "placeholder" and skip is not self._first:
            return None  # an embedding that is added to the stream, and was used before
        if all(node.op == "get_attr" for node in inside):
            return None
        dim, votes = self._batch_dim(skip)
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
            pads=pad_dim,
            dim=dim,
            batch_first_votes=votes,
        )
        decision = self._action.decide(split)
        if split.skip_gain < 0.0:
            why_not = "its shortcut is subtracted"
        if decision.drops_more:
            why_not = "its own drop path covers more than the branch"
        if add in self._totals:
            why_not = _TOTAL
        return ResidualSum(
            decision.split,
            decision.action,
            decision.reason,
            "projection" if pad_dim is not None else shortcut,
            why_not,
            decision.leak,
        )

    def _sides(self, left: fx.Node, right: fx.Node) -> _Sides | None:
        """Decide which operand is the branch; None if this is not a residual addition."""
        left_bits, right_bits = self.ancestors[left], self.ancestors[right]
        # An embedding that is added in every block is no shortcut of it, although the input of the
        # block was computed with the embedding in earlier branches.
        stream = self._ancestors_on_stream
        common = self.nodes_in(stream[left] & stream[right])
        memo: dict[fx.Node, bool] = {}
        if not any(depends_on_input(n, memo) and not _is_container(n) for n in common):
            return None  # no value is common to both sides: a bias or a positional embedding
        only_left = self.nodes_in(left_bits & ~right_bits)
        only_right = self.nodes_in(right_bits & ~left_bits)
        shortcut, why_not = "identity", ""
        if only_left and only_right:
            # A branch that was added earlier belongs to neither side: x + f(x) + g(x) has two
            # branches of x.
            both = [self._without_earlier_branches(side) for side in (only_left, only_right)]
            linear = [self.children.linear_nodes(side, self.owner) for side in both]
            if linear[0] == linear[1]:
                return None  # two parallel branches, or the parallel convolutions of RepVGG
            branch_is_right = linear[0]
            if not all(map(self._returns_its_input, both[0 if branch_is_right else 1])):
                shortcut = "projection"
        else:
            branch_is_right = not only_left
            inside = only_right if branch_is_right else only_left
            if self.has_parameters(inside) and self.children.linear_nodes(inside, self.owner):
                why_not = "its branch is linear"
        inside = only_right if branch_is_right else only_left
        # an argument of the forward is not part of the branch, even if only the branch reads it
        inside = {node for node in inside if not _is_argument(node)}
        # rows cannot be selected from a tuple, only from its items
        inside = {n for n in inside if not (_is_item(n) and n.args[0] not in inside)}
        return _Sides(branch_is_right, inside, shortcut, why_not)

    def _batch_dim(self, skip: fx.Node) -> tuple[int | None, dict[str, int]]:
        """Return the dimension of ``skip`` that carries the batch.

        Returns:
            The dimension; None if it is not known.
            The dimension that each child with ``batch_first`` names, if nothing else determined it;
            else empty.
        """
        if self.batch_dim is not None:
            return self.batch_dim, {}
        # An example shows the batch dimension itself. Only without one, children are looked into.
        inside = None if self.arguments() else self.children.read
        dim, votes = batch_dim_from_layers(self.nodes, self.owner, skip, inside)
        if not self.arguments():
            return dim, votes
        growing = self._dims_that_grow(skip)
        if len(growing) != 1:
            return dim, votes
        self.contradicted |= dim is not None and growing != [dim]
        return growing[0], {}

    def _dims_that_grow(self, value: fx.Node) -> list[int]:
        """Return the dimensions of ``value`` that are larger for a larger batch, if measured."""
        # The shapes of arguments with the same layout are known without running the forward.
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

    def _without_earlier_branches(self, side: set[fx.Node]) -> set[fx.Node]:
        """Return ``side`` without the branches that earlier residual additions added to it."""
        rest = set(side)
        for entry in self.entries:
            if entry.split.add in side and not entry.why_not:
                rest -= entry.split.inside | {entry.split.add}
        return rest

    def _returns_its_input(self, node: fx.Node) -> bool:
        """Whether ``node`` returns the values of its input unchanged."""
        if node.op == "call_module":
            return isinstance(self.owner.get_submodule(str(node.target)), layers_with("copies"))
        if node.target is operator.add:  # sum() of Python starts with 0 + first item
            return any(type(a) in (int, float) and a == 0 for a in node.args)
        return operation_of(node).copies

    @cached_property
    def elements(self) -> dict[ResidualSum, str | None]:
        """For each addition, the element of a container of layers that holds its branch.

        None unless several elements of that ModuleList, ModuleDict or Sequential hold branches.
        """
        called = {entry: called_modules(entry.split) for entry in self.entries}
        times = Counter(path for paths in called.values() for path in paths)
        found = {entry: _element(paths, self.owner, times) for entry, paths in called.items()}
        containers = Counter(e.rpartition(".")[0] for e in set(found.values()) if e is not None)
        return {
            entry: e if e is not None and containers[e.rpartition(".")[0]] > 1 else None
            for entry, e in found.items()
        }

    @cached_property
    def has_stem_or_head(self) -> bool:
        """Whether a layer with a weight matrix runs before the first addition, or after the last.

        Then the forward is that of a network, and its additions are steps of depth. A layer on the
        shortcut of the first addition does not count.
        """
        taken = [entry.split for entry in self.entries if not entry.why_not]
        if not taken:
            return False
        first, last = taken[0], taken[-1]
        before_both = self.ancestors[first.skip] & self.ancestors[first.branch]
        for node in self.nodes:
            if node.op != "call_module" or any(node in split.inside for split in taken):
                continue
            before = before_both >> self.order[node] & 1
            after = self.ancestors[node] >> self.order[last.add] & 1
            module = self.owner.get_submodule(str(node.target))
            if (before or after) and any(p.dim() > 1 for p in module.parameters()):
                return True
        return False


def _is_container(node: fx.Node) -> bool:
    """Whether ``node`` is an argument of which only items are used, such as a list of tensors."""
    return (
        node.op == "placeholder"
        and len(node.users) > 0
        and all(
            user.target in (operator.getitem, operator.setitem)
            and isinstance(user.args[1], int | str)
            for user in node.users
        )
    )


def _is_item(node: fx.Node) -> bool:
    """Whether ``node`` reads an item of a tuple that a child, or a function, returned."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and (
        source.op == "call_module" or operation_of(source).returns_tuple
    )


def _is_argument(node: fx.Node) -> bool:
    """Whether ``node`` is an argument, or an item of one that is a tuple or a dict."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        container = node.args[0]
        return _is_argument(container) and (
            isinstance(node.args[1], str) or _is_container(container)
        )
    return node.op == "placeholder"


def _element(paths: Iterable[str], owner: nn.Module, times: Mapping[str, int]) -> str | None:
    """Return the element, such as "layers.3", that holds most parameters of modules in ``paths``.

    Only elements of outermost containers are considered. None if there is none, or if most of the
    parameters are in no container: an attention with its norm in a list is no element of the list.

    Args:
        paths: The modules that a branch calls.
        owner: The module whose forward calls them.
        times: How many branches call each module. What several call tells nothing of one.
    """
    elements: Counter[str | None] = Counter()
    for path in paths:
        if times[path] == 1:
            elements[None] += sum(p.numel() for p in owner.get_submodule(path).parameters())
        atoms = path.split(".")
        for i in range(1, len(atoms)):
            container = owner.get_submodule(".".join(atoms[:i]))
            if isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                module = owner.get_submodule(path)
                weight = sum(p.numel() for p in module.parameters())
                elements[".".join(atoms[: i + 1])] += weight + 1
                elements[None] -= weight if times[path] == 1 else 0
                break
    return elements.most_common(1)[0][0] if elements else None
