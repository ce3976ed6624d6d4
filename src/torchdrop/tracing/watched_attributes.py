"""Record which plain attributes a forward reads while it is traced, and raise if it sets one.

A graph fixes the values of the attributes that are not tensors: flags, sizes, the items of a config
object. They are recorded by their path from the block, so that the block can be traced again when
one of them has changed.

A graph does not contain the assignment of an attribute. So in place of an object the forward gets a
*double*, which reads from the object and raises when an attribute is set, and in place of a list or
dict a copy, which is compared with the original afterwards.
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
from torchdrop.tracing.doubles import bound_to_original, instance_like, is_called_by_torch
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["AttributeWatch", "same"]


def same(known: Any, given: Any) -> bool:
    """Whether a graph in which the value ``known`` is fixed also holds for the value ``given``."""
    if known is given:
        return True
    if type(known) is not type(given) or isinstance(known, Tensor):
        return False
    try:
        return bool(known == given)
    except Exception:  # the comparison of two arrays is an array, which has no truth value
        return False


_OF_EVERY_MODULE = set(nn.Module().__dict__)

_ABSENT = object()


def _copied(value: Any) -> Any:
    """Return ``value`` with its lists, dicts and sets copied at every depth, and nothing else."""
    if type(value) in (list, tuple):
        return type(value)([_copied(item) for item in value])
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return set(value) if type(value) is set else value


def _is_plain_object(value: Any) -> bool:
    """Whether ``value`` is an instance of an ordinary class that is written in Python."""
    kind: Any = type(value)
    return (
        kind.__new__ is object.__new__
        and (hasattr(value, "__dict__") or hasattr(kind, "__slots__"))
        and not isinstance(value, type | Enum | nn.Module | Tensor)
        and not inspect.isroutine(value)
        and bool(kind.__flags__ & _HEAP_TYPE)
    )


_HEAP_TYPE = 1 << 9

# Special methods that a double does not take from the class of its original.
_NOT_TAKEN_OVER = {
    "__new__", "__init__", "__init_subclass__", "__class_getitem__", "__del__", "__getattribute__",
    "__getattr__", "__setattr__", "__delattr__", "__hash__", "__eq__",
}  # fmt: skip


class AttributeWatch:
    """Hands out the attributes of a block while its forward is traced, and records them.

    Attributes:
        attributes: The attributes that were read, by their path from the block.
    """

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}
        self._handed_out: dict[str, Any] = {}
        self._originals: dict[int, Any] = {}

    def hand_out(self, path: str, value: Any) -> Any:
        """Record that ``value`` was read at ``path``; return it, or its double or copy."""
        if isinstance(value, Tensor | nn.Module):
            return value
        if type(value) in (list, dict, set):
            self.attributes.setdefault(path, _copied(value))
            return self._handed_out.setdefault(path, _copied(value))
        self.attributes[path] = value
        if not _is_plain_object(value):
            return value
        if path not in self._handed_out:
            double = self._handed_out[path] = _double_of(value, path, self)
            self._originals[id(double)] = value
        return self._handed_out[path]

    def original(self, value: Any) -> Any:
        """Return the object that ``value`` is a double of; ``value`` itself if it is no double."""
        return self._originals.get(id(value), value)

    def check_unchanged(self) -> None:
        """Raise :class:`UntraceableError` if the forward changed a list or dict."""
        for path, value in self._handed_out.items():
            if id(value) not in self._originals and not same(self.attributes[path], value):
                raise UntraceableError(f"it changes self.{path}")

    def double_of_module(self, module: nn.Module, training: bool, prefix: str = "") -> nn.Module:
        """Return a double of ``module``, on which its forward is traced.

        The double has the same children, parameters and buffers.

        Args:
            module: The block, or a child whose forward is traced as part of the block's.
            training: The training flag of the double.
            prefix: The path of the child from the block, followed by a dot; empty for the block.
        """
        kind = type(module)

        def read(self_: nn.Module, name: str) -> Any:
            if name == "__class__":
                return kind
            value = kind.__getattribute__(self_, name)
            if prefix and name == "training":
                self.attributes[prefix + name] = value
            if _is_plain_attribute(self_, name):
                return self.hand_out(prefix + name, value)
            return bound_to_original(value, self_, module)

        def refuse(self_: nn.Module, name: str, value: Any) -> None:
            raise UntraceableError(f"it sets self.{name}")

        def refuse_deletion(self_: nn.Module, name: str) -> None:
            raise UntraceableError(f"it deletes self.{prefix}{name}")

        def hash_of(self_: nn.Module) -> int:
            if is_called_by_torch():  # module.parameters(), say, does not keep the key
                return id(module)
            raise UntraceableError("it uses itself as a key of a dict, a set or a cache")

        space = {
            "__getattribute__": read,
            "__setattr__": refuse,
            "__delattr__": refuse_deletion,
            "__hash__": hash_of,
        }
        state = {**module.__dict__, "training": training}
        for name in MODULE_DICTS:
            state[name] = dict(state[name])
        double: nn.Module = instance_like(kind, space, state)
        return double

    @contextmanager
    def watching(self, root: nn.Module, paused: Callable[[], bool]) -> Iterator[None]:
        """Record the attributes that are read from the children of ``root``; raise if one is set.

        The value that the forward sets may be a proxy, which would stay on the user's module.

        Args:
            root: The block that is traced.
            paused: Returns whether reads are to be ignored at the moment.
        """
        thread, plain = threading.get_ident(), nn.Module.__setattr__
        paths = {id(m): f"{path}." for path, m in root.named_modules() if path}

        def read(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            path = paths.get(id(module))
            if path is None or threading.get_ident() != thread:
                return value
            if not _is_plain_attribute(module, name):
                return value
            if paused():  # a copy, so that an item that is appended now does not stay
                return _copied(value) if type(value) in (list, dict, set) else value
            return self.hand_out(path + name, value)

        def refuse(module: nn.Module, name: str, value: Any) -> None:
            if threading.get_ident() == thread:
                raise UntraceableError(f"it sets {name} of a {type(module).__name__}")
            plain(module, name, value)

        every_module: Any = nn.Module
        try:  # begins before the first change, since an interrupt may come between any two lines
            every_module.__setattr__, every_module.__getattribute__ = refuse, read
            yield
        finally:
            if "__getattribute__" in vars(every_module):
                del every_module.__getattribute__
            every_module.__setattr__ = plain
        self.check_unchanged()


def _is_plain_attribute(module: nn.Module, name: str) -> bool:
    """Whether ``name`` is a plain attribute of ``module``, set on itself or on its class."""
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


def _double_of(value: Any, path: str, watch: AttributeWatch) -> Any:
    """Return an object with the attributes and methods of ``value`` that records reads of them."""
    kind = type(value)

    def read(self: Any, name: str) -> Any:
        found = getattr(value, name)
        if isinstance(found, MethodType) and found.__self__ is value:
            return MethodType(found.__func__, self)
        return found if name.startswith("__") else watch.hand_out(f"{path}.{name}", found)

    def refuse(self: Any, name: str, given: Any) -> None:
        raise UntraceableError(f"it sets self.{path}.{name}")

    special_methods = {
        name: found
        for base in reversed(kind.__mro__[:-1])
        for name, found in base.__dict__.items()
        if name.startswith("__") and inspect.isfunction(found) and name not in _NOT_TAKEN_OVER
    }
    space = {
        **special_methods,
        "__getattribute__": read,
        "__setattr__": refuse,
        "__hash__": lambda self: hash(value),
        "__eq__": lambda self, other: bool(value == watch.original(other)),
    }
    return type(kind.__name__, (), space)()
