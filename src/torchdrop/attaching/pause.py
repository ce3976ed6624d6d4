"""Pause the stochastic depth of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from torchdrop.attaching.plan import get_plan
from torchdrop.running.block_site import sites_of

__all__ = ["paused"]


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Drop nothing inside the ``with``, as for the forward passes of a teacher, or calibration.

    Every block runs its own forward, as in the dense model, whatever its rate: ``p`` has no
    effect, no random number is drawn and :meth:`Plan.observed` counts nothing. With
    ``scale="eval"`` this also holds in evaluation: branches are not multiplied by 1 - p, so the
    output is that of the dense model, not that of the trained network in evaluation. Rates that are
    set inside the ``with`` take effect after it. The model's own masking layers, which torchdrop
    replaced, stay inactive. Pauses may be nested and end with the ``with``, also if an exception
    is raised; a copy of the model that is made inside is not paused.

    With activation checkpointing, run the backward pass inside as well, because it computes the
    blocks again.

    Args:
        model: A model with stochastic depth, a part of one, or a module that contains one.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no stochastic depth.

    Example:
        >>> import torch, torchvision, torchdrop
        >>> model = torchvision.models.resnet18()
        >>> plan = torchdrop.add_stochastic_depth(model, p=0.5)
        >>> with torch.no_grad(), torchdrop.paused(model):
        ...     target = model(torch.randn(2, 3, 32, 32))
        >>> plan.observed()["layer4.1"]
        nan
    """
    get_plan(model)  # raises if there is no stochastic depth
    sites = sites_of(model)
    for site in sites:
        site.pause()
    try:
        yield
    finally:
        for site in sites:
            site.resume()
