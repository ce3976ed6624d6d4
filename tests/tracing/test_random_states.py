"""Random numbers that are drawn are noticed, and the generators are put back."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from torchdrop.tracing.random_states import RandomStates, TorchDraws

DRAWS: dict[str, Callable[[], object]] = {
    "Python": random.random,
    "NumPy": np.random.rand,
    "torch": lambda: torch.rand(1),
}


def numbers() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("library", DRAWS)
def test_a_draw_is_noticed(library: str) -> None:
    states = RandomStates()
    assert not states.changed(alone=True)
    DRAWS[library]()
    assert states.changed(alone=True)
    # another thread may have used the generator of torch
    assert states.changed(alone=False) is (library != "torch")


def test_restored_generators_draw_the_same_numbers() -> None:
    states = RandomStates()
    first = numbers()
    states.restore()
    assert not states.changed(alone=True)
    assert numbers() == first
    assert numbers() != first


@pytest.mark.parametrize(
    ("run", "drawn"),
    [
        (lambda: torch.rand(2), True),
        (lambda: torch.zeros(2).bernoulli_(0.5), True),
        (lambda: torch.nn.functional.dropout(torch.ones(2), 0.5), True),
        (lambda: torch.zeros(2) + 1, False),
    ],
)
def test_draws_of_torch_are_noticed_by_their_operations(
    run: Callable[[], object], drawn: bool
) -> None:
    with TorchDraws() as draws:
        run()
    assert draws.drawn is drawn


def test_draws_of_another_thread_do_not_count() -> None:
    with TorchDraws() as draws:
        other = threading.Thread(target=torch.rand, args=(2,))
        other.start()
        other.join()
    assert not draws.drawn
