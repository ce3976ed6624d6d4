"""Say which sums of a model are not dropped, and why."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from torchdrop.finding.residual import Residual
from torchdrop.finding.source_code import source_has_addition
from torchdrop.finding.survey import Survey
from torchdrop.layers.stochastic_depth import StochasticDepth

__all__ = ["reasons_not_taken"]

_BLENDS = "neither side of its sum is a shortcut: it blends two values, as a gate does"


def reasons_not_taken(
    model: nn.Module, found: Survey, chosen: Sequence[Residual]
) -> tuple[tuple[str, str], ...]:
    """Return the path of each module with a sum that is not taken, and why.

    What is inside a branch that is taken is left out, and so are forwards that cannot be read
    around blocks that are taken.
    """
    children = {child for residual in chosen for b in residual.branches for child in b.children}
    reasons = [
        (r.name, f"{type(r.module).__name__}: {r.why_not or 'select left it out'}")
        for r in found.residuals
        if r not in chosen
    ]
    reasons += [(b.name, f"{b.kind}, {b.where}: {_BLENDS}") for b in found.blends]
    names = [residual.name for residual in chosen]
    reasons += [
        (path, f"{type(module).__name__}: it cannot be read: {why}")
        for path, why in found.unreadable.items()
        if source_has_addition(module := model.get_submodule(path))
        and not isinstance(module, StochasticDepth)
        and not any(name.startswith(f"{path}." if path else "") for name in names)
    ]
    return tuple(
        (name, why)
        for name, why in reasons
        if not any(f"{name}.".startswith(f"{child}.") for child in children)
    )
