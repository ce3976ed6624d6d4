"""REWRITE: from a block's graph to the source of a forward that defers its branches.

The generated forward computes everything outside the branches as the block does, and calls
``site.join(k, skip, *inputs)`` where branch ``k`` was added (``site.mask(k, skip, branch)`` for a
branch that is computed in full). Each deferred branch is a function of its own. Both are plain
source text with the names it uses, so that what is attached to a model can be pickled.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

from torch import fx

from torchdrop.finding.row_layout import RowLayout
from torchdrop.finding.split import Split, outside_inputs
from torchdrop.internals import reserve_name
from torchdrop.running.program import Program, Source
from torchdrop.tracing.block_graph import BlockGraph
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.traced_functions import pad_like, passed_through

__all__ = ["rewrite"]


def _source(label: str, graph: fx.Graph) -> Source:
    code = graph.python_code("self")
    return Source(label, code.src, code.globals)


def _graph() -> fx.Graph:
    graph = fx.Graph()
    reserve_name(graph, "self")  # a child may have that name
    return graph


class _Rewriter:
    def __init__(
        self, block: BlockGraph, splits: Sequence[tuple[Split, str]], label: str, first: int
    ) -> None:
        self.nodes = list(block.graph.nodes)
        self.splits = dict(enumerate(splits, first))
        self.label = label
        self.branches: dict[int, Source] = {}
        self.row_layouts: dict[int, list[RowLayout | None] | None] = {}
        self.reuses_skip: set[int] = set()

    def emit(self, graph: fx.Graph, region: list[fx.Node], env: dict[fx.Node, fx.Node]) -> None:
        """Copy ``region`` into ``graph``, its residual additions replaced by calls of the site."""
        here = set(region)
        joins = {s.add: k for k, (s, _) in self.splits.items() if s.add in here}
        deferred: set[fx.Node] = set()
        for k in joins.values():
            split, action = self.splits[k]
            if action == "skip":
                deferred |= split.inside
        site = env[_SITE]

        def ref(node: fx.Node) -> fx.Node:
            if node not in env:
                if not is_shape_node(node) and node.op != "get_attr":
                    raise RuntimeError(f"{node.name} is needed before it is computed")
                env[node] = graph.node_copy(node, ref)
            return env[node]

        for node in region:
            if node in deferred or node in env or is_shape_node(node) or node.op == "get_attr":
                continue
            if "expected" in node.meta:
                item, known = node.args[0], node.meta["expected"]
                if item in env and (not isinstance(known, fx.Node) or known in env):
                    item = graph.node_copy(node, ref)
                    known = env[known] if isinstance(known, fx.Node) else known
                    graph.call_method("expect", (site, item, known))
                continue
            if node.target is passed_through:
                known = fx.map_arg(tuple(node.args), env.get)
                env[node] = graph.call_method("through", (site, *known))
                continue
            if node not in joins:
                env[node] = graph.node_copy(node, ref)
                continue
            k = joins[node]
            split, action = self.splits[k]
            skip = ref(split.skip)
            if split.skip_gain != 1.0:
                skip = graph.call_function(operator.mul, (skip, split.skip_gain))
            if action == "skip":
                inputs = outside_inputs(split, self.nodes)
                self.branches[k] = self.branch(k, split, inputs)
                row_layouts = split.row_layouts
                self.row_layouts[k] = (
                    None if row_layouts is None else [row_layouts[node.name] for node in inputs]
                )
                given: list[Any] = [ref(node) for node in inputs]
                if split.pads is not None:
                    skip = graph.call_method("padded", (site, k, split.pads, skip, *given))
                arguments: tuple[Any, ...] = (site, k, skip, *given)
                env[node] = graph.call_method("join", arguments)
            else:
                branch = ref(split.branch)
                if split.pads is not None:
                    size = graph.call_method("size", (branch, split.pads))
                    skip = graph.call_function(pad_like, (skip, size, split.pads))
                env[node] = graph.call_method("mask", (site, k, skip, branch))

    def branch(self, k: int, split: Split, inputs: list[fx.Node]) -> Source:
        graph = _graph()
        env = {_SITE: graph.placeholder("site")}
        for node in inputs:
            taken = node.name in ("self", "site")
            env[node] = graph.placeholder(f"{node.name}_" if taken else node.name)
        known = {n for n in self.nodes if "expected" in n.meta and n.args[0] in split.inside}
        self.emit(graph, [n for n in self.nodes if n in split.inside | known], env)
        graph.output(env[split.branch])
        self.note_reused_skips(graph)
        return _source(f"{self.label}, branch {k}", graph)

    def main(self) -> Source:
        graph = _graph()
        env = {_SITE: graph.placeholder("site")}
        self.emit(graph, self.nodes, env)
        self.note_reused_skips(graph)
        return _source(self.label, graph)

    def note_reused_skips(self, graph: fx.Graph) -> None:
        """Find the joins in ``graph`` whose skip is the new tensor of another, for them alone."""
        site = next(iter(graph.nodes))
        sums = {
            node: cast("int", node.args[1])
            for node in graph.nodes
            if node.op == "call_method" and node.args[0] is site and node.target in _SUMS
        }
        for node, k in sums.items():
            skip = node.args[2]
            alone = skip in sums and len(skip.users) == 1
            if alone and node.target == "join" and not self.splits[sums[skip]][0].writes_skip:
                self.reuses_skip.add(k)


_SUMS = ("join", "mask")  # the calls of a site that return the sum of a skip and a branch
_SITE = fx.Graph().placeholder("site")  # stands for the site in every environment


def rewrite(
    block: BlockGraph, splits: Sequence[tuple[Split, str]], label: str, first: int = 0
) -> Program:
    """The deferred forward of a block, and a function for each branch that can be skipped.

    Args:
        block: The block's graph.
        splits: Its residual additions, each with its action, ``"skip"`` or ``"mask"``.
        label: The name of the block, for tracebacks.
        first: The number of the first branch; the others count on from there.
    """
    rewriter = _Rewriter(block, splits, label, first)
    return Program(
        rewriter.main(),
        rewriter.branches,
        rewriter.row_layouts,
        rewriter.reuses_skip,
        block.tensors,
        block.constants,
        block.attributes,
        None if block.decisions is None else _source(f"{label}, decisions", block.decisions),
        block.decided,
        set() if block.computed else None,
    )
