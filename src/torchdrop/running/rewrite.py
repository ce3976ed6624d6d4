"""Generate the source of a forward in which a site computes the residual branches.

The generated forward is the block's own, except for the sums. If rows of branch ``k`` are skipped,
the branch becomes a separate function, and the forward calls ``site.join(k, skip, *inputs)``. If it
is computed on all rows, the forward calls ``site.mask(k, skip, branch)``. The result is text and
the names it uses, so that it can be pickled.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Sequence
from io import StringIO
from itertools import pairwise
from tokenize import generate_tokens
from typing import Any, cast

from torch import fx

from torchdrop.finding.row_layout import RowLayout
from torchdrop.finding.split import Split, outside_inputs
from torchdrop.internals import reserve_name
from torchdrop.running.nested_statements import CheckpointWriter, ModeWriter, nested_statements
from torchdrop.running.program import Program, Source
from torchdrop.tracing.block_graph import BlockGraph
from torchdrop.tracing.checkpoint import Checkpoint, checkpoints_of
from torchdrop.tracing.handed_on_sums import branch_handed_on
from torchdrop.tracing.modes import Modes, modes_of, select_modes
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.traced_functions import no_shortcut, pad_like, passed_through

__all__ = ["rewrite"]


# The node that stands for the site in every environment. An environment maps the nodes of the
# block's graph to their copies in a generated graph.
_SITE = fx.Graph().placeholder("site")
_Environment = dict[fx.Node, fx.Node]

_KEYWORD_AS_ATTRIBUTE = re.compile(rf"\.({'|'.join(keyword.kwlist)})\b")

# The methods of a site that return the sum of a skip and a branch.
_SUMS = ("join", "mask")


def rewrite(
    block: BlockGraph, splits: Sequence[tuple[Split, str] | None], label: str, first: int = 0
) -> Program:
    """Return the generated forward of a block, and a function for each branch that is skipped.

    Args:
        block: The graph of the block.
        splits: Its residual sums, each with its action, ``"skip"`` or ``"mask"``; None for a
            branch that this forward does not add.
        label: The name of the block, which tracebacks show.
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
        set() if block.uses_inner_shapes else None,
        rewriter.assumed,
        runs_own=not rewriter.splits,
        asks=block.asks,
        modes=set() if block.modes is None else {select_modes(block.modes, block.asks)},
        watched_globals=block.watched_globals,
    )


