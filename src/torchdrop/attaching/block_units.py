"""Join all branches of a block into one: ``unit="block"``."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from torchdrop.attaching.refusals import refuse_dropped_inside
from torchdrop.error_pages import see
from torchdrop.finding.block_stream import BlockStream, follow_stream
from torchdrop.finding.example_calls import Example
from torchdrop.finding.existing_drops import is_unscaled
from torchdrop.finding.residual import Branch, BranchSource, Residual, WholeBlock
from torchdrop.finding.row_layout import RowLayout, RowLayouts
from torchdrop.finding.whole_blocks import measure_whole_block
from torchdrop.tracing.block_graph import BlockGraph

__all__ = ["join_branches"]


def join_branches(
    model: nn.Module,
    chosen: Sequence[Residual],
    example: Example | None,
    named: Collection[str],
    inherits: bool,
) -> list[Residual]:
    """Replace the branches of each block by one branch, ``block(x) - x``, where that is possible.

    The branches of other blocks get a reason, which the plan prints.

    Args:
        model: The model.
        chosen: The residuals whose branches are dropped.
        example: What the model is called with; None if that is not known.
        named: The blocks that the user has named, which are joined even if the block normalises
            its sums.
        inherits: Whether each branch has the rate of the model's own masking layers.

    Raises:
        ValueError: A block has no module of its own, or its branches have different rates.
    """
    result = []
    changing: dict[str, str] = {}
    for residual in chosen:
        stream = BlockStream(_why_one_by_one(residual))
        if not stream.why_not:
            _check_has_module(model, residual)
            stream = follow_stream(residual)
            if stream.changes and residual.name not in named:
                stream = BlockStream(
                    f"the block applies {' and '.join(stream.changes)} to its sums; name it in p "
                    f"to drop it as a whole nevertheless"
                )
        if stream.why_not:
            for branch in residual.branches:
                why = f"dropped by branch, not by block: {stream.why_not}"
                branch.reason = "; ".join(filter(None, (branch.reason, why)))
            result.append(residual)
            continue
        for branch in residual.branches:
            source = branch.source
            assert source.graph is not None
            assert source.split is not None
            refuse_dropped_inside(source.owner, source.graph, branch.name, source.split)
        _check_one_rate(model, residual, inherits)
        if stream.changes:
            changing[residual.name] = " and ".join(stream.changes)
        result.append(replace(residual, branches=[_joined(residual, stream, example)]))
    if changing:
        _warn_of_changes(changing)
    return result


def _why_one_by_one(residual: Residual) -> str:
    """Say why one decision for the block is not asked for; empty if it is."""
    if len(residual.branches) == 1:
        return "it has one branch" if _is_own_module(residual) else ""
    if residual.shortcut == "projection":
        return "its shortcut is a projection"
    return ""


def _is_own_module(residual: Residual) -> bool:
    """Whether the one branch of ``residual`` is all that a module of the model computes."""
    (branch,) = residual.branches
    return residual.owner == residual.name or branch.children == (residual.name,)


def _check_has_module(model: nn.Module, residual: Residual) -> None:
    """Raise unless the forward that adds the branches is that of the block itself."""
    owner = model.get_submodule(residual.owner)
    if residual.module is not owner or len(residual.branches) == 1:
        raise ValueError(
            f"unit='block' runs the forward of each block on the kept rows, but the branches of "
            f"{residual.name} are added in the forward of {residual.owner or 'the model'} "
            f"({type(owner).__name__}); use unit='branch', or leave the block out with select="
            + see("whole-blocks")
        )


def _check_one_rate(model: nn.Module, residual: Residual, inherits: bool) -> None:
    """Raise if the model's own masking layers do not treat the branches of a block alike."""
    if len({is_unscaled(model, branch.masks) for branch in residual.branches}) > 1:
        raise ValueError(
            f"unit='block' scales all branches of a block alike, but some masking layers in "
            f"{residual.name} have scale_by_keep=False, and others do not; use unit='branch'"
            + see("whole-blocks")
        )
    if not inherits:
        return
    rates = {branch.p for branch in residual.branches}
    if len(rates) > 1:
        listed = ", ".join(f"{branch.name} {branch.p:g}" for branch in residual.branches)
        raise ValueError(
            f"unit='block' with p=None needs one rate for all branches of a block, but the model's "
            f"own layers have different ones (0 without a layer): {listed}; give p, or use "
            f"unit='branch'" + see("whole-blocks")
        )


def _warn_of_changes(changing: dict[str, str]) -> None:
    """Warn that dropped rows miss what blocks apply to their sums, by the names of the blocks."""
    name, applied = next(iter(changing.items()))
    more = f" (and {len(changing) - 1} more)" if len(changing) > 1 else ""
    warnings.warn(
        f"{name}{more} applies {applied} to its sums. A row for which the block is dropped is the "
        f"input of the block, without {applied}, and a kept row is x + (block(x) - x) / (1 - p), "
        f"which may leave the range of the block's own output" + see("whole-blocks"),
        stacklevel=4,
    )


def _joined(residual: Residual, stream: BlockStream, example: Example | None) -> Branch:
    """Return the one branch of ``residual``, ``block(x) - x``."""
    branches = residual.branches
    splits = [branch.source.split for branch in branches]
    dim = next((s.dim for s in splits if s is not None and s.dim is not None), 0)
    block = None if example is None else measure_whole_block(residual.owner, example, dim)
    if block is None or (block.x, block.sum_item) != (stream.x, stream.sum_item):
        # How other arguments carry the rows is not known: the shape of each decides in each call.
        layouts: RowLayouts = {stream.x: RowLayout(dim, 1)}
        block = WholeBlock(stream.x, dim, layouts, stream.sum_item, stream.returns)
    graphs: dict[str, BlockGraph] = {}
    for branch in branches:
        source = branch.source
        assert source.graph is not None
        graphs.setdefault(source.owner[len(residual.owner) :].lstrip("."), source.graph)
    return Branch(
        name=residual.name,
        shortcut="identity",
        action="layer",
        reason=f"unit='block': one decision for its {len(branches)} branches",
        p=branches[0].p,
        children=(residual.owner,),
        masks=tuple(dict.fromkeys(mask for branch in branches for mask in branch.masks)),
        source=BranchSource(residual.owner, None, None, block, graphs, stream.changes),
    )
