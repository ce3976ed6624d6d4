"""CHANGE: stochastic depth on a model that exists. The one file that changes a model.

What is attached to a block is an object in the ``forward`` slot of that very instance: class,
parameters, buffers, hooks and state_dict keys stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from torchdrop import cost, schedules
from torchdrop.checks import MODES, check_model
from torchdrop.finding.example_calls import Example, run_once
from torchdrop.finding.existing_drops import inlined_drop, is_mask
from torchdrop.finding.residual import Branch, Residual
from torchdrop.finding.residual_sums import Split, read_splits
from torchdrop.finding.source_code import adds, may_loop_over_branches
from torchdrop.finding.survey import Survey, survey
from torchdrop.keeper import Keeper
from torchdrop.layers.stochastic_depth import StochasticDepth
from torchdrop.plan import Plan, resolve_rates, set_rates
from torchdrop.rewrite import Program, rewrite
from torchdrop.rows.collectives import is_sharded
from torchdrop.rows.sampling import ROW_SAMPLERS
from torchdrop.site import Site
from torchdrop.slot import Bypass, LoopBypass, attach_to, attached, detach
from torchdrop.state import BY_ORDER, WORTH_SKIPPING, BranchState, Settings
from torchdrop.tracing.block_graph import BlockGraph, trace_block
from torchdrop.whole import LayerSite

__all__ = ["add_stochastic_depth", "has_stochastic_depth", "remove_stochastic_depth"]

SCALES = ("train", "eval")
COMPUTES = ("auto", "skip", "mask")


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
    settings = _check_settings(
        schedule, mode, sampling, scale, compute, sync_ranks, zero_grad, batch_dim, select
    )
    _check_model(model)
    example = None if example_inputs is None else Example(model, example_inputs, batch_dim)
    found = survey(model, example, batch_dim)
    chosen = [r for r in found.residuals if (select(r) if select else r.default)]
    if not chosen:
        raise ValueError(_nothing_found(model, found, select is not None, example is not None))
    if select is None:
        _refuse_unreadable(model, found, example is not None)
    _refuse_doubled(model, chosen)
    _check_layout(chosen)
    sites = _prepare(model, chosen, settings, compute)
    branches = [branch for site in sites for branch in site.branches]
    rates = resolve_rates(p, branches, settings.blocks, schedule)

    set_rates(sites, rates)
    plan = Plan(model, sites)
    masks = {path for branch in branches for path in branch.masks}
    try:
        # All has been checked and generated: what can come in between is a user who interrupts.
        for site in sites:
            attach_to(site.module, site)
        for path in masks:
            mask = model.get_submodule(path)
            attach_to(mask, Bypass(mask) if is_mask(mask) else LoopBypass(mask))
        if example_inputs is not None:
            _measure_shares(model, sites, example_inputs)
    except BaseException:
        if has_stochastic_depth(model):
            remove_stochastic_depth(model)
        raise
    return plan


def has_stochastic_depth(model: nn.Module) -> bool:
    """Whether :func:`add_stochastic_depth` was called on ``model`` or on a part of it."""
    check_model(model)
    return any(attached(module) is not None for module in model.modules())


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
        if attached(module) is not None:
            detach(module)
    return model


# ---------------------------------------------------------------------------------------------
# Checks, all before anything changes

# What can be done about a block that cannot be read. Around its branch alone StochasticDepth would
# add a second skip.
_BY_HAND = (
    "wrap the whole block in torchdrop.StochasticDepth, "
    "or put a torchdrop.DropPath behind its branch"
)


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"{name} has to be one of {', '.join(map(repr, allowed))}, but got {value!r}"
        )


def _check_settings(
    schedule: object,
    mode: Any,
    sampling_: Any,
    scale: Any,
    compute: object,
    sync_ranks: object,
    zero_grad: object,
    batch_dim: object,
    select: object,
) -> Settings:
    _one_of("schedule", schedule, tuple(schedules.DEPTH_RULES))
    _one_of("mode", mode, MODES)
    _one_of("sampling", sampling_, tuple(ROW_SAMPLERS))
    _one_of("scale", scale, SCALES)
    _one_of("compute", compute, COMPUTES)
    if sync_ranks is not None and not isinstance(sync_ranks, bool):
        raise TypeError(f"sync_ranks has to be None, True or False, but got {sync_ranks!r}")
    if not isinstance(zero_grad, bool):
        raise TypeError(f"zero_grad has to be True or False, but got {zero_grad!r}")
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int | None):
        raise TypeError(f"batch_dim has to be an integer or None, but got {batch_dim!r}")
    if batch_dim is not None and batch_dim < 0:
        raise ValueError(f"batch_dim has to be 0 or more, but got {batch_dim}")
    if select is not None and not callable(select):
        raise TypeError(f"select has to be a function of a Residual, but got {select!r}")
    return Settings(
        mode=mode,
        sampling=sampling_,
        scale=scale,
        schedule=str(schedule),
        sync_ranks=sync_ranks,
        zero_grad=zero_grad,
    )


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else "the model"
        if attached(module) is not None:
            raise ValueError(
                f"{where} has stochastic depth already; change its rates with "
                f"torchdrop.get_plan(model).set_p(...), or call "
                f"torchdrop.remove_stochastic_depth(model) first"
            )
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{where} is TorchScript already; add stochastic depth to the Python model first"
            )
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
            raise ValueError(
                f"{where} is wrapped in {kind}; add stochastic depth to the model first "
                f"and wrap it afterwards"
            )
        if is_sharded(module):
            raise ValueError(
                f"{where} went through fully_shard already; add stochastic depth first "
                f"and shard afterwards"
            )
        if kind == "OptimizedModule":
            raise ValueError(
                f"{where} went through torch.compile already; add stochastic depth to the model "
                f"itself and compile afterwards"
            )


def _nothing_found(model: nn.Module, found: Survey, selected: bool, example: bool) -> str:
    name = type(model).__name__
    if selected:
        return (
            f"select took none of the {len(found.residuals)} residuals of this {name}; "
            f"torchdrop.find_residuals(model) lists those that are taken by default"
        )
    unread = found.unreadable and not example
    hint = "; give example_inputs, so that it is read as it is called" if unread else ""
    text = (
        f"no residual branches found in this {name}{hint}. Looked for additions skip + "
        f"branch, whose branch has parameters and an activation, and whose skip is the identity "
        f"or a linear projection, in blocks that repeat. Saw {_count(found.seen, 'forward')} "
        f"with {_count(found.additions, 'addition')}"
    )
    if found.residuals:
        listed = [f"{r.name!r} ({r.why_not})" for r in found.residuals[:3]]
        text += f"; left out {', '.join(listed)}: take them with select=lambda r: True"
    if found.unreadable:
        path, reason = next(iter(found.unreadable.items()))
        text += f"; {len(found.unreadable)} could not be read, the first {path or name!r}, {reason}"
        text += f": {_BY_HAND}" if example else ""
    if not found.residuals and not found.unreadable:
        text += (
            ". Such a network has nothing that can be dropped whole; wrap a part of it in "
            "torchdrop.StochasticDepth(module, p, projection=...), or use dropout"
        )
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _refuse_unreadable(model: nn.Module, found: Survey, example: bool) -> None:
    """Raise where a block that may hold a residual could not be read."""
    taken = [r for r in found.residuals if r.default]
    children = [child for r in taken for b in r.branches for child in b.children]
    for path, reason in found.unreadable.items():
        prefix = f"{path}." if path else ""
        above = any(r.name.startswith(prefix) for r in taken)
        inside = any(path == c or path.startswith(f"{c}.") for c in children)
        module = model.get_submodule(path)
        alike = sum(type(m) is type(module) for m in model.modules())
        apart = not above and not inside
        if apart and adds(module) and (alike > 1 or may_loop_over_branches(module)):
            way_out = "Leave it out" if example else "Give example_inputs; or leave it out"
            raise ValueError(
                f"the forward of {path!r} ({type(module).__name__}) contains an addition but "
                f"cannot be read: {reason}. {way_out} with select=lambda r: r.default; or "
                f"{_BY_HAND}"
            )


def _refuse_doubled(model: nn.Module, chosen: Sequence[Residual]) -> None:
    """Raise where a branch is inside a :class:`StochasticDepth`, or has one inside."""
    branches = [branch for residual in chosen for branch in residual.branches]
    for path, module in model.named_modules():
        if not isinstance(module, StochasticDepth) or module.p == 0.0:
            continue
        for branch in branches:
            within = not path or f"{branch._owner}.".startswith(f"{path}.")
            if within or any(f"{path}.".startswith(f"{child}.") for child in branch.children):
                raise ValueError(
                    f"{path or 'the model'!r} is a torchdrop.StochasticDepth with p={module.p}, "
                    f"which would add to the rate of {branch.name}; set its p to 0, or leave the "
                    f"block out with select="
                )


def _check_layout(chosen: Sequence[Residual]) -> None:
    """Raise where it is not sure on which dimension a block carries the batch."""
    says: dict[str, int] = {}
    silent = []
    for residual in chosen:
        for branch in residual.branches:
            if branch._split is None:
                continue
            for path, dim in branch._split.told.items():
                says.setdefault(f"{branch._owner}.{path}".lstrip("."), dim)
            if branch._split.dim is None and not branch._split.told:
                silent.append(branch.name)
    first = {dim: path for path, dim in reversed(says.items())}
    if len(first) == 2:
        raise ValueError(
            f"{first[0]!r} has batch_first=True and {first[1]!r} has batch_first=False: all blocks "
            f"have to carry the batch on one dimension; give that as batch_dim=, or give "
            f"example_inputs, with which two batch sizes tell it for each block"
        )
    if 1 in first and silent:
        raise ValueError(
            f"{first[1]!r} has batch_first=False, so its block carries the batch on dimension 1; "
            f"of {silent[0]!r} nothing tells the dimension: give batch_dim=, or example_inputs, "
            f"with which two batch sizes tell it"
        )


# ---------------------------------------------------------------------------------------------
# Sites, made but not yet attached


def _prepare(
    model: nn.Module, chosen: Sequence[Residual], settings: Settings, compute: str
) -> list[Keeper]:
    """A site for each forward that holds chosen residuals; ``model`` is not touched."""
    order = {name: i for i, name in enumerate(dict.fromkeys(r.name for r in chosen))}
    settings.blocks = len(order)
    by_owner: dict[str, list[tuple[Residual, Branch]]] = {}
    for residual in chosen:
        for branch in residual.branches:
            by_owner.setdefault(branch._owner, []).append((residual, branch))
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
        state.place = places[state.name]
    return sorted(sites, key=lambda site: (site.branches[0].index, site.branches[0].place))


def _prepare_site(
    model: nn.Module,
    owner: str,
    members: Sequence[tuple[Residual, Branch]],
    settings: Settings,
    compute: str,
    order: dict[str, int],
) -> Keeper:
    module = model.get_submodule(owner)
    if "forward" in module.__dict__:
        raise ValueError(
            f"the forward of {owner!r} was replaced on the instance already (by "
            f"{module.__dict__['forward']!r}); add stochastic depth before that"
        )
    block = members[0][1]._traced
    if block is None:
        return _prepare_layer(model, *members[0], settings, compute, order)
    entries: list[tuple[Residual, Branch, Split]] = []
    for residual, branch in members:
        assert branch._split is not None
        entries.append((residual, branch, branch._split))
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
            action, reason = "mask", BY_ORDER
        elif compute == "skip" and action == "mask":
            raise ValueError(
                f"compute='skip', but {branch.name} cannot be skipped: {reason}; "
                f"use compute='auto', or leave it out with select="
            )
        splits.append((split, action))
        state = _state(model, residual, branch, split, action, reason, order, settings, compute)
        states.append(state)
    return Site(
        block.module,
        settings,
        states,
        rewrite(block, splits, owner or type(model).__name__),
        _rewrite_for_evaluation(block, splits) if settings.scale == "eval" else None,
        [split.place for split, _ in splits],
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
) -> LayerSite:
    """The site of a block that is dropped as a whole."""
    assert branch._layer is not None
    action, reason = ("mask", BY_ORDER) if compute == "mask" else (branch.action, branch.reason)
    state = _state(model, residual, branch, None, action, reason, order, settings, compute)
    return LayerSite(residual.module, settings, state, branch._layer)


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
    twins = [entry.split for entry in read_splits(in_eval)]
    if len(twins) <= max(split.place for split, _ in splits):
        raise ValueError(
            f"scale='eval' scales branches in evaluation, but {label} does not add the same "
            f"branches as in training; use scale='train'"
        )
    return rewrite(in_eval, [(twins[s.place], action) for s, action in splits], label)


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
    weights += [attrgetter(path)(model.get_submodule(branch._owner)) for path in own]
    elementwise = (
        (compute, settings.mode, action) == ("auto", "row", "skip")
        and split is not None
        and not norms
        and not any(
            _is_matrix(t) for t in (*weights, *(b for top in called for b in top.buffers()))
        )
    )
    if elementwise:
        small = f"no matrices: masked where p times its elements is below {WORTH_SKIPPING}"
        reason = f"{reason}; {small}" if reason else small
    return BranchState(
        name=branch.name,
        block=residual.name,
        path=""
        if residual.module is model.get_submodule(branch._owner)
        else _relative(residual.name, branch._owner),
        index=order[residual.name],
        skip=branch.skip,
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
        inner=tuple(_relative(child, branch._owner) or "" for child in branch.children),
        dim=(split.dim or 0) if split is not None else branch._layer.dim if branch._layer else 0,
        cuts=None if split is None else split.cuts,
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


@contextmanager
def _metering(sites: Sequence[Keeper], meter: Callable[[], int]) -> Iterator[None]:
    settings = sites[0].settings
    active = [site.active for site in sites]
    settings.meter = meter
    try:
        for site in sites:
            site.active = True
        yield
    finally:
        settings.meter = None
        for site, was in zip(sites, active, strict=True):
            site.active = was


def _measure_shares(model: nn.Module, sites: Sequence[Keeper], example_inputs: Any) -> None:
    """Set ``share`` of every branch: its part of the FLOPs of one forward pass, nothing dropped."""
    for site in sites:
        for branch in site.branches:
            branch.share = None
    sites[0].settings.measured = True
    with cost.FlopCounter() as counter, _metering(sites, lambda: counter.total):
        run_once(model, example_inputs)
    for site in sites:
        for branch in site.branches:
            if branch.share is not None and counter.total:
                branch.share /= counter.total
