"""Read the forward of one block as a graph, in which every child is a single node.

The graph serves to find out what the forward does. It is not handed to the user and not run as it
stands, and reading it changes no module.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from torchdrop.internals import call_by_full_name, own_saved_tensor_hooks
from torchdrop.tracing.call_arguments import A_TENSOR, flatten_arguments
from torchdrop.tracing.calls_of_forward import FirstImportError
from torchdrop.tracing.fixed_values import UsedAsKeyError
from torchdrop.tracing.handed_on_sums import Handed, add_handed_on, handed_on
from torchdrop.tracing.left_behind import remove_stored_proxies
from torchdrop.tracing.modes import MODE_KINDS, Modes
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.own_forward import own_forward
from torchdrop.tracing.padded_sums import merge_partial_sums
from torchdrop.tracing.process_state import PROCESS_LOCK
from torchdrop.tracing.random_states import RandomStates
from torchdrop.tracing.stacked_sums import unstack_sums
from torchdrop.tracing.traced_functions import passed_through
from torchdrop.tracing.tracer import ForwardTracer
from torchdrop.tracing.untraceable import UntraceableError
from torchdrop.tracing.watched_globals import WatchedGlobals

__all__ = ["BlockGraph", "PlainValue", "trace_block"]

# How often a block is read if other threads draw random numbers of Python or NumPy meanwhile.
_ATTEMPTS_WITH_OTHER_THREADS = 5

# The error of a compiled function that gets a proxy as a tensor.
_CALL_OF_SCRIPT = re.compile(r"(\w+)\(\) Expected a value of type .*Proxy")

# How many sizes, dtypes and devices one forward may use as keys of caches.
_KEYS = 32


@dataclass
class BlockGraph:
    """One block's own forward, for one kind of call.

    Attributes:
        module: The block.
        graph: Its forward. Children are single nodes; unused attributes, items and shapes are
            removed.
        arguments: The arguments by name that the forward was read with. A tensor is represented
            by one without data, or by ``A_TENSOR``.
        tensors: The arguments that became placeholders, in order: their names, and for a tensor
            in a tuple, list or dict the name with a path ("states.0").
        constants: The other arguments, and the sizes of containers. They are fixed in the graph.
        attributes: The plain attributes that the forward read, by their path from the block. They
            are fixed in the graph, too.
        decisions: A graph with the same placeholders that computes the conditions on which the
            forward branched, such as ``x.dim() == 3``; None if there are none. Only conditions on
            shapes and dtypes of arguments, and the keys of :class:`FixedValues`, are included;
            others set ``uses_inner_shapes``.
        decided: The values of these conditions for ``arguments``.
        uses_inner_shapes: Whether the forward used the shapes of values that it computes, or the
            device of an argument. The graph then holds only for calls whose tensors have the same
            shapes and dtypes.
        inlined: The paths of the children whose forwards are part of the graph.
        items: For each child in the graph, its entry in the argument ``items`` of
            :func:`trace_block`, by its path.
        modes: The modes (gradients, autocast and the like) under which the forward was read. A node
            that was recorded under others has them in ``node.meta["modes"]``.
        asks: Which kinds of modes the forward asks for or sets. The graph holds only where these
            are the same.
        watched_globals: The values of the global variables that the forward names, which are fixed
            in the graph; None if it names none.
        handed: Which items of its output are a branch and the stream to which the next block adds
            it; None if it hands on no branch. In the graph, the branch is a sum with zeros.
    """

    module: nn.Module
    graph: fx.Graph
    arguments: dict[str, Any]
    tensors: list[str]
    constants: dict[str, Any]
    attributes: dict[str, Any]
    decisions: fx.Graph | None
    decided: list[bool]
    uses_inner_shapes: bool
    inlined: list[str]
    items: dict[str, Sequence[Any]]
    modes: Modes | None = None
    asks: tuple[str, ...] = ()
    watched_globals: WatchedGlobals | None = None
    handed: Handed | None = None


@dataclass(frozen=True)
class PlainValue:
    """A number, a string or a list of them that a child returned, such as a feature map's size."""

    value: Any


