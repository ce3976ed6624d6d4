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
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "InGraph",
    "enter",
    "leave_to_python",
    "rows_in_graph",
    "set_share",
    "size_in_graph",
    "zeros_for",
]

# The share of rows that is kept is known to a graph in this many steps; to a draw it is exact.
_STEPS = 2**30


class InGraph(Protocol):
    """What a graph draws for."""

    p: float

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
    _shares[number] = _share(branch.p)
    weakref.finalize(branch, _gone.append, number)
    return number


def set_share(number: int, p: float) -> None:
    """Let graphs know that the branch ``number`` is dropped with probability ``p``."""
    _shares[number] = _share(p)


def _share(p: float) -> Tensor:
    share = torch.empty((round((1.0 - p) * _STEPS), 0), device="cpu")
    # What torch._dynamo.maybe_mark_dynamic(share, 0) does; torch._dynamo takes seconds to import.
    share._dynamo_weak_dynamic_indices = {0}  # type: ignore[attr-defined]
    share._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
    return share


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
    " -> (Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded,),
)


def _keep_rows(
    branch: int, batch: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows, kept = _branches[branch].draw_rows(batch)
    weights = torch.zeros(size, dtype=dtype, device="cpu")
    weights[:kept] = _branches[branch].gain_in_training()
    return rows[:size].to(device, non_blocking=True), weights.to(device, non_blocking=True)


def _shapes(
    branch: int, batch: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows = torch.empty(size, dtype=torch.long, device=device)
    return rows, torch.empty(size, dtype=dtype, device=device)


_library.impl("keep_rows", _keep_rows, "CompositeExplicitAutograd")
torch.library.register_fake("torchdrop::keep_rows", _shapes, lib=_library)


def rows_in_graph(number: int, batch: Any, size: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """``size`` rows of a batch, the kept ones among them, and the weight of each, or zero."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    rows, weights = torch.ops.torchdrop.keep_rows(number, batch, size, dtype, like.device)
    return rows, weights


def leave_to_python(*modules: str) -> None:
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
