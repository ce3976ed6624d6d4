"""Checkpoints in a forward are noticed, in the thread that reads and nowhere else."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from probes import Probe, Probes, check
from torch import Tensor
from torch.utils import checkpoint as module_of_torch
from torch.utils.checkpoint import checkpoint

from torchdrop import internals

probe = Probes()


@probe(
    "replace_checkpoints",
    api="CheckpointFunction or _checkpoint_without_reentrant_generator_impl of "
    "torch.utils.checkpoint",
    purpose="keep the checkpoints of a forward that it generates",
)
def _() -> None:
    for reentrant in (False, True):
        with noticed() as (calls, inside):
            out = checkpoint(lambda x: (x, len(inside)), "a", use_reentrant=reentrant)
        assert out == ("a", 1)
        assert calls == [{"use_reentrant": True}] if reentrant else [{}]
        assert inside == []


@probe(
    "in_reentrant_checkpoint",
    api="torch.utils.checkpoint.CheckpointFunction",
    purpose="tell the forward of a checkpoint from a call that generates",
)
def _() -> None:
    seen: list[bool] = []

    def noting(x: Tensor) -> Tensor:
        seen.append(internals.in_reentrant_checkpoint())
        return x * 2

    x = torch.ones(1, requires_grad=True)
    checkpoint(noting, x, use_reentrant=True).backward()
    checkpoint(noting, x, use_reentrant=False).backward()
    noting(x)
    assert seen == [True, False, False, False]


@pytest.mark.parametrize("found", probe, ids=lambda found: found.api)
def test_the_private_api_is_as_expected(found: Probe) -> None:
    check(found)


@contextmanager
def noticed() -> Iterator[tuple[list[Any], list[Any]]]:
    calls: list[Any] = []
    inside: list[Any] = []

    @contextmanager
    def around(options: dict[str, Any], args: Sequence[Any]) -> Iterator[None]:
        calls.append(options)
        inside.append(options)
        try:
            yield
        finally:
            inside.pop()

    with internals.replace_checkpoints(around):
        yield calls, inside


def nothing() -> tuple[Any, Any]:
    return module_of_torch.noop_context_fn()  # type: ignore[no-untyped-call, no-any-return]


def test_options_that_are_not_the_defaults_are_given() -> None:
    with noticed() as (calls, _):
        checkpoint(abs, 1, use_reentrant=False, preserve_rng_state=False, context_fn=nothing)
        checkpoint(abs, 1, use_reentrant=True, preserve_rng_state=False)
        checkpoint(abs, 1, use_reentrant=False, determinism_check="none")
    assert calls == [
        {"preserve_rng_state": False, "context_fn": nothing},
        {"use_reentrant": True, "preserve_rng_state": False},
        {"determinism_check": "none"},
    ]


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_error_ends_the_checkpoint(reentrant: bool) -> None:
    def fails(x: int) -> None:
        raise LookupError(x)

    with noticed() as (_, inside):
        with pytest.raises(LookupError, match="3"):
            checkpoint(fails, 3, use_reentrant=reentrant)
        assert inside == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_other_threads_and_later_calls_have_real_checkpoints(reentrant: bool) -> None:
    def run() -> None:
        x = torch.ones(2, requires_grad=True)
        runs: list[Tensor] = []

        def function(x: Tensor) -> Tensor:
            runs.append(x)
            return x.exp()

        checkpoint(function, x, use_reentrant=reentrant).sum().backward()
        counts.append(len(runs))

    counts: list[int] = []
    before = vars(module_of_torch).copy()
    with noticed() as (calls, _):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    assert calls == []
    assert counts == [2, 2]
    assert vars(module_of_torch) == before
