"""Draw, gather and scatter rows inside a graph of ``torch.compile``; one graph serves every rate.

The shapes in a graph have to be known before rows are drawn, and the rate must not be a constant in
it: a scheduled rate would compile a new graph in every step. So the rate is passed in as the size
of an empty tensor, which the compiler treats as a symbol, and the rows are drawn by an operation
that runs on the host when the graph runs. The graph computes as many rows as may be kept at this
rate; if fewer are kept, the others are computed but not used.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterable
from functools import partial
from types import CodeType, FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torchdrop.error_pages import see
from torchdrop.internals import leave_frame_uncompiled, mark_first_size_symbolic

__all__ = [
    "GraphBranch",
    "GraphRows",
    "draw_in_graph",
    "leave_uncompiled",
    "mark_uncompiled",
    "register_branch",
    "row_count_in_graph",
    "scatter_in_graph",
    "set_keep_share",
    "take_in_graph",
    "zero_from",
]

# A graph knows the share of kept rows as an integer, in units of 1 / _UNITS, since it is a size. It
# determines only how many rows are computed; which of them are kept is drawn with the exact rate.
_UNITS = 2**30


class GraphBranch(Protocol):
    """What a compiled graph needs to know about a branch.

    Attributes:
        p: The drop probability.
        gain: The factor of a kept row.
        convolves: Whether the branch contains a convolution.
    """

    p: float
    gain: float
    convolves: bool

    def draw_rows(self, batch: int) -> tuple[Tensor, int]:
        """Return all rows of a batch, on the host, the kept ones first, and how many are kept."""
        ...


# Graphs know a branch by its number: a number can be a constant in a graph, an object cannot.
_branches: weakref.WeakValueDictionary[int, GraphBranch] = weakref.WeakValueDictionary()
_numbers = itertools.count()

# By number of the branch: an empty tensor whose first size is the share of kept rows in _UNITS.
_shares: dict[int, Tensor] = {}

# The numbers of branches that were freed. Their shares are removed when the next branch is
# registered, not at once: the garbage collector may run while a compiler iterates over the shares.
_freed: list[int] = []


def register_branch(branch: GraphBranch) -> int:
    """Return a new number for ``branch``, by which graphs refer to it."""
    while _freed:
        _shares.pop(_freed.pop(), None)
    number = next(_numbers)
    _branches[number] = branch
    set_keep_share(number, branch.p, value_known=branch.convolves)
    weakref.finalize(branch, _freed.append, number)
    return number


def set_keep_share(number: int, p: float, *, value_known: bool) -> None:
    """Let graphs drop the branch ``number`` with probability ``p`` from now on.

    Args:
        number: The number of the branch.
        p: The drop probability.
        value_known: Whether the compiler may know the present value of the symbol. True is needed
            for convolutions: without the value, inductor (torch 2.14) chooses a wrong memory format
            for them. False is better for all else: with the value, the compiler chooses code that
            suits it, and compiles again when another value needs other code. On a CPU inductor does
            so when the length of a reduction passes 4,096, in a transformer for one block after the
            other.
    """
    share = torch.empty((max(round((1.0 - p) * _UNITS), 1), 0), device="cpu")
    # If the value is not known, loops are planned for half of the rows.
    mark_first_size_symbolic(share, value_known=value_known, largest=_UNITS, hint=_UNITS // 2)
    _shares[number] = share


def row_count_in_graph(number: int, batch: Any, least: int) -> Any:
    """Return how many rows a graph computes: ``batch * (1 - p)``, rounded up.

    Args:
        number: The number of the branch.
        batch: The batch size.
        least: The least number of rows that the branch needs (BatchNorm needs two). The result is
            still at most ``batch``.
    """
    share = _shares[number].shape[0]
    # ``share`` is rounded, so where ``batch * (1 - p)`` is an integer, the product may be a little
    # larger. With one unit less it is not rounded up to the next integer, one row too many.
    enough = (batch * (share - 1) + _UNITS - 1) // _UNITS
    return torch.sym_min(batch, torch.sym_max(least, enough))


def zero_from(unused: Iterable[Tensor]) -> Any:
    """Return a zero whose backward pass gives each of ``unused`` a gradient of zeros."""
    # The sum of no elements: 0 even if the tensor holds inf or NaN.
    return sum(tensor.flatten()[:0].sum() for tensor in unused)


_library: Any = torch.library.Library("torchdrop", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "keep_rows(int branch, SymInt batch, SymInt size, ScalarType dtype, Device device)"
    " -> (Tensor, Tensor, Tensor)",
    # Two calls draw different rows, so a compiler must not merge them.
    tags=(torch.Tag.nondeterministic_seeded,),
)


def _keep_rows(
    branch: int, batch: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the rows when the graph runs; the results are those of :class:`GraphRows`."""
    rows, kept = _branches[branch].draw_rows(batch)
    rows = rows[:size]
    weights = torch.zeros(size, dtype=dtype, device="cpu")
    weights[:kept] = _branches[branch].gain
    positions = torch.full((batch,), -1, dtype=torch.long, device="cpu")
    positions[rows] = torch.arange(size, device="cpu")
    copy = partial(torch.Tensor.to, device=device, non_blocking=True)
    return copy(rows), copy(weights), copy(positions)


