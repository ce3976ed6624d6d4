from __future__ import annotations

import pytest
import torch

from torchdrop.app import timing
from torchdrop.app.timing import in_turn, peak_bytes

CPU = torch.device("cpu")


def test_another_one_is_first_each_round_and_the_clock_is_read_around_each(monkeypatch):
    now, order = [0.0], []

    def run(name, seconds):
        order.append(name)
        now[0] += seconds

    runs = {"a": lambda: run("a", 0.001), "b": lambda: run("b", 0.003)}
    rounds = in_turn(runs, CPU, lambda: now[0], begin=1)
    assert next(rounds) == pytest.approx({"a": 1.0, "b": 3.0})
    next(rounds)
    assert order == ["b", "a", "a", "b"]


def test_the_device_is_waited_for_around_each_run(monkeypatch):
    events = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append("wait"))
    next(in_turn({"a": lambda: events.append("run")}, torch.device("cuda")))
    assert events == ["wait", "run", "wait"]


def test_the_peak_is_what_is_there_at_a_time():
    def run():
        x = torch.zeros(1000)
        del x
        return torch.zeros(500), torch.zeros(200)

    # Not 6800: the first is gone before the others come.
    assert 4000 <= peak_bytes(run, CPU) < 4800


def test_the_peak_of_an_accelerator_is_its_allocators(monkeypatch):
    """With an allocator that has 100 bytes in use, and at most 700 while the step runs."""
    calls = []

    def answer(name, value):
        def called(device):
            calls.append(name)
            return value

        monkeypatch.setattr(torch.accelerator, name, called)

    answer("synchronize", None)
    answer("memory_allocated", 100)
    answer("reset_peak_memory_stats", None)
    answer("max_memory_allocated", 700)
    assert peak_bytes(lambda: calls.append("run"), torch.device("cuda")) == 600
    order = ["synchronize", "memory_allocated", "reset_peak_memory_stats", "run", "synchronize"]
    assert calls == [*order, "max_memory_allocated"]
    assert peak_bytes(lambda: None, torch.device("mps")) is None


def test_threads_are_what_they_were_afterwards():
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), timing.threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
