"""Test whether the output of a branch for a row depends on the other rows of the batch.

The branch is run on as many rows as in the call, of which some are replaced by copies of others,
and then on fewer rows. The output for a row must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchdrop.internals import is_python_autograd_node, replace_checkpoints
from torchdrop.tracing.random_states import RandomStates

__all__ = ["TrialCall", "difference", "find_dependence"]

# The largest difference, relative to the largest value, that counts as rounding, by dtype and for
# all other dtypes. A row that stays in its place is computed by the same kernels; one that moved,
# or that was computed in a smaller batch, may be computed by others, which round differently.
_STAYED = {torch.float64: 1e-12}
_STAYED_ELSE = 2e-6
_MOVED = {torch.float64: 1e-9, torch.float32: 1e-3}
_MOVED_ELSE = 5e-2

# How many nodes of an autograd graph are searched for a function that is written in Python.
_NODES = 20_000


@dataclass(frozen=True)
class TrialCall:
    """A branch, or a block, as it is called in one training step.

    Attributes:
        run: ``run(values)`` returns the output for the inputs ``values``.
        cut: ``cut(value, number, rows)`` returns the rows of input ``number``, or the input itself
            if it carries no rows.
        values: The inputs.
        out: The output for these inputs.
        dim: The dimension of ``out`` that carries the rows.
        batch: The number of rows.
        group: How many neighbouring rows belong to one sample.
        randoms: The states of the generators before and after ``out`` was computed.
    """

    run: Callable[[list[Any]], Tensor]
    cut: Callable[[Any, int, Tensor], Any]
    values: list[Any]
    out: Tensor
    dim: int
    batch: int
    group: int
    randoms: tuple[RandomStates, RandomStates]

    def inputs_for(self, rows: Tensor, device: torch.device) -> list[Any]:
        """Return the inputs for ``rows``."""
        on_device = rows.to(device)
        return [self.cut(value, i, on_device) for i, value in enumerate(self.values)]


def find_dependence(trial: TrialCall) -> str:
    """Say how the output for a row of ``trial`` depends on other rows; empty if it does not.

    The batch has to hold at least two samples.
    """
    before, after = trial.randoms
    out, dim = trial.out.detach(), trial.dim
    if out.dim() <= dim or out.shape[dim] != trial.batch:
        return f"its output has the shape {tuple(out.shape)}, without the rows of its skip"
    random = before.differ_from(after)
    try:
        for rows, stays in _replacements(trial):
            before.restore()
            other = trial.run(trial.inputs_for(rows, out.device)).detach()
            # a row that moved gets other random numbers, so only rows that stay are compared then
            found = _compare(out, other, None if random else rows, stays, dim)
            if found:
                return found
        for rows in _smaller_batches(trial):
            before.restore()
            other = trial.run(trial.inputs_for(rows, out.device)).detach()
            wanted = out.index_select(dim, rows.to(out.device))
            if other.shape != wanted.shape:
                return f"for {len(rows)} of {trial.batch} rows its shape is {tuple(other.shape)}"
            # a smaller batch draws fewer random numbers, so each row gets different ones
            others = random and RandomStates([out.device]).differ_from(after)
            off = 0.0 if others else difference(wanted, other)
            if off > _MOVED.get(out.dtype, _MOVED_ELSE):
                return f"for {len(rows)} of {trial.batch} rows it differs by {off:.2g}"
        return _find_dependence_in_backward(trial, before)
    except Exception as error:  # a branch may raise anything with rows that it was not made for
        first = str(error).splitlines()[0] if str(error) else ""
        return f"with other rows it raises {type(error).__name__}: {first}"
    finally:
        after.restore()


def _rows(samples: Sequence[int], group: int) -> Tensor:
    """Return the rows of ``samples``, each of which owns ``group`` neighbouring rows."""
    first = torch.tensor(samples, device="cpu")[:, None] * group
    return (first + torch.arange(group, device="cpu")).flatten()


def _replacements(trial: TrialCall) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in which copies of rows replace other rows.

    For each batch, yields the numbers of its rows, and of those that are in their own places.
    In the first batch copies of the first half replace the second half. In the second batch one
    sample of each pair of neighbours is replaced, in some pairs the first, in others the second.
    """
    count, group = trial.batch // trial.group, trial.group
    half = count // 2
    yield _rows([i % half for i in range(count)], group), _rows(range(half), group)
    mixed = _one_of_each_pair(count)
    copies = [i if i in mixed else mixed[(i // 2 + 1) % len(mixed)] for i in range(count)]
    yield _rows(copies, group), _rows(mixed, group)
    # An input that is an index of rows may happen to fit the copies. If all rows move, it cannot.
    if any(isinstance(v, Tensor) and not v.is_floating_point() for v in trial.values):
        yield _rows([(i + 1) % count for i in range(count)], group), torch.empty(0).long()


def _one_of_each_pair(count: int) -> list[int]:
    """Return one number of each pair (0, 1), (2, 3), ... below ``count``: 1, 2, 4, 7, ...

    These are the numbers that have an odd number of ones in binary.
    """
    return [i for i in range(count) if i.bit_count() % 2]


def _smaller_batches(trial: TrialCall) -> Iterator[Tensor]:
    """Yield the rows of smaller batches: one sample of each pair, and a single one."""
    count = trial.batch // trial.group
    yield _rows(_one_of_each_pair(count), trial.group)
    if count > 3:
        yield _rows([count - 2], trial.group)


def _compare(out: Tensor, other: Tensor, rows: Tensor | None, stays: Tensor, dim: int) -> str:
    """Say how ``other``, the output for other rows, differs from ``out``; empty if it does not.

    Args:
        out: The output for the rows of the call.
        other: The output for other rows.
        rows: These rows; None if only the rows ``stays`` are to be compared.
        stays: The rows that are in their own places in both.
        dim: The dimension that carries the rows.
    """
    if other.shape != out.shape:
        return f"its shape depends on the values of its rows: {tuple(out.shape)}, {other.shape}"
    wanted = None if rows is None else out.index_select(dim, rows.to(out.device))
    if wanted is not None and torch.equal(wanted, other):
        return ""
    places = stays.to(out.device)
    off = difference(out.index_select(dim, places), other.index_select(dim, places), like=out)
    if off > _STAYED.get(out.dtype, _STAYED_ELSE):
        return f"with other rows beside it a row differs by {off:.2g}"
    off = 0.0 if wanted is None else difference(wanted, other)
    if off > _MOVED.get(out.dtype, _MOVED_ELSE):
        return f"in another place of the batch a row differs by {off:.2g}"
    return ""


def difference(one: Tensor, other: Tensor, like: Tensor | None = None) -> float:
    """Return the largest difference of two tensors, relative to the largest value of ``like``.

    Without ``like`` it is relative to the largest value of ``one``. The difference is infinite
    unless both tensors have infinities and NaN in the same places.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    if one.numel() == 0 or torch.equal(one, other):
        return 0.0
    with torch.no_grad():
        equal = (one == other) | (one.isnan() & other.isnan())
        kind = torch.promote_types(one.dtype, torch.float32)
        off = (one.to(kind) - other.to(kind)).abs()
        off = torch.where(equal, 0.0, off).nan_to_num(nan=torch.inf, posinf=torch.inf)
        values = (one if like is None else like).to(kind).abs()
        largest = values.nan_to_num(nan=0.0, posinf=0.0).amax()
        return float(off.amax() / largest.clamp(min=torch.finfo(torch.float32).tiny))


def _find_dependence_in_backward(trial: TrialCall, before: RandomStates) -> str:
    """Say how gradients mix rows; empty if they do not.

    Only branches that use an autograd function written in Python are tested.
    """
    if not torch.is_grad_enabled() or not _uses_python_function(trial.out):
        return ""
    for rows, stays in _replacements(trial):
        if not len(stays):
            continue
        wanted = _gradients(trial, before, torch.arange(trial.batch), stays)
        found = _gradients(trial, before, rows, stays)
        for (known, rest), (other, _) in zip(wanted, found, strict=True):
            off = max(difference(known, other), float(rest.abs().max()) if rest.numel() else 0.0)
            if off > _MOVED.get(known.dtype, _MOVED_ELSE):
                return f"the gradient of a row depends on other rows: differs by {off:.2g}"
    return ""


def _gradients(
    trial: TrialCall, before: RandomStates, rows: Tensor, stays: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return the gradient of each input with rows, in the rows ``stays`` and in the other rows.

    Only the rows ``stays`` of the output are given a gradient. The gradient in the other rows is
    divided by the largest value.
    """
    device = trial.out.device
    leaves: dict[int, Tensor] = {}
    values = trial.inputs_for(rows, device)
    for i, value in enumerate(values):
        carries = trial.cut(trial.values[i], i, rows.to(device)) is not trial.values[i]
        if isinstance(value, Tensor) and value.is_floating_point() and carries:
            leaves[i] = value.detach().clone().requires_grad_()
            values[i] = leaves[i].clone()
    before.restore()
    # A reentrant checkpoint raises an error where gradients of chosen tensors are asked for.
    with replace_checkpoints(lambda options, args: nullcontext()):
        out = trial.run(values)
    weights = torch.zeros_like(out)
    places = stays.to(device)
    weights.index_copy_(trial.dim, places, out.detach().index_select(trial.dim, places))
    grads = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True)
    found = []
    others = torch.tensor(sorted({*range(trial.batch)} - set(stays.tolist())), device="cpu")
    for grad in grads:
        if grad is None or grad.dim() <= trial.dim or grad.shape[trial.dim] != trial.batch:
            continue
        scale = grad.abs().amax().clamp(min=1e-30)
        rest = grad.index_select(trial.dim, others.long().to(device)) / scale
        found.append((grad.index_select(trial.dim, places), rest))
    return found


def _uses_python_function(out: Tensor) -> bool:
    """Whether an autograd function that is written in Python is in the graph of ``out``."""
    pending, seen = [out.grad_fn], set[Any]()
    while pending and len(seen) < _NODES:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_python_autograd_node(node):
            return True
        pending.extend(following for following, _ in node.next_functions)
    return False
