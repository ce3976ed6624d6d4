"""A slice of benchmarks/soak/long_run.py: what is remembered from step to step does not grow."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from torchdrop.attaching.plan import Plan
from torchdrop.running.block_site import BlockSite
from torchdrop.running.branch_state import BranchState

PATH = Path(__file__).parents[2] / "benchmarks" / "soak" / "long_run.py"
SPEC = importlib.util.spec_from_file_location("long_run", PATH)
assert SPEC is not None
assert SPEC.loader is not None
long_run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(long_run)

ENOUGH = float("inf")  # memory needs more steps than these to tell a leak from noise


@pytest.mark.parametrize(
    ("mode", "sampling", "steps"),
    [("row", "exact", 300), ("row", "independent", 100), ("batch", "exact", 100)],
)
def test_caches_do_not_grow_and_rates_hold(mode: str, sampling: str, steps: int) -> None:
    """A new rate each step, batches of 1 to 16, three lengths: all met in the first 25."""
    found = long_run.run(steps, mode, sampling, every=25)
    assert long_run.sound(found, ENOUGH), found
    assert found["caches_late"]["programs"] == 4
    assert found["caches_late"]["dtypes"] == 4


def test_a_cache_that_grows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a branch that remembers something of every batch."""
    real = BlockSite._draw

    def remembers(self: BlockSite, branch: BranchState, *args: Any) -> Any:
        branch.dtypes[len(branch.dtypes)] = None  # type: ignore[assignment]
        return real(self, branch, *args)

    monkeypatch.setattr(BlockSite, "_draw", remembers)
    assert not long_run.sound(long_run.run(100, "row", "exact", every=25), ENOUGH)


def test_a_rate_that_is_not_delivered_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: blocks that get nine tenths of the rate."""
    real = Plan.set_p
    monkeypatch.setattr(Plan, "set_p", lambda self, p: real(self, 0.9 * p))
    assert not long_run.sound(long_run.run(200, "row", "exact", every=25), ENOUGH)
