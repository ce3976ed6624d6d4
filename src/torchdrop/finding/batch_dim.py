"""LAYOUT: on which dimension a residual carries the batch, as far as the layers in it tell.

Attention and recurrent layers of torch have ``batch_first``; convolutions, batch norm and group
norm take the batch first. What such a layer says holds for a residual whose layout it shares: whose
skip and whose input come from one value, through nothing that could move dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from torchdrop.tracing.nodes import callee

__all__ = ["batch_dim_from_layers", "values_with_same_layout"]

_BATCH_FIRST = (_ConvNd, _BatchNorm, nn.GroupNorm)

_RESHAPING = (nn.Flatten, nn.Unflatten, nn.Fold, nn.Unfold, nn.PixelShuffle, nn.PixelUnshuffle)

# Functions and methods whose result has the dimensions of their inputs.
_KEEPING = {
    "add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_", "truediv", "div", "div_",
    "relu", "relu_", "gelu", "silu", "tanh", "sigmoid", "dropout", "dropout_", "layer_norm",
    "rms_norm", "clone", "contiguous", "to", "float", "half", "bfloat16", "double", "type_as",
}  # fmt: skip


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
        convolution = isinstance(module, _BATCH_FIRST)
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
        if next(module.children(), None) is not None or isinstance(module, _RESHAPING):
            return False
        # a norm or an activation of the user's own; one that permutes has no parameters
        of_torch = type(module).__module__.startswith("torch.nn.")
        return of_torch or next(module.parameters(), None) is not None
    return node.op in ("call_function", "call_method") and callee(node) in _KEEPING
