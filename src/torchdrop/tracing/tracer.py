"""Trace a forward: call it with proxies that record each operation.

Where the forward branches on a shape, a dtype or a flag, the proxies answer as in the example
call, and the answer is recorded, so that later calls can be compared with it. Where it branches on
data, tracing fails.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchdrop.internals import (
    DisableTorchFunction,
    NotAParameter,
    count_dispatch_modes,
    function_modes,
    innermost_saved_tensor_hooks,
    replace_checkpoints,
    tensors_of_tracer,
    wrap_functions_of,
)
from torchdrop.tracing.asked_class import asked_by_isinstance
from torchdrop.tracing.call_arguments import A_TENSOR, flatten_arguments
from torchdrop.tracing.calls_of_forward import CallWatch
from torchdrop.tracing.checkpoint import Checkpoint
from torchdrop.tracing.constants import Constants
from torchdrop.tracing.doubles import is_called_by_torch
from torchdrop.tracing.fixed_values import FixedValues
from torchdrop.tracing.modes import Modes, current_modes, kinds_of_change
from torchdrop.tracing.nodes import is_shape_node, reads_device
from torchdrop.tracing.operations import (
    attribute,
    factories,
    in_place_operators,
    is_function_of_table,
    named,
    operation_of,
    writes_first_argument,
)
from torchdrop.tracing.own_forward import own_forward
from torchdrop.tracing.shape_facts import NeedsDataError, ShapeFacts, meta_double
from torchdrop.tracing.traced_functions import passed_through
from torchdrop.tracing.untraceable import DataDependentError, UntraceableError
from torchdrop.tracing.watched_attributes import AttributeWatch

__all__ = ["ForwardTracer"]

# Not traced, because the generated forward would run this part without the hooks.
_RUNS_UNDER_HOOKS = "it runs a part of itself under saved-tensor hooks"


class _Proxy(NotAParameter, fx.Proxy):
    """A proxy that records ``x += y`` as an in-place addition; fx records ``x = x + y``.

    Where Python needs a number or a length, the proxy gives that of the example call.
    """

    tracer: ForwardTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance(x, Tensor) has to be true for the arguments that are tensors. Functions of
        # torch written in C ask for the class as well and would read the memory of a Tensor, so
        # they get the real class.
        if self.node.op == "placeholder" and asked_by_isinstance(sys._getframe(1)):
            return Tensor
        return _Proxy

    def __getattr__(self, name: str) -> Any:
        tracer, is_shape = self.tracer, attribute(name).reads_shape
        if is_shape and tracer.fixed and tracer.fixed.has_attribute(self.node, name):
            return tracer.fixed_attribute(self.node, name)
        return tracer.track(_Attribute(self, name))

    def __hash__(self) -> int:
        if not is_called_by_torch():
            # raises: tracing starts again with the value in place of this proxy
            self.tracer.fixed.fix_in_next_attempt(self.node)
        return id(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        return self.tracer.length(self)

    def __int__(self) -> int:
        return int(self.tracer.number(self))

    def __float__(self) -> float:
        return float(self.tracer.number(self))

    def __index__(self) -> int:
        return operator.index(self.tracer.number(self))


class _Attribute(fx.proxy.Attribute, _Proxy):
    """An attribute of a proxy, such as ``x.shape``. It becomes a node when it is used."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return _Attribute


def _define_in_place_method(in_place: Callable[..., Any], plain: Callable[..., Any]) -> None:
    """Define the method of ``_Proxy`` for an operator such as ``+=``."""

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        # numbers have no memory to write into
        target = plain if is_shape_node(self.node) else in_place
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    setattr(_Proxy, f"__{in_place.__name__}__", method)


for _in_place, _plain in in_place_operators():
    _define_in_place_method(_in_place, _plain)


_FACTORIES = factories()


