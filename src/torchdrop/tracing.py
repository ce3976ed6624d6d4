"""READ one block: its own forward as a graph, every child a leaf. Nothing here changes a module.

torch.fx is used to read. The graph is never handed to the user and never run as it stands.
"""

from __future__ import annotations

import inspect
import math
import operator
import random
import re
import sys
import threading
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchdrop.facts import DataError, Facts, stand_in_for
from torchdrop.lent import Lender, UntraceableError
from torchdrop.partial import merge_partial_sums

__all__ = [
    "A_TENSOR",
    "BlockGraph",
    "Fixed",
    "OnDataError",
    "callee",
    "is_cache",
    "is_shape_node",
    "passed_through",
    "trace_block",
    "unfold",
]

# Stands for "whatever tensor comes" among the arguments of a call.
A_TENSOR = object()

# torch.fx patches nn.Module for the whole process while it traces.
_LOCK = threading.RLock()

# How often a block is read while other threads draw numbers of Python or numpy.
_READINGS_IN_COMPANY = 5


class OnDataError(UntraceableError):
    """The forward of a block branches on data: on fewer rows it might do something else."""


@dataclass
class BlockGraph:
    """One block's own forward, in training mode or in evaluation, as it is called.

    Attributes:
        module: The block.
        graph: Its forward. Children are leaves; nodes that nobody uses are gone.
        arguments: The arguments by name that it was read with: of tensors what is known without
            their values, or ``A_TENSOR``.
        tensors: The arguments that became placeholders, in order: their names, and for a tensor
            in a tuple, list or dict the name with a path ("states.0").
        constants: The other arguments, which the graph holds fixed; of a container its size.
        attributes: The plain attributes of the block that its forward read, also fixed.
        decisions: What the forward branched on that a call tells beforehand (``x.dim() == 3``): a
            graph from the same placeholders to a tuple of truth values; None if on nothing.
        decided: How those came out.
        computed: Whether it branched on the shapes of values that it computes: the graph then
            stands only for calls with the shapes and dtypes of this one.
        look_through: The children whose forwards are part of the graph.
        items: What other children returned, as far as that was used, by their paths.
    """

    module: nn.Module
    graph: fx.Graph
    arguments: dict[str, Any]
    tensors: list[str]
    constants: dict[str, Any]
    attributes: dict[str, Any]
    decisions: fx.Graph | None
    decided: list[bool]
    computed: bool
    look_through: list[str]
    items: dict[str, Sequence[Any]]


