"""LEND: what a forward gets while it is read, in place of the module itself and what it holds.

A graph holds fixed what its forward read that is no tensor: flags, sizes, the items of a config
object. All of it is noted, by the path from the block, so that it can be compared at each call.
What the forward would change on the way is refused, since the graph would not change it: of objects
it gets doubles that refuse to be set, of lists and dicts copies, which are looked at afterwards.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import MethodType
from typing import Any

from torch import Tensor, nn

from torchdrop.internals import MODULE_DICTS
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["AttributeWatch", "same"]


def same(known: Any, given: Any) -> bool:
    """Whether ``given`` is as good as ``known`` where a graph holds ``known`` fixed."""
    if known is given:
        return True
    if type(known) is not type(given) or isinstance(known, Tensor):
        return False
    try:
        return bool(known == given)
    except Exception:  # an array, whose comparison is one, say
        return False


_OF_EVERY_MODULE = set(nn.Module().__dict__)

_ABSENT = object()


def _copied(value: Any) -> Any:
    """``value``, its lists, dicts and sets copied at every depth, and nothing else."""
    if type(value) in (list, tuple):
        return type(value)([_copied(item) for item in value])
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return set(value) if type(value) is set else value


def _is_plain_object(value: Any) -> bool:
    """Whether ``value`` is of a class written in Python that has nothing special about it."""
    kind: Any = type(value)
    return (
        kind.__new__ is object.__new__
        and (hasattr(value, "__dict__") or hasattr(kind, "__slots__"))
        and not isinstance(value, type | Enum | nn.Module | Tensor)
        and not inspect.isroutine(value)
        and bool(kind.__flags__ & _HEAP_TYPE)
    )


_HEAP_TYPE = 1 << 9

# Methods that Python looks for on the class of an object, past its ``__getattribute__``.
_NOT_HANDED_ON = {
    "__new__", "__init__", "__init_subclass__", "__class_getitem__", "__del__", "__getattribute__",
    "__getattr__", "__setattr__", "__delattr__", "__hash__", "__eq__",
}  # fmt: skip


class AttributeWatch:
    """What one reading of a forward is handed, and what it read of that.

    Attributes:
        attributes: What was read that is neither tensor nor module, by its path from the block.
    """

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}
        self._lent: dict[str, Any] = {}
        self._doubles: dict[int, Any] = {}

    def lend(self, path: str, value: Any) -> Any:
        """What the forward gets that reads ``value`` at ``path``."""
        if isinstance(value, Tensor | nn.Module):
            return value
        if type(value) in (list, dict, set):
            self.attributes.setdefault(path, _copied(value))
            return self._lent.setdefault(path, _copied(value))
        self.attributes[path] = value
        if not _is_plain_object(value):
            return value
        if path not in self._lent:
            double = self._lent[path] = _double_of(value, path, self)
            self._doubles[id(double)] = value
        return self._lent[path]

    def original(self, value: Any) -> Any:
        """What ``value`` stands for, if it is a double of an object; else ``value`` itself."""
        return self._doubles.get(id(value), value)

    def check_unchanged(self) -> None:
        """Raise :class:`UntraceableError` where a list or dict that was lent is another now."""
        for path, value in self._lent.items():
            if id(value) not in self._doubles and not same(self.attributes[path], value):
                raise UntraceableError(f"it changes self.{path}")

    def double_of_module(self, module: nn.Module, training: bool, prefix: str = "") -> nn.Module:
        """A double of ``module`` for its forward to run on: the same children and parameters."""
        kind = type(module)

        def read(self_: nn.Module, name: str) -> Any:
            value = kind.__getattribute__(self_, name)
            if prefix and name == "training":
                self.attributes[prefix + name] = value
            if _holds(self_, name):
                return self.lend(prefix + name, value)
            return value

        def refuse(self_: nn.Module, name: str, value: Any) -> None:
            raise UntraceableError(f"it sets self.{name}")

        space = {"__getattribute__": read, "__setattr__": refuse, "__module__": kind.__module__}
        metaclass: Any = type(kind)
        double: nn.Module = object.__new__(metaclass(kind.__name__, (kind,), space))
        state = {**module.__dict__, "training": training}
        for name in MODULE_DICTS:
            state[name] = dict(state[name])
        object.__setattr__(double, "__dict__", state)
        return double

    @contextmanager
    def watching(self, root: nn.Module, resting: Callable[[], bool]) -> Iterator[None]:
        """Note also what is read of the children of ``root``; refuse to set anything on them.

        What would be set would be a proxy, and stay with the user.

        Args:
            root: The block that is read.
            resting: Whether to look away at the moment.
        """
        thread, plain = threading.get_ident(), nn.Module.__setattr__
        paths = {id(m): f"{path}." for path, m in root.named_modules() if path}

        def read(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            path = paths.get(id(module))
            if path is None or threading.get_ident() != thread or resting():
                return value
            return self.lend(path + name, value) if _holds(module, name) else value

        def refuse(module: nn.Module, name: str, value: Any) -> None:
            if threading.get_ident() == thread:
                raise UntraceableError(f"it sets {name} of a {type(module).__name__}")
            plain(module, name, value)

        every_module: Any = nn.Module
        try:  # from here on: an interrupt may come between any two lines
            every_module.__setattr__, every_module.__getattribute__ = refuse, read
            yield
        finally:
            if "__getattribute__" in vars(every_module):
                del every_module.__getattribute__
            every_module.__setattr__ = plain
        self.check_unchanged()


def _holds(module: nn.Module, name: str) -> bool:
    """Whether ``name`` is a plain attribute of ``module``: its own, or a value on its class."""
    if name in _OF_EVERY_MODULE or name.startswith("__"):
        return False
    if name in object.__getattribute__(module, "__dict__"):
        return True
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return False
        found = kind.__dict__.get(name, _ABSENT)
        if found is not _ABSENT:
            return not hasattr(type(found), "__get__") and not isinstance(found, type)
    return False


def _double_of(value: Any, path: str, lender: AttributeWatch) -> Any:
    """Something that has the attributes and methods of ``value``, and notes what is read of it."""
    kind = type(value)

    def read(self: Any, name: str) -> Any:
        found = getattr(value, name)
        if isinstance(found, MethodType) and found.__self__ is value:
            return MethodType(found.__func__, self)
        return found if name.startswith("__") else lender.lend(f"{path}.{name}", found)

    def refuse(self: Any, name: str, given: Any) -> None:
        raise UntraceableError(f"it sets self.{path}.{name}")

    handed_on = {
        name: found
        for base in reversed(kind.__mro__[:-1])
        for name, found in base.__dict__.items()
        if name.startswith("__") and inspect.isfunction(found) and name not in _NOT_HANDED_ON
    }
    space = {
        **handed_on,
        "__getattribute__": read,
        "__setattr__": refuse,
        "__hash__": lambda self: hash(value),
        "__eq__": lambda self, other: bool(value == lender.original(other)),
    }
    return type(kind.__name__, (), space)()
