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
    """Context in which gathered rows are not saved for backward, but gathered again in backward.

    If the tensor that rows were gathered from is saved anyway, saving the rows as well wastes
    memory. The first time that an operation inside this context saves a tensor of gathered rows,
    the tensor that they were gathered from and the indices are saved instead. If another operation
    saves the gathered rows again, they are saved themselves.

    The hooks of an outer context (a checkpoint, ``save_on_cpu``) get the whole tensor instead of
    its rows.

    Args:
        taken: Pairs of the gathered rows and the tensor that they were gathered from.
        rows: The indices of the rows.
        dim: The dimension of the rows.
    """

    def __init__(self, taken: Sequence[tuple[Tensor, Tensor]], rows: Tensor, dim: int) -> None:
        # The gathered rows are stored too: while they exist, no other tensor gets their id.
        self._taken = {id(gathered): (gathered, x.detach()) for gathered, x in taken}
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
        """Return what is saved for ``tensor``: a tensor, its version, whether to gather from it."""
        _, x = self._taken.pop(id(tensor), (None, None))
        if not self._taken:
            # All gathered tensors were saved. From here on the hooks would only take time, a few
            # microseconds for every saved tensor.
            self.__exit__()
        to_save = tensor if x is None else x
        packed = to_save if self._outer is None else self._outer[0](to_save)
        return packed, modifications_of(to_save), x is not None

    def _unpack(self, saved: tuple[Any, ...]) -> Tensor:
        """Return the tensor for which :func:`_pack` returned ``saved``."""
        packed, version, is_source = saved
        tensor: Tensor = packed if self._outer is None else self._outer[1](packed)
        # PyTorch does not check whether a tensor that a hook saved was written into meanwhile, so
        # it is checked here. An outer hook may return another tensor, with a version of its own.
        if self._outer is None and modifications_of(tensor) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(tensor.shape)} is at version "
                f"{modifications_of(tensor)}; expected version {version} instead; write into a "
                "copy of it, or after the backward pass"
            )
        return take(tensor, self._rows, self._dim) if is_source else tensor
