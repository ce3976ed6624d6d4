"""ShakeDrop on the outputs of the residual branches of a network."""

from __future__ import annotations

from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn

from torchdrop import functional, schedules
from torchdrop.finding.residual import Branch

from ..errors import UserError
from .block_outputs import residual_blocks
from .hooks import HookedMethod, ModuleHook
from .registry import Applied, Method, register


def _count_shaken_rows(x: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many rows hold a value that is not zero, and how many of those were changed."""
    seen = torch.count_nonzero(x.flatten(1).any(1))
    return seen, torch.count_nonzero((x != new).flatten(1).any(1))


def _last_module(model: nn.Module, branch: Branch) -> nn.Module | None:
    """Return the module whose output is that of the branch.

    None where the branch does not end in a module, or where that module is called elsewhere too.
    """
    split = branch.source.split
    if split is None or split.branch.op != "call_module":
        return None
    target = str(split.branch.target)
    calls = [n for n in split.branch.graph.nodes if n.op == "call_module" and n.target == target]
    # A layer that is called twice would be changed twice.
    paths = [c for c in branch.children if c == target or c.endswith(f".{target}")]
    return model.get_submodule(paths[-1]) if len(calls) == 1 and paths else None


def _shake_drop(model: nn.Module, p: float) -> Applied:
    blocks = residual_blocks(model, "shake_drop")
    rates = schedules.linear(p, len(blocks))
    rate_of: dict[nn.Module, float] = {}
    for block, rate in zip(blocks, rates, strict=True):
        for branch in block.branches:
            module = _last_module(model, branch)
            if module is None or module in rate_of:
                raise UserError(
                    f"shake_drop multiplies the output of the last module of a residual branch, "
                    f"but branch {branch.name} does not end in a module that is called only "
                    f"there; leave shake_drop out of --methods"
                )
            rate_of[module] = rate
    hooks = []
    for module, rate in rate_of.items():
        change = partial(functional.shake_drop, p=rate)
        hooks.append(ModuleHook("shake_drop", change, _count_shaken_rows))
        module.register_forward_hook(hooks[-1])
    return HookedMethod(fmean(rate_of.values()), hooks)


register(
    Method(
        "shake_drop",
        "residual branches times one random factor forward and another one backward, per sample",
        _shake_drop,
        p=0.5,
    )
)
