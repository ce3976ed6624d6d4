"""Follow the outputs of dropouts through the forwards of a model to the BatchNorms they reach."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from torchdrop.finding.example_calls import Calls
from torchdrop.finding.existing_drops import is_mask, layer_rate
from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.internals import BatchNormBase
from torchdrop.running.forward_slot import MaskBypass, occupant_of
from torchdrop.running.split_site import SplitSite
from torchdrop.tracing.block_graph import BlockGraph, trace_block
from torchdrop.tracing.call_arguments import A_TENSOR
from torchdrop.tracing.nodes import is_shape_node
from torchdrop.tracing.operations import callee, layers_with, operation_of
from torchdrop.tracing.own_forward import signature_of_forward
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["AN_INPUT", "DataFlow", "Dropout"]


def _is_dropout(module: nn.Module) -> bool:
    """Whether ``module`` is a dropout layer, or another layer that drops at random.

    It is one by its class, or by "drop" or "shake" in its class name. The name counts only for
    layers without parameters and children, because a block may have such a name, too.
    """
    if isinstance(module, layers_with("drops")) or is_mask(module):
        return True
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0.0
    if type(module).__module__.startswith("torchdrop.layers."):
        return layer_rate(module) is not None
    name = type(module).__name__.lower()
    has_parts = any(True for _ in module.parameters()) or any(True for _ in module.children())
    return not has_parts and ("drop" in name or "shake" in name)


@dataclass(frozen=True)
class Dropout:
    """One layer, or one call of a function, that drops.

    Attributes:
        path: The path of the layer. For a function, the path of the module that calls it and its
            name ("head.dropout()"). For stochastic depth, the name of the branch.
        kind: The class or function: "Dropout", "DropPath", "dropout()", "stochastic depth".
        rate: Its drop probability; None if it is not known.
        node: The name of the node if it is the call of a function, which distinguishes two calls in
            one forward.
    """

    path: str
    kind: str
    rate: float | None
    node: str = ""


# The dropouts that a value depends on. For each: the number of operations between the dropout and
# the value, and True if the dependence is an assumption, because a forward could not be read.
_Flow = dict[Dropout, tuple[int, bool]]


def _merge(flows: Iterable[_Flow]) -> _Flow:
    """Return the dropouts of all ``flows``, each with its shortest distance.

    A dependence that a graph shows takes precedence over one that is assumed.
    """
    merged: _Flow = {}
    for flow in flows:
        for source, (distance, assumed) in flow.items():
            known = merged.get(source)
            if known is None or (assumed, distance) < (known[1], known[0]):
                merged[source] = distance, assumed
    return merged


def _leaves(value: Any) -> Iterator[_Flow]:
    """Yield the flow of a value, or of each item if it is a container."""
    if isinstance(value, _Value):
        if value.parts is None:
            yield value.flow
        else:
            for part in value.parts.values():
                yield from _leaves(part)


class _Value:
    """A value in a forward, represented by the dropouts that it depends on.

    Args:
        flow: The dropouts, if the value is not a container.
        parts: The items of a container, by index or key.
    """

    def __init__(self, flow: _Flow, parts: dict[Any, Any] | None = None) -> None:
        self.flow = flow
        self.parts = parts

    def merged(self) -> _Flow:
        """Return the dropouts that the value, or any item of it, depends on."""
        return _merge(_leaves(self))

    def part(self, key: Any) -> _Value:
        """Return the item at ``key``; if the items are not known, a value that depends on all."""
        if self.parts is not None and isinstance(key, int | str):
            if isinstance(key, int) and key < 0:
                key += len(self.parts)
            found = self.parts.get(key)
            return found if isinstance(found, _Value) else _Value(self.merged())
        return _Value(self.merged())


def _value_of(argument: Any, env: Mapping[fx.Node, _Value]) -> _Value:
    """Return the value of an argument of a node."""
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
    """Return an argument of a node in the form in which :func:`trace_block` takes it."""
    if isinstance(argument, fx.Node):
        return A_TENSOR
    if type(argument) in (tuple, list):
        return type(argument)(_as_given(item) for item in argument)
    if isinstance(argument, tuple | list):  # fx has immutable subclasses of both
        kind = list if isinstance(argument, list) else tuple
        return kind(_as_given(item) for item in argument)
    if isinstance(argument, dict):
        return {key: _as_given(item) for key, item in argument.items()}
    return argument


# An argument of the model: a tensor that depends on no dropout, and its form for trace_block.
AN_INPUT = (_Value({}), A_TENSOR)


class DataFlow:
    """Follows the outputs of all dropouts of a model to the BatchNorms that they reach.

    ``module`` follows the values of one call through a module, and returns its output. It is called
    once for the model, and calls itself for each module in the forwards.

    Args:
        model: The model.
        recorded: The arguments that its blocks are called with, by path; may be empty.

    Attributes:
        dropouts: The dropouts in the order of the forward pass.
        reached: The BatchNorms that each dropout reaches, by path, each with its distance and with
            whether the dependence is assumed.
        unreadable: Why forwards could not be read, by the paths of the modules.
    """

    def __init__(self, model: nn.Module, recorded: Calls) -> None:
        self.paths = {m: path for path, m in reversed(list(model.named_modules()))}
        self.recorded = recorded
        self.unreadable: dict[str, str] = {}
        self.reached: dict[Dropout, dict[str, tuple[int, bool]]] = {}
        self.dropouts: dict[Dropout, None] = {}
        self._being_read: list[nn.Module] = []

    def start(self, path: str, kind: str, rate: float | None, node: str = "") -> _Flow:
        """Return the flow that begins at a dropout."""
        source = Dropout(path, kind, rate, node)
        self.dropouts.setdefault(source)
        return {source: (0, False)}

    def reach(self, path: str, flow: _Flow) -> None:
        """Record that the BatchNorm at ``path`` takes a value that depends on ``flow``."""
        for source, (distance, assumed) in flow.items():
            found = self.reached.setdefault(source, {})
            known = found.get(path)
            if known is None or (assumed, distance + 1) < (known[1], known[0]):
                found[path] = distance + 1, assumed

    def module(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Value:
        """Return the output of ``module``.

        Args:
            module: The module.
            args: Its positional arguments, each as a pair of its value and of what ``trace_block``
                takes for it.
            kwargs: Its keyword arguments, as the same pairs.
        """
        path = self.paths[module]
        flow_in = _merge(v.merged() for v, _ in [*args, *kwargs.values()])
        if isinstance(module, BatchNormBase):
            self.reach(path, flow_in)
            return _Value({})  # only the first BatchNorm on a path is reported
        if isinstance(occupant_of(module), MaskBypass):
            return _Value(flow_in)
        if _is_dropout(module):
            return self._through_dropout(module, path, flow_in)
        if _is_operation(module):
            return _Value(_after_one_operation(flow_in))
        return self._through_forward(module, path, flow_in, args, kwargs)

    def _through_dropout(self, module: nn.Module, path: str, flow_in: _Flow) -> _Value:
        """Return the output of a dropout; modules inside it are followed as well."""
        inner = [self._through_child(child, flow_in) for child in _children(module)]
        flow = _merge([_after_one_operation(flow_in), *inner])
        rate = layer_rate(module)
        if rate == 0.0:
            return _Value(flow)
        return _Value(_merge([flow, self.start(path, type(module).__name__, rate)]))

    def _through_child(self, module: nn.Module, flow_in: _Flow) -> _Flow:
        """Return the flow out of a module whose arguments are not known, as if it took a tensor."""
        return self.module(module, [(_Value(flow_in), A_TENSOR)], {}).merged()

    def _through_forward(
        self,
        module: nn.Module,
        path: str,
        flow_in: _Flow,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> _Value:
        """Return the output of a module by following its own forward."""
        if module in self._being_read:  # it calls itself
            return _Value(flow_in)
        self._being_read.append(module)
        try:
            try:
                block, inputs = self._read(module, path, args, kwargs)
                adds = _attached_adds(module, block)
            except UntraceableError as error:
                return self._through_unreadable(module, path, flow_in, str(error))
            return self._through_graph(block, path, inputs, adds)
        finally:
            self._being_read.pop()

    def _read(
        self, module: nn.Module, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[BlockGraph, dict[str, _Value]]:
        """Return the graph of a module for this call, and the values of its arguments by name."""
        # Not that of module.forward, which stochastic depth may have replaced.
        signature = signature_of_forward(module)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            # The arguments are not known if the module is called in a forward that could not be
            # read. Then those of the example call are taken.
            if path in self.recorded:
                merged = _Value(_merge(v.merged() for v, _ in [*args, *kwargs.values()]))
                given = self.recorded[path]
                return trace_block(module, arguments=given), dict.fromkeys(given, merged)
            raise UntraceableError(f"its arguments are not known: {error}") from None
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

    def _through_unreadable(self, module: nn.Module, path: str, flow_in: _Flow, why: str) -> _Value:
        """Return the output of a module whose forward cannot be read.

        Its children are followed one by one. Each is assumed to get the input of the module, and
        the output of the module is assumed to depend on all of them.
        """
        self.unreadable.setdefault(path, why)
        flows = [{source: (distance, True) for source, (distance, _) in flow_in.items()}]
        for child in _children(module):
            out = self._through_child(child, flows[0])
            flows.append({source: (distance, True) for source, (distance, _) in out.items()})
        return _Value(_after_one_operation(_merge(flows)))

    def _through_graph(
        self,
        block: BlockGraph,
        path: str,
        inputs: Mapping[str, _Value],
        adds: Mapping[fx.Node, tuple[str, float]],
    ) -> _Value:
        """Follow the values of one forward, node by node, and return its output.

        Args:
            block: The graph of the forward.
            path: The path of the module.
            inputs: The values of its arguments, by name.
            adds: The additions whose branches stochastic depth drops: name and rate of the branch.
        """
        env: dict[fx.Node, _Value] = {}
        # For each placeholder the argument and the keys that lead to its tensor: "batch.image.0".
        tensor_paths = iter(block.tensors)
        result = _Value({})
        for node in block.graph.nodes:
            if node.op == "placeholder":
                name, *keys = next(tensor_paths).split(".")
                value = inputs.get(name, _Value({}))
                for key in keys:
                    value = value.part(int(key) if key.isdecimal() else key)
                env[node] = value
            elif node.op == "output":
                result = _value_of(node.args[0], env)
            else:
                env[node] = self._through_node(block.module, path, node, env)
                if node in adds:
                    name, rate = adds[node]
                    drop = self.start(name, "stochastic depth", rate)
                    env[node] = _Value(_merge([env[node].merged(), drop]))
        return result

    def _through_node(
        self, owner: nn.Module, path: str, node: fx.Node, env: Mapping[fx.Node, _Value]
    ) -> _Value:
        """Return the value of one node of the forward of ``owner``."""
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
            self.reach(label, flow)
            return _Value({})
        flow = _after_one_operation(flow)
        if entry.drops is not None:
            rate = entry.drops.rate(node)
            if rate != 0.0:
                flow = _merge([flow, self.start(label, f"{name}()", rate, node.name)])
        return _Value(flow)


def _after_one_operation(flow: _Flow) -> _Flow:
    """Return ``flow`` with all distances larger by 1."""
    return {source: (distance + 1, assumed) for source, (distance, assumed) in flow.items()}


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of ``module``, and in place of a ModuleList or ModuleDict its elements."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(child)
        elif not isinstance(child, nn.ParameterList | nn.ParameterDict):
            yield child


def _is_operation(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of torch that does not consist of other layers.

    The projections inside attention count as a part of it.
    """
    if isinstance(module, nn.MultiheadAttention):
        return True
    return type(module).__module__.startswith("torch.nn.") and not any(
        True for _ in module.children()
    )


def _attached_adds(module: nn.Module, block: BlockGraph) -> dict[fx.Node, tuple[str, float]]:
    """Return the additions whose branches stochastic depth drops: name and rate of each branch."""
    site = occupant_of(module)
    if not isinstance(site, SplitSite):
        return {}
    # The site knows its sums by their order among the residual sums of the forward.
    entries = read_residual_sums(block)
    if len(entries) <= max(site.orders):
        raise UntraceableError("it does not add the same branches in every call")
    return {
        entries[order].split.add: (branch.facts.name, branch.rate.p)
        for order, branch in zip(site.orders, site.branches, strict=True)
        if branch.rate.p > 0.0
    }
