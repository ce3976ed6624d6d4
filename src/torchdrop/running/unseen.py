"""Run a block for a test, without effects that the user or the training could notice."""

from __future__ import annotations

import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from torchdrop.internals import (
    BatchNormBase,
    DropoutBase,
    buffers_of,
    disable_dispatch_modes,
    hooks_suspended,
    own_saved_tensor_hooks,
)
from torchdrop.tracing.process_state import PROCESS_LOCK
from torchdrop.tracing.unchanged import unchanged

__all__ = ["held_still", "plain_attributes_restored", "unseen"]

_CONTAINERS = (list, dict, set, deque, OrderedDict)


@contextmanager
def unseen(*modules: nn.Module, devices: set[torch.device]) -> Iterator[None]:
    """Run ``modules`` without side effects, and with BatchNorm and dropout inactive.

    Inside, hooks of the modules are not called, saved-tensor hooks and dispatch modes of the user
    see nothing, BatchNorm uses its running statistics, and dropout keeps everything. Afterwards
    buffers, training flags, attributes, and random numbers are as before.

    Args:
        modules: The modules that are run.
        devices: The devices of their arguments.
    """
    with ExitStack() as stack:
        stack.enter_context(PROCESS_LOCK)
        stack.enter_context(plain_attributes_restored(*modules))
        stack.enter_context(unchanged(*modules, devices=devices))
        stack.enter_context(hooks_suspended(m for top in modules for m in top.modules()))
        stack.enter_context(disable_dispatch_modes())
        stack.enter_context(own_saved_tensor_hooks())
        stack.enter_context(held_still(*modules))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the real call will give the same warnings
        yield


@contextmanager
def held_still(*modules: nn.Module) -> Iterator[None]:
    """Let BatchNorm use its running statistics, and dropout keep everything, in ``modules``.

    The observers of quantisation-aware training are switched off. Their flag is a buffer, which the
    caller has to restore.
    """
    inside = [module for top in modules for module in top.modules()]
    flags: list[tuple[nn.Module, bool]] = [
        (module, module.training)
        for module in inside
        if isinstance(module, BatchNormBase | DropoutBase) and module.training
    ]
    try:
        for module, _ in flags:
            module.training = False
        for module in inside:
            observes = buffers_of(module).get("observer_enabled")
            if observes is not None:
                observes.zero_()
        with _WithoutDropout():
            yield
    finally:
        for module, training in flags:
            module.training = training


_DROPOUTS = {
    f"{feature}{kind}dropout{suffix}"
    for feature in ("", "feature_")
    for kind in ("", "alpha_")
    for suffix in ("", "_", "1d", "2d", "3d")
}


class _WithoutDropout(TorchFunctionMode):
    """Lets the dropout functions of torch keep everything."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)  # the block is read, for calls in which dropout is active
        name = getattr(func, "__name__", "")
        if name in _DROPOUTS:
            x = args[0] if args else kwargs["input"]
            # a dropout that is not in place returns a new tensor
            return x if name.endswith("_") or kwargs.get("inplace") else x.clone()
        if name == "scaled_dot_product_attention":
            if len(args) > _DROPOUT_P:
                args = (*args[:_DROPOUT_P], 0.0, *args[_DROPOUT_P + 1 :])
            elif "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


# The position of dropout_p among the arguments of scaled_dot_product_attention.
_DROPOUT_P = 4

# The attributes of every module. unchanged() restores those among them that a forward may change.
_OF_EVERY_MODULE = set(nn.Module().__dict__)


@contextmanager
def plain_attributes_restored(*modules: nn.Module) -> Iterator[None]:
    """Restore the plain attributes of ``modules`` and their descendants.

    These are the attributes that a forward assigns, and the items of lists, dicts, sets and plain
    objects that are attributes.
    """
    restores = [
        restore
        for module in dict.fromkeys(m for top in modules for m in top.modules())
        for restore in _attribute_restores(module)
    ]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _attribute_restores(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield functions that restore the attributes of ``module``."""
    state = module.__dict__
    before = {k: v for k, v in state.items() if k not in _OF_EVERY_MODULE}

    def restore() -> None:
        for name in [k for k in state if k not in before and k not in _OF_EVERY_MODULE]:
            del state[name]
        for name, value in before.items():
            if name not in state or state[name] is not value:
                state[name] = value

    yield restore
    for value in before.values():
        yield from _content_restore(value)


def _content_restore(value: Any) -> Iterator[Callable[[], None]]:
    """Yield a function that restores the items of ``value``, if it is a container or an object."""
    if type(value) in _CONTAINERS:
        copy = value.copy()

        def refill() -> None:
            if len(copy) == len(value) and all(map(_is_same, copy, value)):
                return
            value.clear()
            (value.extend if isinstance(value, list | deque) else value.update)(copy)

        if isinstance(value, dict):
            items = copy.items()

            def refill_dict() -> None:
                if [*map(id, value.values())] != [id(v) for _, v in items] or [*value] != [*copy]:
                    value.clear()
                    value.update(copy)

            yield refill_dict
        else:
            yield refill
    elif _is_plain_object(value):
        attributes = dict(vars(value))

        def reset() -> None:
            now = vars(value)
            if [*map(id, now.values())] != [*map(id, attributes.values())]:
                now.clear()
                now.update(attributes)

        yield reset


def _is_same(one: Any, other: Any) -> bool:
    return one is other


def _is_plain_object(value: Any) -> bool:
    """Whether ``value`` is an object whose attributes a forward may set."""
    not_plain = (Tensor, nn.Module, type, ModuleType, FunctionType, MethodType)
    return type(getattr(value, "__dict__", None)) is dict and not isinstance(value, not_plain)
