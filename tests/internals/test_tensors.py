"""Writes, views, references and saved tensors are seen as PyTorch itself sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from probes import Probe, Probes, check
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from torchdrop import internals
from torchdrop.internals import tensors

probe = Probes()


@probe(
    "tree_flatten",
    "tree_unflatten",
    "tree_map_only",
    api="torch.utils._pytree",
    purpose="find the tensors in nested containers",
)
def _() -> None:
    x, y = torch.ones(1), torch.zeros(1)
    tree = {"a": [x, 1], "b": (y, None)}
    leaves, structure = internals.tree_flatten(tree)
    assert [id(leaf) for leaf in leaves] == [id(x), id(1), id(y), id(None)]
    assert internals.tree_unflatten(leaves, structure)["b"][0] is y
    doubled = internals.tree_map_only(torch.Tensor, lambda t: t + 1, tree)
    assert doubled == {"a": [torch.tensor([2.0]), 1], "b": (torch.tensor([1.0]), None)}


@probe(
    "modifications_of",
    api="Tensor._version",
    purpose="notice a branch that writes into its input",
)
def _() -> None:
    x = torch.ones(4)
    before = internals.modifications_of(x)
    x + 1, x.detach(), x[1:]
    assert internals.modifications_of(x) == before
    x.add_(1)
    x[1:].zero_()
    x.detach().mul_(2)
    assert internals.modifications_of(x) == before + 3
    with torch.inference_mode():
        inference = torch.ones(1)
    with pytest.raises(RuntimeError, match="version counter"):
        internals.modifications_of(inference)


@probe("base_of", api="Tensor._base", purpose="find the tensor whose memory a view uses")
def _() -> None:
    x = torch.ones(4, requires_grad=True) * 1.0
    assert internals.base_of(x) is None
    assert internals.base_of(x[1:].view(3, 1)) is x
    assert internals.base_of(x.clone()) is None


@probe(
    "count_references",
    api="Tensor._use_count, torch._C._storage_Use_Count or UntypedStorage._cdata",
    purpose="write into a gradient only if nothing else refers to it",
)
def _() -> None:
    found: list[Any] = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            found.append(internals.count_references(grads))
            return grads[0]

    def count(keep: Callable[[torch.Tensor], Any]) -> Any:
        kept: list[Any] = []
        leaf = torch.ones(3, requires_grad=True)
        y = Count.apply(leaf * 1.0)
        y.register_hook(lambda grad: kept.append(keep(grad)))
        (y * 2.0).sum().backward()
        return found.pop()

    def as_gradient(grad: torch.Tensor) -> torch.Tensor:
        leaf = torch.zeros(3, requires_grad=True)
        leaf.grad = grad
        return leaf

    def saved(grad: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return torch.ones(3, requires_grad=True) * grad

    assert tensors._counts_references()
    alone = count(lambda grad: None)
    assert alone is not None
    assert count(lambda grad: grad.sum().item()) == alone
    holders = (
        lambda grad: grad,
        lambda grad: grad[1:],
        torch.Tensor.detach,
        torch.Tensor.numpy,
        torch.Tensor.untyped_storage,
        as_gradient,
        saved,
    )
    for number, keep in enumerate(holders):
        assert count(keep) != alone, f"holder {number} is not counted"
    assert internals.count_references((nn.Parameter(torch.ones(1)),)) is None


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x.square()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (out,) = ctx.saved_tensors
        return 2 * out.sqrt() * grads[0]


def raises_if_written_into(y: torch.Tensor) -> bool:
    y.detach().zero_()
    try:
        y.sum().backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


@probe(
    "saved_by_producer",
    "may_be_saved_by_producer",
    api="_saved_result, _saved_result0 or _saved_output on the classes of autograd nodes",
    purpose="know which tensors PyTorch saves for backward",
)
def _() -> None:
    def leaf() -> torch.Tensor:
        return torch.rand(2, 3, requires_grad=True)

    for make in (torch.relu, torch.sigmoid, torch.tanh, torch.exp, lambda x: x.softmax(1)):
        assert internals.saved_by_producer(make(leaf()))
        assert internals.may_be_saved_by_producer(make(leaf()))
        assert raises_if_written_into(make(leaf()))
    for make in (torch.neg, torch.abs, F.gelu, F.softplus, lambda x: x + 1, lambda x: x @ x.mT):
        assert not internals.saved_by_producer(make(leaf()))
        assert not internals.may_be_saved_by_producer(make(leaf()))
        assert not raises_if_written_into(make(leaf()))
    x = torch.rand(2, 2, 3, 4, requires_grad=True)
    scores = torch.rand(6, 2, 5, requires_grad=True).log_softmax(2)
    sizes = torch.full((2,), 6), torch.full((2,), 3)
    others = (
        Square.apply(leaf()),  # saved_tensors
        F.scaled_dot_product_attention(x, x, x),  # _saved_output
        F.ctc_loss(scores, torch.ones(2, 3).long(), *sizes, reduction="none"),  # _saved_result0
    )
    for tensor in others:
        assert internals.may_be_saved_by_producer(tensor)
        assert not internals.saved_by_producer(tensor)
    assert not internals.saved_by_producer(leaf())


@probe(
    "innermost_saved_tensor_hooks",
    api="_saved_tensors_hooks_is_enabled or _top_saved_tensors_default_hooks of torch._C._autograd",
    purpose="hand saved tensors to the hooks of an outer context",
)
def _() -> None:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    assert internals.innermost_saved_tensor_hooks() == (True, None)
    with saved_tensors_hooks(str, str), saved_tensors_hooks(pack, unpack):
        assert internals.innermost_saved_tensor_hooks() == (True, (pack, unpack))
    with disable_saved_tensors_hooks("not here"):
        assert internals.innermost_saved_tensor_hooks() == (False, None)
    assert internals.innermost_saved_tensor_hooks() == (True, None)


@probe(
    "own_saved_tensor_hooks",
    api="_saved_tensors_hooks_is_enabled or _top_saved_tensors_default_hooks of torch._C._autograd",
    purpose="keep what it computes itself out of the count of a checkpoint",
)
def _() -> None:
    seen: list[tuple[int, ...]] = []
    leaf = torch.ones(2, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    with saved_tensors_hooks(pack, unpack):
        with internals.own_saved_tensor_hooks() as inner:
            assert internals.innermost_saved_tensor_hooks() == (True, inner)
            leaf.relu()
        assert seen == []
        leaf.relu()
        assert seen != []
    with internals.own_saved_tensor_hooks() as inner:
        assert inner is None
    with disable_saved_tensors_hooks("not here"), internals.own_saved_tensor_hooks() as inner:
        assert inner is None


@probe(
    "is_python_autograd_node",
    api="torch.autograd.function.BackwardCFunction",
    purpose="compare the gradients of functions that are written in Python",
)
def _() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * x

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return 2.0 * grads[0]

    leaf = torch.ones(2, requires_grad=True)
    assert internals.is_python_autograd_node(Twice.apply(leaf).grad_fn)
    assert not internals.is_python_autograd_node((2.0 * leaf).grad_fn)


@pytest.mark.parametrize("found", probe, ids=lambda found: found.names[0])
def test_a_private_api_behaves_as_torchdrop_needs_it(found: Probe) -> None:
    check(found)


def test_every_name_has_a_probe() -> None:
    assert probe.names() == sorted(tensors.__all__)
