"""FIND: the residual branches of a model. Reads, never changes anything.

A residual is an addition ``skip + branch`` in a block's own forward. The *branch* is what the one
side depends on and the other does not, holds parameters and is not linear; the *skip* is the
other side: the identity, or a linear projection (1x1 convolution, norm, pooling, zero padding).
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchdrop.blocks import CONTAINERS, BlockReader
from torchdrop.checks import check_model
from torchdrop.examples import Example, carries, same_rows
from torchdrop.linear import Children, is_curved
from torchdrop.masks import drops_layers, is_mask, mask_rate
from torchdrop.splits import Cuts, Entry, Finder, Split, called_in, differing, terms
from torchdrop.tracing.block_graph import BlockGraph
from torchdrop.tracing.call_arguments import unfold

__all__ = [
    "Branch",
    "Residual",
    "Survey",
    "find_residuals",
    "survey",
]


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


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


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
    reader = BlockReader(model, example, batch_dim)
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
        # What branches on data might do something else on the kept rows than on all of them.
        rest = {name: why for name, why in unreadable.items() if name not in reader.on_data}
        found += _whole_layers(model, example, found, rest, uses, batch_dim)
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        found.sort(key=lambda residual: order.get(residual._owner, 0))
    _settle_masks(model, found)
    _mark_inner(found)
    found = _joined(model, found)
    additions = sum(terms(node) is not None for f in finders.values() for node in f.nodes)
    return Survey(found, unreadable, len(finders), additions)


def _uses(model: nn.Module, finders: Iterable[Finder]) -> Counter[nn.Module]:
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


def _choose(finders: dict[str, Finder], uses: Counter[nn.Module]) -> dict[Entry, str]:
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


def _module_of(finder: Finder, entry: Entry) -> tuple[nn.Module, str | None]:
    """The module that an addition belongs to: the element of a loop, or the block itself."""
    element = finder.elements[entry]
    return (finder.owner.get_submodule(element) if element else finder.owner), element


def _residuals_of(name: str, finder: Finder, why_not: dict[Entry, str]) -> list[Residual]:
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
                children=tuple(_join(name, path) for path in called_in(entry.split)),
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
        sizes = {path: _size(owner.get_submodule(path)) for path in called_in(split)}
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
        apart = isinstance(model.get_submodule(above), CONTAINERS)
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
        x: Which of its arguments the block adds to, as :func:`unfold` names it.
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
    return uses[module] > 1 or (isinstance(container, CONTAINERS) and len(alike) > 1)


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
    dims = differing(few, many)
    if len(dims) != 1 or batch_dim not in (None, dims[0]):
        return None
    (dim,) = dims
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
    methods = _methods(module)
    if methods is None:
        return True
    counts = {
        target.id
        for node in methods
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("len(")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in methods:
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add):
            operand = node.right if isinstance(node, ast.BinOp) else node.value
            number = isinstance(operand, ast.Constant)  # i + 1, calls += 1
            if not number and not (isinstance(operand, ast.Name) and operand.id in counts):
                return True
        if isinstance(node, ast.Attribute) and node.attr in ("add", "add_"):
            return True
    return False


def may_loop_over_branches(module: nn.Module) -> bool:
    """Whether ``module`` may add branches in a loop over a list of its children.

    A branch is not linear. So one of these children is not, or another child of one argument, or a
    function that the class calls: the convolutions of a feature pyramid make no branches.
    """
    lists = [c for c in module.children() if isinstance(c, nn.ModuleList | nn.ModuleDict)]
    if not lists:
        return False
    elements = [element for each in lists for element in each.children()]
    elements += [c for c in module.children() if c not in lists and _takes_one(c)]
    if not all(map(Children().linear, elements)):
        return True
    calls = [node.func for node in _methods(module) or () if isinstance(node, ast.Call)]
    names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls}
    return any(map(is_curved, names))


def _takes_one(module: nn.Module) -> bool:
    """Whether one argument is enough for ``module``, as it is for an activation."""
    try:
        inspect.signature(type(module).forward).bind(module, None)
    except TypeError:
        return False
    return True


def _methods(module: nn.Module) -> list[ast.AST] | None:
    """All that the methods of ``module``'s class consist of, inherited ones too; None if hidden."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for kind in type(module).__mro__:
        if kind.__module__.startswith(("torch.nn.modules.", "builtins")):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            return None  # no source to read: it may do anything
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef):
                above = methods.setdefault(method.name, [])
                if not above or "super()" in ast.unparse(above[-1]):
                    above.append(method)
    methods.pop("__init__", None)
    return [node for each in methods.values() for method in each for node in ast.walk(method)]


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
    check_model(model)
    if select is not None and not callable(select):
        raise TypeError(f"select has to be a function of a Residual, but got {select!r}")
    example = None if example_inputs is None else Example(model, example_inputs)
    return [r for r in survey(model, example).residuals if (select(r) if select else r.default)]
