"""Gathering rows and adding them back: values, memory formats, dtypes, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp, vmap

import torchdrop.rows.take_and_add
from torchdrop.cost import saved_bytes
from torchdrop.rows.take_and_add import add_rows, add_whole, skip_and_rows, take, with_zero_grads

FORMATS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
}


def _rows(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.long)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dim", [0, 1, 3])
@pytest.mark.parametrize("rows", [(), (1,), (0, 2), (0, 1, 2)])
def test_take_and_add_rows_are_plain_indexing(layout: str, dim: int, rows: tuple[int, ...]) -> None:
    x = FORMATS[layout](torch.randn(4, 3, 5, 6, dtype=torch.float64))
    index = _rows(*rows)
    part = take(x, index, dim)
    assert torch.equal(part, x.index_select(dim, index))
    branch = torch.randn_like(part)
    out = add_rows(x, branch, index, 2.0, dim)
    assert torch.equal(out, x.contiguous().index_add(dim, index, branch, alpha=2.0))
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_the_memory_format_is_kept(layout: str) -> None:
    x = FORMATS[layout](torch.randn(4, 3, 5, 6))
    order = sorted(range(4), key=x.stride)
    part = take(x, _rows(0, 2))
    assert sorted(range(4), key=part.stride) == order
    out = add_rows(x, part, _rows(0, 2), 1.0)
    assert out.stride() == x.stride()


def test_in_place_writes_into_the_skip() -> None:
    for layout in ("contiguous", "channels_last"):
        x = FORMATS[layout](torch.randn(4, 3, 5, 6))
        expected = x.clone()
        expected[1] += 3.0
        out = add_rows(x, torch.ones(1, 3, 5, 6), _rows(1), 3.0, inplace=True)
        assert out.data_ptr() == x.data_ptr()
        assert torch.equal(x, expected)
        whole = x.clone()
        assert add_whole(x, torch.ones_like(x), 0.5, inplace=True) is x
        assert torch.equal(x, whole + 0.5)


@pytest.mark.parametrize("skip", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_sum(skip: torch.dtype, branch: torch.dtype) -> None:
    x, y = torch.ones(3, 2, dtype=skip), torch.ones(2, 2, dtype=branch)
    out = add_rows(x, y, _rows(0, 2), 1.5)
    assert out.dtype == (x[:2] + y).dtype
    assert out.tolist() == [[2.5, 2.5], [1.0, 1.0], [2.5, 2.5]]


def test_half_precision_does_not_round_the_scale() -> None:
    """1/0.9 in bfloat16 is 1.109375: .16 % off, for every row."""
    x, y = torch.zeros(1, 1000, dtype=torch.bfloat16), torch.rand(1, 1000).bfloat16()
    out = add_rows(x, y, _rows(0), 1 / 0.9)
    assert torch.equal(out, (y.float() / 0.9).bfloat16())
    assert not torch.equal(out, y * torch.tensor(1 / 0.9).bfloat16())


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (2,), (1, 2)])
def test_a_branch_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 2\) that is \(2, 2\), but"):
        add_rows(torch.zeros(4, 2), torch.zeros(shape), _rows(0, 2), 1.0)


def test_a_branch_with_one_value_for_a_row_is_broadcast() -> None:
    skip, branch = torch.randn(4, 3, 2), torch.randn(2, 1, 2, requires_grad=True)
    out = add_rows(skip, branch, _rows(0, 2), 2.0)
    assert torch.equal(out[[1, 3]], skip[[1, 3]])
    torch.testing.assert_close(out[[0, 2]], skip[[0, 2]] + 2.0 * branch)
    out.sum().backward()
    assert torch.equal(branch.grad, torch.full((2, 1, 2), 6.0))


@given(st.integers(1, 6), st.data())
@settings(max_examples=25, deadline=None)
def test_gradients_follow_the_forward(batch: int, data: st.DataObject) -> None:
    rows = _rows(*sorted(data.draw(st.sets(st.integers(0, batch - 1)))))
    x = torch.randn(batch, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return add_rows(x, take(x, rows) * weight, rows, 1.25)

    assert torch.autograd.gradcheck(run, (x, weight))


def test_unused_tensors_get_gradients_of_zeros_through_a_copy() -> None:
    x, used = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    frozen = torch.randn(2)
    out = with_zero_grads(x, [used, frozen])
    assert out.data_ptr() != x.data_ptr()
    assert torch.equal(out, x)
    out.sum().backward()
    assert used.grad is not None
    assert used.grad.tolist() == [0.0, 0.0]
    assert torch.equal(x.grad, torch.ones(3))
    with torch.no_grad():
        assert not with_zero_grads(x, [used]).requires_grad
    assert with_zero_grads(frozen, []).data_ptr() != frozen.data_ptr()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # inside torch.func.jvp
def test_gradients_of_zeros_under_vmap_and_in_forward_mode() -> None:
    weight = torch.randn(2, requires_grad=True)
    out = torch.func.vmap(lambda x: with_zero_grads(x, [weight]))(torch.randn(3, 2))
    assert out.shape == (3, 2)
    _, tangent = torch.func.jvp(
        lambda x: with_zero_grads(x, [weight]), (torch.ones(2),), (torch.ones(2),)
    )
    assert tangent.tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("way_to_fork")
@pytest.mark.parametrize("dim", [0, 1])
def test_skip_and_rows_are_the_tensor_and_its_rows(dim: int) -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 2])
    whole, some = skip_and_rows(x, rows, dim)
    assert torch.equal(whole, x)
    assert torch.equal(some, x.index_select(dim, rows))
    assert torch.autograd.gradcheck(lambda t: skip_and_rows(t, rows, dim), (x,))
    assert torch.autograd.gradgradcheck(lambda t: skip_and_rows(t, rows, dim), (x,))
    # Each of the two alone passes the gradient on, too.
    for i in (0, 1):
        (mine,) = torch.autograd.grad(skip_and_rows(x, rows, dim)[i].square().sum(), x)
        plain = (x, x.index_select(dim, rows))[i]
        (theirs,) = torch.autograd.grad(plain.square().sum(), x)
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("way_to_fork")
def test_skip_and_rows_keep_channels_last_forward_and_backward() -> None:
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    whole, some = skip_and_rows(x, torch.tensor([1, 3]))
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert some.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(whole.sum() + some.sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("large_tensors")
@pytest.mark.parametrize("name", FORMATS)
def test_a_sum_reuses_the_memory_of_a_skip_that_nothing_else_reads(name: str) -> None:
    leaf = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    branch = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([3, 0])

    def total(reuses_skip: bool) -> tuple[Tensor, Tensor]:
        skip = FORMATS[name](leaf * 1.0)
        return skip, add_rows(skip, branch, rows, 1.5, reuses_skip=reuses_skip)

    skip, mine = total(True)
    before = skip.data_ptr()
    plain, theirs = total(False)
    assert plain.data_ptr() != theirs.data_ptr()
    assert (mine.data_ptr() == before) == (name not in ("sliced", "expanded"))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert mine.stride() == theirs.stride()
    weight = torch.randn_like(mine)
    for a, b in zip(
        torch.autograd.grad((mine.relu_() * weight).sum(), (leaf, branch)),
        torch.autograd.grad((theirs.relu() * weight).sum(), (leaf, branch)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert torch.autograd.gradcheck(
        lambda s, b: add_rows(s * 1.0, b, rows, 1.5, reuses_skip=True), (leaf, branch)
    )
    assert torch.autograd.gradgradcheck(
        lambda s, b: add_rows(s * 1.0, b, rows, 1.5, reuses_skip=True), (leaf, branch)
    )


@pytest.mark.usefixtures("large_tensors")
def test_reusing_a_skip_that_was_saved_for_backward_is_an_error() -> None:
    skip = torch.randn(4, 3, requires_grad=True) * 1.0
    other = skip.square()
    total = add_rows(skip, torch.ones(1, 3), torch.tensor([2]), 2.0, reuses_skip=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + total).sum().backward()


def _kept_by_a_hook(keep: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, whole: Tensor, some: Tensor) -> Tensor:
        kept: list[Tensor] = []
        whole.register_hook(lambda grad: kept.append(keep(grad)))
        (whole.square().sum() + some.sum()).backward()
        return kept[0]

    return run


def _kept_by_a_hook_of_the_node(x: Tensor, whole: Tensor, some: Tensor) -> Tensor:
    kept: list[Tensor] = []
    assert whole.grad_fn is not None
    whole.grad_fn.register_prehook(lambda grads: kept.append(grads[0]))
    (whole.square().sum() + some.sum()).backward()
    return kept[0]


def _asked_for(x: Tensor, whole: Tensor, some: Tensor) -> Tensor:
    return torch.autograd.grad(whole.square().sum() + some.sum(), (whole, x))[0]


def _retained(x: Tensor, whole: Tensor, some: Tensor) -> Tensor:
    whole.retain_grad()
    (whole.square().sum() + some.sum()).backward()
    assert whole.grad is not None
    return whole.grad


def _given(x: Tensor, whole: Tensor, some: Tensor) -> Tensor:
    given = 2 * whole.detach()
    torch.autograd.backward((whole, some), (given, torch.ones_like(some)))
    return given


def _wanted_by_another(x: Tensor, whole: Tensor, some: Tensor) -> Tensor:
    total = ((x + whole) / 2).square().sum() + some.sum()  # one gradient for the two
    return torch.autograd.grad(total, x)[0] - torch.tensor([[1.0], [0.0], [1.0]])


HOLDERS = {
    "hook": _kept_by_a_hook(lambda grad: grad),
    "hook, a part": _kept_by_a_hook(lambda grad: grad[1:]),
    "hook, detached": _kept_by_a_hook(lambda grad: grad.detach()),
    "hook of the node": _kept_by_a_hook_of_the_node,
    "asked for": _asked_for,
    "retained": _retained,
    "given": _given,
    "wanted by another": _wanted_by_another,
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_gradient_that_something_else_refers_to_is_not_written_into(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchdrop.rows.take_and_add, "MIN_ELEMENTS_FOR_OWN_FUNCTION", 0)
    leaf = torch.arange(6.0).view(3, 2).requires_grad_()
    x = leaf * 1.0
    whole, some = skip_and_rows(x, torch.tensor([0, 2]))
    held = HOLDERS[name](x, whole, some)
    assert torch.equal(held, (2 * x).detach()[3 - len(held) :])
    if leaf.grad is not None:  # the gradient of the input is right, too
        assert torch.equal(leaf.grad, (2 * x).detach() + torch.tensor([[1.0], [0.0], [1.0]]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_that_nothing_else_refers_to_is_written_into(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchdrop.rows.take_and_add, "MIN_ELEMENTS_FOR_OWN_FUNCTION", 0)
    leaf = torch.randn(4, 3, 2, 2).to(memory_format=memory_format).requires_grad_()

    def steps(hook: Callable[[Tensor], object]) -> tuple[list[int], Tensor]:
        places: list[int] = []
        x = leaf * 1.0
        x.register_hook(lambda grad: places.append(grad.data_ptr()))
        whole, some = skip_and_rows(x, torch.tensor([0, 2]))
        whole.register_hook(lambda grad: places.append(grad.data_ptr()))
        whole.register_hook(hook)
        (grad,) = torch.autograd.grad(whole.square().sum() + some.sum(), leaf)
        return places, grad

    (before, after), grad = steps(lambda grad: None)
    assert before == after
    # The twin: a gradient that the hook keeps is not written into, and the result is the same.
    kept: list[Tensor] = []
    (before, after), same = steps(kept.append)
    assert before != after
    assert torch.equal(grad, same)


def test_the_test_of_gradients_written_into_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchdrop.rows.take_and_add, "MIN_ELEMENTS_FOR_OWN_FUNCTION", 0)
    monkeypatch.setattr(torchdrop.rows.take_and_add, "count_references", lambda grads: (1, 1, 1))
    unshared = torchdrop.rows.take_and_add._UnsharedGradient
    monkeypatch.setattr(unshared, "references", (1, 1, 1))
    monkeypatch.setattr(unshared, "measured", True)
    for name, run in HOLDERS.items():
        x = torch.arange(6.0).view(3, 2).requires_grad_() * 1.0
        held = run(x, *skip_and_rows(x, torch.tensor([0, 2])))
        assert torch.equal(held, (2 * x).detach()[3 - len(held) :]) == (name == "retained"), name


@pytest.mark.parametrize("name", HOLDERS)
def test_if_references_cannot_be_counted_no_gradient_is_written_into(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchdrop.rows.take_and_add, "MIN_ELEMENTS_FOR_OWN_FUNCTION", 0)
    monkeypatch.setattr(torchdrop.rows.take_and_add, "count_references", lambda grads: None)
    monkeypatch.setattr(torchdrop.rows.take_and_add._UnsharedGradient, "measured", False)
    monkeypatch.setattr(torchdrop.rows.take_and_add._UnsharedGradient, "references", None)
    x = torch.arange(6.0).view(3, 2).requires_grad_() * 1.0
    held = HOLDERS[name](x, *skip_and_rows(x, torch.tensor([0, 2])))
    assert torch.equal(held, (2 * x).detach()[3 - len(held) :])


def test_derivatives_of_adding_rows() -> None:
    skip = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    branch = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([1, 4])

    def add(s: Tensor, b: Tensor) -> Tensor:
        return add_rows(s, b, rows, 1.5)

    def plain(s: Tensor, b: Tensor) -> Tensor:
        return s.index_add(0, rows, b, alpha=1.5)

    assert torch.autograd.gradcheck(add, (skip, branch))
    assert torch.autograd.gradgradcheck(add, (skip, branch))
    tangents = (torch.randn_like(skip), torch.randn_like(branch))
    for mine, theirs in zip(
        jvp(add, (skip, branch), tangents), jvp(plain, (skip, branch), tangents), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    many = torch.randn(4, 5, 3), torch.randn(4, 2, 3)
    torch.testing.assert_close(vmap(add)(*many), vmap(plain)(*many))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_a_sum_one_by_one_and_many_at_a_time(layout: str, dtype: torch.dtype) -> None:
    skip, branch = (
        FORMATS[layout](torch.randn(n, 3, 2, 2, dtype=dtype)).requires_grad_() for n in (5, 2)
    )
    rows = torch.tensor([4, 1])
    mine = add_rows(skip, branch, rows, 1.5)
    theirs = skip.index_add(0, rows, branch, alpha=1.5)
    assert torch.equal(mine, theirs)
    grads = torch.randn(7, 5, 3, 2, 2, dtype=dtype)
    expected = [torch.autograd.grad(theirs, (skip, branch), g, retain_graph=True) for g in grads]
    one_by_one = [torch.autograd.grad(mine, (skip, branch), g, retain_graph=True) for g in grads]
    many = torch.autograd.grad(mine, (skip, branch), grads, is_grads_batched=True)
    for place in range(2):
        wanted = torch.stack([e[place] for e in expected])
        torch.testing.assert_close(torch.stack([o[place] for o in one_by_one]), wanted)
        torch.testing.assert_close(many[place], wanted)


@pytest.mark.usefixtures("large_tensors")
def test_adding_rows_keeps_nothing_of_the_branch_for_backward() -> None:
    skip, branch = torch.randn(64, 32), torch.randn(16, 32, requires_grad=True)
    rows = torch.arange(16)
    assert (
        saved_bytes(lambda: add_rows(skip, branch, rows, 2.0)) == 0
    )  # the indices are not saved as a tensor
    # The twin: PyTorch's own operation saves the branch to know its shape.
    assert saved_bytes(lambda: skip.index_add(0, rows, branch, alpha=2.0)) > branch.numel() * 4


def test_adding_rows_to_a_small_tensor_keeps_the_branch_and_no_more() -> None:
    skip, branch = torch.randn(64, 32), torch.randn(16, 32, requires_grad=True)
    rows = torch.arange(16)
    kept = saved_bytes(lambda: add_rows(skip, branch, rows, 2.0))
    assert kept <= branch.numel() * 4 + rows.numel() * 8


@pytest.mark.parametrize("numel", ["below", "from"])
def test_the_line_between_small_and_large(numel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = 64 * 32 + (numel == "below")
    monkeypatch.setattr(torchdrop.rows.take_and_add, "MIN_ELEMENTS_FOR_OWN_FUNCTION", line)
    skip, branch = torch.randn(64, 32), torch.randn(16, 32, requires_grad=True)
    out = add_rows(skip, branch, torch.arange(16), 2.0)
    assert (type(out.grad_fn).__name__ == "IndexAddBackward0") == (numel == "below")


def test_the_order_of_a_sum_decides_its_memory_format() -> None:
    skip = torch.randn(2, 3, 4, 4)
    branch = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert add_whole(skip, branch, 1.0).stride() == (skip + branch).stride()
    first = add_whole(skip, branch, 1.0, branch_first=True)
    assert first.stride() == (branch + skip).stride() != (skip + branch).stride()
    assert torch.equal(first, skip + branch)
