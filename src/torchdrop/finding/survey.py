"""FIND: the residual branches of a model. Reads, never changes anything.

A residual is an addition ``skip + branch`` in a block's own forward. The *branch* is what the one
side depends on and the other does not, holds parameters and is not linear; the *skip* is the
other side: the identity, or a linear projection (1x1 convolution, norm, pooling, zero padding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchdrop.checks import check_model
from torchdrop.finding.block_reader import CONTAINERS, BlockReader
from torchdrop.finding.example_calls import Example
from torchdrop.finding.existing_drops import drops_layers, is_mask, mask_rate
from torchdrop.finding.residual import Branch, BranchSource, Residual
from torchdrop.finding.residual_sums import ResidualSums
from torchdrop.finding.split import ResidualSum, Split, called_modules
from torchdrop.finding.stacks import choose, uses_of
from torchdrop.finding.whole_blocks import whole_layers
from torchdrop.tracing.nodes import summands

__all__ = [
    "Survey",
    "find_residuals",
    "survey",
]


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
    uses = uses_of(model, finders.values())
    if example is not None:
        uses |= example.first.times
    taken = choose(finders, uses)
    found = [r for name, finder in finders.items() for r in _residuals_of(name, finder, taken)]
    if example is not None:
        # What branches on data might do something else on the kept rows than on all of them.
        rest = {name: why for name, why in unreadable.items() if name not in reader.on_data}
        found += whole_layers(model, example, found, rest, uses, batch_dim)
        order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        found.sort(key=lambda residual: order.get(residual.owner, 0))
    _settle_masks(model, found)
    _mark_inner(found)
    found = _joined(model, found)
    additions = sum(summands(node) is not None for f in finders.values() for node in f.nodes)
    return Survey(found, unreadable, len(finders), additions)


def _residuals_of(
    name: str, finder: ResidualSums, why_not: dict[ResidualSum, str]
) -> list[Residual]:
    """The blocks of one forward: itself, or the elements of the ModuleList that it loops over."""
    owner = finder.owner
    blocks: dict[tuple[str, str], list[ResidualSum]] = {}
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
                shortcut=entry.shortcut,
                action=entry.action,
                reason=entry.reason,
                p=0.0,
                children=tuple(_join(name, path) for path in called_modules(entry.split)),
                masks=(),
                source=BranchSource(name, entry.split, finder.block),
            )
            for entry, branch_name in zip(members, names, strict=True)
        ]
        result.append(Residual(label, module, branches, not why, why, owner=name))
    return result


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _branch_names(block: str, splits: list[Split], owner: nn.Module) -> list[str]:
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


def _settle_masks(model: nn.Module, residuals: list[Residual]) -> None:
    """Give each masking layer to the innermost branch around it."""
    owners = {r.owner for r in residuals}
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
            atoms = branch.source.owner.split(".")
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
        atoms = residual.owner.split(".")
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
    taken = {r.name: r for r in residuals if r.default and r.name == r.owner}
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
