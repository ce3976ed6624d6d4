"""CHANGE: stochastic depth on a model that exists. The one file that changes a model.

What is attached to a block is an object in the ``forward`` slot of that very instance: class,
parameters, buffers, hooks and state_dict keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from torchdrop.attaching.measure_shares import measure_shares
from torchdrop.attaching.plan import Plan
from torchdrop.attaching.prepare import prepare_sites
from torchdrop.attaching.rates import resolve_rates, set_rates
from torchdrop.attaching.refusals import (
    check_attachable,
    check_batch_dims,
    check_settings,
    nothing_found,
    refuse_doubled,
    refuse_unreadable,
)
from torchdrop.checks import check_model
from torchdrop.finding.example_calls import Example
from torchdrop.finding.existing_drops import is_mask
from torchdrop.finding.residual import Residual
from torchdrop.finding.survey import survey
from torchdrop.running.forward_slot import (
    LayerDropBypass,
    MaskBypass,
    clear_slot,
    occupant_of,
    put_in_slot,
)

__all__ = ["add_stochastic_depth", "has_stochastic_depth", "remove_stochastic_depth"]


def add_stochastic_depth(
    model: nn.Module,
    p: Any = 0.2,
    *,
    schedule: str = "linear",
    mode: str = "row",
    sampling: str = "exact",
    scale: str = "train",
    select: Callable[[Residual], bool] | None = None,
    compute: str = "auto",
    sync_ranks: bool | None = None,
    zero_grad: bool = True,
    example_inputs: Any = None,
    batch_dim: int | None = None,
) -> Plan:
    """Drop the residual branches of ``model`` while it trains, and compute only what is kept.

    A block ``out = s(x) + f(x)`` becomes, in training, ``out = s(x) + b / (1 - p) * f(x)`` with
    ``P(b = 0) = p``, a ``b`` for every row of the batch or one for the whole batch, and ``f`` is
    run on the rows with b = 1 only. In evaluation the block's own forward runs, untouched.

    The model is changed in place, by an object in the ``forward`` slot of each block: classes,
    parameters, buffers, hooks and state_dict keys stay the very same, an optimizer made before
    goes on working, and :func:`remove_stochastic_depth` gives the model back as it was.

    Args:
        model: Any module with a residual stack. Wrap it in DDP or FSDP afterwards.
        p: The drop probability, in [0, 1]; .2 if not given. A float, for the deepest block; a
            sequence, one float a block; a mapping from block (or branch) names, whose other blocks
            get 0; or None, to take over the rates of the DropPath / StochasticDepth layers that the
            model has. The branches of one block share its rate.
        schedule: How a single ``p`` spreads over the blocks l = 1..L: ``"linear"`` (the paper's
            ``p*l/L``), ``"linear_from_zero"`` (timm's ``p*(l-1)/(L-1)``) or ``"uniform"``.
        mode: ``"row"``: every sample drops branches of its own. ``"batch"``: the whole batch
            drops together, as in the paper.
        sampling: How rows are chosen: ``"exact"``, a uniformly random subset of B*(1-p) rows,
            rounded at random so that the mean is exact; ``"independent"``, one Bernoulli draw a
            row, as timm and torchvision do; ``"window"``, exact, cyclic runs of rows, for shuffled
            batches.
        scale: ``"train"``: kept branches are divided by 1-p in training. ``"eval"``: the paper's
            rule, branches are multiplied by 1-p in evaluation.
        select: Called with every :class:`Residual`, those too that are not taken by default
            (``r.default`` is False: lone, inner, linear); True takes it.
        compute: ``"skip"`` or ``"mask"`` for all branches, or ``"auto"``: skip wherever it is
            possible, and the plan says where it is not; except that in row mode a branch without
            matrices and without BatchNorm is masked on tensors so small that this is faster. Which
            rows are dropped is the same either way.
        sync_ranks: Batch mode in a process group: whether all ranks decide alike, else a step is as
            slow as the rank that keeps most. None or True: they do, after one broadcast in the
            first training forward, which every rank of the default group has to run. False:
            each for itself, as in row mode.
        zero_grad: Parameters of a branch that no row used get a gradient of zeros, as with a mask,
            which DDP and FSDP need. False leaves None.
        example_inputs: A tensor, a tuple, or a dict of keyword arguments: for models whose blocks
            cannot be traced from their signature, and for the FLOPs in the plan's table.
        batch_dim: Which dimension of the residual tensors is the batch. None: 0, unless for some
            blocks two batch sizes of ``example_inputs`` show another one, or the attention or
            recurrent layers of a block say ``batch_first=False``, which is 1.

    Returns:
        The plan: print it to see what is dropped where.

    Raises:
        ValueError, TypeError: The model has no residual branches, has stochastic depth already,
            is wrapped, or an argument is out of range. The model is then as it was.

    References:
        Huang et al., Deep Networks with Stochastic Depth, 2016, arXiv:1603.09382,
        equations (2), (4) and (5).

    Example:
        >>> import torch, torchvision, torchdrop
        >>> model = torchvision.models.resnet18()
        >>> plan = torchdrop.add_stochastic_depth(model, p=0.5)
        >>> len(plan.blocks)
        8
    """
    check_model(model)
    settings = check_settings(
        schedule, mode, sampling, scale, compute, sync_ranks, zero_grad, batch_dim, select
    )
    check_attachable(model)
    example = None if example_inputs is None else Example(model, example_inputs, batch_dim)
    found = survey(model, example, batch_dim)
    chosen = [r for r in found.residuals if (select(r) if select else r.default)]
    if not chosen:
        raise ValueError(nothing_found(model, found, select is not None, example is not None))
    if select is None:
        refuse_unreadable(model, found, example is not None)
    refuse_doubled(model, chosen)
    check_batch_dims(chosen)
    sites = prepare_sites(model, chosen, settings, compute)
    branches = [branch for site in sites for branch in site.branches]
    rates = resolve_rates(p, branches, settings.blocks, schedule)

    set_rates(sites, rates)
    plan = Plan(model, sites)
    masks = {path for branch in branches for path in branch.facts.masks}
    try:
        # All has been checked and generated: what can come in between is a user who interrupts.
        for site in sites:
            put_in_slot(site.module, site)
        for path in masks:
            mask = model.get_submodule(path)
            put_in_slot(mask, MaskBypass(mask) if is_mask(mask) else LayerDropBypass(mask))
        if example_inputs is not None:
            measure_shares(model, sites, example_inputs)
    except BaseException:
        if has_stochastic_depth(model):
            remove_stochastic_depth(model)
        raise
    return plan


def has_stochastic_depth(model: nn.Module) -> bool:
    """Whether :func:`add_stochastic_depth` was called on ``model`` or on a part of it."""
    check_model(model)
    return any(occupant_of(module) is not None for module in model.modules())


def remove_stochastic_depth(model: nn.Module) -> nn.Module:
    """Take stochastic depth off again; ``model`` is exactly as it was before it was added.

    Masking layers that had been taken over act again.

    Returns:
        ``model``.

    Raises:
        ValueError: There is none on ``model``.
    """
    if not has_stochastic_depth(model):
        raise ValueError(
            f"there is no stochastic depth on this {type(model).__name__}; "
            f"has_stochastic_depth(model) tells"
        )
    for module in model.modules():
        if occupant_of(module) is not None:
            clear_slot(module)
    return model
