"""Reads a forward by calling it with proxies, which record what it does and answer what it asks.

What a call tells beforehand (shapes, dtypes, flags) is decided, and noted as decided; what depends
on data is refused.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from torchdrop.internals import NotAParameter, tensors_of_tracer, wrap_functions_of
from torchdrop.tracing.call_arguments import A_TENSOR, flatten_arguments
from torchdrop.tracing.nodes import is_shape_node, reads_device
from torchdrop.tracing.operations import factories, in_place_operators, is_function_of_table, named
from torchdrop.tracing.shape_facts import NeedsDataError, ShapeFacts, meta_double
from torchdrop.tracing.traced_functions import passed_through
from torchdrop.tracing.untraceable import DataDependentError, UntraceableError
from torchdrop.tracing.watched_attributes import AttributeWatch

__all__ = ["Reader", "RecordFactories"]


class _Proxy(NotAParameter, fx.Proxy):
    """A proxy that records ``x += y`` as what it is. fx takes it for ``x = x + y``.

    Where Python needs a number, or how many items there are, it gives what follows from the call.
    """

    tracer: Reader

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # so that isinstance(x, Tensor) is true of the arguments that are tensors. Functions of
        # torch in C ask for the class too, of what they could take as a number, and read the
        # memory of what says that it is a Tensor: they are told what it is.
        asked = "isinstance" in sys._getframe(1).f_code.co_names
        return Tensor if asked and self.node.op == "placeholder" else _Proxy

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

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
    """An attribute of a proxy, which ``len(x.shape)`` asks. It becomes a node when it is used."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return _Attribute


def _record_in_place(in_place: Callable[..., Any], plain: Callable[..., Any]) -> None:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        # numbers have no memory to write into
        target = plain if is_shape_node(self.node) else in_place
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    setattr(_Proxy, f"__{in_place.__name__}__", method)


for _in_place, _plain in in_place_operators():
    _record_in_place(_in_place, _plain)


_FACTORIES = factories()


class RecordFactories(TorchFunctionMode):
    """Records tensors that a forward makes from nothing; else they would stay those of the trace.

    Above all random numbers: they have to be drawn anew in every call.
    """

    def __init__(self, tracer: fx.Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)


