"""The global random numbers of Python, NumPy and torch: were any drawn; put them back."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["RandomStates", "TorchDraws"]


class RandomStates:
    """The global random numbers of Python, numpy and torch, as they are now."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def changed(self, *, alone: bool) -> bool:
        """Whether any was drawn; of those of torch that is known here of one thread ``alone``."""
        now = RandomStates()
        arrays = False
        if self._numpy is not None and now._numpy is not None:
            arrays = self._numpy[2] != now._numpy[2]
            arrays = arrays or bool((self._numpy[1] != now._numpy[1]).any())
        if alone and not torch.equal(self._torch, now._torch):
            return True
        return arrays or self._python != now._python

    def restore(self) -> None:
        """Put all of them back to where they were."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


class TorchDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whether this thread draws random numbers of torch."""

    drawn = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.drawn = self.drawn or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
