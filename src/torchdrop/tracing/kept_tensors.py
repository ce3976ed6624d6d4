"""Find the containers that hold a tensor, and tell later whether they still hold it.

A graph may use a tensor that its forward took from a container, such as a cache. If the container
gets another tensor, the graph is no longer valid.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import CellType, FrameType
from typing import Any

from torch import Tensor, nn

__all__ = ["Constant", "note_keepers"]


class Constant:
    """The target of a node without arguments, which returns a tensor that is stored elsewhere.

    Attributes:
        value: The tensor.
    """

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value
        self.__name__ = "constant"
        self._places: list[Callable[[], bool]] | None = []

    def __call__(self) -> Tensor | None:
        """Return the tensor."""
        return self.value

    def __getstate__(self) -> dict[str, Any]:
        # Another process has containers of its own.
        return {**self.__dict__, "_places": None}

    def note_place(self, still_holds: Callable[[], bool]) -> None:
        """Note a place that holds the tensor; ``still_holds()`` says whether it still does."""
        if self._places is not None:
            self._places.append(still_holds)

    def is_current(self) -> bool:
        """Whether every noted place still holds the tensor; False in another process."""
        return self._places is not None and all(still_holds() for still_holds in self._places)


def note_keepers(constants: Sequence[Constant], ours: Collection[int]) -> None:
    """Find the places that hold the tensors of ``constants``, and note them in these constants.

    Places that cannot change, such as an entry of ``functools.lru_cache``, do not count.
    ``gc.get_referrers`` goes through all objects of the process, so it is called only twice: for
    all tensors, and for all tuples that hold one of them.

    Args:
        constants: The constants.
        ours: The ids of containers of torchdrop, which do not count.
    """
    wanted = {id(c.value): c for c in constants if c.value is not None}
    keepers = gc.get_referrers(*(c.value for c in wanted.values())) if wanted else []
    tuples = {id(k): k for k in keepers if isinstance(k, tuple)}
    around = gc.get_referrers(*tuples.values()) if tuples else []
    ours = {*ours, *map(id, (wanted, keepers, tuples, around))}
    for keeper in keepers:
        if id(keeper) not in ours and not isinstance(keeper, FrameType | nn.Module | Constant):
            for value, still_holds in _places_in(keeper):
                if id(value) in wanted:
                    wanted[id(value)].note_place(still_holds)
    for keeper in around:
        if id(keeper) not in ours and not isinstance(keeper, FrameType | nn.Module | tuple):
            for value, still_holds in _places_in(keeper):
                for item in tuples.get(id(value), ()):
                    if id(item) in wanted:
                        wanted[id(item)].note_place(still_holds)


def _places_in(keeper: Any) -> Iterator[tuple[Any, Callable[[], bool]]]:
    """Yield each value in ``keeper``, with a function that says whether it is still there."""
    if isinstance(keeper, CellType):
        with suppress(ValueError):  # it is empty
            yield keeper.cell_contents, partial(_in_cell, keeper, keeper.cell_contents)
    elif isinstance(keeper, list | deque):
        for value in list(keeper):
            yield value, partial(_in_sequence, keeper, value)
    else:
        table = keeper if isinstance(keeper, dict) else getattr(keeper, "__dict__", None)
        if isinstance(table, dict):
            for key, value in list(table.items()):
                yield value, partial(_in_dict, table, key, value)


def _in_cell(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # it is empty
        return False


def _in_dict(keeper: dict[Any, Any], key: Any, value: Any) -> bool:
    return keeper.get(key) is value


def _in_sequence(keeper: list[Any] | deque[Any], value: Any) -> bool:
    return any(item is value for item in keeper)
