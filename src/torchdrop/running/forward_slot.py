"""The ``forward`` slot of a module: the objects that torchdrop puts there, and how.

The slot is the attribute ``forward`` of the instance, which Python finds before the method of the
class. It holds an object rather than a function, so that a model with stochastic depth can be
copied and pickled, and so that torchdrop recognises its own objects.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any, Self

import torch
from torch import nn

from torchdrop.finding.existing_drops import layerdrop_of
from torchdrop.internals import (
    replicate_for_data_parallel,
    set_replicate_method,
    unset_replicate_method,
)

__all__ = [
    "LayerDropBypass",
    "MaskBypass",
    "MaskRest",
    "SlotOccupant",
    "clear_slot",
    "occupant_of",
    "put_in_slot",
]


class SlotOccupant:
    """An object in the ``forward`` slot of a module. It is called instead of the forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> inspect.Signature:
        # Libraries read it, for instance to select the columns of a data set for a model.
        return inspect.signature(type(self.module).forward.__get__(self.module))

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
        put_in_slot(replica, module.__dict__["forward"].for_copy(replica))
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

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ``x`` while a site runs, else what the layer itself returns."""
        # A compiler does not know threads. It compiles the forward, so a site is running.
        if torch.compiler.is_compiling() or self.rest.depth:
            return x
        return type(self.module).forward(self.module, x, *args, **kwargs)


class LayerDropBypass(SlotOccupant):
    """Makes the ``layerdrop`` of a module inactive, the rate at which its loop skips layers.

    The module runs with the rate 0, because sites drop its layers.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with ``layerdrop`` 0."""
        module = self.module
        found = layerdrop_of(module)
        if found is None:
            return type(module).forward(module, *args, **kwargs)
        holder, rate = found
        holder.layerdrop = 0.0
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            holder.layerdrop = rate


def put_in_slot(module: nn.Module, occupant: SlotOccupant) -> None:
    """Put ``occupant`` into the ``forward`` slot of ``module``."""
    # not with setattr, because the class of the module may define __setattr__
    object.__setattr__(module, "forward", occupant)
    set_replicate_method(module, _Replicate(module))


def clear_slot(module: nn.Module) -> None:
    """Undo :func:`put_in_slot`, even if it was interrupted between its two assignments."""
    unset_replicate_method(module)
    del module.__dict__["forward"]  # last, because occupant_of reads it


def occupant_of(module: nn.Module) -> SlotOccupant | None:
    """Return the object that torchdrop put into the slot of ``module``; None without one."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, SlotOccupant) else None
