"""Infer the batch dimension of a residual tensor from the layers around it.

Attention and recurrent layers of torch have ``batch_first``. Convolutions, batch norm and group
norm take the batch on the first dimension. The input of such a layer tells the batch dimension of
the residual tensor if both are computed from the same value by operations that keep the order of
dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from torchdrop.tracing.operations import layers_with, operation_of

__all__ = ["batch_dim_from_layers", "values_with_same_layout"]


def batch_dim_from_layers(
    nodes: Iterable[fx.Node], owner: nn.Module, skip: fx.Node
) -> tuple[int | None, dict[str, int]]:
    """Return the batch dimension of ``skip`` according to the layers among ``nodes``.

    Args:
        nodes: The nodes of the forward.
        owner: The module that has the forward.
        skip: The residual tensor.

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
