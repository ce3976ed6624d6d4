"""How torchdrop goes on if a private PyTorch API is missing, or behaves differently."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from torchdrop import internals
from torchdrop.internals import missing, modules, surroundings, tensors


@pytest.fixture
def warned_once() -> Iterator[None]:
    """Forget which APIs were missed, before and after a test."""
    cached = (missing.warn_once, tensors._counts_references, tensors._check_saved_names)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def import_without(user: ModuleType, owner: Any, name: str) -> None:
    """Import another copy of the module ``user`` while ``owner`` has no attribute ``name``."""
    spec = importlib.util.spec_from_file_location("another_copy", str(user.__file__))
    assert spec is not None
    assert spec.loader is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(owner, name)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("user", "owner", "name"),
    [
        (surroundings, torch._C, "_are_functorch_transforms_active"),
        (surroundings, torch._C, "_current_graph_task_id"),
        (surroundings, torch._C._functorch, "is_legacy_batchedtensor"),
        (surroundings, torch.utils._python_dispatch, "_disable_current_modes"),
        (tensors, torch.utils._pytree, "tree_flatten"),
        (modules, torch.nn.modules.batchnorm, "_BatchNorm"),
    ],
)
def test_an_api_without_which_results_are_wrong_fails_the_import(
    user: ModuleType, owner: Any, name: str
) -> None:
    with pytest.raises(ImportError, match=rf"a private API that PyTorch .*{name}"):
        import_without(user, owner, name)


@pytest.mark.parametrize("user", [surroundings, tensors, modules])
def test_the_copies_can_be_imported_if_nothing_is_missing(user: ModuleType) -> None:
    import_without(user, torch, "ones")  # which they need only later


@pytest.mark.usefixtures("warned_once")
@pytest.mark.parametrize(
    ("owner", "name", "use", "expected", "message"),
    [
        (
            tensors,
            "_storage_use_count",
            lambda: internals.count_references((torch.ones(1),)),
            None,
            "_storage_Use_Count.* copies gradients",
        ),
        (
            tensors,
            "_tensor_use_count",
            lambda: internals.count_references((torch.ones(1),)),
            None,
            "Tensor._use_count.* copies gradients",
        ),
        (
            torch._C._autograd,
            "_top_saved_tensors_default_hooks",
            internals.innermost_saved_tensor_hooks,
            (False, None),
            "_top_saved_tensors_default_hooks.* saved for backward in addition",
        ),
        (
            torch._C._dynamo.eval_frame,
            "_FrameExecStrategy",
            lambda: internals.leave_frame_uncompiled(compile("1", "", "eval")),
            None,
            "set_code_exec_strategy.* again for each block",
        ),
        (
            nn.Module,
            "_replicate_for_data_parallel",
            lambda: internals.set_replicate_method(nn.ReLU(), nn.ReLU),
            None,
            r"_replicate_for_data_parallel.* must not be used in nn\.DataParallel",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_api_without_which_only_cost_changes_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    use: Callable[[], Any],
    expected: Any,
    message: str,
) -> None:
    if owner is tensors:
        monkeypatch.setattr(owner, name, None)
    else:
        monkeypatch.delattr(owner, name)
    with pytest.warns(RuntimeWarning, match=message):
        assert use() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use() == expected


@pytest.mark.usefixtures("warned_once")
def test_a_count_that_misses_a_reference_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.ones(1),)
    assert internals.count_references(x) is not None
    tensors._counts_references.cache_clear()
    monkeypatch.setattr(tensors, "_storage_use_count", lambda data: 1)
    with pytest.warns(RuntimeWarning, match="copies gradients"):
        assert internals.count_references(x) is None


@pytest.mark.usefixtures("warned_once")
def test_other_names_of_saved_tensors_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "relu", torch.Tensor.neg)  # whose node saves nothing
    with pytest.warns(RuntimeWarning, match="_saved_result.* saved a second time"):
        internals.saved_by_producer(torch.ones(1))


@pytest.mark.usefixtures("warned_once")
def test_a_counter_with_another_tracker_and_no_attention_are_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mode:
        pass

    with pytest.warns(RuntimeWarning, match=r"mod_tracker.* slow"):
        internals.count_flops_without_modules(Mode())
    monkeypatch.setattr(torch.ops, "aten", Mode())
    with pytest.warns(RuntimeWarning, match="of attention on the CPU are not counted"):
        assert internals.cpu_attention_operations() is None


def test_vmap_is_refused_if_its_randomness_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._functorch, "get_interpreter_stack")
    assert not internals.vmap_draws_differently()
    with pytest.raises(RuntimeError, match=r"does not tell .*get_interpreter_stack"):
        torch.func.vmap(lambda x: x * internals.vmap_draws_differently())(torch.ones(2))
