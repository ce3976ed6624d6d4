"""Compute one residual sum of a block: on the kept rows, on all rows, or without its branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchdrop.error_pages import see
from torchdrop.finding.row_layout import RowLayout
from torchdrop.internals import saved_by_producer
from torchdrop.rows.saved_rows import regather_in_backward
from torchdrop.rows.take_and_add import add_rows, add_whole, skip_and_rows, take
from torchdrop.running.block_site import drop_spare_row, modifications, to_device_of
from torchdrop.running.branch_state import MIN_ELEMENTS_TO_SKIP, BranchFacts, BranchState

if TYPE_CHECKING:
    from torchdrop.running.split_site import SplitSite

__all__ = [
    "check_separable",
    "check_shapes",
    "choose_mask",
    "sum_in_evaluation",
    "sum_on_all_rows",
    "sum_on_rows",
    "sum_without_branch",
    "writes_into_its_input",
]


def sum_on_all_rows(
    site: SplitSite, k: int, skip: Tensor, inputs: Sequence[Any], gain: float
) -> Tensor:
    """Return ``skip`` plus ``gain`` times branch ``k`` on all rows."""
    branch = site.branch(k)
    facts, first_time = branch.facts, not branch.dtypes
    version = modifications(skip) if first_time else None
    out = site.compute(site.train, k, inputs)
    if first_time:
        check_separable(facts, skip, version, out)
    first, written = facts.branch_first, facts.writes_skip
    return add_whole(skip, out, gain, inplace=written, branch_first=first)


def sum_on_rows(
    site: SplitSite,
    k: int,
    skip: Tensor,
    inputs: Sequence[Any],
    rows: Tensor,
    gain: float,
) -> Tensor:
    """Return ``skip`` plus ``gain`` times branch ``k`` on ``rows``, some of the batch.

    Args:
        site: The site of the block.
        k: The number of the branch.
        skip: The other term of the sum.
        inputs: The inputs of the branch.
        rows: The kept rows, on the host.
        gain: The factor of the branch.
    """
    facts = site.branch(k).facts
    dim = facts.dim
    computed = site.rows_to_compute(site.branch(k), rows, skip)
    on_device = to_device_of(computed, skip)
    program = site.train[k // len(site.branches)]
    run = partial(program.branches[k].function, site.module, site)
    known = program.row_layouts[k]
    batch = skip.shape[dim]
    taking = partial(take, rows=on_device)
    skip_for_sum, rows_of_skip = skip, None
    given: list[Any] = []
    regathered: list[tuple[Tensor, Tensor]] = []
    for value, layout in zip(inputs, known or [RowLayout(dim, 1)] * len(inputs), strict=True):
        if value is skip and layout == (dim, 1) and not facts.writes_skip:
            # one operation gives both, so that their gradients are added directly
            skip_for_sum, some = skip_and_rows(skip, on_device, dim)
        else:
            some = site.cut(facts, value, taking, layout, batch, known is not None)
        given.append(some)
        if value is skip:
            rows_of_skip = some
        if layout == (dim, 1) and some is not value and saved_by_producer(value):
            regathered.append((some, value))
    version = modifications(rows_of_skip)
    if regathered:
        with regather_in_backward(regathered, on_device, dim):
            out = run(*given)
    else:
        out = run(*given)
    if modifications(rows_of_skip) != version:
        raise writes_into_its_input(facts)
    if computed is not rows:
        out, on_device = drop_spare_row(out, computed, rows, dim)
    reuses_skip = k in program.reuses_skip and rows_of_skip is not skip
    written = facts.writes_skip
    return add_rows(
        skip_for_sum, out, on_device, gain, dim, inplace=written, reuses_skip=reuses_skip
    )


def sum_without_branch(site: SplitSite, k: int, skip: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """Return the sum without branch ``k``, which is the skip, in the dtype of the sum."""
    branch = site.branch(k)
    dtype = site.dtype_of(branch, skip, inputs, partial(site.compute, site.train, k, inputs))
    return site.dropped(branch.facts, skip, inputs, dtype)


def choose_mask(branch: BranchState, skip: Tensor) -> bool:
    """Decide whether a branch without weight matrices is faster on all rows than on the kept.

    Set its action in the plan to match.
    """
    p = branch.rate.p
    small = p < 1.0 and 0.0 < p * skip.numel() < MIN_ELEMENTS_TO_SKIP
    branch.action = "mask" if small else "skip"
    return small


def sum_in_evaluation(branch: BranchState, skip: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """Return the sum in evaluation with scale="eval": the branch times ``1 - p``."""
    facts, p = branch.facts, branch.rate.p
    if p == 1.0:
        return skip if facts.writes_skip else skip.clone()
    return add_whole(skip, run(), facts.gain * (1.0 - p), inplace=facts.writes_skip)


def check_separable(facts: BranchFacts, skip: Tensor, version: int | None, out: Tensor) -> None:
    """Raise if a branch, which was run on all rows, could not be dropped without other effects.

    Args:
        facts: The branch.
        skip: The other term of the sum.
        version: The version of ``skip`` before the branch was run.
        out: The output of the branch.
    """
    if modifications(skip) != version:
        raise writes_into_its_input(facts)
    check_shapes(facts, skip, out)


def check_shapes(facts: BranchFacts, skip: Tensor, out: Tensor) -> None:
    """Raise if the sum does not have the shape of the skip, which is the sum if all is dropped."""
    try:
        out.expand(skip.shape)
    except RuntimeError:
        raise ValueError(
            f"the branch {facts.name} of shape {tuple(out.shape)} broadcasts its skip, of shape "
            f"{tuple(skip.shape)}, to a larger shape, so that the output of the block would have "
            f"another shape when the branch is dropped; leave the block out with select=, or "
            f"expand the skip before the sum" + see("cannot-be-skipped")
        ) from None


def writes_into_its_input(facts: BranchFacts) -> Exception:
    """Return the error for a branch that writes into its input."""
    return RuntimeError(
        f"the branch {facts.name} writes into its input, which the shortcut also uses; "
        f"use compute='mask', or leave the block out with select=" + see("cannot-be-skipped")
    )
