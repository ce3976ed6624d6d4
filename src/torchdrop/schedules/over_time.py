"""Rules over training time: functions of the progress of training that return a drop rate.

Progress is a number in [0, 1]: the steps taken over the steps of the whole training. A rule knows
nothing about depth. Whoever applies its rate (:func:`torchdrop.apply_schedule`) spreads it over the
blocks by the depth rule of the model.

Any function of progress is a rule. Those of this module print themselves and can be pickled.

    >>> from torchdrop.schedules import over_time
    >>> rule = over_time.ramp(0.0, 0.2)
    >>> rule(0.5)
    0.1
    >>> rule
    ramp(start=0.0, end=0.2)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torchdrop.schedules.depth_rules import check_rate

__all__ = [
    "TimeRule",
    "check_progress",
    "constant",
    "cosine",
    "curriculum",
    "early",
    "late",
    "progressive",
    "ramp",
    "scheduled_drop_path",
    "steps",
]


def check_progress(progress: object, name: str = "progress") -> float:
    """Return ``progress`` as a float.

    Raises:
        TypeError: It is not a real number.
        ValueError: It is NaN or lies outside [0, 1].
    """
    if isinstance(progress, bool) or not isinstance(progress, Real):
        raise TypeError(
            f"{name} has to be a real number between 0 and 1, such as step / steps, but got "
            f"{progress!r} of type {type(progress).__name__}"
        )
    value = float(progress)
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name} has to be between 0 and 1, such as step / steps, but got {progress}"
        )
    return value


@dataclass(frozen=True)
class TimeRule:
    """A rule over training time. Call it with the progress of training, in [0, 1].

    Attributes:
        name: The name of the function that made it.
        arguments: The arguments of that function.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, progress: float) -> float:
        """Return the rate at ``progress``.

        Raises:
            TypeError, ValueError: ``progress`` is not a number in [0, 1].
        """
        formula = _FORMULAS[self.name]
        return formula(check_progress(progress), **dict(self.arguments))

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments)
        return f"{self.name}({given})"


def _rule(name: str, **arguments: Any) -> TimeRule:
    return TimeRule(name, tuple(arguments.items()))


def constant(p: float) -> TimeRule:
    """Return a rule whose rate is always p."""
    return _rule("constant", p=check_rate(p))


def ramp(start: float, end: float) -> TimeRule:
    """Return the rule that goes from ``start`` to ``end`` in a line.

    ``rate(t) = start + (end - start) * t``
    """
    return _rule("ramp", start=check_rate(start, "start"), end=check_rate(end, "end"))


def cosine(start: float, end: float) -> TimeRule:
    """Return the rule that goes from ``start`` to ``end`` along half a cosine.

    ``rate(t) = end + (start - end) * (1 + cos(pi * t)) / 2``, slow at both ends, as learning rates
    are annealed (Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5).
    """
    return _rule("cosine", start=check_rate(start, "start"), end=check_rate(end, "end"))


def steps(points: Sequence[tuple[float, float]], *, joined: bool = False) -> TimeRule:
    """Return the rule that goes through points ``(progress, rate)``.

    Args:
        points: The points, by rising progress. Before the first one the rate is that of the first.
        joined: If False, the rate is that of the last point reached, and jumps. If True, the points
            are joined by lines, as in Zipformer (Yao et al. 2024, arXiv:2310.11230), and the rate
            is that of the last point after it.

    Raises:
        TypeError, ValueError: A point is not a pair of numbers in [0, 1], there is no point, or
            progress does not rise.
    """
    given: Any = points
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not given:
        raise TypeError(f"points has to be a list of (progress, rate), but got {points!r}")
    if not isinstance(joined, bool):
        raise TypeError(f"joined has to be True or False, but got {joined!r}")
    checked: list[tuple[float, float]] = []
    for i, point in enumerate(given):
        pair: Any = point
        if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"points[{i}] has to be (progress, rate), but got {point!r}")
        progress = check_progress(point[0], f"the progress of points[{i}]")
        if checked and progress <= checked[-1][0]:
            raise ValueError(
                f"the progress of each point has to be above that of the one before, but "
                f"points[{i}] has {progress:g} after {checked[-1][0]:g}"
            )
        checked.append((progress, check_rate(point[1], f"the rate of points[{i}]")))
    return _rule("steps", points=tuple(checked), joined=joined)


