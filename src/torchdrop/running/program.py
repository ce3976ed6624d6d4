"""A generated forward: its source, the functions of its branches, and the calls it is valid for."""

from __future__ import annotations

import importlib
import inspect
import linecache
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn

from torchdrop.finding.row_layout import RowLayout
from torchdrop.tracing.call_arguments import flatten_arguments
from torchdrop.tracing.kept_tensors import Constant
from torchdrop.tracing.modes import active_modes, active_modes_in_graph
from torchdrop.tracing.watched_attributes import same
from torchdrop.tracing.watched_globals import WatchedGlobals

__all__ = [
    "MismatchError",
    "Program",
    "Source",
    "call_signature",
    "compile_with_lines",
    "most_varied",
]


def compile_with_lines(text: str, label: str) -> CodeType:
    """Return the code of generated source, whose lines tracebacks show under ``label``."""
    filename = f"<torchdrop {label}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    return compile(text, filename, "exec")


class Source:
    """A generated function: its text, and the values of the global names in it.

    Immutable, so copies of a model share it; it can be pickled.
    """

    def __init__(self, label: str, text: str, names: dict[str, Any]) -> None:
        self.label = label
        self.text = text
        self.names = names
        self.function: Callable[..., Any] = self._compile()

    def _compile(self) -> Callable[..., Any]:
        scope = dict(self.names)
        exec(compile_with_lines(self.text, self.label), scope)
        function: Callable[..., Any] = scope["forward"]
        return function

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self

    def __getstate__(self) -> dict[str, Any]:
        modules = {k: v.__name__ for k, v in self.names.items() if isinstance(v, ModuleType)}
        values = {k: v for k, v in self.names.items() if not isinstance(v, ModuleType)}
        return {"label": self.label, "text": self.text, "modules": modules, "values": values}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {k: importlib.import_module(v) for k, v in state["modules"].items()}
        self.__init__(state["label"], state["text"], {**names, **state["values"]})  # type: ignore[misc]


