"""Make objects that behave as instances of a class although the class does not know of them.

A forward is traced with a double of its module, which records what the forward reads and sets. If
the class of the double were derived from the class of the module, ``__init_subclass__`` and the
metaclass would run, and tables of subclasses would hold it. So the double's class only lists the
class of the module in its method resolution order: lookups, ``super()``, ``isinstance`` and special
methods work as in the class of the module.
"""

from __future__ import annotations

import sys
from types import FrameType, MethodType
from typing import Any

from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["bound_to_original", "instance_like", "is_called_by_torch"]


class _Shield:
    """Precedes the imitated class in lookups, and overrides what must not run for a double."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __del__(self) -> None:
        pass


class _Lookalike(type):
    """The metaclass of the classes of doubles."""

    def __new__(cls, imitated: type, space: dict[str, Any]) -> _Lookalike:
        name, module = imitated.__name__, imitated.__module__
        names = {**space, "__module__": module, "imitated class": imitated}
        return super().__new__(cls, name, (_Shield,), names)

    def __init__(cls, imitated: type, space: dict[str, Any]) -> None:
        super().__init__(cls)

    def mro(cls) -> list[type]:
        """Return the classes in which attributes are looked up: those of the imitated class."""
        return [cls, _Shield, *cls.__dict__["imitated class"].__mro__]

    def __setattr__(cls, name: str, value: Any) -> None:
        raise UntraceableError(f"it sets the attribute {name} of its class")

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.__dict__["imitated class"], name)  # defined by its metaclass


def instance_like(kind: type, space: dict[str, Any], state: dict[str, Any]) -> Any:
    """Return an object with the attributes ``state`` that behaves as an instance of ``kind``.

    Args:
        kind: The class.
        space: Methods that take precedence over those of ``kind``.
        state: Becomes the ``__dict__`` of the object.

    Raises:
        UntraceableError: Instances of ``kind`` have ``__slots__``, which only ``kind`` can make.
    """
    try:
        imitation: Any = _Lookalike(kind, space)
        double: Any = object.__new__(imitation)
    except TypeError:
        raise UntraceableError(f"its class {kind.__name__} has __slots__") from None
    object.__setattr__(double, "__dict__", state)
    return double


def bound_to_original(found: Any, double: Any, original: Any) -> Any:
    """Return ``found``, an attribute of ``double``; bind a method with a cache to ``original``.

    The cache of a method under ``functools.lru_cache`` would keep the double as part of a key.
    """
    if (
        isinstance(found, MethodType)
        and found.__self__ is double
        and hasattr(found.__func__, "cache_info")
    ):
        return MethodType(found.__func__, original)
    return found


def is_called_by_torch(frame: FrameType | None = None) -> bool:
    """Whether the caller of this function was itself called by torch or torchdrop.

    Args:
        frame: The frame to ask about instead of the caller's.
    """
    asking = frame or sys._getframe(1)
    caller = asking.f_back
    name = "" if caller is None else str(caller.f_globals.get("__name__", ""))
    return name.partition(".")[0] in ("torch", "torchdrop")
