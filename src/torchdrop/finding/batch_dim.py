"""Infer the batch dimension of a residual tensor from the layers around it.

Attention and recurrent layers of torch have ``batch_first``. Convolutions, batch norm and group
norm take the batch on the first dimension. The input of such a layer tells the batch dimension of
the residual tensor if both are computed from the same value by operations that keep the order of
dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx, nn

from torchdrop.tracing.block_graph import BlockGraph
from torchdrop.tracing.operations import layers_with, operation_of
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["batch_dim_from_layers", "values_with_same_layout"]


def batch_dim_from_layers(
    nodes: Iterable[fx.Node],
    owner: nn.Module,
    skip: fx.Node,
    read: Callable[[nn.Module], BlockGraph] | None,
) -> tuple[int | None, dict[str, int]]:
    """Return the batch dimension of ``skip`` according to the layers among ``nodes``.

    A module around a layer with ``batch_first`` tells it, too, if its forward can be read.

    Args:
        nodes: The nodes of the forward.
        owner: The module that has the forward.
        skip: The residual tensor.
        read: Returns the graph of a module, or raises :class:`UntraceableError`. None: what is
            inside modules does not count.

    Returns:
        The dimension, None if no layer tells it or two layers with ``batch_first`` contradict each
        other; and the dimension according to each layer with ``batch_first``, by its path.
    """
    same_layout = values_with_same_layout(skip, owner)
    other_layer_found = False
    votes: dict[str, int] = {}
    for node in nodes:
        if node.op != "call_module" or not node.all_input_nodes:
            continue
        module = owner.get_submodule(str(node.target))
        batch_first = getattr(module, "batch_first", None)
        has_flag = isinstance(batch_first, bool)
        if not has_flag and not isinstance(module, layers_with("batch_first")):
            if read is not None:
                votes.update(_votes_inside(node, owner, same_layout, read))
            continue
        if same_layout & values_with_same_layout(node.all_input_nodes[0], owner):
            if has_flag:
                votes[str(node.target)] = 0 if batch_first else 1
            else:
                other_layer_found = True
    if votes:
        dims = set(votes.values())
        return (dims.pop() if len(dims) == 1 else None), votes
    return (0 if other_layer_found else None), votes


def _votes_inside(
    call: fx.Node,
    owner: nn.Module,
    same_layout: set[fx.Node],
    read: Callable[[nn.Module], BlockGraph],
) -> dict[str, int]:
    """Return the batch dimension of a value according to the layers inside a child that gets it.

    Args:
        call: The call of the child.
        owner: The module whose forward calls it.
        same_layout: The value, and others with its layout.
        read: Returns the graph of a module, or raises :class:`UntraceableError`.
    """
    child = owner.get_submodule(str(call.target))
    flags = (getattr(m, "batch_first", None) for m in child.modules())
    if not any(isinstance(flag, bool) for flag in flags):
        return {}
    try:
        block = read(child)
    except UntraceableError:
        return {}
    votes: dict[str, int] = {}
    inputs = block.graph.find_nodes(op="placeholder")
    given = {**dict(zip(block.tensors, call.args, strict=False)), **call.kwargs}
    for name, value in zip(block.tensors, inputs, strict=True):
        outside = given.get(name)
        if isinstance(outside, fx.Node) and same_layout & values_with_same_layout(outside, owner):
            found = batch_dim_from_layers(block.graph.nodes, child, value, read)[1]
            votes.update({f"{call.target}.{path}": dim for path, dim in found.items()})
    return votes


def values_with_same_layout(node: fx.Node, owner: nn.Module) -> set[fx.Node]:
    """Return ``node`` and the values it is computed from without moving a dimension."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found and current.op != "get_attr":
            found.add(current)
            if _keeps_layout(current, owner):
                pending.extend(current.all_input_nodes)
    return found


def _keeps_layout(node: fx.Node, owner: nn.Module) -> bool:
    """Whether each dimension of the result of ``node`` corresponds to that of its input."""
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        if next(module.children(), None) is not None:
            return False
        if isinstance(module, layers_with("moves_dims")):
            return False
        # A layer that the user has written counts if it has parameters, as a norm has. A layer
        # without parameters may be a permutation.
        of_torch = type(module).__module__.startswith("torch.nn.")
        return of_torch or next(module.parameters(), None) is not None
    return operation_of(node).keeps_layout