@dataclass(eq=False)
class Program:
    """A generated forward, the functions of its branches, and the calls it is valid for.

    Attributes:
        forward: ``forward(self, site, *tensors)``.
        branches: By number, ``forward(self, site, *inputs)`` of each branch that is skipped.
        row_layouts: For each of these branches, how each input carries the rows of the batch (None:
            the input has no rows); None if that was not measured.
        reuses_skip: The branches whose skip is the sum with another branch and is used for nothing
            else, so that its memory may be reused for the sum.
        tensors: The names of the tensor arguments, as by :func:`flatten_arguments`.
        constants: The other arguments. The forward is valid for these values only.
        attributes: The attributes of the block that were read. The forward is valid for these
            values only.
        decisions: ``decisions(*tensors)``: the conditions on which the block branches.
        decided: The answers for which the forward is valid.
        seen: The kinds of calls (shapes, dtypes) for which the forward was read; None if it is
            valid for all.
        assumed: The branches for which it was not measured how each input carries the rows. In each
            call the shape of the input tells it.
        runs_own: Whether the block's own forward runs in these calls, because it adds none of the
            branches.
        asks: Which kinds of modes (gradients, autocast, ...) the forward asks for or sets.
        modes: The modes of these kinds for which the forward is valid.
        watched_globals: The values of global variables for which the forward is valid; None if it
            names none.
        last_used: The number of the call in which the site last used it.
    """

    forward: Source
    branches: dict[int, Source]
    row_layouts: dict[int, list[RowLayout | None] | None]
    reuses_skip: set[int]
    tensors: list[str]
    constants: dict[str, Any]
    attributes: dict[str, Any]
    decisions: Source | None
    decided: list[bool]
    seen: set[Any] | None = None
    assumed: set[int] = field(default_factory=set)
    runs_own: bool = False
    asks: tuple[str, ...] = ()
    modes: set[Any] = field(default_factory=set)
    watched_globals: WatchedGlobals | None = None
    last_used: int = 0

    def __post_init__(self) -> None:
        # Grouped by the module that holds the attributes, because looking up a child takes the most
        # time. The first name is read twice, because attrgetter returns a tuple only for several.
        holders: dict[str, list[str]] = {}
        for path in self.attributes:
            holder, _, name = path.rpartition(".")
            holders.setdefault(holder, []).append(name)
        self._reads = [
            (
                attrgetter(holder) if holder else None,
                attrgetter(*names, names[0]),
                [self.attributes[f"{holder}.{name}".lstrip(".")] for name in (*names, names[0])],
            )
            for holder, names in holders.items()
        ]
        sources = (self.forward, *self.branches.values(), self.decisions)
        values = [v for source in sources if source is not None for v in source.names.values()]
        self._constants = [value for value in values if isinstance(value, Constant)]

    @property
    def asks_in_calls(self) -> bool:
        """Whether calls of one form have to be checked further, because the forward reads more."""
        return bool(
            self._reads
            or self._constants
            or self.watched_globals is not None
            or self.asks
            or self.decisions is not None
            or self.seen is not None
        )

    def bind(
        self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any]:
        """Return the tensors of a call, in the order in which the forward takes them.

        Raises:
            MismatchError: The forward is not valid for the other arguments of this call.
        """
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        _, tensors, constants = flatten_arguments(bound.arguments)
        for path, value in self.constants.items():
            if path not in constants or not same(value, constants[path]):
                given = constants.get(path, tensors.get(path))
                raise MismatchError(f"{path}={value!r}", f"{path} ({type(given).__name__})")
        if list(tensors) != self.tensors or len(constants) != len(self.constants):
            raise MismatchError(f"({', '.join(self.tensors)})", f"tensors ({', '.join(tensors)})")
        return list(tensors.values())

    def check_modes(self) -> None:
        """Raise :class:`MismatchError` if modes that the block asks for have changed."""
        if torch.compiler.is_compiling():
            now = active_modes_in_graph(self.asks)
            valid = any(_equal_in_graph(now, known) for known in self.modes)
        else:
            now = active_modes(self.asks)
            valid = now in self.modes
        if not valid:
            kinds = " and ".join(self.asks)
            raise MismatchError(f"some modes of {kinds}", f"others ({_described(now)})")

    def check_attributes(self, module: nn.Module) -> None:
        """Raise :class:`MismatchError` if an attribute of the block, or a global, has changed."""
        if self.watched_globals is not None:
            difference = self.watched_globals.changed(module)
            if difference is not None:
                raise MismatchError(*difference)
        if (
            torch.compiler.is_compiling()
        ):  # dynamo cannot trace an attrgetter made outside the graph
            self._check_one_by_one(module)
            return
        if not all(constant.is_current() for constant in self._constants):
            raise MismatchError("a tensor that it takes from a table", "another one")
        for holder, read, known in self._reads:
            try:
                now = read(module if holder is None else holder(module))
            except AttributeError as error:
                raise MismatchError("an attribute that it no longer has", str(error)) from None
            if not all(map(is_, known, now)) and not all(map(same, known, now)):
                self._check_one_by_one(module)

    def _check_one_by_one(self, module: nn.Module) -> None:
        for path, known in self.attributes.items():
            now = attrgetter(path)(module)
            if not same(known, now):
                raise MismatchError(f"self.{path} = {known!r}", f"self.{path} = {now!r}")

    def check_decisions(self, tensors: Sequence[Any]) -> None:
        """Raise :class:`MismatchError` if conditions in the forward differ for ``tensors``."""
        if self.decisions is not None:
            now = [bool(answer) for answer in self.decisions.function(None, *tensors)]
            if now != self.decided:
                raise MismatchError("one kind of shapes, dtypes and devices", "another kind")
        if self.seen is not None and call_signature(tensors) not in self.seen:
            raise MismatchError("some shapes and dtypes", "others")

    def is_like(self, other: Program) -> bool:
        """Whether both are the same forward. The kinds of calls seen may differ."""
        return (
            self.forward.text == other.forward.text
            and {k: s.text for k, s in self.branches.items()}
            == {k: s.text for k, s in other.branches.items()}
            and (self.row_layouts, self.reuses_skip, self.tensors, self.decided, self.runs_own)
            == (other.row_layouts, other.reuses_skip, other.tensors, other.decided, other.runs_own)
            and (self.asks, self.watched_globals) == (other.asks, other.watched_globals)
            and same(self.constants, other.constants)
            and same(self.attributes, other.attributes)
            and same(self._stored_tensors(), other._stored_tensors())
        )

    def _stored_tensors(self) -> list[Any]:
        """Return the tensors, such as tables in a cache, that the generated functions use."""
        sources = (self.forward, *self.branches.values())
        found = (name for source in sources for name in source.names.values())
        return [constant.value for constant in found if isinstance(constant, Constant)]


def _equal_in_graph(now: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    return all(a is None or a == b for a, b in zip(now, known, strict=True))


def _described(modes: tuple[Any, ...]) -> str:
    return ", ".join(str(found) for found in modes)


def most_varied(programs: Sequence[Program]) -> str:
    """Return the name of what differs most between programs: an attribute or an argument."""
    values: dict[str, list[Any]] = {}
    for program in programs:
        known_globals = {} if program.watched_globals is None else program.watched_globals.known
        fixed = {
            **{f"self.{k}": v for k, v in program.attributes.items()},
            **{expression: v for (_, expression), v in known_globals.items()},
            **program.constants,
        }
        for name, value in fixed.items():
            known = values.setdefault(name, [])
            if not any(same(other, value) for other in known):
                known.append(value)
    name = max(values, key=lambda name: len(values[name]), default="")
    return name if name and len(values[name]) > 1 else "a shape or dtype"


def call_signature(tensors: Iterable[Any]) -> Any:
    """Return everything that a forward can ask about a call except the values of its tensors."""
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        *((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors),
    )


class MismatchError(Exception):
    """A program is not valid for a call.

    Args:
        known: The value for which the program is valid, for the error message.
        given: The value in the call.
    """

    # Properties, because dynamo cannot trace the __init__ of an exception: it would raise an error
    # about that instead of the one that is made of these two.

    @property
    def known(self) -> str:
        """The value for which the program is valid."""
        return str(self.args[0])

    @property
    def given(self) -> str:
        """The value in the call."""
        return str(self.args[1])
