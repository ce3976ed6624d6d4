"""A generated forward: its source, the functions of its branches, the calls that it stands for."""

from __future__ import annotations

import importlib
import inspect
import linecache
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from types import ModuleType
from typing import Any

import torch
from torch import nn

from torchdrop.finding.row_layout import RowLayout
from torchdrop.tracing.call_arguments import flatten_arguments
from torchdrop.tracing.watched_attributes import same

__all__ = ["MismatchError", "Program", "Source", "call_signature"]


class Source:
    """A generated function: its text and what its names stand for. Immutable, pickles, shared."""

    def __init__(self, label: str, text: str, names: dict[str, Any]) -> None:
        self.label = label
        self.text = text
        self.names = names
        self.function: Callable[..., Any] = self._compile()

    def _compile(self) -> Callable[..., Any]:
        filename = f"<torchdrop {self.label}>"
        # so that a traceback through generated code shows its lines
        linecache.cache[filename] = (len(self.text), None, self.text.splitlines(True), filename)
        scope = dict(self.names)
        exec(compile(self.text, filename, "exec"), scope)
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
    """A deferred forward, the functions of its branches, and the calls that it stands for.

    Attributes:
        forward: ``forward(self, site, *tensors)``.
        branches: By number, ``forward(self, site, *inputs)`` of each branch that can be skipped.
        row_layouts: For each of them, the dimension on which each input is cut by rows (None: it is
            not); None where that was not measured.
        spent: Those whose skip is the sum of another branch, which nothing else uses: its memory is
            free for the sum.
        tensors: The arguments that vary, as :func:`flatten_arguments` names them.
        constants: The other arguments, which the forward holds fixed.
        attributes: The attributes of the block that it holds fixed.
        decisions: ``decisions(*tensors)``: what the block branches on before its graph begins.
        decided: What the answers have to be.
        seen: The kinds of calls (shapes, dtypes) that it is known to stand for; None where it
            stands for all.
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

    def __post_init__(self) -> None:
        # By whom they are held, since to go to a child takes the most time. Of one name an
        # attrgetter gives no tuple, so that is there twice.
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

    def bind(
        self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any]:
        """The tensors of a call in the order of the forward.

        Raises:
            MismatchError: What the forward holds fixed is different in this call.
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

    def check_attributes(self, module: nn.Module) -> None:
        """Raise :class:`MismatchError` where an attribute of the block is no longer what it was."""
        if torch.compiler.is_compiling():  # it knows no attrgetter but one made within the graph
            self._check_one_by_one(module)
            return
        for holder, read, known in self._reads:
            try:
                now = read(module if holder is None else holder(module))
            except AttributeError as error:
                raise MismatchError("an attribute that is gone", str(error)) from None
            if not all(map(is_, known, now)) and not all(map(same, known, now)):
                self._check_one_by_one(module)

    def _check_one_by_one(self, module: nn.Module) -> None:
        for path, known in self.attributes.items():
            now = attrgetter(path)(module)
            if not same(known, now):
                raise MismatchError(f"self.{path} = {known!r}", f"self.{path} = {now!r}")

    def check_decisions(self, tensors: Sequence[Any]) -> None:
        """Raise :class:`MismatchError` where the block would branch otherwise on ``tensors``."""
        if self.decisions is not None:
            now = [bool(answer) for answer in self.decisions.function(None, *tensors)]
            if now != self.decided:
                raise MismatchError(
                    "tensors of one kind of shape, dtype and device", "those of another"
                )
        if self.seen is not None and call_signature(tensors) not in self.seen:
            raise MismatchError("tensors of some shapes and dtypes", "those of others")

    def is_like(self, other: Program) -> bool:
        """Whether both are the same forward, apart from the calls that they are known to fit."""
        return (
            self.forward.text == other.forward.text
            and {k: s.text for k, s in self.branches.items()}
            == {k: s.text for k, s in other.branches.items()}
            and (self.row_layouts, self.reuses_skip, self.tensors, self.decided)
            == (other.row_layouts, other.reuses_skip, other.tensors, other.decided)
            and same(self.constants, other.constants)
            and same(self.attributes, other.attributes)
        )


def call_signature(tensors: Iterable[Any]) -> Any:
    """What a forward can ask about a call without looking into its tensors."""
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        *((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors),
    )


class MismatchError(Exception):
    """A call is not one of those that a program stands for: what it holds fixed, what was found."""

    # Not attributes that are set in an __init__, which dynamo cannot trace and would complain of,
    # instead of showing what is then said.

    @property
    def known(self) -> str:
        """What the program holds fixed."""
        return str(self.args[0])

    @property
    def given(self) -> str:
        """What was found instead."""
        return str(self.args[1])
