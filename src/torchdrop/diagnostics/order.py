"""Where a dropout stands before a BatchNorm, read from the forwards of a model."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import fx, nn

from torchdrop.checks import check_model
from torchdrop.diagnostics.batches import check_sizes_known
from torchdrop.finding.example_calls import Calls, record
from torchdrop.finding.existing_drops import is_mask, layer_rate
from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.internals import BatchNormBase
from torchdrop.running.forward_slot import MaskBypass, occupant_of
from torchdrop.running.split_site import SplitSite
from torchdrop.tracing.block_graph import BlockGraph, trace_block
from torchdrop.tracing.call_arguments import A_TENSOR
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.operations import callee, layers_with, operation_of
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["OrderFinding", "OrderReport", "check_order"]


@dataclass(frozen=True)
class OrderFinding:
    """One dropout whose output reaches a BatchNorm.

    Attributes:
        dropout: The path of the dropout; of a function, the path of the module that calls it and
            its name ("head.dropout()"); of attached stochastic depth, the branch's name.
        kind: The class or function: "Dropout", "DropPath", "dropout()", "stochastic depth".
        rate: Its rate, where it has one that can be read.
        batch_norm: The path of the nearest BatchNorm behind it.
        forward: The path of the innermost module whose forward holds both; empty for the model.
        distance: How many operations lead from the dropout to the BatchNorm, itself included: 1
            where it takes the dropout's output.
        further: The other BatchNorms that the output reaches before any BatchNorm, in order.
        assumed: Whether the way leads through a forward that could not be read, where every output
            is taken to depend on every input and part.
    """

    dropout: str
    kind: str
    rate: float | None
    batch_norm: str
    forward: str
    distance: int
    further: tuple[str, ...] = ()
    assumed: bool = False

    def __str__(self) -> str:
        rate = "" if self.rate is None else f", {self.rate:g}"
        where = f"in {self.forward}" if self.forward else "in the model's own forward"
        text = f"{self.dropout} ({self.kind}{rate}) stands before {self.batch_norm}: {where}, "
        text += f"{self.distance} operation{'s' if self.distance != 1 else ''} on"
        if self.further:
            text += f"; and before {len(self.further)} more"
        return text + (" (assumed)" if self.assumed else "")


class OrderReport(Sequence[OrderFinding]):
    """What :func:`check_order` found: a sequence of findings, empty where all is well.

    Attributes:
        findings: One for each dropout before a BatchNorm, in the order of the forward pass.
        unreadable: The modules whose forward could not be read, with the reason. The order of
            their parts is not known.
    """

    def __init__(
        self, model: str, findings: list[OrderFinding], unreadable: dict[str, str], norms: int
    ) -> None:
        self.findings = findings
        self.unreadable = unreadable
        self._model = model
        self._norms = norms

    def __len__(self) -> int:
        return len(self.findings)

    @overload
    def __getitem__(self, key: int) -> OrderFinding: ...

    @overload
    def __getitem__(self, key: slice) -> list[OrderFinding]: ...

    def __getitem__(self, key: int | slice) -> OrderFinding | list[OrderFinding]:
        return self.findings[key]

    def __repr__(self) -> str:
        count = len(self.findings)
        title = f"order in {self._model}: "
        if count:
            title += f"{count} dropout{'s' if count != 1 else ''} before a BatchNorm"
        elif not self._norms:
            title += "no BatchNorm"
        else:
            title += "no dropout before a BatchNorm" + (" was seen" if self.unreadable else "")
        lines = [title, *(f"  {finding}" for finding in self.findings)]
        for name, why in self.unreadable.items():
            lines.append(f"  not read: {name or 'the model'}: {why}")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Layers that drop


def _drops(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that drops or shakes, by its class or its name."""
    if isinstance(module, layers_with("drops")) or is_mask(module):
        return True
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0.0
    if type(module).__module__.startswith("torchdrop.layers."):
        return layer_rate(module) is not None
    name = type(module).__name__.lower()
    bare = next(module.parameters(), None) is None and next(module.children(), None) is None
    return bare and ("drop" in name or "shake" in name)


# ---------------------------------------------------------------------------------------------
# What flows


@dataclass(frozen=True)
class _Source:
    path: str
    kind: str
    rate: float | None
    node: str = ""  # of a function, since a forward may call one twice


# For each dropout whose output a value depends on: how many operations ago, and whether the way
# was read or assumed.
_Flow = dict[_Source, tuple[int, bool]]