def _methods_being_called(kind: type) -> tuple[str, ...]:
    """Return the names of the methods of ``kind`` that are being called, except ``forward``."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name == "forward" and "root_fn" in frame.f_code.co_freevars:
            break  # the tracer itself
        function = inspect.unwrap(getattr(kind, name, _methods_being_called))
        if getattr(function, "__code__", None) is frame.f_code and name != "forward":
            found.append(name)
        frame = frame.f_back
    return tuple(found)


def _without_values(path: str, value: Any) -> Any:
    """Return ``value`` without its data; A_TENSOR if its shape is not known or it is nested."""
    if value is A_TENSOR or value.is_nested:
        return A_TENSOR
    if type(value) in (Tensor, nn.Parameter):
        with DisableTorchFunction():  # not an operation of the forward: it is not recorded
            return meta_double(value)
    return meta_double(value)


def _is_function(value: Any) -> bool:
    """Whether ``value`` is a function or a module that a child may call."""
    return isinstance(value, FunctionType | BuiltinFunctionType | MethodType | partial | nn.Module)


def _uses_the_block(value: Any) -> bool:
    """Whether ``value`` is a function that may use tensors or modules of the traced block."""
    if isinstance(value, FunctionType):
        return value.__closure__ is not None
    return _is_function(value) and not isinstance(value, BuiltinFunctionType)


def _accepts(function: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether ``function`` has parameters for these arguments; it may lack ``out=``, say."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


class ForwardTracer(fx.Tracer):
    """Traces one module's own forward; the call of a child module is a single node.

    Args:
        arguments: The arguments by name of a call that happened; None if there was none.
        training: Whether the forward is read in training mode.
        batch_dim: Which dimension of the arguments is the batch.
        inlined: The children whose own forwards become part of the graph.
        fixed: The values that the forward uses as keys, as :class:`FixedValues` names them. Tracing
            adds to it.
        imported: The names of modules whose import was tried; see :class:`CallWatch`. Tracing adds
            to it.

    Attributes:
        arguments: The arguments by name that the forward is read with.
        tensors: The names of the arguments that are tensors, which are the placeholders.
        constants: The other arguments, by name.
        tensor_constants: Runs and records the operations on tensors that are no proxies.
        modes_outside: The modes that are active around the forward.
        calls: Which functions the forward calls.
        watch: What the forward gets in place of its attributes, and which of them it read.
        fixed: The values that the forward uses as keys, which are fixed in the graph.
        proxies: Weak references to all proxies, to free those that the forward has stored.
        saved_tensor_hooks: The innermost saved-tensor hooks around the forward. Whoever starts the
            trace sets it.
        decisions: The nodes that the forward branched on and whose values follow from the arguments
            without computing anything, with their truth values.
        uses_inner_shapes: Whether the forward used the shape of a value that it computes, or the
            device of an argument.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        arguments: Mapping[str, Any] | None,
        training: bool,
        batch_dim: int,
        inlined: Collection[nn.Module],
        fixed: set[str],
        imported: set[str],
    ) -> None:
        wrapped: tuple[Any, ...] = (*_FACTORIES, torch.finfo, torch.iinfo)
        super().__init__(autowrap_modules=(math,), autowrap_functions=wrapped)
        self._batch_dim = batch_dim
        self._inlined = inlined
        wrap_functions_of(self, torch)
        self._arguments_of_call = arguments
        self._training = training
        self._thread = threading.get_ident()
        self.modes_outside = current_modes()
        self._function_modes, self._dispatch_modes = function_modes(), count_dispatch_modes()
        self.arguments: dict[str, Any] = {}
        self.tensors: list[str] = []
        self.constants: dict[str, Any] = {}
        self.watch = AttributeWatch()
        self.tensor_constants = Constants(self, _FACTORIES)
        self.fixed = FixedValues(self, fixed)
        self.proxies: list[weakref.ref[fx.Proxy]] = []
        self.calls = CallWatch(imported)
        self.decisions: dict[fx.Node, bool] = {}
        self.uses_inner_shapes = False
        self.saved_tensor_hooks: Any = None
        self._without_data: dict[Any, Tensor] = {}  # by node; by name until there are nodes
        self._shape_facts: dict[bool, ShapeFacts] = {}  # by whether the batch is enlarged
        self._working_out_shapes = False
        self._inlined_path = ""  # the child whose forward is being traced
        self._checkpoints: tuple[Checkpoint, ...] = ()  # those that the forward has entered

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a new proxy of ``node``."""
        proxy: fx.Proxy = self.track(_Proxy(node, self))
        return proxy

    def track(self, proxy: Any) -> Any:
        """Return ``proxy``, and remember it, to make sure that it is freed after tracing."""
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the call of ``m`` is a single node."""
        return m not in self._inlined

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record the call of a child, or the operations of its own forward."""
        # fx patches nn.Module itself, so this is called by other threads that run a model, too.
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if self._working_out_shapes:  # without the hooks of the user
            return m.forward(*args, **kwargs)
        path = self.path_of_module(m)
        gets_function = m not in self._inlined and any(
            map(_uses_the_block, (*args, *kwargs.values()))
        )
        if gets_function:
            # A function is no value of a graph, and it may use tensors of the block.
            self._inlined = {*self._inlined, m}
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        # If the block's training flag is the one it is traced with, the child's own flag counts,
        # since a child may be frozen; otherwise the child gets the flag of the trace.
        training = m.training if self.root.training == self._training else self._training
        double = self.watch.double_of_module(m, training, f"{path}.")
        self._inlined_path, outer_path = path, self._inlined_path
        try:
            value = super().call_module(m, partial(own_forward(m), double), args, kwargs)
        except DataDependentError as error:
            if not gets_function:
                raise
            # the child alone branches on data, which does not keep the block from being dropped
            raise UntraceableError(str(error)) from None
        self._inlined_path = outer_path
        first, *rest = value if isinstance(value, tuple) else (value,)
        given = [None if _is_function(a) else a for a in args]
        named_ones = {k: None if _is_function(a) else a for k, a in kwargs.items()}
        first = self.create_proxy(
            "call_function", passed_through, (first, path, tuple(given), named_ones, rest), {}
        )
        if not isinstance(value, tuple):
            return first
        named_tuple: Any = type(value)
        return (first, *rest) if named_tuple is tuple else named_tuple(first, *rest)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a parameter or buffer of the block as a node."""
        if threading.get_ident() != self._thread or self._working_out_shapes:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any
    ) -> Any:
        """Record an operation; a fused one as the plain operations that it consists of.

        Where the value of the operation is fixed (:class:`FixedValues`), return the value instead
        of a proxy.
        """
        if kind == "call_method":
            spelled_out = named(target).spelled_out
        elif kind == "call_function" and is_function_of_table(target):
            spelled_out = named(target.__name__).spelled_out
        else:
            spelled_out = None
        if spelled_out is not None and _accepts(spelled_out, args, kwargs):
            return spelled_out(*args, **kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **options)
        self.tensor_constants.note_write(writes_first_argument(proxy.node), args, kwargs)
        if self.fixed and self.fixed.has(proxy.node):
            return self.fixed.value(proxy.node)
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add an operation to the graph.

        Raises:
            UntraceableError: It runs under a function mode, a dispatch mode or saved-tensor hooks
                that the forward entered.
        """
        modes = self._modes_now()
        if innermost_saved_tensor_hooks()[1] != self.saved_tensor_hooks:
            raise UntraceableError(_RUNS_UNDER_HOOKS)
        node = super().create_node(*args, **kwargs)
        if operation_of(node).sum is not None:
            methods = _methods_being_called(type(self.root))
            if methods:
                node.meta["methods"] = methods
        if self._inlined_path:
            node.meta["inlined"] = self._inlined_path
        if self._checkpoints:
            node.meta["checkpoints"] = self._checkpoints
        if modes != self.modes_outside:
            node.meta["modes"] = modes
            self.calls.modes |= kinds_of_change(self.modes_outside, modes)
        return node

    @contextmanager
    def _inside_checkpoint(self, options: dict[str, Any], args: Sequence[Any]) -> Iterator[None]:
        """Record that the operations inside the ``with`` belong to one checkpoint."""
        if self._working_out_shapes:
            yield
            return
        outside = self._checkpoints
        self._checkpoints = (
            *outside,
            Checkpoint(options, any(isinstance(a, fx.Proxy) for a in args)),
        )
        try:
            yield
        finally:
            self._checkpoints = outside

    def _modes_now(self) -> Modes:
        """Return the gradient, autocast and similar modes (:class:`Modes`) that are active.

        Raises:
            UntraceableError: The forward entered a TorchFunctionMode or a TorchDispatchMode.
        """
        own = [m for m in function_modes() if not isinstance(m, Constants)]
        if count_dispatch_modes() > self._dispatch_modes or any(
            all(mode is not other for other in self._function_modes) for mode in own
        ):
            raise UntraceableError(
                "a part of it runs under a TorchFunctionMode or TorchDispatchMode of its own"
            )
        return current_modes()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Return the forward and its arguments, with a proxy for each tensor."""
        # again: they may have changed since the tracer was made
        self.modes_outside = current_modes()
        self._function_modes, self._dispatch_modes = function_modes(), count_dispatch_modes()
        # fx passes the forward of the class, which may have been replaced on the instance
        root_fn = own_forward(self.root)
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        for parameter in parameters:
            name = parameter.name
            if self._arguments_of_call is not None and name in self._arguments_of_call:
                value = self._arguments_of_call[name]
            elif parameter.kind is parameter.VAR_POSITIONAL:
                value = ()
            elif parameter.kind is parameter.VAR_KEYWORD:
                value = {}
            elif parameter.default is not parameter.empty:
                value = parameter.default
            else:
                # A recorded call has all its arguments; one that is given by hand may lack some.
                value = None if self._arguments_of_call is not None else A_TENSOR
            self.arguments[name] = value
        self.arguments = flatten_arguments(self.arguments, _without_values)[0]

        def placeholder(path: str, value: Any) -> Any:
            if value is not A_TENSOR:
                self._without_data[path] = value
            return self.create_proxy("placeholder", re.sub(r"\W", "_", path), (), {})

        values, tensors, self.constants = flatten_arguments(self.arguments, placeholder)
        self.tensors = list(tensors)
        self._without_data = {
            tensors[path].node: value for path, value in self._without_data.items()
        }
        positional: list[Any] = [self.watch.double_of_module(self.root, self._training)]
        by_name: dict[str, Any] = {}
        for parameter in parameters:
            value = values[parameter.name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional.extend(value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                by_name.update(value)
            elif parameter.kind is parameter.KEYWORD_ONLY:
                by_name[parameter.name] = value
            else:
                positional.append(value)

        def forward(*args: Any) -> Any:
            with (
                self.calls.watching(root_fn, self.works_out_shapes),
                replace_checkpoints(self._inside_checkpoint),
            ):
                return root_fn(*args, **by_name)

        return forward, positional

    def fixed_attribute(self, of: fx.Node, name: str) -> Any:
        """Return the value of an attribute that is fixed in the graph."""
        return self.fixed.value(self.attribute_node(of, name))

    def attribute_node(self, of: fx.Node, name: str) -> fx.Node:
        """Record that an attribute is read, and return the node."""
        node: fx.Node = (
            super().create_proxy("call_function", getattr, (self.proxy(of), name), {}).node
        )
        return node

    @property
    def has_example(self) -> bool:
        """Whether the arguments of a call are known."""
        return self._arguments_of_call is not None

    def first_argument(self) -> fx.Node | None:
        """Return the node of the first argument that is a tensor."""
        return next((n for n in self.graph.nodes if n.op == "placeholder"), None)

    def argument_without_data(self, node: fx.Node, times: int) -> Tensor:
        """Return the tensor without data of an argument, with a batch ``times`` times as large.

        An argument that does not have the batch size of the first one is returned as it is.
        """
        value, dim = self._without_data[node], self._batch_dim
        first = next(iter(self._without_data.values()))
        if times == 1 or value.dim() <= dim or first.dim() <= dim:
            return value
        if value.shape[dim] != first.shape[dim]:
            return value
        shape = list(value.shape)
        shape[dim] *= times
        with DisableTorchFunction():
            larger = torch.empty(shape, dtype=value.dtype, device="meta")
        larger._torchdrop_device = value._torchdrop_device  # type: ignore[attr-defined]
        return larger

    def require_value(self, node: fx.Node, value: Any) -> None:
        """Record that the graph is valid only for calls in which ``node`` has this value."""
        asked = super().create_proxy("call_function", operator.eq, (self.proxy(node), value), {})
        self.decisions[asked.node] = True

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Return the truth value of ``obj`` if it follows from shapes, dtypes and devices."""
        try:
            decision = bool(self._from_arguments(obj.node))
        except LookupError:
            try:
                known = self.value_from_shapes(obj.node)
            except NeedsDataError:
                raise DataDependentError("it branches on the values of a tensor") from None
            except LookupError:
                return super().to_bool(obj)
            if isinstance(known, Tensor):
                raise DataDependentError("it branches on the values of a tensor") from None
            return bool(known)
        self.decisions[obj.node] = decision
        return decision

    def length(self, obj: fx.Proxy) -> int:
        """Return how many items ``obj`` has; the number is fixed in the graph."""
        try:
            items = len(self._from_arguments(obj.node))
        except (LookupError, TypeError):
            pass
        else:
            count = self.create_proxy("call_function", len, (obj,), {})
            asked = self.create_proxy("call_function", operator.eq, (count, items), {})
            self.decisions[asked.node] = True
            return items
        try:
            return len(self.value_from_shapes(obj.node))
        except (LookupError, TypeError):
            raise fx.proxy.TraceError(f"the length of {obj.node.name} is not known") from None

    def iter(self, obj: Any) -> Iterator[Any]:
        """Return the items of ``obj``, as many as it has in this call."""
        return iter([obj[i] for i in range(self.length(obj))])

    def number(self, obj: fx.Proxy) -> Any:
        """Return the number that ``obj`` stands for; it is fixed in the graph."""
        try:
            value = self.value_from_shapes(obj.node)
            other = self.value_from_shapes(obj.node, larger=True)
        except NeedsDataError:
            raise DataDependentError("it uses a value of a tensor as a Python number") from None
        except LookupError:
            raise fx.proxy.TraceError(f"the number {obj.node.name} is not known") from None
        if isinstance(value, Tensor):
            raise DataDependentError("it uses a value of a tensor as a Python number")
        if value != other:
            raise UntraceableError("it uses a Python number that depends on the batch size")
        return value

    def value_from_shapes(self, node: fx.Node, larger: bool = False) -> Any:
        """Return the value of ``node``, worked out without data.

        The graph is then valid for calls with the same shapes and dtypes only.

        Args:
            node: The node.
            larger: Whether to return the value for a larger batch than that of the call.

        Raises:
            LookupError: There is no example call, or the value depends on data.
        """
        if self._arguments_of_call is None:
            raise LookupError(node)
        self._working_out_shapes = True
        try:
            if larger not in self._shape_facts:
                self._shape_facts[larger] = ShapeFacts(
                    self.root, self._without_data, self._batch_dim if larger else None
                )
            value = self._shape_facts[larger].of(node)
        finally:
            self._working_out_shapes = False
        self.uses_inner_shapes = True
        return value

    def _from_arguments(self, node: fx.Node) -> Any:
        """Return the value of ``node``, if it reads only the shapes and dtypes of arguments.

        Raises:
            LookupError: It reads something else, or the shape of an argument is not known.
        """
        if node.op == "placeholder":
            return self._without_data[node]
        if not is_shape_node(node) or reads_device(node):
            raise LookupError(node)  # the tensors without data are on no device
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._from_arguments)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def works_out_shapes(self) -> bool:
        """Whether the code that runs now works out shapes, and is not the forward itself."""
        return self._working_out_shapes

    def create_arg(self, a: Any) -> Any:
        """Return an argument of an operation for the graph; a tensor becomes a node."""
        a = self.watch.original(a)
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            known = a in tensors_of_tracer(self) or any(a is b for b in self.root.buffers())
            if not known:  # fx would store it on the user's module
                return self.tensor_constants.node_of(a)
        return super().create_arg(a)
