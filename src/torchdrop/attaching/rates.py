"""Turn ``p``, in any of its forms, into a rate for each branch, and set these rates."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor

from torchdrop import schedules
from torchdrop.error_pages import see
from torchdrop.running.block_site import BlockSite
from torchdrop.running.branch_state import BranchState
from torchdrop.schedules import DepthRule

__all__ = ["resolve_rates", "set_rates"]


def resolve_rates(
    p: Any, branches: Sequence[BranchState], blocks: int, schedule: DepthRule
) -> list[float]:
    """Return the rate of each branch. Changes nothing.

    Args:
        p: The rates, in any of the forms that ``add_stochastic_depth`` accepts.
        branches: The branches, in the order of depth.
        blocks: The number of blocks.
        schedule: The rule that spreads a single ``p`` over the blocks.

    Raises:
        TypeError, ValueError: ``p`` is not a legal rate, or does not fit these branches.
    """
    facts = [branch.facts for branch in branches]
    names = list(dict.fromkeys(f.block for f in facts))
    if p is None:
        if not any(f.masks for f in facts):
            raise ValueError(
                "p=None uses the rates of the DropPath / StochasticDepth layers of the model, but "
                "it has none in its residual branches; give p, a drop probability" + see("rates")
            )
        return [f.inherited for f in facts]
    if isinstance(p, Mapping):
        _check_names(p, names, [f.name for f in facts])
        rates = {name: schedules.check_rate(rate, f"p[{name!r}]") for name, rate in p.items()}
        return [rates.get(b.facts.name, rates.get(b.facts.block, b.rate.p)) for b in branches]
    if isinstance(p, Tensor):
        raise TypeError("p has to be plain numbers, but got a tensor; use .item() or .tolist()")
    if isinstance(p, str | bytes) or not hasattr(p, "__len__"):
        per_block = schedules.over_depth(schedules.check_rate(p), blocks, schedule)
        return [per_block[f.index] for f in facts]
    try:
        values = list(p)
    except TypeError:  # an array without dimensions has a __len__, but no length
        values = [schedules.check_rate(p)]
    if len(values) != len(names):
        raise ValueError(
            f"a sequence p needs one rate a block: expected {len(names)}, but got {len(values)}"
            + see("rates")
        )
    by_block = {
        name: schedules.check_rate(rate, f"p[{i}]")
        for i, (name, rate) in enumerate(zip(names, values, strict=True))
    }
    return [by_block[f.block] for f in facts]


def _check_names(p: Mapping[Any, Any], blocks: Sequence[str], branches: Sequence[str]) -> None:
    """Raise ValueError unless the keys of ``p`` are names of blocks or branches."""
    if not p:
        raise ValueError(
            f"p={{}} names no block, so that nothing would be dropped; map names to rates, as in "
            f"{{{blocks[-1]!r}: 0.2}}, or give p=0.0 to begin with nothing dropped" + see("rates")
        )
    known = {*blocks, *branches}
    unknown = [name for name in p if name not in known]
    if not unknown:
        return
    alike = [n for n in sorted(known) if any(n.startswith(str(u)) for u in unknown)]
    alike = alike or difflib.get_close_matches(str(unknown[0]), known)
    raise ValueError(
        f"p names {', '.join(map(repr, unknown))}, which is not a block of this model; "
        + (f"did you mean {' or '.join(map(repr, alike[:4]))}? " if alike else "")
        + f"its blocks are {', '.join(map(repr, blocks[:6]))}"
        + see("rates")
        + (f" and {len(blocks) - 6} more" if len(blocks) > 6 else "")
        + (f"; a branch is {branches[0]!r}" if len(branches) > len(blocks) else "")
    )


def set_rates(sites: Sequence[BlockSite], rates: Sequence[float]) -> None:
    """Set the rate of every branch of ``sites``."""
    remaining = iter(rates)
    for site in sites:
        site.set_rates(list(islice(remaining, len(site.branches))))
