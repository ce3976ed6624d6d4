"""FIND: the residual branches of a model. Reads, never changes anything.

A residual is an addition ``skip + branch`` in a block's own forward. The *branch* is what the one
side depends on and the other does not, holds parameters and is not linear; the *skip* is the
other side: the identity, or a linear projection (1x1 convolution, norm, pooling, zero padding).
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import fx, nn

from torchdrop.examples import ArgumentShapes, Example, Shapes, carries, same_rows
from torchdrop.layout import same_layout, told
from torchdrop.tracing import (
    BlockGraph,
    UntraceableError,
    is_shape_node,
    passed_through,
    trace_block,
    unfold,
)

__all__ = [
    "Branch",
    "Residual",
    "Split",
    "Survey",
    "find_residuals",
    "is_mask",
    "mask_rate",
    "outside_inputs",
    "read_splits",
    "survey",
]


# How a value carries the batch, by the name of its node: on which dimension, and how many entries
# each row has there (one after the other); None where it does not.
Cuts = dict[str, tuple[int, int] | None]


@dataclass(eq=False)
class Split:
    """How one addition of a graph falls into skip and branch.

    Attributes:
        place: Which of the residual additions of its forward it is, counted from 0.
        add: The addition.
        skip: Its operand that is always there.
        branch: Its operand that can be dropped.
        inside: The nodes that only the branch needs.
        skip_gain: What the addition multiplies the skip by.
        branch_gain: What it multiplies the branch by.
        writes_skip: Whether the sum is written into the memory of the skip.
        dim: The dimension of the skip that carries the batch; None where nothing tells it.
        told: What ``batch_first`` of which children says about that, where nothing else did.
        cuts: Where it was measured: how each value that the branch takes from outside carries the
            batch, by the name of its node.
    """

    place: int
    add: fx.Node
    skip: fx.Node
    branch: fx.Node
    inside: frozenset[fx.Node]
    skip_gain: float
    branch_gain: float
    writes_skip: bool
    dim: int | None = None
    told: dict[str, int] = field(default_factory=dict)
    cuts: Cuts | None = None


@dataclass(eq=False)
class Branch:
    """One residual branch of a block.

    Attributes:
        name: The block's name; where a block has several branches, with the largest child of the
            branch behind a colon ("encoder.layers.encoder_layer_0:mlp").
        skip: ``"identity"`` or ``"projection"``.
        action: ``"skip"``: only the kept rows are computed. ``"layer"``: the same, but of the
            block as a whole, ``x + keep * (block(x) - x)``, since its branches cannot be told
            apart. ``"mask"``: all rows are computed, for the reason given in ``reason``.
        reason: Why the action is what it is; empty where it is plainly ``"skip"``.
        p: The drop probability. Before anything is attached: the rate of the masking layers that
            the branch already has, 0 without any.
        children: The paths, from the model, of the modules that the branch calls.
        masks: The paths of the masking layers (DropPath, StochasticDepth) inside the branch, and of
            a module around it that leaves out whole layers itself (``layerdrop``).
        share: The branch's share of the FLOPs of a forward pass; None where it was not measured,
            which takes ``example_inputs``.
    """

    name: str
    skip: str
    action: str
    reason: str
    p: float
    children: tuple[str, ...]
    masks: tuple[str, ...]
    share: float | None = None
    _split: Split | None = field(default=None, repr=False)
    _traced: BlockGraph | None = field(default=None, repr=False)
    _owner: str = field(default="", repr=False)
    _layer: Layer | None = field(default=None, repr=False)


@dataclass(eq=False, repr=False)
class Residual:
    """One block: a unit of depth, with one or several branches that share a drop probability.

    Attributes:
        name: The path of the block from the model.
        module: The block.
        branches: Its branches in the order in which they are added.
        default: Whether ``add_stochastic_depth`` takes the block without being asked; a lone,
            inner or linear one only if ``select`` says so.
        why_not: Why ``default`` is False.
    """

    name: str
    module: nn.Module
    branches: list[Branch]
    default: bool = True
    why_not: str = ""
    _owner: str = field(default="", repr=False, kw_only=True)

    def __repr__(self) -> str:
        count = len(self.branches)
        text = (
            f"{self.name} ({type(self.module).__name__}): {count} branch{'es' * (count > 1)}, "
            f"{self.skip} skip, {self.action}, p={self.p:.3g}"
        )
        return f"<{text}>" if self.default else f"<{text}; left out: {self.why_not}>"

    @property
    def skip(self) -> str:
        """``"identity"``, or ``"projection"`` where the skip of any branch is one."""
        return "projection" if any(b.skip == "projection" for b in self.branches) else "identity"

    @property
    def action(self) -> str:
        """What is done with the branches; several different actions are joined by a slash."""
        return "/".join(dict.fromkeys(b.action for b in self.branches))

    @property
    def reason(self) -> str:
        """The reasons of the branches."""
        return "; ".join(dict.fromkeys(b.reason for b in self.branches if b.reason))

    @property
    def p(self) -> float:
        """The drop probability; the largest where branches were given different ones."""
        return max(b.p for b in self.branches)


# ---------------------------------------------------------------------------------------------
# Layers that mask already. By name, so that a vendored copy of the class counts as well.

_MASK_NAMES = {"StochasticDepth", "DropPath"}
_MASK_RATES = ("p", "drop_prob")


def is_mask(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that drops whole residual branches by masking."""
    name = type(module).__name__
    known = name in _MASK_NAMES or name.endswith("DropPath")
    return known and next(module.children(), None) is None and mask_rate(module) is not None


