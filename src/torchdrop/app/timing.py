"""Clocks and memory: what a run takes, side by side with others in one process."""

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
    """Wait until the device has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads inside; None leaves their number as it is."""
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
    """The milliseconds of one run of each, again and again without end.

    All run once a round, one after the other and another one first each round, so that whatever
    else the machine does meets all of them. The device is waited for before each reading of the
    clock.

    Args:
        runs: What to run, by name.
        device: Where it runs.
        clock: Seconds, from any origin; time.perf_counter if not given.
        begin: The number of the first round, which decides who is first.
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
    """The most bytes that a run has allocated at a time, on top of what was there before.

    From the allocator of an accelerator; on a CPU from torch's profiler, which is told of every
    allocation. None where the allocator keeps no record (MPS).
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
    """Keep away what the profiler's library writes to standard error on its own account."""
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