def trace_block(
    module: nn.Module,
    *,
    training: bool = True,
    arguments: Mapping[str, Any] | None = None,
    batch_dim: int = 0,
    inlined: Collection[nn.Module] = (),
    items: Mapping[nn.Module, Sequence[Any]] | None = None,
) -> BlockGraph:
    """Read ``module``'s own forward.

    Args:
        module: The block. It is not changed.
        training: Whether the forward is read in training mode or in evaluation.
        arguments: The arguments by name of a call that happened: its tensors become placeholders,
            everything else is fixed. None: parameters without a default are tensors, the others
            have their default.
        batch_dim: Which dimension of the tensors is the batch.
        inlined: Children whose forwards become part of the graph.
        items: What each child returned in that call, item by item: None; the position or the name
            of an argument of the child, if the item was that argument; a :class:`PlainValue`; or
            ``...`` for anything else. In the graph, the value takes the place of the item.

    Raises:
        UntraceableError: The forward cannot be read; the message says where and why.
    """
    with PROCESS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about some uses of proxies
        generators = RandomStates()
        try:
            with _errors_with_line(module):
                make_tracer = partial(
                    ForwardTracer,
                    arguments,
                    training,
                    batch_dim,
                    inlined,
                    # shared by all attempts: each adds what the next one needs
                    fixed=set(),
                    imported=set(),
                )
                tracer, graph = _trace_without_draws(module, make_tracer)
        except UntraceableError:
            generators.restore()
            raise
    with _errors_with_line(module):
        tracer.tensor_constants.finish(graph)
    for node in graph.nodes:
        # otherwise running the text that fx writes would wrap the function in all later traces
        call_by_full_name(node)
    decisions = _decisions(graph, list(tracer.decisions)) if tracer.decisions else None
    if items:
        _replace_known_items(graph, module, items)
    unstack_sums(graph)
    merge_partial_sums(graph)
    reads_again = partial(
        trace_block, module, training=training, batch_dim=batch_dim, inlined=inlined, items=items
    )
    handed = handed_on(graph, lambda: _adds_a_missing_input(tracer.arguments, reads_again))
    if handed is not None:
        add_handed_on(graph, handed)
    _remove_unused(graph)
    return BlockGraph(
        module=module,
        graph=graph,
        arguments=tracer.arguments,
        tensors=tracer.tensors,
        constants=tracer.constants,
        attributes=_plain(tracer.watch.attributes),
        decisions=decisions,
        decided=list(tracer.decisions.values()),
        uses_inner_shapes=tracer.uses_inner_shapes,
        inlined=[str(node.args[1]) for node in graph.nodes if node.target is passed_through],
        items=_known_items(graph, module, items or {}),
        modes=tracer.modes_outside,
        watched_globals=WatchedGlobals(tracer.calls.functions, own_forward(module)) or None,
        asks=tuple(kind for kind in MODE_KINDS if kind in tracer.calls.modes),
        handed=handed,
    )


def _adds_a_missing_input(arguments: Mapping[str, Any], reads: Callable[..., BlockGraph]) -> bool:
    """Whether a block hands on a branch if it gets a tensor for one of its missing arguments.

    Args:
        arguments: The arguments that the block was read with.
        reads: Reads the block with other arguments.
    """
    tensor = next(iter(flatten_arguments(arguments)[1].values()), A_TENSOR)
    for name in [name for name, value in arguments.items() if value is None]:
        with suppress(UntraceableError):
            if reads(arguments={**arguments, name: tensor}).handed is not None:
                return True
    return False


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that are neither tensors nor modules."""
    return {k: v for k, v in attributes.items() if not isinstance(v, Tensor | nn.Module)}


def _trace_without_draws(
    module: nn.Module, make_tracer: partial[ForwardTracer]
) -> tuple[ForwardTracer, fx.Graph]:
    """Trace the forward of ``module``, and make sure that it draws no random number in Python.

    If it drew one, the graph would repeat one and the same decision in every call. Other threads
    may draw numbers of Python and NumPy meanwhile, so the forward is read again if some were drawn.
    """
    alone = threading.active_count() == 1
    left = 1 if alone else _ATTEMPTS_WITH_OTHER_THREADS
    keys = 0
    while left:
        tracer = make_tracer()
        draws, generators = tracer.tensor_constants.draws, RandomStates()
        try:
            with (
                own_saved_tensor_hooks() as hooks,
                tracer.watch.watching(module, tracer.works_out_shapes),
                tracer.tensor_constants,
            ):
                tracer.saved_tensor_hooks = hooks
                graph = tracer.trace(module)
        except BaseException as error:
            _clear_frames(error)  # which hold proxies, too
            remove_stored_proxies(tracer.proxies)
            if isinstance(error, FirstImportError):
                with suppress(ImportError):  # the forward may handle it
                    importlib.import_module(str(error))
                continue
            if not isinstance(error, UsedAsKeyError):
                raise
            keys += 1
            if keys > _KEYS:
                raise UntraceableError("it uses too many sizes as keys of caches") from None
            continue
        finally:
            draws.undo()
        kept = remove_stored_proxies(tracer.proxies)
        if kept:
            raise UntraceableError(f"it keeps what it computes in {kept}")
        if not generators.changed(alone=alone):
            return tracer, graph
        left -= 1
    raise UntraceableError("it draws random numbers in Python")


def _clear_frames(error: BaseException) -> None:
    """Free the local variables of the functions that ``error`` and its contexts passed through."""
    current: BaseException | None = error
    while current is not None:
        traceback.clear_frames(current.__traceback__)
        current = current.__context__


@contextmanager
def _errors_with_line(module: nn.Module) -> Iterator[None]:
    """Turn every error of a forward into an UntraceableError that names the line."""
    try:
        yield
    except UntraceableError as error:
        raise type(error)(f"{_where(module, error)}: {error}") from None
    except Exception as error:
        # A user's forward may raise anything if it is called with proxies.
        first = str(error).splitlines()[0] if str(error) else ""
        reason = f"{type(error).__name__}: {first}"
        if compiled := _CALL_OF_SCRIPT.match(first):
            reason = f"torch.jit.script has compiled {compiled[1]}(), and cannot run it on the "
            reason += "proxies with which a forward is read; use the Python function"
        raise UntraceableError(f"{_where(module, error)}: {reason}") from None


def _where(module: nn.Module, error: BaseException) -> str:
    """Return the file and line, in the user's own code, where reading ``module`` ended."""
    try:
        file = inspect.getsourcefile(type(module))
    except TypeError:
        file = None
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if not frames:
        return type(module).__name__
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})"


