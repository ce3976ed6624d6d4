"""Read the forwards of all blocks of a model, with the arguments of an example if there is one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from functools import cache, partial
from typing import Any

from torch import fx, nn

from torchdrop.finding.added_later import leave_out_branches_that_nobody_adds
from torchdrop.finding.example_calls import Example
from torchdrop.finding.linearity import ModuleProperties
from torchdrop.finding.residual_sums import ResidualSums
from torchdrop.finding.row_layout import differing_dims
from torchdrop.finding.source_code import is_operation
from torchdrop.tracing.block_graph import BlockGraph, trace_block
from torchdrop.tracing.call_arguments import A_TENSOR, flatten_arguments
from torchdrop.tracing.handed_on_sums import returns_sum_of_inputs
from torchdrop.tracing.nodes import is_shape_node, summands
from torchdrop.tracing.own_forward import own_forward, signature_of_forward
from torchdrop.tracing.untraceable import DataDependentError, UntraceableError

__all__ = ["CONTAINERS", "BlockReader"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def candidates(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yield the modules that may be blocks: composite ones with a forward of their own."""
    for name, module in model.named_modules():
        # a block calls children, and its branch has parameters
        if next(module.children(), None) is None or next(module.parameters(), None) is None:
            continue
        if own_forward(module) in {p.forward for p in CONTAINERS}:
            continue
        # The layers of torch are not blocks, not even those with children (attention) or with an
        # observer as a child. The encoder and decoder layers of torch are.
        origin = type(module).__module__
        of_torch = origin.startswith(("torch.nn.modules.", "torch.ao.nn."))
        if isinstance(module, nn.MultiheadAttention) or (
            of_torch and not origin.endswith(".transformer")
        ):
            continue
        yield name, module


