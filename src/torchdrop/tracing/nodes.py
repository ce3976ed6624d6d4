"""What a node of a graph is: whom it calls, whether it asks for more than shapes and dtypes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

__all__ = ["DEVICES", "callee", "is_shape_node", "passed_through"]

_READERS = {
    "size", "dim", "ndimension", "numel", "stride", "is_contiguous", "is_floating_point",
    "get_device", "type",
}  # fmt: skip
_FACTS = {
    "shape", "ndim", "dtype", "device", "is_cuda", "is_cpu", "is_nested", "layout", "requires_grad",
}  # fmt: skip
DEVICES = {"device", "is_cuda", "is_cpu", "get_device", "type"}
_ARITHMETIC = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv,
    operator.truediv, operator.mod, operator.neg, operator.eq, operator.ne, operator.lt,
    operator.le, operator.gt, operator.ge, operator.pow, int, float, bool, len, min, max, slice,
    torch.finfo, torch.iinfo,
}  # fmt: skip


def callee(node: fx.Node) -> str:
    """The name of the function or method that ``node`` calls; the path of the module."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_shape_node(node: fx.Node) -> bool:
    """Whether ``node`` reads only the shape (or dtype, device) of tensors, not their values."""
    if node.op == "call_method":
        return node.target in _READERS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        of = node.args[0]
        return node.args[1] in _FACTS or (isinstance(of, fx.Node) and is_shape_node(of))
    if node.target in _ARITHMETIC or getattr(node.target, "__module__", None) == "math":
        inputs = node.all_input_nodes
        return bool(inputs) and all(is_shape_node(i) for i in inputs)
    return False


def passed_through(value: Any, path: str, args: Any, kwargs: Any, rest: Any) -> Any:
    """Marks in a graph the output of a child that was looked through: its hooks belong here.

    ``args``, ``kwargs`` and the ``rest`` of a tuple are what the hooks are called with besides.
    """
    return value
