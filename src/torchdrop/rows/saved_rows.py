"""Save for backward the tensor that rows were taken from, instead of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdrop.rows.take_and_add import take

__all__ = ["regather_in_backward", "saved_by_producer"]

_autograd: Any = torch._C._autograd  # untyped in part


def saved_by_producer(x: Tensor) -> bool:
    """Whether the operation that made ``x`` keeps it for backward, as ReLU keeps its result."""
    # The type tells. To ask the node itself would unpack what a checkpoint has yet to recompute.
    return x.grad_fn is not None and hasattr(type(x.grad_fn), "_saved_result")


class regather_in_backward:  # noqa: N801 (used as a statement, like saved_tensors_hooks)
    """While a branch runs: what it keeps of the rows that were taken, it takes again in backward.

    Rows of a tensor that is kept anyway would be kept besides it. In their place this keeps the
    tensor and the indices, once for each of the taken.

    Hooks of others (a checkpoint's, ``save_on_cpu``) see the whole tensor instead of its rows.

    Args:
        taken: Of what was taken, the rows and the tensor that they were taken from.
        rows: The indices of the rows.
        dim: The dimension of the rows.
    """

    def __init__(self, taken: Sequence[tuple[Tensor, Tensor]], rows: Tensor, dim: int) -> None:
        self._taken = {id(some): (some, x.detach()) for some, x in taken}
        self._rows, self._dim = rows, dim
        self._outer: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._active = False

    def __enter__(self) -> None:
        if self._taken and _autograd._saved_tensors_hooks_is_enabled():
            self._outer = _autograd._top_saved_tensors_default_hooks(False)
            _autograd._push_saved_tensors_default_hooks(self._pack, self._unpack)
            self._active = True

    def __exit__(self, *error: object) -> None:
        if self._active:
            _autograd._pop_saved_tensors_default_hooks()
            self._active = False

    def _pack(self, tensor: Tensor) -> tuple[Any, ...]:
        _, x = self._taken.pop(id(tensor), (None, None))
        if not self._taken:
            self.__exit__()  # done: hooks cost a few microseconds for every tensor that is kept
        whole = tensor if x is None else x
        packed = whole if self._outer is None else self._outer[0](whole)
        return packed, whole._version, x is not None

    def _unpack(self, kept: tuple[Any, ...]) -> Tensor:
        packed, version, again = kept
        whole: Tensor = packed if self._outer is None else self._outer[1](packed)
        if self._outer is None and whole._version != version:  # with hooks, torch does not look
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(whole.shape)} is at version "
                f"{whole._version}; expected version {version} instead"
            )
        return take(whole, self._rows, self._dim) if again else whole
