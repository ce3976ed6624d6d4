"""Run the operations that a forward applies to constants, while the forward is traced.

An operation on proxies is only recorded. An operation without a proxy among its arguments is also
run, because the forward may store its result in a cache, which must hold a tensor. If the result is
still stored somewhere after the forward, the graph uses that tensor. Otherwise each call computes
it again, random numbers included.

Two kinds of operations without proxies are only recorded: those on memory that an operation with
proxies writes into, because its values are not known, and writes into a tensor that was there
before the forward, because they would change it.
"""

from __future__ import annotations

import gc
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from torchdrop.internals import DisableTorchFunction
from torchdrop.tracing.kept_tensors import Constant, note_keepers
from torchdrop.tracing.operations import named
from torchdrop.tracing.random_states import TorchDraws, generator_states, set_generator_states
from torchdrop.tracing.untraceable import DataDependentError, UntraceableError

__all__ = ["Constants"]

# The functions and methods that turn the values of a tensor into Python objects.
_VALUE_READERS = {
    "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__",
    "__complex__", "__contains__", "equal", "allclose", "is_nonzero",
}  # fmt: skip

_FOREIGN_TENSOR = "it makes a tensor that does not come from its inputs"


class _Draws:
    """Detects which operations draw random numbers from torch, and restores its generators."""

    def __init__(self) -> None:
        self._alone = threading.active_count() == 1
        self._before: dict[Any, Tensor] = {}  # by device or generator

    def run(self, function: Callable[[], Any], leaves: Iterable[Any]) -> tuple[Any, bool]:
        """Return what ``function`` returns, and whether it draws random numbers.

        Args:
            function: The operation.
            leaves: Its arguments, without containers.
        """
        before = generator_states(leaves)
        # If there are other threads, one of them may have changed the state of a generator. Then a
        # dispatch mode records whether this thread drew numbers. With one thread the states are
        # compared instead, because PyTorch imports many modules for a dispatch mode.
        draws = None if self._alone else TorchDraws()  # type: ignore[no-untyped-call]
        with _outside_inference_mode(), draws or nullcontext():
            result = function()
        if draws is not None and not draws.drawn:
            return result, False
        moved = {
            key: state
            for key, state in before.items()
            if not torch.equal(state, generator_states([key])[key])
        }
        for key, state in moved.items():
            self._before.setdefault(key, state)
        if not self._alone:  # at once, since other threads may draw numbers meanwhile
            self.undo()
        return result, bool(moved)

    def undo(self) -> None:
        """Restore the states that the generators had before the first operation."""
        set_generator_states(self._before)
        self._before.clear()


