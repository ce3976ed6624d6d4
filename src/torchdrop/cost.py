"""What a piece of work costs: floating point operations, and bytes kept for backward.

Both are counted while the work really runs, so control flow, skipped branches and fused kernels
are seen as they are. Neither depends on the machine's speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

__all__ = ["FlopCounter", "SavedBytes", "flops", "saved_bytes"]

_Shape = tuple[int, ...]


def _attention(query: _Shape, key: _Shape, value: _Shape, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    grad_out: _Shape, query: _Shape, key: _Shape, value: _Shape, *args: Any, **kwargs: Any
) -> int:
    count = sdpa_backward_flop_count(grad_out, query, key, value)  # type: ignore[no-untyped-call]
    return int(count)


# torch registers formulas for the attention kernels of accelerators only. The kernel of the CPU
# does the same work, so it gets torch's own formulas.
_CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Untracked:
    """Stands in for the counter's module tracker: only the total is asked for.

    The tracker hangs hooks on the gradients of every module, which is most of the time that
    counting takes, and raises on views of parameters that are made without gradients.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class FlopCounter:
    """Counts the floating point operations of everything that runs inside it.

    A multiplication and an addition count as two operations. Matrix products, convolutions and
    attention are counted, forward and backward; elementwise work, norms and pooling are not, as in
    :class:`torch.utils.flop_counter.FlopCounterMode`, which does the counting. On top of it,
    ``scaled_dot_product_attention`` is counted on the CPU too.

    Example:
        >>> layer, x = torch.nn.Linear(3, 5), torch.ones(4, 3)
        >>> with FlopCounter() as counter:
        ...     _ = layer(x)
        >>> counter.total  # 2 * 4 * 3 * 5
        120
    """

    def __init__(self) -> None:
        self._mode = FlopCounterMode(display=False, custom_mapping=dict(_CPU_ATTENTION))
        self._mode.mod_tracker = _Untracked()  # type: ignore[assignment]

    @property
    def total(self) -> int:
        """The operations counted so far."""
        return int(self._mode.get_total_flops())

    def __enter__(self) -> FlopCounter:
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]


def flops(fn: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """The floating point operations of one call ``fn(*args, **kwargs)``.

    Backward is counted where ``fn`` runs it. See :class:`FlopCounter` for what counts.

    Example:
        >>> flops(torch.nn.Linear(3, 5), torch.ones(4, 3))
        120
    """
    with FlopCounter() as counter:
        fn(*args, **kwargs)
    return counter.total


class SavedBytes:
    """Counts the bytes that the work inside it keeps for backward.

    Every storage counts once, however many operations save it or views of it, and counts in full,
    since a view keeps all of it alive. Parameters are not counted: they are there anyway.
    """

    def __init__(self) -> None:
        # The storages themselves are held, so that an address cannot be reused while counting.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._counted = 0
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor:
        owner = tensor if tensor._base is None else tensor._base
        if not isinstance(owner, nn.Parameter):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage
        # Detached, or an operation that saves its own output would refer to itself.
        return tensor.detach()

    @staticmethod
    def _unpack(tensor: Tensor) -> Tensor:
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        # Let go now: the hooks refer to this object, so it is freed by the garbage collector only,
        # and the activations of a few steps would pile up before.
        self._counted, self._storages = self.total, {}

    @property
    def total(self) -> int:
        """The bytes counted so far."""
        return self._counted + sum(storage.nbytes() for storage in self._storages.values())


def saved_bytes(fn: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """The bytes that one call ``fn(*args, **kwargs)`` keeps for backward.

    ``fn`` is the forward pass, best with the loss. See :class:`SavedBytes` for what counts.

    Example:
        >>> x = torch.ones(4, 3, requires_grad=True)
        >>> saved_bytes(lambda: x.exp().sum())  # the result of exp: 12 float32
        48
    """
    with SavedBytes() as saved:
        fn(*args, **kwargs)
    return saved.total
