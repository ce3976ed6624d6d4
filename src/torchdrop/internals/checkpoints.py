"""Notice the calls of ``torch.utils.checkpoint.checkpoint`` that a forward makes."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.utils import checkpoint as module_of_torch

__all__ = ["notice_checkpoints"]

_REENTRANT = "CheckpointFunction"
# by the release of PyTorch
_NOT_REENTRANT = (
    "_checkpoint_without_reentrant_generator_impl",
    "_checkpoint_without_reentrant_generator",
)


@contextmanager
def notice_checkpoints(
    around: Callable[[dict[str, Any]], AbstractContextManager[None]],
) -> Iterator[None]:
    """Let ``checkpoint`` call its function without a checkpoint, in this thread.

    Replaces ``torch.utils.checkpoint.CheckpointFunction`` and
    ``torch.utils.checkpoint._checkpoint_without_reentrant_generator_impl``, which ``checkpoint``
    looks up in each call, since users have imported ``checkpoint`` itself under names of their own.
    Without them a forward that calls ``checkpoint`` is not read, and an error says so.

    Args:
        around: Gets the options of the call that are not the defaults (``preserve_rng_state`` and
            others, but not ``use_reentrant``), and returns the context in which the function is
            called.
    """
    thread = threading.get_ident()

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            if threading.get_ident() != thread:
                return before[_REENTRANT].apply(function, preserve_rng_state, *args)
            with around({} if preserve_rng_state else {"preserve_rng_state": False}):
                return function(*args)

    def replacement_of(name: str) -> Any:
        original = before[name]
        signature = inspect.signature(original)
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        arguments = {"fn", "args", "kwargs"}
        defaults = {
            k: p.default
            for k, p in signature.parameters.items()
            if p.kind not in kinds and k not in arguments
        }

        def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
            bound = signature.bind(*args, **kwargs)
            given = {
                k: v for k, v in bound.arguments.items() if k in defaults and v is not defaults[k]
            }
            with around(given):
                yield

        def start(*args: Any, **kwargs: Any) -> Iterator[None]:
            other = threading.get_ident() != thread
            started: Iterator[None] = (original if other else generator)(*args, **kwargs)
            return started

        return start

    names = [name for name in (_REENTRANT, *_NOT_REENTRANT) if hasattr(module_of_torch, name)]
    before = {name: getattr(module_of_torch, name) for name in names}
    for name in names:
        setattr(module_of_torch, name, Reentrant if name == _REENTRANT else replacement_of(name))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module_of_torch, name, value)
