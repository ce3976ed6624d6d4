"""Notice checkpoints, and replace what ``checkpoint`` does while a forward is traced."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

from torch.utils import checkpoint as module_of_torch

__all__ = ["in_reentrant_checkpoint", "replace_checkpoints"]

_REENTRANT = "CheckpointFunction"
# by the release of PyTorch
_NOT_REENTRANT = (
    "_checkpoint_without_reentrant_generator_impl",
    "_checkpoint_without_reentrant_generator",
)


def in_reentrant_checkpoint() -> bool:
    """Whether this code runs in the first forward of a reentrant checkpoint, without gradients.

    Looks for a call of ``torch.utils.checkpoint.CheckpointFunction.forward``. Without that class,
    there is no reentrant checkpoint.
    """
    function = getattr(module_of_torch, _REENTRANT, None)
    code = getattr(getattr(function, "forward", None), "__code__", None)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


@contextmanager
def replace_checkpoints(
    around: Callable[[dict[str, Any], Sequence[Any]], AbstractContextManager[None]],
) -> Iterator[None]:
    """Let ``checkpoint`` call its function inside ``around(options, args)``, without a checkpoint.

    Only calls in this thread are replaced.

    Replaces ``torch.utils.checkpoint.CheckpointFunction`` and
    ``torch.utils.checkpoint._checkpoint_without_reentrant_generator_impl``. ``checkpoint`` looks
    them up in each call; it is not replaced itself, because users import it under their own names.
    Without them a forward that calls ``checkpoint`` is not read, and an error says so.

    Args:
        around: Gets the options of the call that are not the defaults (``use_reentrant=False`` is
            taken as the default) and the arguments of the function, and returns the context in
            which the function is called.
    """
    thread = threading.get_ident()

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            if threading.get_ident() != thread:
                return before[_REENTRANT].apply(function, preserve_rng_state, *args)
            options = {} if preserve_rng_state else {"preserve_rng_state": False}
            with around({"use_reentrant": True, **options}, args):
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
            with around(given, args):
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