class Constants(TorchFunctionMode):
    """Runs and records those operations of a traced forward that take no proxy.

    Args:
        tracer: The tracer. Its ``create_arg`` asks :meth:`node_of` about each tensor.
        factories: The functions that make a tensor from nothing.

    Attributes:
        draws: Detects which operations draw random numbers.
    """

    def __init__(self, tracer: fx.Tracer, factories: Iterable[Callable[..., Any]]) -> None:
        super().__init__()
        self.draws = _Draws()
        self._tracer = tracer
        self._factories = frozenset(factories)
        # The keys of tensors are their ids, those of memory are what _memory returns.
        self._tensors: dict[int, Tensor] = {}  # held, so that no other tensor gets the same id
        self._nodes: dict[int, fx.Node] = {}  # the node of each tensor
        self._unrecorded: dict[int, str] = {}  # tensors without a node, and the reason
        # the operations that were run; the tensor that each made, None if it made something else
        self._were_run: dict[fx.Node, int | None] = {}
        self._memory_of: dict[fx.Node, Any] = {}
        self._memory_written_by: dict[fx.Node, Any] = {}
        self._drew: set[fx.Node] = set()  # nodes that draw random numbers
        self._random: set[Any] = set()  # memory with random numbers
        self._written_with_proxies: set[Any] = set()  # memory, by operations with proxies
        self._from_state: set[int] = set()  # tensors that depend on parameters or buffers
        self._foreign: dict[int, tuple[Constant, Any]] = {}  # tensors made elsewhere; their memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = list(_leaves((args, kwargs)))
        if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            # Called as they are, factories fail for arguments such as zeros(size, 3), and fx would
            # record [] as a call of the method __getitem__.
            if func in self._factories:
                return self._tracer.create_proxy("call_function", func, args, kwargs)
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                target = operator.getitem if func is Tensor.__getitem__ else operator.setitem
                return self._tracer.create_proxy("call_function", target, args, kwargs)
            return func(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if _reads_metadata(func):
            return func(*args, **kwargs)
        written = _written_by(func, args, kwargs)
        if any(_memory(t) in self._written_with_proxies for t in tensors) or (
            written is not None and self._is_foreign(written)
        ):
            kind, target, args = _as_node(func, args)
            return self._tracer.create_proxy(kind, target, args, kwargs)
        return self._run_and_record(func, args, kwargs, tensors, written)

    def _run_and_record(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], written: Tensor | None
    ) -> Any:
        """Run an operation without proxies, add it to the graph, and return its result."""
        result, drew = self.draws.run(partial(func, *args, **kwargs), _leaves((args, kwargs)))
        made = [leaf for leaf in _leaves(result) if isinstance(leaf, Tensor)]
        random = drew or any(_memory(t) in self._random for t in tensors)
        state = any(id(t) in self._from_state or self._is_state(t) for t in tensors)
        if state:
            self._from_state.update(map(id, made))
        if not made and _name(func) in _VALUE_READERS:
            if random:
                raise UntraceableError("it draws random numbers in Python")
            if state:
                raise DataDependentError("it uses a value of a tensor as a Python number")
        if random:
            self._random.update(map(_memory, made if written is None else [*made, written]))
        if made or written is not None:
            self._record(func, args, kwargs, result, written, drew)
        return result

    def _record(
        self, func: Any, args: Any, kwargs: Any, result: Any, written: Tensor | None, drew: bool
    ) -> None:
        """Add a node to the graph for an operation that was run."""
        kind, target, given = _as_node(func, args)
        tracer = self._tracer
        try:
            nodes: Any = tracer.create_arg(given), tracer.create_arg(kwargs)
            node = tracer.create_node(kind, target, *nodes)
        except Exception as error:  # an argument that no graph can hold, such as an array
            why = str(error) if isinstance(error, UntraceableError) else _FOREIGN_TENSOR
            for tensor in [leaf for leaf in _leaves(result) if isinstance(leaf, Tensor)]:
                self._hold(tensor)
                self._unrecorded[id(tensor)] = why
            if written is not None:
                self._hold(written)
                self._unrecorded[id(written)] = why
            return
        self._were_run[node] = None
        if drew:
            self._drew.add(node)
        if written is not None:
            self._memory_written_by[node] = _memory(written)
        self._note_nodes(node, result)

    def _note_nodes(self, node: fx.Node, result: Any) -> None:
        """Note which node stands for each tensor in ``result``; add nodes for items of a tuple."""
        if isinstance(result, Tensor):
            self._hold(result)
            self._nodes[id(result)] = node
            self._were_run[node] = id(result)
            self._memory_of[node] = _memory(result)
        elif isinstance(result, tuple | list):
            for i, item in enumerate(result):
                part = self._tracer.graph.create_node("call_function", operator.getitem, (node, i))
                self._were_run[part] = None
                self._note_nodes(part, item)

    def _hold(self, tensor: Tensor) -> None:
        """Hold a reference to ``tensor``, so that no other tensor gets its id."""
        self._tensors[id(tensor)] = tensor

    def _is_foreign(self, tensor: Tensor) -> bool:
        """Whether the memory of ``tensor`` was allocated outside of the forward."""
        memory = _memory(tensor)
        made = id(tensor) in self._tensors or memory in self._memory_of.values()
        return not made or any(memory == known for _, known in self._foreign.values())

    def _is_state(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is a parameter or a buffer of the block."""
        root: Any = self._tracer.root
        return any(tensor is t for t in (*root.parameters(), *root.buffers()))

    def note_write(self, writes: bool, args: Any, kwargs: Any) -> None:
        """Note the memory of the constants that an operation with proxies writes into.

        Args:
            writes: Whether the operation writes into its first argument.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        for tensor in (args[0] if writes and args else None, kwargs.get("out")):
            if tensor is not None and not isinstance(tensor, fx.Proxy):
                with DisableTorchFunction():
                    if isinstance(tensor, Tensor):
                        self._written_with_proxies.add(_memory(tensor))

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node that stands for ``tensor``; add one if it was made elsewhere.

        Raises:
            UntraceableError: An operation that no graph can hold made it or wrote into it.
        """
        key = id(tensor)
        if key in self._unrecorded:
            raise UntraceableError(self._unrecorded[key])
        if key not in self._nodes:
            constant = Constant()
            self._nodes[key] = self._tracer.graph.create_node("call_function", constant)
            with DisableTorchFunction():
                self._foreign[key] = constant, _memory(tensor)
            self._hold(tensor)
        return self._nodes[key]

    # After the forward ------------------------------------------------------------------------

    def finish(self, graph: fx.Graph) -> None:
        """Let ``graph`` use the tensors that are still stored; remove what computed only these.

        Raises:
            UntraceableError: The graph uses a tensor that was made elsewhere and is stored nowhere.
        """
        with DisableTorchFunction():
            kept = self._kept_by_others()
            memory_kept = {_memory(t) for t in kept.values()}
        for foreign, (constant, _) in self._foreign.items():
            if foreign not in kept:
                raise UntraceableError(_FOREIGN_TENSOR)
            constant.value = kept[foreign]
        made_once = set()
        constants: dict[int, fx.Node] = {}
        for node, key in self._were_run.items():
            if key is None or key not in kept:
                continue
            made_once.add(node)
            if key not in constants:
                with graph.inserting_before(node):
                    constants[key] = graph.create_node("call_function", Constant(kept[key]))
            node.replace_all_uses_with(constants[key])
        self._erase(graph, self._needed(made_once, memory_kept))
        used = [node.target for node in graph.nodes if isinstance(node.target, Constant)]
        with DisableTorchFunction():
            note_keepers(used, {id(kept)})

    def _kept_by_others(self) -> dict[int, Tensor]:
        """Return the tensors that are still stored outside of this object, by id; free the rest."""
        references = {key: weakref.ref(tensor) for key, tensor in self._tensors.items()}
        self._tensors.clear()
        kept = {key: tensor for key, ref in references.items() if (tensor := ref()) is not None}
        # If a tensor with values that vary between calls seems to be stored, make sure that it is.
        varying = self._random | self._written_with_proxies
        if any(_memory(t) in varying for t in kept.values()):
            kept.clear()
            gc.collect()  # a reference cycle, such as a recursive closure, may still hold tensors
            kept = {key: tensor for key, ref in references.items() if (tensor := ref()) is not None}
        return kept

    def _needed(self, made_once: set[fx.Node], memory_kept: set[Any]) -> set[fx.Node]:
        """Return the operations that each call has to run.

        Args:
            made_once: The nodes whose tensors are stored elsewhere, so that the graph uses these.
            memory_kept: The memory of the tensors that are stored elsewhere.
        """
        sources: set[fx.Node] = set()  # what the nodes in made_once are computed from
        pending = list(made_once)
        while pending:
            for node in pending.pop().all_input_nodes:
                if node not in sources:
                    sources.add(node)
                    pending.append(node)
        needed: set[fx.Node] = set()
        # A draw moves the generator even if nothing uses its result. It happens only once if a
        # stored tensor is its result or is computed from it.
        pending = [
            node
            for node in self._were_run
            if any(user not in self._were_run for user in node.users)
            or (node in self._drew and node not in sources | made_once)
        ]
        writes = {n: m for n, m in self._memory_written_by.items() if m not in memory_kept}
        while pending:
            node = pending.pop()
            if node in needed or node not in self._were_run:
                continue
            needed.add(node)
            pending.extend(node.all_input_nodes)
            memory = self._memory_of.get(node)
            pending.extend(n for n, written in writes.items() if written == memory)
        return needed

    def _erase(self, graph: fx.Graph, needed: set[fx.Node]) -> None:
        """Erase the nodes that were run and are not ``needed``, and constants without users."""
        for node in reversed(list(graph.nodes)):
            unused = node in self._were_run and node not in needed
            if unused or (isinstance(node.target, Constant) and not node.users):
                graph.erase_node(node)


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Leave inference mode: a tensor that is made under it cannot be used in training."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the items of nested containers that are not containers themselves."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def _memory(tensor: Tensor) -> Any:
    """Return an identifier of the memory of ``tensor``, the same for all views of it."""
    try:
        address = tensor.untyped_storage().data_ptr()
    except Exception:  # a sparse tensor, or one without data
        address = 0
    return address or ("tensor", id(tensor))


def _name(func: Any) -> str:
    """Return the name of a function or method, or of the attribute if ``func`` is its getter."""
    name: str = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def _reads_metadata(func: Any) -> bool:
    """Whether ``func`` reads the shape, dtype or the like of a tensor, but not its values."""
    if getattr(func, "__name__", "") == "__get__":
        return _name(func) not in _ATTRIBUTES_WITH_VALUES
    return named(_name(func)).reads_shape


def _written_by(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return the tensor that a call of ``func`` writes into; None if it writes into none."""
    name = _name(func)
    special = name.startswith("__")
    writes = name in ("__setitem__", "__set__") or (special and name in _IN_PLACE_OPERATORS)
    writes = writes or (not special and name.endswith("_")) or kwargs.get("inplace") is True
    target = kwargs.get("out", args[0] if writes and args else None)
    return target if isinstance(target, Tensor) else None


_ATTRIBUTES_WITH_VALUES = ("T", "mT", "H", "mH", "data", "real", "imag", "grad")

_IN_PLACE_OPERATORS = {
    f"__{name}__" for name in vars(operator) if name.startswith("i") and not name.startswith("is")
}


def _as_node(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Return the kind, the target and the arguments of a node that calls ``func``."""
    if not is_tensor_method_or_property(func):
        return "call_function", func, args
    name = func.__name__
    if name == "__get__":
        return "call_function", getattr, (args[0], _name(func))
    if name.startswith("__") and hasattr(operator, name):
        return "call_function", getattr(operator, name), args
    return "call_method", name, args
