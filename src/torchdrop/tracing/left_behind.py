"""Remove the proxies that a forward has stored in objects of the user while it was traced."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from types import CellType
from typing import Any

__all__ = ["remove_stored_proxies"]


# How often the full collection is tried if there are other threads: gc.collect() does nothing while
# another thread collects.
_COLLECTIONS = 5

_Cache = type(lru_cache(lambda: None))


def remove_stored_proxies(proxies: Iterable[Any]) -> str:
    """Remove proxies from dicts, lists, sets, attributes, closures and caches of functions.

    Args:
        proxies: Weak references to the proxies of a trace that has ended.

    Returns:
        Where one was stored, for an error message; empty if none was.
    """
    references = [reference for reference in proxies if reference() is not None]
    if not references:
        return ""
    # Functions that refer to each other keep proxies alive until the garbage collector runs. They
    # are new, so collecting the young objects is usually enough; collecting all of them takes a
    # quarter of a second in a process with many libraries.
    gc.collect(1)
    for attempt in range(_COLLECTIONS if threading.active_count() > 1 else 1):
        if all(reference() is None for reference in references):
            return ""
        time.sleep(0.01 * attempt)
        gc.collect()
    # No variable may be a proxy itself: the frame of this function would be found as a holder. The
    # lists of proxies are ignored.
    alive = [one for one in (reference() for reference in references) if one is not None]
    if not alive:
        return ""
    ids = {id(proxy) for proxy in alive}
    ignored = {id(alive)}
    found = ""
    pending: list[Any] = alive
    for _ in range(4):  # a tuple in a tuple in a dict
        outer = []
        for holder in gc.get_referrers(*pending):
            if id(holder) in ignored or holder is pending:
                continue
            if isinstance(holder, tuple):
                ids.add(id(holder))
                outer.append(holder)
            else:
                found = _remove(holder, ids) or found
        if not outer:
            break
        ignored |= {id(pending), id(outer)}
        pending = outer
    return found


def _remove(holder: Any, ids: set[int]) -> str:
    """Remove the objects with these ids from ``holder``, and say what it is."""
    if isinstance(holder, _Cache):  # it has no way to forget one entry
        holder.cache_clear()
        return f"the cache of {holder.__name__}"
    if isinstance(holder, dict):
        return _remove_from_dict(holder, ids)
    if isinstance(holder, list | deque):
        kept = [item for item in holder if id(item) not in ids]
        if len(kept) == len(holder):
            return ""
        holder.clear()
        holder.extend(kept)
        return f"a {type(holder).__name__}"
    if isinstance(holder, set):
        gone = [item for item in holder if id(item) in ids]
        holder.difference_update(gone)
        return "a set" if gone else ""
    if isinstance(holder, CellType):
        holder.cell_contents = None
        return "a variable of a function around it"
    names = [k for k, v in getattr(holder, "__dict__", {}).items() if id(v) in ids]
    for name in names:
        object.__delattr__(holder, name)
    return f"the attribute {names[0]} of a {type(holder).__name__}" if names else ""


def _remove_from_dict(holder: dict[Any, Any], ids: set[int]) -> str:
    keys = [k for k, value in holder.items() if id(value) in ids or id(k) in ids]
    if not keys:
        return ""
    for owner in gc.get_referrers(holder):
        if isinstance(owner, _Cache):
            return _remove(owner, ids)
        if isinstance(owner, type) and keys[0] in vars(owner):
            # not through its dict: Python caches the attributes of classes
            for key in keys:
                setattr(owner, key, None)  # most likely its value before
            return f"the attribute {keys[0]} of {owner.__name__}"
    for key in keys:
        del holder[key]
    return f"a dict, under {keys[0]!r}"
