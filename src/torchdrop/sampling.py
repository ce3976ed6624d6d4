"""Who is kept. The one place where torchdrop draws random numbers that decide about structure.

Two kinds of draw. A *mask* is drawn on the device of the activation, for layers that multiply.
*Rows* are drawn on the host, from torch's global CPU generator, for code that computes only what
is kept: the number of rows is then known without waiting for a device, ``torch.manual_seed``
governs it, and activation checkpointing restores it.
"""

from __future__ import annotations

import hashlib
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = [
    "MODES",
    "ROW_SAMPLERS",
    "SharedNumbers",
    "draw",
    "host_generator",
    "in_group",
    "integers",
    "keep_batch",
    "keep_mask",
    "keep_rows",
    "laid_out_like",
    "order_rows",
    "rare_hits",
    "readable",
    "refuse_recording",
    "shared_numbers",
    "transformed",
]

MODES = ("row", "batch")

_HOST = torch.device("cpu")  # a default device that the user set must not take over


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


def draw(
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


def integers(
    end: int,
    shape: Sequence[int],
    device: torch.device | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Integers from 0 to ``end - 1``, uniform."""
    if generator is None:  # see keep_mask
        return torch.randint(end, shape, device=device)
    return torch.randint(end, shape, device=device, generator=generator)


def transformed() -> bool:
    """Whether something other than plain eager autograd looks on.

    A compiler, vmap and its like, or a dispatch mode (fake tensors, make_fx) would not survive, or
    would not see, that random numbers are read on the host.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def readable(x: Tensor) -> bool:
    """Whether what is drawn for ``x`` may be read on the host, and costs no waiting there."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not transformed()
        and not _batched_the_old_way(x)
    )


def _batched_the_old_way(x: Tensor) -> bool:
    """Whether autograd.grad(is_grads_batched=True) is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_legacy_batchedtensor(x)


def laid_out_like(x: Tensor, drawn: Tensor) -> Tensor:
    """What was drawn for ``x``, in its memory format, so that what is computed from both has it."""
    if torch._C._are_functorch_transforms_active() or _batched_the_old_way(x):
        return drawn  # a batched tensor does not tell its format
    for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == ndim and x.is_contiguous(memory_format=memory_format):
            return drawn.contiguous(memory_format=memory_format)
    return drawn


def rare_hits(total: int, p: float, generator: torch.Generator | None = None) -> Tensor:
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


def in_group() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _group() -> Any:
    return dist.group.WORLD


def host_generator(*, alike: bool = False) -> torch.Generator | None:
    """None for the global generator; in a process group, one that also depends on the rank.

    Ranks that were all seeded alike would otherwise drop the same rows. The seed is drawn from
    the global generator, so ``torch.manual_seed`` and a checkpoint's recompute govern it still.
    With ``alike`` it is one that all ranks have alike instead.
    """
    if alike and shared_numbers.shared():
        return torch.Generator("cpu").manual_seed(shared_numbers.draw())
    if alike or not in_group():
        return None
    seed = int(torch.randint(2**62, (), device="cpu"))
    return torch.Generator("cpu").manual_seed(
        (seed ^ (dist.get_rank() * 0x9E3779B97F4A7C15)) % 2**63
    )


# Each of the three returns all rows of the batch, the kept ones first, and how many are kept.


def _exact(batch: int, p: float, generator: torch.Generator | None) -> tuple[Tensor, int]:
    kept = _rounded_at_random(batch * (1.0 - p), generator)
    return torch.randperm(batch, generator=generator, device=_HOST), kept


def _independent(batch: int, p: float, generator: torch.Generator | None) -> tuple[Tensor, int]:
    dropped = torch.rand(batch, generator=generator, device="cpu") < p
    return dropped.to(torch.uint8).argsort(stable=True), batch - int(dropped.sum())


def _window(batch: int, p: float, generator: torch.Generator | None) -> tuple[Tensor, int]:
    kept = _rounded_at_random(batch * (1.0 - p), generator)
    start = int(torch.randint(max(batch, 1), (), generator=generator, device="cpu"))
    return (torch.arange(batch, device="cpu") + start) % max(batch, 1), kept


def _rounded_at_random(count: float, generator: torch.Generator | None) -> int:
    whole = int(count)
    rest = count - whole
    # float64, so that a count that misses an integer by one ulp is rounded wrongly never.
    return whole + int(rest > 0 and _uniform(generator) < rest)


def _uniform(generator: torch.Generator | None = None) -> float:
    # One element, not none: that is how torch.rand returns soonest.
    drawn = torch.rand(1, generator=generator, dtype=torch.float64, device=_HOST)
    return drawn.item()


ROW_SAMPLERS: dict[str, Callable[[int, float, Any], tuple[Tensor, int]]] = {
    "exact": _exact,
    "independent": _independent,
    "window": _window,
}


def keep_rows(batch: int, p: float, sampling: str = "exact") -> Tensor:
    """The indices, ascending and on the host, of the rows of a batch that are kept.

    Every row is kept with probability exactly ``1 - p`` under each rule:

    * ``"exact"``: a uniformly random subset of ``batch * (1 - p)`` rows. Where that is no integer
      it is rounded up with probability equal to its fraction, else down, so the mean is exact.
    * ``"independent"``: one Bernoulli draw a row, as in timm and torchvision.
    * ``"window"``: a cyclic run of rows with a uniformly random start, as many as ``"exact"``.
    """
    rows, kept = order_rows(batch, p, sampling)
    return rows[:kept].sort().values


def order_rows(batch: int, p: float, sampling: str = "exact") -> tuple[Tensor, int]:
    """All rows of a batch, on the host, those that :func:`keep_rows` keeps first; their number."""
    _refuse_draws_of_their_own()
    return ROW_SAMPLERS[sampling](batch, p, host_generator())


def _refuse_draws_of_their_own() -> None:
    """Refuse vmap(randomness="different"): what runs can be decided only once for all it maps."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    functorch = torch._C._functorch
    for level in functorch.get_interpreter_stack() or ():
        if level.key() == functorch.TransformType.Vmap and (
            functorch.CVmapInterpreterPtr(level).randomness() == functorch.RandomnessType.Different
        ):
            raise RuntimeError(
                "stochastic depth decides on the host what is computed, once for everything that "
                "vmap maps over; pass randomness='same' to vmap"
            )


def refuse_recording(x: Tensor) -> None:
    """Refuse a CUDA graph that is recorded now: each replay would repeat what is drawn here."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "what stochastic depth computes is drawn on the host, and a CUDA graph that is "
            "recorded now (torch.cuda.graph, make_graphed_callables) would repeat this one draw in "
            "every replay; record the model in evaluation, or use "
            "torch.compile(mode='reduce-overhead'), which draws anew for each replay"
        )


def keep_batch(p: float, sync_ranks: bool | None = False) -> bool:
    """Whether the whole batch is kept: True with probability ``1 - p`` (one draw).

    In a process group all ranks get the same answer, unless ``sync_ranks`` is False.
    """
    _refuse_draws_of_their_own()
    if sync_ranks is not False and shared_numbers.shared():
        return shared_numbers.draw() / 2**53 >= p
    return _uniform() >= p


class SharedNumbers:
    """Random numbers that every rank of the process group draws alike, each by itself.

    Number n since ``torch.manual_seed`` is a function of n and of the seed of rank 0. How far its
    own seed is from that one a rank is told once, with the first number of all (one broadcast); so
    later seeds are followed without talking, as long as they are as far apart as the first ones.

    Every number also draws a token from the global generator, and is filed under it. A token that
    comes again says that the generator was put back, and the number is the one of that time: for
    a checkpoint's recompute, which sees nothing but the generator; and after a reseed with a seed
    that was used before, from where on counting starts again.
    """

    # Numbers that may wait for their recompute, and seeds that are remembered, at the same time.
    _WAITING = 2**14
    _SEEDS = 256

    def __init__(self) -> None:
        self._group: Any = None
        self._apart = 0
        # By the seed of rank 0: the token of its first number, and the count of numbers.
        self._streams: dict[int, tuple[int | None, int]] = {}
        self._filed: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()
        self._alone = 0

    def shared(self) -> bool:
        """Whether there are other ranks to be like."""
        return not self._alone and in_group()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What runs inside runs on this rank only: it asks nobody, and counts for nobody."""
        self._alone += 1
        try:
            yield
        finally:
            self._alone -= 1

    def draw(self) -> int:
        """An integer of 53 bits."""
        seed = (torch.initial_seed() - self._seeds_apart()) % 2**64
        token = int(torch.randint(2**62, (), device="cpu"))
        with self._lock:
            first, count = self._streams.pop(seed, (token, 0))
            known = 0 if token == first else self._filed.get((seed, token))
            number = count if known is None else known
            # A checkpoint's recompute looks up; anything else goes on from where it is.
            if known is None or torch._C._current_graph_task_id() == -1:
                count = number + 1
            self._streams[seed] = first, count
            self._filed[seed, token] = number
            if len(self._filed) > self._WAITING:
                del self._filed[next(iter(self._filed))]
            if len(self._streams) > self._SEEDS:
                del self._streams[next(iter(self._streams))]
        digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 11

    def _seeds_apart(self) -> int:
        group = _group()
        if self._group is None or self._group() is not group:
            mine = torch.initial_seed()
            theirs = [mine]
            dist.broadcast_object_list(theirs, src=0)
            self._apart = mine - theirs[0]
            if self._group is not None:  # other ranks than before, who know nothing of those
                self._streams.clear()
                self._filed.clear()
            self._group = weakref.ref(group)
        return self._apart

    def state_dict(self) -> dict[str, int] | None:
        """Where the numbers are; None where no rank has drawn any. The same on all ranks."""
        if not self._streams:
            return None
        seed = next(reversed(self._streams))
        return {"seed": seed, "count": self._streams[seed][1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there as soon as the generator has that seed again."""
        if not (
            isinstance(state, Mapping)
            and all(type(state.get(name)) is int and state[name] >= 0 for name in ("seed", "count"))
        ):
            raise ValueError(
                f"shared_numbers has to be a seed and a count, integers from 0, but got {state!r}"
            )
        self._streams.pop(state["seed"], None)
        self._streams[state["seed"]] = None, state["count"]


# One for the process, as is the generator whose seed it follows.
shared_numbers = SharedNumbers()
