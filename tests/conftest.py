from __future__ import annotations

import pytest
import torch

# The tests run many small kernels, two processes at a time: threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20161009)
