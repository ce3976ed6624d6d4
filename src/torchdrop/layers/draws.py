"""Draw the random masks and noise of the layers that multiply, on the device of the activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "can_read_on_host",
    "draw_noise",
    "in_memory_format_of",
    "keep_mask",
    "multiply_and_round_once",
    "random_hit_indices",
    "random_integers",
    "under_transform",
]


def keep_mask(
    shape: Sequence[int],
    p: float | Tensor,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A boolean mask, True with probability ``1 - p`` independently in each place.

    The uniform numbers are float32 whatever the activation is, so the rate does not depend on the
    dtype of the activation: P(True) is ``1 - p`` to within 2**-24.
    """
    # rand is in [0, 1): p=0 keeps everything, p=1 nothing. bernoulli_ fails under vmap, rand works.
    if generator is None:  # the overload that takes one refuses symbolic sizes under compile
        return torch.rand(shape, device=device, dtype=torch.float32) >= p
    return torch.rand(shape, device=device, dtype=torch.float32, generator=generator) >= p


def draw_noise(
    kind: Callable[..., Tensor],  # torch.rand or torch.randn
    x: Tensor,
    generator: torch.Generator | None = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Numbers for the elements of ``x``, float64 for float64 and float32 for any other dtype."""
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
    """Integers from 0 to ``end - 1``, uniform."""
    if generator is None:  # see keep_mask
        return torch.randint(end, shape, device=device)
    return torch.randint(end, shape, device=device, generator=generator)


def under_transform() -> bool:
    """Whether something other than plain eager autograd looks on.

    A compiler, vmap and its like, or a dispatch mode (fake tensors, make_fx) would not survive, or
    would not see, that random numbers are read on the host.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def can_read_on_host(x: Tensor) -> bool:
    """Whether what is drawn for ``x`` may be read on the host, and costs no waiting there."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not under_transform()
        and not _batched_the_old_way(x)
    )


def _batched_the_old_way(x: Tensor) -> bool:
    """Whether autograd.grad(is_grads_batched=True) is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_legacy_batchedtensor(x)


def in_memory_format_of(x: Tensor, drawn: Tensor) -> Tensor:
    """What was drawn for ``x``, in its memory format, so that what is computed from both has it."""
    if torch._C._are_functorch_transforms_active() or _batched_the_old_way(x):
        return drawn  # a batched tensor does not tell its format
    for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == ndim and x.is_contiguous(memory_format=memory_format):
            return drawn.contiguous(memory_format=memory_format)
    return drawn


def random_hit_indices(total: int, p: float, generator: torch.Generator | None = None) -> Tensor:
    """The ascending indices, on the host, of the places among ``total`` that are hit.

    Each is hit with probability ``p``, independently. Only the gaps between hits are drawn, which
    are geometric: for small ``p`` that costs a fraction of one number a place. They are float64, so
    that small rates are exact too.
    """
    if p >= 1.0:
        return torch.arange(total, device="cpu")
    parts: list[Tensor] = []
    reached = -1.0
    while reached < total:
        rest = (total - reached) * p
        draws = int(rest + 6.0 * math.sqrt(rest)) + 8  # seldom too few; then once more
        gap = torch.rand(draws, generator=generator, dtype=torch.float64, device="cpu")
        # 1 - rand is in (0, 1], and P(gap >= k) = P(1 - rand <= (1 - p)**k) = (1 - p)**k.
        gap.neg_().log1p_().div_(math.log1p(-p)).floor_().add_(1.0)
        parts.append(gap.cumsum_(0).add_(reached))
        reached = float(parts[-1][-1])
    hits = parts[0] if len(parts) == 1 else torch.cat(parts)
    return hits[: int(torch.searchsorted(hits, float(total)))].long()


def multiply_and_round_once(x: Tensor, noise: Tensor) -> Tensor:
    """``x * noise``, multiplied in the precision of the noise and rounded to ``x.dtype`` once."""
    return (x * noise).to(x.dtype)
