"""Test the blocks of a model on the example inputs, when stochastic depth is added."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from torchdrop.finding.example_calls import run_with_gradients
from torchdrop.running.block_site import BlockSite
from torchdrop.running.proof import warn_of_masks
from torchdrop.running.unseen import unseen
from torchdrop.tracing.unchanged import devices_of, training_flags_restored

__all__ = ["prove_on_example"]


def prove_on_example(model: nn.Module, sites: Sequence[BlockSite], example_inputs: Any) -> None:
    """Test every block that a forward pass of the example reaches, without dropping anything.

    A model that cannot be run in training with the example (it may need targets there) is tested
    in its first training steps instead.
    """
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(site.proving())
        stack.enter_context(training_flags_restored(model))
        model.train()
        stack.enter_context(unseen(model, devices=devices_of(model)))
        try:
            run_with_gradients(model, example_inputs)
        except Exception:
            return
    for site in sites:
        warn_of_masks(site)
