"""The forward of a module as a function: that of its class, or the one that has replaced it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType, MethodType
from typing import Any

from torch import nn

__all__ = ["HOOKED", "is_hooked", "own_forward", "replaced_forward", "signature_of_forward"]

# Device hooks, such as those of Accelerate, store the original forward in this attribute.
HOOKED = "_old_forward"


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward of ``module`` as a function that takes the module first."""
    return replaced_forward(module) or type(module).forward


def replaced_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that was bound to ``module`` in place of the forward of its class.

    Patches with other kernels do this: ``module.forward = types.MethodType(function, module)``.
    None if there is none, or if it is not known what computes the module.
    """
    hooked = is_hooked(module)
    found = module.__dict__.get(HOOKED if hooked else "forward")
    if isinstance(found, MethodType) and found.__self__ is module:
        return None if found.__func__ is type(module).forward else found.__func__
    # what torchdrop puts into the slot keeps the function
    kept: Callable[..., Any] | None = getattr(found, "replaced", None)
    return kept


def is_hooked(module: nn.Module) -> bool:
    """Whether a device hook replaces the forward of ``module`` and calls the original one.

    Hooks such as those of Accelerate keep the forward that they call in an attribute. If a bound
    function has replaced the forward and does not name the attribute, it holds a backup.
    """
    forward, old = (module.__dict__.get(name) for name in ("forward", HOOKED))
    if forward is None or hasattr(forward, "replaced"):
        return False
    if not (hasattr(old, "replaced") or (isinstance(old, MethodType) and old.__self__ is module)):
        return False
    bound = isinstance(forward, MethodType) and forward.__self__ is module
    code = getattr(getattr(forward, "__func__", None), "__code__", None)
    return not bound or not isinstance(code, CodeType) or _names(code, HOOKED)


def _names(code: CodeType, name: str) -> bool:
    """Whether a function, or one that is defined in it, uses an attribute of this name."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return name in (*code.co_names, *code.co_consts) or any(_names(c, name) for c in inner)


def signature_of_forward(module: nn.Module) -> inspect.Signature:
    """Return the signature of :func:`own_forward`, without the module itself."""
    return inspect.signature(MethodType(own_forward(module), module))
