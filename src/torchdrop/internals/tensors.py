"""Tell how a tensor is used: writes, views, references, and tensors saved for backward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torchdrop.internals.missing import import_error, warn_once
from torchdrop.internals.surroundings import (
    DisableTorchFunction,
    disable_dispatch_modes,
    is_legacy_batched_tensor,
)

try:
    from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
except ImportError as error:
    raise import_error(error) from error

__all__ = [
    "base_of",
    "count_references",
    "innermost_saved_tensor_hooks",
    "is_python_autograd_node",
    "may_be_saved_by_producer",
    "modifications_of",
    "own_saved_tensor_hooks",
    "saved_by_producer",
    "tree_flatten",
    "tree_map_only",
    "tree_unflatten",
]

# tree_flatten, tree_unflatten, tree_map_only (torch.utils._pytree): find the tensors in nested
#   containers as PyTorch itself does.


#: How often the memory of a tensor was written into: ``Tensor._version``. With it torchdrop notices
#: a branch that writes into its input, and a saved tensor that was written into before the backward
#: pass. Without it those calls raise an AttributeError. For an inference tensor, which has no such
#: counter, it raises a RuntimeError.
modifications_of: Callable[[Tensor], int] = attrgetter("_version")


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor that ``tensor`` is a view of, or None: ``Tensor._base``.

    A view shares the memory of its base: writing into the view changes the base, and keeping the
    view keeps all of the base. Without it the calls that use it raise an AttributeError.
    """
    return tensor._base


_tensor_use_count: Any = getattr(Tensor, "_use_count", None)
_storage_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


def count_references(tensors: tuple[Tensor, ...]) -> tuple[int, int, int] | None:
    """Return how many references there are to the first of ``tensors``.

    A gradient to which nothing else has a reference may be written into, as autograd itself does. A
    count that misses a reference would give wrong gradients, so the first call checks that each
    kind of reference is counted. Uses ``Tensor._use_count``, ``torch._C._storage_Use_Count`` and
    ``UntypedStorage._cdata``. Without them gradients are copied, and a warning is given once.

    Returns:
        The references to the tensor from Python and from C++, and those to its memory; None if they
        cannot be counted.
    """
    first: Any = tensors[0]
    if type(first) is not Tensor or is_legacy_batched_tensor(first) or not _counts_references():
        return None
    return _count(tensors)


def _count(tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
    """Return the result of :func:`count_references`, without any checks."""
    first: Any = tensors[0]
    storage = first.untyped_storage()
    memory = _storage_use_count(storage._cdata) + sys.getrefcount(storage)
    return sys.getrefcount(first), _tensor_use_count(first), memory


@cache
def _counts_references() -> bool:
    """Whether :func:`_count` counts each kind of reference to a tensor."""
    try:
        with DisableTorchFunction(), disable_dispatch_modes(), torch.inference_mode(False):
            leaf = torch.ones(2, device="cpu", requires_grad=True)
            mine = (torch.ones(2, device="cpu"),)
            alone = _count(mine)
            name = mine[0]
            by_python = _count(mine)
            del name
            part = mine[0][1:]
            by_part = _count(mine)
            del part
            leaf.grad = mine[0]
            by_torch = _count(mine)
            leaf.grad = None
            works = (
                by_python[0] > alone[0]
                and by_part[2] > alone[2]
                and by_torch[1] > alone[1]
                and _count(mine) == alone
            )
    except (AttributeError, TypeError):
        works = False
    if not works:
        warn_once(
            "Tensor._use_count, torch._C._storage_Use_Count or UntypedStorage._cdata",
            "the backward pass of torchdrop copies gradients that it could write into",
        )
    return works


# The attributes under which an autograd node saves its own output (ReLU, sigmoid, softmax, an
# autograd function in Python). They are looked up in the class only: to read one from the node
# would unpack the saved tensor, which in a checkpointed region starts the recomputation.
_SAVED_OUTPUT = ("_saved_result", "_saved_result0", "_saved_output", "saved_tensors")


def saved_by_producer(tensor: Tensor) -> bool:
    """Whether the operation that made ``tensor`` saves it for backward, as ReLU saves its result.

    Uses the name ``_saved_result`` of the classes of autograd nodes. Rows of such a tensor need not
    be saved a second time. Without the name they are, which takes memory; a warning is given once.
    """
    _check_saved_names()
    return tensor.grad_fn is not None and hasattr(type(tensor.grad_fn), "_saved_result")


def may_be_saved_by_producer(tensor: Tensor) -> bool:
    """Whether the operation that made ``tensor`` may save it for backward, under any known name.

    Uses the names ``_saved_result``, ``_saved_result0``, ``_saved_output`` and ``saved_tensors`` of
    the classes of autograd nodes. A tensor that is saved must not be written into. If a name is
    missing, PyTorch's backward pass raises an error about such a write; for the first name a
    warning is given once as well.
    """
    _check_saved_names()
    return any(hasattr(type(tensor.grad_fn), name) for name in _SAVED_OUTPUT)


@cache
def _check_saved_names() -> None:
    """Warn once if the autograd node of ReLU does not save its output as ``_saved_result``."""
    with torch.enable_grad(), torch.inference_mode(False), own_saved_tensor_hooks():
        node = torch.zeros(1, device="cpu", requires_grad=True).relu().grad_fn
    if not hasattr(type(node), "_saved_result"):
        warn_once(
            "_saved_result on the autograd node of ReLU",
            "rows of a tensor that PyTorch saves for backward are saved a second time",
        )


def innermost_saved_tensor_hooks() -> tuple[bool, Any]:
    """Return whether saved-tensor hooks may be set now, and the innermost pair that is set.

    Uses ``torch._C._autograd._saved_tensors_hooks_is_enabled`` and
    ``_top_saved_tensors_default_hooks``. PyTorch calls the innermost pair only, so torchdrop's own
    hooks have to call the pair that was innermost before. Without it torchdrop sets no hooks: rows
    are saved in addition to the tensor that they were gathered from, and a warning is given once.

    Returns:
        ``(False, None)`` where hooks must not be set; else True and the pair, or None.
    """
    autograd: Any = torch._C._autograd
    try:
        if not autograd._saved_tensors_hooks_is_enabled():
            return False, None
        return True, autograd._top_saved_tensors_default_hooks(False)
    except AttributeError:
        warn_once(
            "torch._C._autograd._top_saved_tensors_default_hooks",
            "rows are saved for backward in addition to the tensor that they were gathered from",
        )
        return False, None


def is_python_autograd_node(node: Any) -> bool:
    """Whether ``node`` of an autograd graph belongs to a ``torch.autograd.Function`` in Python.

    Uses ``torch.autograd.function.BackwardCFunction``, the base class of such nodes. The gradients
    of such a function have to be compared, because it may mix rows in the backward pass only.
    Without the class the call raises an AttributeError.
    """
    return isinstance(node, torch.autograd.function.BackwardCFunction)


@contextmanager
def own_saved_tensor_hooks() -> Iterator[Any]:
    """Hide the tensors that are saved inside the ``with`` from saved-tensor hooks of the user.

    A checkpoint counts the tensors that its forward saves, and raises if the recomputation saves
    another number of them. The context returns the pair of hooks that is innermost inside the
    ``with``; see :func:`innermost_saved_tensor_hooks`.
    """
    allowed, outer = innermost_saved_tensor_hooks()
    if not allowed or outer is None:
        yield outer
        return
    with saved_tensors_hooks(_unchanged, _unchanged):
        yield innermost_saved_tensor_hooks()[1]


def _unchanged(saved: Tensor) -> Tensor:
    return saved
