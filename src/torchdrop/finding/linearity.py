"""Decide whether modules and operations are linear, and into which tensors they write."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchdrop.finding.existing_drops import is_mask
from torchdrop.tracing.block_graph import BlockGraph, trace_block
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.operations import (
    layers_with,
    named,
    operation_of,
    writes_first_argument,
)
from torchdrop.tracing.own_forward import own_forward
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["ModuleProperties", "depends_on_input", "is_nonlinear_function"]


def is_nonlinear_function(name: str) -> bool:
    """Whether ``name`` is the name of a function of torch that is not linear (an activation)."""
    # Functions of one tensor are methods as well; torch also has many names of other kinds.
    known = hasattr(nn.functional, name) or (hasattr(torch, name) and hasattr(Tensor, name))
    entry = named(name)
    return known and not name.startswith("_") and not (entry.linear or entry.product)


def depends_on_input(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether ``node`` is computed from an argument of the forward, not only from parameters.

    Sizes do not count: they do not depend on the values in the argument.

    Args:
        node: The node.
        memo: The results for nodes that were asked about before; new results are added.
    """
    if node not in memo:
        if node.op == "placeholder":
            memo[node] = True
        elif node.op == "get_attr" or is_shape_node(node):
            memo[node] = False
        else:
            memo[node] = any(depends_on_input(i, memo) for i in node.all_input_nodes)
    return memo[node]


class ModuleProperties:
    """Tells whether a module is linear and whether it writes into its input, and caches this."""

    def __init__(self) -> None:
        self._graphs: dict[nn.Module, BlockGraph | UntraceableError] = {}
        self._linear: dict[nn.Module, bool] = {}
        self._writing: dict[nn.Module, bool] = {}

    def read(self, module: nn.Module) -> BlockGraph:
        """Return the graph of ``module``, traced without the arguments of an example."""
        if module not in self._graphs:
            try:
                self._graphs[module] = trace_block(module)
            except UntraceableError as error:
                self._graphs[module] = error
        found = self._graphs[module]
        if isinstance(found, UntraceableError):
            raise found
        return found

    def linear(self, module: nn.Module) -> bool:
        """Whether ``module`` is linear or affine. Norms, pooling and dropout count as linear."""
        if module not in self._linear:
            self._linear[module] = True  # ends the recursion if the module calls itself
            self._linear[module] = self._is_linear(module)
        return self._linear[module]

    def _is_linear(self, module: nn.Module) -> bool:
        """Return the result of :meth:`linear` by its class, else by tracing ``module``."""
        # A mask scales whole samples; modules for quantisation only observe or round values.
        if is_mask(module) or type(module).__module__.startswith("torch.ao.quantization"):
            return True
        # A norm that the model defines itself, such as an RMSNorm.
        if type(module).__name__.endswith("Norm") and next(module.children(), None) is None:
            return True
        if _has_forward_of(module, (nn.Sequential,)):
            return all(self.linear(child) for child in module.children())
        linear_layers = layers_with("linear", "product")
        if _has_forward_of(module, linear_layers):
            return True
        # Any other layer of torch: its activations.
        if type(module).__module__.startswith("torch.nn.modules") and not any(module.children()):
            return False
        try:
            nodes = self.read(module).graph.nodes
        except UntraceableError:
            # For example a convolution that pads by the size of its input. Its class decides,
            # except that fused layers (ConvBnReLU2d) subclass the convolution.
            by_class = isinstance(module, linear_layers) and "ReLU" not in type(module).__name__
            return by_class and all(map(self.linear, module.children()))
        return self.linear_nodes(nodes, module)

    def linear_nodes(self, nodes: Iterable[fx.Node], owner: nn.Module) -> bool:
        """Whether every one of ``nodes``, a part of the forward of ``owner``, is linear."""
        memo: dict[fx.Node, bool] = {}
        return all(self._linear_node(node, owner, memo) for node in nodes)

    def _linear_node(self, node: fx.Node, owner: nn.Module, memo: dict[fx.Node, bool]) -> bool:
        """Whether ``node`` is linear; ``memo`` is that of :func:`depends_on_input`."""
        if node.op == "call_module":
            return self.linear(owner.get_submodule(str(node.target)))
        if node.op in ("placeholder", "output") or not depends_on_input(node, memo):
            return True
        entry = operation_of(node)
        if entry.product:
            # A product is linear if one factor at most depends on the input.
            factors = [i for i in node.all_input_nodes if depends_on_input(i, memo)]
            return len(factors) <= 1 and not (
                # all_input_nodes lists x once for the square x * x, the arguments list it twice
                sum(a in factors for a in node.args if isinstance(a, fx.Node)) > 1
            )
        if entry.pools:
            # max(x, dim) counts as a pool; max(x, y), of two tensors, is an activation.
            return len(node.all_input_nodes) == 1
        return entry.linear

    def writes_input(self, module: nn.Module) -> bool:
        """Whether ``module`` writes into an argument; False if its forward cannot be read."""
        if module not in self._writing:
            self._writing[module] = False
            self._writing[module] = self._does_write(module)
        return self._writing[module]

    def _does_write(self, module: nn.Module) -> bool:
        """Return the result of :meth:`writes_input` by its class, else by tracing ``module``."""
        if type(module).__module__.startswith("torch.nn.modules") and not any(module.children()):
            return bool(getattr(module, "inplace", False))
        if _has_forward_of(module, (nn.Sequential,)):
            # A child gets the memory of the input only if all children before it return views.
            for child in module.children():
                if self.writes_input(child):
                    return True
                if not isinstance(child, layers_with("view")):
                    return False
            return False
        try:
            nodes = self.read(module).graph.nodes
        except UntraceableError:
            return False
        written = (self.written(node, module) for node in nodes)
        return any(node is not None and node.op == "placeholder" for node in written)

    def written(self, node: fx.Node, owner: nn.Module) -> fx.Node | None:
        """Return the node that allocated the memory that ``node`` writes into; None if it does not.

        Args:
            node: A node of the forward of ``owner``.
            owner: The module that has the forward.
        """
        if not node.args or not self._writes(node, owner):
            return None
        return self.storage(node.args[0], owner)

    def _writes(self, node: fx.Node, owner: nn.Module) -> bool:
        """Whether the call of ``node`` writes into its first argument."""
        if node.op == "call_module":
            return self.writes_input(owner.get_submodule(str(node.target)))
        return writes_first_argument(node)

    def storage(self, node: Any, owner: nn.Module) -> fx.Node | None:
        """Return the node that allocated the memory of ``node``; None if no node did.

        Views and in-place operations return the memory of their first argument.
        """
        while isinstance(node, fx.Node):
            is_view = operation_of(node).view or self._writes(node, owner)
            if node.op == "call_module":
                module = owner.get_submodule(str(node.target))
                is_view = is_view or isinstance(module, layers_with("view"))
            if not is_view or not node.args:
                return node
            node = node.args[0]
        return None


def _has_forward_of(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether ``module`` is one of ``kinds`` and has not overridden the forward."""
    mine = own_forward(module)
    return isinstance(module, kinds) and any(
        mine is base.__dict__.get("forward") for base in _forwards(kinds)
    )


@cache
def _forwards(kinds: tuple[type[nn.Module], ...]) -> list[type[nn.Module]]:
    """Return the classes of torch that define the forwards of ``kinds``."""
    return list({base for kind in kinds for base in kind.__mro__ if "forward" in base.__dict__})
