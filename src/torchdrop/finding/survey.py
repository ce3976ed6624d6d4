"""Find the residual branches of a model. The model is not changed.

A residual is an addition ``shortcut + branch`` in the forward of a block. The *branch* is what one
operand depends on and the other does not; it has parameters and is not linear. The other operand
is the *shortcut*: the identity, or a linear projection (1x1 convolution, norm, pooling, zeros).
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from torchdrop.finding.block_reader import CONTAINERS, BlockReader
from torchdrop.finding.example_calls import Example
from torchdrop.finding.existing_drops import is_mask, layerdrop_of, mask_rate
from torchdrop.finding.residual import Branch, BranchSource, Residual
from torchdrop.finding.residual_sums import ResidualSums
from torchdrop.finding.split import ResidualSum, Split, called_modules
from torchdrop.finding.stacks import count_calls, reasons_not_taken
from torchdrop.finding.whole_blocks import find_whole_blocks
from torchdrop.tracing.nodes import summands
from torchdrop.tracing.own_forward import own_forward

__all__ = ["Blend", "Survey", "survey"]


@dataclass(frozen=True)
class Blend:
    """A forward with a gate, or another sum without a shortcut, such as ``g * f + (1 - g) * x``.

    Attributes:
        name: The path of the module that has the forward.
        kind: The name of its class.
        where: The file and the line of the forward.
    """

    name: str
    kind: str
    where: str


@dataclass
class Survey:
    """The residual blocks of a model.

    Attributes:
        residuals: Every residual block, also those that are not taken by default.
        unreadable: Why the forwards of other blocks could not be read, by their paths.
        seen: How many forwards were read.
        additions: How many additions of two tensors these contain.
        blends: Sums that are no residuals, although both sides are computed from the input.
    """

    residuals: list[Residual]
    unreadable: dict[str, str]
    seen: int
    additions: int
    blends: list[Blend]


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


def survey(
    model: nn.Module, example: Example | None = None, batch_dim: int | None = None
) -> Survey:
    """Read every block of ``model`` and list its residuals, in the order of the model's depth.

    Args:
        model: The model; it is not changed.
        example: The arguments that each block is called with.
        batch_dim: Which dimension of the residual tensors is the batch. None: for each block the
            dimension that follows from the example, else from its layers.
    """
    reader = BlockReader(model, example, batch_dim)
    finders, unreadable = reader.read_all()
    if example is not None and any(finder.contradicted for finder in finders.values()):
        # The dimension that grew is not the batch: layers of torch say that the batch is on 1.
        example.assume_batch_dim(1)
        again, unreadable = reader.read_all()
        if example.larger:
            finders = again
    uses = count_calls(model, finders.values())
    if example is not None:
        uses |= example.first.times
    why_not = reasons_not_taken(finders, uses)
    kinds = Counter(type(finder.owner) for finder in finders.values() if finder.entries)
    found: list[Residual] = []
    owners = {name for name, finder in finders.items() if finder.entries}
    for name, finder in finders.items():
        # A module that is called repeatedly, as the layer of ALBERT, is a block, not a network.
        once = kinds[type(finder.owner)] == 1 and uses[finder.owner] < 2
        flat = once and finder.has_stem_or_head
        parts = _parts_of_branches(name, finder, owners) if flat else {}
        found += _residuals_of(name, finder, why_not, parts)
    if example is not None:
        # A block that branches on data may take another path on the kept rows than on all rows.
        branching = reader.branching_on_data
        candidates = {name: why for name, why in unreadable.items() if name not in branching}
        found += find_whole_blocks(model, example, found, candidates, uses, batch_dim)
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        found.sort(key=lambda residual: order.get(residual.owner, 0))
    _assign_masks(model, found)
    _mark_inner(found)
    found = _with_parts_in_lists_joined(model, _with_inner_parts_joined(model, found))
    additions = sum(summands(node) is not None for f in finders.values() for node in f.nodes)
    blends = [_blend(name, finder.owner) for name, finder in finders.items() if finder.blends]
    return Survey(found, unreadable, len(finders), additions, blends)


def _blend(name: str, owner: nn.Module) -> Blend:
    code = getattr(inspect.unwrap(own_forward(owner)), "__code__", None)
    where = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code else "no source"
    return Blend(name, type(owner).__name__, where)


def _residuals_of(
    name: str,
    finder: ResidualSums,
    why_not: dict[ResidualSum, str],
    parts: dict[ResidualSum, str],
) -> list[Residual]:
    """Return the blocks in one forward: its module, or the elements of the list it loops over.

    Args:
        name: The path of the module that has the forward.
        finder: Its additions.
        why_not: Why an addition is not taken by default.
        parts: If the forward is that of a whole network, the path of the block of each addition.
    """
    owner = finder.owner
    blocks: dict[tuple[str, str], list[ResidualSum]] = {}
    for entry in finder.entries:
        part = finder.elements[entry] or parts.get(entry)
        key = _join(name, part) if part is not None else name
        blocks.setdefault((key, why_not[entry]), []).append(entry)
    result = []
    for (key, why), members in blocks.items():
        module = owner.get_submodule(key[len(name) :].lstrip(".")) if key != name else owner
        label = key or type(module).__name__
        names = _branch_names(label, [entry.split for entry in members], owner)
        branches = [
            Branch(
                name=branch_name,
                shortcut=entry.shortcut,
                action=entry.action,
                reason=entry.reason,
                p=0.0,
                children=tuple(_join(name, path) for path in called_modules(entry.split)),
                masks=(),
                partly=entry.split.partly,
                source=BranchSource(name, entry.split, finder.block),
            )
            for entry, branch_name in zip(members, names, strict=True)
        ]
        result.append(Residual(label, module, branches, not why, why, owner=name))
    return result


def _parts_of_branches(name: str, finder: ResidualSums, owners: set[str]) -> dict[ResidualSum, str]:
    """Return a module for each addition of a network, by its path: the block that it becomes.

    It is the innermost module that holds the branch and no part of another one, or else the largest
    child that the branch calls. Empty unless there is one for each addition.

    Args:
        name: The path of the network.
        finder: Its additions.
        owners: The paths of modules whose own forwards add branches.
    """
    owner = finder.owner
    entries = [entry for entry in finder.entries if finder.elements[entry] is None]
    called = {entry: called_modules(entry.split) for entry in entries}
    parts: dict[ResidualSum, str] = {}
    for entry, paths in called.items():
        child = entry.split.add.meta.get("inlined")
        if child is not None and next(owner.get_submodule(child).parameters(), None) is not None:
            parts[entry] = child  # the child adds the branch, and is the block
            continue
        atoms = zip(*(path.split(".") for path in paths), strict=False)
        around = ".".join(n[0] for n in takewhile(lambda names: len({*names}) == 1, atoms))
        others = {p for other, found in called.items() if other is not entry for p in found}
        largest = sorted(paths, key=lambda path: _size(owner.get_submodule(path)), reverse=True)
        part = next(
            (
                path
                for path in (around, *largest)
                if path
                and path not in parts.values()
                and _join(name, path) not in owners
                and not any(other.startswith(f"{path}.") for other in others)
            ),
            None,
        )
        if part is None:
            return {}
        parts[entry] = part
    return parts


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _branch_names(block: str, splits: list[Split], owner: nn.Module) -> list[str]:
    """Name branches after their block and, if it has several, after their largest child."""
    if len(splits) == 1:
        return [block]
    names: list[str] = []
    for split in splits:
        sizes = {path: _size(owner.get_submodule(path)) for path in called_modules(split)}
        largest = max(sizes, key=sizes.__getitem__).rpartition(".")[2] if sizes else "sum"
        name = f"{block}:{largest}"
        while name in names:
            name += "'"
        names.append(name)
    return names


def _assign_masks(model: nn.Module, residuals: list[Residual]) -> None:
    """Set the masks of each branch, and the drop probability that results from them.

    A masking layer belongs to the innermost branch around it.
    """
    owners = {r.owner for r in residuals}
    for branch in (b for r in residuals for b in r.branches):
        masks = [path for child in branch.children for path in _masks_in(model, child, owners)]
        rates = [mask_rate(model.get_submodule(path)) or 0.0 for path in masks]
        atoms = branch.source.owner.split(".")
        for around in [".".join(atoms[:i]) for i in range(len(atoms))]:
            loop = layerdrop_of(model.get_submodule(around))
            if loop is not None:
                masks.append(around)
                rates.append(loop[1])
        branch.masks = tuple(masks)
        # with several masks on it, a branch is kept only if each of them keeps it
        kept = 1.0
        for rate in rates:
            kept *= 1.0 - rate
        branch.p = rates[0] if len(rates) == 1 else 1.0 - kept


def _masks_in(model: nn.Module, child: str, owners: set[str]) -> Iterator[str]:
    """Yield the paths of the masking layers in ``child`` that belong to no inner branch."""
    depth = len(child.split("."))
    for path, module in model.get_submodule(child).named_modules(prefix=child):
        if not is_mask(module):
            continue
        atoms = path.split(".")
        if not {".".join(atoms[:i]) for i in range(depth, len(atoms))} & owners:
            yield path


def _mark_inner(residuals: list[Residual]) -> None:
    """Set ``default`` to False for each residual that is inside the branch of another one."""
    outer = {c for r in residuals if r.default for b in r.branches for c in b.children}
    for residual in residuals:
        atoms = residual.owner.split(".")
        around = {".".join(atoms[:i]) for i in range(1, len(atoms) + 1)}
        own = {c for b in residual.branches for c in b.children}
        if residual.default and around & outer - own:
            residual.default = False
            residual.why_not = "inside the branch of another residual"


def _with_inner_parts_joined(model: nn.Module, residuals: list[Residual]) -> list[Residual]:
    """Join each block with those of its children that hold residuals on the path of its shortcut.

    In an encoder layer the attention may add its input itself, while the layer adds the output of
    the feed-forward part. Both are branches of the layer. The elements of a container are blocks of
    their own.
    """
    taken = {r.name: r for r in residuals if r.default and r.name == r.owner}
    joined: list[Residual] = []
    for residual in residuals:
        parent_name, _, child = residual.name.rpartition(".")
        parent = taken.get(parent_name)
        in_container = isinstance(model.get_submodule(parent_name), CONTAINERS)
        if parent is None or in_container or residual.name not in taken:
            joined.append(residual)
            continue
        if len(residual.branches) == 1:
            residual.branches[0].name = f"{parent.name}:{child}"
        parent.branches[:0] = residual.branches
    for residual in joined:
        names = [branch.name for branch in residual.branches]
        if residual.name in names and len(names) > 1:
            # this branch was named when it was the only branch of its block
            branch = residual.branches[names.index(residual.name)]
            size = {c: _size(model.get_submodule(c)) for c in branch.children}
            # a branch that consists of functions and parameters calls no child
            largest = max(size, key=size.__getitem__) if size else "sum"
            largest = largest.removeprefix(f"{residual.name}.").partition(".")[0]
            branch.name = f"{residual.name}:{largest}"
            while names.count(branch.name):
                branch.name += "'"
    return joined


def _with_parts_in_lists_joined(model: nn.Module, residuals: list[Residual]) -> list[Residual]:
    """Make one block of the residuals of each layer that keeps its parts in several lists.

    An encoder layer may have a list of attentions and a list of feed-forward parts, which add for
    themselves. The layer is the block, if it is an element of a container itself and one of its
    lists has a single element. Otherwise, as in a stage with lists of equal length, the elements of
    the lists are the blocks.
    """
    groups: dict[str, list[Residual]] = {}
    for residual in residuals:
        container, _, _ = residual.name.rpartition(".")
        layer, _, _ = container.rpartition(".")
        around = model.get_submodule(layer.rpartition(".")[0])
        in_list = isinstance(model.get_submodule(container), nn.ModuleList)
        if residual.default and layer and in_list and isinstance(around, CONTAINERS):
            groups.setdefault(layer, []).append(residual)
    apart = {
        layer.rpartition(".")[0]
        for layer, parts in groups.items()
        if not _are_parts_of_a_layer(parts)
    }
    joined = {
        layer: parts
        for layer, parts in groups.items()
        if layer.rpartition(".")[0] not in apart  # all layers of a stack are treated alike
    }
    result: list[Residual] = []
    for residual in residuals:
        layer = residual.name.rpartition(".")[0].rpartition(".")[0]
        if residual not in joined.get(layer, ()):
            result.append(residual)
        elif residual is joined[layer][0]:
            result.append(_as_one_block(model, layer, joined[layer]))
    return result


def _are_parts_of_a_layer(parts: Sequence[Residual]) -> bool:
    """Whether ``parts``, residuals in lists of one module, are parts of a layer, not layers."""
    lengths = Counter(part.name.rpartition(".")[0] for part in parts)
    single = all(len(part.branches) == 1 for part in parts)
    return single and len(lengths) > 1 and min(lengths.values()) == 1


def _as_one_block(model: nn.Module, layer: str, parts: Sequence[Residual]) -> Residual:
    """Return the residuals ``parts`` of the module ``layer`` as one block."""
    branches = [branch for part in parts for branch in part.branches]
    for branch in branches:
        branch.name = f"{layer}:{branch.name.removeprefix(f'{layer}.')}"
    return Residual(layer, model.get_submodule(layer), branches, True, "", owner=layer)
