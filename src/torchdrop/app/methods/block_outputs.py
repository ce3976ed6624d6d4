"""Methods that change the outputs of the residual blocks in the deeper half of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import torchdrop
from torchdrop import functional
from torchdrop.finding.residual import Residual
from torchdrop.internals import BatchNormBase, ConvBase

from ..errors import UserError, one_line
from .hooks import HookedMethod, ModuleHook, count_dropped_values
from .registry import Applied, Method, register

__all__ = ["residual_blocks"]

_CHANNELS_IN_DIM_1 = (BatchNormBase, ConvBase)
"""A block that holds one of these modules has its channels in dimension 1. In other blocks they
are taken to be the last dimension, as for tokens."""

_LARGEST_BLOCK = 7
"""The largest side of a block of DropBlock: the paper's, for maps of 14x14."""


def residual_blocks(model: nn.Module, name: str) -> list[Residual]:
    """Return the residual blocks of a network, for the method called ``name``.

    Raises:
        UserError: The network has none.
    """
    found = torchdrop.find_residuals(model)
    if not found:
        raise UserError(
            f"{name} goes to the residual blocks of a network, and this one has none that "
            f"torchdrop.find_residuals finds; leave {name} out of --methods"
        )
    return found


def _deeper_half(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the residual blocks of the deeper half; of an odd number, the middle one too."""
    blocks = residual_blocks(model, name)
    return list(dict.fromkeys(block.module for block in blocks[len(blocks) // 2 :]))


def _has_channels_in_dim_1(block: nn.Module) -> bool:
    return any(isinstance(module, _CHANNELS_IN_DIM_1) for module in block.modules())


def _change_outputs(
    blocks: Sequence[nn.Module],
    name: str,
    change_for: Callable[[nn.Module], Callable[..., Tensor]],
    asked: float | None,
) -> Applied:
    """Change the output of each block by the function that ``change_for`` returns for it."""
    count = None if asked is None else count_dropped_values
    hooks = [ModuleHook(name, change_for(block), count) for block in blocks]
    for block, hook in zip(blocks, hooks, strict=True):
        block.register_forward_hook(hook)
    return HookedMethod(asked, hooks)


def _drop_blocks(x: Tensor, p: float, training: bool) -> Tensor:
    """Apply DropBlock with blocks whose side is half of the map's plus one, at most 7."""
    if not 3 <= x.dim() <= 5:
        raise UserError(
            f"drop_block needs maps, (batch, channels, height, width), behind residual blocks, "
            f"but got {tuple(x.shape)}; leave drop_block out of --methods"
        )
    size = tuple(min(side // 2 + 1, _LARGEST_BLOCK) for side in x.shape[2:])
    drop = (functional.drop_block1d, functional.drop_block2d, functional.drop_block3d)[x.dim() - 3]
    return drop(x, p, size, training)


def _drop_block(model: nn.Module, p: float) -> Applied:
    blocks = [b for b in _deeper_half(model, "drop_block") if _has_channels_in_dim_1(b)]
    if not blocks:
        raise UserError(
            "drop_block goes behind residual blocks with a convolution, and this network has none "
            "in its deeper half; leave drop_block out of --methods"
        )
    return _change_outputs(blocks, "drop_block", lambda block: partial(_drop_blocks, p=p), p)


register(
    Method(
        "drop_block",
        "DropBlock behind the residual blocks of the deeper half: blocks of half a map and one",
        _drop_block,
        p=0.1,
    )
)


def _spatial_dropout(model: nn.Module, p: float) -> Applied:
    def change_for(block: nn.Module) -> Callable[..., Tensor]:
        dim = 1 if _has_channels_in_dim_1(block) else -1
        return partial(functional.spatial_dropout, p=p, channel_dim=dim)

    blocks = _deeper_half(model, "spatial_dropout")
    return _change_outputs(blocks, "spatial_dropout", change_for, p)


register(
    Method(
        "spatial_dropout",
        "whole channels dropped, behind the residual blocks of the deeper half",
        _spatial_dropout,
        p=0.1,
    )
)


def _gaussian_dropout(model: nn.Module, p: float) -> Applied:
    try:
        functional.gaussian_dropout(torch.zeros(1), p)
    except ValueError as error:
        raise UserError(f"gaussian_dropout: {one_line(error)}") from error
    blocks = _deeper_half(model, "gaussian_dropout")
    change = partial(functional.gaussian_dropout, p=p)
    return _change_outputs(blocks, "gaussian_dropout", lambda block: change, None)


register(
    Method(
        "gaussian_dropout",
        "noise with the variance of dropout, behind the residual blocks of the deeper half",
        _gaussian_dropout,
        p=0.1,
    )
)


def _uniform_dropout(model: nn.Module, p: float) -> Applied:
    blocks = _deeper_half(model, "uniform_dropout")
    change = partial(functional.uniform_dropout, beta=p)
    return _change_outputs(blocks, "uniform_dropout", lambda block: change, None)


register(
    Method(
        "uniform_dropout",
        "uniform noise of half-width beta (its p), behind the residual blocks of the deeper half",
        _uniform_dropout,
        p=0.1,
        rate=False,
    )
)
