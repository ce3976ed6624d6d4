"""Save for backward the tensor that rows were gathered from, instead of a copy of the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torchdrop.internals import innermost_saved_tensor_hooks, modifications_of
from torchdrop.rows.take_and_add import take

__all__ = ["regather_in_backward"]


class regather_in_backward:  # noqa: N801 (used as a statement, like saved_tensors_hooks)
    """Inside this context, gathered rows that a branch saves for backward are gathered again there.

    If the tensor that rows were gathered from is saved anyway, saving the rows too takes memory
    for nothing. This context saves that tensor and the indices in their place, once for each
    gathered tensor.

    The hooks of an outer context (a checkpoint, ``save_on_cpu``) get the whole tensor instead of
    its rows.

    Args:
        taken: Pairs of the gathered rows and the tensor that they were gathered from.
        rows: The indices of the rows.
        dim: The dimension of the rows.
    """

    def __init__(self, taken: Sequence[tuple[Tensor, Tensor]], rows: Tensor, dim: int) -> None:
        self._taken = {id(some): (some, x.detach()) for some, x in taken}
        self._rows, self._dim = rows, dim
        self._outer: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> None:
        if not self._taken:
            return
        enabled, self._outer = innermost_saved_tensor_hooks()
        if enabled:
            self._hooks = saved_tensors_hooks(self._pack, self._unpack)
            self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
            self._hooks = None

    def _pack(self, tensor: Tensor) -> tuple[Any, ...]:
        _, x = self._taken.pop(id(tensor), (None, None))
        if not self._taken:
            # All gathered tensors were saved. From here on the hooks would only take time, a few
            # microseconds for every saved tensor.
            self.__exit__()
        whole = tensor if x is None else x
        packed = whole if self._outer is None else self._outer[0](whole)
        return packed, modifications_of(whole), x is not None

    def _unpack(self, saved: tuple[Any, ...]) -> Tensor:
        packed, version, gathered = saved
        whole: Tensor = packed if self._outer is None else self._outer[1](packed)
        # With hooks PyTorch does not check for writes in between, so it is checked here.
        if self._outer is None and modifications_of(whole) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(whole.shape)} is at version "
                f"{modifications_of(whole)}; expected version {version} instead"
            )
        return take(whole, self._rows, self._dim) if gathered else whole
