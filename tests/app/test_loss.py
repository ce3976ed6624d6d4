from __future__ import annotations

import pytest
import torch
from torch import nn

from torchdrop.app.errors import UserError
from torchdrop.app.loss import loss_of


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model = nn.Linear(2, 3)
    x, labels = torch.randn(5, 2), torch.tensor([0, 1, 2, 1, 0])
    expected = -model(x).log_softmax(1)[torch.arange(5), labels].mean()
    torch.testing.assert_close(loss_of(model, x, labels), expected)


def test_an_empty_batch_trains_on_nothing():
    model = nn.Linear(2, 3)
    loss_of(model, torch.zeros(0, 2), torch.zeros(0).long()).backward()
    assert not model.weight.grad.any()


def test_output_that_is_no_logits_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(UserError, match=r"logits of shape \(batch, classes\), but returned tuple"):
        loss_of(Pair(), torch.zeros(1, 2), torch.zeros(1).long())
    with pytest.raises(UserError, match=r"but returned \(1, 2, 2\)"):
        loss_of(nn.Identity(), torch.zeros(1, 2, 2), torch.zeros(1).long())
