"""Forwards that others replace on the instance: device hooks, wrappers, kernels."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop

W, B = 8, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x)))


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def add_device_hook(module: nn.Module, calls: list[str]) -> None:
    """As Accelerate does it: keep the forward, and call it between two steps of the hook."""
    old: Any = module.forward
    module._old_forward = old

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("before")
        out = module._old_forward(*args, **kwargs)
        calls.append("after")
        return out

    replaced = functools.partial(new_forward, module)
    module.forward = functools.update_wrapper(replaced, old)  # type: ignore[method-assign]


def remove_device_hook(module: Any) -> None:
    module.forward = module._old_forward
    del module._old_forward


def wrap_in_closure(module: Any) -> None:
    old = module.forward

    @functools.wraps(old)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs)

    module.forward = wrapped


def wrap_in_method(module: Any) -> None:
    old = module.forward
    module.forward = types.MethodType(lambda self, *args: old(*args), module)


def wrap_in_partial(module: Any) -> None:
    module.forward = functools.partial(lambda old, x: old(x), module.forward)


WRAPPERS: list[Callable[[Any], None]] = [wrap_in_closure, wrap_in_method, wrap_in_partial]


def rows_kept(plan: torchdrop.Plan, model: nn.Module) -> list[int]:
    model(torch.randn(B, W))
    return [len(rows) for rows in plan.last_kept().values()]


@pytest.mark.parametrize("first", ["hook", "stochastic depth"])
def test_a_device_hook_is_called_around_the_site(first: str) -> None:
    model, calls = stack(), list[str]()
    if first == "hook":
        add_device_hook(model[0], calls)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    if first != "hook":
        add_device_hook(model[0], calls)
    assert torchdrop.has_stochastic_depth(model[0])
    assert rows_kept(plan, model) == [3, 3]
    assert calls == ["before", "after"]
    plan.set_p([1.0, 1.0])
    assert rows_kept(plan, model) == [0, 0]
    with torchdrop.paused(model[0]):
        x = torch.randn(B, W)
        torch.testing.assert_close(model[0](x), Block.forward(model[0], x))


@pytest.mark.parametrize("first", ["hook", "stochastic depth"])
@pytest.mark.parametrize("hook_goes_first", [True, False])
def test_both_can_be_removed_in_any_order(first: str, hook_goes_first: bool) -> None:
    model, calls = stack(), list[str]()
    if first == "hook":
        add_device_hook(model[0], calls)
    torchdrop.add_stochastic_depth(model, 0.5)
    if first != "hook":
        add_device_hook(model[0], calls)
    if hook_goes_first:
        remove_device_hook(model[0])
    torchdrop.remove_stochastic_depth(model)
    if not hook_goes_first:
        remove_device_hook(model[0])
    assert not torchdrop.has_stochastic_depth(model)
    x = torch.randn(B, W)
    assert torch.equal(model[0](x), Block.forward(model[0], x))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_that_came_later_is_looked_through(wrap: Callable[[Any], None]) -> None:
    model = stack()
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    wrap(model[0])
    assert torchdrop.has_stochastic_depth(model[0])
    assert rows_kept(plan, model) == [3, 3]
    with torchdrop.paused(model[0]):
        x = torch.randn(B, W)
        torch.testing.assert_close(model[0](x), Block.forward(model[0], x))
    with pytest.raises(ValueError, match="was wrapped by"):
        torchdrop.remove_stochastic_depth(model)
    assert rows_kept(plan, model) == [3, 3]  # nothing has changed


def test_a_wrapper_of_something_else_is_not_taken_for_one() -> None:
    model, other = stack(), stack()
    torchdrop.add_stochastic_depth(other, 0.5)
    call_other = functools.partial(other[0].forward)
    model[0].forward = lambda x: call_other(x)  # type: ignore[method-assign, assignment]
    assert not torchdrop.has_stochastic_depth(model)


@pytest.mark.parametrize("wrap", [wrap_in_closure, wrap_in_partial])
def test_a_wrapper_that_came_before_is_refused(wrap: Callable[[Any], None]) -> None:
    model = stack()
    wrap(model[0])
    with pytest.raises(ValueError, match="already replaced on the instance"):
        torchdrop.add_stochastic_depth(model, 0.5)


def fused_forward(self: Any, x: Tensor) -> Tensor:
    """Another computation than that of the class: what a patch with other kernels binds."""
    hidden = nn.functional.linear(x, self.fc1.weight, self.fc1.bias).sigmoid()
    return x + self.fc2(hidden)


def patch(module: Any) -> None:
    module.forward = types.MethodType(fused_forward, module)


def patched_stack() -> nn.Sequential:
    model = stack()
    for block in model:
        patch(block)
    return model


def by_hand(model: nn.Sequential, x: Tensor, plan: torchdrop.Plan) -> Tensor:
    for block, rows in zip(model, plan.last_kept().values(), strict=True):
        weight = torch.zeros(len(x), 1)
        weight[torch.as_tensor(rows)] = 2.0
        x = x + weight * (fused_forward(block, x) - x)
    return x


@pytest.mark.parametrize("with_example", [False, True])
def test_a_bound_forward_that_came_before_is_the_one_that_is_dropped(with_example: bool) -> None:
    model, x = patched_stack(), torch.randn(B, W)
    example = x if with_example else None
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=example)
    for _ in range(2):  # the first call is tested, too
        out = model(x)
        torch.testing.assert_close(out, by_hand(model, x, plan))
        dense = x
        for block in model:
            dense = Block.forward(block, dense)
    assert {b.action for r in plan.blocks for b in r.branches} == {"skip"}
    assert all(b.proved for r in plan.blocks for b in r.branches)
    model.eval()
    torch.testing.assert_close(model(x), fused_forward(model[1], fused_forward(model[0], x)))
    assert not torch.allclose(model(x), dense)  # the twin: the forward of the class differs


def test_a_bound_forward_is_there_again_after_removal() -> None:
    model = patched_stack()
    before = [block.forward for block in model]
    torchdrop.add_stochastic_depth(model, 0.5)
    torchdrop.remove_stochastic_depth(model)
    assert [block.forward for block in model] == before
    assert all("forward" in vars(block) for block in model)


@pytest.mark.parametrize("hook_goes_first", [True, False])
def test_a_device_hook_around_a_bound_forward(hook_goes_first: bool) -> None:
    model, calls, x = patched_stack(), list[str](), torch.randn(B, W)
    add_device_hook(model[0], calls)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    torch.testing.assert_close(model(x), by_hand(model, x, plan))
    assert calls == ["before", "after"]
    if hook_goes_first:
        remove_device_hook(model[0])
    torchdrop.remove_stochastic_depth(model)
    if not hook_goes_first:
        remove_device_hook(model[0])
    torch.testing.assert_close(model[0](x), fused_forward(model[0], x))


def hooked_forward(self: Any, *args: Any) -> Any:
    self.calls.append("before")
    return self._old_forward(*args)


def test_a_device_hook_may_be_a_bound_method() -> None:
    model, x = stack(), torch.randn(B, W)
    block: Any = model[0]
    block.calls = []
    block._old_forward = block.forward
    block.forward = types.MethodType(hooked_forward, block)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    block.calls.clear()
    assert rows_kept(plan, model) == [3, 3]
    assert block.calls == ["before"]
    torchdrop.remove_stochastic_depth(model)
    assert torch.equal(model[0](x), Block.forward(model[0], x))


def test_a_backup_of_the_forward_is_no_device_hook() -> None:
    model, x = patched_stack(), torch.randn(B, W)
    for block in model:
        block._old_forward = types.MethodType(Block.forward, block)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    torch.testing.assert_close(model(x), by_hand(model, x, plan))
    torchdrop.remove_stochastic_depth(model)
    torch.testing.assert_close(model[0](x), fused_forward(model[0], x))


def test_copies_and_pickles_keep_a_bound_forward() -> None:
    model, x = patched_stack(), torch.randn(B, W)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        plan = torchdrop.get_plan(twin)
        torch.testing.assert_close(twin(x), by_hand(twin, x, plan))
        torchdrop.remove_stochastic_depth(twin)
        torch.testing.assert_close(twin[0](x), fused_forward(twin[0], x))
        assert twin[0].forward.__self__ is twin[0]


def test_a_bound_forward_that_nobody_can_read_leaves_the_block_out() -> None:
    model = nn.Sequential(*stack(), *stack())
    wrap_in_method(model[0])  # it takes *args
    found = torchdrop.find_residuals(model)
    assert [r.name for r in found] == ["1", "2", "3"]
    assert [name for name, _ in found.not_taken] == ["0"]


def test_a_replaced_forward_of_a_layer_inside_a_branch_is_called() -> None:
    """A patched kernel of a layer."""
    model, calls = stack(), list[int]()
    linear: Any = model[0].fc1

    def kernel(self: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        return nn.functional.linear(x, self.weight, self.bias)

    linear.forward = types.MethodType(kernel, linear)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", verify=False)
    assert rows_kept(plan, model) == [3, 3]
    assert calls == [3]
