"""The loss of a batch, in a file of its own so that ``bench`` need not import Lightning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

__all__ = ["loss_of"]


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of a batch; for an empty batch zero, with a gradient of zeros.

    Raises:
        UserError: The model returns something other than logits of shape (batch, classes).
    """
    if len(labels) == 0:
        # An optimizer step is taken all the same, so that every method takes equally many.
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
