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
            given, on_device = None, rows
            if (
                not (rare or branch.normalises)
                and skip.numel() < MIN_ELEMENTS_FOR_OWN_FUNCTION
                and skip.is_contiguous()
                and not saved_by_producer(skip)
            ):
                if not skip.is_cpu:
                    on_device = to_device_of(rows, skip)
                if len(inputs) > 1:
                    given = _rows_of(inputs, layouts, skip, on_device, dim)
                elif inputs and inputs[0] is skip:
                    given = [skip.index_select(dim, on_device)]
            if given is None:
                total = sum_on_rows(site, k, skip, inputs, rows, gain)
            else:
                some = given[0]  # the rows of the skip
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
    rows: Tensor,
    dim: int,
) -> list[Any] | None:
    """Return the selected rows of the inputs of a branch; None if that is left to ``site.cut``.

    A call with all checks runs the same operations in the same order: activation checkpointing may
    compare the tensors that both save.

    Args:
        inputs: The inputs. The first one has to be the skip.
        layouts: How each carries the rows; None if that was not measured.
        skip: The skip.
        rows: The indices of the rows.
        dim: The dimension of the rows in the skip.
    """
    if layouts is None or inputs[0] is not skip or layouts[0] != (dim, 1):
        return None
    batch = skip.shape[dim]
    cut: list[int | None] = [dim]
    for value, layout in zip(inputs[1:], layouts[1:], strict=True):
        if layout is None:
            cut.append(None)
            continue
        if value is skip or type(value) is not Tensor or layout.entries > 1:
            return None
        size = value.shape[layout.dim] if value.dim() > layout.dim else None
        if size == batch != 1:
            if saved_by_producer(value):
                return None
            cut.append(layout.dim)
        elif size == 1 or not layout.entries:
            cut.append(None)
        else:
            return None
    return [
        value if d is None else take(value, rows, d) for value, d in zip(inputs, cut, strict=True)
    ]
