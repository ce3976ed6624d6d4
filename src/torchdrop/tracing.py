"""READ one block: its own forward as a graph, every child a leaf. Nothing here changes a module.

torch.fx is used to read. The graph is never handed to the user and never run as it stands.
"""

from __future__ import annotations

import inspect
import operator
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = [
    "A_TENSOR",
    "BlockGraph",
    "Calls",
    "UntraceableError",
    "is_shape_node",
    "record_calls",
    "run_once",
    "trace_block",
    "writes_in_place",
]

# The arguments by name of one real call of each block, by the block's path.
Calls = dict[str, dict[str, Any]]

# Stands for "whatever tensor comes" among the arguments of a call.
A_TENSOR = object()

# torch.fx patches nn.Module for the whole process while it traces.
_LOCK = threading.RLock()


class UntraceableError(Exception):
    """The forward of a block cannot be read: it branches on data, say."""


@dataclass
class BlockGraph:
    """One block's own forward, in training mode or in evaluation, as it is called.

    Attributes:
        module: The block.
        graph: Its forward. Children are leaves; nodes that nobody uses are gone.
        tensors: The names of the parameters that became placeholders, in order.
        constants: The other parameters of the forward, with the values that the graph holds fixed.
    """

    module: nn.Module
    graph: fx.Graph
    tensors: list[str]
    constants: dict[str, Any] = field(default_factory=dict)


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as what it is. fx takes it for ``x = x + y``."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _record_in_place(in_place: Callable[..., Any], plain: Callable[..., Any]) -> None:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        # numbers have no memory to write into
        target = plain if is_shape_node(self.node) else in_place
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    setattr(_Proxy, f"__{in_place.__name__}__", method)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _record_in_place(getattr(operator, f"i{_name}"), getattr(operator, _name))


class _Reader(fx.Tracer):
    """Traces one module's own forward, every child module being a leaf."""

    proxy_buffer_attributes = True

    def __init__(self, constants: Mapping[str, Any] | None) -> None:
        super().__init__()
        self._given = constants
        self.tensors: list[str] = []
        self.constants: dict[str, Any] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        positional: list[Any] = [self.root]
        named: dict[str, Any] = {}
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            name = parameter.name
            if self._given is not None and name in self._given:
                value = self._given[name]
            elif parameter.default is not parameter.empty:
                value = parameter.default
            else:
                value = None if self._given is not None else A_TENSOR
            if value is A_TENSOR or isinstance(value, Tensor):
                value = self.create_proxy("placeholder", name, (), {})
                self.tensors.append(name)
            else:
                self.constants[name] = value
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[name] = value
            else:
                positional.append(value)
        return (lambda *args: root_fn(*args, **named)), positional

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            known = a in self.tensor_attrs or any(a is b for b in self.root.buffers())
            if not known:
                # fx would store it on the user's module. It is also wrong: a tensor made during
                # the trace (random numbers, say) would stay what it was in that one call.
                raise UntraceableError("it makes a tensor that does not come from its inputs")
        return super().create_arg(a)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    # On the block alone: its own forward is all that is run.
    before = module.training
    module.training = training
    try:
        yield
    finally:
        module.training = before


def trace_block(
    module: nn.Module, *, training: bool = True, constants: Mapping[str, Any] | None = None
) -> BlockGraph:
    """Read ``module``'s own forward.

    Args:
        module: The block. It is left as it is.
        training: Whether the forward is read in training mode or in evaluation.
        constants: The arguments by name of a call that really happened: its tensors become
            placeholders, everything else stays what it was. None: parameters without a default
            are tensors, those with one keep it.

    Raises:
        UntraceableError: The forward cannot be read; the message says where and why.
    """
    reader = _Reader(constants)
    with _LOCK, _mode(module, training):
        try:
            graph = reader.trace(module)
        except UntraceableError as error:
            raise UntraceableError(f"{_where(module, error)}: {error}") from None
        except Exception as error:
            # A user's forward may raise anything when it is handed proxies.
            first = str(error).splitlines()[0] if str(error) else ""
            what = f"{type(error).__name__}: {first}"
            raise UntraceableError(f"{_where(module, error)}: {what}") from None
    _drop_unused(graph)
    return BlockGraph(module, graph, reader.tensors, reader.constants)


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


_READERS = {"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "get_device", "type"}
_FACTS = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"}
_ARITHMETIC = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv,
    operator.truediv, operator.mod, operator.neg, operator.eq, operator.ne, operator.lt,
    operator.le, operator.gt, operator.ge, operator.pow, int, float, bool, len, min, max, slice,
}  # fmt: skip


def is_shape_node(node: fx.Node) -> bool:
    """Whether ``node`` reads only the shape (or dtype, device) of tensors, not their values."""
    if node.op == "call_method":
        return node.target in _READERS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _FACTS
    if node.target in _ARITHMETIC or getattr(node.target, "__module__", None) == "math":
        inputs = node.all_input_nodes
        return bool(inputs) and all(is_shape_node(i) for i in inputs)
    return False


def _drop_unused(graph: fx.Graph) -> None:
    """Remove nodes that nobody uses and that have no effect (an unpacked attention weight)."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op not in ("call_function", "call_method", "get_attr"):
            continue
        if node.op == "get_attr" or node.target is operator.getitem or is_shape_node(node):
            graph.erase_node(node)


_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.ipow, operator.imod, operator.iand, operator.ior, operator.ixor, operator.setitem,
}  # fmt: skip


def _module_writes(module: nn.Module) -> bool:
    """Whether calling ``module`` writes into its input, as far as its structure tells."""
    if isinstance(module, nn.Sequential):
        return len(module) > 0 and _module_writes(module[0])
    return bool(getattr(module, "inplace", False)) and not any(True for _ in module.children())


def writes_in_place(node: fx.Node, module: nn.Module) -> bool:
    """Whether ``node`` writes into its first argument; ``module`` is the block it belongs to."""
    if node.op == "call_module":
        return _module_writes(module.get_submodule(str(node.target)))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return (
            node.target in _IN_PLACE_OPERATORS
            or node.kwargs.get("inplace") is True
            or (name.endswith("_") and not name.endswith("__"))
        )
    return False


def run_once(model: nn.Module, example_inputs: Any) -> None:
    """One forward pass that leaves no trace: no gradients, no statistics, no random numbers."""
    before = [(m, m.training) for m in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)),
        ):
            if isinstance(example_inputs, Mapping):
                model(**example_inputs)
            elif isinstance(example_inputs, tuple | list):
                model(*example_inputs)
            else:
                model(example_inputs)
    finally:
        for module, training in before:
            module.training = training


def record_calls(model: nn.Module, example_inputs: Any) -> Calls:
    """The arguments, by name, of the first call of every module in one forward pass."""
    calls: Calls = {}
    names = {module: name for name, module in reversed(list(model.named_modules()))}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names.get(module)
        if name is None or name in calls or next(module.children(), None) is None:
            return
        try:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        except (TypeError, ValueError):
            return
        bound.apply_defaults()
        calls[name] = dict(list(bound.arguments.items())[1:])

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in names]
    try:
        run_once(model, example_inputs)
    finally:
        for hook in handles:
            hook.remove()
    return calls
