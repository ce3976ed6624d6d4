"""Decide which rows of a batch keep a branch, and count the decision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torchdrop.internals import graph_task
from torchdrop.rows.sampling import keep_batch, keep_batch_in_usual_call, usual_sampler
from torchdrop.running.branch_state import BranchState, Settings

__all__ = ["decide", "usual_decision"]


def decide(settings: Settings, branch: BranchState, batch: int) -> tuple[Any, int]:
    """Draw the kept rows of a batch, and count them.

    Args:
        settings: The settings of the model.
        branch: The branch.
        batch: The number of rows.

    Returns:
        True if every row is kept, False if none is, else all rows, on the host, the kept ones
        first; and the number of kept rows.
    """
    p = branch.rate.p
    rows: Any
    if p == 0.0:
        rows, kept = True, batch
    elif settings.mode == "batch":
        rows = keep_batch(p, settings.sync_ranks)
        kept = batch if rows else 0
    else:
        rows, kept = branch.rate.order_rows(batch)
        rows = rows if 0 < kept < batch else kept > 0
    branch.counts.add(batch, rows, kept)
    return rows, kept


def usual_decision(
    settings: Settings, branch: BranchState, *, alone: bool
) -> Callable[[int], tuple[Any, int]]:
    """Return a function that draws the rows that :func:`decide` draws, with fewer checks.

    It takes the number of rows of the batch. It may be called where no mode and no transform is
    active.

    Args:
        settings: The settings of the model.
        branch: The branch.
        alone: Whether there are no other ranks.
    """
    if not alone:
        return partial(decide, settings, branch)
    rate, counts = branch.rate, branch.counts
    whole_batches = settings.mode == "batch"
    sample = usual_sampler(branch.facts.sampling)
    draw = sample
    if branch.facts.rows_per_sample > 1:
        draw = lambda batch, p: rate.order_rows(batch, sample)  # noqa: E731

    def decide_on(batch: int) -> tuple[Any, int]:
        p = rate.p
        rows: Any
        if p == 0.0:
            rows, kept = True, batch
        elif whole_batches:
            rows = keep_batch_in_usual_call(p)
            kept = batch if rows else 0
        else:
            rows, kept = draw(batch, p)
            rows = rows if 0 < kept < batch else kept > 0
        if graph_task() == -1:  # as BranchCounts.add does, without a call
            counts.rows_seen += batch
            counts.rows_dropped += batch - kept
            counts.last = (rows, kept)
        return rows, kept

    return decide_on
