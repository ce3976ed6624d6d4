"""Find the global variables whose values are fixed in a graph, and compare them in later calls.

In the graph of ``SETTINGS["alpha"] * self.f(x)``, the value of ``SETTINGS["alpha"]`` is a constant.
The bytecode of the functions that ran tells what they read: global variables, attributes of the
modules, classes and plain objects that these hold, and items with a constant key.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Mapping
from enum import Enum, EnumMeta
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torchdrop.tracing.own_forward import own_forward
from torchdrop.tracing.watched_attributes import same

__all__ = ["WatchedGlobals"]

_PLAIN: tuple[type, ...] = (
    int, float, complex, str, bytes, bool, type(None), Enum, slice, range,
    torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size,
)  # fmt: skip

# A container with more values is not watched, because each call compares all of them.
_MOST_VALUES = 256

_ABSENT = object()


class WatchedGlobals:
    """The global variables that a forward reads, with their values when it was traced.

    The object can be pickled: the variables are found by the names of their modules.

    Args:
        functions: The functions that the forward called: ``CallWatch.functions``.
        forward: The forward itself. The variables that it reads from enclosing functions are
            watched, too.

    Attributes:
        known: The values, by the name of the module and the expression that reads the variable.
    """

    def __init__(self, functions: Mapping[CodeType, dict[str, Any]], forward: Any = None) -> None:
        self.known: dict[tuple[str, str], Any] = {}
        for code, scope in functions.items():
            module = str(scope.get("__name__"))
            if getattr(sys.modules.get(module), "__dict__", None) is not scope:
                continue  # the variables could not be found again by the name of the module
            for expression, value in _plain_values_read(code, scope):
                self.known[module, expression] = _copied(value)
        self._cells = _cells_of(forward)
        self._readers = self._make_readers()

    def __bool__(self) -> bool:
        return bool(self.known or self._cells)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_readers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers = self._make_readers()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WatchedGlobals):
            return NotImplemented
        return same(self.known, other.known) and same(
            [(name, value) for name, _, value in self._cells],
            [(name, value) for name, _, value in other._cells],
        )

    __hash__ = None  # type: ignore[assignment]

    def changed(self, block: nn.Module) -> tuple[str, str] | None:
        """Return the old and the new value of a variable that has changed; None if none has.

        Args:
            block: The block whose forward was traced, or a copy of it with another forward.
        """
        for read, names, known in self._readers:
            try:
                now = read()
            except (NameError, AttributeError, LookupError, TypeError):
                return "global variables that are no longer there", ", ".join(names)
            for name, a, b in zip(names, known, now, strict=True):
                if a is not b and not same(a, b):
                    return f"{name} = {a!r}", f"{name} = {b!r}"
        for name, place, value in self._cells:
            now = _cell(block, place)
            if now is not value and not same(value, now):
                return f"{name} = {value!r}", f"{name} = {now!r}"
        return None

    def _make_readers(self) -> list[tuple[FunctionType, list[str], list[Any]]]:
        """Return functions that read the variables of one module each, and what they returned."""
        by_module: dict[str, list[str]] = {}
        for module, expression in self.known:
            by_module.setdefault(module, []).append(expression)
        readers = []
        for module, expressions in by_module.items():
            # The function gets the globals of the module, so that a compiler guards the variables.
            scope = sys.modules[module].__dict__ if module in sys.modules else {}
            code = compile(f"lambda: ({', '.join(expressions)},)", f"<torchdrop {module}>", "eval")
            read = FunctionType(code.co_consts[0], scope)
            readers.append((read, expressions, [self.known[module, e] for e in expressions]))
        return readers


def _cells_of(forward: Any) -> list[tuple[str, int, Any]]:
    """Return name, index and value of each plain variable of the closure of ``forward``."""
    if not isinstance(forward, FunctionType) or not forward.__closure__:
        return []
    found = []
    for place, (name, cell) in enumerate(
        zip(forward.__code__.co_freevars, forward.__closure__, strict=True)
    ):
        try:
            value = cell.cell_contents
        except ValueError:  # not set yet
            continue
        if _is_plain(value):
            found.append((name, place, _copied(value)))
    return found


def _cell(block: nn.Module, place: int) -> Any:
    closure: Any = own_forward(block).__closure__
    return closure[place].cell_contents


def _plain_values_read(code: CodeType, scope: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the expressions by which ``code`` reads plain values from globals, and the values."""
    found: dict[str, Any] = {}
    instructions = _instructions(code)
    for i, instruction in enumerate(instructions):
        if instruction.opname != "LOAD_GLOBAL":
            continue
        expression = str(instruction.argval)
        value = scope.get(expression, _ABSENT)
        rest = list(instructions[i + 1 :])
        while rest and _may_hold(value):
            step = rest.pop(0)
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                value = _attribute(value, str(step.argval))
                expression += f".{step.argval}"
            elif (
                step.opname == "LOAD_CONST"
                and rest
                and rest[0].opname in ("BINARY_SUBSCR", "BINARY_OP")
                and rest[0].argrepr in ("", "[]")
                and isinstance(value, dict | list | tuple)
                and isinstance(step.argval, str | int)
            ):
                rest.pop(0)
                expression += f"[{step.argval!r}]"
                try:
                    value = value[step.argval]  # type: ignore[index]
                except LookupError:
                    value = _ABSENT
            else:
                break
        if _is_plain(value):
            found[expression] = value
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found.update(_plain_values_read(constant, scope))
    return list(found.items())


@lru_cache(maxsize=4096)
def _instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    """Return the instructions of ``code`` without CACHE and PRECALL, which change no value."""
    return tuple(i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PRECALL"))


def _may_hold(value: Any) -> bool:
    """Whether ``value`` may have attributes or items that are plain values and may change."""
    if isinstance(value, ModuleType):
        package = value.__name__.partition(".")[0]
        return package not in ("torch", "torchdrop") and package not in sys.stdlib_module_names
    if value is _ABSENT or isinstance(value, (Tensor, nn.Module, *_PLAIN)):
        return False
    return not isinstance(value, (FunctionType, BuiltinFunctionType, EnumMeta))


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute if reading it runs no code of the user; else ``_ABSENT``."""
    if isinstance(value, type):
        places: list[Any] = [vars(kind) for kind in value.__mro__]
    else:
        places = [getattr(value, "__dict__", {})]
        if not isinstance(value, ModuleType):
            places += [vars(kind) for kind in type(value).__mro__]
    for place in places:
        found = place.get(name, _ABSENT)
        if found is not _ABSENT:
            return _ABSENT if hasattr(type(found), "__get__") else found
    return _ABSENT


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is a number, a string or the like, or a container of such values."""
    return _count(value) <= _MOST_VALUES


def _count(value: Any) -> float:
    """Return how many values ``value`` consists of; infinite if one of them is not plain."""
    if isinstance(value, _PLAIN):
        return 1
    if type(value) is dict:
        return _total([*value, *value.values()])
    if type(value) in (list, tuple, set, frozenset):
        return _total(value)
    return float("inf")


def _total(values: Any) -> float:
    if len(values) > 2 * _MOST_VALUES:
        return float("inf")
    return 1 + sum(map(_count, values))


def _copied(value: Any) -> Any:
    """Return ``value`` with its containers copied, so that later changes can be noticed."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return set(value) if type(value) is set else value
