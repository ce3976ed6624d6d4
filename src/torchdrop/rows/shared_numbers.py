"""Random numbers that all ranks of a process group draw alike."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

from torchdrop.rows.collectives import in_group

__all__ = ["SharedNumbers", "shared_numbers"]


def _group() -> Any:
    return dist.group.WORLD


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
