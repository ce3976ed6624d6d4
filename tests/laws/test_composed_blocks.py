"""Composed blocks: right against masking by hand, or refused. And that this law can fail.

benchmarks/reliability.py holds thousands of them to the same law.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from dataclasses import replace
from typing import Any

import composed_law
import pytest
import torch
from composed_blocks import BranchSpec, Spec, built, specs, text_of
from composed_constructs import CONTEXTS, CORES, EXTRAS, MIXING, SUMS
from composed_law import InvalidError, hold
from hypothesis import HealthCheck, Phase, assume, given, settings

import torchdrop
from torchdrop.running import residual_sum
from torchdrop.running.split_site import SplitSite

PLAIN = Spec((BranchSpec((("LayerNorm", ""), ("mlp", "")), "x + h"),))
quick = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def _mixing(name: str) -> Spec:
    return replace(PLAIN, branches=(BranchSpec((("linear", ""), (name, "")), "x + h"),))


@pytest.mark.parametrize("example", [True, False])
def test_composed_blocks_are_right_or_refused(example: bool) -> None:
    ends: Counter[str] = Counter()

    @settings(quick, max_examples=16)
    @given(specs())
    def holds(spec: Spec) -> None:
        try:
            found = hold(spec, example)
        except InvalidError:
            assume(False)
        ends[found.kind] += 1
        assert found.kind in ("right", "refused", "refused in a call"), (
            f"{found.kind}: {found.text}\n{spec}\n{text_of(spec)}"
        )

    holds()
    if example:
        assert ends["right"] > 0.5 * ends.total()


@pytest.mark.parametrize("example", [True, False])
def test_rows_of_a_plain_block_are_skipped(example: bool) -> None:
    found = hold(PLAIN, example)
    assert (found.kind, found.actions) == ("right", ["skip", "skip"]), found


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("name", MIXING)
def test_rows_that_depend_on_each_other_are_masked(name: str, example: bool) -> None:
    found = hold(_mixing(name), example)
    assert found.kind in ("right", "refused", "refused in a call"), found
    assert "skip" not in found.actions


def test_every_construct_is_drawn() -> None:
    drawn: Counter[str] = Counter()

    @settings(quick, max_examples=700, phases=[Phase.generate])
    @given(specs())
    def collect(spec: Spec) -> None:
        drawn.update(spec.constructs())

    collect()
    assert {*CORES, *EXTRAS, *MIXING, *SUMS, *CONTEXTS} <= set(drawn)


def test_a_block_is_ordinary_python_with_a_source() -> None:
    with built(PLAIN) as module:
        assert "x = x + h" in inspect.getsource(module.Block.forward)
        assert module.Block.__module__ == module.__name__


# --- the law can fail ---------------------------------------------------------------------------


def test_a_mask_shifted_by_a_row_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = composed_law.masked

    def shifted(spec: Spec, plan: Any, reference: Any, call: Any, *rest: Any) -> Any:
        ways = masked(spec, plan, reference, call, *rest)
        for way in ways:
            for key, (action, rows) in way.dropped.items():
                way.dropped[key] = action, [(row + 1) % len(call.x) for row in rows]
        return ways

    monkeypatch.setattr(composed_law, "masked", shifted)
    found = hold(PLAIN, True)
    assert (found.kind, found.text[:6]) == ("wrong", "step 1")


# An index of rows, or a table with one, may also be an error if rows are missing.
@pytest.mark.parametrize("name", sorted(set(MIXING) - {"index of rows", "table by row"}))
def test_a_site_that_skips_rows_of_a_branch_that_mixes_them_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    add = functools.partial(torchdrop.add_stochastic_depth, verify=False)
    monkeypatch.setattr(torchdrop, "add_stochastic_depth", add)
    assert hold(_mixing(name), False).kind == "wrong"


def test_a_gain_that_is_off_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    add_rows = residual_sum.add_rows

    def off(skip: Any, out: Any, kept: Any, gain: float, *args: Any, **kwargs: Any) -> Any:
        return add_rows(skip, out, kept, gain * (1 + 1e-7), *args, **kwargs)

    monkeypatch.setattr(residual_sum, "add_rows", off)
    assert hold(PLAIN, True).kind == "wrong"


def test_an_error_of_torch_is_raw_and_one_of_torchdrop_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        torch.zeros(2) + torch.zeros(3)

    monkeypatch.setattr(SplitSite, "_draw", fails, raising=False)
    monkeypatch.setattr(SplitSite, "draw", fails, raising=False)
    assert hold(PLAIN, True).kind == "raw error"
    monkeypatch.undo()
    assert hold(replace(PLAIN, p=2.0), True).kind == "refused"  # p has to be at most 1


def test_gradients_and_buffers_are_compared() -> None:
    same = torch.ones(3)
    assert composed_law.difference(same, same, 1e-9) == ""
    assert composed_law.difference(None, torch.zeros(3), 1e-9) == ""
    assert "None" in composed_law.difference(None, same, 1e-9)
    assert "differs by" in composed_law.difference(same, same + 1e-6, 1e-9)
    assert "shape" in composed_law.difference(same, same[:2], 1e-9)