def _decisions(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Graph:
    """Return the part of ``graph`` that computes ``nodes`` from its placeholders."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = part.node_copy(node, copied)
        return copies[node]

    for node in graph.nodes:
        if node.op == "placeholder":
            copied(node)
    part.output(tuple(map(copied, nodes)))
    return part


_UNKNOWN = object()


def _replace_known_items(
    graph: fx.Graph, module: nn.Module, items: Mapping[nn.Module, Sequence[Any]]
) -> None:
    """Replace the items of what children return by their values, as far as these are known.

    The node of an item stays, with the value in ``meta["expected"]``, so that each call can compare
    what the child returns with it.

    An attention returns None in place of weights that are not asked for, or the bias that it was
    given, or the size of its feature map. Otherwise a use of such an item outside the branch would
    count as a use of the branch.
    """
    for node in list(graph.nodes):
        call = node.args[0] if node.target is operator.getitem else None
        if not isinstance(call, fx.Node) or call.op != "call_module":
            continue
        returned = items.get(module.get_submodule(str(call.target)))
        known = _UNKNOWN if returned is None else _known_item(returned, node.args[1], call)
        if known is _UNKNOWN:
            continue
        for user in list(node.users):
            swap = partial(_swapped, node, known)
            user.args = fx.map_arg(user.args, swap)
            user.kwargs = fx.map_arg(user.kwargs, swap)
        node.meta["expected"] = known


def _known_item(items: Sequence[Any], index: Any, call: fx.Node) -> Any:
    """Return the value of the item ``index`` of what ``call`` returns; _UNKNOWN if it may vary."""
    if isinstance(index, slice):  # several items of a tuple
        chosen = items[index]
        if not all(item is None or isinstance(item, PlainValue) for item in chosen):
            return _UNKNOWN
        return tuple(None if item is None else item.value for item in chosen)
    if not isinstance(index, int) or index >= len(items):
        return _UNKNOWN
    item = items[index]
    if isinstance(item, int | str):  # it was this argument of the child
        given: Any = call.args if isinstance(item, int) else call.kwargs
        try:
            return given[item]
        except LookupError:
            return _UNKNOWN
    if isinstance(item, PlainValue):
        return item.value
    return None if item is None else _UNKNOWN


def _swapped(old: fx.Node, new: Any, node: fx.Node) -> Any:
    return new if node is old else node


def _known_items(
    graph: fx.Graph, module: nn.Module, items: Mapping[nn.Module, Sequence[Any]]
) -> dict[str, Sequence[Any]]:
    """Return the entries of ``items`` by the path of the child, for the children in the graph."""
    calls = (str(node.target) for node in graph.nodes if node.op == "call_module")
    found = ((path, items.get(module.get_submodule(path))) for path in calls)
    return {path: returned for path, returned in found if returned}


def _remove_unused(graph: fx.Graph) -> None:
    """Remove attributes, items and shapes that no node uses, such as unpacked attention weights."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op not in ("call_function", "call_method", "get_attr"):
            continue
        if "expected" in node.meta:  # compared with the value in each call
            continue
        if node.op == "get_attr" or node.target is operator.getitem or is_shape_node(node):
            graph.erase_node(node)
