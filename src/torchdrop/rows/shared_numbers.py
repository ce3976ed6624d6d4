"""Random numbers that are the same on all ranks of a process group."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

from torchdrop.internals import in_backward_pass
from torchdrop.rows.collectives import has_other_ranks

__all__ = ["SharedNumbers", "shared_numbers"]


def _group() -> Any:
    return dist.group.WORLD


class SharedNumbers:
    """A stream of random numbers that is the same on all ranks; each rank computes it by itself.

    Number n since ``torch.manual_seed`` is a hash of n and of the seed of rank 0. The difference
    between a rank's own seed and that of rank 0 is communicated once, with the first number (one
    broadcast). If all ranks are seeded again later, no communication is needed, as long as the
    differences between their seeds stay the same.

    n has to follow the state of the global generator, which does not tell how many numbers were
    drawn from it. So each draw also takes an integer from the generator, the token, and stores n
    under this token. If a token is known already, the generator was restored to an earlier state,
    and the n of the token is used again. This is how the recomputation of a checkpoint, which
    restores only the generator, gets the numbers of the forward pass. If the token is the first one
    of a seed, the generator was seeded again with this seed, and n starts at 0.
    """

    # How many tokens and seeds are stored at most; the oldest are removed first. A token has to
    # stay until the backward pass in which a checkpoint is recomputed.
    _MAX_TOKENS = 2**14
    _MAX_SEEDS = 256

    def __init__(self) -> None:
        self._known_group: Any = None  # a weak reference to the group of the seed difference
        self._seed_difference = 0
        # For each seed of rank 0: the token of its first number, and how many numbers were drawn.
        self._streams: dict[int, tuple[int | None, int]] = {}
        self._number_of_token: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()
        self._alone = 0

    def shared(self) -> bool:
        """Whether there are other ranks that need the same numbers."""
        return not self._alone and has_other_ranks()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside this context only this rank draws: nothing is communicated or counted."""
        self._alone += 1
        try:
            yield
        finally:
            self._alone -= 1

    def draw(self) -> int:
        """Return the next number, an integer of 53 bits, which a float represents exactly."""
        seed = (torch.initial_seed() - self._difference_to_rank_0()) % 2**64
        token = int(torch.randint(2**62, (), device="cpu"))
        with self._lock:
            # Removed and inserted again: the stream that was used last is the last in the dict.
            first, count = self._streams.pop(seed, (token, 0))
            known = 0 if token == first else self._number_of_token.get((seed, token))
            number = count if known is None else known
            # Draws after the recomputation of a checkpoint continue the forward passes, so it does
            # not change the count. Elsewhere a known token means that the generator was restored,
            # and the draws that follow continue from its number.
            if known is None or not in_backward_pass():
                count = number + 1
            self._streams[seed] = first, count
            self._number_of_token[seed, token] = number
            if len(self._number_of_token) > self._MAX_TOKENS:
                del self._number_of_token[next(iter(self._number_of_token))]
            if len(self._streams) > self._MAX_SEEDS:
                del self._streams[next(iter(self._streams))]
        digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 11

    def _difference_to_rank_0(self) -> int:
        """Return this rank's seed minus that of rank 0, which is broadcast on the first call."""
        group = _group()
        if self._known_group is None or self._known_group() is not group:
            mine = torch.initial_seed()
            theirs = [mine]
            dist.broadcast_object_list(theirs, src=0)
            self._seed_difference = mine - theirs[0]
            if self._known_group is not None:
                # Some ranks of the new group may not have drawn numbers before: all start at 0.
                self._streams.clear()
                self._number_of_token.clear()
            self._known_group = weakref.ref(group)
        return self._seed_difference

    def state_dict(self) -> dict[str, int] | None:
        """Return seed and count of the stream, the same on all ranks; None before any draw."""
        if not self._streams:
            return None
        seed = next(reversed(self._streams))
        return {"seed": seed, "count": self._streams[seed][1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let draws under the seed of ``state``, the seed of rank 0, continue from its count.

        Draws under other seeds are not changed.

        Raises:
            ValueError: ``state`` is not a seed and a count.
        """
        if not (
            isinstance(state, Mapping)
            and all(type(state.get(name)) is int and state[name] >= 0 for name in ("seed", "count"))
        ):
            raise ValueError(
                f"shared_numbers has to be a seed and a count, integers from 0, but got {state!r}; "
                "pass what state_dict() returned"
            )
        self._streams.pop(state["seed"], None)
        # The first token is not known, so no token makes the count start at 0.
        self._streams[state["seed"]] = None, state["count"]


# One for the process, like the generator that it follows.
shared_numbers = SharedNumbers()
