"""Transforms, modes, autocast and backward passes are seen where they are active."""

from __future__ import annotations

import warnings

import pytest
import torch
from probes import Probe, Probes, Seen, check
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from torchdrop import internals
from torchdrop.internals import surroundings

probe = Probes()


@probe(
    "TorchDispatchMode",
    "disable_dispatch_modes",
    api="TorchDispatchMode or _disable_current_modes of torch.utils._python_dispatch",
    purpose="see random draws, and to work out shapes unseen by the user's modes",
)
def _() -> None:
    with Seen() as outer, Seen() as inner:
        torch.rand(2)
        assert torch.Tag.nondeterministic_seeded in inner.operations[-1].tags
        assert len(outer.operations) == len(inner.operations) == 1
        with internals.disable_dispatch_modes():
            torch.rand(2)
        assert len(outer.operations) == len(inner.operations) == 1
        torch.rand(2)
    assert len(outer.operations) == len(inner.operations) == 2


@probe(
    "functorch_transforms_active",
    api="torch._C._are_functorch_transforms_active",
    purpose="use PyTorch's own operations under torch.func, where torchdrop's do not work",
)
def _() -> None:
    seen: list[bool] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.functorch_transforms_active())
        return x.sum()

    x = torch.ones(2)
    f(x), torch.func.vmap(f)(torch.ones(2, 2)), torch.func.grad(f)(x), f(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(f, (x,), (x,))
    assert seen == [False, True, True, False, True]


@probe(
    "count_dispatch_modes",
    api="torch._C._len_torch_dispatch_stack",
    purpose="read no random numbers on the host while a graph is traced",
)
def _() -> None:
    assert internals.count_dispatch_modes() == 0
    with Seen():
        assert internals.count_dispatch_modes() == 1
        with FakeTensorMode():
            assert internals.count_dispatch_modes() == 2
    assert internals.count_dispatch_modes() == 0


@probe(
    "is_legacy_batched_tensor",
    api="torch._C._functorch.is_legacy_batchedtensor",
    purpose="not write into a gradient that stands for several",
)
def _() -> None:
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 1.0
    y.register_hook(lambda grad: seen.append(internals.is_legacy_batched_tensor(grad)))
    torch.autograd.grad(y, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3, 2), is_grads_batched=True)
    assert seen == [False, True]


@probe(
    "any_autocast_enabled",
    api="torch._C._is_any_autocast_enabled",
    purpose="know the dtype of a sum under autocast",
)
def _() -> None:
    assert not internals.any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert internals.any_autocast_enabled()
        with torch.autocast("cpu", enabled=False):
            assert not internals.any_autocast_enabled()


@probe(
    "DisableTorchFunction",
    api="torch._C.DisableTorchFunction",
    purpose="work out shapes unseen by torch function modes and tensor subclasses",
)
def _() -> None:
    class Sub(torch.Tensor):
        pass

    with torch.device("meta"):
        assert torch.ones(1).is_meta
        with internals.DisableTorchFunction():
            assert not torch.ones(1).is_meta
    x = torch.ones(2).as_subclass(Sub)
    assert type(x + 1) is Sub
    with internals.DisableTorchFunction():
        assert type(x + 1) is torch.Tensor


@probe(
    "graph_task",
    "in_backward_pass",
    api="torch._C._current_graph_task_id",
    purpose="not count what a checkpoint computes again in the backward pass",
)
def _() -> None:
    for use_reentrant in (True, False):
        seen: list[bool] = []

        def f(x: torch.Tensor, seen: list[bool] = seen) -> torch.Tensor:
            seen.append(internals.in_backward_pass())
            return x.exp()

        x = torch.ones(2, requires_grad=True)
        checkpoint(f, x, use_reentrant=use_reentrant).sum().backward()
        assert seen == [False, True]
        assert not internals.in_backward_pass()
        assert internals.graph_task() == -1


@probe(
    "vmap_draws_differently",
    api="the interpreter stack in torch._C._functorch",
    purpose="refuse vmap(randomness='different')",
)
def _() -> None:
    seen: list[bool] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.vmap_draws_differently())
        return x.sum()

    x = torch.ones(2, 2)
    f(x)
    for randomness in ("error", "same", "different"):
        torch.func.vmap(f, randomness=randomness)(x)
    torch.func.vmap(torch.func.grad(f), randomness="different")(x)
    torch.func.grad(f)(x)
    assert seen == [False, False, False, True, True, False]


@probe(
    "writes_into_arguments",
    api="OpOverload._schema",
    purpose="not write into the buffers of a model whose shapes are worked out",
)
def _() -> None:
    aten = torch.ops.aten
    for operation in (aten.add_.Tensor, aten.copy_.default, aten.add.out):
        assert internals.writes_into_arguments(operation)
    for operation in (aten.add.Tensor, aten.view.default, aten.zeros.default):
        assert not internals.writes_into_arguments(operation)


@pytest.mark.parametrize("found", probe, ids=lambda found: found.names[0])
def test_a_private_api_behaves_as_torchdrop_needs_it(found: Probe) -> None:
    check(found)


def test_every_name_has_a_probe() -> None:
    assert probe.names() == sorted(surroundings.__all__)


def test_a_probe_that_fails_names_the_api_and_what_it_is_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (found,) = (found for found in probe if "in_backward_pass" in found.names)
    monkeypatch.setattr(surroundings, "graph_task", lambda: -1)
    with pytest.raises(
        pytest.fail.Exception, match=r"_current_graph_task_id, .* to not count what a checkpoint"
    ):
        check(found)
