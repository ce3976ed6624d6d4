"""Layers that drop whole residual branches already, and loops that leave out whole layers.

By name, so that a vendored copy of the class counts as well.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["drops_layers", "is_mask", "mask_rate"]

_MASK_NAMES = {"StochasticDepth", "DropPath"}
_MASK_RATES = ("p", "drop_prob")


def is_mask(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that drops whole residual branches by masking."""
    name = type(module).__name__
    known = name in _MASK_NAMES or name.endswith("DropPath")
    return known and next(module.children(), None) is None and mask_rate(module) is not None


def mask_rate(module: nn.Module) -> float | None:
    """The drop probability of a masking layer; None where it has none that can be read."""
    for attribute in _MASK_RATES:
        value = getattr(module, attribute, None)
        if value is None and hasattr(module, attribute):
            return 0.0  # timm and transformers take None for 0
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def drops_layers(module: nn.Module) -> tuple[Any, float] | None:
    """Who holds the rate at which ``module`` leaves out whole layers in its loop, and the rate."""
    for holder, name in ((module, "self"), (getattr(module, "config", None), "self.config")):
        rate = getattr(holder, "layerdrop", None)
        if not isinstance(rate, float) or not 0.0 < rate <= 1.0:
            continue
        try:
            source = inspect.getsource(type(module).forward)
        except (OSError, TypeError):
            continue
        if f"{name}.layerdrop" in source:
            return holder, rate
    return None
