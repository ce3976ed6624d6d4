"""REWRITE: from a block's graph to the source of a forward that defers its branches.

The generated forward computes everything outside the branches as the block does, and calls
``site.join(k, skip, *inputs)`` where branch ``k`` was added (``site.mask(k, skip, branch)`` for a
branch that is computed in full). Each deferred branch is a function of its own. Both are plain
source text with the names it uses, so that what is attached to a model can be pickled.
"""

from __future__ import annotations

import importlib
import linecache
import operator
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import fx

from torchdrop.residual import Split, outside_inputs
from torchdrop.tracing import BlockGraph, is_shape_node

__all__ = ["Source", "rewrite"]


class Source:
    """A generated function: its text and what its names stand for. Immutable, pickles, shared."""

    def __init__(self, label: str, text: str, names: dict[str, Any]) -> None:
        self.label = label
        self.text = text
        self.names = names
        self.function: Callable[..., Any] = self._compile()

    def _compile(self) -> Callable[..., Any]:
        filename = f"<torchdrop {self.label}>"
        # so that a traceback through generated code shows its lines
        linecache.cache[filename] = (len(self.text), None, self.text.splitlines(True), filename)
        scope = dict(self.names)
        exec(compile(self.text, filename, "exec"), scope)
        function: Callable[..., Any] = scope["forward"]
        return function

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self

    def __getstate__(self) -> dict[str, Any]:
        modules = {k: v.__name__ for k, v in self.names.items() if isinstance(v, ModuleType)}
        values = {k: v for k, v in self.names.items() if not isinstance(v, ModuleType)}
        return {"label": self.label, "text": self.text, "modules": modules, "values": values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {k: importlib.import_module(v) for k, v in state["modules"].items()}
        self.__init__(state["label"], state["text"], {**names, **state["values"]})  # type: ignore[misc]


def _source(label: str, graph: fx.Graph) -> Source:
    code = graph.python_code("self")
    return Source(label, code.src, code.globals)


class _Rewriter:
    def __init__(self, block: BlockGraph, splits: Sequence[tuple[Split, str]], label: str) -> None:
        self.nodes = list(block.graph.nodes)
        self.splits = splits
        self.label = label
        self.branches: dict[int, Source] = {}

    def emit(self, graph: fx.Graph, region: list[fx.Node], env: dict[fx.Node, fx.Node]) -> None:
        """Copy ``region`` into ``graph``, its residual additions replaced by calls of the site."""
        here = set(region)
        joins = {s.add: k for k, (s, _) in enumerate(self.splits) if s.add in here}
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
                arguments: tuple[Any, ...] = (site, k, skip, *map(ref, inputs))
                env[node] = graph.call_method("join", arguments)
            else:
                env[node] = graph.call_method("mask", (site, k, skip, ref(split.branch)))

    def branch(self, k: int, split: Split, inputs: list[fx.Node]) -> Source:
        graph = fx.Graph()
        env = {_SITE: graph.placeholder("site")}
        for node in inputs:
            env[node] = graph.placeholder(node.name)
        self.emit(graph, [n for n in self.nodes if n in split.inside], env)
        graph.output(env[split.branch])
        return _source(f"{self.label}, branch {k}", graph)

    def main(self) -> Source:
        graph = fx.Graph()
        env = {_SITE: graph.placeholder("site")}
        self.emit(graph, self.nodes, env)
        return _source(self.label, graph)


_SITE = fx.Graph().placeholder("site")  # stands for the site in every environment


def rewrite(
    block: BlockGraph, splits: Sequence[tuple[Split, str]], label: str
) -> tuple[Source, dict[int, Source]]:
    """The deferred forward of a block, and a function for each branch that can be skipped.

    Args:
        block: The block's graph.
        splits: Its residual additions, each with its action, ``"skip"`` or ``"mask"``.
        label: The name of the block, for tracebacks.

    Returns:
        ``forward(self, site, *tensors)``, and ``{k: forward(self, site, *inputs)}``.
    """
    rewriter = _Rewriter(block, splits, label)
    main = rewriter.main()
    return main, rewriter.branches
