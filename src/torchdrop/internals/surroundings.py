"""Tell what is active around a call: transforms, modes, autocast, a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchdrop.internals.missing import import_error, required

try:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._python_dispatch import _disable_current_modes as disable_dispatch_modes
except ImportError as error:
    raise import_error(error) from error

__all__ = [
    "DisableTorchFunction",
    "TorchDispatchMode",
    "any_autocast_enabled",
    "count_dispatch_modes",
    "disable_dispatch_modes",
    "functorch_transforms_active",
    "graph_task",
    "in_backward_pass",
    "is_legacy_batched_tensor",
    "vmap_draws_differently",
    "writes_into_arguments",
]

# TorchDispatchMode (torch.utils._python_dispatch): the base class of modes that see each operation.
#   One mode of torchdrop records whether random numbers are drawn.
# disable_dispatch_modes (torch.utils._python_dispatch._disable_current_modes): a context without
#   the active dispatch modes. Shapes are worked out in it, so that no mode sees these operations.

#: Whether a torch.func transform (vmap, grad, jvp) is active. Under one, torchdrop's own autograd
#: functions do not work and PyTorch's operations are used. Without it torchdrop cannot be imported.
functorch_transforms_active: Callable[[], bool] = required(
    "torch._C._are_functorch_transforms_active"
)

#: How many dispatch modes are active (fake tensors, make_fx, a FLOP counter). Under such a mode,
#: random numbers are not read on the host, because a traced graph would hold them as constants.
#: Without it torchdrop cannot be imported.
count_dispatch_modes: Callable[[], int] = required("torch._C._len_torch_dispatch_stack")

#: Whether a tensor was batched by ``autograd.grad(is_grads_batched=True)``, so that it stands for
#: many gradients. Its memory must not be written into, and its values cannot be read on the host.
#: Without it torchdrop cannot be imported.
is_legacy_batched_tensor: Callable[[Tensor], bool] = required(
    "torch._C._functorch.is_legacy_batchedtensor"
)

#: Whether autocast is enabled for any device. Every call checks this first, because checking one
#: device takes longer. Without it torchdrop cannot be imported.
any_autocast_enabled: Callable[[], bool] = required("torch._C._is_any_autocast_enabled")

#: A context that disables ``__torch_function__`` of modes and of tensor subclasses. Shapes are
#: worked out in it, so that neither sees these operations. Without it torchdrop cannot be imported.
DisableTorchFunction: Any = required("torch._C.DisableTorchFunction")

#: The number of the backward pass that is running in this thread; -1 if none is. Activation
#: checkpointing runs a block again inside the backward pass. This repeats an earlier decision and
#: must not be counted. Without it torchdrop cannot be imported.
graph_task: Callable[[], int] = required("torch._C._current_graph_task_id")


def in_backward_pass() -> bool:
    """Whether a backward pass is running in this thread; see :data:`graph_task`."""
    return graph_task() != -1


def vmap_draws_differently() -> bool:
    """Whether ``vmap(randomness="different")`` is active.

    Uses the stack of interpreters in ``torch._C._functorch``. Rows are drawn once for all calls
    that vmap maps over, so this setting raises an error. Without the stack every vmap does.

    Raises:
        RuntimeError: PyTorch does not tell the randomness of vmap.
    """
    if not functorch_transforms_active():
        return False
    try:
        functorch = torch._C._functorch
        vmap, different = functorch.TransformType.Vmap, functorch.RandomnessType.Different
        return any(
            level.key() == vmap and functorch.CVmapInterpreterPtr(level).randomness() == different
            for level in functorch.get_interpreter_stack() or ()
        )
    except AttributeError as error:
        raise RuntimeError(
            f"torchdrop has to know with which randomness vmap runs, which PyTorch "
            f"{torch.__version__} does not tell (torch._C._functorch: {error}); install a newer "
            f"torchdrop, or an older PyTorch"
        ) from error


def writes_into_arguments(operation: Any) -> bool:
    """Whether ``operation``, as a dispatch mode receives it, writes into its arguments.

    Uses ``OpOverload._schema``. The buffers of a model must not be written into while shapes are
    worked out. Without it the call raises an AttributeError while a block is traced.
    """
    return bool(operation._schema.is_mutable)
