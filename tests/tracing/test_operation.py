"""One entry of the table: how it reads the drop probability and the summands of a call."""

from __future__ import annotations

import pytest
from torch import fx

from torchdrop.tracing.operation import DropForm, SumForm


def call(function: object, *args: object, **kwargs: object) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(function, (graph.placeholder("x"), *args), kwargs)


def drop(x: object, amount: float, p: float = 0.3, training: bool = True) -> object:
    return x


def test_a_function_of_python_is_read_by_its_signature() -> None:
    assert DropForm().rate(call(drop, 7.0)) == 0.3
    assert DropForm().rate(call(drop, 7.0, 0.2)) == 0.2
    assert DropForm().rate(call(drop, amount=7.0, p=0.2)) == 0.2
    assert DropForm().rate(call(drop, 7.0, 0.2, False)) == 0.0
    assert DropForm(rates=("amount",)).rate(call(drop, 0.7)) == 0.7


@pytest.mark.parametrize(("default", "rate"), [(None, None), (0.1, 0.1)])
def test_a_function_in_c_is_read_by_the_parameters_of_its_entry(
    default: float | None, rate: float | None
) -> None:
    form = DropForm(parameters=("input", "count", "p"), default=default)
    assert form.rate(call(pow, 3, 0.2)) == 0.2
    assert form.rate(call(pow, 3)) == rate


def test_a_rate_that_is_computed_is_not_known() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert DropForm().rate(graph.call_function(drop, (x, 1.0, x))) is None


def test_the_parameters_of_a_sum_are_in_order_and_its_factor_is_the_last() -> None:
    assert SumForm(factor="alpha").parameters == ("input", "other", "alpha")
    assert SumForm("left", "right", pad_dim="dim").parameters == ("left", "right", "dim")
