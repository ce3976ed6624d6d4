"""Measure what a piece of work costs: floating point operations, and bytes saved for backward.

Both are counted while the work runs, so control flow, skipped branches and fused kernels are
counted as they happen. Neither depends on the speed of the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from torchdrop.internals import base_of, count_flops_without_modules, cpu_attention_operations

__all__ = ["FlopCounter", "SavedBytes", "flops", "saved_bytes"]

_Shape = tuple[int, ...]


def _cpu_attention_formulas() -> dict[Any, Callable[..., int]]:
    """Return the formulas for the FLOPs of attention on the CPU, by operation.

    PyTorch registers formulas for the attention kernels of accelerators only. The CPU kernel does
    the same work, so it gets the same formulas.
    """
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    def forward(query: _Shape, key: _Shape, value: _Shape, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def backward(
        grad_out: _Shape, query: _Shape, key: _Shape, value: _Shape, *args: Any, **kwargs: Any
    ) -> int:
        count = sdpa_backward_flop_count(grad_out, query, key, value)  # type: ignore[no-untyped-call]
        return int(count)

    operations = cpu_attention_operations()
    return {} if operations is None else dict(zip(operations, (forward, backward), strict=True))


class FlopCounter:
    """Counts the floating point operations of everything that runs inside the context.

    A multiplication and an addition count as two operations. Matrix products, convolutions and
    attention are counted, forward and backward; elementwise work, norms and pooling are not, as in
    :class:`torch.utils.flop_counter.FlopCounterMode`, which does the counting. In addition,
    ``scaled_dot_product_attention`` is counted on the CPU too.

    Example:
        >>> layer, x = torch.nn.Linear(3, 5), torch.ones(4, 3)
        >>> with FlopCounter() as counter:
        ...     _ = layer(x)
        >>> counter.total  # 2 * 4 * 3 * 5
        120
    """

    def __init__(self) -> None:
        # Imported here because it imports triton, which takes about as long as all of torchdrop.
        from torch.utils.flop_counter import FlopCounterMode

        self._mode = FlopCounterMode(display=False, custom_mapping=_cpu_attention_formulas())
        count_flops_without_modules(self._mode)

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
    """Return the floating point operations of one call ``fn(*args, **kwargs)``.

    The backward pass is counted if ``fn`` runs it. See :class:`FlopCounter` for what counts.

    Example:
        >>> flops(torch.nn.Linear(3, 5), torch.ones(4, 3))
        120
    """
    with FlopCounter() as counter:
        fn(*args, **kwargs)
    return counter.total


class SavedBytes:
    """Counts the bytes that the work inside the context saves for the backward pass.

    A storage counts once, however many operations save it or views of it. It counts in full, since
    a view keeps all of it alive. Parameters are not counted: they exist anyway.
    """

    def __init__(self) -> None:
        # The storages themselves are held, so that an address cannot be reused while counting.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._counted = 0
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor:
        base = base_of(tensor)
        if not isinstance(tensor if base is None else base, nn.Parameter):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage
        # Detached: an operation that saves its own output would otherwise refer to itself.
        return tensor.detach()

    @staticmethod
    def _unpack(tensor: Tensor) -> Tensor:
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        # The storages are released here. The hooks refer to this object, so that only the garbage
        # collector frees it, and until then the activations of several steps would accumulate.
        self._counted, self._storages = self.total, {}

    @property
    def total(self) -> int:
        """The bytes counted so far."""
        return self._counted + sum(storage.nbytes() for storage in self._storages.values())


def saved_bytes(fn: Callable[..., object], *args: Any, **kwargs: Any) -> int:
    """Return the bytes that one call ``fn(*args, **kwargs)`` saves for the backward pass.

    ``fn`` is the forward pass, best together with the loss. See :class:`SavedBytes` for what
    counts.

    Example:
        >>> x = torch.ones(4, 3, requires_grad=True)
        >>> saved_bytes(lambda: x.exp().sum())  # the result of exp: 12 float32
        48
    """
    with SavedBytes() as saved:
        fn(*args, **kwargs)
    return saved.total
