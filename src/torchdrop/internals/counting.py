"""Count floating point operations."""

from __future__ import annotations

from typing import Any

import torch

from torchdrop.internals.missing import warn_once

__all__ = [
    "count_flops_without_modules",
    "cpu_attention_operations",
]


class _NoModules:
    """Replaces the module tracker of a FLOP counter, so that only the total is counted."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def count_flops_without_modules(mode: Any) -> None:
    """Let a ``FlopCounterMode`` count only the total, not each module.

    Replaces ``FlopCounterMode.mod_tracker``. Its hooks on the gradients of every module take most
    of the time of counting, and it raises for views of parameters that were made without gradients.
    If PyTorch names it differently, counting is slow and may raise; a warning is given once.
    """
    if not hasattr(mode, "mod_tracker"):
        warn_once("FlopCounterMode.mod_tracker", "counting FLOPs is slow, and may fail")
    mode.mod_tracker = _NoModules()


def cpu_attention_operations() -> tuple[Any, Any] | None:
    """Return the operations of fused attention on the CPU, forward and backward.

    These are ``torch.ops.aten._scaled_dot_product_flash_attention_for_cpu`` and
    ``..._for_cpu_backward``. PyTorch itself counts the FLOPs of the kernels for accelerators only.
    Without them attention on the CPU is not counted, and a warning is given once.
    """
    name = "_scaled_dot_product_flash_attention_for_cpu"
    try:
        return getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"{name}_backward")
    except AttributeError:
        warn_once(f"torch.ops.aten.{name}", "FLOPs of attention on the CPU are not counted")
        return None
