"""Run a module and leave it as it was: its buffers, its training flags, the random numbers.

Each context manager restores one of these; :func:`unchanged` restores all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchdrop.internals import buffers_of
from torchdrop.tracing.random_states import RandomStates

__all__ = [
    "BufferCopies",
    "attention_fast_path_off",
    "devices_of",
    "random_numbers_restored",
    "training_flags_restored",
    "unchanged",
]


class BufferCopies:
    """Replaces all buffers of some modules by copies inside a ``with`` statement.

    Nothing is written into the buffers themselves. So neither their values nor their versions
    change, and a later backward pass can use the buffers that autograd saved.
    """

    def __init__(self, *modules: nn.Module) -> None:
        copies: dict[int, Tensor] = {}  # a shared buffer stays shared
        self._places: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        for module in dict.fromkeys(m for top in modules for m in top.modules()):
            for name, buffer in buffers_of(module).items():
                if buffer is not None and not is_lazy(buffer):
                    copy = copies.setdefault(id(buffer), buffer.detach().clone())
                    self._places.append((module, name, buffer, copy))

    def __enter__(self) -> Self:
        for module, name, _, copy in self._places:
            buffers_of(module)[name] = copy
        return self

    def __exit__(self, *exception: object) -> None:
        for module, name, original, _ in self._places:
            buffers_of(module)[name] = original

    def reset(self) -> None:
        """Set the copies to the values of the original buffers again."""
        with torch.no_grad():
            for module, name, original, copy in self._places:
                buffers_of(module)[name] = copy
                # always: BatchNorm changes its statistics without a new version of the tensor
                copy.copy_(original)

    def keep(self, wanted: Callable[[nn.Module], bool]) -> None:
        """Write the copies into the original buffers of those modules that ``wanted`` accepts."""
        with torch.no_grad():
            for module, name, original, copy in self._places:
                if wanted(module):
                    now = buffers_of(module)[name]
                    original.copy_(copy if now is None else now)


@contextmanager
def training_flags_restored(*modules: nn.Module) -> Iterator[None]:
    """Restore ``training`` of every module in ``modules``."""
    flags = [(m, m.training) for top in modules for m in top.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def random_numbers_restored(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restore the global random numbers of Python, NumPy and torch, on the host and ``devices``."""
    states = RandomStates(devices)
    try:
        yield
    finally:
        states.restore()


@contextmanager
def attention_fast_path_off() -> Iterator[None]:
    """Switch off the fused attention that torch uses in evaluation: it calls no submodules."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def devices_of(*modules: nn.Module) -> set[torch.device]:
    """Return the devices of the parameters and buffers of ``modules``."""
    return {t.device for m in modules for t in (*m.parameters(), *m.buffers())}


@contextmanager
def unchanged(*modules: nn.Module, devices: Iterable[torch.device] = ()) -> Iterator[BufferCopies]:
    """Restore buffers, training flags and random numbers at the end, also after an error.

    Args:
        modules: The modules that are run.
        devices: Devices that are used besides those of the parameters and buffers.
    """
    with (
        training_flags_restored(*modules),
        random_numbers_restored({*devices, *devices_of(*modules)}),
        BufferCopies(*modules) as buffers,
    ):
        yield buffers
