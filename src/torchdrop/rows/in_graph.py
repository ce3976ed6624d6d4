"""GRAPH: who is kept, inside a graph of ``torch.compile``. One graph serves every rate.

A graph needs the number of rows that it computes before anything is drawn, and must not hold the
rate as a constant: a rate that is scheduled would compile anew in every step. So the rate comes in
as the size of an empty tensor, which the compiler keeps symbolic, and the rows come from an
operation that draws on the host when the graph runs, as without a compiler. The graph computes as
many rows as the rate can need; where fewer are kept, the last one is computed and not used.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterable
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "Drawn",
    "InGraph",
    "enter",
    "rows_in_graph",
    "run_uncompiled",
    "set_share",
    "size_in_graph",
    "spread_in_graph",
    "take_in_graph",
    "zeros_for",
]

# The share of rows that is kept is known to a graph in this many steps; to a draw it is exact.
_STEPS = 2**30


class InGraph(Protocol):
    """What a graph draws for."""

    p: float
    convolves: bool

    def draw_rows(self, batch: int) -> tuple[Tensor, int]:
        """All rows of a batch, on the host, the kept ones first, and how many are kept."""
        ...

    def gain_in_training(self) -> float:
        """What a kept row is multiplied by."""
        ...


# By the number of a branch in graphs. Graphs hold numbers: an object could not be a constant there.
_branches: weakref.WeakValueDictionary[int, InGraph] = weakref.WeakValueDictionary()
_shares: dict[int, Tensor] = {}
_numbers = itertools.count()

# Numbers of branches that are gone. A compiler goes through all shares, and the garbage collector
# may run meanwhile, so that they are let go with the next branch that comes.
_gone: list[int] = []


def enter(branch: InGraph) -> int:
    """Give ``branch`` a number, by which graphs know it."""
    while _gone:
        _shares.pop(_gone.pop(), None)
    number = next(_numbers)
    _branches[number] = branch
    set_share(number, branch.p, known=branch.convolves)
    weakref.finalize(branch, _gone.append, number)
    return number


def set_share(number: int, p: float, *, known: bool) -> None:
    """Let graphs know that the branch ``number`` is dropped with probability ``p``.

    Of a symbolic size the compiler still knows the value that it has now, and guards on what it
    decides by it: on a CPU inductor compiles anew when a sum becomes longer than 4,096, which in
    a transformer happens in one block after the other. Unless it is ``known``, it does not know
    the value. But of a convolution of an unknown number of rows inductor mistakes the memory format
    (torch 2.14).
    """
    share = torch.empty((max(round((1.0 - p) * _STEPS), 1), 0), device="cpu")
    # What torch._dynamo.maybe_mark_dynamic and mark_unbacked do; to import torch._dynamo takes
    # seconds. The hint is what inductor plans its loops for.
    marks: dict[str, Any]
    if known:
        marks = {"_dynamo_weak_dynamic_indices": {0}}
    else:
        marks = {
            "_dynamo_unbacked_indices": {0},
            "_dynamo_unbacked_bounds": {0: (1, _STEPS)},
            "_dynamo_hint_overrides": {0: _STEPS // 2},
            "_specialize_on": {0: []},
        }
    for name, value in marks.items():
        setattr(share, name, value)
    share._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
    _shares[number] = share


def size_in_graph(number: int, batch: Any, least: int) -> Any:
    """The number of rows that a graph computes: ``batch * (1 - p)`` rounded up, or ``least``."""
    share = _shares[number].shape[0]
    # One step less, so that a product which is an integer is not rounded up for its last digit.
    enough = (batch * (share - 1) + _STEPS - 1) // _STEPS
    return torch.sym_min(batch, torch.sym_max(least, enough))


def zeros_for(unused: Iterable[Tensor]) -> Any:
    """A sum of nothing, which gives each of ``unused`` a gradient of zeros."""
    return sum(tensor.flatten()[:0].sum() for tensor in unused)


_library: Any = torch.library.Library("torchdrop", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "keep_rows(int branch, SymInt batch, SymInt size, ScalarType dtype, Device device)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded,),
)


def _keep_rows(
    branch: int, batch: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    rows, kept = _branches[branch].draw_rows(batch)
    rows = rows[:size]
    weights = torch.zeros(size, dtype=dtype, device="cpu")
    weights[:kept] = _branches[branch].gain_in_training()
    places = torch.full((batch,), -1, dtype=torch.long, device="cpu")
    places[rows] = torch.arange(size, device="cpu")
    there = partial(torch.Tensor.to, device=device, non_blocking=True)
    return there(rows), there(weights), there(places)


def _shapes(
    branch: int, batch: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    rows, places = (torch.empty(n, dtype=torch.long, device=device) for n in (size, batch))
    return rows, torch.empty(size, dtype=dtype, device=device), places


_library.impl("keep_rows", _keep_rows, "CompositeExplicitAutograd")
torch.library.register_fake("torchdrop::keep_rows", _shapes, lib=_library)


class Drawn(NamedTuple):
    """Rows of a batch that a graph computes, the kept ones among them."""

    rows: Tensor  #: (size,): which they are
    weights: Tensor  #: (size,): what each is multiplied by; zero where it is not kept
    places: Tensor  #: (batch,): where each row of the batch is among them, or -1


def rows_in_graph(number: int, batch: Any, size: Any, like: Tensor) -> Drawn:
    """Draw ``size`` rows of a batch for the branch ``number``."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return Drawn(*torch.ops.torchdrop.keep_rows(number, batch, size, dtype, like.device))


# Each is the other's gradient, and both read by index. Of index_add, and of the gradient of
# index_select, a compiler on the CPU makes atomic additions, one by one.


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(rows, places)
        ctx.dim = dim
        return x.index_select(dim, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(grads[0], *ctx.saved_tensors, ctx.dim), None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, some: Tensor, rows: Tensor, places: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(rows, places)
        ctx.dim = dim
        computed = (places >= 0).view([-1 if d == dim else 1 for d in range(some.dim())])
        return torch.where(computed, some.index_select(dim, places.clamp(min=0)), 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Take.apply(grads[0], *ctx.saved_tensors, ctx.dim), None, None, None


def take_in_graph(x: Tensor, drawn: Drawn, dim: int) -> Tensor:
    """The drawn slices of ``x`` along ``dim``."""
    some: Tensor = _Take.apply(x, drawn.rows, drawn.places, dim)
    return some


def spread_in_graph(some: Tensor, drawn: Drawn, dim: int) -> Tensor:
    """``some`` where the drawn slices are among those of a batch along ``dim``, zero elsewhere."""
    whole: Tensor = _Spread.apply(some, drawn.rows, drawn.places, dim)
    return whole


def run_uncompiled(*modules: str) -> None:
    """Let dynamo not compile the functions of these modules by themselves, but what they call.

    In batch mode a graph ends where a decision is drawn, and what is on the way to the next graph,
    a branch, would be compiled in pieces for every block, until dynamo's limit for one function is
    reached. What ends in no graph is traced through as ever.
    """
    frames: Any = torch._C._dynamo.eval_frame
    try:  # what torch._dynamo.skip does; torch._dynamo takes seconds to import
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        leave = frames.set_code_exec_strategy
    except AttributeError:
        return
    for name in modules:
        for value in list(vars(sys.modules[name]).values()):
            inside = vars(value).values() if isinstance(value, type) else [value]
            for member in inside:
                function = getattr(member, "__func__", member)  # of a static or class method
                if isinstance(function, FunctionType) and function.__module__ == name:
                    leave(function.__code__, skip)
