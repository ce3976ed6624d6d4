"""Replace a proxy by its value where a forward uses it as a key of a dict, a set or a cache.

A key of the user's dict has to be the size, dtype or device itself. So tracing stops where a proxy
would become a key, and starts again with the value in place of the proxy. A recorded decision makes
sure that the graph is used for calls with this value only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.operations import callee
from torchdrop.tracing.untraceable import DataDependentError, UntraceableError

if TYPE_CHECKING:
    from torchdrop.tracing.tracer import ForwardTracer

__all__ = ["FixedValues", "UsedAsKeyError"]


class UsedAsKeyError(BaseException):
    """Raised where a proxy would become a key. Not an Exception, so that no forward catches it."""


class FixedValues:
    """The values that are fixed in a graph because the forward uses them as keys.

    Args:
        tracer: The tracer.
        expressions: Texts that name the values to fix, found in earlier attempts to trace the
            forward. :meth:`fix_in_next_attempt` adds to it.
    """

    def __init__(self, tracer: ForwardTracer, expressions: set[str]) -> None:
        self._tracer = tracer
        self._expressions = expressions

    def __bool__(self) -> bool:
        return bool(self._expressions)

    def fix_in_next_attempt(self, node: fx.Node) -> None:
        """Stop tracing, and have the next attempt fix the value of ``node``.

        Raises:
            UsedAsKeyError: The value is known.
            UntraceableError: The value is not known, or fixing it did not help.
        """
        expression = self._expression(node)
        if expression in self._expressions:
            raise UntraceableError(f"it uses {node.name} as a key")
        self.value(node)
        self._expressions.add(expression)
        raise UsedAsKeyError(expression)

    def has(self, node: fx.Node) -> bool:
        """Whether the value of ``node`` is fixed."""
        return is_shape_node(node) and self._expression(node) in self._expressions

    def has_attribute(self, of: fx.Node, name: str) -> bool:
        """Whether the attribute ``name`` of ``of`` is fixed."""
        return f"getattr({self._expression(of)}, {name})" in self._expressions

    def value(self, node: fx.Node) -> Any:
        """Return the value of ``node``, and record that the graph is valid for this value only."""
        tracer = self._tracer
        try:
            value = self._from_arguments(node, 1)
        except LookupError:
            return self._assumed_or_computed(node)
        if value != self._from_arguments(node, 2):
            raise _depends_on_the_batch()
        tracer.require_value(node, value)
        return value

    def _from_arguments(self, node: fx.Node, times: int) -> Any:
        """Return the value of ``node`` for a batch ``times`` as large as in the traced call.

        Raises:
            LookupError: The value does not follow from the arguments alone.
        """
        if node.op == "placeholder":
            return self._tracer.argument_without_data(node, times)
        if not is_shape_node(node):
            raise LookupError(node)
        args: Any
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: self._from_arguments(n, times)
        )
        if node.target is getattr and args[1] == "device":
            return args[0]._torchdrop_device
        if callee(node) in ("is_cuda", "is_cpu", "get_device", "type"):
            raise LookupError(node)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _assumed_or_computed(self, node: fx.Node) -> Any:
        """Return the value of ``node`` in the example call, or assume that of a parameter."""
        tracer = self._tracer
        if tracer.has_example:
            try:
                value = tracer.value_from_shapes(node)
                other = tracer.value_from_shapes(node, larger=True)
            except LookupError:
                raise DataDependentError("it uses a value of a tensor as a key") from None
            if isinstance(value, Tensor):
                raise DataDependentError("it uses a tensor as a key")
            if value != other:
                raise _depends_on_the_batch()
            return value
        parameter = next(tracer.root.parameters(), None)
        source = tracer.first_argument()
        if parameter is None or source is None or node.target is not getattr:
            raise _unknown(node)
        name = str(node.args[1])
        if name == "dtype" and node.args[0] is not source:
            raise _unknown(node)
        if name not in ("device", "dtype"):
            raise _unknown(node)
        # assume that of the parameters; the forward is traced again for a call with another one
        value = getattr(parameter, name)
        tracer.require_value(tracer.attribute_node(source, name), value)
        return value

    def _expression(self, node: fx.Node) -> str:
        """Return a text that names ``node`` in the same way each time the forward is traced."""
        if node.op == "placeholder":
            return str(node.target)
        if is_shape_node(node):
            parts = [
                self._expression(a) if isinstance(a, fx.Node) else str(a)
                for a in (*node.args, *node.kwargs.items())
            ]
            return f"{callee(node)}({', '.join(parts)})"
        alike = (n for n in node.graph.nodes if (n.op, n.target) == (node.op, node.target))
        place = next(i for i, n in enumerate(alike) if n is node)
        return f"{callee(node)}#{place}"


def _depends_on_the_batch() -> UntraceableError:
    return UntraceableError("it uses a size that depends on the batch as a key of a dict or cache")


def _unknown(node: fx.Node) -> UntraceableError:
    """Return the error for a key whose value is not known."""
    return UntraceableError(
        f"it uses {node.name} as a key of a dict, a set or a cache, and its value is not known; "
        f"give example_inputs"
    )
