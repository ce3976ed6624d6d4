"""Base classes of layers, and the tensors, children and hooks of an nn.Module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_of_modules

from torchdrop.internals.missing import import_error, warn_once

try:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
    from torch.nn.modules.conv import _ConvNd as ConvBase
    from torch.nn.modules.dropout import _DropoutNd as DropoutBase
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as AttentionOutputLinear
except ImportError as error:
    raise import_error(error) from error

__all__ = [
    "MODULE_DICTS",
    "AttentionOutputLinear",
    "BatchNormBase",
    "ConvBase",
    "DropoutBase",
    "buffers_of",
    "classes_in_tree",
    "clear_forward_hooks",
    "forward_hooks_of",
    "forward_pre_hooks_of",
    "has_backward_hooks",
    "hooks_suspended",
    "parameters_of",
    "parameters_of_tree",
    "replicate_for_data_parallel",
    "set_replicate_method",
    "unset_replicate_method",
]

# BatchNormBase (torch.nn.modules.batchnorm._BatchNorm): the base class of every batch
#   normalization, SyncBatchNorm included. It needs more than one value for each channel.
# ConvBase (torch.nn.modules.conv._ConvNd): the base class of every convolution. Its input has the
#   batch on dimension 0 and the channels on dimension 1.
# DropoutBase (torch.nn.modules.dropout._DropoutNd): the base class of PyTorch's dropouts.
# AttentionOutputLinear (torch.nn.modules.linear.NonDynamicallyQuantizableLinear): the linear layer
#   in nn.MultiheadAttention whose weights are used without calling its forward.

#: The attributes of a module that hold its parameters, buffers and children.
MODULE_DICTS = ("_parameters", "_buffers", "_modules")


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dictionary of the buffers of ``module`` itself: ``nn.Module._buffers``.

    Diagnostics replace its entries while they run; setting the attribute instead could call code of
    the module's class. Without it the calls that use it raise an AttributeError.
    """
    return module._buffers


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dictionary of the parameters of ``module`` itself: ``nn.Module._parameters``.

    A test of a block replaces its entries while it runs; setting the attribute instead could call
    code of the module's class. Without it the calls that use it raise an AttributeError.
    """
    return module._parameters


def parameters_of_tree(module: nn.Module) -> list[Tensor]:
    """Return the parameters of ``module`` and its descendants; tied parameters occur repeatedly.

    Uses ``nn.Module._parameters`` and ``nn.Module._modules``. It is called for every dropped
    branch, and ``parameters()`` takes several times as long. Without them the call raises an
    AttributeError.
    """
    found: list[Tensor] = [p for p in module._parameters.values() if p is not None]
    for child in module._modules.values():
        if child is not None:
            found += parameters_of_tree(child)
    return found


def classes_in_tree(module: nn.Module) -> list[type]:
    """Return the classes of ``module``, its descendants, and their parameters.

    They tell whether a model was sharded, or its BatchNorms converted, since the last call. Uses
    ``nn.Module._parameters`` and ``nn.Module._modules``, as :func:`parameters_of_tree` does.
    """
    found: list[type] = [type(module), *map(type, module._parameters.values())]
    for child in module._modules.values():
        if child is not None:
            found += classes_in_tree(child)
    return found


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has backward hooks: ``_backward_hooks`` and ``_backward_pre_hooks``.

    They cannot be called for a module whose children are run one by one, so torchdrop raises an
    error for such a module. Without the attributes the call raises an AttributeError.
    """
    return bool(module._backward_hooks or module._backward_pre_hooks)


def forward_pre_hooks_of(module: nn.Module) -> Iterator[tuple[Callable[..., Any], bool]]:
    """Yield each forward pre-hook of ``module``, and whether it takes keyword arguments.

    Uses ``nn.Module._forward_pre_hooks``. If torchdrop runs the children of a module one by one, it
    has to call the hooks of the module itself. Without them the call raises an AttributeError.
    """
    for number, hook in module._forward_pre_hooks.items():
        yield hook, number in module._forward_pre_hooks_with_kwargs


def forward_hooks_of(module: nn.Module) -> Iterator[tuple[Callable[..., Any], bool]]:
    """Yield each forward hook of ``module``, and whether it takes keyword arguments.

    Uses ``nn.Module._forward_hooks``, see :func:`forward_pre_hooks_of`.
    """
    for number, hook in module._forward_hooks.items():
        yield hook, number in module._forward_hooks_with_kwargs


def clear_forward_hooks(module: nn.Module) -> None:
    """Remove all forward hooks and forward pre-hooks from ``module`` itself.

    Uses ``nn.Module._forward_hooks`` and ``_forward_pre_hooks``. Shapes are worked out on a copy of
    a model, which must not call the user's hooks. Without the attributes the call raises an
    AttributeError.
    """
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def hooks_suspended(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Suspend the hooks of ``modules``, and global module hooks, inside this context.

    Replaces ``nn.Module._forward_hooks``, ``_forward_pre_hooks``, ``_backward_hooks`` and
    ``_backward_pre_hooks`` by empty dictionaries, and ``_global_forward_hooks`` and the three other
    global ones in ``torch.nn.modules.module``. When a block is run for a test, hooks that collect
    outputs must not be called. If PyTorch stores hooks under other names, they are called.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = [
        (module.__dict__, name, module.__dict__[name])
        for module in modules
        for name in _HOOKS
        if module.__dict__.get(name)
    ]
    everywhere = vars(module_of_modules)
    replaced += [
        (everywhere, f"_global{name}", everywhere[f"_global{name}"])
        for name in _HOOKS
        if everywhere.get(f"_global{name}")
    ]
    try:
        for place, name, _ in replaced:
            place[name] = OrderedDict()
        yield
    finally:
        for place, name, hooks in replaced:
            place[name] = hooks


_REPLICATE = "_replicate_for_data_parallel"


def replicate_for_data_parallel(module: nn.Module) -> nn.Module:
    """Return a replica of ``module``, as ``nn.DataParallel`` makes one for each device.

    Uses the method ``nn.Module._replicate_for_data_parallel`` of the class.
    """
    replica: nn.Module = getattr(type(module), _REPLICATE)(module)
    return replica


def set_replicate_method(module: nn.Module, method: Callable[[], nn.Module]) -> None:
    """Make ``nn.DataParallel`` call ``method`` to create a replica of ``module``.

    Sets ``_replicate_for_data_parallel`` on the instance. If PyTorch did not call it, a replica
    would run with the parameters of the original module, so a warning is given once.
    """
    if not hasattr(type(module), _REPLICATE):
        warn_once(
            f"nn.Module.{_REPLICATE}",
            "a model with stochastic depth must not be used in nn.DataParallel (use "
            "DistributedDataParallel)",
        )
    object.__setattr__(module, _REPLICATE, method)


def unset_replicate_method(module: nn.Module) -> None:
    """Undo :func:`set_replicate_method`; without effect if it was not called."""
    module.__dict__.pop(_REPLICATE, None)
