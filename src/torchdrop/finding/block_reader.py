"""READ all blocks of a model, each in the call that an example gives, if there is one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from functools import cache, partial
from typing import Any

from torch import fx, nn

from torchdrop.finding.example_calls import Example
from torchdrop.finding.linearity import ModuleProperties
from torchdrop.finding.residual_sums import ResidualSums
from torchdrop.finding.row_layout import differing_dims
from torchdrop.tracing.block_graph import BlockGraph, trace_block
from torchdrop.tracing.call_arguments import A_TENSOR
from torchdrop.tracing.nodes import is_shape_node, summands
from torchdrop.tracing.untraceable import DataDependentError, UntraceableError

__all__ = ["CONTAINERS", "BlockReader"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def candidates(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules that could be blocks: composite, with a forward of their own."""
    for name, module in model.named_modules():
        # a branch holds parameters
        if next(module.children(), None) is None or next(module.parameters(), None) is None:
            continue
        if type(module).forward in {p.forward for p in CONTAINERS}:
            continue
        # Torch's own layers are leaves, with children (attention) or without, also where someone
        # gave them one (an observer); its encoder and decoder layers are not.
        origin = type(module).__module__
        of_torch = origin.startswith(("torch.nn.modules.", "torch.ao.nn."))
        if isinstance(module, nn.MultiheadAttention) or (
            of_torch and not origin.endswith(".transformer")
        ):
            continue
        yield name, module


