"""The checks of ``add_stochastic_depth``, all of which are made before the model is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchdrop import schedules
from torchdrop.checks import MODES, check_choice, check_flag
from torchdrop.error_pages import see
from torchdrop.finding.existing_drops import find_drop_operation
from torchdrop.finding.residual import Residual
from torchdrop.finding.source_code import may_loop_over_branches, source_has_addition
from torchdrop.finding.split import Split
from torchdrop.finding.survey import Survey
from torchdrop.layers.stochastic_depth import StochasticDepth
from torchdrop.rows.collectives import is_sharded
from torchdrop.rows.sampling import ROW_SAMPLERS
from torchdrop.running.branch_state import Settings
from torchdrop.running.forward_slot import occupant_of
from torchdrop.tracing.block_graph import BlockGraph

__all__ = [
    "COMPUTES",
    "SCALES",
    "UNITS",
    "check_attachable",
    "check_batch_dims",
    "check_inherited_rates",
    "check_settings",
    "message_if_nothing_found",
    "refuse_doubled",
    "refuse_dropped_inside",
    "refuse_unreadable",
]

SCALES = ("train", "eval")
COMPUTES = ("auto", "skip", "mask")
UNITS = ("branch", "block")
_DEFAULT_SCHEDULE = "linear"  # as in the signature of add_stochastic_depth

# The advice for a block that cannot be read. It says "the whole block", because a StochasticDepth
# around the branch alone would add a second skip.
_BY_HAND = (
    "wrap the whole block in torchdrop.StochasticDepth, "
    "or append a torchdrop.DropPath to its branch"
)


def check_settings(
    schedule: Any,
    mode: Any,
    sampling: Any,
    scale: Any,
    compute: object,
    sync_ranks: object,
    zero_grad: Any,
    batch_dim: object,
    select: object,
    rows_per_sample: Any,
    verify: Any,
    unit: Any,
) -> Settings:
    """Check arguments of ``add_stochastic_depth``; return the settings that all branches share.

    Raises:
        TypeError, ValueError: An argument is not legal.
    """
    schedules.check_depth_rule(schedule)
    check_choice(mode, MODES, "mode")
    check_choice(sampling, tuple(ROW_SAMPLERS), "sampling")
    check_choice(scale, SCALES, "scale")
    check_choice(compute, COMPUTES, "compute")
    check_choice(unit, UNITS, "unit")
    if sync_ranks is not None and not isinstance(sync_ranks, bool):
        raise TypeError(f"sync_ranks has to be None, True or False, but got {sync_ranks!r}")
    check_flag(zero_grad, "zero_grad")
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int | None):
        raise TypeError(f"batch_dim has to be an integer or None, but got {batch_dim!r}")
    if batch_dim is not None and batch_dim < 0:
        raise ValueError(f"batch_dim has to be 0 or more, but got {batch_dim}")
    if isinstance(rows_per_sample, bool) or not isinstance(rows_per_sample, int | None):
        raise TypeError(f"rows_per_sample has to be an integer or None, got {rows_per_sample!r}")
    if rows_per_sample is not None and rows_per_sample < 1:
        raise ValueError(f"rows_per_sample has to be 1 or more, but got {rows_per_sample}")
    check_flag(verify, "verify")
    if select is not None and not callable(select):
        raise TypeError(f"select has to be a function of a Residual, but got {select!r}")
    return Settings(
        mode=mode,
        sampling=sampling,
        scale=scale,
        schedule=schedule,
        sync_ranks=sync_ranks,
        zero_grad=zero_grad,
        verify=verify,
        rows_per_sample=rows_per_sample,
        unit=unit,
    )


def check_inherited_rates(p: object, schedule: object) -> None:
    """Raise if a rule over depth is given for the rates that the layers of the model have."""
    if p is None and schedule != _DEFAULT_SCHEDULE:
        raise ValueError(
            f"p=None uses the rates of the model's own DropPath / StochasticDepth layers as they "
            f"are, but got schedule={schedule!r}; leave out schedule=, or give p as a number"
            + see("rates")
        )


def check_attachable(model: nn.Module) -> None:
    """Raise if the model already has stochastic depth, or was wrapped before it was added.

    Raises:
        ValueError: A part of the model is wrapped, compiled or sharded, or has stochastic depth.
    """
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else "the model"
        if occupant_of(module) is not None:
            raise ValueError(
                f"{where} already has stochastic depth; change its rates with "
                f"torchdrop.get_plan(model).set_p(...), or call "
                f"torchdrop.remove_stochastic_depth(model) first" + see("already-attached")
            )
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{where} is already TorchScript; add stochastic depth to the Python model first"
                + see("already-attached")
            )
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
            raise ValueError(
                f"{where} is wrapped in {kind}; add stochastic depth to the model first "
                f"and wrap it afterwards" + see("already-attached")
            )
        if is_sharded(module):
            raise ValueError(
                f"{where} is already sharded by fully_shard; add stochastic depth first and "
                f"shard afterwards" + see("already-attached")
            )
        if kind == "OptimizedModule":
            raise ValueError(
                f"{where} is already compiled by torch.compile; add stochastic depth to the "
                f"original model and compile afterwards" + see("already-attached")
            )


def message_if_nothing_found(model: nn.Module, found: Survey, selected: bool, example: bool) -> str:
    """Return the error message for a model in which no residual is taken.

    Args:
        model: The model.
        found: The residuals of the model.
        selected: Whether ``select`` was given.
        example: Whether ``example_inputs`` were given.
    """
    name = type(model).__name__
    if selected:
        return (
            f"select took none of the {len(found.residuals)} residuals of this {name}; "
            f"torchdrop.find_residuals(model) lists those that are taken by default"
            + see("no-residuals")
        )
    readable = [why for why in found.unreadable.values() if "torch.jit.script" not in why]
    unread = readable and not example  # an example does not help to read a compiled function
    hint = "; give example_inputs, so that its blocks are read as they are called" if unread else ""
    text = (
        f"no residual branches found in this {name}{hint}. torchdrop looks for additions skip + "
        f"branch in blocks that repeat; the branch has to contain parameters and an activation, "
        f"and the skip has to be the identity or a linear projection. It has read "
        f"{_count(found.seen, 'forward')} with {_count(found.additions, 'addition')}"
    )
    if found.residuals:
        listed = [f"{r.name!r} ({r.why_not})" for r in found.residuals[:3]]
        text += f"; not taken: {', '.join(listed)}; take them with select=lambda r: True"
    if found.blends:
        listed = [f"{b.name or name!r} ({b.kind}, {b.where})" for b in found.blends[:3]]
        text += f"; gates and other sums without a shortcut are not taken: {', '.join(listed)}"
    if found.unreadable:
        path, reason = next(iter(found.unreadable.items()))
        text += f"; {len(found.unreadable)} could not be read, the first one {path or name!r}: "
        text += reason
        text += "" if unread else f"; {_BY_HAND}"
    if not found.residuals and not found.unreadable and not found.blends:
        text += (
            ". Such a network has no branches to drop; wrap a part of it in "
            "torchdrop.StochasticDepth(module, p, projection=...), or use dropout"
        )
    only_unread = found.unreadable and not found.residuals
    return text + see("cannot-be-read" if only_unread else "no-residuals")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def refuse_unreadable(model: nn.Module, found: Survey, example: bool) -> None:
    """Raise if a block that may add residual branches could not be read."""
    taken = [r for r in found.residuals if r.default]
    children = [child for r in taken for b in r.branches for child in b.children]
    by_hand = [p for p, m in model.named_modules() if isinstance(m, StochasticDepth)]
    for path, reason in found.unreadable.items():
        if any(not p or f"{path}.".startswith(f"{p}.") for p in by_hand):
            continue  # the advice was followed
        prefix = f"{path}." if path else ""
        above = any(r.name.startswith(prefix) for r in taken)
        inside = any(path == c or path.startswith(f"{c}.") for c in children)
        module = model.get_submodule(path)
        alike = sum(type(m) is type(module) for m in model.modules())
        apart = not above and not inside
        if apart and source_has_addition(module) and (alike > 1 or may_loop_over_branches(module)):
            helps = not example and "torch.jit.script" not in reason
            way_out = "Give example_inputs; or leave it out" if helps else "Leave it out"
            raise ValueError(
                f"the forward of {path!r} ({type(module).__name__}) contains an addition, but "
                f"cannot be read: {reason}. {way_out} with select=lambda r: r.default; or "
                f"{_BY_HAND}" + see("cannot-be-read")
            )


def refuse_doubled(model: nn.Module, chosen: Sequence[Residual]) -> None:
    """Raise if a branch is inside a :class:`StochasticDepth`, or contains one."""
    branches = [branch for residual in chosen for branch in residual.branches]
    for path, module in model.named_modules():
        if not isinstance(module, StochasticDepth) or module.p == 0.0:
            continue
        for branch in branches:
            within = not path or f"{branch.source.owner}.".startswith(f"{path}.")
            if within or any(f"{path}.".startswith(f"{child}.") for child in branch.children):
                raise ValueError(
                    f"{path or 'the model'!r} is a torchdrop.StochasticDepth with p={module.p}, "
                    f"which would add to the rate of {branch.name}; set its p to 0, or leave the "
                    f"block out with select=" + see("doubled-rates")
                )


def refuse_dropped_inside(owner: str, block: BlockGraph, name: str, split: Split) -> None:
    """Raise a ValueError if a forward itself drops samples of a branch at random.

    Args:
        owner: The path of the module that has the forward.
        block: The forward.
        name: The name of the branch.
        split: The sum that adds it.
    """
    drawn = find_drop_operation(block.graph, split.branch, split.skip)
    if drawn is not None:
        raise ValueError(
            f"the forward of {owner or 'the model'!r} ({type(block.module).__name__}) drops the "
            f"branch {name} itself ({drawn.name}), and that rate would add to p; set it to "
            f"0, use a layer like torchdrop.DropPath instead, which torchdrop replaces, or leave "
            f"the block out with select=" + see("doubled-rates")
        )


def check_batch_dims(chosen: Sequence[Residual]) -> None:
    """Raise if it is not certain which dimension of the blocks is the batch.

    Layers with ``batch_first=False`` say that it is dimension 1 of their block.
    """
    layers: dict[str, int] = {}  # the dimension according to each layer, by its path
    silent = []  # branches whose layers say nothing
    for residual in chosen:
        for branch in residual.branches:
            split = branch.source.split
            if split is None:
                continue
            for path, dim in split.batch_first_votes.items():
                layers.setdefault(f"{branch.source.owner}.{path}".lstrip("."), dim)
            if split.dim is None and not split.batch_first_votes:
                silent.append(branch.name)
    first = {dim: path for path, dim in reversed(layers.items())}
    if len(first) == 2:
        raise ValueError(
            f"{first[0]!r} has batch_first=True and {first[1]!r} has batch_first=False, but the "
            f"batch has to be on the same dimension in all blocks; give that dimension as "
            f"batch_dim=, or give example_inputs, from which it is measured for each block"
            + see("batch-dimension")
        )
    if 1 in first and silent:
        raise ValueError(
            f"{first[1]!r} has batch_first=False, so the batch is on dimension 1 of its block, but "
            f"the batch dimension of {silent[0]!r} is not known; give batch_dim=, or "
            f"example_inputs, from which it is measured" + see("batch-dimension")
        )