def mask_rate(module: nn.Module) -> float | None:
    """The drop probability of a masking layer; None where it has none that can be read."""
    for attribute in _MASK_RATES:
        value = getattr(module, attribute, None)
        if value is None and hasattr(module, attribute):
            return 0.0  # timm and transformers take None for 0
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def drops_layers(module: nn.Module) -> tuple[Any, float] | None:
    """Who holds the rate at which ``module`` leaves out whole layers in its loop, and the rate."""
    for holder, name in ((module, "self"), (getattr(module, "config", None), "self.config")):
        rate = getattr(holder, "layerdrop", None)
        if not isinstance(rate, float) or not 0.0 < rate <= 1.0:
            continue
        try:
            source = inspect.getsource(type(module).forward)
        except (OSError, TypeError):
            continue
        if f"{name}.layerdrop" in source:
            return holder, rate
    return None


# ---------------------------------------------------------------------------------------------
# Linear or not

_LINEAR_MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Bilinear, nn.Identity, nn.Flatten, nn.Unflatten,
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
    nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad2d,
    nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.Embedding,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip

_LINEAR_NAMES = {
    "add", "sub", "neg", "iadd", "isub", "add_", "sub_", "cat", "concat", "stack", "getitem",
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "t", "movedim",
    "squeeze", "unsqueeze", "expand", "expand_as", "view_as", "contiguous", "chunk", "split",
    "narrow", "select", "slice", "index_select", "roll", "flip", "repeat", "repeat_interleave",
    "pad", "_pad", "sum", "mean", "to", "type_as", "float", "half", "bfloat16", "double", "clone",
    "detach",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "interpolate", "upsample",
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "alpha_dropout", "pixel_shuffle", "pixel_unshuffle", "zeros_like",
    "new_zeros", "zeros", "embedding", "_assert", "identity", "unfold", "fold", "moveaxis",
    "boolean_dispatch", "fn", "passed_through",
}  # fmt: skip
_PRODUCTS = {
    "mul", "imul", "mul_", "rmul", "matmul", "multiply", "mm", "bmm", "baddbmm", "einsum", "div",
    "truediv", "div_", "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip


def _callee(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _depends_on_input(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether ``node`` is computed from an activation: not a parameter, not a mere shape."""
    if node not in memo:
        if node.op == "placeholder":
            memo[node] = True
        elif node.op == "get_attr" or is_shape_node(node):
            memo[node] = False
        else:
            memo[node] = any(_depends_on_input(i, memo) for i in node.all_input_nodes)
    return memo[node]


class _Children:
    """What is known about the modules of a model as parts of a branch; each is read once."""

    def __init__(self) -> None:
        self._graphs: dict[nn.Module, BlockGraph | UntraceableError] = {}
        self._linear: dict[nn.Module, bool] = {}
        self._writing: dict[nn.Module, bool] = {}

    def read(self, module: nn.Module) -> BlockGraph:
        """The graph of ``module`` as its signature alone gives it."""
        if module not in self._graphs:
            try:
                self._graphs[module] = trace_block(module)
            except UntraceableError as error:
                self._graphs[module] = error
        found = self._graphs[module]
        if isinstance(found, UntraceableError):
            raise found
        return found

    def linear(self, module: nn.Module) -> bool:
        """Whether ``module`` is linear (affine; norms, pools and dropout count as such)."""
        if module not in self._linear:
            self._linear[module] = True  # a module that contains itself
            self._linear[module] = self._is_linear(module)
        return self._linear[module]

    def _is_linear(self, module: nn.Module) -> bool:
        if is_mask(module) or type(module).__module__.startswith("torch.ao.quantization"):
            return True  # an observer, or what rounds as quantised numbers would be
        if type(module).__name__.endswith("Norm") and next(module.children(), None) is None:
            return True  # norms that models write themselves
        if _has_forward_of(module, (nn.Sequential,)):
            return all(self.linear(child) for child in module.children())
        if _has_forward_of(module, _LINEAR_MODULES):
            return True
        if type(module).__module__.startswith("torch.nn.modules") and not any(module.children()):
            return False
        try:
            nodes = self.read(module).graph.nodes
        except UntraceableError:
            # a convolution that pads by the size of its input, say: its class has to be believed,
            # but for fused ones (ConvBnReLU2d), which subclass the convolution
            believed = isinstance(module, _LINEAR_MODULES) and "ReLU" not in type(module).__name__
            return believed and all(map(self.linear, module.children()))
        return self.linear_nodes(nodes, module)

    def linear_nodes(self, nodes: Iterable[fx.Node], owner: nn.Module) -> bool:
        """Whether every one of ``nodes``, a part of the forward of ``owner``, is linear."""
        memo: dict[fx.Node, bool] = {}
        return all(self._linear_node(node, owner, memo) for node in nodes)

    def _linear_node(self, node: fx.Node, owner: nn.Module, memo: dict[fx.Node, bool]) -> bool:
        if node.op == "call_module":
            return self.linear(owner.get_submodule(str(node.target)))
        if node.op in ("placeholder", "output") or not _depends_on_input(node, memo):
            return True
        name = _callee(node)
        if name in _PRODUCTS:
            factors = [i for i in node.all_input_nodes if _depends_on_input(i, memo)]
            return len(factors) <= 1 and not (
                # a square: one activation, taken twice
                sum(a in factors for a in node.args if isinstance(a, fx.Node)) > 1
            )
        if name in ("max", "amax"):  # over a dimension, it pools; of two activations, it does not
            return len(node.all_input_nodes) == 1
        if name == "getattr":
            return node.args[1] == "values"
        return name in _LINEAR_NAMES

    def writes_input(self, module: nn.Module) -> bool:
        """Whether ``module`` writes into an argument, as far as its forward can be read."""
        if module not in self._writing:
            self._writing[module] = False
            self._writing[module] = self._does_write(module)
        return self._writing[module]

    def _does_write(self, module: nn.Module) -> bool:
        if type(module).__module__.startswith("torch.nn.modules") and not any(module.children()):
            return bool(getattr(module, "inplace", False))
        if _has_forward_of(module, (nn.Sequential,)):
            for child in module.children():
                if self.writes_input(child):
                    return True
                if not isinstance(child, nn.Identity | nn.Flatten | nn.Dropout):
                    return False
            return False
        try:
            nodes = self.read(module).graph.nodes
        except UntraceableError:
            return False
        written = (self.written(node, module) for node in nodes)
        return any(node is not None and node.op == "placeholder" for node in written)

    def written(self, node: fx.Node, owner: nn.Module) -> fx.Node | None:
        """The node into whose memory ``node``, a part of the forward of ``owner``, writes."""
        if not node.args or not self._writes(node, owner):
            return None
        return self.storage(node.args[0], owner)

    def _writes(self, node: fx.Node, owner: nn.Module) -> bool:
        if node.op == "call_module":
            return self.writes_input(owner.get_submodule(str(node.target)))
        name = _callee(node)
        trailing = name.endswith("_") and not name.endswith("__")
        if node.op == "call_method":
            return trailing
        return node.op == "call_function" and (
            trailing or node.target in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True
        )

    def storage(self, node: Any, owner: nn.Module) -> fx.Node | None:
        """The node whose memory ``node`` may share, through views and in-place operations."""
        while isinstance(node, fx.Node):
            is_view = (
                _callee(node) in _VIEWS and node.op in ("call_function", "call_method")
            ) or self._writes(node, owner)
            if node.op == "call_module":
                module = owner.get_submodule(str(node.target))
                is_view = is_view or isinstance(module, nn.Identity | nn.Flatten)
            if not is_view or not node.args:
                return node
            node = node.args[0]
        return None


def _has_forward_of(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether ``module`` is of one of ``kinds`` and runs its forward: a subclass may add to it."""
    mine = type(module).forward
    return isinstance(module, kinds) and any(
        mine is base.__dict__.get("forward") for base in _forwards(kinds)
    )


@cache
def _forwards(kinds: tuple[type[nn.Module], ...]) -> list[type[nn.Module]]:
    """The classes of torch that define the forwards of ``kinds``."""
    return list({base for kind in kinds for base in kind.__mro__ if "forward" in base.__dict__})


# ---------------------------------------------------------------------------------------------
# One graph

_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.ipow, operator.imod, operator.iand, operator.ior, operator.ixor, operator.setitem,
}  # fmt: skip
_ADDS = {operator.add, operator.iadd, torch.add}
_SUBTRACTIONS = {operator.sub, operator.isub, torch.sub}


def _terms(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """``(left, right, gain of right)`` where ``node`` is a sum of two nodes, else None."""
    if node.op == "call_function" and node.target in _ADDS | _SUBTRACTIONS:
        sign = 1.0 if node.target in _ADDS else -1.0
    elif node.op == "call_method" and node.target in ("add", "add_", "sub", "sub_"):
        sign = 1.0 if str(node.target).startswith("add") else -1.0
    else:
        return None
    operands = [*node.args, *([node.kwargs["other"]] if "other" in node.kwargs else [])]
    alpha = node.kwargs.get("alpha", 1)
    if set(node.kwargs) - {"alpha", "other"} or not isinstance(alpha, int | float):
        return None
    if len(operands) != 2:
        return None
    left, right = operands
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if is_shape_node(left) or is_shape_node(right):
        return None
    return left, right, sign * alpha


def _writes_left(node: fx.Node) -> bool:
    return node.target in (operator.iadd, operator.isub, "add_", "sub_")


@dataclass(eq=False)
class Entry:
    """One residual addition: what to do with it and why; why it is not taken by default, if so."""

    split: Split
    action: str
    reason: str
    skip: str
    why_not: str
    leak: fx.Node | None = None


def read_splits(
    block: BlockGraph, known_cuts: Sequence[Cuts] = (), batch_dim: int | None = None
) -> list[Entry]:
    """Every residual addition of one block's forward, in order.

    Args:
        block: The graph of the forward.
        known_cuts: ``Split.cuts`` of the same block, measured in another call.
        batch_dim: Which dimension of its residuals is the batch, where that is known.
    """
    return _Finder(block, _Children(), known_cuts=known_cuts, batch_dim=batch_dim).entries


class _Finder:
    """The residual additions of one graph."""

    def __init__(
        self,
        block: BlockGraph,
        children: _Children,
        shapes: Callable[[], tuple[Shapes, Shapes] | None] = lambda: None,
        arguments: Callable[[], ArgumentShapes] = dict,
        batch_dim: int | None = None,
        known_cuts: Sequence[Cuts] = (),
    ) -> None:
        self.known_cuts = known_cuts
        self.block = block
        self.owner = block.module
        self.nodes: list[fx.Node] = list(block.graph.nodes)
        self.children = children
        self.shapes = shapes
        self.arguments = arguments
        self.batch_dim = batch_dim
        self.contradicted = False
        self.order = {node: i for i, node in enumerate(self.nodes)}
        # Ancestors as bit sets, so that a forward with thousands of nodes stays cheap.
        self.ancestors: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            mine = 1 << i
            for source in node.all_input_nodes:
                mine |= self.ancestors[source]
            self.ancestors[node] = mine
        self.entries: list[Entry] = []
        for node in self.nodes:
            terms = _terms(node)
            entry = None if terms is None else self._entry(node, *terms)
            if entry is not None:
                self.entries.append(entry)

    def _set(self, bits: int) -> set[fx.Node]:
        found = set()
        while bits:
            low = bits & -bits
            node = self.nodes[low.bit_length() - 1]
            if not is_shape_node(node):
                found.add(node)
            bits ^= low
        return found

    def has_parameters(self, nodes: Iterable[fx.Node]) -> bool:
        for node in nodes:
            if node.op == "call_module":
                module = self.owner.get_submodule(str(node.target))
                if next(module.parameters(), None) is not None:
                    return True
            elif node.op == "get_attr":
                return True
        return False

    def _entry(self, add: fx.Node, left: fx.Node, right: fx.Node, gain: float) -> Entry | None:
        left_bits, right_bits = self.ancestors[left], self.ancestors[right]
        memo: dict[fx.Node, bool] = {}
        common = self._set(left_bits & right_bits)
        if not any(_depends_on_input(n, memo) and not _is_container(n) for n in common):
            return None  # a bias, a positional embedding: nothing that both sides come from
        only_left = self._set(left_bits & ~right_bits)
        only_right = self._set(right_bits & ~left_bits)
        kind, why_not = "identity", ""
        if only_left and only_right:
            # A branch that was added to one side before belongs to neither:
            # x + f(x) + g(x) are two branches of x.
            sides = [self._without_earlier(side) for side in (only_left, only_right)]
            linear = [self.children.linear_nodes(side, self.owner) for side in sides]
            if linear[0] == linear[1]:
                return None  # two branches side by side, or RepVGG's parallel convolutions
            branch_is_right = linear[0]
            if not all(map(self._does_nothing, sides[0 if branch_is_right else 1])):
                kind = "projection"
        else:
            branch_is_right = not only_left
            inside = only_right if branch_is_right else only_left
            if self.has_parameters(inside) and self.children.linear_nodes(inside, self.owner):
                why_not = "its branch is linear"
        skip, branch = (left, right) if branch_is_right else (right, left)
        # an argument that only the branch reads comes from outside all the same
        inside = {
            n for n in (only_right if branch_is_right else only_left) if n.op != "placeholder"
        }
        if not self.has_parameters(inside) or not _depends_on_input(branch, memo):
            return None
        if all(node.op == "get_attr" for node in inside):
            return None
        split = Split(
            place=len(self.entries),
            add=add,
            skip=skip,
            branch=branch,
            inside=frozenset(inside),
            skip_gain=1.0 if branch_is_right else gain,
            branch_gain=gain if branch_is_right else 1.0,
            writes_skip=branch_is_right and _writes_left(add),
        )
        split.dim, split.told = self._dimension(split.skip)
        if split.skip_gain < 0.0:
            why_not = "its skip is subtracted"
        split, action, reason = self._closed(split)
        return Entry(split, action, reason, kind, why_not, self._leak)

    def _dimension(self, skip: fx.Node) -> tuple[int | None, dict[str, int]]:
        """The dimension of ``skip`` that carries the batch; and what layers say, if they must."""
        if self.batch_dim is not None:
            return self.batch_dim, {}
        dim, votes = told(self.nodes, self.owner, skip)
        if not self.arguments():
            return dim, votes
        varying = self._varying(skip)
        if len(varying) != 1:
            return dim, votes
        self.contradicted |= dim is not None and varying != [dim]
        return varying[0], {}

    def _varying(self, value: fx.Node) -> list[int]:
        """The dimensions of ``value`` that grow with the batch, as far as that was measured."""
        # An argument tells without running anything, and so does what is laid out like one.
        arguments = self.arguments()
        placeholders = self.block.graph.find_nodes(op="placeholder")
        paths = dict(zip(placeholders, self.block.tensors, strict=True))
        alike = same_layout(value, self.owner) & paths.keys()
        known = [arguments[paths[node]] for node in alike if paths[node] in arguments]
        rank = max((len(one) for one, _ in known), default=0)
        found = {tuple(_differing(one, two)) for one, two in known if len(one) == rank}
        if len(found) == 1 and len(next(iter(found))) == 1:
            return list(found.pop())
        shapes = self.shapes()
        if shapes is None or any(value not in s.shapes for s in shapes):
            return []
        return _differing(shapes[0].shapes[value], shapes[1].shapes[value])

    def _without_earlier(self, side: set[fx.Node]) -> set[fx.Node]:
        left = set(side)
        for entry in self.entries:
            if entry.split.add in side and not entry.why_not:
                left -= entry.split.inside | {entry.split.add}
        return left

    def _does_nothing(self, node: fx.Node) -> bool:
        """Whether ``node`` only hands on its input: sum() starts from the number 0, for one."""
        if node.op == "call_module":
            return isinstance(self.owner.get_submodule(str(node.target)), nn.Identity)
        if node.target is operator.add:
            return any(type(a) in (int, float) and a == 0 for a in node.args)
        return node.op == "call_method" and node.target in ("contiguous", "clone")

    def _closed(self, split: Split) -> tuple[Split, str, str]:
        """The part of the branch that nothing outside uses, the action for it, and the reason."""
        inside = set(split.inside)
        kept_out: set[fx.Node] = set()
        for node in sorted(inside, key=self.order.__getitem__, reverse=True):
            allowed = inside | {split.add} if node is split.branch else inside
            if node in kept_out or self._readers(node) - allowed:
                outside = self._set(self.ancestors[node]) & inside
                kept_out |= outside
                inside -= outside
        for node in sorted(inside, key=self.order.__getitem__):
            if node.target is operator.getitem and node.args[0] in kept_out:
                kept_out.add(node)  # of a tuple, the item is what can be cut
                inside.remove(node)
        reason = ""
        self._leak = None
        if kept_out:
            first = max(
                (n for n in kept_out if n.target is not operator.getitem),
                key=self.order.__getitem__,
            )
            self._leak = first if first.op == "call_module" else None
            reason = f"{first.name} is used outside the branch, too"
            if split.branch in kept_out or not self.has_parameters(inside):
                return split, "mask", reason
            split = replace(split, inside=frozenset(inside))
            reason += ": computed for every row"
        refusal = self._refusal(split)
        if refusal:
            return split, "mask", refusal
        cuts, refusal = self._cuts(split)
        if refusal:
            return split, "mask", refusal
        return replace(split, cuts=cuts), "skip", reason

    @cached_property
    def elements(self) -> dict[Entry, str | None]:
        """The element of a loop over a ModuleList that each addition belongs to, if any."""
        found = {entry: _element(_called(entry.split), self.owner) for entry in self.entries}
        containers = Counter(e.rpartition(".")[0] for e in set(found.values()) if e is not None)
        return {
            entry: e if e is not None and containers[e.rpartition(".")[0]] > 1 else None
            for entry, e in found.items()
        }

    @staticmethod
    def _readers(node: fx.Node) -> set[fx.Node]:
        """The nodes that use ``node``, directly or through its shape."""
        found: set[fx.Node] = set()
        pending = list(node.users)
        while pending:
            user = pending.pop()
            if is_shape_node(user):
                pending.extend(user.users)
            elif "expected" not in user.meta and not (
                user.target is passed_through and user.args[0] is not node
            ):
                found.add(user)
        return found

    def _refusal(self, split: Split) -> str:
        """Why the branch cannot be deferred and cut by rows, or nothing."""
        for node in split.inside:
            target = self.children.written(node, self.owner)
            if target is not None and target not in split.inside:
                return f"{node.name} writes into its input, which the skip uses"
        inputs = {
            self.children.storage(i, self.owner) for i in [*self.outside_inputs(split), split.skip]
        }
        start = min(self.order[n] for n in split.inside)
        for node in self.nodes[start : self.order[split.add]]:
            if node in split.inside:
                continue
            target = self.children.written(node, self.owner)
            if target is not None and target in inputs:
                return f"{node.name} writes into an input of the branch while it is computed"
        return ""

    def _cuts(self, split: Split) -> tuple[Cuts | None, str]:
        """On which dimension each input of the branch is cut by rows; or why that is not known."""
        inputs = self.outside_inputs(split)
        dim = split.dim or 0
        if inputs == [split.skip]:
            return None, ""
        sources = {
            self.nodes[i].name
            for node in inputs
            for i in range(len(self.nodes))
            if self.ancestors[node] >> i & 1 and self.nodes[i].op == "placeholder"
        }
        shapes = self.shapes()
        if shapes is None:
            memo: dict[fx.Node, bool] = {}
            for cuts in self.known_cuts:
                if set(cuts) == {node.name for node in inputs}:
                    return cuts, ""
            if len(sources) <= 1:
                vary = {node.name: _depends_on_input(node, memo) for node in inputs}
                return {n: (dim, 1) if v else None for n, v in vary.items()}, ""
            return None, (
                f"it takes several tensors ({', '.join(sorted(sources))}), and which of them "
                "carry the batch is not known: example_inputs may tell, where the model takes "
                "them with a batch of any size"
            )
        few, many = (s.shapes[split.skip] for s in shapes)
        if _differing(few, many) != [dim]:
            return None, f"dimension {dim} of its skip is not the batch"
        batches = few[dim], many[dim]
        measured: Cuts = {}
        for node in inputs:
            one, two = (s.shapes.get(node, ()) for s in shapes)
            cut = carries(one, two, batches)
            if cut is None:
                return None, f"how its input {node.name} carries the batch is not clear"
            place, entries = cut
            one_value, two_value = (s.values.get(node) for s in shapes)
            if entries > 1 and not same_rows(one_value, two_value, place):
                return None, f"its input {node.name} holds several rows for each of the batch"
            measured[node.name] = cut if entries else None
        return measured, ""

    def outside_inputs(self, split: Split) -> list[fx.Node]:
        return outside_inputs(split, self.nodes)


def _differing(one: Sequence[int], two: Sequence[int]) -> list[int]:
    """The places in which two shapes differ; none where they have different lengths."""
    if len(one) != len(two):
        return []
    return [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]


def _is_container(node: fx.Node) -> bool:
    """Whether ``node`` is an argument that only hands out its items: a list of feature maps."""
    return (
        node.op == "placeholder"
        and len(node.users) > 0
        and all(
            user.target in (operator.getitem, operator.setitem)
            and isinstance(user.args[1], int | str)
            for user in node.users
        )
    )


def outside_inputs(split: Split, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The values from outside that a branch reads, through their shapes as well, in order.

    Parameters are not among them: a branch reads those itself.
    """
    found: dict[fx.Node, None] = {}
    pending = [node for node in nodes if node in split.inside]
    while pending:
        for source in pending.pop(0).all_input_nodes:
            if source in split.inside or source.op == "get_attr":
                continue
            if is_shape_node(source):
                pending.append(source)
            else:
                found[source] = None
    return list(found)


_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "t", "squeeze",
    "unsqueeze", "expand", "expand_as", "view_as", "contiguous", "chunk", "split", "narrow",
    "select", "getitem", "movedim", "moveaxis", "unbind", "to", "detach", "float", "type_as",
    "passed_through",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The whole model


@dataclass
class Survey:
    """What a look at a whole model gave.

    Attributes:
        residuals: Every residual block, also those that are not taken by default.
        unreadable: Blocks whose forward could not be read, with the reason.
        seen: How many forwards were read.
        additions: How many additions of two activations they hold.
    """

    residuals: list[Residual]
    unreadable: dict[str, str]
    seen: int
    additions: int


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _candidates(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules that could be blocks: composite, with a forward of their own."""
    for name, module in model.named_modules():
        # a branch holds parameters
        if next(module.children(), None) is None or next(module.parameters(), None) is None:
            continue
        if type(module).forward in {p.forward for p in _CONTAINERS}:
            continue
        # Torch's own layers are leaves, with children (attention) or without, also where someone
        # gave them one (an observer); its encoder and decoder layers are not.
        origin = type(module).__module__
        of_torch = origin.startswith(("torch.nn.modules.", "torch.ao.nn."))
        if isinstance(module, nn.MultiheadAttention) or (
            of_torch and not origin.endswith(".transformer")
        ):
            continue
        yield name, module


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


def _element(paths: Iterable[str], owner: nn.Module) -> str | None:
    """The element of a ModuleList that a branch belongs to: a loop's "layers.3"."""
    elements: Counter[str] = Counter()
    for path in paths:
        atoms = path.split(".")
        for i in range(1, len(atoms)):
            container = owner.get_submodule(".".join(atoms[:i]))
            if isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                module = owner.get_submodule(path)
                weight = sum(p.numel() for p in module.parameters())
                elements[".".join(atoms[: i + 1])] += weight + 1
                break
    return elements.most_common(1)[0][0] if elements else None


def _called(split: Split) -> list[str]:
    calls = [str(n.target) for n in split.inside if n.op == "call_module"]
    return sorted(dict.fromkeys(calls))


def survey(
    model: nn.Module, example: Example | None = None, batch_dim: int | None = None
) -> Survey:
    """Read every block of ``model`` and list its residuals, in the order of the model's depth.

    Args:
        model: The model; it is left as it is.
        example: What each block is really called with.
        batch_dim: Which dimension of the residual tensors is the batch. None: each block's own,
            as far as the example and its layers tell.
    """
    reader = _BlockReader(model, example, batch_dim)
    finders, unreadable = reader.read_all()
    if example is not None and any(finder.contradicted for finder in finders.values()):
        # what grew was not the batch: layers of torch say that they have it on dimension 1
        example.expect(1)
        again, unreadable = reader.read_all()
        if example.larger:
            finders = again
    uses = _uses(model, finders.values())
    if example is not None:
        uses |= example.first.times
    taken = _choose(finders, uses)
    found = [r for name, finder in finders.items() for r in _residuals_of(name, finder, taken)]
    if example is not None:
        found += _whole_layers(model, example, found, unreadable, uses, batch_dim)
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        found.sort(key=lambda residual: order.get(residual._owner, 0))
    _settle_masks(model, found)
    _mark_inner(found)
    found = _joined(model, found)
    additions = sum(_terms(node) is not None for f in finders.values() for node in f.nodes)
    return Survey(found, unreadable, len(finders), additions)


class _BlockReader:
    """Reads the blocks of one model, each in the call that an example gives, if there is one."""

    def __init__(self, model: nn.Module, example: Example | None, batch_dim: int | None) -> None:
        self._model = model
        self._names = {module: name for name, module in reversed(list(model.named_modules()))}
        self._example = example
        self._batch_dim = batch_dim
        self._children = _Children()
        self._joining: dict[nn.Module, bool] = {}
        self._inlined: set[nn.Module] = set()

    def read_all(self) -> tuple[dict[str, _Finder], dict[str, str]]:
        """The residual additions of every forward; and what cannot be read, and why."""
        finders: dict[str, _Finder] = {}
        unreadable: dict[str, str] = {}
        for name, module in _candidates(self._model):
            try:
                finders[name] = self._find(name, module)
            except UntraceableError as error:
                unreadable[name] = str(error)
        for name in [n for n, f in finders.items() if f.owner in self._inlined]:
            del finders[name]  # its additions belong to the block that calls it
        return finders, unreadable

    def _read(self, module: nn.Module, look_through: Iterable[nn.Module] = ()) -> BlockGraph:
        name = self._names[module]
        if self._example is None or name not in self._example.first.calls:
            if not look_through:
                return self._children.read(module)
            return trace_block(
                module, batch_dim=self._batch_dim or 0, look_through=set(look_through)
            )
        return trace_block(
            module,
            arguments=self._example.first.calls[name],
            batch_dim=self._batch_dim or 0,
            look_through=set(look_through),
            outputs=self._example.first.items,
        )

    def _find(self, name: str, module: nn.Module) -> _Finder:
        """The residual additions of ``module``, also where a child adds skip and branch for it."""
        plain = self._finder(name, self._read(module))
        joining = {
            child
            for node in plain.nodes
            if node.op == "call_module"
            and self._joins(child := module.get_submodule(str(node.target)))
        }
        while joining:
            try:
                deeper = self._finder(name, self._read(module, joining))
            except UntraceableError:
                joining = set()
                break
            used = {
                module.get_submodule(entry.split.add.meta["within"])
                for entry in deeper.entries
                if "within" in entry.split.add.meta
            }
            if used == joining:
                plain = deeper
                break
            joining = used
        # A child of which a part is used outside the branch too (a bias that is handed on, besides
        # the attention that it is for): only that part has to be computed for every row.
        leaking = {
            module.get_submodule(str(entry.leak.target)) for entry in plain.entries if entry.leak
        }
        if leaking:
            try:
                deeper = self._finder(name, self._read(module, joining | leaking))
            except UntraceableError:
                deeper = plain
            masked = [[e.action for e in f.entries].count("mask") for f in (deeper, plain)]
            if len(deeper.entries) == len(plain.entries) and masked[0] < masked[1]:
                plain, joining = deeper, joining | leaking
        self._inlined |= joining
        return plain

    def _finder(self, name: str, block: BlockGraph) -> _Finder:
        if self._example is None or name not in self._example.first.calls:
            return _Finder(block, self._children, batch_dim=self._batch_dim)
        shapes = cache(partial(self._example.shapes, name, block))
        arguments = cache(partial(self._example.argument_shapes, name))
        return _Finder(block, self._children, shapes, arguments, self._batch_dim)

    def _joins(self, module: nn.Module) -> bool:
        """Whether ``module`` adds two of its own inputs, one of them as it comes, and returns that.

        The residual of its parent then lies in both: post-norm blocks are written so.
        """
        if module not in self._joining:
            self._joining[module] = False
            self._joining[module] = self._does_join(module)
        return self._joining[module]

    def _does_join(self, module: nn.Module) -> bool:
        if next(module.children(), None) is None or next(module.parameters(), None) is None:
            return False
        try:
            block = self._read(module)
        except UntraceableError:
            return False
        finder = _Finder(block, self._children, batch_dim=self._batch_dim)
        inputs = {n for n in finder.nodes if n.op == "placeholder"}
        for node in finder.nodes:
            terms = _terms(node)
            if terms is None:
                continue
            sides = [finder._set(finder.ancestors[side]) for side in terms[:2]]
            for skip, branch in (sides, sides[::-1]):
                after = {
                    n
                    for n in finder.nodes
                    if finder.ancestors[n] >> finder.order[node] & 1
                    and n.op != "output"
                    and not is_shape_node(n)
                }
                if (
                    skip & inputs
                    and branch & inputs
                    and not skip & branch & inputs
                    and finder.has_parameters(branch)
                    and not finder.has_parameters(skip)
                    and self._children.linear_nodes(skip | after, module)
                ):
                    return True
        return False


def _uses(model: nn.Module, finders: Iterable[_Finder]) -> Counter[nn.Module]:
    """How often each module is called, as far as its parents tell: layers may be shared."""
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for finder in finders:
        calls = Counter(
            finder.owner.get_submodule(str(node.target))
            for node in finder.nodes
            if node.op == "call_module"
        )
        for module, times in calls.items():
            uses[module] = max(uses[module], times)
    return uses


def _choose(finders: dict[str, _Finder], uses: Counter[nn.Module]) -> dict[Entry, str]:
    """For each residual addition why it is not taken by default, or an empty text.

    A residual stack repeats: as modules of one class, as modules of several classes in one place
    ("layer1.0" and "layer2.0"), or one after the other in one forward. A lone addition is something
    else, unless its block stands in a list and its class is there more than once: of blocks that
    stride, those that do not are residual. Where additions of one forward are nested, the outermost
    that repeat are taken.
    """
    why_not = {entry: entry.why_not for finder in finders.values() for entry in finder.entries}
    families: dict[Entry, list[object]] = {}
    alone: set[Entry] = set()
    kinds = Counter(type(finder.owner) for finder in finders.values())
    for name, finder in finders.items():
        for entry in finder.entries:
            module, element = _module_of(finder, entry)
            families[entry] = [(name, type(module)) if element else type(module)]
            place = re.sub(r"\d+", "#", name)
            if element is None and "#" in place:
                families[entry].append(place)
                if kinds[type(finder.owner)] > 1 and entry.skip == "identity":
                    alone.add(entry)
    while True:
        outermost = {
            entry: finder
            for finder in finders.values()
            for entry in finder.entries
            if not why_not[entry]
            and not any(
                entry.split.add in other.split.inside
                for other in finder.entries
                if not why_not[other]
            )
        }
        sizes: Counter[object] = Counter()
        for entry, finder in outermost.items():
            sizes.update(dict.fromkeys(families[entry], uses[finder.owner]))
        lone = [
            entry
            for entry in outermost
            if entry not in alone and all(sizes[f] < 2 for f in families[entry])
        ]
        for entry in lone:
            module, _ = _module_of(outermost[entry], entry)
            why_not[entry] = f"no other {type(module).__name__} has a residual"
        if not lone:
            break
    return {
        entry: why or ("" if entry in outermost else "inside another residual of its block")
        for entry, why in why_not.items()
    }


def _module_of(finder: _Finder, entry: Entry) -> tuple[nn.Module, str | None]:
    """The module that an addition belongs to: the element of a loop, or the block itself."""
    element = finder.elements[entry]
    return (finder.owner.get_submodule(element) if element else finder.owner), element


def _residuals_of(name: str, finder: _Finder, why_not: dict[Entry, str]) -> list[Residual]:
    """The blocks of one forward: itself, or the elements of the ModuleList that it loops over."""
    owner = finder.owner
    blocks: dict[tuple[str, str], list[Entry]] = {}
    for entry in finder.entries:
        element = finder.elements[entry]
        key = _join(name, element) if element is not None else name
        blocks.setdefault((key, why_not[entry]), []).append(entry)
    result = []
    for (key, why), members in blocks.items():
        module = owner.get_submodule(key[len(name) :].lstrip(".")) if key != name else owner
        label = key or type(module).__name__
        names = _branch_names(label, [entry.split for entry in members], owner)
        branches = [
            Branch(
                name=branch_name,
                skip=entry.skip,
                action=entry.action,
                reason=entry.reason,
                p=0.0,
                children=tuple(_join(name, path) for path in _called(entry.split)),
                masks=(),
                _split=entry.split,
                _traced=finder.block,
                _owner=name,
            )
            for entry, branch_name in zip(members, names, strict=True)
        ]
        result.append(Residual(label, module, branches, not why, why, _owner=name))
    return result


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _branch_names(block: str, splits: list[Split], owner: nn.Module) -> list[str]:
    if len(splits) == 1:
        return [block]
    names: list[str] = []
    for split in splits:
        sizes = {path: _size(owner.get_submodule(path)) for path in _called(split)}
        largest = max(sizes, key=sizes.__getitem__).rpartition(".")[2] if sizes else "sum"
        name = f"{block}:{largest}"
        while name in names:
            name += "'"
        names.append(name)
    return names


def _settle_masks(model: nn.Module, residuals: list[Residual]) -> None:
    """Give each masking layer to the innermost branch around it."""
    owners = {r._owner for r in residuals}
    for residual in residuals:
        for branch in residual.branches:
            masks: list[str] = []
            for child in branch.children:
                for path, module in model.get_submodule(child).named_modules(prefix=child):
                    if not is_mask(module):
                        continue
                    within = path.split(".")
                    between = {
                        ".".join(within[:i]) for i in range(len(child.split(".")), len(within))
                    }
                    if not between & owners:
                        masks.append(path)
            rates = [mask_rate(model.get_submodule(m)) or 0.0 for m in masks]
            atoms = branch._owner.split(".")
            for above in [".".join(atoms[:i]) for i in range(len(atoms))]:
                loop = drops_layers(model.get_submodule(above))
                if loop is not None:
                    masks.append(above)
                    rates.append(loop[1])
            branch.masks = tuple(masks)
            # several masks on one branch: it survives only if each lets it
            kept = 1.0
            for rate in rates:
                kept *= 1.0 - rate
            branch.p = rates[0] if len(rates) == 1 else 1.0 - kept


def _mark_inner(residuals: list[Residual]) -> None:
    """Of nested residuals the outermost is taken."""
    outer = {c for r in residuals if r.default for b in r.branches for c in b.children}
    for residual in residuals:
        atoms = residual._owner.split(".")
        above = {".".join(atoms[:i]) for i in range(1, len(atoms) + 1)}
        own = {c for b in residual.branches for c in b.children}
        if residual.default and above & outer - own:
            residual.default = False
            residual.why_not = "inside the branch of another residual"


def _joined(model: nn.Module, residuals: list[Residual]) -> list[Residual]:
    """Make one block of a block and the parts of it that hold residuals on its own path.

    An encoder layer whose attention adds its input itself, and whose feed-forward part the layer
    adds, is one unit of depth with two branches. Elements of a container are units of their own.
    """
    taken = {r.name: r for r in residuals if r.default and r.name == r._owner}
    joined: list[Residual] = []
    for residual in residuals:
        above, _, child = residual.name.rpartition(".")
        parent = taken.get(above)
        apart = isinstance(model.get_submodule(above), _CONTAINERS)
        if parent is None or apart or residual.name not in taken:
            joined.append(residual)
            continue
        if len(residual.branches) == 1:
            residual.branches[0].name = f"{parent.name}:{child}"
        parent.branches[:0] = residual.branches
    for residual in joined:
        names = [branch.name for branch in residual.branches]
        if residual.name in names and len(names) > 1:
            # it was the only one before
            alone = residual.branches[names.index(residual.name)]
            size = {c: _size(model.get_submodule(c)) for c in alone.children}
            largest = max(size, key=size.__getitem__).removeprefix(f"{residual.name}.")
            alone.name = f"{residual.name}:{largest.partition('.')[0]}"
    return joined


# ---------------------------------------------------------------------------------------------
# Blocks that cannot be split


@dataclass(eq=False)
class Layer:
    """A block that is dropped as a whole.

    Attributes:
        x: Which of its arguments the block adds to, as :func:`torchdrop.tracing.unfold` names it.
        dim: The dimension of that which carries the batch.
        cuts: How each of its tensors carries the batch, by that name.
        place: Where in what it returns the sum is: "" for a tensor, "0" for the first of a tuple.
        returns: What it returns, without tensors.
    """

    x: str
    dim: int
    cuts: Cuts
    place: str
    returns: Any


def _whole_layers(
    model: nn.Module,
    example: Example,
    found: Sequence[Residual],
    unreadable: dict[str, str],
    uses: Counter[nn.Module],
    batch_dim: int | None,
) -> list[Residual]:
    """The blocks of a stack that could not be read, each as one branch."""
    if example.larger is None:
        return []
    layers: list[Residual] = []
    for name, why in unreadable.items():
        module = model.get_submodule(name)
        taken = [r for r in [*found, *layers] if r.default]
        branches = [child for r in taken for b in r.branches for child in b.children]
        apart = not any(f"{r.name}.".startswith(f"{name}.") for r in taken) and not any(
            f"{name}.".startswith(f"{child}.") for child in branches
        )
        layer = _layer(name, example, batch_dim) if apart and _in_stack(model, name, uses) else None
        if layer is None or not adds(module):
            continue
        branch = Branch(
            name=name,
            skip="identity",
            action="layer",
            reason=f"dropped as a whole, since it cannot be read: {why}",
            p=0.0,
            children=(name,),
            masks=(),
            _owner=name,
            _layer=layer,
        )
        layers.append(Residual(name, module, [branch], _owner=name))
    return layers


def _in_stack(model: nn.Module, name: str, uses: Counter[nn.Module]) -> bool:
    """Whether a module is one of several of its class in a container, or is called repeatedly."""
    module = model.get_submodule(name)
    container = model.get_submodule(name.rpartition(".")[0])
    alike = [child for child in container.children() if type(child) is type(module)]
    return uses[module] > 1 or (isinstance(container, _CONTAINERS) and len(alike) > 1)


def _layer(name: str, example: Example, batch_dim: int | None) -> Layer | None:
    """How a block can be dropped as a whole; None where it does not map a tensor to its like."""
    first, larger = example.first, example.larger
    if larger is None or name not in first.returned or name not in larger.returned:
        return None
    both = [unfold(recording.calls[name])[1] for recording in (first, larger)]
    if list(both[0]) != list(both[1]) or not both[0]:
        return None
    x = next(iter(both[0]))
    few, many = (tuple(tensors[x].shape) for tensors in both)
    differing = _differing(few, many)
    if len(differing) != 1 or batch_dim not in (None, differing[0]):
        return None
    (dim,) = differing
    returned = first.returned[name]
    place = "" if "" in returned else "0"
    if returned.get(place) != few or larger.returned[name].get(place) != many:
        return None
    if set(returned) != {place}:
        return None  # it returns more that carries the batch, or that others need
    cuts: Cuts = {}
    for path in both[0]:
        pair = [tensors[path] for tensors in both]
        cut = carries(tuple(pair[0].shape), tuple(pair[1].shape), (few[dim], many[dim]))
        if cut is None or (cut[1] > 1 and not same_rows(pair[0], pair[1], cut[0])):
            return None
        cuts[path] = cut if cut[1] else None
    return Layer(x, dim, cuts, place, first.forms[name])


def adds(module: nn.Module) -> bool:
    """Whether a method of ``module``'s class adds anything, as far as its source tells."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module))))
    except (OSError, TypeError, SyntaxError):
        return True  # no source to read: it may
    methods = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name != "__init__"]
    for node in (inner for method in methods for inner in ast.walk(method)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add):
            return True
        if isinstance(node, ast.Attribute) and node.attr in ("add", "add_"):
            return True
    return False


def find_residuals(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    select: Callable[[Residual], bool] | None = None,
) -> list[Residual]:
    """The residual blocks of ``model``, first to last. Reads, never changes.

    Args:
        model: Any module.
        example_inputs: A tensor, a tuple, or a dict of keyword arguments, for models whose blocks
            cannot be traced from their signature alone.
        select: Which of *all* residuals, lone, inner and linear ones too. By default those with
            ``Residual.default``.

    Returns:
        One entry a block; ``len(r.branches)`` of them may be more (attention and MLP).
    """
    example = None if example_inputs is None else Example(model, example_inputs)
    return [r for r in survey(model, example).residuals if (select(r) if select else r.default)]
