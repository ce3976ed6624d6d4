"""Add stochastic depth to an existing model, and remove it. No other file changes a model.

A block is changed by an object in the ``forward`` slot of its instance; its class, parameters,
buffers, hooks and state_dict keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from torchdrop.attaching.block_units import join_branches
from torchdrop.attaching.measure_shares import measure_shares
from torchdrop.attaching.other_entries import warn_if_forward_is_not_called
from torchdrop.attaching.plan import Plan
from torchdrop.attaching.prepare import prepare_sites
from torchdrop.attaching.prove_on_example import prove_on_example
from torchdrop.attaching.rates import resolve_rates, set_rates
from torchdrop.attaching.refusals import (
    check_attachable,
    check_batch_dims,
    check_inherited_rates,
    check_settings,
    message_if_nothing_found,
    refuse_doubled,
    refuse_unreadable,
)
from torchdrop.checks import check_model
from torchdrop.error_pages import see
from torchdrop.finding.example_calls import Example
from torchdrop.finding.existing_drops import is_mask
from torchdrop.finding.not_taken import reasons_not_taken
from torchdrop.finding.residual import Residual
from torchdrop.finding.survey import survey
from torchdrop.running.forward_slot import (
    LayerDropBypass,
    MaskBypass,
    MaskRest,
    clear_slot,
    is_wrapped,
    occupant_of,
    put_in_slot,
)
from torchdrop.schedules import DepthRule

__all__ = ["add_stochastic_depth", "has_stochastic_depth", "remove_stochastic_depth"]


def add_stochastic_depth(
    model: nn.Module,
    p: Any = 0.2,
    *,
    schedule: DepthRule = "linear",
    mode: str = "row",
    sampling: str = "exact",
    scale: str = "train",
    select: Callable[[Residual], bool] | None = None,
    compute: str = "auto",
    unit: str = "branch",
    sync_ranks: bool | None = None,
    zero_grad: bool = True,
    example_inputs: Any = None,
    batch_dim: int | None = None,
    rows_per_sample: int | None = None,
    verify: bool = True,
) -> Plan:
    """Drop residual branches of ``model`` in training, and compute only the rows that are kept.

    A block ``out = s(x) + f(x)`` becomes, in training, ``out = s(x) + b / (1 - p) * f(x)`` with
    ``P(b = 0) = p`` and one ``b`` for each row of the batch, or one for the whole batch. ``f`` is
    run only on the rows with b = 1. In evaluation the block's own forward runs, unchanged.

    The model is changed in place, by an object in the ``forward`` slot of each block. Classes,
    parameters, buffers, hooks and state_dict keys stay the same objects, an optimizer that was
    created before remains valid, and :func:`remove_stochastic_depth` restores the model.

    Args:
        model: Any module with residual blocks. Wrap it in DDP or FSDP afterwards.
        p: The drop probability, in [0, 1]; default .2. A float is the rate of the deepest block,
            see ``schedule``. A sequence holds one rate for each block. A mapping maps names of
            blocks or branches to rates; the other blocks get 0. None uses the rates of the
            DropPath / StochasticDepth layers in the model. All branches of a block have the same
            rate, unless a mapping names a branch.
        schedule: The rule by which a single ``p`` is spread over the blocks l = 1..L: the name of a
            rule in :mod:`torchdrop.schedules`, or a function of (p, depth) that returns a rate for
            each block. The default, ``"linear"``, is that of the paper, ``p*l/L``.
        mode: ``"row"``: branches are dropped for each sample separately. ``"batch"``: they are
            dropped for the whole batch, as in the paper.
        sampling: How the kept rows of a batch of B rows are drawn in row mode. ``"exact"``: a
            uniformly random subset of B*(1-p) rows, a number that is rounded at random so that its
            mean is exact. ``"independent"``: one Bernoulli draw for each row, as in timm and
            torchvision. ``"window"``: as ``"exact"``, but a cyclic run of neighbouring rows, for
            batches that are shuffled.
        scale: ``"train"``: kept branches are divided by 1-p in training. ``"eval"``: branches are
            multiplied by 1-p in evaluation, as in the paper.
        select: A function that is called with every :class:`Residual` of the model, and returns
            whether to drop its branches. It is also called with residuals that are not taken by
            default (``r.default`` is False; ``r.why_not`` says why).
        compute: ``"skip"``: only kept rows are computed. ``"mask"``: all rows are computed, and the
            dropped ones are set to zero. ``"auto"``: skip wherever it is possible; the plan gives
            the reason where it is not. In row mode, ``"auto"`` also masks branches without weight
            matrices and without BatchNorm on tensors so small that this is faster. The choice does
            not affect which rows are dropped.
        unit: What a decision is about. ``"branch"``: each branch is dropped by itself.
            ``"block"``: all branches of a block are dropped together; in training, a kept row is
            ``x + (block(x) - x) / (1 - p)`` (with ``scale="train"``), and a dropped row is ``x``.
            Rows are taken once for each block, which costs less where launching operations takes
            the time. Blocks with one branch, and blocks that do not return their input where their
            branches are dropped, are dropped by branch, and the plan says why. If only a norm or
            an activation after the sums is the reason, a mapping ``p`` that names the block has it
            dropped as a whole, with a warning. Branches that the model adds itself, in a loop over
            the blocks, raise a ValueError.
        sync_ranks: Whether all ranks of a process group make the same decisions in batch mode;
            otherwise each step takes as long as on the rank that keeps the most branches. None or
            True: they do, after one broadcast in the first forward pass in training, which every
            rank of the default group has to run. False: each rank decides for itself, as in row
            mode.
        zero_grad: Whether parameters of a branch that no row used get a gradient of zeros, as with
            a mask. DDP and FSDP need it. If False, their gradient stays None.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments. Needed if blocks cannot be traced from their signature alone, and for
            the FLOPs in the table of the plan.
        batch_dim: The dimension of the residual tensors that is the batch. None: dimension 0,
            unless forward passes of ``example_inputs`` in two batch sizes show that it is another
            one in some blocks, or attention or recurrent layers of a block have
            ``batch_first=False``, which means 1.
        rows_per_sample: How many neighbouring rows of the residual tensors belong to one sample:
            frames of a clip, windows of an image. They are dropped together, so the rate is exact
            for each sample, and a branch may mix them. None: every row is a sample.
        verify: Whether each block is tested before any of its rows is dropped: on
            ``example_inputs`` now, and else in its first forward pass in training, again for each
            kind of call (dtypes, autocast, which tensors are given). The generated forward has to
            return the same as the block's own forward, and the output of a branch for a row must
            not depend on other rows. A branch that fails is computed for all rows and masked; a
            block that fails is dropped as a whole; the plan says which and why.

    Returns:
        The plan. Print it to see which branches are dropped, and at which rates.

    Raises:
        ValueError, TypeError: The model has no residual branches, already has stochastic depth, or
            is wrapped; or an argument is out of range. The model is not changed then.

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
        schedule,
        mode,
        sampling,
        scale,
        compute,
        sync_ranks,
        zero_grad,
        batch_dim,
        select,
        rows_per_sample,
        verify,
        unit,
    )
    check_inherited_rates(p, schedule)
    check_attachable(model)
    example = None if example_inputs is None else Example(model, example_inputs, batch_dim)
    found = survey(model, example, batch_dim)
    chosen = [r for r in found.residuals if (select(r) if select else r.default)]
    if not chosen:
        selected, has_example = select is not None, example is not None
        raise ValueError(message_if_nothing_found(model, found, selected, has_example))
    if select is None:
        refuse_unreadable(model, found, example is not None)
    refuse_doubled(model, chosen)
    check_batch_dims(chosen)
    if unit == "block":
        named = p if isinstance(p, Mapping) else ()
        chosen = join_branches(model, chosen, example, named, inherits=p is None)
    settings.not_taken = reasons_not_taken(model, found, chosen)
    sites = prepare_sites(model, chosen, settings, compute, example)
    branches = [branch for site in sites for branch in site.branches]
    rates = resolve_rates(p, branches, settings.blocks, schedule)

    set_rates(sites, rates)
    plan = Plan(model, sites)
    masks = {path for branch in branches for path in branch.facts.masks}
    try:
        # All arguments are checked by now. What can still raise here is an interrupt
        # (KeyboardInterrupt), or the user's own code in the example forward pass.
        for site in sites:
            put_in_slot(site.module, site)
            warn_if_forward_is_not_called(site)
        rest = MaskRest()
        for path in masks:
            mask = model.get_submodule(path)
            put_in_slot(mask, MaskBypass(mask, rest) if is_mask(mask) else LayerDropBypass(mask))
        settings.mask_rest = rest if masks else None
        if example_inputs is not None:
            measure_shares(model, sites, example_inputs)
            if verify:
                prove_on_example(model, sites, example_inputs)
    except BaseException:
        if has_stochastic_depth(model):
            remove_stochastic_depth(model)
        raise
    return plan


def has_stochastic_depth(model: nn.Module) -> bool:
    """Whether :func:`add_stochastic_depth` was called on ``model`` or on a part of it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_model(model)
    return any(occupant_of(module) is not None for module in model.modules())


def remove_stochastic_depth(model: nn.Module) -> nn.Module:
    """Remove stochastic depth, so that ``model`` is exactly as it was before it was added.

    The model's own masking layers are active again.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no stochastic depth, or something else has wrapped the forward of
            one of its blocks since.
    """
    if not has_stochastic_depth(model):
        raise ValueError(
            f"this {type(model).__name__} has no stochastic depth; "
            f"check with torchdrop.has_stochastic_depth(model)" + see("already-attached")
        )
    for name, module in model.named_modules():
        if occupant_of(module) is not None and is_wrapped(module):
            raise ValueError(
                f"the forward of {name!r} was wrapped by {module.__dict__['forward']!r} after "
                f"stochastic depth was added; undo that first, then remove stochastic depth"
                + see("already-attached")
            )
    for module in model.modules():
        if occupant_of(module) is not None:
            clear_slot(module)
    return model
