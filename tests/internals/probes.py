"""Probes: functions that try a private PyTorch API, and say what it is for if it has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from torchdrop import internals


class Probe(NamedTuple):
    names: tuple[str, ...]  # in internals
    api: str
    purpose: str
    run: Callable[[], None]


class Seen(internals.TorchDispatchMode):
    """A mode that records the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func)
        return func(*args, **(kwargs or {}))


class Probes(list[Probe]):
    """The probes of one file. As a decorator, it adds a function to them."""

    def __call__(self, *names: str, api: str, purpose: str) -> Callable[[Callable[[], None]], None]:
        def add(run: Callable[[], None]) -> None:
            self.append(Probe(names, api, purpose, run))

        return add

    def names(self) -> list[str]:
        return sorted(name for found in self for name in found.names)


def check(found: Probe) -> None:
    """Run a probe; if it fails, name the API and what torchdrop uses it for."""
    try:
        found.run()
    except Exception as error:
        pytest.fail(
            f"PyTorch {torch.__version__} changed {found.api}, which torchdrop uses to "
            f"{found.purpose} (internals.{', '.join(found.names)}): {type(error).__name__} {error}"
        )
