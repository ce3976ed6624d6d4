"""Trace a block again if it is called in a way for which its site has no program yet.

A program holds constant what a trace cannot vary: attributes of the block, arguments that are not
tensors, decisions made on shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.finding.split import Split
from torchdrop.running.branch_state import MASK_REQUESTED
from torchdrop.running.program import MismatchError, Program, call_signature
from torchdrop.running.rewrite import rewrite
from torchdrop.tracing.block_graph import BlockGraph, trace_block
from torchdrop.tracing.untraceable import UntraceableError

if TYPE_CHECKING:
    from torchdrop.running.split_site import SplitSite

__all__ = ["read_again"]

# For how many different settings of its block (attributes, constant arguments) a site generates a
# forward.
_READINGS = 16

# How many kinds of calls (shapes, dtypes) are remembered of a block that computes with shapes.
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
    """Trace the block as it is called now, and return a program for this call."""
    name = site.branches[0].facts.block
    if any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values())):
        raise RuntimeError(
            f"torch.fx cannot trace {name} while stochastic depth acts on it; trace it in "
            f"evaluation (with scale='train'), or before torchdrop.add_stochastic_depth"
        )
    difference = f"{name} was read with {mismatch.known}, but is called with {mismatch.given}"
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{difference}; call the model once like this before compiling it")
    block = _trace(site, training, args, kwargs, use_items, difference)
    program = _add_program(site, programs, block, _splits_of(site, block, difference), difference)
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
            outputs=items if use_items else None,
        )
    except UntraceableError as error:
        raise RuntimeError(f"{difference}, and in this call cannot be read: {error}") from None


def _splits_of(site: SplitSite, block: BlockGraph, difference: str) -> list[tuple[Split, str]]:
    """Return where the branches are added in ``block``, each with its action."""
    facts = [branch.facts for branch in site.branches]
    known = [branch.row_layouts for branch in facts if branch.row_layouts is not None]
    entries = read_residual_sums(block, known, facts[0].dim)
    if len(entries) <= max(site.orders):
        raise RuntimeError(
            f"{difference}, and in this call does not add the same branches; give "
            f"add_stochastic_depth example_inputs, so that the block is read as it is called, "
            f"or leave it out with select="
        )
    return [
        (
            entries[order].split,
            "mask" if branch.reason == MASK_REQUESTED else entries[order].action,
        )
        for order, branch in zip(site.orders, site.branches, strict=True)
    ]


def _add_program(
    site: SplitSite,
    programs: list[Program],
    block: BlockGraph,
    splits: list[tuple[Split, str]],
    difference: str,
) -> Program:
    """Generate a program; return the one in ``programs`` that is equal to it, or add it."""
    name, size = site.branches[0].facts.block, len(site.branches)
    for number, program in enumerate(programs):
        if program.is_like(rewrite(block, splits, name, number * size)):
            return program  # it fits calls of one more kind
    if len(programs) >= _READINGS:
        raise RuntimeError(
            f"{difference}, and it was called in {_READINGS} different ways before; leave the "
            f"block out with select=, or pass the argument that changes as a tensor"
        )
    programs.append(rewrite(block, splits, name, len(programs) * size))
    return programs[-1]
