from __future__ import annotations

import doctest
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchdrop import cost


def test_linear_counts_two_operations_a_weight_and_row():
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    assert cost.flops(layer, x) == 2 * 3 * 7 * 5


def test_linear_step_counts_forward_and_the_gradient_of_the_weights():
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    # x needs no gradient, so backward is one product of the same size.
    assert cost.flops(lambda: layer(x).sum().backward()) == 2 * (2 * 3 * 7 * 5)


def test_conv_counts_every_output_pixel():
    layer, x = nn.Conv2d(3, 6, 3, padding=1), torch.randn(2, 3, 8, 8)
    assert cost.flops(layer, x) == 2 * 2 * (6 * 8 * 8) * (3 * 3 * 3)


def test_keyword_arguments_reach_the_function():
    assert cost.flops(torch.matmul, torch.ones(2, 3), other=torch.ones(3, 4)) == 2 * 2 * 3 * 4


def test_counter_adds_up_and_ends_with_the_block():
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    with cost.FlopCounter() as counter:
        layer(x)
        layer(x)
    layer(x)
    assert counter.total == 2 * (2 * 3 * 7 * 5)


BATCH, HEADS, TOKENS, WIDTH = 2, 3, 5, 4
ONE_PRODUCT = 2 * BATCH * HEADS * TOKENS * TOKENS * WIDTH


def _attention_step(step: bool) -> None:
    query, key, value = (
        torch.randn(BATCH, HEADS, TOKENS, WIDTH, requires_grad=True) for _ in range(3)
    )
    out = F.scaled_dot_product_attention(query, key, value)
    if step:
        out.sum().backward()


@pytest.mark.parametrize(("step", "products"), [(False, 2), (True, 2 + 5)])
def test_attention_counts_on_the_cpu(step, products):
    # Forward: scores and their product with the values. Backward: the scores again, and two
    # products each for the gradients through the values and through the scores.
    assert cost.flops(_attention_step, step) == products * ONE_PRODUCT


@pytest.mark.parametrize("step", [False, True])
def test_attention_is_what_the_plain_counter_leaves_out(step):
    with FlopCounterMode(display=False) as plain:
        _attention_step(step)
    assert plain.get_total_flops() == 0


def test_saved_bytes_of_a_linear_are_its_input():
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    assert cost.saved_bytes(lambda: layer(x).sum()) == 3 * 7 * 4


def test_saved_bytes_count_a_storage_once():
    x = torch.randn(10, requires_grad=True)
    assert cost.saved_bytes(lambda: x * x + x[:5].sum() * x) == (10 + 1) * 4


def test_saved_bytes_leave_out_parameters_and_their_views():
    weight, x = nn.Parameter(torch.randn(7, 5)), torch.randn(3, 7, requires_grad=True)
    # The product keeps x and the weight; the weight is there anyway, as a view too.
    assert cost.saved_bytes(lambda: x @ weight) == 3 * 7 * 4
    assert cost.saved_bytes(lambda: x @ weight.view(7, 5)) == 3 * 7 * 4
    # The twin: the same numbers, but in a tensor that is no parameter.
    plain = weight.detach().clone().requires_grad_()
    assert cost.saved_bytes(lambda: x @ plain) == 3 * 7 * 4 + 7 * 5 * 4


def test_saved_bytes_change_no_gradient():
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    layer(x).exp().sum().backward()
    wanted = layer.weight.grad.clone()
    layer.weight.grad = None
    with cost.SavedBytes():
        layer(x).exp().sum().backward()
    assert torch.equal(layer.weight.grad, wanted)


def test_saved_bytes_without_gradients_are_none():
    with torch.no_grad():
        assert cost.saved_bytes(nn.Linear(7, 5), torch.randn(3, 7)) == 0


def test_examples_in_the_docstrings():
    assert doctest.testmod(cost).failed == 0


def test_what_was_counted_is_let_go_at_once():
    x = torch.randn(10, requires_grad=True)
    gc.disable()
    try:
        with cost.SavedBytes() as counted:
            y = x.exp()
            held = weakref.ref(y.untyped_storage())
            del y
            assert held() is not None
            assert counted.total == 40
        assert held() is None
    finally:
        gc.enable()
    assert counted.total == 40
