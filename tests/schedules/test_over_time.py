"""The rules over training time: laws, the lists of the papers, and bad arguments."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchdrop.schedules import over_time

rates = st.floats(0, 1)

# One rule of each kind, as a function of one rate.
KINDS: dict[str, Callable[[float], over_time.TimeRule]] = {
    "constant": over_time.constant,
    "ramp": lambda p: over_time.ramp(0.0, p),
    "cosine": lambda p: over_time.cosine(p, 0.0),
    "steps": lambda p: over_time.steps([(0.1, p), (0.6, 0.0)]),
    "steps, joined": lambda p: over_time.steps([(0.1, p), (0.6, 0.0)], joined=True),
    "early": lambda p: over_time.early(p, 0.3),
    "early, constant": lambda p: over_time.early(p, 0.3, "constant"),
    "late": lambda p: over_time.late(p, 0.5),
    "progressive": lambda p: over_time.progressive(1.0 - p),
    "scheduled_drop_path": over_time.scheduled_drop_path,
    "curriculum": over_time.curriculum,
}
EACH = pytest.mark.parametrize("kind", KINDS)


def test_every_rule_is_tested() -> None:
    made = {KINDS[kind](0.5).name for kind in KINDS}
    assert made == set(over_time.__all__) - {"TimeRule", "check_progress"}


def breaks_a_law(rule: Callable[[float], float], p: float, progress: float) -> str | None:
    """Which law of a rule up to ``p`` does not hold, or None."""
    rate = rule(progress)
    if type(rate) is not float or not 0.0 <= rate <= p * (1 + 1e-12) + 1e-15:
        return "a float from 0 to p"
    if rule(progress) != rate:
        return "the same rate each time"
    return None


@EACH
@given(p=rates, progress=rates)
def test_a_rule_holds_the_laws(kind: str, p: float, progress: float) -> None:
    assert breaks_a_law(KINDS[kind](p), p, progress) is None
    assert KINDS[kind](0.0)(progress) == 0.0


def test_a_rule_can_break_each_law() -> None:
    assert breaks_a_law(lambda t: 2 * t, 0.5, 0.9) == "a float from 0 to p"
    assert breaks_a_law(lambda t: 0, 0.5, 0.9) == "a float from 0 to p"
    falling = iter([0.3, 0.2])
    assert breaks_a_law(lambda t: next(falling), 0.5, 0.9) == "the same rate each time"


@EACH
def test_a_rule_prints_and_pickles_itself(kind: str) -> None:
    rule = KINDS[kind](0.25)
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule
    assert hash(rule) == hash(copy.deepcopy(rule))
    made = eval(repr(rule), vars(over_time))  # the text is the call that makes it
    assert made == rule


@EACH
@pytest.mark.parametrize("progress", [-0.1, 1.0001, math.nan, math.inf])
def test_progress_outside_0_1_is_refused(kind: str, progress: float) -> None:
    with pytest.raises(ValueError, match=r"progress has to be between 0 and 1, such as step"):
        KINDS[kind](0.5)(progress)


@pytest.mark.parametrize("progress", ["0.5", None, True, torch.tensor(0.5), [0.5]])
def test_progress_that_is_no_number_is_refused(progress: Any) -> None:
    with pytest.raises(TypeError, match=r"progress has to be a real number between 0 and 1"):
        over_time.constant(0.5)(progress)


# Lists written by hand from the formulas, at progress 0, .25, .5, .75, 1.


def at_quarters(rule: Callable[[float], float]) -> list[float]:
    return [rule(t / 4) for t in range(5)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (over_time.constant(0.3), [0.3, 0.3, 0.3, 0.3, 0.3]),
        (over_time.ramp(0.1, 0.5), [0.1, 0.2, 0.3, 0.4, 0.5]),
        (over_time.ramp(0.4, 0.0), [0.4, 0.3, 0.2, 0.1, 0.0]),
        (over_time.cosine(0.2, 0.0), [0.2, 0.1707107, 0.1, 0.0292893, 0.0]),
        (over_time.steps([(0, 0.2), (0.25, 0.05), (1, 0)]), [0.2, 0.05, 0.05, 0.05, 0.0]),
        # Zipformer: ScheduledFloat((0, .2), (4000, .05), (16000, 0))
        (
            over_time.steps([(0, 0.2), (0.25, 0.05), (1, 0)], joined=True),
            [0.2, 0.05, 0.0333333, 0.0166667, 0.0],
        ),
        (over_time.steps([(0.5, 0.1)]), [0.1, 0.1, 0.1, 0.1, 0.1]),
        (over_time.early(0.4, 0.5), [0.4, 0.2, 0.0, 0.0, 0.0]),
        (over_time.early(0.4, 0.5, "constant"), [0.4, 0.4, 0.0, 0.0, 0.0]),
        (over_time.late(0.4, 0.5), [0.0, 0.0, 0.4, 0.4, 0.4]),
        (over_time.scheduled_drop_path(0.2), [0.0, 0.05, 0.1, 0.15, 0.2]),
        # 1 - ((1 - .5) exp(-4 t) + .5)
        (over_time.progressive(0.5, 4.0), [0.0, 0.3160603, 0.4323324, 0.4751065, 0.4908422]),
        # 1 - ((1 - .8) exp(-4 t) + .8)
        (over_time.curriculum(0.2, 4.0), [0.0, 0.1264241, 0.1729329, 0.1900426, 0.1963369]),
    ],
    ids=repr,
)
def test_a_rule_gives_the_rates_of_its_paper(
    rule: Callable[[float], float], expected: list[float]
) -> None:
    assert at_quarters(rule) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("decay", ["linear", "constant"])
def test_early_and_late_are_those_of_the_authors_up_to_one_step(decay: str) -> None:
    """The authors give n early steps np.linspace(p, 0, n), or n times p; then zeros."""
    p, steps, cutoff = 0.3, 200, 50
    theirs = [
        0.0 if i >= cutoff else p * (1 - i / (cutoff - 1)) if decay == "linear" else p
        for i in range(steps)
    ]
    rule = over_time.early(p, cutoff / steps, decay)
    ours = [rule(i / steps) for i in range(steps)]
    most = p / (cutoff - 1) if decay == "linear" else 0.0
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= most + 1e-12
    since = over_time.late(p, cutoff / steps)
    assert [since(i / steps) for i in range(steps)] == [0.0] * cutoff + [p] * (steps - cutoff)


def test_rates_by_step_are_those_of_deepspeed() -> None:
    """DeepSpeed keeps with (1 - theta) * exp(-gamma * step) + theta, gamma .001 a step."""
    steps = 5000
    rule = over_time.progressive(0.5, 0.001 * steps)
    for step in (0, 1, 10, 1000, 4999):
        kept = (1.0 - 0.5) * math.exp(-0.001 * step) + 0.5
        assert rule(step / steps) == pytest.approx(1 - kept, abs=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: over_time.constant(1.5), ValueError, "between 0 and 1"),
        (lambda: over_time.ramp(0.0, "1"), TypeError, "end has to be a real number"),
        (lambda: over_time.ramp(-0.1, 0.5), ValueError, "start has to be between 0 and 1"),
        (lambda: over_time.steps([]), TypeError, r"a list of \(progress, rate\)"),
        (lambda: over_time.steps("ab"), TypeError, r"a list of \(progress, rate\)"),
        (lambda: over_time.steps([0.1]), TypeError, r"points\[0\] has to be \(progress, rate\)"),
        (lambda: over_time.steps([(0, 0.1), (0, 0.2)]), ValueError, "above that of the one before"),
        (lambda: over_time.steps([(0, 2.0)]), ValueError, r"the rate of points\[0\] has to be"),
        (lambda: over_time.steps([(2, 0.1)]), ValueError, r"the progress of points\[0\] has"),
        (lambda: over_time.steps([(0, 0.1)], joined=1), TypeError, "joined has to be True or"),
        (lambda: over_time.early(0.1, 0.0), ValueError, "until has to be above 0"),
        (lambda: over_time.early(0.1, 0.5, "cosine"), ValueError, "'linear' or 'constant'"),
        (lambda: over_time.late(0.1, 1.5), ValueError, "since has to be between 0 and 1"),
        (lambda: over_time.progressive(0.5, -1.0), ValueError, "gamma has to be 0 or more"),
        (lambda: over_time.progressive(0.5, "1"), TypeError, "gamma has to be a real number"),
        (lambda: over_time.curriculum(0.5, math.inf), ValueError, "gamma has to be 0 or more"),
    ],
)
def test_bad_arguments_are_named(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
