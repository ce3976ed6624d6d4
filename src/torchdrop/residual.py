"""FIND: the residual branches of a model. Reads, never changes anything.

A residual is an addition ``skip + branch`` in a block's own forward. The *branch* is what the one
side depends on and the other does not, holds parameters and is not linear; the *skip* is the
other side: the identity, or a linear projection (1x1 convolution, norm, pooling, zero padding).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from torchdrop.tracing import (
    BlockGraph,
    Calls,
    UntraceableError,
    is_shape_node,
    record_calls,
    trace_block,
    writes_in_place,
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


@dataclass(eq=False)
class Split:
    """How one addition of a graph falls into skip and branch."""

    add: fx.Node
    skip: fx.Node
    branch: fx.Node
    inside: frozenset[fx.Node]
    skip_gain: float
    branch_gain: float
    writes_skip: bool


@dataclass(eq=False)
class Branch:
    """One residual branch of a block.

    Attributes:
        name: The block's name; where a block has several branches, with the largest child of the
            branch behind a colon ("encoder.layers.encoder_layer_0:mlp").
        skip: ``"identity"`` or ``"projection"``.
        action: ``"skip"``: only the kept rows are computed. ``"mask"``: all are, for the reason
            given in ``reason``.
        reason: Why the action is what it is; empty where it is plainly ``"skip"``.
        p: The drop probability. Before anything is attached: the rate of the masking layers that
            the branch already has, 0 without any.
        children: The paths, from the model, of the modules that the branch calls.
        masks: The paths of the masking layers (DropPath, StochasticDepth) inside the branch.
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


@dataclass(eq=False)
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
    _traced: BlockGraph | None = field(default=None, repr=False, kw_only=True)
    _owner: str = field(default="", repr=False, kw_only=True)

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
    "detach", "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "interpolate", "upsample",
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "alpha_dropout", "pixel_shuffle", "pixel_unshuffle", "zeros_like",
    "new_zeros", "zeros", "embedding", "_assert", "identity", "unfold", "fold", "moveaxis",
    "boolean_dispatch", "fn", "div", "truediv", "div_", "einsum",
}  # fmt: skip
_PRODUCTS = {"mul", "imul", "mul_", "matmul", "multiply", "mm", "bmm", "baddbmm", "einsum", "div",
             "truediv", "div_"}  # fmt: skip


