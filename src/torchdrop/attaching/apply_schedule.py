"""Set the rates of a model by a rule over training time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from torchdrop import schedules
from torchdrop.attaching.plan import Plan, get_plan
from torchdrop.checks import check_model
from torchdrop.error_pages import see
from torchdrop.layers.base import LayerWithRate
from torchdrop.layers.uniform_dropout import UniformDropout
from torchdrop.running.block_site import sites_of
from torchdrop.schedules.over_time import check_progress

__all__ = ["apply_schedule"]


def apply_schedule(
    model: nn.Module | Plan, rule: Callable[[float], float], progress: float
) -> float:
    """Set the drop rates of a model to ``rule(progress)``. Call it before each training step.

    A model with stochastic depth spreads the rate over its blocks by its own depth rule, the
    argument ``schedule`` of :func:`add_stochastic_depth`, as ``plan.set_p`` does. Each layer of
    torchdrop in the model (:class:`DropPath`, :class:`StochasticDepth`, :class:`DropBlock2d`, ...)
    gets the rate itself, :class:`UniformDropout` as its ``beta``. A model may have both. Layers
    whose masks the plan replaces are left out, because the plan drops their branches.

    Nothing depends on earlier calls, so a run that is resumed only needs its step again.

    Args:
        model: A model, or a plan. With a plan only its blocks are set, no layers.
        rule: A function of progress that returns a rate, such as one of
            :mod:`torchdrop.schedules.over_time`.
        progress: How much of the training is done: the steps taken over all steps, in [0, 1].

    Returns:
        The rate.

    Raises:
        TypeError: ``model`` is neither a module nor a plan, ``rule`` is not a function, or
            ``progress`` or what the rule returns is not a real number.
        ValueError: ``progress`` or the rate is not in [0, 1], there is nothing to set, or a layer
            does not take this rate. All rates then stay as they were.

    Example:
        >>> import torchvision, torchdrop
        >>> from torchdrop.schedules import over_time
        >>> model = torchvision.models.resnet18()
        >>> plan = torchdrop.add_stochastic_depth(model, p=0.0)
        >>> rule = over_time.ramp(0.0, 0.2)
        >>> torchdrop.apply_schedule(model, rule, progress=0.5)
        0.1
        >>> plan.blocks[-1].p
        0.1
    """
    if not callable(rule):
        raise TypeError(f"rule has to be a function of progress, but got {rule!r}")
    rate = schedules.check_rate(rule(check_progress(progress)), "rule(progress)")
    plan, layers = _targets(model)
    # A layer may refuse the rate: nothing is changed then.
    before = [(layer, name, getattr(layer, name)) for layer, name in layers]
    try:
        for layer, name in layers:
            setattr(layer, name, rate)
        if plan is not None:
            plan.set_p(rate)
            plan.note_schedule(rule, float(progress))
    except BaseException:
        for layer, name, value in before:
            setattr(layer, name, value)
        raise
    return rate


def _targets(model: Any) -> tuple[Plan | None, list[tuple[nn.Module, str]]]:
    """Return the plan of ``model``, and its layers with the names of their rates."""
    if isinstance(model, Plan):
        return model, []
    check_model(model)
    plan = get_plan(model) if sites_of(model) else None
    layers: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, LayerWithRate) and not module.is_replaced:
            layers.append((module, "p"))
        elif isinstance(module, UniformDropout):
            layers.append((module, "beta"))
    if plan is None and not layers:
        raise ValueError(
            f"this {type(model).__name__} has no stochastic depth and no layers of torchdrop, and "
            f"therefore no rate to set; call torchdrop.add_stochastic_depth(model, p) first"
            + see("rates")
        )
    return plan, layers