def _merge(flows: Iterable[_Flow]) -> _Flow:
    merged: _Flow = {}
    for flow in flows:
        for source, (distance, assumed) in flow.items():
            known = merged.get(source)
            if known is None or (assumed, distance) < (known[1], known[0]):
                merged[source] = distance, assumed
    return merged


def _leaves(value: Any) -> Iterator[_Flow]:
    """The flows in what a node stands for: one, or a container of some."""
    if isinstance(value, _Value):
        if value.parts is None:
            yield value.flow
        else:
            for part in value.parts.values():
                yield from _leaves(part)


class _Value:
    """A value of a forward: the dropouts that it depends on, for each part of a container."""

    def __init__(self, flow: _Flow, parts: dict[Any, Any] | None = None) -> None:
        self.flow = flow
        self.parts = parts

    def merged(self) -> _Flow:
        return _merge(_leaves(self))

    def part(self, key: Any) -> _Value:
        if self.parts is not None and isinstance(key, int | str):
            if isinstance(key, int) and key < 0:
                key += len(self.parts)
            found = self.parts.get(key)
            return found if isinstance(found, _Value) else _Value(self.merged())
        return _Value(self.merged())


def _value_of(argument: Any, env: Mapping[fx.Node, _Value]) -> _Value:
    """What an argument of a node stands for."""
    if isinstance(argument, fx.Node):
        return env[argument]
    if isinstance(argument, tuple | list):
        return _Value({}, {i: _value_of(item, env) for i, item in enumerate(argument)})
    if isinstance(argument, dict):
        return _Value({}, {key: _value_of(item, env) for key, item in argument.items()})
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return _value_of(parts, env)
    return _Value({})


def _as_given(argument: Any) -> Any:
    """An argument of a node as :func:`trace_block` takes it."""
    if isinstance(argument, fx.Node):
        return A_TENSOR
    if type(argument) in (tuple, list):
        return type(argument)(_as_given(item) for item in argument)
    if isinstance(argument, tuple | list):  # fx keeps its own immutable kinds
        kind = list if isinstance(argument, list) else tuple
        return kind(_as_given(item) for item in argument)
    if isinstance(argument, dict):
        return {key: _as_given(item) for key, item in argument.items()}
    return argument