def early(p: float, until: float, decay: str = "linear") -> TimeRule:
    """Return the rule of early dropout: a rate in the first part of training, then 0.

    Liu et al. 2023, "Dropout Reduces Underfitting", arXiv:2303.01500, for models that
    *under*fit.

    Args:
        p: The rate at the start.
        until: The progress from which the rate is 0, in (0, 1].
        decay: ``"linear"``: the rate falls in a line, ``p * (1 - t / until)``. ``"constant"``: it
            stays at p until then.

    The authors' code gives step i of n early steps ``p * (1 - i / (n - 1))``, so that the last of
    them already has the rate 0; this rule gives it ``p * (1 - i / n)``.
    """
    if decay not in ("linear", "constant"):
        raise ValueError(f"decay has to be 'linear' or 'constant', but got {decay!r}")
    return _rule("early", p=check_rate(p), until=_check_part(until, "until"), decay=decay)


def late(p: float, since: float) -> TimeRule:
    """Return the rule of late dropout: the rate is 0 before ``since``, and then p.

    Liu et al. 2023, arXiv:2303.01500, for models that overfit.

    Args:
        p: The rate in the last part of training.
        since: The progress at which it begins, in [0, 1].
    """
    return _rule("late", p=check_rate(p), since=check_progress(since, "since"))


def progressive(theta: float = 0.5, gamma: float = 100.0) -> TimeRule:
    """Return the rule of progressive layer dropping, which raises the rate from 0 to ``1 - theta``.

    ``rate(t) = (1 - theta) * (1 - exp(-gamma * t))``. Zhang & He 2020, arXiv:2010.13369, who write
    it for the probability of keeping. With the depth rule ``"linear"`` it is their schedule over
    time and depth.

    Args:
        theta: The probability of keeping a layer at the end, in [0, 1].
        gamma: How fast the rate rises. In the paper and in DeepSpeed gamma belongs to a step; times
            the number of steps it is this one. The paper recommends 100 over the number of steps.
    """
    return _rule("progressive", theta=check_rate(theta, "theta"), gamma=_check_speed(gamma))


def scheduled_drop_path(p: float) -> TimeRule:
    """Return the rule of ScheduledDropPath: from 0 to p in a line.

    Zoph et al. 2018, arXiv:1707.07012. It equals ``ramp(0, p)``. The code of NASNet combines it
    with the depth rule ``"linear"``.
    """
    return _rule("scheduled_drop_path", p=check_rate(p))


def curriculum(p: float, gamma: float = 10.0) -> TimeRule:
    """Return the rule of curriculum dropout, which raises the rate from 0 towards p.

    ``rate(t) = p * (1 - exp(-gamma * t))``. Morerio et al. 2017, arXiv:1703.06229, who write it
    for the probability of keeping, ``1 - p``.

    Args:
        p: The rate that it approaches.
        gamma: How fast the rate rises. In the paper gamma belongs to a step, and is 10 over the
            number of steps.
    """
    return _rule("curriculum", p=check_rate(p), gamma=_check_speed(gamma))


def _check_part(value: object, name: str) -> float:
    part = check_progress(value, name)
    if part == 0.0:
        raise ValueError(f"{name} has to be above 0, but got {value}")
    return part


def _check_speed(gamma: object) -> float:
    if isinstance(gamma, bool) or not isinstance(gamma, Real):
        raise TypeError(f"gamma has to be a real number, but got {gamma!r}")
    value = float(gamma)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"gamma has to be 0 or more, and finite, but got {gamma}")
    return value


# The formulas. Each gets progress and the checked arguments.


def _ramp(t: float, start: float, end: float) -> float:
    # In this form the rates at 0 and 1 are exactly start and end.
    return start * (1.0 - t) + end * t


def _cosine(t: float, start: float, end: float) -> float:
    return _ramp((1.0 - math.cos(math.pi * t)) / 2.0, start, end)


def _steps(t: float, points: tuple[tuple[float, float], ...], joined: bool) -> float:
    reached = bisect_right([progress for progress, _ in points], t)
    if reached == 0:
        return points[0][1]
    (since, rate), following = points[reached - 1], points[reached : reached + 1]
    if not joined or not following:
        return rate
    ((until, target),) = following
    return _ramp((t - since) / (until - since), rate, target)


def _early(t: float, p: float, until: float, decay: str) -> float:
    if t >= until:
        return 0.0
    return p * (1.0 - t / until) if decay == "linear" else p


def _late(t: float, p: float, since: float) -> float:
    return p if t >= since else 0.0


def _saturating(t: float, p: float, gamma: float) -> float:
    return p * -math.expm1(-gamma * t)


_FORMULAS: dict[str, Callable[..., float]] = {
    "constant": lambda t, p: p,
    "ramp": _ramp,
    "cosine": _cosine,
    "steps": _steps,
    "early": _early,
    "late": _late,
    "progressive": lambda t, theta, gamma: _saturating(t, 1.0 - theta, gamma),
    "scheduled_drop_path": lambda t, p: p * t,
    "curriculum": _saturating,
}
