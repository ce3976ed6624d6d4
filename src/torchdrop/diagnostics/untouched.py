"""Run a model for a diagnostic, and restore what the forward pass changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from torchdrop.internals import dynamo_was_imported
from torchdrop.rows.shared_numbers import shared_numbers
from torchdrop.running.block_site import sites_of
from torchdrop.tracing.unchanged import BufferCopies, unchanged

__all__ = ["untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[BufferCopies]:
    """Run ``model`` without gradients, and restore everything that a forward pass changes.

    These are training flags, buffers (except those that are kept, see :class:`BufferCopies`),
    ``requires_grad`` of the parameters, the counts of attached stochastic depth, and the global
    random numbers of Python, NumPy and torch, on the host and on the devices of the model. Compiled
    parts run uncompiled.
    """
    with ExitStack() as stack:
        stack.enter_context(_requires_grad_restored(model))
        stack.enter_context(shared_numbers.alone())
        for site in sites_of(model):
            stack.callback(site.restore, site.snapshot())
        if dynamo_was_imported():  # otherwise nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        buffers = stack.enter_context(unchanged(model))
        stack.enter_context(torch.no_grad())
        yield buffers


@contextmanager
def _requires_grad_restored(model: nn.Module) -> Iterator[None]:
    """Restore ``requires_grad`` of the parameters of ``model`` at the end."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
