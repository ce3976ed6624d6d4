"""The forward of a module as a function: that of its class, or the one that has replaced it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["HOOKED", "own_forward", "replaced_forward", "signature_of_forward"]

# The attribute in which device hooks, such as those of Accelerate, keep the forward that they call.
HOOKED = "_old_forward"


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the function that computes ``module``; its first parameter is the module."""
    return replaced_forward(module) or type(module).forward


def replaced_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that was bound to ``module`` in place of the forward of its class.

    Patches with other kernels do this: ``module.forward = types.MethodType(function, module)``.
    None if there is none, or if it is not known what computes the module.
    """
    for name in ("forward", HOOKED):
        found = module.__dict__.get(name)
        if isinstance(found, MethodType) and found.__self__ is module:
            return None if found.__func__ is type(module).forward else found.__func__
        # what torchdrop puts into the slot keeps the function
        if (kept := getattr(found, "replaced", None)) is not None:
            function: Callable[..., Any] = kept
            return function
    return None


def signature_of_forward(module: nn.Module) -> inspect.Signature:
    """Return the signature of :func:`own_forward`, without the module itself."""
    return inspect.signature(MethodType(own_forward(module), module))
