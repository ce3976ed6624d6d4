"""Sums of which one operand is padded with zeros."""

import torch
from torch import nn

from torchdrop.tracing.traced_functions import add_padded, pad_like


def test_the_parts_may_be_empty():
    left, right = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(add_padded(left, right, 1), left + right)
    assert torch.equal(pad_like(left, 5, -1), nn.functional.pad(left, [0, 2]))
