"""Random masks and noise for the layers, drawn on the device of the activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchdrop.internals import (
    count_dispatch_modes,
    functorch_transforms_active,
    is_legacy_batched_tensor,
)

__all__ = [
    "along_dim",
    "can_read_on_host",
    "divisor_of_kept",
    "draw_noise",
    "in_memory_format_of",
    "keep_mask",
    "multiply_and_round_once",
    "random_hit_indices",
    "random_integers",
    "shape_of_decisions",
    "under_transform",
]


def keep_mask(
    shape: Sequence[int],
    p: float | Tensor,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a boolean mask whose elements are True with probability ``1 - p``, independently.

    The uniform numbers are always float32, so the rate does not depend on the dtype of the
    activation: P(True) is ``1 - p`` to within 2**-24.
    """
    # torch.rand gives numbers in [0, 1): p=0 keeps everything, and p=1 keeps nothing.
    # torch.rand works under vmap, where Tensor.bernoulli_ fails.
    if generator is None:  # under torch.compile, passing a generator fails for symbolic sizes
        return torch.rand(shape, device=device, dtype=torch.float32) >= p
    return torch.rand(shape, device=device, dtype=torch.float32, generator=generator) >= p


def draw_noise(
    kind: Callable[..., Tensor],
    x: Tensor,
    generator: torch.Generator | None = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Return random numbers for ``x``: on its device; float64 if it is float64, else float32.

    Args:
        kind: The distribution: torch.rand (uniform in [0, 1)) or torch.randn (normal).
        x: The tensor.
        generator: The generator to draw from, or None for the global one.
        shape: The shape of the result; by default that of ``x``.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = x.shape if shape is None else shape
    if generator is None:  # see keep_mask
        return kind(size, device=x.device, dtype=dtype)
    return kind(size, device=x.device, dtype=dtype, generator=generator)


def random_integers(
    end: int,
    shape: Sequence[int],
    device: torch.device | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return uniform random integers from 0 to ``end - 1``."""
    if generator is None:  # see keep_mask
        return torch.randint(end, shape, device=device)
    return torch.randint(end, shape, device=device, generator=generator)


def under_transform() -> bool:
    """Whether a compiler, a torch.func transform or a dispatch mode is active.

    Under one of them, random numbers must not be read on the host: torch.compile and vmap would
    fail, and dispatch modes (fake tensors, make_fx) would record the decisions as constants.
    """
    return (
        torch.compiler.is_compiling() or functorch_transforms_active() or count_dispatch_modes() > 0
    )


def can_read_on_host(x: Tensor) -> bool:
    """Whether a mask drawn on the device of ``x`` can be read on the host without waiting.

    That is so for plain CPU tensors, when no compiler, transform or dispatch mode is active.
    """
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not under_transform()
        and not _is_legacy_batched(x)
    )


def _is_legacy_batched(x: Tensor) -> bool:
    """Whether ``x`` is a tensor batched by autograd.grad(is_grads_batched=True)."""
    if torch.compiler.is_compiling():
        return False  # dynamo cannot trace the call
    return is_legacy_batched_tensor(x)


def in_memory_format_of(x: Tensor, drawn: Tensor) -> Tensor:
    """Return ``drawn`` in the memory format of ``x``.

    An elementwise operation on both then gives a result in the memory format of ``x``.
    """
    if functorch_transforms_active() or _is_legacy_batched(x):
        return drawn  # a batched tensor does not report its memory format
    for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == ndim and x.is_contiguous(memory_format=memory_format):
            return drawn.contiguous(memory_format=memory_format)
    return drawn


def random_hit_indices(total: int, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Return, on the host and in ascending order, the indices below ``total`` that are hit.

    Each index is hit with probability ``p``, independently. Only the gaps between hits, which are
    geometrically distributed, are drawn: a small ``p`` takes far fewer random numbers than one for
    each index. The numbers are float64, so that small rates are exact too.
    """
    if p >= 1.0:
        return torch.arange(total, device="cpu")
    parts: list[Tensor] = []
    reached = -1.0
    while reached < total:
        rest = (total - reached) * p
        draws = int(rest + 6.0 * math.sqrt(rest)) + 8  # rarely too few: the loop draws the rest
        gap = torch.rand(draws, generator=generator, dtype=torch.float64, device="cpu")
        # 1 - rand is in (0, 1], and P(gap >= k) = P(1 - rand <= (1 - p)**k) = (1 - p)**k.
        gap.neg_().log1p_().div_(math.log1p(-p)).floor_().add_(1.0)
        parts.append(gap.cumsum_(0).add_(reached))
        reached = float(parts[-1][-1])
    hits = parts[0] if len(parts) == 1 else torch.cat(parts)
    return hits[: int(torch.searchsorted(hits, float(total)))].long()


def shape_of_decisions(x: Tensor, *dims: int) -> list[int]:
    """Return the shape of a mask with one decision for each index of ``dims``.

    The mask has as many dimensions as ``x`` and broadcasts against it.
    """
    return [x.shape[d] if d in dims else 1 for d in range(x.dim())]


def along_dim(values: Tensor, dim: int, ndim: int) -> Tensor:
    """Return a view of the 1-d ``values`` that broadcasts along ``dim`` of ``ndim`` dimensions."""
    return values.view([-1 if d == dim else 1 for d in range(ndim)])


def divisor_of_kept(rate: float) -> float:
    """Return ``1 - rate``, by which kept values are divided so that the mean stays.

    With a rate of 1 it is 1: all values are zeros, and 0 / 0 would be NaN, forward and backward.
    """
    return 1.0 - rate if rate < 1.0 else 1.0


def multiply_and_round_once(x: Tensor, noise: Tensor) -> Tensor:
    """Return ``x * noise``, computed in the precision of the noise and rounded once."""
    return (x * noise).to(x.dtype)
