"""Trace a block again if it is called in a way for which its site has no program yet.

A program is valid for fixed values of some things only: attributes of the block, arguments that are
not tensors, decisions that the forward makes on shapes.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchdrop.error_pages import see
from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.finding.split import ResidualSum, Split
from torchdrop.running.branch_state import BranchState
from torchdrop.running.match_sums import is_used, match_sums
from torchdrop.running.program import MismatchError, Program, call_signature, most_varied
from torchdrop.running.rewrite import rewrite
from torchdrop.tracing.block_graph import BlockGraph, trace_block
from torchdrop.tracing.untraceable import UntraceableError

if TYPE_CHECKING:
    from torchdrop.running.split_site import SplitSite

__all__ = ["read_again"]

# The most programs that a site keeps: one for each combination of attributes and constant arguments
# with which its block is called.
_MOST_PROGRAMS = 16

# The most kinds of calls (shapes, dtypes) that are stored for a block that computes with shapes.
_KINDS_OF_CALLS = 1024


def read_again(
    site: SplitSite,
    programs: list[Program],
    training: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mismatch: MismatchError,
    use_items: bool = True,
) -> Program:
    """Trace the block with the arguments of this call, and return a program that fits the call.

    Args:
        site: The site of the block.
        programs: Its programs for training or for evaluation; the new one is added.
        training: Whether these are the programs for training.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
        mismatch: Why the known programs do not fit.
        use_items: Whether children are assumed to return tuples with the same items as before.
    """
    name = site.branches[0].facts.block
    if any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values())):
        raise RuntimeError(
            f"torch.fx cannot trace {name} while stochastic depth acts on it; trace it in "
            f"evaluation (with scale='train'), or before torchdrop.add_stochastic_depth"
            + see("compile-and-export")
        )
    difference = f"{name} was read with {mismatch.known}, but is called with {mismatch.given}"
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{difference}; call the model once like this before compiling it"
            + see("compile-and-export")
        )
    block = _trace(site, training, args, kwargs, use_items, difference)
    splits = _splits_of(site, block, mismatch.given, difference)
    program = _add_program(site, programs, block, splits)
    if program.seen is not None:
        if len(program.seen) >= _KINDS_OF_CALLS:
            program.seen.clear()
        program.seen.add(call_signature(program.bind(site.__signature__, args, kwargs)))
    return program


def _trace(
    site: SplitSite,
    training: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    use_items: bool,
    difference: str,
) -> BlockGraph:
    """Trace the block's own forward with the arguments of this call."""
    bound = site.__signature__.bind(*args, **kwargs)
    bound.apply_defaults()
    module = site.module
    items = {module.get_submodule(path): found for path, found in site.items.items()}
    try:
        return trace_block(
            module,
            training=training,
            arguments=bound.arguments,
            batch_dim=site.branches[0].facts.dim,
            inlined={module.get_submodule(path) for path in site.inlined},
            items=items if use_items else None,
        )
    except UntraceableError as error:
        raise RuntimeError(
            f"{difference}, and in this call cannot be read: {error}" + see("cannot-be-read")
        ) from None


def _splits_of(
    site: SplitSite, block: BlockGraph, given: str, difference: str
) -> list[tuple[Split, str] | None]:
    """Return the split and the action of each branch in ``block``, a new graph of the block.

    The entry is None for a branch that the block does not compute in this kind of call.
    """
    facts = [branch.facts for branch in site.branches]
    known = [branch.row_layouts for branch in facts if branch.row_layouts is not None]
    entries = read_residual_sums(block, known, facts[0].dim, assume=True)
    splits: list[tuple[Split, str] | None] = []
    for branch, entry in zip(
        site.branches, match_sums(entries, site.branches, site.orders), strict=True
    ):
        if entry is not None:
            action, why = _action_of(site, branch, entry)
            splits.append((entry.split, action))
            if action == "mask" and branch.action != "mask":
                branch.note(f"in calls with {given}: masked, {why}")
        elif is_used(block, branch):
            raise RuntimeError(
                f"{difference}, and in this call does not add the same branches: "
                f"{', '.join(sorted((*branch.facts.inner, *branch.facts.own)))} of "
                f"{branch.facts.name} is used in another way; leave the block out with select="
                + see("cannot-be-read")
            )
        else:
            splits.append(None)
            branch.note(f"in calls with {given}: not computed, so nothing is dropped")
    return splits


def _action_of(site: SplitSite, branch: BranchState, entry: ResidualSum) -> tuple[str, str]:
    """Return whether a branch is skipped or masked in a new kind of call, and why."""
    if site.settings.masks_all or branch.masked_when_attached:
        return "mask", branch.reason
    if entry.split.assumed and not site.settings.verify:
        return "mask", "how its tensors carry the batch was not measured; use verify=True"
    return entry.action, entry.reason


def _add_program(
    site: SplitSite,
    programs: list[Program],
    block: BlockGraph,
    splits: list[tuple[Split, str] | None],
) -> Program:
    """Generate a program and add it to ``programs``; return an equal one if there is one already.

    If there are too many programs, the new one replaces the least recently used one.
    """
    name, size = site.branches[0].facts.block, len(site.branches)
    for number, program in enumerate(programs):
        again = rewrite(block, splits, name, number * size)
        if program.is_like(again):
            program.modes |= again.modes
            return program  # it now fits one more kind of calls
    number = len(programs)
    if number >= _MOST_PROGRAMS:
        # the first program, which belongs to the example, stays
        number = min(range(1, number), key=lambda i: programs[i].last_used)
        for k in range(number * size, (number + 1) * size):
            site.branches[k % size].sizes.pop(k, None)
        # negative in evaluation, as in SplitSite._run_program
        site.forget_proofs(number if programs is site.train else -1 - number)
    program = rewrite(block, splits, name, number * size)
    programs[number : number + 1] = [program]
    if number < len(programs) - 1:
        _warn_of_readings(site, programs)
    return program


def _warn_of_readings(site: SplitSite, programs: list[Program]) -> None:
    """Warn, once for each model, that a value keeps changing, so that blocks are traced often."""
    if site.settings.warned_of_readings:
        return
    site.settings.warned_of_readings = True
    warnings.warn(
        f"{site.branches[0].facts.block} was called in more than {_MOST_PROGRAMS} different ways; "
        f"{most_varied(programs)} keeps changing, and for each new value the block is read again, "
        f"which takes time. Pass it as a tensor, or leave the block out with select=",
        stacklevel=2,
    )