def _without_values(path: str, value: Any) -> Any:
    """What stands for a tensor where only its shape, dtype and the like may be asked for."""
    if value is A_TENSOR or value.is_nested:
        return A_TENSOR
    return stand_in_for(value)


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a key/value cache, as the decoders of transformers make them."""
    kind = type(value)
    return callable(getattr(kind, "get_seq_length", None)) and callable(
        getattr(kind, "update", None)
    )


def unfold(
    arguments: Mapping[str, Any], tensor: Callable[[str, Any], Any] = lambda path, value: value
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sort the arguments of a call into tensors and constants, also inside containers.

    A key/value cache counts as None: it is of no use where rows are cut, and makes a call unlike
    every other.

    Args:
        arguments: The arguments by name.
        tensor: What to put in place of each tensor, from its path and itself.

    Returns:
        The arguments with their tensors replaced; what replaced the tensors, by path; the
        constants, by path.
    """
    tensors: dict[str, Any] = {}
    constants: dict[str, Any] = {}

    def go(path: str, value: Any) -> Any:
        if value is A_TENSOR or isinstance(value, Tensor):
            tensors[path] = tensor(path, value)
            return tensors[path]
        if type(value) in (tuple, list):
            constants[path] = (type(value).__name__, len(value))
            return type(value)([go(f"{path}.{i}", item) for i, item in enumerate(value)])
        if type(value) in (dict, OrderedDict):
            constants[path] = (type(value).__name__, tuple(value))
            return type(value)((key, go(f"{path}.{key}", item)) for key, item in value.items())
        value = None if is_cache(value) else value
        constants[path] = value
        return value

    return {name: go(name, value) for name, value in arguments.items()}, tensors, constants


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as what it is. fx takes it for ``x = x + y``.

    Where Python needs a number, or how many items there are, it gives what follows from the call.
    """

    tracer: _Reader

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # so that isinstance(x, Tensor) is true of the arguments that are tensors. Functions of
        # torch in C ask for the class too, of what they could take as a number, and read the
        # memory of what says that it is a Tensor: they are told what it is.
        asked = "isinstance" in sys._getframe(1).f_code.co_names
        return Tensor if asked and self.node.op == "placeholder" else _Proxy

    _is_param = False  # what isinstance(x, nn.Parameter) asks for

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


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _record_in_place(getattr(operator, f"i{_name}"), getattr(operator, _name))


_FACTORIES = tuple(
    getattr(torch, name)
    for name in (
        "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "normal", "ones",
        "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros",
    )
)  # fmt: skip


class _RecordFactories(TorchFunctionMode):
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


@dataclass(frozen=True)
class Fixed:
    """What a child returned that is no tensor: the size of a feature map, say."""

    value: Any


def passed_through(value: Any, path: str, args: Any, kwargs: Any, rest: Any) -> Any:
    """Marks in a graph the output of a child that was looked through: its hooks belong here.

    ``args``, ``kwargs`` and the ``rest`` of a tuple are what the hooks are called with besides.
    """
    return value


class _Reader(fx.Tracer):
    """Traces one module's own forward, every child module being a leaf."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        arguments: Mapping[str, Any] | None,
        training: bool,
        batch_dim: int,
        look_through: Collection[nn.Module],
    ) -> None:
        wrapped = (*_FACTORIES, torch.finfo, torch.iinfo)
        super().__init__(autowrap_modules=(math,), autowrap_functions=wrapped)
        self._batch_dim = batch_dim
        self._look_through = look_through
        self._autowrap_search.append(torch)
        self._given = arguments
        self._training = training
        self._thread = threading.get_ident()
        self._around = _surroundings()
        self.arguments: dict[str, Any] = {}
        self.tensors: list[str] = []
        self.constants: dict[str, Any] = {}
        self.lender = Lender()
        self.decisions: dict[fx.Node, bool] = {}
        self.computed = False
        self._known: dict[Any, Tensor] = {}
        self._facts: dict[bool, Facts] = {}
        self._asking = False
        self._within = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._look_through

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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
        if threading.get_ident() != self._thread or self._asking:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
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
        self.arguments = unfold(self.arguments, _without_values)[0]

        def placeholder(path: str, value: Any) -> fx.Proxy:
            if value is not A_TENSOR:
                self._known[path] = value
            return self.create_proxy("placeholder", re.sub(r"\W", "_", path), (), {})

        values, tensors, self.constants = unfold(self.arguments, placeholder)
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
            except DataError:
                raise OnDataError("it branches on data") from None
            except LookupError:
                return super().to_bool(obj)
            if isinstance(known, Tensor):
                raise OnDataError("it branches on data") from None
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
        return iter([obj[i] for i in range(self.length(obj))])

    def number(self, obj: fx.Proxy) -> Any:
        """The number that ``obj`` is, which the graph then holds fixed."""
        try:
            value, other = self._computed(obj.node), self._computed(obj.node, larger=True)
        except DataError:
            raise OnDataError("it takes data for a plain number") from None
        except LookupError:
            raise fx.proxy.TraceError(f"the number {obj.node.name} is not known") from None
        if isinstance(value, Tensor):
            raise OnDataError("it takes data for a plain number")
        if value != other:
            raise UntraceableError("it takes for a fixed number what depends on the batch size")
        return value

    def _computed(self, node: fx.Node, larger: bool = False) -> Any:
        """What ``node`` is, where that follows from the shapes and dtypes of the call."""
        if self._given is None:
            raise LookupError(node)
        if larger not in self._facts:
            self._facts[larger] = Facts(self.root, self._known, self._batch_dim if larger else None)
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
        asked = node.args[1] if node.target is getattr else node.target
        if not is_shape_node(node) or (isinstance(asked, str) and asked in _DEVICES):
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
        a = self.lender.original(a)
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            known = a in self.tensor_attrs or any(a is b for b in self.root.buffers())
            if not known:
                # fx would store it on the user's module, and it would stay what it is now
                raise UntraceableError("it makes a tensor that does not come from its inputs")
        return super().create_arg(a)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whether this thread draws random numbers of torch."""

    drawn = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.drawn = self.drawn or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _RandomStates:
    """The global random numbers of Python, numpy and torch, as they are now."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def changed(self, *, alone: bool) -> bool:
        """Whether any was drawn; of those of torch that is known here of one thread ``alone``."""
        now = _RandomStates()
        arrays = False
        if self._numpy is not None and now._numpy is not None:
            arrays = self._numpy[2] != now._numpy[2]
            arrays = arrays or bool((self._numpy[1] != now._numpy[1]).any())
        if alone and not torch.equal(self._torch, now._torch):
            return True
        return arrays or self._python != now._python

    def restore(self) -> None:
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def trace_block(
    module: nn.Module,
    *,
    training: bool = True,
    arguments: Mapping[str, Any] | None = None,
    batch_dim: int = 0,
    look_through: Collection[nn.Module] = (),
    outputs: Mapping[nn.Module, Sequence[Any]] | None = None,
) -> BlockGraph:
    """Read ``module``'s own forward.

    Args:
        module: The block. It is left as it is.
        training: Whether the forward is read in training mode or in evaluation.
        arguments: The arguments by name of a call that really happened: its tensors become
            placeholders, everything else stays what it was. None: parameters without a default
            are tensors, those with one keep it.
        batch_dim: Which dimension of the tensors is the batch.
        look_through: Children that are not leaves: their forwards become part of the graph.
        outputs: What children returned in that call, as :class:`torchdrop.examples.Example` has
            it: an item that was None is None in the graph, one that was an argument is it.

    Raises:
        UntraceableError: The forward cannot be read; the message says where and why.
    """
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of functions that wonder about proxies
        before = _RandomStates()
        # Random numbers that decide in Python are refused: the graph would hold one decision for
        # ever. Other threads may draw meanwhile: those of torch are told apart from this one's,
        # and where they draw others, the block is read again.
        alone = threading.active_count() == 1
        for left in reversed(range(1 if alone else _READINGS_IN_COMPANY)):
            reader = _Reader(arguments, training, batch_dim, look_through)
            draws = _Draws()  # type: ignore[no-untyped-call]
            states = _RandomStates()
            try:
                with (
                    reader.lender.watching(module, reader.is_asking),
                    _RecordFactories(reader),
                    nullcontext() if alone else draws,
                ):
                    graph = reader.trace(module)
                if not draws.drawn and not states.changed(alone=alone):
                    break
                if draws.drawn or not left:
                    raise UntraceableError("it draws random numbers in Python")
            except UntraceableError as error:
                before.restore()
                raise type(error)(f"{_where(module, error)}: {error}") from None
            except Exception as error:
                # A user's forward may raise anything when it is handed proxies.
                before.restore()
                first = str(error).splitlines()[0] if str(error) else ""
                what = f"{type(error).__name__}: {first}"
                raise UntraceableError(f"{_where(module, error)}: {what}") from None
    for node in graph.nodes:
        # with it the text that fx writes would wrap the function for every trace to come
        node.meta.pop("is_wrapped", None)
    decisions = _decisions(graph, list(reader.decisions)) if reader.decisions else None
    if outputs:
        _settle_outputs(graph, module, outputs)
    merge_partial_sums(graph)
    _drop_unused(graph)
    attributes = {
        name: value
        for name, value in reader.lender.attributes.items()
        if not isinstance(value, Tensor | nn.Module)
    }
    return BlockGraph(
        module,
        graph,
        reader.arguments,
        reader.tensors,
        reader.constants,
        attributes,
        decisions,
        list(reader.decisions.values()),
        reader.computed,
        [str(node.args[1]) for node in graph.nodes if node.target is passed_through],
        {
            str(node.target): items
            for node in graph.nodes
            if node.op == "call_module"
            and (items := (outputs or {}).get(module.get_submodule(str(node.target))))
        },
    )