class BlockReader:
    """Reads the forwards of all blocks of one model.

    Args:
        model: The model.
        example: The arguments that each block is called with; None if there is no example.
        batch_dim: Which dimension of the residual tensors is the batch; None: to be found out.

    Attributes:
        branching_on_data: The paths of the blocks whose forward branches on data.
    """

    def __init__(self, model: nn.Module, example: Example | None, batch_dim: int | None) -> None:
        self._model = model
        self._names = {module: name for name, module in reversed(list(model.named_modules()))}
        self._example = example
        self._batch_dim = batch_dim
        self._children = ModuleProperties()
        self._adds_two_inputs: dict[nn.Module, bool] = {}
        self._inlined: set[nn.Module] = set()
        # Children that add two inputs and return the sum beside a norm of it.
        self._fused: set[nn.Module] = set()
        # The children that each module calls with a function, by its path.
        self._get_functions: dict[str, set[nn.Module]] = {}
        self.branching_on_data: set[str] = set()

    def read_all(self) -> tuple[dict[str, ResidualSums], dict[str, str]]:
        """Return the residual additions of all forwards that can be read, and why others cannot.

        The keys of both dicts are the paths of the modules.
        """
        finders: dict[str, ResidualSums] = {}
        unreadable: dict[str, str] = {}
        for name, module in candidates(self._model):
            try:
                finders[name] = self._find(name, module)
            except UntraceableError as error:
                unreadable[name] = str(error)
                if isinstance(error, DataDependentError):
                    self.branching_on_data.add(name)
        self._keep_blocks_that_get_functions(finders, unreadable)
        for found in (finders, unreadable):
            for name in [n for n in found if self._model.get_submodule(n) in self._inlined]:
                del found[name]  # its additions belong to the block that calls it
        for name, given in self._arguments_from_parents(finders).items():
            with contextlib.suppress(UntraceableError):
                block = trace_block(
                    finders[name].owner, arguments=given, batch_dim=self._batch_dim or 0
                )
                other = self._finder(name, block)
                if len(other.entries) < len(finders[name].entries):
                    finders[name] = other
        leave_out_branches_that_nobody_adds(finders.values(), self._read)
        return finders, unreadable

    def _keep_blocks_that_get_functions(
        self, finders: dict[str, ResidualSums], unreadable: dict[str, str]
    ) -> None:
        """Let children that get a function be blocks of their own if they can be read alone.

        Otherwise their additions belong to the block that calls them.
        """
        for name, children in self._get_functions.items():
            alone = [
                child
                for child in children
                if self._example is not None
                and self._names[child] in self._example.first.calls
                and (finder := finders.get(self._names[child])) is not None
                and finder.entries
            ]
            if alone and name in finders:
                kinds = ", ".join(sorted({type(child).__name__ for child in alone}))
                unreadable[name] = f"it passes a function to {kinds}, a block of its own"
                del finders[name]
            else:
                self._inlined |= children

    def _arguments_from_parents(
        self, finders: dict[str, ResidualSums]
    ) -> dict[str, dict[str, Any]]:
        """Return arguments of children to which their parent passes tensors that were left out.

        Without an example, an argument with the default None is left out when a child is traced.
        But what the child adds may depend on it: ``x if shortcut is None else shortcut``.
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
                parameters = signature_of_forward(child).parameters
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
        """Return the graph of ``module``, which includes the forwards of ``inlined``."""
        name = self._names[module]
        if self._example is None or name not in self._example.first.calls:
            if not inlined:
                return self._children.read(module)
            return trace_block(module, batch_dim=self._batch_dim or 0, inlined=set(inlined))
        return trace_block(
            module,
            arguments=self._example.first.calls[name],
            batch_dim=self._batch_dim_of_arguments(name),
            inlined=set(inlined),
            items=self._example.first.items,
        )

    def _batch_dim_of_arguments(self, name: str) -> int:
        """Return on which dimension the arguments of a block carry the batch; 0 if not known."""
        if self._batch_dim is not None or self._example is None:
            return self._batch_dim or 0
        shapes = self._example.argument_shapes(name).values()
        return next((dims[0] for pair in shapes if len(dims := differing_dims(*pair)) == 1), 0)

    def _find(self, name: str, module: nn.Module) -> ResidualSums:
        """Return the residual additions of ``module``.

        Children that add shortcut and branch for ``module`` are inlined, and so are children whose
        output is used inside and outside the branch, if that leaves fewer branches to mask.
        """
        plain = self._finder(name, self._read(module))
        plain, inlined = self._with_adding_children(name, module, plain)
        plain, inlined = self._with_leaking_children(name, module, plain, inlined)
        self._inlined |= inlined
        self._get_functions[name] = {
            module.get_submodule(path) for path in plain.block.inlined
        } - inlined
        return plain

    def _with_adding_children(
        self, name: str, module: nn.Module, plain: ResidualSums
    ) -> tuple[ResidualSums, set[nn.Module]]:
        """Inline the children that contain residual additions of ``module``.

        Args:
            name: The path of ``module``.
            module: The block.
            plain: Its residual additions if no child is inlined.

        Returns:
            The residual additions, and the children that are inlined.
        """
        adding = {
            child
            for node in plain.nodes
            if node.op == "call_module"
            and (
                (is_operation(child := module.get_submodule(str(node.target))) and _is_binary(node))
                or self._adds_inputs(child)
            )
        }
        while adding:
            try:
                deeper = self._finder(name, self._read(module, adding))
            except UntraceableError:
                readable = {child for child in adding if self._is_readable(module, child)}
                if readable == adding:
                    return plain, set()
                adding = readable
                continue
            used = self._fused & adding
            used |= {
                module.get_submodule(entry.split.add.meta["inlined"])
                for entry in deeper.entries
                if "inlined" in entry.split.add.meta
            }
            if used == adding:
                return deeper, adding
            adding = used
        return plain, set()

    def _is_readable(self, module: nn.Module, child: nn.Module) -> bool:
        """Whether the forward of ``module`` can be read if ``child`` is inlined."""
        try:
            self._read(module, {child})
        except UntraceableError:
            return False
        return True

    def _with_leaking_children(
        self, name: str, module: nn.Module, plain: ResidualSums, inlined: set[nn.Module]
    ) -> tuple[ResidualSums, set[nn.Module]]:
        """Inline children whose output is used inside and outside a branch, if that saves masks.

        An attention may return a bias for the following layers besides its output. If it is
        inlined, only the bias has to be computed for all rows. A child with residuals of its own is
        a block, and is not inlined. Arguments and results are those of
        :meth:`_with_adding_children`; ``inlined`` are the children that are inlined already.
        """
        leaking = {
            module.get_submodule(str(entry.leak.target)) for entry in plain.entries if entry.leak
        }
        if not leaking:
            return plain, inlined
        try:
            if any(self._finder(self._names[m], self._read(m)).entries for m in leaking):
                return plain, inlined
            deeper = self._finder(name, self._read(module, inlined | leaking))
        except UntraceableError:
            return plain, inlined
        masked, masked_before = (
            [entry.action for entry in finder.entries].count("mask") for finder in (deeper, plain)
        )
        if len(deeper.entries) == len(plain.entries) and masked < masked_before:
            return deeper, inlined | leaking
        return plain, inlined

    def _finder(self, name: str, block: BlockGraph) -> ResidualSums:
        """Return the residual additions of a graph, with the shapes of the example if known."""
        if self._example is None or name not in self._example.first.calls:
            return ResidualSums(block, self._children, batch_dim=self._batch_dim)
        shapes = cache(partial(self._example.shapes, name, block))
        arguments = cache(partial(self._example.argument_shapes, name))
        return ResidualSums(block, self._children, shapes, arguments, self._batch_dim)

    def _count_tensors(self, module: nn.Module) -> int:
        """Return how many of the arguments that ``module`` is traced with are tensors."""
        call = None if self._example is None else self._example.first.calls.get(self._names[module])
        if call is not None:
            return len(flatten_arguments(call)[1])
        kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        try:
            parameters = signature_of_forward(module).parameters.values()
        except (TypeError, ValueError):  # it cannot be read either
            return 0
        return sum(p.default is p.empty and p.kind not in kinds for p in parameters)

    def _adds_inputs(self, module: nn.Module) -> bool:
        """Whether ``module`` adds a branch of one input to another input, and returns the sum.

        Then it contains the residual addition of its parent, as in many post-norm blocks.
        """
        if module not in self._adds_two_inputs:
            self._adds_two_inputs[module] = False  # in case the module contains itself
            self._adds_two_inputs[module] = self._does_add_inputs(module)
        return self._adds_two_inputs[module]

    def _does_add_inputs(self, module: nn.Module) -> bool:
        """Return the result of :meth:`_adds_inputs` by tracing ``module``."""
        if next(module.parameters(), None) is None or self._count_tensors(module) < 2:
            return False
        try:
            block = self._read(module)
        except UntraceableError:
            return False
        no_children = next(module.children(), None) is None
        if returns_sum_of_inputs(block.graph) and (
            no_children or self._children.linear_nodes(block.graph.nodes, module)
        ):
            self._fused.add(module)  # a norm of the sum, not a block
            return True
        if no_children:
            return False
        finder = ResidualSums(block, self._children, batch_dim=self._batch_dim)
        if any(not entry.why_not for entry in finder.entries):
            return False  # a block with residuals of its own
        inputs = {n for n in finder.nodes if n.op == "placeholder"}
        for node in finder.nodes:
            operands = summands(node)
            if operands is None:
                continue
            left, right = (finder.nodes_in(finder.ancestors[n]) for n in operands[:2])
            after = {
                n
                for n in finder.nodes
                if finder.ancestors[n] >> finder.order[node] & 1
                and n.op != "output"
                and not is_shape_node(n)
            }
            for skip, branch in ((left, right), (right, left)):
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


def _is_binary(call: fx.Node) -> bool:
    """Whether a child is called with more than one value that the forward has computed."""
    return len(call.all_input_nodes) > 1
