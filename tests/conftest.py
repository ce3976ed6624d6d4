from __future__ import annotations

import pytest
import torch

import torchdrop.rows.take_and_add

# The tests run many small kernels, two processes at a time: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20161009)


@pytest.fixture(params=[0, 2**60], ids=["of its own", "of torch"])
def way_to_fork(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors fork by torch's operations, large ones by a function of our own."""
    monkeypatch.setattr(torchdrop.rows.take_and_add, "MIN_ELEMENTS_FOR_OWN_FUNCTION", request.param)


@pytest.fixture
def large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor counts as large, and is added to by an autograd function of our own."""
    monkeypatch.setattr(torchdrop.rows.take_and_add, "MIN_ELEMENTS_FOR_OWN_FUNCTION", 0)