def _settle_outputs(
    graph: fx.Graph, module: nn.Module, outputs: Mapping[nn.Module, Sequence[Any]]
) -> None:
    """Put what is known about the items that children return in the place of those items.

    An attention returns weights that nobody asked for as None, or the bias that it was given: the
    branch around it is then none the less used for nothing but its sum. Or it returns the size of
    its feature map, which is what it was as long as the input has one size.
    """
    for node in list(graph.nodes):
        call = node.args[0] if node.target is operator.getitem else None
        if not isinstance(call, fx.Node) or call.op != "call_module":
            continue
        items = outputs.get(module.get_submodule(str(call.target)))
        index = node.args[1]
        if items is None:
            continue
        known: Any = None
        if isinstance(index, slice):  # the rest of a tuple
            if not all(item is None or isinstance(item, Fixed) for item in items[index]):
                continue
            known = tuple(None if item is None else item.value for item in items[index])
        elif not isinstance(index, int) or index >= len(items):
            continue
        elif isinstance(items[index], int | str):
            given: Any = call.args if isinstance(items[index], int) else call.kwargs
            try:
                known = given[items[index]]
            except LookupError:
                continue
        elif isinstance(items[index], Fixed):
            known = items[index].value
        elif items[index] is not None:
            continue
        for user in list(node.users):
            swap = partial(_swapped, node, known)
            user.args = fx.map_arg(user.args, swap)
            user.kwargs = fx.map_arg(user.kwargs, swap)
        node.meta["expected"] = known


