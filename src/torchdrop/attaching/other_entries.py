"""Warn if a block is trained through a method other than its forward.

A network may add its branches in a method such as ``forward_features`` that its forward calls.
Stochastic depth acts in calls of the module. A trainer that calls the method itself trains the
network without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from torchdrop.error_pages import see
from torchdrop.running.block_site import BlockSite
from torchdrop.running.forward_slot import occupant_of

__all__ = ["warn_if_forward_is_not_called"]


class _FirstGradient:
    """A hook on one parameter of a block, which is removed at the first gradient."""

    def __init__(self, site: BlockSite) -> None:
        self.site = site
        self.handle: RemovableHandle | None = None

    def __call__(self, parameter: Tensor) -> Any:
        site = self.site
        if not site.module.training:
            return
        if self.handle is not None:
            self.handle.remove()
        if occupant_of(site.module) is not site or not site.active:
            return
        if any(b.counts.last is not None for b in site.branches):
            return
        kind, block = type(site.module).__name__, site.branches[0].facts.block
        names = " or ".join(f"{name}()" for name in site.methods)
        warnings.warn(
            f"{block} got a gradient, but the {kind} that adds its branches was never called in "
            f"training: nothing was dropped. Its branches are added in {names}; call the module "
            f"itself, whose forward calls that method" + see("other-entry-points"),
            stacklevel=2,
        )


def warn_if_forward_is_not_called(site: BlockSite) -> None:
    """Warn at the first gradient of a branch if the forward of its block was not called.

    Nothing happens unless the block adds branches in other methods.
    """
    inner = [site.module.get_submodule(path) for path in site.branches[0].facts.inner]
    parameters = [p for module in inner for p in module.parameters() if p.requires_grad]
    if site.methods and parameters:
        hook = _FirstGradient(site)
        register: Callable[..., RemovableHandle] = parameters[-1].register_post_accumulate_grad_hook
        hook.handle = register(hook)
