"""The states of the global random number generators of Python, NumPy and torch."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torchdrop.internals import TorchDispatchMode

__all__ = [
    "RandomStates",
    "TorchDraws",
    "device_state",
    "generator_states",
    "set_device_state",
    "set_generator_states",
]


class RandomStates:
    """The states that the global generators of Python, NumPy and torch have at its creation.

    Args:
        devices: The devices whose generators are included, besides those of the CPU.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        numpy = sys.modules.get("numpy")
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._numpy = numpy.random.get_state() if numpy is not None else None
        self._devices = {
            device: device_state(device) for device in devices if device.type not in _NO_GENERATOR
        }

    def changed(self, *, alone: bool) -> bool:
        """Whether random numbers were drawn on the CPU since this object was created.

        Args:
            alone: Whether this is the only thread. If not, torch's generator is not compared,
                because another thread may have used it.
        """
        now = RandomStates()
        arrays = False
        if self._numpy is not None and now._numpy is not None:
            arrays = self._numpy[2] != now._numpy[2]
            arrays = arrays or bool((self._numpy[1] != now._numpy[1]).any())
        if alone and not torch.equal(self._torch, now._torch):
            return True
        return arrays or self._python != now._python

    def differ_from(self, later: RandomStates) -> bool:
        """Whether torch's generators drew numbers between these states and ``later``."""
        if not torch.equal(self._torch, later._torch):
            return True
        both = self._devices.keys() & later._devices.keys()
        return any(not torch.equal(self._devices[d], later._devices[d]) for d in both)

    def restore(self) -> None:
        """Set all generators to these states."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for device, state in self._devices.items():
            set_device_state(device, state)


_CPU = torch.device("cpu")
_NO_GENERATOR = ("cpu", "meta")  # the state of the CPU's generator is in RandomStates._torch


def device_state(device: torch.device) -> Tensor:
    """Return the state of the generator of ``device``, which must not be the CPU."""
    module: Any = torch.get_device_module(device)
    state: Tensor = module.get_rng_state(*_index(device))
    return state


def set_device_state(device: torch.device, state: Tensor) -> None:
    """Set the generator of ``device`` to ``state``."""
    if device.type == "cpu":
        torch.set_rng_state(state)
        return
    module: Any = torch.get_device_module(device)
    module.set_rng_state(state, *_index(device))


def generator_states(leaves: Iterable[Any]) -> dict[Any, Tensor]:
    """Return the states of the generators that an operation with these arguments may use.

    The keys are devices and generators.

    Args:
        leaves: The arguments, without containers.
    """
    found: dict[Any, Tensor] = {_CPU: torch.get_rng_state()}
    for leaf in leaves:
        if isinstance(leaf, torch.Generator):
            found[leaf] = leaf.get_state()
            continue
        device = leaf.device if isinstance(leaf, Tensor) else leaf
        if isinstance(device, torch.device) and device.type not in _NO_GENERATOR:
            found[device] = device_state(device)
    return found


def set_generator_states(states: dict[Any, Tensor]) -> None:
    """Set generators to the states that :func:`generator_states` returned."""
    for key, state in states.items():
        if isinstance(key, torch.Generator):
            key.set_state(state)
        else:
            set_device_state(key, state)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """Return the argument that names ``device``; torch.mps has one device and takes no argument."""
    return () if device.type == "mps" else (device,)


class TorchDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records in ``drawn`` whether this thread draws random numbers of torch."""

    drawn = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.drawn = self.drawn or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
