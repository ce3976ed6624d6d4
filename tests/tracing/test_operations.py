"""The table of operations: what stands in it, and that one entry is enough for an operation."""

from __future__ import annotations

import copy
import inspect
import operator

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

import torchdrop
from torchdrop.tracing import operations
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.operation import Operation
from torchdrop.tracing.operations import (
    TABLE,
    factories,
    in_place_operators,
    layers_with,
    named,
    operation_of,
    writes_first_argument,
)
from written_blocks import Base, flat, two
from zoo import BARELY, assert_same

# Where a name in the table may be defined.
LIBRARIES = (operator, torch, F, Tensor, torchdrop.functional, torchvision.ops)

# Names that are found in none of them: wrappers inside torch, reflected operators, and functions
# of models.
ELSEWHERE = {"fn", "boolean_dispatch", "_pad", "_assert", "rmul", "identity", "slice", "upsample"}
ELSEWHERE |= {"drop_block_2d", "unflatten"}


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: (*e.names, *e.in_place, "")[0])
def test_every_name_is_that_of_a_function_or_a_method(entry: Operation) -> None:
    for name in (*entry.names, *entry.in_place):
        assert name in ELSEWHERE or any(hasattr(library, name) for library in LIBRARIES), name
    for name in entry.attributes:
        assert hasattr(torch.zeros(1), name) or hasattr(torch.zeros(1).max(0), name), name


def test_a_function_of_torchdrop_that_takes_a_rate_is_known_to_drop() -> None:
    tensors = ("Tensor", "Sequence[Tensor]")
    dropping = set()
    for name in torchdrop.functional.__all__:
        parameters = inspect.signature(getattr(torchdrop.functional, name)).parameters
        first = next(iter(parameters.values()))
        if first.annotation in tensors and {"p", "beta"} & parameters.keys():
            dropping.add(name)
    assert len(dropping) >= 11
    assert {name for name in dropping if named(name).drops is None} == set()


X = object()  # stands for a tensor among the arguments of a call


def called(function: object, *args: object, **kwargs: object) -> fx.Node:
    """A node of a graph that calls ``function``, or the method of that name."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    given = tuple(x if a is X else a for a in args)
    if isinstance(function, str):
        return graph.call_method(function, given, kwargs)
    return graph.call_function(function, given, kwargs)


@pytest.mark.parametrize(
    ("node", "rate"),
    [
        (called(F.dropout, X), 0.5),
        (called(F.dropout, X, 0.1, False), 0.0),
        (called(F.dropout, X, p=0.2), 0.2),
        (called(F.alpha_dropout, X), 0.0),  # training is False by default
        (called(torch.dropout, X, 0.3, True), 0.3),
        (called(torchdrop.functional.uniform_dropout, X, 0.4), 0.4),
        (called(torchdrop.functional.drop_path_add, X, X, 0.4), 0.4),
        (called(torchdrop.functional.drop_block2d, X, 0.4, 3, False), 0.0),
        (called(torchdrop.functional.cutout, X, 2), 1.0),
        (called(torchvision.ops.stochastic_depth, X, 0.4, "row"), 0.4),
        (called(torchvision.ops.stochastic_depth, X, 0.4, "row", False), 0.0),
        (called(F.scaled_dot_product_attention, X, X, X), 0.0),
        (called(F.scaled_dot_product_attention, X, X, X, None, 0.4), 0.4),
        (called(torch.bernoulli, X, 0.4), None),  # a probability of keeping, or of anything
        (called("bernoulli_", X, 0.4), None),
    ],
)
def test_the_rate_of_a_call(node: fx.Node, rate: float | None) -> None:
    form = operation_of(node).drops
    assert form is not None
    assert form.rate(node) == rate


@pytest.mark.parametrize(
    ("node", "writes"),
    [
        (called(operator.iadd, X, X), True),
        (called(operator.ior, X, X), True),
        (called(operator.setitem, X, 0, X), True),
        (called("relu_", X), True),
        (called("fill_diagonal_", X, 0.0), True),  # not in the table
        (called(F.relu, X, inplace=True), True),
        (called(F.relu, X), False),
        (called(operator.or_, X, X), False),
        (called(operator.add, X, X), False),
        (called("add", X, X), False),
        (called("__getitem__", X, 0), False),
    ],
)
def test_what_writes_into_its_first_argument(node: fx.Node, writes: bool) -> None:
    assert writes_first_argument(node) is writes


def test_layers_are_known_by_their_class() -> None:
    assert issubclass(nn.Conv2d, layers_with("linear", "product"))
    assert issubclass(nn.BatchNorm2d, layers_with("linear", "product"))
    assert not issubclass(nn.ReLU, layers_with("linear", "product"))
    assert issubclass(nn.AlphaDropout, layers_with("drops"))
    assert not issubclass(nn.Identity, layers_with("drops"))


def test_every_factory_and_every_operator_with_assignment_is_recorded() -> None:
    assert torch.rand in factories()
    assert torch.zeros in factories()
    pairs = dict(in_place_operators())
    assert pairs[operator.iadd] is operator.add
    assert pairs[operator.itruediv] is operator.truediv
    assert pairs[operator.ior] is operator.or_
    assert operator.setitem not in pairs


def test_a_name_stands_in_the_table_once() -> None:
    names = [name for entry in TABLE for name in (*entry.names, *entry.in_place)]
    assert sorted(names) == sorted(set(names))


# --- one entry for a new form of sum --------------------------------------------------------------


class Fused(Base):
    """A scaled branch, added by one function."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.f(x), self.gamma, value=0.5)


class FusedInPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        return x.addcmul_(self.f(x.clone()), self.gamma)


ENTRIES = {
    Fused: Operation(
        ("addcmul",),
        spelled_out=lambda x, one, two, *, value=1.0: x + value * one * two,
    ),
    FusedInPlace: Operation(
        in_place=("addcmul_",),
        spelled_out=lambda x, one, two, *, value=1.0: x.add_(one * two * value),
    ),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_new_form_of_sum_is_one_entry(kind: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = two(kind)(), flat()
    entry = ENTRIES[kind]
    names = (*entry.names, *entry.in_place)
    for name in names:  # as if the table did not have it
        monkeypatch.delitem(operations._BY_NAME, name, raising=False)
    assert torchdrop.find_residuals(model) == []
    monkeypatch.setattr(operations, "TABLE", (*TABLE, entry))
    for name in names:
        monkeypatch.setitem(operations._BY_NAME, name, entry)
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    assert [r.action for r in plan.blocks] == ["skip", "skip"]
    # a fused operation rounds once, the plain ones more often
    assert_same(model(x.clone()), dense(x.clone()), tolerance=1e-6)
    plan.set_p([1.0, 1.0])
    assert_same(model(x.clone()), x)


class FusedIntoGivenMemory(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.f(x), self.gamma, out=None)


def test_a_call_with_other_arguments_is_not_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operations._BY_NAME, "addcmul", ENTRIES[Fused])
    graph = trace_block(FusedIntoGivenMemory()).graph
    assert torch.addcmul in [node.target for node in graph.nodes]
    assert torch.addcmul not in [node.target for node in trace_block(Fused()).graph.nodes]


def test_a_function_of_the_same_name_is_not_that_of_the_table() -> None:
    def add(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    assert operations.is_function_of_table(torch.add)
    assert operations.is_function_of_table(operator.add)
    assert not operations.is_function_of_table(add)


def test_an_assignment_operator_is_recorded_as_it_is() -> None:
    class Masks(Base):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            mask |= x > 0
            return x + self.f(x) * mask

    graph = trace_block(Masks()).graph
    assert operator.ior in [node.target for node in graph.nodes]
