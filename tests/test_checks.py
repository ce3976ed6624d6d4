"""Checks of arguments: what is legal passes, and errors name the argument and its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchdrop import checks


@pytest.mark.parametrize(
    "legal",
    [
        lambda: checks.check_choice("a", ("a", "b"), "name"),
        lambda: checks.check_model(nn.Identity()),
        lambda: checks.check_flag(False, "flag"),
        lambda: checks.check_generator(None),
        lambda: checks.check_generator(torch.Generator()),
        lambda: checks.check_mode("row"),
        lambda: checks.check_input(torch.zeros(1, dtype=torch.bfloat16)),
    ],
)
def test_legal_arguments_pass(legal: Callable[[], None]) -> None:
    legal()


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: checks.check_choice("c", ("a", "b"), "x"), ValueError, "x has .* 'a', 'b', .*'c'"),
        (lambda: checks.check_choice(["a"], ("a",), "x"), ValueError, r"one of 'a', but got \['a'"),
        (lambda: checks.check_model(nn.Linear), TypeError, r"nn\.Module, but got a type"),
        (lambda: checks.check_flag(1, "x"), TypeError, "x has to be True or False, but got 1"),
        (lambda: checks.check_generator(3), TypeError, r"torch\.Generator or None, but got a int"),
        (lambda: checks.check_mode("rows"), ValueError, "'batch' or 'row', but got 'rows'"),
        (lambda: checks.check_whole(1.0, "x"), TypeError, "x has to be an integer, but got 1.0"),
        (lambda: checks.check_whole(True, "x"), TypeError, "integer, but got True"),
        (lambda: checks.check_whole(1, "x", 2), ValueError, "x has to be 2 or more, but got 1"),
        (lambda: checks.check_input([1.0]), TypeError, "input has to be a tensor, but got list"),
        (lambda: checks.check_input(torch.zeros(1).int()), TypeError, "dtype torch.int32"),
        (lambda: checks.check_input(torch.zeros(())), ValueError, "at least one dimension"),
        (lambda: checks.check_dim("0"), TypeError, "but got '0' of type str"),
        (lambda: checks.check_dim(True), TypeError, "but got True of type bool"),
        (lambda: checks.check_dim(2, 2), ValueError, "between -2 and 1 for an input of 2"),
        (lambda: checks.check_dim(-3, 2), ValueError, "but got -3"),
    ],
)
def test_other_arguments_are_refused(
    check: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check()


@pytest.mark.parametrize(
    ("dim", "ndim", "found"), [(1, 2, 1), (-1, 2, 1), (-2, 2, 0), (-1, None, -1)]
)
def test_a_dimension_is_counted_from_the_front(dim: int, ndim: int | None, found: int) -> None:
    assert checks.check_dim(dim, ndim) == found


def test_an_integer_is_returned() -> None:
    assert checks.check_whole(3, "x", 3) == 3
