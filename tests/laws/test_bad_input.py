"""Hostile values: every call takes them well, or refuses them and leaves everything as it was.

The cases, and what is looked at, are in hostile.py; benchmarks/soak/bad_input.py runs ten
thousand of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import CHECKS, FUNCTIONS, LAYERS, FindingError, RefusedError, attempt, conv, mlp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import torchdrop
from torchdrop.app import models
from torchdrop.app.errors import UserError

CASES = 500
"""Of all checks together."""


@pytest.mark.parametrize("name", CHECKS)
def test_hostile_values_are_taken_well(name: str) -> None:
    check, share = CHECKS[name]
    outcomes: list[str] = []

    @settings(
        max_examples=max(20, round(CASES * share)),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.data())
    def run(data: Any) -> None:
        try:
            check(data.draw)
        except RefusedError:
            outcomes.append("refused")
        else:
            outcomes.append("taken")

    run()
    # Without calls that are refused, or taken, half of the check has not run.
    by_themselves = ("plan", "batches", "command", "bench")  # they go on after a refusal
    least = {"taken"} if name in by_themselves else {"taken", "refused"}
    assert set(outcomes) >= least, (name, len(outcomes))


def test_everything_public_is_among_the_checks() -> None:
    text = Path(__file__).with_name("hostile.py").read_text()
    read_from_the_package = {*LAYERS, *FUNCTIONS, *torchdrop.schedules.DEPTH_RULES}
    schedules = torchdrop.schedules
    places = (
        torchdrop, torchdrop.functional, schedules, schedules.over_time, torchdrop.diagnostics
    )  # fmt: skip
    checked = []
    for place in places:
        for name in place.__all__:
            thing = getattr(place, name)
            # Records that calls give back are not for users to make.
            made = isinstance(thing, type) and not issubclass(thing, nn.Module)
            ours = name.startswith("check_") or name in ("DepthRule", "flops", "saved_bytes")
            if callable(thing) and not (made or ours):
                named = f'"{name}"' in text or f".{name}(" in text or f".{name})" in text
                assert named or name in read_from_the_package, name
                checked.append(name)
    assert len(checked) > 30


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_the_legal_values_that_hostile_ones_replace(name: str) -> None:
    """Else all that is checked is that they are refused. EXAMPLES in hostile.py has the values."""
    given, _ = LAYERS[name]
    getattr(torchdrop.layers, name)(**given)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_the_legal_values_that_hostile_ones_replace(name: str) -> None:
    function, (given, _) = getattr(torchdrop.functional, name), FUNCTIONS[name]
    several = {"branches": ([torch.ones(4, 3)] * 2,), "skip": (torch.ones(4, 3),) * 2}
    first = next(iter(signature(function).parameters))
    if first != "x":
        function(*several.get(first, ()), **given)
        return
    refused = []
    for shape in ((4, 3), (2, 3, 8), (4, 3, 8, 8), (2, 3, 4, 8, 8)):
        try:
            assert function(torch.ones(shape), **given).shape == shape
        except ValueError as error:
            refused.append(str(error))
    assert all("dimensions" in message for message in refused)
    assert len(refused) < 4


# --- the twins: functions that take hostile values badly, which the harness has to see


def _takes_nan(model: nn.Module, p: Any) -> None:
    if p > 1 or p < 0:
        raise ValueError("p has to be between 0 and 1, but is not")


def _changes_first(model: nn.Module, p: Any) -> None:
    model[0].fc1.weight.data.zero_()
    raise ValueError("p has to be between 0 and 1, but is not")


def _forgets_the_mode(model: nn.Module, p: Any) -> None:
    model.eval()
    raise ValueError("p has to be between 0 and 1, but is not")


def _leaves_a_hook(model: nn.Module, p: Any) -> None:
    model.register_forward_hook(lambda *a: None)
    raise ValueError("p has to be between 0 and 1, but is not")


def _draws(model: nn.Module, p: Any) -> None:
    torch.rand(())
    raise ValueError("p has to be between 0 and 1, but is not")


def _asserts(model: nn.Module, p: Any) -> None:
    assert 0 <= p <= 1, "p has to be between 0 and 1, but is not"


def _stumbles(model: nn.Module, p: Any) -> None:
    len(p)


def _says_nothing(model: nn.Module, p: Any) -> None:
    raise ValueError("bad p")


def _refuses_well(model: nn.Module, p: Any) -> None:
    raise ValueError("p has to be between 0 and 1, but is not")


def _as_if_ours(function: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness take this file for one of the package: only `raise` lines of it count."""
    monkeypatch.setattr("hostile.PACKAGE", str(Path(__file__).parent))


