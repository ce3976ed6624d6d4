"""Marks for torch.compile, without importing torch._dynamo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from torchdrop.internals.missing import warn_once

__all__ = [
    "compiler_runs",
    "dynamo_was_imported",
    "leave_frame_uncompiled",
    "mark_first_size_symbolic",
]


def _never() -> None:
    return None


#: What compiles the functions that are called now; None if they run as they are. Uses
#: ``torch._C._dynamo.eval_frame.get_eval_frame_callback``. In batch mode a graph ends at each draw,
#: and what follows is compiled only if it is a function of its own. Without it the code between two
#: branches is not compiled in batch mode, which only the test notices.
compiler_runs: Callable[[], Any] = getattr(
    torch._C._dynamo.eval_frame, "get_eval_frame_callback", _never
)


def dynamo_was_imported() -> bool:
    """Whether ``torch._dynamo`` was imported; if not, nothing was compiled.

    Importing it takes seconds. If PyTorch names it differently, compiled parts of a model stay
    compiled while a diagnostic runs.
    """
    return "torch._dynamo" in sys.modules


def mark_first_size_symbolic(tensor: Tensor, *, value_known: bool, largest: int, hint: int) -> None:
    """Let a compiler treat the size of dimension 0 of ``tensor`` as a symbol, not as a constant.

    Sets the attributes that ``torch._dynamo.maybe_mark_dynamic`` and ``mark_unbacked`` set, since
    importing ``torch._dynamo`` takes seconds. If PyTorch reads other attributes, every drop rate
    compiles a new graph, which only the test notices.

    Args:
        tensor: A tensor that a compiled function will read.
        value_known: Whether the compiler may know the present size. It then compiles again when a
            decision that it made by this size no longer holds.
        largest: The largest possible size, if it is not known. The smallest is 1.
        hint: The size for which the compiler plans loops, if it is not known.
    """
    marks: dict[str, Any]
    if value_known:
        marks = {"_dynamo_weak_dynamic_indices": {0}}
    else:
        marks = {
            "_dynamo_unbacked_indices": {0},
            "_dynamo_unbacked_bounds": {0: (1, largest)},
            "_dynamo_hint_overrides": {0: hint},
            "_specialize_on": {0: []},
        }
    for name, value in marks.items():
        setattr(tensor, name, value)
    tensor._has_dynamo_dim_marking = True  # type: ignore[attr-defined]


def leave_frame_uncompiled(code: CodeType) -> None:
    """Make dynamo run ``code`` uncompiled, but still compile the functions that it calls.

    Does what ``torch._dynamo.skip`` does, with ``torch._C._dynamo.eval_frame``, since importing
    ``torch._dynamo`` takes seconds. Without it dynamo compiles torchdrop's own functions for each
    block, until its limit is reached and it compiles no more; a warning is given once.
    """
    frames: Any = torch._C._dynamo.eval_frame
    try:
        action = frames._FrameAction
        strategy = frames._FrameExecStrategy(action.SKIP, action.DEFAULT)
        frames.set_code_exec_strategy(code, strategy)
    except (AttributeError, TypeError):
        warn_once(
            "torch._C._dynamo.eval_frame.set_code_exec_strategy",
            "in batch mode torch.compile compiles torchdrop's own functions again for each block",
        )
