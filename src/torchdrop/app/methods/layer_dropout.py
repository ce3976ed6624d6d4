"""nn.Dropout next to one layer: the last linear layer, or the last BatchNorm."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from torchdrop.internals import AttentionOutputLinear, BatchNormBase

from ..errors import UserError
from .hooks import HookedMethod, ModuleHook, count_dropped_values
from .registry import Applied, Method, register


def _drop_elements(x: Tensor, p: float, training: bool) -> Tensor:
    return F.dropout(x, p, training)


def _dropout_hook(name: str, p: float) -> ModuleHook:
    return ModuleHook(name, partial(_drop_elements, p=p), count_dropped_values)


def _dropout(model: nn.Module, p: float) -> Applied:
    linears = [
        module
        for module in model.modules()
        # nn.MultiheadAttention reads the weights of its output projection, but never calls it.
        if isinstance(module, nn.Linear) and not isinstance(module, AttentionOutputLinear)
    ]
    if not linears:
        raise UserError(
            "dropout goes in front of the last nn.Linear of a network, and this one has none; "
            "leave dropout out of --methods"
        )
    hook = _dropout_hook("dropout", p)
    linears[-1].register_forward_pre_hook(hook)
    return HookedMethod(p, [hook])


register(
    Method("dropout", "nn.Dropout in front of the last linear layer", _dropout, p=0.3, default=True)
)


def _last_batch_norm(model: nn.Module, name: str) -> nn.Module:
    norms = [module for module in model.modules() if isinstance(module, BatchNormBase)]
    if not norms:
        raise UserError(
            f"{name} goes next to the last BatchNorm of a network, and this one has none; "
            f"leave {name} out of --methods"
        )
    return norms[-1]


def _dropout_before_bn(model: nn.Module, p: float) -> Applied:
    hook = _dropout_hook("dropout_before_bn", p)
    _last_batch_norm(model, hook.name).register_forward_pre_hook(hook)
    return HookedMethod(p, [hook])


register(
    Method(
        "dropout_before_bn",
        "nn.Dropout in front of the last BatchNorm",
        _dropout_before_bn,
        p=0.3,
    )
)


def _dropout_after_bn(model: nn.Module, p: float) -> Applied:
    hook = _dropout_hook("dropout_after_bn", p)
    _last_batch_norm(model, hook.name).register_forward_hook(hook)
    return HookedMethod(p, [hook])


register(
    Method("dropout_after_bn", "nn.Dropout behind the last BatchNorm", _dropout_after_bn, p=0.3)
)