def _swapped(old: fx.Node, new: Any, node: fx.Node) -> Any:
    return new if node is old else node


def _decisions(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Graph:
    """The part of ``graph`` that computes ``nodes`` from its placeholders."""
    part = fx.Graph()
    done: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node) -> fx.Node:
        if node not in done:
            done[node] = part.node_copy(node, copied)
        return done[node]

    for node in graph.nodes:
        if node.op == "placeholder":
            copied(node)
    part.output(tuple(map(copied, nodes)))
    return part


def _where(module: nn.Module, error: BaseException) -> str:
    """File and line, in the user's own code, at which reading ``module`` ended."""
    try:
        file = inspect.getsourcefile(type(module))
    except TypeError:
        file = None
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if not frames:
        return type(module).__name__
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})"


_READERS = {
    "size", "dim", "ndimension", "numel", "stride", "is_contiguous", "is_floating_point",
    "get_device", "type",
}  # fmt: skip
_FACTS = {
    "shape", "ndim", "dtype", "device", "is_cuda", "is_cpu", "is_nested", "layout", "requires_grad",
}  # fmt: skip
_DEVICES = {"device", "is_cuda", "is_cpu", "get_device", "type"}
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


def _drop_unused(graph: fx.Graph) -> None:
    """Remove nodes that nobody uses and that have no effect (an unpacked attention weight)."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op not in ("call_function", "call_method", "get_attr"):
            continue
        if "expected" in node.meta:  # it is to be compared
            continue
        if node.op == "get_attr" or node.target is operator.getitem or is_shape_node(node):
            graph.erase_node(node)
