"""The functions of PyTorch that ask for a mode or set one, and modes without a public function."""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchdrop.internals.missing import import_error

try:
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext
except ImportError as error:
    raise import_error(error) from error

__all__ = [
    "default_device",
    "function_modes",
    "mode_of_builtin",
    "mode_of_code",
    "sdpa_backends",
]

# The functions in torch and torch._C that ask for a mode or set one, by the kind of the mode. If
# PyTorch uses another function, its result is a constant in the graph of a block, and only the test
# of the block on a real call notices.
_FUNCTIONS = {
    "grad": ("is_grad_enabled", "_set_grad_enabled", "is_inference_mode_enabled"),
    "autocast": (
        "is_autocast_enabled", "set_autocast_enabled", "get_autocast_dtype", "set_autocast_dtype",
        "is_autocast_cpu_enabled", "set_autocast_cpu_enabled", "get_autocast_cpu_dtype",
        "set_autocast_cpu_dtype", "get_autocast_gpu_dtype", "set_autocast_gpu_dtype",
        "is_autocast_cache_enabled", "set_autocast_cache_enabled", "_is_any_autocast_enabled",
    ),
    "dtype": ("get_default_dtype", "_set_default_dtype"),
    "device": ("_push_on_torch_function_stack",),
    "attention": (
        "_get_cudnn_sdp_enabled", "_get_flash_sdp_enabled", "_get_math_sdp_enabled",
        "_get_mem_efficient_sdp_enabled", "_get_overrideable_sdp_enabled",
        "_get_sdp_priority_order", "_set_sdp_use_cudnn", "_set_sdp_use_flash", "_set_sdp_use_math",
        "_set_sdp_use_mem_efficient", "_set_sdp_use_overrideable", "_set_sdp_priority_order",
    ),
    "cudnn": (
        "_get_cudnn_enabled", "_get_cudnn_benchmark", "_get_cudnn_deterministic",
        "_get_cudnn_allow_tf32", "_set_cudnn_enabled", "_set_cudnn_benchmark",
        "_set_cudnn_deterministic", "_set_cudnn_allow_tf32",
    ),
}  # fmt: skip

# The kind of mode, by the id of the function. The function itself cannot be the key: a builtin
# method of an object that has no hash has none either. The functions stay alive, so no other object
# gets their id.
_BY_ID = {
    id(found): kind
    for kind, names in _FUNCTIONS.items()
    for name in names
    for place in (torch, torch._C)
    if (found := getattr(place, name, None)) is not None
}

# Functions written in Python that call none of the functions above, by their code.
_BY_CODE = {
    torch.inference_mode.__enter__.__code__: "grad",
    torch.get_default_device.__code__: "device",
}


def mode_of_builtin(function: Any) -> str | None:
    """Return the kind of mode that a builtin of PyTorch asks for or sets; None without one."""
    return _BY_ID.get(id(function))


def mode_of_code(code: CodeType) -> str | None:
    """Return the kind of mode that a Python function of PyTorch asks for or sets, or None."""
    return _BY_CODE.get(code)


def function_modes() -> list[TorchFunctionMode]:
    """Return the active function modes, without those of ``torch.device``.

    Uses ``torch.overrides._get_current_function_mode_stack``. A forward that enters a function mode
    of the user cannot be traced. Without it torchdrop cannot be imported.
    """
    active: list[TorchFunctionMode] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return [mode for mode in active if not isinstance(mode, DeviceContext)]


def default_device() -> str | None:
    """Return the device on which tensors are created by default; None if none was set.

    Uses ``torch.utils._device.DeviceContext``, because ``torch.get_default_device`` creates a
    tensor to find out the index. Without it torchdrop cannot be imported.
    """
    for mode in reversed(_get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
        if isinstance(mode, DeviceContext):
            return str(mode.device)
    return None


def sdpa_backends() -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the names of the kernels that attention may use, and the order in which it tries them.

    Uses ``torch._C._get_flash_sdp_enabled`` and the like. Without them the call raises an
    AttributeError while a block is traced.
    """
    functions: Any = torch._C
    flags = (
        ("FLASH_ATTENTION", functions._get_flash_sdp_enabled()),
        ("EFFICIENT_ATTENTION", functions._get_mem_efficient_sdp_enabled()),
        ("MATH", functions._get_math_sdp_enabled()),
        ("CUDNN_ATTENTION", functions._get_cudnn_sdp_enabled()),
        ("OVERRIDEABLE", functions._get_overrideable_sdp_enabled()),
    )
    return tuple(name for name, enabled in flags if enabled), tuple(
        functions._get_sdp_priority_order()
    )
