"""The residual sums of usual calls.

:func:`usual_sum` looks up once what does not change between the calls, and returns a function that
does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchdrop.finding.row_layout import RowLayout
from torchdrop.internals import modifications_of, saved_by_producer
from torchdrop.rows.sampling import refuse_graph_capture
from torchdrop.rows.take_and_add import (
    HALF,
    MIN_ELEMENTS_FOR_OWN_FUNCTION,
    add_rows,
    add_whole,
    take,
)
from torchdrop.running.block_site import precision_of, to_device_of
from torchdrop.running.decision import usual_decision
from torchdrop.running.program import Program
from torchdrop.running.residual_sum import sum_on_rows, sum_without_branch, writes_into_its_input

if TYPE_CHECKING:
    from torchdrop.running.split_site import SplitSite

__all__ = ["usual_sum"]


def usual_sum(
    site: SplitSite, program: Program, k: int, *, autocast: bool, alone: bool
) -> Callable[..., Tensor]:
    """Return ``site.join`` for branch ``k``, as a function of the skip and the inputs.

    It may be called where no mode, transform, test or observer is active. What is rare is left to
    ``site.join``.

    Args:
        site: The site of the block.
        program: The program that runs.
        k: The number of the branch.
        autocast: Whether autocast is enabled.
        alone: Whether there are no other ranks.
    """
    branch = site.branch(k)
    facts = branch.facts
    checked = partial(site.join, k)
    if facts.elementwise:  # the size of each call decides whether it is masked
        return checked
    module, rate, dtypes = site.module, branch.rate, branch.dtypes
    dim, written, first = facts.dim, facts.writes_skip, facts.branch_first
    run = program.branches[k].function
    decide = usual_decision(site.settings, branch, alone=alone)
    layouts = program.row_layouts[k]
    rare = written or facts.has_batch_norm  # a single row may need a second one

    def join(skip: Tensor, *inputs: Any) -> Tensor:
        if (
            branch.action != "skip"
            or not dtypes  # the first sum is checked
            or skip.dim() <= dim
            or site.is_watched()  # since the call began
        ):
            return checked(skip, *inputs)
        if skip.is_cuda:
            refuse_graph_capture(skip)
        rows, kept = decide(skip.shape[dim])
        if rows is False:
            return sum_without_branch(site, k, skip, inputs)
        gain = rate.gain  # before the branch runs: code in it may set another rate
        if rows is True:
            out = run(module, site, *inputs)
            total = add_whole(skip, out, gain, inplace=written, branch_first=first)
        else:
            rows = rows[:kept]
            given = None
            if (
                not (rare or branch.normalises)
                and skip.numel() < MIN_ELEMENTS_FOR_OWN_FUNCTION
                and skip.is_contiguous()
                and not saved_by_producer(skip)
            ):
                on_device = rows if skip.is_cpu else to_device_of(rows, skip)
                some = skip.index_select(dim, on_device)
                if len(inputs) > 1:
                    given = _rows_of(inputs, layouts, skip, some, on_device, dim)
                elif inputs[0] is skip:
                    given = [some]
            if given is None:
                total = sum_on_rows(site, k, skip, inputs, rows, gain)
            else:
                version = None if some.is_inference() else modifications_of(some)
                out = run(module, site, *given)
                if version is not None and modifications_of(some) != version:
                    raise writes_into_its_input(facts)
                dtype = out.dtype
                if dtype is skip.dtype and dtype not in HALF and out.shape == some.shape:
                    total = skip.index_add(dim, on_device, out, alpha=gain)
                else:
                    total = add_rows(skip, out, on_device, gain, dim)
        dtypes[precision_of(skip) if autocast else (skip.dtype, None)] = total.dtype
        return total

    return join


def _rows_of(
    inputs: tuple[Any, ...],
    layouts: list[RowLayout | None] | None,
    skip: Tensor,
    some: Tensor,
    rows: Tensor,
    dim: int,
) -> list[Any] | None:
    """Return the selected rows of the inputs of a branch; None if that is left to ``site.cut``.

    Args:
        inputs: The inputs.
        layouts: How each carries the rows; None if that was not measured.
        skip: The skip, which may be one of the inputs.
        some: The selected rows of the skip.
        rows: The indices of the rows.
        dim: The dimension of the rows in the skip.
    """
    if layouts is None:
        return None
    batch = skip.shape[dim]
    given: list[Any] = []
    for value, layout in zip(inputs, layouts, strict=True):
        if layout is None:
            given.append(value)
        elif value is skip and layout == (dim, 1):
            given.append(some)
        elif type(value) is not Tensor or layout.entries > 1 or value.dim() <= layout.dim:
            return None
        elif value.shape[layout.dim] == 1:
            given.append(value)
        elif value.shape[layout.dim] == batch and not saved_by_producer(value):
            given.append(take(value, rows, layout.dim))
        elif layout.entries:
            return None
        else:
            given.append(value)
    return given