class _Walk:
    """One pass through a model in the order of its data."""

    def __init__(self, model: nn.Module, recorded: Calls) -> None:
        self.paths = {m: path for path, m in reversed(list(model.named_modules()))}
        self.recorded = recorded
        self.unreadable: dict[str, str] = {}
        # by dropout: by BatchNorm: the distance and whether it is assumed
        self.reached: dict[_Source, dict[str, tuple[int, bool]]] = {}
        self.order: dict[_Source, None] = {}
        self._within: list[nn.Module] = []

    def source(self, path: str, kind: str, rate: float | None, node: str = "") -> _Flow:
        source = _Source(path, kind, rate, node)
        self.order.setdefault(source)
        return {source: (0, False)}

    def meet(self, path: str, flow: _Flow) -> None:
        """A BatchNorm takes ``flow``."""
        for source, (distance, assumed) in flow.items():
            found = self.reached.setdefault(source, {})
            known = found.get(path)
            if known is None or (assumed, distance + 1) < (known[1], known[0]):
                found[path] = distance + 1, assumed

    def module(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Value:
        """The output of ``module`` for arguments that are pairs of a value and how it is given."""
        path = self.paths[module]
        taken = _merge(v.merged() for v, _ in [*args, *kwargs.values()])
        if isinstance(module, BatchNormBase):
            self.meet(path, taken)
            return _Value({})
        if isinstance(occupant_of(module), MaskBypass):
            return _Value(taken)
        if _drops(module):
            return self.dropping(module, path, taken)
        if _is_operation(module):
            return _Value(_one_on(taken))
        return self.forward(module, path, taken, args, kwargs)

    def dropping(self, module: nn.Module, path: str, taken: _Flow) -> _Value:
        """A layer that drops: what it holds (the module of a StochasticDepth) is read as well."""
        inner = [self.child(child, taken) for child in _children(module)]
        flow = _merge([_one_on(taken), *inner])
        rate = layer_rate(module)
        if rate == 0.0:
            return _Value(flow)
        return _Value(_merge([flow, self.source(path, type(module).__name__, rate)]))

    def child(self, module: nn.Module, taken: _Flow) -> _Flow:
        """The flow out of a module whose call is not seen."""
        return self.module(module, [(_Value(taken), A_TENSOR)], {}).merged()

    def forward(
        self,
        module: nn.Module,
        path: str,
        taken: _Flow,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> _Value:
        """The output of a module, by its own forward."""
        if module in self._within:
            return _Value(taken)
        self._within.append(module)
        try:
            try:
                block, inputs = self.read(module, path, args, kwargs)
                adds = _attached_adds(module, block)
            except UntraceableError as error:
                return self.opaque(module, path, taken, str(error))
            return self.graph(block, path, inputs, adds)
        finally:
            self._within.pop()

    def read(
        self, module: nn.Module, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[BlockGraph, dict[str, _Value]]:
        """The graph of a module as it is called, and the values of its arguments by name."""
        signature = inspect.signature(type(module).forward.__get__(module))
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            # called in a way that is not known: inside what could not be read, say
            if path in self.recorded:
                merged = _Value(_merge(v.merged() for v, _ in [*args, *kwargs.values()]))
                given = self.recorded[path]
                return trace_block(module, arguments=given), dict.fromkeys(given, merged)
            raise UntraceableError(f"how it is called is not known: {error}") from None
        values: dict[str, _Value] = {}
        given = {}
        for name, pair in bound.arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                values[name] = _Value({}, dict(enumerate(v for v, _ in pair)))
                given[name] = tuple(g for _, g in pair)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                values[name] = _Value({}, {k: v for k, (v, _) in pair.items()})
                given[name] = {k: g for k, (_, g) in pair.items()}
            else:
                values[name], given[name] = pair
        if path in self.recorded:
            return trace_block(module, arguments=self.recorded[path]), values
        bound.arguments = given
        bound.apply_defaults()
        return trace_block(module, arguments=bound.arguments), values

    def opaque(self, module: nn.Module, path: str, taken: _Flow, why: str) -> _Value:
        """A forward that cannot be read: its parts are read one by one, in no known order.

        Its input is taken to reach each part, and each part its output, by ways that are assumed.
        """
        self.unreadable.setdefault(path, why)
        flows = [{source: (distance, True) for source, (distance, _) in taken.items()}]
        for child in _children(module):
            out = self.child(child, flows[0])
            flows.append({source: (distance, True) for source, (distance, _) in out.items()})
        return _Value(_one_on(_merge(flows)))

    def graph(
        self,
        block: BlockGraph,
        path: str,
        inputs: Mapping[str, _Value],
        adds: Mapping[fx.Node, tuple[str, float]],
    ) -> _Value:
        """Follow the values of one forward, node by node."""
        env: dict[fx.Node, _Value] = {}
        places = iter(block.tensors)
        result = _Value({})
        for node in block.graph.nodes:
            if node.op == "placeholder":
                name, *keys = next(places).split(".")
                value = inputs.get(name, _Value({}))
                for key in keys:
                    value = value.part(int(key) if key.isdecimal() else key)
                env[node] = value
            elif node.op == "output":
                result = _value_of(node.args[0], env)
            else:
                env[node] = self.node(block.module, path, node, env)
                if node in adds:
                    name, rate = adds[node]
                    drop = self.source(name, "stochastic depth", rate)
                    env[node] = _Value(_merge([env[node].merged(), drop]))
        return result

    def node(
        self, owner: nn.Module, path: str, node: fx.Node, env: Mapping[fx.Node, _Value]
    ) -> _Value:
        if node.op == "get_attr" or is_shape_node(node):
            return _Value({})
        if node.op == "call_module":
            module = owner.get_submodule(str(node.target))
            args = [(_value_of(a, env), _as_given(a)) for a in node.args]
            kwargs = {k: (_value_of(a, env), _as_given(a)) for k, a in node.kwargs.items()}
            return self.module(module, args, kwargs)
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            return env[node.args[0]].part(node.args[1])
        flow = _merge(env[source].merged() for source in node.all_input_nodes)
        name, entry = callee(node), operation_of(node)
        label = f"{path}.{name}()" if path else f"{name}()"
        if entry.batch_norm:
            self.meet(label, flow)
            return _Value({})
        flow = _one_on(flow)
        if entry.drops is not None:
            rate = entry.drops.rate(node)
            if rate != 0.0:
                flow = _merge([flow, self.source(label, f"{name}()", rate, node.name)])
        return _Value(flow)


def _one_on(flow: _Flow) -> _Flow:
    return {source: (distance + 1, assumed) for source, (distance, assumed) in flow.items()}


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """The children that are called themselves: those of a ModuleList or ModuleDict for it."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(child)
        elif not isinstance(child, nn.ParameterList | nn.ParameterDict):
            yield child


def _is_operation(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own layers, and not made of others."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    return type(module).__module__.startswith("torch.nn.") and not any(
        True for _ in module.children()
    )


def _attached_adds(module: nn.Module, block: BlockGraph) -> dict[fx.Node, tuple[str, float]]:
    """The sums of a forward at which attached stochastic depth drops, with name and rate."""
    site = occupant_of(module)
    if not isinstance(site, SplitSite):
        return {}
    entries = read_residual_sums(block)
    if len(entries) <= max(site.orders):
        raise UntraceableError("it does not add the same branches in every call")
    return {
        entries[order].split.add: (branch.facts.name, branch.rate.p)
        for order, branch in zip(site.orders, site.branches, strict=True)
        if branch.rate.p > 0.0
    }


# ---------------------------------------------------------------------------------------------
# The check


def check_order(model: nn.Module, example_inputs: Any = None) -> OrderReport:
    """Say where a dropout stands before a BatchNorm: its noise gets into the running variance.

    Dropout changes the variance of what follows in training and not in evaluation; a BatchNorm
    behind it learns the one and meets the other (see :func:`variance_shift`, which measures it).
    The remedy of the reference is to drop after the last BatchNorm.

    The forwards are read, not run, in training mode: from the model down to its layers, the output
    of every dropout is followed through layers, functions and additions to the BatchNorms that it
    reaches. A way ends at a BatchNorm, so a dropout is reported with the BatchNorms next to it,
    the nearest first by the number of operations.

    Counted as dropout: ``torch.nn.Dropout`` of every kind, ``AlphaDropout``, the ``dropout`` of
    attention and recurrent layers, layers without parameters that are called something with "drop"
    or "shake" (DropPath, DropBlock, StochasticDepth, ...), this package's layers and attached
    stochastic depth, the functions of the same names, and masks drawn with ``bernoulli``; each
    where its rate is not 0 now.

    Args:
        model: Any module. It is left as it is.
        example_inputs: A tensor, a tuple, or a dict of keyword arguments, for models whose
            forwards cannot be read from their signatures alone; the model is then run once, in
            evaluation, and leaves no trace.

    Returns:
        A sequence of :class:`OrderFinding`, one a dropout, empty (false) where there is nothing to
        report. Its ``unreadable`` names the forwards that could not be read; their parts are read
        one by one, and what leads through them is marked as assumed.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: A layer has no sizes yet (lazy).

    Reference:
        Li et al. 2019, Understanding the Disharmony between Dropout and Batch Normalization by
        Variance Shift, arXiv:1801.05134.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3), nn.BatchNorm1d(3))
        >>> check_order(model)
        order in Sequential: 1 dropout before a BatchNorm
          0 (Dropout, 0.5) stands before 2: in the model's own forward, 2 operations on
    """
    check_model(model)
    check_sizes_known(model)
    recorded = {} if example_inputs is None else record(model, example_inputs).calls
    walk = _Walk(model, recorded)
    parameters = inspect.signature(type(model).forward.__get__(model)).parameters.values()
    empty = (_Value({}), A_TENSOR)
    args, kwargs = [], {}
    for parameter in parameters:
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[parameter.name] = empty
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                args.append(empty)
    walk.module(model, args, kwargs)
    findings = [_finding(source, walk.reached[source]) for source in walk.order
                if source in walk.reached]  # fmt: skip
    norms = sum(isinstance(m, BatchNormBase) for m in model.modules())
    return OrderReport(type(model).__name__, findings, walk.unreadable, norms)


def _finding(source: _Source, reached: dict[str, tuple[int, bool]]) -> OrderFinding:
    nearest = min(reached, key=lambda path: (reached[path][1], reached[path][0]))
    distance, assumed = reached[nearest]
    common = []
    for one, two in zip(source.path.split("."), nearest.split("."), strict=False):
        if one != two:
            break
        common.append(one)
    return OrderFinding(
        dropout=source.path,
        kind=source.kind,
        rate=source.rate,
        batch_norm=nearest,
        forward=".".join(common),
        distance=distance,
        further=tuple(path for path in reached if path != nearest),
        assumed=assumed,
    )
