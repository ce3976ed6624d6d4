"""The ``forward`` slot of a module: what stands there, and how it gets there and away again.

It is an attribute of the instance, past its class, and an object instead of a closure, so that what
is attached can be copied, pickled and known again.
"""

from __future__ import annotations

import inspect
from typing import Any, Self

from torch import nn

from torchdrop.finding.existing_drops import drops_layers
from torchdrop.internals import (
    replicate_for_data_parallel,
    set_replicate_method,
    unset_replicate_method,
)

__all__ = [
    "LayerDropBypass",
    "MaskBypass",
    "SlotOccupant",
    "clear_slot",
    "occupant_of",
    "put_in_slot",
]


class SlotOccupant:
    """What stands in the ``forward`` slot of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def __signature__(self) -> inspect.Signature:
        # Others read it: to choose the columns of a data set, to bind arguments.
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def for_copy(self, module: nn.Module) -> Self:
        """The same, with the same state, for another instance of its module."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, module=module)
        return twin


class _Replicate:
    """Rebinds what is attached when DataParallel makes a replica of a block."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        module = self.module
        replica = replicate_for_data_parallel(module)
        put_in_slot(replica, module.__dict__["forward"].for_copy(replica))
        return replica


class MaskBypass(SlotOccupant):
    """Stands in the ``forward`` slot of a masking layer that was taken over: the identity."""

    takes_over = True  # what the layer is told from now on has no effect

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return ``x``: what the layer masked is decided elsewhere now."""
        return x


class LayerDropBypass(MaskBypass):
    """Stands in the ``forward`` slot of a module that leaves out whole layers in its loop.

    While it runs, its own rate is 0: what it left out is decided elsewhere now.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module without its own drop."""
        module = self.module
        found = drops_layers(module)
        if found is None:
            return type(module).forward(module, *args, **kwargs)
        holder, rate = found
        holder.layerdrop = 0.0
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            holder.layerdrop = rate


def put_in_slot(module: nn.Module, what: SlotOccupant) -> None:
    """Put ``what`` into the ``forward`` slot of ``module``: on the instance, past its class."""
    object.__setattr__(module, "forward", what)
    set_replicate_method(module, _Replicate(module))


def clear_slot(module: nn.Module) -> None:
    """Undo :func:`put_in_slot`, also where it was interrupted between its two lines."""
    unset_replicate_method(module)
    del module.__dict__["forward"]  # last: as long as it is there, it is known to be attached


def occupant_of(module: nn.Module) -> SlotOccupant | None:
    """What torchdrop put on ``module`` itself, or None."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, SlotOccupant) else None
