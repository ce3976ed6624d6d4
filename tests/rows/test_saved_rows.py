"""Rows that are gathered again in the backward pass: memory, gradients, hooks, errors."""

import pytest
import torch
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from torchdrop.cost import saved_bytes
from torchdrop.internals import saved_by_producer
from torchdrop.rows.saved_rows import regather_in_backward
from torchdrop.rows.take_and_add import take

ROWS = torch.tensor([0, 2, 5])


def branch(x, weight, *, regather, rows=ROWS):
    """The product of some rows and a weight, which saves the rows for backward."""
    some = take(x, rows)
    if not regather:
        return some @ weight
    with regather_in_backward([(some, x)], rows, 0):
        return some @ weight


def leaves():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(4, 4, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("make", "saved"),
    [(torch.relu, True), (torch.sigmoid, True), (torch.neg, False), (torch.detach, False)],
)
def test_who_saves_its_own_result(make, saved):
    x = torch.randn(3, requires_grad=True)
    assert saved_by_producer(make(x)) == saved
    assert not saved_by_producer(x)


def test_the_rows_are_not_saved_besides_the_tensor():
    x, weight = leaves()
    weight = torch.nn.Parameter(weight)

    def bytes_of(regather):
        return saved_bytes(lambda: branch(torch.relu(x), weight, regather=regather))

    rows = 3 * 4 * 8
    assert bytes_of(False) - bytes_of(True) == rows


def test_gradients_and_second_derivatives_are_the_same():
    x, weight = leaves()
    found = []
    for regather in (True, False):
        out = branch(torch.relu(x), weight, regather=regather).square().sum()
        first = torch.autograd.grad(out, (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))
        found.append((*first, *second))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_the_hooks_of_an_outer_context_get_the_whole_tensor():
    x, weight = leaves()
    source = torch.relu(x)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor * 2

    with saved_tensors_hooks(pack, lambda tensor: (tensor / 2).to(tensor.dtype)):
        out = branch(source, weight, regather=True)
    assert torch.Size([6, 4]) in packed
    assert torch.Size([3, 4]) not in packed
    out.sum().backward()
    expected = torch.zeros(6, 4, dtype=torch.float64)
    expected[ROWS] = weight.detach().sum(1)
    torch.testing.assert_close(x.grad, expected * (x.detach() > 0))


def test_where_hooks_are_disabled_the_rows_are_saved_as_usual():
    x, weight = leaves()
    with disable_saved_tensors_hooks("not here"):
        out = branch(torch.relu(x), weight, regather=True)
    out.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_a_checkpoint(use_reentrant):
    grads = []
    x, weight = leaves()
    for regather in (True, False):

        def run(x, regather=regather):
            return branch(torch.relu(x), weight, regather=regather)

        x.grad = None
        checkpoint(run, x, use_reentrant=use_reentrant).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_writing_into_the_tensor_before_the_backward_pass_is_an_error():
    x, weight = leaves()
    source = x * 1.0  # its producer does not save it, so only the regathering does
    out = branch(source, weight, regather=True)
    source.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_hooks_end_once_everything_is_saved():
    x, weight = leaves()
    source = torch.relu(x)
    some = take(source, ROWS)
    packed = []
    with (
        saved_tensors_hooks(lambda t: packed.append(tuple(t.shape)) or t, lambda t: t),
        regather_in_backward([(some, source)], ROWS, 0),
    ):
        some @ weight
        assert sorted(packed) == [(4, 4), (6, 4)]
        packed.clear()
        some @ weight  # the whole tensor is saved, and the outer hooks get what they always get
        assert sorted(packed) == [(3, 4), (4, 4)]


def test_without_gathered_tensors_nothing_is_set():
    x, weight = leaves()
    with regather_in_backward([], ROWS, 0):
        out = x @ weight
    out.sum().backward()
    assert x.grad is not None