class _Rewriter:
    """Generates the forward of a block and the functions of its branches.

    See :class:`Program` for the attributes of the same names.
    """

    def __init__(
        self,
        block: BlockGraph,
        splits: Sequence[tuple[Split, str] | None],
        label: str,
        first: int,
    ) -> None:
        self.nodes = list(block.graph.nodes)
        self.modes = block.modes
        self.splits = {k: found for k, found in enumerate(splits, first) if found is not None}
        self.label = label
        self.branches: dict[int, Source] = {}
        self.row_layouts: dict[int, list[RowLayout | None] | None] = {}
        self.reuses_skip: set[int] = set()
        self.assumed: set[int] = set()

    def main(self) -> Source:
        """Generate the forward, and the branches with it."""
        graph = _new_graph()
        env = {_SITE: graph.placeholder("site")}
        options = self.emit(graph, self.nodes, env, self.modes)
        self.note_reused_skips(graph)
        return _source(self.label, graph, options)

    def branch(self, k: int, split: Split, inputs: list[fx.Node]) -> Source:
        """Generate the function of branch ``k``, with ``inputs`` as its arguments."""
        graph = _new_graph()
        env = {_SITE: graph.placeholder("site")}
        for node in inputs:
            env[node] = graph.placeholder(self.name_of(node))
        expectations = {n for n in self.nodes if "expected" in n.meta and n.args[0] in split.inside}
        region = [n for n in self.nodes if n in split.inside | expectations]
        options = self.emit(
            graph,
            region,
            env,
            modes_of(split.add, self.modes),
            checkpoints_of(split.add),
            split.branch,
        )
        self.note_reused_skips(graph)
        return _source(f"{self.label}, branch {k}", graph, options)

    def name_of(self, node: fx.Node) -> str:
        """Return the name of the argument that stands for ``node`` in generated code."""
        name = node.name
        if name in ("self", "site"):
            taken = {other.name for other in self.nodes}
            while name in taken:
                name += "_"
        return name

    def emit(
        self,
        graph: fx.Graph,
        region: list[fx.Node],
        env: _Environment,
        base: Modes | None,
        outside: tuple[Checkpoint, ...] = (),
        output: fx.Node | None = None,
    ) -> list[dict[str, Any]]:
        """Copy the nodes ``region`` into ``graph``, with calls of the site for residual sums.

        Args:
            graph: The graph that is generated.
            region: The nodes to copy.
            env: The copies that exist already. The new ones are added.
            base: The modes in which the generated code is called.
            outside: The checkpoints in which it is called.
            output: The node whose value the generated code returns; None if ``region`` has an
                output node.

        Returns:
            The options of the checkpoints in the generated code.
        """
        modes = ModeWriter(graph, base)
        checkpoints = CheckpointWriter(graph, outside)
        here, given = set(region), set(env)
        sums = {split.add: k for k, (split, _) in self.splits.items() if split.add in here}
        skipped = {
            node
            for k in sums.values()
            for node in self.splits[k][0].inside
            if self.splits[k][1] == "skip"
        }
        for node in region:
            # Shapes and attributes are copied where they are needed: inside a branch, the shape is
            # that of the kept rows.
            if node in skipped or node in env or _is_made_where_needed(node):
                continue
            handed = branch_handed_on(node)
            if handed is not None and node not in sums:  # it is not dropped: nothing is added to it
                env[node] = env[handed]
                continue
            within = () if node.op in ("placeholder", "output") else checkpoints_of(node)
            if checkpoints.would_switch(within):
                modes.end()
                checkpoints.switch(within)
                # copies from outside this checkpoint are not used inside, and the other way round
                for copied in [n for n in env if _is_made_where_needed(n)]:
                    if copied not in given:
                        del env[copied]
            modes.switch(modes_of(node, self.modes))
            if "expected" in node.meta:
                _emit_expectation(graph, node, env)
            elif node.target is passed_through:
                known = fx.map_arg(tuple(node.args), env.get)
                env[node] = graph.call_method("run_child_hooks", (env[_SITE], *known))
            elif node in sums:
                env[node] = self.emit_sum(graph, sums[node], env)
            elif node.op == "placeholder":
                env[node] = graph.placeholder(self.name_of(node))
            else:
                env[node] = graph.node_copy(node, lambda n: _copied(n, graph, env))
        modes.end()
        if output is not None:
            checkpoints.switch(outside)
            graph.output(_copied(output, graph, env))
        checkpoints.end(lambda node: node.op == "call_method" and node.target in _SUMS)
        return checkpoints.options

    def emit_sum(self, graph: fx.Graph, k: int, env: _Environment) -> fx.Node:
        """Add the call of the site for the sum with branch ``k``.

        If the branch is skipped, generate its function, and note how its inputs carry the rows.
        """
        split, action = self.splits[k]
        site = env[_SITE]
        skip = _copied(split.skip, graph, env)
        if split.skip_gain != 1.0:
            skip = graph.call_function(operator.mul, (skip, split.skip_gain))
        if action != "skip":
            branch = _copied(split.branch, graph, env)
            if split.pads is not None:
                size = graph.call_method("size", (branch, split.pads))
                skip = graph.call_function(pad_like, (skip, size, split.pads))
            return graph.call_method("mask", (site, k, skip, branch))
        inputs = outside_inputs(split, self.nodes)
        self.branches[k] = self.branch(k, split, inputs)
        layouts = split.row_layouts
        if split.assumed:
            self.assumed.add(k)
        self.row_layouts[k] = None if layouts is None else [layouts[node.name] for node in inputs]
        given: list[Any] = [_copied(node, graph, env) for node in inputs]
        if split.pads is not None:
            skip = graph.call_method("padded", (site, k, split.pads, skip, *given))
        arguments: tuple[Any, ...] = (site, k, skip, *given)
        return graph.call_method("join", arguments)

    def note_reused_skips(self, graph: fx.Graph) -> None:
        """Note the joins in ``graph`` whose skip is another sum that nothing else uses.

        A sum that is written into its own skip does not count.
        """
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


def _source(label: str, graph: fx.Graph, options: list[dict[str, Any]] | None = None) -> Source:
    code = graph.python_code("self")
    text = without_keywords(code.src)
    return Source(label, *nested_statements(text, code.globals, options or []))


def without_keywords(text: str) -> str:
    """Return ``text`` with ``__getattr__("in")`` for each attribute that is named like a keyword.

    A ``ModuleDict`` may have such a child, and torch.fx writes ``self.layers.in``.
    """
    if not _KEYWORD_AS_ATTRIBUTE.search(text):
        return text
    lines = text.splitlines(keepends=True)
    tokens = list(generate_tokens(StringIO(text).readline))
    for dot, name in reversed(list(pairwise(tokens))):
        if dot.string == "." and keyword.iskeyword(name.string):
            row, column = name.start
            line = lines[row - 1]
            end = column + len(name.string)
            lines[row - 1] = f"{line[:column]}__getattr__({name.string!r}){line[end:]}"
    return "".join(lines)


def _new_graph() -> fx.Graph:
    graph = fx.Graph()
    reserve_name(graph, "self")  # a child may have that name
    return graph


def _is_made_where_needed(node: fx.Node) -> bool:
    """Whether ``node`` is copied to each place that needs it: shapes, attributes, zeros."""
    return is_shape_node(node) or node.op == "get_attr" or node.target is no_shortcut


def _copied(node: fx.Node, graph: fx.Graph, env: _Environment) -> fx.Node:
    """Return the copy of ``node``; make it now if it is made where it is needed."""
    if node not in env:
        if not _is_made_where_needed(node):
            raise RuntimeError(f"{node.name} is needed before it is computed")
        env[node] = graph.node_copy(node, lambda n: _copied(n, graph, env))
    return env[node]


def _emit_expectation(graph: fx.Graph, node: fx.Node, env: _Environment) -> None:
    """Let the site check what a child returned, if both sides are computed in this graph."""
    item, expected = node.args[0], node.meta["expected"]
    if item in env and (not isinstance(expected, fx.Node) or expected in env):
        item = graph.node_copy(node, lambda n: _copied(n, graph, env))
        expected = env[expected] if isinstance(expected, fx.Node) else expected
        graph.call_method("expect", (env[_SITE], item, expected))