def _surroundings() -> tuple[Any, ...]:
    """What a forward may change around a part of itself, and a graph does not show."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )


def _without_values(path: str, value: Any) -> Any:
    """What stands for a tensor where only its shape, dtype and the like may be asked for."""
    if value is A_TENSOR or value.is_nested:
        return A_TENSOR
    return meta_double(value)


class Reader(fx.Tracer):
    """Traces one module's own forward, every child module being a leaf."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        arguments: Mapping[str, Any] | None,
        training: bool,
        batch_dim: int,
        look_through: Collection[nn.Module],
    ) -> None:
        wrapped: tuple[Any, ...] = (*_FACTORIES, torch.finfo, torch.iinfo)
        super().__init__(autowrap_modules=(math,), autowrap_functions=wrapped)
        self._batch_dim = batch_dim
        self._look_through = look_through
        wrap_functions_of(self, torch)
        self._given = arguments
        self._training = training
        self._thread = threading.get_ident()
        self._around = _surroundings()
        self.arguments: dict[str, Any] = {}
        self.tensors: list[str] = []
        self.constants: dict[str, Any] = {}
        self.lender = AttributeWatch()
        self.decisions: dict[fx.Node, bool] = {}
        self.computed = False
        self._known: dict[Any, Tensor] = {}
        self._facts: dict[bool, ShapeFacts] = {}
        self._asking = False
        self._within = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for ``node`` while the forward runs."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Children are leaves, but for those that are looked through."""
        return m not in self._look_through

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record the call of a child, or what its own forward does."""
        # fx's patches are on nn.Module itself: other threads that run a model come by as well.
        if threading.get_ident() != self._thread or self._asking:
            return forward(*args, **kwargs)
        if m not in self._look_through:
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        # Before a call happens the flags of the children need not be those of that call.
        training = m.training if self.root.training == self._training else self._training
        double = self.lender.double_of_module(m, training, f"{path}.")
        self._within, outside = path, self._within
        value = super().call_module(m, partial(type(m).forward, double), args, kwargs)
        self._within = outside
        first, *rest = value if isinstance(value, tuple) else (value,)
        first = self.create_proxy(
            "call_function", passed_through, (first, path, args, kwargs, rest), {}
        )
        return (first, *rest) if isinstance(value, tuple) else first

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer of the block as a node."""
        if threading.get_ident() != self._thread or self._asking:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any
    ) -> Any:
        """Record an operation; a fused one as the plain operations that it stands for."""
        if kind == "call_method":
            spelled_out = named(target).spelled_out
        elif kind == "call_function" and is_function_of_table(target):
            spelled_out = named(target.__name__).spelled_out
        else:
            spelled_out = None
        if spelled_out is not None:
            return spelled_out(*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, *more, **options)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record an operation, unless it runs under a mode that a graph does not show."""
        if _surroundings() != self._around:
            raise UntraceableError(
                "it runs under torch.no_grad, autocast or the like of its own, on the method or "
                "inside"
            )
        node = super().create_node(*args, **kwargs)
        if self._within:
            node.meta["within"] = self._within
        return node

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The forward, and what it is called with: a proxy for each tensor."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        for parameter in parameters:
            name = parameter.name
            if self._given is not None and name in self._given:
                value = self._given[name]
            elif parameter.kind is parameter.VAR_POSITIONAL:
                value = ()
            elif parameter.kind is parameter.VAR_KEYWORD:
                value = {}
            elif parameter.default is not parameter.empty:
                value = parameter.default
            else:
                value = None if self._given is not None else A_TENSOR
            self.arguments[name] = value
        self.arguments = flatten_arguments(self.arguments, _without_values)[0]

        def placeholder(path: str, value: Any) -> Any:
            if value is not A_TENSOR:
                self._known[path] = value
            return self.create_proxy("placeholder", re.sub(r"\W", "_", path), (), {})

        values, tensors, self.constants = flatten_arguments(self.arguments, placeholder)
        self.tensors = list(tensors)
        self._known = {tensors[path].node: value for path, value in self._known.items()}
        positional: list[Any] = [self.lender.double_of_module(self.root, self._training)]
        named: dict[str, Any] = {}
        for parameter in parameters:
            value = values[parameter.name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional.extend(value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                named.update(value)
            elif parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            else:
                positional.append(value)
        return (lambda *args: root_fn(*args, **named)), positional

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide what this call tells without any value: shapes, dtypes, devices."""
        try:
            decision = bool(self._fact(obj.node))
        except LookupError:
            try:
                known = self._computed(obj.node)
            except NeedsDataError:
                raise DataDependentError("it branches on data") from None
            except LookupError:
                return super().to_bool(obj)
            if isinstance(known, Tensor):
                raise DataDependentError("it branches on data") from None
            return bool(known)
        self.decisions[obj.node] = decision
        return decision

    def length(self, obj: fx.Proxy) -> int:
        """How many items ``obj`` has, which the graph then holds fixed."""
        try:
            items = len(self._fact(obj.node))
        except (LookupError, TypeError):
            pass
        else:
            count = self.create_proxy("call_function", len, (obj,), {})
            asked = self.create_proxy("call_function", operator.eq, (count, items), {})
            self.decisions[asked.node] = True
            return items
        try:
            return len(self._computed(obj.node))
        except (LookupError, TypeError):
            raise fx.proxy.TraceError(f"the length of {obj.node.name} is not known") from None

    def iter(self, obj: Any) -> Iterator[Any]:
        """The items of ``obj``, as many as it has in this call."""
        return iter([obj[i] for i in range(self.length(obj))])

    def number(self, obj: fx.Proxy) -> Any:
        """The number that ``obj`` is, which the graph then holds fixed."""
        try:
            value, other = self._computed(obj.node), self._computed(obj.node, larger=True)
        except NeedsDataError:
            raise DataDependentError("it takes data for a plain number") from None
        except LookupError:
            raise fx.proxy.TraceError(f"the number {obj.node.name} is not known") from None
        if isinstance(value, Tensor):
            raise DataDependentError("it takes data for a plain number")
        if value != other:
            raise UntraceableError("it takes for a fixed number what depends on the batch size")
        return value

    def _computed(self, node: fx.Node, larger: bool = False) -> Any:
        """What ``node`` is, where that follows from the shapes and dtypes of the call."""
        if self._given is None:
            raise LookupError(node)
        if larger not in self._facts:
            self._facts[larger] = ShapeFacts(
                self.root, self._known, self._batch_dim if larger else None
            )
        self._asking = True
        try:
            value = self._facts[larger].of(node)
        finally:
            self._asking = False
        self.computed = True
        return value

    def _fact(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._known[node]
        if not is_shape_node(node) or reads_device(node):
            raise LookupError(node)  # what stands for a tensor here lies on no device
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._fact)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def is_asking(self) -> bool:
        """Whether what runs at the moment is not the forward that is read."""
        return self._asking

    def create_arg(self, a: Any) -> Any:
        """What an operation is recorded with; a tensor from nowhere is refused."""
        a = self.lender.original(a)
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            known = a in tensors_of_tracer(self) or any(a is b for b in self.root.buffers())
            if not known:
                # fx would store it on the user's module, and it would stay what it is now
                raise UntraceableError("it makes a tensor that does not come from its inputs")
        return super().create_arg(a)