class BlockReader:
    """Reads the blocks of one model, each in the call that an example gives, if there is one."""

    def __init__(self, model: nn.Module, example: Example | None, batch_dim: int | None) -> None:
        self._model = model
        self._names = {module: name for name, module in reversed(list(model.named_modules()))}
        self._example = example
        self._batch_dim = batch_dim
        self._children = ModuleProperties()
        self._joining: dict[nn.Module, bool] = {}
        self._inlined: set[nn.Module] = set()
        self.on_data: set[str] = set()

    def read_all(self) -> tuple[dict[str, ResidualSums], dict[str, str]]:
        """The residual additions of every forward; and what cannot be read, and why."""
        finders: dict[str, ResidualSums] = {}
        unreadable: dict[str, str] = {}
        for name, module in candidates(self._model):
            try:
                finders[name] = self._find(name, module)
            except UntraceableError as error:
                unreadable[name] = str(error)
                if isinstance(error, DataDependentError):
                    self.on_data.add(name)
        for name in [n for n, f in finders.items() if f.owner in self._inlined]:
            del finders[name]  # its additions belong to the block that calls it
        for name, given in self._given_more(finders).items():
            with contextlib.suppress(UntraceableError):
                block = trace_block(
                    finders[name].owner, arguments=given, batch_dim=self._batch_dim or 0
                )
                other = self._finder(name, block)
                if len(other.entries) < len(finders[name].entries):
                    finders[name] = other
        return finders, unreadable

    def _given_more(self, finders: dict[str, ResidualSums]) -> dict[str, dict[str, Any]]:
        """The arguments of children that were read without a tensor that their parent gives them.

        What a block adds may depend on it: ``x if shortcut is None else shortcut``.
        """
        found: dict[str, dict[str, Any]] = {}
        for parent in finders.values():
            for node in parent.nodes if self._example is None else ():
                if node.op != "call_module":
                    continue
                child = parent.owner.get_submodule(str(node.target))
                finder = finders.get(self._names[child])
                if finder is None or not finder.entries:
                    continue
                parameters = inspect.signature(type(child).forward.__get__(child)).parameters
                given = {**dict(zip(parameters, node.args, strict=False)), **node.kwargs}
                more = {
                    name: A_TENSOR
                    for name, value in given.items()
                    if name in parameters
                    and isinstance(value, fx.Node)
                    and not is_shape_node(value)
                    and finder.block.constants.get(name, ...) is None
                }
                if more:
                    found[self._names[child]] = {**finder.block.arguments, **more}
        return found

    def _read(self, module: nn.Module, inlined: Iterable[nn.Module] = ()) -> BlockGraph:
        name = self._names[module]
        if self._example is None or name not in self._example.first.calls:
            if not inlined:
                return self._children.read(module)
            return trace_block(
                module, batch_dim=self._batch_dim or 0, inlined=set(inlined)
            )
        return trace_block(
            module,
            arguments=self._example.first.calls[name],
            batch_dim=self._dimension(name),
            inlined=set(inlined),
            outputs=self._example.first.items,
        )

    def _dimension(self, name: str) -> int:
        """On which dimension a block gets the batch, as far as two batch sizes tell; else 0."""
        if self._batch_dim is not None or self._example is None:
            return self._batch_dim or 0
        shapes = self._example.argument_shapes(name).values()
        return next((dims[0] for pair in shapes if len(dims := differing_dims(*pair)) == 1), 0)

    def _find(self, name: str, module: nn.Module) -> ResidualSums:
        """The residual additions of ``module``, also where a child adds skip and branch for it."""
        plain = self._finder(name, self._read(module))
        joining = {
            child
            for node in plain.nodes
            if node.op == "call_module"
            and self._joins(child := module.get_submodule(str(node.target)))
        }
        while joining:
            try:
                deeper = self._finder(name, self._read(module, joining))
            except UntraceableError:
                joining = set()
                break
            used = {
                module.get_submodule(entry.split.add.meta["inlined"])
                for entry in deeper.entries
                if "inlined" in entry.split.add.meta
            }
            if used == joining:
                plain = deeper
                break
            joining = used
        # A child of which a part is used outside the branch too (a bias that is handed on, besides
        # the attention that it is for): only that part has to be computed for every row.
        leaking = {
            module.get_submodule(str(entry.leak.target)) for entry in plain.entries if entry.leak
        }
        if leaking:
            try:
                deeper = self._finder(name, self._read(module, joining | leaking))
            except UntraceableError:
                deeper = plain
            masked = [[e.action for e in f.entries].count("mask") for f in (deeper, plain)]
            if len(deeper.entries) == len(plain.entries) and masked[0] < masked[1]:
                plain, joining = deeper, joining | leaking
        self._inlined |= joining
        return plain

    def _finder(self, name: str, block: BlockGraph) -> ResidualSums:
        if self._example is None or name not in self._example.first.calls:
            return ResidualSums(block, self._children, batch_dim=self._batch_dim)
        shapes = cache(partial(self._example.shapes, name, block))
        arguments = cache(partial(self._example.argument_shapes, name))
        return ResidualSums(block, self._children, shapes, arguments, self._batch_dim)

    def _joins(self, module: nn.Module) -> bool:
        """Whether ``module`` adds two of its own inputs, one of them as it comes, and returns that.

        The residual of its parent then lies in both: post-norm blocks are written so.
        """
        if module not in self._joining:
            self._joining[module] = False
            self._joining[module] = self._does_join(module)
        return self._joining[module]

    def _does_join(self, module: nn.Module) -> bool:
        if next(module.children(), None) is None or next(module.parameters(), None) is None:
            return False
        try:
            block = self._read(module)
        except UntraceableError:
            return False
        finder = ResidualSums(block, self._children, batch_dim=self._batch_dim)
        inputs = {n for n in finder.nodes if n.op == "placeholder"}
        for node in finder.nodes:
            both = summands(node)
            if both is None:
                continue
            sides = [finder.nodes_in(finder.ancestors[side]) for side in both[:2]]
            for skip, branch in (sides, sides[::-1]):
                after = {
                    n
                    for n in finder.nodes
                    if finder.ancestors[n] >> finder.order[node] & 1
                    and n.op != "output"
                    and not is_shape_node(n)
                }
                if (
                    skip & inputs
                    and branch & inputs
                    and not skip & branch & inputs
                    and finder.has_parameters(branch)
                    and not finder.has_parameters(skip)
                    and self._children.linear_nodes(skip | after, module)
                ):
                    return True
        return False
