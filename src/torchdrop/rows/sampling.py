"""Draw on the host which rows of a batch are kept.

Rows are drawn from torch's global CPU generator. How many are kept is then known without waiting
for a device, ``torch.manual_seed`` determines the draw, and activation checkpointing repeats it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from torchdrop.error_pages import see
from torchdrop.internals import (
    DisableTorchFunction,
    disable_dispatch_modes,
    vmap_draws_differently,
)
from torchdrop.rows.collectives import has_other_ranks
from torchdrop.rows.shared_numbers import shared_numbers

__all__ = [
    "ROW_SAMPLERS",
    "draw_row_order",
    "host_generator",
    "keep_batch",
    "keep_batch_in_usual_call",
    "keep_rows",
    "order_of_rows",
    "refuse_graph_capture",
    "refuse_nested",
    "usual_sampler",
]

_HOST = torch.device("cpu")  # given explicitly: the user may have set another default device


def host_generator(*, same_on_all_ranks: bool = False) -> torch.Generator | None:
    """Return a generator for draws on the host, or None for torch's global generator.

    With several ranks the generator also depends on the rank: ranks that were seeded with the same
    number would otherwise drop the same rows. Its seed is drawn from the global generator, so
    ``torch.manual_seed`` and the recomputation of a checkpoint determine it as well.

    Args:
        same_on_all_ranks: Return a generator that is in the same state on all ranks instead.
    """
    if same_on_all_ranks and shared_numbers.shared():
        return torch.Generator("cpu").manual_seed(shared_numbers.draw())
    if same_on_all_ranks or not has_other_ranks():
        return None
    seed = int(torch.randint(2**62, (), device="cpu"))
    # The factor is 2**64 divided by the golden ratio: its multiples differ in about half of their
    # bits, so the seeds of the ranks do too. manual_seed takes no integers of more than 64 bits.
    return torch.Generator("cpu").manual_seed(
        (seed ^ (dist.get_rank() * 0x9E3779B97F4A7C15)) % 2**63
    )


# Draws a number from [0, 1) by a generator.
_Uniform = Callable[[torch.Generator | None], float]

# Each of the three samplers returns what order_of_rows returns. The batch may be empty.
_Rows = tuple[Tensor | None, int]


def _exact(batch: int, p: float, generator: torch.Generator | None, uniform: _Uniform) -> _Rows:
    kept = _rounded_at_random(batch * (1.0 - p), generator, uniform)
    if kept in (0, batch):
        return None, kept
    return torch.randperm(batch, generator=generator, device=_HOST), kept


def _independent(
    batch: int, p: float, generator: torch.Generator | None, uniform: _Uniform
) -> _Rows:
    dropped = torch.rand(batch, generator=generator, device="cpu") < p
    # Sorted as integers, kept rows (0) come before dropped ones (1).
    return dropped.to(torch.uint8).argsort(stable=True), batch - int(dropped.sum())


def _window(batch: int, p: float, generator: torch.Generator | None, uniform: _Uniform) -> _Rows:
    kept = _rounded_at_random(batch * (1.0 - p), generator, uniform)
    # max: an upper bound of 0, as of an empty batch, is an error in randint.
    start = int(torch.randint(max(batch, 1), (), generator=generator, device="cpu"))
    return (torch.arange(batch, device="cpu") + start) % max(batch, 1), kept


def _rounded_at_random(count: float, generator: torch.Generator | None, uniform: _Uniform) -> int:
    """Round ``count`` up with probability equal to its fraction, else down."""
    whole = int(count)
    fraction = count - whole
    # ``count`` may exceed an integer by a rounding error of about 1e-16. A float64 number is
    # practically never below that, but a float32 number would be 0 once in 2**24 draws, and round
    # the count up.
    return whole + int(fraction > 0 and uniform(generator) < fraction)


def _uniform(generator: torch.Generator | None = None) -> float:
    """Draw a number uniformly from [0, 1)."""
    # The shape is (1,) and not () because torch.rand takes less time for it.
    drawn = torch.rand(1, generator=generator, dtype=torch.float64, device=_HOST)
    return drawn.item()


class _Number(threading.local):
    """A number in the memory of a tensor; a different one in each thread."""

    def __init__(self) -> None:
        # real memory, also where the first draw, or the import, is in a mode of the user
        with torch.inference_mode(False), DisableTorchFunction(), disable_dispatch_modes():
            self._tensor = torch.empty(1, dtype=torch.float64, device=_HOST)
        self.draw = self._tensor.uniform_
        # ``.item()`` takes two dispatches for the same number
        self.memory = ctypes.c_double.from_address(self._tensor.data_ptr())


_number = _Number()


def _uniform_in_place(generator: torch.Generator | None = None) -> float:
    """Draw the number that :func:`_uniform` draws, in less than half of the time.

    Only where no mode and no transform sees the draw: it writes into a tensor that exists.
    """
    _number.draw(generator=generator)
    return _number.memory.value


ROW_SAMPLERS: dict[str, Callable[[int, float, Any, _Uniform], _Rows]] = {
    "exact": _exact,
    "independent": _independent,
    "window": _window,
}


def keep_rows(batch: int, p: float, sampling: str = "exact") -> Tensor:
    """Draw which rows of a batch are kept; return their indices, ascending and on the host.

    Every row is kept with probability exactly ``1 - p`` under each rule:

    * ``"exact"``: a uniformly random subset of ``batch * (1 - p)`` rows. If that is not an integer,
      it is rounded up with probability equal to its fraction, else down, so the mean is exact.
    * ``"independent"``: one Bernoulli draw for each row, as in timm and torchvision.
    * ``"window"``: a cyclic run of rows with a uniformly random start, as many as ``"exact"``.
    """
    rows, kept = draw_row_order(batch, p, sampling)
    return rows[:kept].sort().values


def draw_row_order(batch: int, p: float, sampling: str = "exact") -> tuple[Tensor, int]:
    """Draw which rows of a batch are kept, as :func:`keep_rows` does.

    Returns:
        The indices of all rows, on the host, the kept ones first; and how many rows are kept.
    """
    _refuse_different_draws_in_vmap()
    rows, kept = order_of_rows(batch, p, sampling, host_generator())
    return torch.arange(batch, device="cpu") if rows is None else rows, kept


def order_of_rows(
    batch: int, p: float, sampling: str, generator: torch.Generator | None = None
) -> tuple[Tensor | None, int]:
    """Draw which rows of a batch are kept, by a given generator.

    Args:
        batch: The number of rows.
        p: The probability that a row is dropped.
        sampling: The rule, see :func:`keep_rows`.
        generator: The generator; None: torch's global generator.

    Returns:
        The rows; None if all rows are kept, or none, so that their order does not matter.
    """
    return ROW_SAMPLERS[sampling](batch, p, generator, _uniform)


def usual_sampler(sampling: str) -> Callable[[int, float], tuple[Tensor | None, int]]:
    """Return a function of a batch and p that draws what :func:`order_of_rows` draws.

    It may be called where no mode, transform or other rank exists.
    """
    if sampling == "exact":
        return _exact_in_place
    sampler: Callable[..., _Rows] = ROW_SAMPLERS[sampling]
    return partial(sampler, generator=None, uniform=_uniform_in_place)


def _exact_in_place(batch: int, p: float) -> _Rows:
    # the same as _exact with _uniform_in_place, but without a call of another function
    count = batch * (1.0 - p)
    kept = int(count)
    fraction = count - kept
    if fraction > 0:
        number = _number
        number.draw()
        if number.memory.value < fraction:
            kept += 1
    if kept in (0, batch):
        return None, kept
    return torch.randperm(batch, device=_HOST), kept


def _refuse_different_draws_in_vmap() -> None:
    """Raise inside ``vmap(randomness="different")``, which requires a draw for each mapped call.

    vmap runs the forward once for all mapped calls, so the rows can be drawn only once.
    """
    if not torch.compiler.is_compiling() and vmap_draws_differently():
        raise RuntimeError(
            "stochastic depth draws rows once for all calls that vmap maps over, so vmap cannot "
            "be called with randomness='different'; pass randomness='same' to vmap"
            + see("compile-and-export")
        )


def refuse_graph_capture(x: Tensor) -> None:
    """Raise while a CUDA graph is captured: each replay would repeat the same draw."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "stochastic depth draws on the host which rows are computed, and a CUDA graph that is "
            "captured now (torch.cuda.graph, make_graphed_callables) would repeat this one draw in "
            "every replay; capture the model in evaluation, or use "
            "torch.compile(mode='reduce-overhead'), which draws anew for each replay"
            + see("compile-and-export")
        )


def refuse_nested(x: Tensor) -> None:
    """Raise for a nested tensor, whose samples cannot be selected as the rows of a dimension."""
    if x.is_nested:
        raise ValueError(
            "stochastic depth needs tensors with a row for each sample, but got a nested tensor; "
            "pad it with torch.nested.to_padded_tensor(x, 0.0) and pass a mask, or call the model "
            "inside `with torchdrop.paused(model):`" + see("nested-tensors")
        )


def keep_batch(p: float, sync_ranks: bool | None = False) -> bool:
    """Draw whether the whole batch is kept: True with probability ``1 - p``.

    Args:
        p: The probability that it is dropped.
        sync_ranks: With True or None all ranks of a process group get the same result; with False
            each rank draws for itself.
    """
    _refuse_different_draws_in_vmap()
    # A shared number is an integer of 53 bits, so this is uniform in [0, 1).
    if sync_ranks is not False and shared_numbers.shared():
        return shared_numbers.draw() / 2**53 >= p
    return _uniform() >= p


def keep_batch_in_usual_call(p: float) -> bool:
    """Draw what :func:`keep_batch` draws, where no mode, transform or other rank exists."""
    return _uniform_in_place() >= p
