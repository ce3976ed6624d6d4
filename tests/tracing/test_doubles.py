"""A double behaves as an instance of a class that does not know of it."""

from __future__ import annotations

import abc
import gc
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.doubles import instance_like
from torchdrop.tracing.untraceable import UntraceableError
from written_blocks import Base, Stack, W, two


class Table(type):
    """A metaclass that keeps a table of its classes, and has a property of its own."""

    made: ClassVar[list[type]] = []

    def __init__(cls, name: str, bases: Any, space: Any) -> None:
        super().__init__(name, bases, space)
        Table.made.append(cls)

    @property
    def by_metaclass(cls) -> float:
        return 2.0


class Known(nn.Module, metaclass=Table):
    known: ClassVar[dict[str, type]] = {}
    deleted: ClassVar[list[str]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.known[cls.__name__] = cls

    def __len__(self) -> int:
        return 3

    def __del__(self) -> None:
        Known.deleted.append(type(self).__name__)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Asking(Known):
    by_class = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(W, W), nn.GELU())

    @property
    def half(self) -> float:
        return self.by_class / 2

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self, Asking)
        assert issubclass(type(self), Known)
        assert self.__class__ is Asking
        assert type(self).__name__ == "Asking"
        assert list(self.parameters())
        y = super().forward(x) * len(self) * type(self).by_metaclass * type(self).by_class
        return x + y * self.half


def test_classes_and_their_tables_do_not_learn_of_doubles() -> None:
    tables = dict(Known.known), list(Table.made), list(Known.deleted)
    classes = Asking, Known, Base, nn.Module
    subclasses = [kind.__subclasses__() for kind in classes]
    model = Stack(Asking(), Asking())
    found = torchdrop.find_residuals(model)
    assert [len(r.branches) for r in found] == [1, 1]
    gc.collect()
    assert [kind.__subclasses__() for kind in classes] == subclasses
    assert (Known.known, Table.made, Known.deleted) == tables
    assert type(Known.known["Asking"]()) is Asking  # type: ignore[comparison-overlap]


def test_a_class_that_is_derived_would_be_in_the_tables() -> None:
    before = dict(Known.known)
    Table("Asking", (Asking,), {})
    changed = {name for name in Known.known if Known.known[name] is not before.get(name)}
    Known.known.update(before)
    assert changed == {"Asking"}


class Abstract(abc.ABC):  # noqa: B024
    pass


@Abstract.register
class Registered(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self, Abstract)
        return x + self.f(x)


def test_abstract_classes_recognise_a_double() -> None:
    assert len(torchdrop.find_residuals(two(Registered)())) == 2


class Slotted(Base):
    __slots__ = ("more",)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def test_slots_are_refused_with_a_reason() -> None:
    with pytest.raises(UntraceableError, match=r"Slotted has __slots__"):
        trace_block(Slotted())


class Deleting(Base):
    def forward(self, x: Tensor) -> Tensor:
        del self.gamma
        return x + self.f(x)


class AsKey(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * SEEN.setdefault(self, 1.0)


SEEN: dict[nn.Module, float] = {}


@pytest.mark.parametrize(
    ("kind", "why"), [(Deleting, "it deletes self.gamma"), (AsKey, "itself as a key of a dict")]
)
def test_what_would_stay_is_refused(kind: type[Base], why: str) -> None:
    with pytest.raises(UntraceableError, match=why):
        trace_block(kind())
    assert SEEN == {}


def test_a_double_has_a_state_of_its_own() -> None:
    double = instance_like(Base, {}, {"training": False})
    assert isinstance(double, Base)
    assert vars(double) == {"training": False}
    assert torch.nn.Module.__subclasses__().count(type(double)) == 0
