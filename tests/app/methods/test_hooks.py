from __future__ import annotations

import pytest
import torch
from method_nets import applied_to
from torch import nn

from torchdrop.app.errors import UserError


def test_a_block_that_returns_no_tensor_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = x + self.fc(x).relu()
            return x, None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x, _ = block(x)
            return x

    model, _ = applied_to("uniform_dropout", 0.5, Net())
    with pytest.raises(
        UserError,
        match="changes the output of a Block, which has to be a tensor, but it is a tuple",
    ):
        model(torch.randn(3, 4))
