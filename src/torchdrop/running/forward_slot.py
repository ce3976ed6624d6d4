"""The ``forward`` slot of a module: the objects that torchdrop puts there, and how.

The slot is the attribute ``forward`` of the instance, which Python finds before the method of the
class. It holds an object rather than a function, so that a model with stochastic depth can be
copied and pickled, and so that torchdrop recognises its own objects.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import MethodType
from typing import Any, Self

import torch
from torch import nn

from torchdrop.finding.existing_drops import layerdrop_of
from torchdrop.internals import (
    in_backward_pass,
    replicate_for_data_parallel,
    set_replicate_method,
    unset_replicate_method,
)
from torchdrop.tracing.own_forward import HOOKED, is_hooked, own_forward, replaced_forward

__all__ = [
    "LayerDropBypass",
    "MaskBypass",
    "MaskRest",
    "SlotOccupant",
    "clear_slot",
    "is_wrapped",
    "occupant_of",
    "put_in_slot",
    "runs_own_forward",
]


# How many wrappers around an occupant are looked through.
_WRAPPERS = 5


class SlotOccupant:
    """An object in the ``forward`` slot of a module. It is called instead of the forward."""

    #: The function that was bound to the module in place of the forward of its class; None if none.
    replaced: Callable[..., Any] | None = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> inspect.Signature:
        # Libraries read it, for instance to select the columns of a data set for a model.
        forward = self.replaced or type(self.module).forward
        return inspect.signature(forward.__get__(self.module))  # a compiler reads this form

    def run_own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward."""
        return (self.replaced or type(self.module).forward)(self.module, *args, **kwargs)

    def for_copy(self, module: nn.Module) -> Self:
        """Return an occupant for ``module``, a replica of its module, that shares all state."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, module=module)
        return twin


class _Replicate:
    """Called when DataParallel makes a replica of a block: gives it an occupant of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        module = self.module
        replica = replicate_for_data_parallel(module)
        if (occupant := occupant_of(module)) is not None:
            put_in_slot(replica, occupant.for_copy(replica))
        return replica


class MaskRest(threading.local):
    """How many sites of a model are running in training, in each thread.

    The model's own masking layers rest meanwhile. Otherwise they act: a method other than forward
    may be called, or a layer may be in training although its block is not.
    """

    depth = 0

    def __reduce__(self) -> tuple[type[MaskRest], tuple[()]]:
        return MaskRest, ()  # in a copy nothing is running


class MaskBypass(SlotOccupant):
    """Makes a masking layer inactive while a site drops the branch that the layer masks.

    Args:
        module: The layer.
        rest: Tells whether a site is running.
    """

    replaces_layer = True  # read by the layers of torchdrop, whose rate then cannot be set

    def __init__(self, module: nn.Module, rest: MaskRest) -> None:
        super().__init__(module)
        self.rest = rest
        # Whether the layer was inactive in its last call outside of a backward pass. A checkpoint
        # inside a branch repeats that call in the backward pass, in which no site runs.
        self.rested = False

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ``x`` while a site runs, else what the layer itself returns."""
        # A compiler does not know threads. It compiles the forward, so a site is running.
        if torch.compiler.is_compiling():
            return x
        if self.rest.depth or not in_backward_pass():
            self.rested = self.rest.depth > 0
        if self.rested:
            return x
        return self.run_own((x, *args), kwargs)


class LayerDropBypass(SlotOccupant):
    """Makes the ``layerdrop`` of a module inactive, the rate at which its loop skips layers.

    The module runs with the rate 0, because sites drop its layers.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with ``layerdrop`` 0."""
        module = self.module
        found = layerdrop_of(module)
        if found is None:
            return self.run_own(args, kwargs)
        holder, rate = found
        holder.layerdrop = 0.0
        try:
            return self.run_own(args, kwargs)
        finally:
            holder.layerdrop = rate


def put_in_slot(module: nn.Module, occupant: SlotOccupant) -> None:
    """Put ``occupant`` into the ``forward`` slot of ``module``.

    If a device hook has replaced the forward before, the hook calls ``occupant`` instead of it.
    ``occupant`` keeps a function that was bound to the module in place of the forward of its class.
    """
    occupant.replaced = replaced_forward(module)
    # not with setattr, because the class of the module may define __setattr__
    object.__setattr__(module, HOOKED if is_hooked(module) else "forward", occupant)
    set_replicate_method(module, _Replicate(module))


def clear_slot(module: nn.Module) -> None:
    """Undo :func:`put_in_slot`, even if it was interrupted between its two assignments."""
    unset_replicate_method(module)
    replaced = replaced_forward(module)
    if not isinstance(module.__dict__.get("forward"), SlotOccupant):
        object.__setattr__(module, HOOKED, MethodType(own_forward(module), module))
    elif replaced is not None:
        object.__setattr__(module, "forward", MethodType(replaced, module))
    else:
        del module.__dict__["forward"]  # last, because occupant_of reads it


def runs_own_forward(module: nn.Module) -> bool:
    """Whether it is known what runs when ``module`` is called: see :func:`own_forward`."""
    found = module.__dict__.get("forward")
    bound = isinstance(found, MethodType) and found.__self__ is module
    return found is None or bound or is_hooked(module)


def is_wrapped(module: nn.Module) -> bool:
    """Whether something that torchdrop cannot undo has wrapped the occupant of ``module``."""
    own = (module.__dict__.get(name) for name in ("forward", HOOKED))
    return not any(isinstance(found, SlotOccupant) for found in own)


def occupant_of(module: nn.Module) -> SlotOccupant | None:
    """Return the object that torchdrop put into the slot of ``module``; None without one.

    Others may have wrapped it since: device hooks, functools.partial, functions.
    """
    found = module.__dict__.get("forward")
    if found is None or isinstance(found, SlotOccupant):
        return found
    hooked = module.__dict__.get(HOOKED)
    return hooked if isinstance(hooked, SlotOccupant) else _wrapped_in(found, module, _WRAPPERS)


def _wrapped_in(wrapper: Any, module: nn.Module, levels: int) -> SlotOccupant | None:
    """Return the occupant of ``module`` that ``wrapper`` calls, as far as it shows that."""
    if isinstance(wrapper, SlotOccupant):
        return wrapper if wrapper.module is module else None
    if levels == 0:
        return None
    inner: list[Any] = [getattr(wrapper, "__wrapped__", None)]
    if isinstance(wrapper, partial):
        inner += [wrapper.func, *wrapper.args, *wrapper.keywords.values()]
    if isinstance(wrapper, MethodType):
        inner.append(wrapper.__func__)
    for cell in getattr(wrapper, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            inner.append(cell.cell_contents)
    inner = [i for i in inner if callable(i) and not isinstance(i, nn.Module | type)]
    found = (_wrapped_in(i, module, levels - 1) for i in inner)
    return next((occupant for occupant in found if occupant is not None), None)
