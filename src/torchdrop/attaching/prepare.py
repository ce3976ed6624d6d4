"""Make the sites of a model from its residuals. Nothing is attached yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from torchdrop.finding.existing_drops import inlined_drop
from torchdrop.finding.residual import Branch, Residual
from torchdrop.finding.residual_sums import Split, read_residual_sums
from torchdrop.running.block_site import BlockSite
from torchdrop.running.branch_state import (
    MASK_REQUESTED,
    MIN_ELEMENTS_TO_SKIP,
    BranchState,
    Settings,
)
from torchdrop.running.program import Program
from torchdrop.running.rewrite import rewrite
from torchdrop.running.split_site import SplitSite
from torchdrop.running.whole_site import WholeSite
from torchdrop.tracing.block_graph import BlockGraph, trace_block

__all__ = ["prepare_sites"]


def prepare_sites(
    model: nn.Module, chosen: Sequence[Residual], settings: Settings, compute: str
) -> list[BlockSite]:
    """A site for each forward that holds chosen residuals; ``model`` is not touched."""
    order = {name: i for i, name in enumerate(dict.fromkeys(r.name for r in chosen))}
    settings.blocks = len(order)
    by_owner: dict[str, list[tuple[Residual, Branch]]] = {}
    for residual in chosen:
        for branch in residual.branches:
            by_owner.setdefault(branch.source.owner, []).append((residual, branch))
    taken = Counter(b.name for r in chosen for b in r.branches)
    twice = [name for name, times in taken.items() if times > 1]
    if twice:
        raise ValueError(f"select took branches of one name more than once: {', '.join(twice)}")
    sites = [
        _prepare_site(model, owner, members, settings, compute, order)
        for owner, members in by_owner.items()
    ]
    places = {b.name: i for i, b in enumerate(b for r in chosen for b in r.branches)}
    for state in (state for site in sites for state in site.branches):
        state.order = places[state.name]
    return sorted(sites, key=lambda site: (site.branches[0].index, site.branches[0].order))


def _prepare_site(
    model: nn.Module,
    owner: str,
    members: Sequence[tuple[Residual, Branch]],
    settings: Settings,
    compute: str,
    order: dict[str, int],
) -> BlockSite:
    module = model.get_submodule(owner)
    if "forward" in module.__dict__:
        raise ValueError(
            f"the forward of {owner!r} was replaced on the instance already (by "
            f"{module.__dict__['forward']!r}); add stochastic depth before that"
        )
    block = members[0][1].source.graph
    if block is None:
        return _prepare_layer(model, *members[0], settings, compute, order)
    entries: list[tuple[Residual, Branch, Split]] = []
    for residual, branch in members:
        assert branch.source.split is not None
        entries.append((residual, branch, branch.source.split))
    position = {node: i for i, node in enumerate(block.graph.nodes)}
    entries.sort(key=lambda entry: position[entry[2].add])
    for _, branch, split in entries:
        drawn = inlined_drop(block.graph, split.branch, split.skip)
        if drawn is not None:
            raise ValueError(
                f"the forward of {owner or 'the model'!r} ({type(module).__name__}) drops the "
                f"branch {branch.name} by itself ({drawn.name}), and that rate would add to p; "
                f"set it to 0, make it a layer like torchdrop.DropPath, which is taken over, or "
                f"leave the block out with select="
            )
    splits: list[tuple[Split, str]] = []
    states: list[BranchState] = []
    for residual, branch, split in entries:
        action, reason = branch.action, branch.reason
        if compute == "mask" and action == "skip":
            action, reason = "mask", MASK_REQUESTED
        elif compute == "skip" and action == "mask":
            raise ValueError(
                f"compute='skip', but {branch.name} cannot be skipped: {reason}; "
                f"use compute='auto', or leave it out with select="
            )
        splits.append((split, action))
        state = _state(model, residual, branch, split, action, reason, order, settings, compute)
        states.append(state)
    return SplitSite(
        block.module,
        settings,
        states,
        rewrite(block, splits, owner or type(model).__name__),
        _rewrite_for_evaluation(block, splits) if settings.scale == "eval" else None,
        [split.order for split, _ in splits],
        block.look_through,
        block.items,
    )


def _prepare_layer(
    model: nn.Module,
    residual: Residual,
    branch: Branch,
    settings: Settings,
    compute: str,
    order: dict[str, int],
) -> WholeSite:
    """The site of a block that is dropped as a whole."""
    assert branch.source.whole_block is not None
    action, reason = (
        ("mask", MASK_REQUESTED) if compute == "mask" else (branch.action, branch.reason)
    )
    state = _state(model, residual, branch, None, action, reason, order, settings, compute)
    return WholeSite(residual.module, settings, state, branch.source.whole_block)


def _rewrite_for_evaluation(block: BlockGraph, splits: Sequence[tuple[Split, str]]) -> Program:
    """The same deferral in the forward as it is in evaluation, where dropout is off."""
    label = f"{type(block.module).__name__} in evaluation"
    module = block.module
    in_eval = trace_block(
        module,
        training=False,
        arguments=block.arguments,
        batch_dim=splits[0][0].dim or 0,
        look_through={module.get_submodule(path) for path in block.look_through},
        outputs={module.get_submodule(path): items for path, items in block.items.items()},
    )
    twins = [entry.split for entry in read_residual_sums(in_eval)]
    if len(twins) <= max(split.order for split, _ in splits):
        raise ValueError(
            f"scale='eval' scales branches in evaluation, but {label} does not add the same "
            f"branches as in training; use scale='train'"
        )
    return rewrite(in_eval, [(twins[s.order], action) for s, action in splits], label)


def _state(
    model: nn.Module,
    residual: Residual,
    branch: Branch,
    split: Split | None,
    action: str,
    reason: str,
    order: dict[str, int],
    settings: Settings,
    compute: str,
) -> BranchState:
    called = [model.get_submodule(child) for child in branch.children]
    norms = any(isinstance(m, _BatchNorm) for top in called for m in top.modules())
    if norms and action == "skip":
        pair = "BatchNorm: one kept row of a small map runs with a second"
        reason = f"{reason}; {pair}" if reason else pair
    own = tuple(
        dict.fromkeys(
            str(source.target)
            for node in (() if split is None else split.inside)
            for source in (node, *node.all_input_nodes)
            if source.op == "get_attr"
        )
    )
    weights = [p for top in called for p in top.parameters()]
    weights += [attrgetter(path)(model.get_submodule(branch.source.owner)) for path in own]
    elementwise = (
        (compute, settings.mode, action) == ("auto", "row", "skip")
        and split is not None
        and not norms
        and not any(
            _is_matrix(t) for t in (*weights, *(b for top in called for b in top.buffers()))
        )
    )
    if elementwise:
        small = f"no matrices: masked where p times its elements is below {MIN_ELEMENTS_TO_SKIP}"
        reason = f"{reason}; {small}" if reason else small
    return BranchState(
        name=branch.name,
        block=residual.name,
        path=""
        if residual.module is model.get_submodule(branch.source.owner)
        else _relative(residual.name, branch.source.owner),
        index=order[residual.name],
        shortcut=branch.shortcut,
        action=action,
        reason=reason,
        children=branch.children,
        masks=branch.masks,
        inherited=branch.p,
        gain=1.0 if split is None else split.branch_gain,
        writes_skip=split is not None and split.writes_skip,
        branch_first=split is not None and split.branch_first,
        has_batch_norm=norms,
        elementwise=elementwise,
        convolves=any(is_lazy(w) or (w.dim() > 2 and _is_matrix(w)) for w in weights),
        inner=tuple(_relative(child, branch.source.owner) or "" for child in branch.children),
        dim=(split.dim or 0)
        if split is not None
        else branch.source.whole_block.dim
        if branch.source.whole_block
        else 0,
        row_layouts=None if split is None else split.row_layouts,
        own=own,
        sampling=settings.sampling,
        scale=settings.scale,
    )


def _is_matrix(tensor: torch.Tensor) -> bool:
    return is_lazy(tensor) or tensor.numel() > max(tensor.shape, default=1)


def _relative(name: str, owner: str) -> str | None:
    """The path of a block from the module that adds it; None where the block is around that."""
    if name == owner or not owner:
        return "" if name == owner else name
    return name.removeprefix(f"{owner}.") if name.startswith(f"{owner}.") else None


def _batch_dim(branch: Branch, split: Split | None) -> int:
    if split is not None:
        return split.dim or 0
    return branch.source.whole_block.dim if branch.source.whole_block is not None else 0
