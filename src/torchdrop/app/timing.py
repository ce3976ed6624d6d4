"""Measure the time and the peak memory of functions, side by side in one process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["in_turn", "peak_bytes", "threads", "wait"]


def wait(device: torch.device) -> None:
    """Wait until the device has finished all work that was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads inside the context; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    clock: Callable[[], float] | None = None,
    begin: int = 0,
) -> Iterator[dict[str, float]]:
    """Yield the milliseconds that each function takes, round after round, without end.

    Each round calls every function once and begins with another one, so that other load on the
    machine affects all of them alike. The device is synchronised before each reading of the clock.

    Args:
        runs: The functions, by name.
        device: The device that they run on.
        clock: Returns seconds, from any origin; time.perf_counter if not given.
        begin: The number of the first round, which decides the function it begins with.
    """
    read = clock or time.perf_counter
    names = list(runs)
    for turn in count(begin):
        first = turn % len(names)
        taken = {}
        for name in names[first:] + names[:first]:
            wait(device)
            start = read()
            runs[name]()
            wait(device)
            taken[name] = 1e3 * (read() - start)
        yield taken


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak of the memory that a call allocates, above what was allocated before it.

    It is read from the allocator of an accelerator; on a CPU from torch's profiler, which records
    every allocation. None where the allocator keeps no record (MPS).
    """
    if device.type == "cpu":
        with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            run()
        now = most = 0
        events = seen.profiler.kineto_results.events()
        for event in sorted(events, key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most
    if device.type == "mps":
        return None
    wait(device)
    before = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    run()
    wait(device)
    return int(torch.accelerator.max_memory_allocated(device) - before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what the profiler's C++ library writes to standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
