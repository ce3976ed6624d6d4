"""The drop rates that training delivered, with their confidence bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchdrop.running.branch_state import BranchState

__all__ = ["ObservedRate", "ObservedRates", "observed_rates"]

# The quantile of the normal distribution of which 2.5 % lies above.
_Z = 1.959963984540054


@dataclass(frozen=True)
class ObservedRate:
    """How many of ``rows`` rows were dropped.

    Attributes:
        rate: The share of dropped rows; 0.0 if ``rows`` is 0.
        rows: The number of rows.
        low: The lower end of the 95 % confidence interval of the drop probability.
        high: The upper end.
    """

    rate: float
    rows: int
    low: float
    high: float

    @classmethod
    def of(cls, dropped: int, rows: int) -> ObservedRate:
        """Return the rate of ``dropped`` of ``rows`` rows, with the interval of Wilson (1927).

        The interval assumes that rows are drawn independently. ``sampling="exact"`` varies less
        from batch to batch, so that the interval is wider than needed. In batch mode all rows of a
        batch are kept or dropped together, so that it is too narrow.
        """
        if not rows:
            return cls(0.0, 0, 0.0, 1.0)
        z2 = _Z * _Z
        center = (dropped + z2 / 2.0) / (rows + z2)
        half = _Z / (rows + z2) * math.sqrt(dropped * (rows - dropped) / rows + z2 / 4.0)
        rate = dropped / rows
        # if all rows were dropped, or none, rounding may move an end past the rate
        low, high = min(max(center - half, 0.0), rate), max(min(center + half, 1.0), rate)
        return cls(rate, rows, low, high)


@dataclass(frozen=True)
class ObservedRates:
    """The rates of all branches of a plan.

    Attributes:
        branches: The rate of each branch, by its name.
        total: The rate over the rows of all branches together.
    """

    branches: Mapping[str, ObservedRate]
    total: ObservedRate


def observed_rates(branches: Sequence[BranchState]) -> ObservedRates:
    """Return how many rows each branch has dropped since its counts were set to zero."""
    counted = {
        branch.facts.name: (branch.counts.rows_dropped, branch.counts.rows_seen)
        for branch in branches
    }
    dropped, rows = (sum(pair[i] for pair in counted.values()) for i in (0, 1))
    return ObservedRates(
        {name: ObservedRate.of(*pair) for name, pair in counted.items()},
        ObservedRate.of(dropped, rows),
    )
