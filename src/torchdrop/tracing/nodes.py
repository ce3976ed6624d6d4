"""Questions about one node of a graph: whether it reads only shapes, which two values it adds."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from torchdrop.tracing.operations import (
    attribute,
    callee,
    is_function_of_table,
    named,
    operation_of,
    works_on_numbers,
)

__all__ = ["Summands", "is_shape_node", "reads_device", "summands"]


def is_shape_node(node: fx.Node) -> bool:
    """Whether ``node`` reads only the shape (or dtype, device) of tensors, not their values."""
    if node.op == "call_method":
        return named(str(node.target)).reads_shape
    if node.op != "call_function":
        return False
    if node.target is getattr:
        of = node.args[0]
        return attribute(str(node.args[1])).reads_shape or (
            isinstance(of, fx.Node) and is_shape_node(of)
        )
    if works_on_numbers(node.target):
        inputs = node.all_input_nodes
        return bool(inputs) and all(is_shape_node(i) for i in inputs)
    return False


def reads_device(node: fx.Node) -> bool:
    """Whether ``node`` reads the device of a tensor."""
    return operation_of(node).reads_device


class Summands(NamedTuple):
    """What a node adds: ``left + gain * right``.

    Attributes:
        left: The left summand.
        right: The right summand.
        gain: What the right summand is multiplied by.
        writes_left: Whether the sum is written into the memory of the left summand.
        pad_dim: The dimension on which the smaller summand is padded with zeros; None if both have
            the same size.
    """

    left: fx.Node
    right: fx.Node
    gain: float
    writes_left: bool
    pad_dim: int | None


def summands(node: fx.Node) -> Summands | None:
    """Return what ``node`` adds, if it is the sum of two different tensors; else None."""
    entry = operation_of(node)
    form = entry.sum
    if form is None or (node.op == "call_function" and not is_function_of_table(node.target)):
        return None
    positional = form.parameters if form.factor is None else form.parameters[:-1]
    if len(node.args) > len(positional):
        return None
    given = {**dict(zip(positional, node.args, strict=False)), **node.kwargs}
    factor = given.pop(form.factor, 1) if form.factor is not None else 1
    pad_dim = given.pop(form.pad_dim, None) if form.pad_dim is not None else None
    left, right = given.pop(form.left, None), given.pop(form.right, None)
    if given or not isinstance(factor, int | float):
        return None  # an argument that is not known here, such as out=
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if is_shape_node(left) or is_shape_node(right):
        return None
    written = callee(node) in entry.in_place
    return Summands(
        left, right, form.sign * factor, written, pad_dim if isinstance(pad_dim, int) else None
    )
