"""The rates of the branches: from the forms that ``p`` may have, and onto the sites."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from torchdrop import schedules
from torchdrop.running.block_site import BlockSite
from torchdrop.running.branch_state import BranchState

__all__ = ["resolve_rates", "set_rates"]


def resolve_rates(
    p: Any, branches: Sequence[BranchState], blocks: int, schedule: str
) -> list[float]:
    """The rate of each branch from any of the forms of ``p``. Changes nothing.

    Raises:
        TypeError, ValueError: What is wrong with ``p``, and what it has to be.
    """
    names = list(dict.fromkeys(b.block for b in branches))
    if p is None:
        if not any(b.masks for b in branches):
            raise ValueError(
                "p=None takes over the rates of DropPath / StochasticDepth layers, but the model "
                "has none in its residual branches; give p, a drop probability"
            )
        return [b.inherited for b in branches]
    if isinstance(p, Mapping):
        if not p:
            raise ValueError(
                f"p={{}} names no block, so that nothing would be dropped; map names to rates, as "
                f"in {{{names[-1]!r}: 0.2}}, or give p=0.0 to begin with nothing dropped"
            )
        known = set(names) | {b.name for b in branches}
        unknown = [name for name in p if name not in known]
        if unknown:
            alike = [n for n in sorted(known) if any(n.startswith(str(u)) for u in unknown)]
            alike = alike or difflib.get_close_matches(str(unknown[0]), known)
            raise ValueError(
                f"p names {', '.join(map(repr, unknown))}, which is no block of this model; "
                + (f"did you mean {' or '.join(map(repr, alike[:4]))}? " if alike else "")
                + f"its blocks are {', '.join(map(repr, names[:6]))}"
                + (f" and {len(names) - 6} more" if len(names) > 6 else "")
                + (f"; a branch is {branches[0].name!r}" if len(branches) > len(names) else "")
            )
        rates = {name: schedules.check_rate(rate, f"p[{name!r}]") for name, rate in p.items()}
        return [rates.get(b.name, rates.get(b.block, b.p)) for b in branches]
    if isinstance(p, Tensor):
        raise TypeError("p has to be plain numbers, but got a tensor; use .item() or .tolist()")
    if isinstance(p, str | bytes) or not hasattr(p, "__len__"):
        per_block = schedules.over_depth(schedules.check_rate(p), blocks, schedule)
        return [per_block[b.index] for b in branches]
    try:
        values = list(p)
    except TypeError:  # an array without dimensions has a __len__, but no length
        values = [schedules.check_rate(p)]
    if len(values) != len(names):
        raise ValueError(
            f"a sequence p needs one rate a block: expected {len(names)}, but got {len(values)}"
        )
    by_block = {
        name: schedules.check_rate(rate, f"p[{i}]")
        for i, (name, rate) in enumerate(zip(names, values, strict=True))
    }
    return [by_block[b.block] for b in branches]


def set_rates(sites: Sequence[BlockSite], rates: Sequence[float]) -> None:
    """Give every branch of ``sites`` its rate, and wake or rest the sites accordingly."""
    remaining = iter(rates)
    for site in sites:
        for branch in site.branches:
            branch.set_rate(next(remaining))
        site.settle()