def _callee(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _depends_on_input(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether ``node`` is computed from an activation: not a parameter, not a mere shape."""
    if node not in memo:
        if node.op in ("placeholder", "call_module"):
            memo[node] = True
        elif node.op == "get_attr" or is_shape_node(node):
            memo[node] = False
        else:
            memo[node] = any(_depends_on_input(i, memo) for i in node.all_input_nodes)
    return memo[node]


class _Linearity:
    """Decides whether nodes and modules are linear, reading the forward of composite modules."""

    def __init__(self) -> None:
        self._modules: dict[nn.Module, bool] = {}

    def nodes(self, nodes: Iterable[fx.Node], owner: nn.Module) -> bool:
        memo: dict[fx.Node, bool] = {}
        return all(self._node(node, owner, memo) for node in nodes)

    def _node(self, node: fx.Node, owner: nn.Module, memo: dict[fx.Node, bool]) -> bool:
        if node.op == "call_module":
            return self.module(owner.get_submodule(str(node.target)))
        if node.op in ("placeholder", "get_attr", "output") or is_shape_node(node):
            return True
        name = _callee(node)
        if name in _PRODUCTS or name in ("mul", "rmul"):
            factors = [i for i in node.all_input_nodes if _depends_on_input(i, memo)]
            return len(factors) <= 1 and not (
                # a square: one activation, taken twice
                sum(a in factors for a in node.args if isinstance(a, fx.Node)) > 1
            )
        return name in _LINEAR_NAMES

    def module(self, module: nn.Module) -> bool:
        if module not in self._modules:
            self._modules[module] = True  # a module that contains itself
            self._modules[module] = self._read(module)
        return self._modules[module]

    def _read(self, module: nn.Module) -> bool:
        if isinstance(module, _LINEAR_MODULES) or is_mask(module):
            return True
        if isinstance(module, nn.Sequential):
            return all(self.module(child) for child in module)
        if next(module.children(), None) is None and not parametrize.is_parametrized(module):
            activation = type(module).__module__.startswith("torch.nn")
            if activation:
                return False
        try:
            traced = trace_block(module)
        except UntraceableError:
            return False
        return self.nodes(traced.graph.nodes, module)


# ---------------------------------------------------------------------------------------------
# One graph

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


def read_splits(block: BlockGraph) -> list[Entry]:
    """Every residual addition of one block's forward, in order."""
    return _Finder(block, _Linearity()).entries()


class _Finder:
    """The residual additions of one graph."""

    def __init__(self, block: BlockGraph, linearity: _Linearity) -> None:
        self.block = block
        self.owner = block.module
        self.nodes: list[fx.Node] = list(block.graph.nodes)
        self.linearity = linearity
        self.order = {node: i for i, node in enumerate(self.nodes)}
        # Ancestors as bit sets, so that a forward with thousands of nodes stays cheap.
        self.ancestors: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            mine = 1 << i
            for source in node.all_input_nodes:
                mine |= self.ancestors[source]
            self.ancestors[node] = mine

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

    def entries(self) -> list[Entry]:
        """Every residual addition, in order."""
        found = []
        for node in self.nodes:
            terms = _terms(node)
            if terms is not None:
                split = self._split(node, *terms)
                if split is not None:
                    found.append(Entry(*self._closed(split[0]), *split[1:]))
        return found

    def _split(
        self, add: fx.Node, left: fx.Node, right: fx.Node, gain: float
    ) -> tuple[Split, str, str] | None:
        left_bits, right_bits = self.ancestors[left], self.ancestors[right]
        memo: dict[fx.Node, bool] = {}
        if not any(_depends_on_input(n, memo) for n in self._set(left_bits & right_bits)):
            return None  # a bias, a positional embedding: nothing that both sides come from
        only_left = self._set(left_bits & ~right_bits)
        only_right = self._set(right_bits & ~left_bits)
        kind, why_not = "identity", ""
        if only_left and only_right:
            linear = [self.linearity.nodes(side, self.owner) for side in (only_left, only_right)]
            if linear[0] == linear[1]:
                return None  # two branches side by side, or RepVGG's parallel convolutions
            kind = "projection"
            branch_is_right = linear[0]
        else:
            branch_is_right = not only_left
            inside = only_right if branch_is_right else only_left
            if self.has_parameters(inside) and self.linearity.nodes(inside, self.owner):
                why_not = "its branch is linear"
        skip, branch = (left, right) if branch_is_right else (right, left)
        inside = only_right if branch_is_right else only_left
        if not self.has_parameters(inside) or not _depends_on_input(branch, memo):
            return None
        if all(node.op == "get_attr" or node.op == "placeholder" for node in inside):
            return None
        split = Split(
            add=add,
            skip=skip,
            branch=branch,
            inside=frozenset(inside),
            skip_gain=1.0 if branch_is_right else gain,
            branch_gain=gain if branch_is_right else 1.0,
            writes_skip=branch_is_right and _writes_left(add),
        )
        return split, kind, why_not

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
        reason = ""
        if kept_out:
            first = max(kept_out, key=self.order.__getitem__)
            reason = f"{first.name} is used outside the branch, too"
            if split.branch in kept_out or not self.has_parameters(inside):
                return split, "mask", reason
            split = Split(**{**split.__dict__, "inside": frozenset(inside)})
            reason += ": computed for every row"
        refusal = self._refusal(split)
        return (split, "mask", refusal) if refusal else (split, "skip", reason)

    @staticmethod
    def _readers(node: fx.Node) -> set[fx.Node]:
        """The nodes that use ``node``, directly or through its shape."""
        found: set[fx.Node] = set()
        pending = list(node.users)
        while pending:
            user = pending.pop()
            if is_shape_node(user):
                pending.extend(user.users)
            else:
                found.add(user)
        return found

    def _refusal(self, split: Split) -> str:
        """Why the branch cannot be deferred and cut by rows, or nothing."""
        for node in split.inside:
            if not writes_in_place(node, self.owner) or not node.args:
                continue
            target = self._storage(node.args[0])
            if target is not None and target not in split.inside:
                return f"{node.name} writes into its input, which the skip uses"
        inputs = {self._storage(i) for i in self.outside_inputs(split)} | {
            self._storage(split.skip)
        }
        start = min(self.order[n] for n in split.inside)
        for node in self.nodes[start : self.order[split.add]]:
            if node in split.inside or not writes_in_place(node, self.owner):
                continue
            if node.args and self._storage(node.args[0]) in inputs:
                return f"{node.name} writes into an input of the branch while it is computed"
        sources = self.outside_inputs(split)
        placeholders = {
            self.nodes[i].name
            for source in sources
            for i in range(len(self.nodes))
            if self.ancestors[source] >> i & 1 and self.nodes[i].op == "placeholder"
        }
        if len(placeholders) > 1:
            return (
                f"it takes several tensors ({', '.join(sorted(placeholders))}), and which of them "
                "carry the batch cannot be told from the signature"
            )
        return ""

    def _storage(self, node: Any) -> fx.Node | None:
        """The node whose memory ``node`` may share, through views and in-place operations."""
        while isinstance(node, fx.Node):
            is_view = (
                _callee(node) in _VIEWS and node.op in ("call_function", "call_method")
            ) or writes_in_place(node, self.owner)
            if node.op == "call_module":
                module = self.owner.get_submodule(str(node.target))
                is_view = is_view or isinstance(module, nn.Identity | nn.Flatten)
            if not is_view or not node.args:
                return node
            node = node.args[0]
        return None

    def outside_inputs(self, split: Split) -> list[fx.Node]:
        return outside_inputs(split, self.nodes)


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


def _candidates(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules that could be blocks: composite, with a forward of their own."""
    passive = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            continue
        if type(module).forward in {p.forward for p in passive}:
            continue
        # torch's own layers with children (attention, RNNs) are leaves; its encoder layers not.
        if isinstance(module, nn.MultiheadAttention):
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


def survey(model: nn.Module, calls: Calls | None = None) -> Survey:
    """Read every block of ``model`` and list its residuals, in the order of the model's depth.

    Args:
        model: The model; it is left as it is.
        calls: The arguments by name of a real call of each block, from ``example_inputs``.
    """
    linearity = _Linearity()
    unreadable: dict[str, str] = {}
    found: list[Residual] = []
    seen = additions = 0
    for name, module in _candidates(model):
        try:
            block = trace_block(module, constants=(calls or {}).get(name))
        except UntraceableError as error:
            unreadable[name] = str(error)
            continue
        seen += 1
        finder = _Finder(block, linearity)
        additions += sum(_terms(node) is not None for node in finder.nodes)
        found += _residuals_of(name, finder)
    _settle_masks(model, found)
    _mark_lone(found)
    _mark_inner(found)
    return Survey(found, unreadable, seen, additions)


def _residuals_of(name: str, finder: _Finder) -> list[Residual]:
    """The blocks of one forward: itself, or the elements of the ModuleList that it loops over."""
    owner = finder.owner
    entries = finder.entries()
    elements = {entry: _element(_called(entry.split), owner) for entry in entries}
    in_container = Counter(
        element.rpartition(".")[0] for element in set(elements.values()) if element
    )
    blocks: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        # Where additions are nested in one forward, the outermost counts.
        nested = any(entry.split.add in other.split.inside for other in entries)
        why_not = entry.why_not or ("inside another residual of its block" if nested else "")
        element = elements[entry]
        loops = element is not None and in_container[element.rpartition(".")[0]] > 1
        key = _join(name, element) if element is not None and loops else name
        blocks.setdefault((key, why_not), []).append(entry)
    result = []
    for (key, why_not), members in blocks.items():
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
            )
            for entry, branch_name in zip(members, names, strict=True)
        ]
        result.append(
            Residual(
                label, module, branches, not why_not, why_not, _traced=finder.block, _owner=name
            )
        )
    return result


def _branch_names(block: str, splits: list[Split], owner: nn.Module) -> list[str]:
    if len(splits) == 1:
        return [block]
    names: list[str] = []
    for split in splits:
        sizes = {
            path: sum(p.numel() for p in owner.get_submodule(path).parameters())
            for path in _called(split)
        }
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
            branch.masks = tuple(masks)
            rates = [mask_rate(model.get_submodule(m)) or 0.0 for m in masks]
            # several masks on one branch: it survives only if each lets it
            kept = 1.0
            for rate in rates:
                kept *= 1.0 - rate
            branch.p = rates[0] if len(rates) == 1 else 1.0 - kept


def _mark_lone(residuals: list[Residual]) -> None:
    """A residual stack repeats; a lone addition is something else, unless ``select`` says so."""

    def family(residual: Residual) -> tuple[object, ...]:
        traced = residual._traced
        assert traced is not None
        if residual.module is traced.module:
            return (type(residual.module),)
        return residual._owner, type(residual.module)  # the elements of one loop

    sizes = Counter(family(r) for r in residuals if r.default)
    for residual in residuals:
        if residual.default and sizes[family(residual)] < 2:
            residual.default = False
            residual.why_not = f"no other {type(residual.module).__name__} has a residual"


def _mark_inner(residuals: list[Residual]) -> None:
    """Of nested residuals the outermost is taken."""
    outer = {c for r in residuals if r.default for b in r.branches for c in b.children}
    for residual in residuals:
        atoms = residual._owner.split(".")
        above = {".".join(atoms[:i]) for i in range(1, len(atoms) + 1)}
        if residual.default and above & outer:
            residual.default = False
            residual.why_not = "inside the branch of another residual"


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
    calls = None if example_inputs is None else record_calls(model, example_inputs)
    return [r for r in survey(model, calls).residuals if (select(r) if select else r.default)]
