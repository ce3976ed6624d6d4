"""Draw which rows of a batch are kept, on the host.

Rows are drawn from torch's global CPU generator: their number is then known without waiting for a
device, ``torch.manual_seed`` governs the draw, and activation checkpointing replays it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from torchdrop.rows.collectives import in_group
from torchdrop.rows.shared_numbers import shared_numbers

__all__ = [
    "ROW_SAMPLERS",
    "host_generator",
    "keep_batch",
    "keep_rows",
    "order_rows",
    "refuse_recording",
]

_HOST = torch.device("cpu")  # a default device that the user set must not take over


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
