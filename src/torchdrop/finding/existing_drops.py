"""Find what a model drops by itself: masking layers, loops that skip layers, random masks.

Masking layers are recognised by their class name, so that copies of the class in other packages
count as well. A forward may also multiply a branch by random numbers, one for each sample or one
for the whole batch, as ``x + drop_path(f(x), p, training)`` does. If torchdrop missed these, the
model and torchdrop would both drop the branch, and together more often than was asked for.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from torchdrop.layers.drop_path import drop_path
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.operation import MASK_RATE_ATTRIBUTES, RATE_NAMES
from torchdrop.tracing.operations import masks_branches, operation_of
from torchdrop.tracing.own_forward import own_forward
from torchdrop.tracing.padded_sums import ancestors

__all__ = [
    "find_drop_operation",
    "is_mask",
    "is_unscaled",
    "layer_rate",
    "layerdrop_of",
    "mask_rate",
]


def is_unscaled(model: nn.Module, masks: Sequence[str]) -> bool:
    """Whether one of the masking layers with the paths ``masks`` does not divide by 1 - p."""
    layers = (model.get_submodule(path) for path in masks)
    return any(getattr(layer, "scale_by_keep", True) is False for layer in layers)


def is_mask(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that drops whole residual branches by masking.

    Its class name says so, it has no children, and its drop probability can be read.
    """
    name = type(module).__name__
    known = masks_branches(name) or name.endswith("DropPath")
    return known and next(module.children(), None) is None and mask_rate(module) is not None


def mask_rate(module: nn.Module) -> float | None:
    """Return the drop probability of a masking layer; None if it has none that can be read."""
    return _rate_in(module, MASK_RATE_ATTRIBUTES)


def layer_rate(module: nn.Module) -> float | None:
    """Return the drop probability of a layer of any kind; None if it has none that can be read."""
    return _rate_in(module, RATE_NAMES)


def _rate_in(module: nn.Module, attributes: Iterable[str]) -> float | None:
    """Return the first of ``attributes`` of ``module`` that is a rate; None if there is none."""
    for attribute in attributes:
        value = getattr(module, attribute, None)
        if value is None and hasattr(module, attribute):
            return 0.0  # None means 0 in timm and transformers
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def layerdrop_of(module: nn.Module) -> tuple[Any, float] | None:
    """Return the object that holds the ``layerdrop`` of ``module``, and its value.

    ``layerdrop`` is the rate at which a forward skips whole layers of its loop.

    Returns:
        The object whose attribute ``layerdrop`` the forward of ``module`` reads (the module or its
        ``config``), and the value. None if the forward skips no layers.
    """
    for holder, name in ((module, "self"), (getattr(module, "config", None), "self.config")):
        rate = getattr(holder, "layerdrop", None)
        if not isinstance(rate, float) or not 0.0 < rate <= 1.0:
            continue
        # A config has the attribute in all modules that share it; only one of them skips layers.
        try:
            source = inspect.getsource(own_forward(module))
        except (OSError, TypeError):
            continue
        if f"{name}.layerdrop" in source:
            return holder, rate
    return None


def find_drop_operation(graph: fx.Graph, branch: fx.Node, skip: fx.Node) -> fx.Node | None:
    """Return the operation in the forward that drops whole samples of the branch, or None.

    This is a call of ``torchdrop.functional.drop_path``, or an operation that draws the random
    numbers by which the branch is multiplied, one number for each sample or one for the batch.
    Random numbers of any other shape are noise or dropout and do not count.

    Args:
        graph: The forward.
        branch: The operand that can be dropped.
        skip: The operand on the shortcut.
    """
    # The nodes that the branch is computed from, except for those that the skip needs as well.
    inside = (ancestors(branch) | {branch}) - ancestors(skip) - {skip}
    node: fx.Node
    for node in graph.nodes:
        if node not in inside:
            continue
        if node.target is drop_path and _p_of_call(node) != 0.0:
            return node
        if not operation_of(node).mask_factor:
            continue
        for factor in node.all_input_nodes:
            drawn = _draw_of_row_mask(factor)
            if drawn is not None:
                return drawn
    return None


def _p_of_call(node: fx.Node) -> Any:
    """Return the argument ``p`` of a call of ``drop_path``."""
    return node.kwargs.get("p", node.args[1] if len(node.args) > 1 else None)


def _draw_of_row_mask(factor: fx.Node) -> fx.Node | None:
    """Return the node that draws the random numbers of a mask of whole samples.

    None if ``factor`` is no such mask. A mask is computed from random numbers, one number for each
    sample or one for the batch, and not from an activation.
    """
    random = None
    pending, seen = [factor], set()
    while pending:
        node = pending.pop()
        if node in seen or is_shape_node(node) or node.op == "get_attr":
            continue
        seen.add(node)
        if node.op in ("placeholder", "call_module"):
            return None  # computed from an activation, so not a mask
        entry = operation_of(node)
        random = node if random is None and entry.draws_mask else random
        if entry.sizes is not None:
            if not _is_row_shape(_sizes(node.args[entry.sizes :], node)):
                return None
            continue  # its other inputs only determine the dtype and the device
        pending.extend(node.all_input_nodes)
    return random


def _sizes(args: Iterable[Any], node: fx.Node) -> Any:
    """Return the sizes of the tensor that ``node`` creates, from its arguments or ``size=``."""
    given = list(args) or [node.kwargs.get("size", ())]
    return given[0] if len(given) == 1 else given


def _is_row_shape(sizes: Any) -> bool:
    """Whether all sizes are 1, except for the first, which may be anything.

    Sizes are written as ``(x.shape[0], 1, 1)`` or as ``(x.shape[0],) + (1,) * (x.ndim - 1)``.
    """
    if isinstance(sizes, fx.Node) and sizes.target is operator.add:
        first, rest = sizes.args
        return _is_row_shape(first) and _are_ones(rest)
    if isinstance(sizes, list | tuple):
        return len(sizes) > 0 and all(_are_ones(size) for size in sizes[1:])
    return _are_ones(sizes)


def _are_ones(sizes: Any) -> bool:
    """Whether ``sizes``, a size or a sequence of sizes, can be read and are all 1."""
    if isinstance(sizes, list | tuple | torch.Size):
        return all(size == 1 for size in sizes)
    if isinstance(sizes, fx.Node):
        # (1,) * (x.ndim - 1)
        repeated = sizes.target is operator.mul
        return repeated and any(isinstance(a, list | tuple) and _are_ones(a) for a in sizes.args)
    return bool(sizes == 1)