@pytest.mark.parametrize(
    "bad", [_changes_first, _forgets_the_mode, _leaves_a_hook, _draws, _asserts, _stumbles]
)
def test_the_harness_sees_what_is_taken_badly(
    bad: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_if_ours(bad, monkeypatch)
    model = mlp()
    with pytest.raises(FindingError, match=r"had been changed|is no refusal of ours"):
        attempt(lambda: bad(model, float("nan")), model)


def test_the_harness_sees_a_bare_message_and_lets_a_good_one_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _as_if_ours(_says_nothing, monkeypatch)
    model = mlp()
    with pytest.raises(FindingError, match="bad p"):
        attempt(lambda: _says_nothing(model, 2.0), model)
    with pytest.raises(RefusedError):
        attempt(lambda: _refuses_well(model, 2.0), model)


def test_the_checks_see_a_function_that_accepts_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check that the package passes, with the range test as it is often written."""

    def lenient(p: Any, name: str = "p") -> float:
        if p < 0 or p > 1:
            raise ValueError(f"{name} has to be between 0 and 1, but got {p}")
        return float(p)

    for module in ("schedules", "schedules.depth_rules"):
        monkeypatch.setattr(f"torchdrop.{module}.check_rate", lenient)
    script = iter([mlp, 1, float("nan"), "set_p", False])
    with pytest.raises(FindingError, match=r"with the rates|NaN to integer"):
        CHECKS["plan"][0](lambda strategy: next(script))


# --- what the checks found first, by name

FOUND: dict[str, tuple[Callable[[], Any], str]] = {
    "a model that is none": (
        lambda: torchdrop.has_stochastic_depth(None),  # type: ignore[arg-type]
        r"model has to be a torch\.nn\.Module, but got a NoneType",
    ),
    "a plan of no model": (
        lambda: torchdrop.get_plan([1]),  # type: ignore[arg-type]
        r"model has to be a torch\.nn\.Module, but got a list",
    ),
    "rates of a state that are no mapping": (
        lambda: torchdrop.add_stochastic_depth(mlp()).load_state_dict({"version": 1, "p": 0.5}),
        r"the rates of a plan are a mapping, but got 0\.5",
    ),
    "a rate that is an array without dimensions": (
        lambda: torchdrop.add_stochastic_depth(mlp(), np.array(0.5)),
        r"p has to be a real number between 0 and 1, but got array\(0\.5\)",
    ),
    "a mode that is an array": (
        lambda: torchdrop.DropPath(0.5, torch.tensor([0.1, 0.2])),  # type: ignore[arg-type]
        r"mode has to be either 'batch' or 'row', but got tensor",
    ),
    "a generator that is none": (
        lambda: torchdrop.functional.uniform_dropout(torch.ones(2), 0.1, generator=3),  # type: ignore[arg-type]
        r"generator has to be a torch\.Generator or None, but got a int",
    ),
    "columns that are no sequence": (
        lambda: torchdrop.PathDrop(0.5, columns=3),  # type: ignore[arg-type]
        r"columns has to be a sequence of integers, but got 3",
    ),
    "branches that are no sequence": (
        lambda: torchdrop.functional.path_drop(torch.ones(2), 0.5),  # type: ignore[arg-type]
        r"branches has to be a sequence of tensors, but got a Tensor",
    ),
    "a flag that is a tensor": (
        lambda: torchdrop.DropBlock2d(0.1, per_channel=torch.ones(2)),  # type: ignore[arg-type]
        r"per_channel has to be True or False, but got tensor",
    ),
    "an image without height and width": (
        lambda: torchdrop.Cutout(2)([torch.tensor(0.1)]),
        r"an image has to have 3 dimensions .*, but got a tensor of shape \(\)",
    ),
    "batches that only look iterable": (
        lambda: torchdrop.diagnostics.recalibrate_batch_norm(conv(), np.int64(1)),  # type: ignore[arg-type]
        r"batches has to be an iterable of batches, but got int64",
    ),
    "an example that the model does not take": (
        lambda: torchdrop.diagnostics.check_order(conv(), 0.5),
        r"cannot be called with example_inputs, a float: TypeError",
    ),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_an_accident_inside_is_refused(what: str) -> None:
    call, message = FOUND[what]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# --- nothing is imported from a name that the user did not give


@pytest.mark.parametrize("name", ["victim", "resnet-victim", "torchvision:victim", "victim.net"])
def test_no_module_is_imported_but_the_one_named_before_a_colon(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"no model|no classifier"):
        models.open_model(name)
    assert "victim" not in sys.modules


def test_only_the_module_named_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the twin: the one that is named is."""
    (tmp_path / "named_by_user.py").write_text("from torch.nn import Linear as net\n")
    (tmp_path / "beside.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[str] = []
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda n: seen.append(n) or real(n))
    models.open_model("named_by_user:net")
    assert seen == ["named_by_user"]
    assert "beside" not in sys.modules
    del sys.modules["named_by_user"]
