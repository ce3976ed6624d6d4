"""Fixtures that several tests of the layers use."""

import pytest
import torch

from torchdrop.layers import stochastic_depth


@pytest.fixture
def decide(monkeypatch):
    """Fix who is kept: a bool for the batch, or a list of rows."""

    def fix(kept):
        monkeypatch.setattr(stochastic_depth, "keep_batch", lambda p, sync_ranks: kept)
        monkeypatch.setattr(
            stochastic_depth, "keep_rows", lambda batch, p: torch.tensor(kept).long()
        )

    return fix
