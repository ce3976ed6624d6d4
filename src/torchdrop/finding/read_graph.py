"""What the search for residual additions knows about one graph: its nodes and their ancestors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import fx

from torchdrop.finding.example_calls import ArgumentShapes, Shapes
from torchdrop.finding.linearity import ModuleProperties
from torchdrop.finding.row_layout import RowLayouts
from torchdrop.tracing.block_graph import BlockGraph
from torchdrop.tracing.nodes import is_shape_node

__all__ = ["ReadGraph"]


class ReadGraph:
    """The graph of one forward, and what an example shows of it.

    Args:
        block: The graph.
        children: Tells the properties of the modules that the graph calls.
        shapes: Returns the shapes of all nodes for two batch sizes, or None if there is no example.
        arguments: Returns the shapes of the arguments of the forward for two batch sizes.
        known_layouts: ``Split.row_layouts`` of the same block, measured in another call.
        assume: Whether, where the layout of an input was not measured, the shape of the input may
            decide in each call.

    Attributes:
        owner: The module whose forward it is.
        nodes: The nodes of the graph in order.
        order: The position of each node in ``nodes``.
        ancestors: For each node, the nodes that it is computed from and itself, as bits of an
            integer.
    """

    def __init__(
        self,
        block: BlockGraph,
        children: ModuleProperties,
        shapes: Callable[[], tuple[Shapes, Shapes] | None] = lambda: None,
        arguments: Callable[[], ArgumentShapes] = dict,
        known_layouts: Sequence[RowLayouts] = (),
        assume: bool = False,
    ) -> None:
        self.block = block
        self.owner = block.module
        self.children = children
        self.shapes = shapes
        self.arguments = arguments
        self.known_layouts = known_layouts
        self.assume = assume
        self.nodes: list[fx.Node] = list(block.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        # Ancestors as bit sets, so that a forward with thousands of nodes stays cheap.
        self.ancestors: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            mine = 1 << i
            for source in node.all_input_nodes:
                mine |= self.ancestors[source]
            self.ancestors[node] = mine

    def nodes_in(self, bits: int) -> set[fx.Node]:
        """Return the nodes whose bits are set in ``bits``, without those that read only shapes."""
        found = set()
        while bits:
            low = bits & -bits
            node = self.nodes[low.bit_length() - 1]
            if not is_shape_node(node):
                found.add(node)
            bits ^= low
        return found

    def has_parameters(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether any of ``nodes`` is a parameter or buffer, or calls a module with parameters."""
        for node in nodes:
            if node.op == "call_module":
                module = self.owner.get_submodule(str(node.target))
                if next(module.parameters(), None) is not None:
                    return True
            elif node.op == "get_attr":
                return True
        return False