def _fake_keep_rows(
    branch: int, batch: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors of the shapes of :func:`_keep_rows`, for the compiler."""
    rows, positions = (torch.empty(n, dtype=torch.long, device=device) for n in (size, batch))
    return rows, torch.empty(size, dtype=dtype, device=device), positions


_library.impl("keep_rows", _keep_rows, "CompositeExplicitAutograd")
torch.library.register_fake("torchdrop::keep_rows", _fake_keep_rows, lib=_library)


class GraphRows(NamedTuple):
    """The rows of a batch that a graph computes: all kept ones, and perhaps others."""

    rows: Tensor  #: (size,): the indices of the computed rows in the batch
    weights: Tensor  #: (size,): the factor of each; zero if it is not kept
    positions: Tensor  #: (batch,): for each row of the batch, its index in ``rows``, or -1


def draw_in_graph(number: int, batch: Any, size: Any, like: Tensor) -> GraphRows:
    """Draw which rows of a batch are computed for a branch, and which of them are kept.

    Args:
        number: The number of the branch.
        batch: The batch size.
        size: How many rows are computed (:func:`row_count_in_graph`).
        like: A tensor on the device of the result. The weights are float64 if it is.
    """
    if torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "torch.export.export(..., strict=True) cannot export the draw of rows in training; use "
            "strict=False, or export the model in evaluation, in which nothing is dropped"
            + see("compile-and-export")
        )
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return GraphRows(*torch.ops.torchdrop.keep_rows(number, batch, size, dtype, like.device))


# Gathering and scattering are the gradients of each other. Both are computed with index_select: for
# index_add, and for the gradient of index_select, a compiler on the CPU generates atomic additions,
# one element at a time.


class _Take(torch.autograd.Function):
    """Gather the slices ``rows``; the backward pass scatters their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, positions: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(rows, positions)
        ctx.dim = dim
        return x.index_select(dim, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Scatter.apply(grads[0], *ctx.saved_tensors, ctx.dim), None, None, None


class _Scatter(torch.autograd.Function):
    """Put slices at ``rows`` of a batch of zeros; the backward pass gathers their gradient."""

    @staticmethod
    def forward(ctx: Any, slices: Tensor, rows: Tensor, positions: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(rows, positions)
        ctx.dim = dim
        computed = (positions >= 0).view([-1 if d == dim else 1 for d in range(slices.dim())])
        return torch.where(computed, slices.index_select(dim, positions.clamp(min=0)), 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Take.apply(grads[0], *ctx.saved_tensors, ctx.dim), None, None, None


def take_in_graph(x: Tensor, drawn: GraphRows, dim: int) -> Tensor:
    """Return the drawn slices of ``x`` along ``dim``."""
    slices: Tensor = _Take.apply(x, drawn.rows, drawn.positions, dim)
    return slices


def scatter_in_graph(slices: Tensor, drawn: GraphRows, dim: int) -> Tensor:
    """Return a whole batch along ``dim``: ``slices`` at the drawn rows, zeros elsewhere."""
    whole: Tensor = _Scatter.apply(slices, drawn.rows, drawn.positions, dim)
    return whole


def mark_uncompiled(*modules: str) -> None:
    """Mark the functions of these modules so that no graph of ``torch.compile`` begins in them.

    In batch mode a graph ends at each draw, since the draw decides whether the branch runs. Without
    the mark, dynamo would continue in the functions of torchdrop between the draw and the branch,
    and compile pieces of them for each block, until its limit for one function is reached. With it
    these functions run in Python, and the next graph begins in the branch that they call. A marked
    function that is called inside a graph, and in which no graph ends, is part of that graph.

    Args:
        modules: The names of imported modules; only the functions that they define are marked.
            A function that is made in a call of another one is marked with it.
    """
    for name in modules:
        for value in list(vars(sys.modules[name]).values()):
            inside = vars(value).values() if isinstance(value, type) else [value]
            for member in inside:
                function = getattr(member, "__func__", member)  # of a static or class method
                function = getattr(function, "__wrapped__", function)  # of a cached function
                if isinstance(function, FunctionType) and function.__module__ == name:
                    leave_uncompiled(function.__code__)


def leave_uncompiled(code: CodeType) -> None:
    """Mark ``code`` and the code of the functions in it, as :func:`mark_uncompiled` does."""
    leave_frame_uncompiled(code)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            leave_uncompiled(inner)
