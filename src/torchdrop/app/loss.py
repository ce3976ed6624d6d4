"""The loss of a batch. Apart from training, so that timing a step needs no Lightning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

__all__ = ["loss_of"]


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of a batch; zero, with a gradient of zeros, for an empty batch."""
    if len(labels) == 0:
        # An optimizer step still happens, as it does for every batch of every method.
        return torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum() * 0.0
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UserError(
            f"the model has to return logits of shape (batch, classes), "
            f"but returned {_shape(logits)}"
        )
    return F.cross_entropy(logits, labels)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
