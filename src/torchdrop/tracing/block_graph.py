"""READ one block: its own forward as a graph, every child a leaf. Nothing here changes a module.

torch.fx is used to read. The graph is never handed to the user and never run as it stands.
"""

from __future__ import annotations

import inspect
import operator
import threading
import traceback
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from torchdrop.internals import call_by_full_name
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.padded_sums import merge_partial_sums
from torchdrop.tracing.random_states import RandomStates, TorchDraws
from torchdrop.tracing.traced_functions import passed_through
from torchdrop.tracing.tracer import Reader, RecordFactories
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["BlockGraph", "Fixed", "trace_block"]

# torch.fx patches nn.Module for the whole process while it traces.
_LOCK = threading.RLock()

# How often a block is read while other threads draw numbers of Python or numpy.
_READINGS_IN_COMPANY = 5


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


@dataclass(frozen=True)
class Fixed:
    """What a child returned that is no tensor: the size of a feature map, say."""

    value: Any


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
        outputs: What children returned in that call, as ``Recording.items`` has
            it: an item that was None is None in the graph, one that was an argument is it.

    Raises:
        UntraceableError: The forward cannot be read; the message says where and why.
    """
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of functions that wonder about proxies
        before = RandomStates()
        # Random numbers that decide in Python are refused: the graph would hold one decision for
        # ever. Other threads may draw meanwhile: those of torch are told apart from this one's,
        # and where they draw others, the block is read again.
        alone = threading.active_count() == 1
        for left in reversed(range(1 if alone else _READINGS_IN_COMPANY)):
            reader = Reader(arguments, training, batch_dim, look_through)
            draws = TorchDraws()  # type: ignore[no-untyped-call]
            states = RandomStates()
            try:
                with (
                    reader.lender.watching(module, reader.is_asking),
                    RecordFactories(reader),
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
        call_by_full_name(node)
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


def _drop_unused(graph: fx.Graph) -> None:
    """Remove nodes that nobody uses and that have no effect (an unpacked attention weight)."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op not in ("call_function", "call_method", "get_attr"):
            continue
        if "expected" in node.meta:  # it is to be compared
            continue
        if node.op == "get_attr" or node.target is operator.getitem or is_shape_node(node):
            graph.erase_node(node)
