"""LAYOUT: on which dimension a residual carries the batch, as far as the layers in it tell.

Attention and recurrent layers of torch have ``batch_first``; convolutions, batch norm and group
norm take the batch first. What such a layer says holds for a residual whose layout it shares: whose
skip and whose input come from one value, through nothing that could move dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from torchdrop.tracing.operations import layers_with, operation_of

__all__ = ["batch_dim_from_layers", "values_with_same_layout"]


def batch_dim_from_layers(
    nodes: Iterable[fx.Node], owner: nn.Module, skip: fx.Node
) -> tuple[int | None, dict[str, int]]:
    """The dimension of ``skip`` that carries the batch, and what ``batch_first`` of whom tells it.

    None where nothing tells, or where two children with ``batch_first`` contradict each other.
    """
    mine = values_with_same_layout(skip, owner)
    others = False
    votes: dict[str, int] = {}
    for node in nodes:
        if node.op != "call_module" or not node.all_input_nodes:
            continue
        module = owner.get_submodule(str(node.target))
        batch_first = getattr(module, "batch_first", None)
        convolution = isinstance(module, layers_with("batch_first"))
        if not isinstance(batch_first, bool) and not convolution:
            continue
        if mine & values_with_same_layout(node.all_input_nodes[0], owner):
            if isinstance(batch_first, bool):
                votes[str(node.target)] = 0 if batch_first else 1
            else:
                others = True
    if votes:
        dims = set(votes.values())
        return (dims.pop() if len(dims) == 1 else None), votes
    return (0 if others else None), votes


def values_with_same_layout(node: fx.Node, owner: nn.Module) -> set[fx.Node]:
    """``node`` and the values that it is computed from without moving a dimension."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found and current.op != "get_attr":
            found.add(current)
            if _keeps(current, owner):
                pending.extend(current.all_input_nodes)
    return found


def _keeps(node: fx.Node, owner: nn.Module) -> bool:
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        if next(module.children(), None) is not None:
            return False
        if isinstance(module, layers_with("moves_dims")):
            return False
        # a norm or an activation of the user's own; one that permutes has no parameters
        of_torch = type(module).__module__.startswith("torch.nn.")
        return of_torch or next(module.parameters(), None) is not None
    return operation_of(node).keeps_layout
