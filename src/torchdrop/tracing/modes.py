"""The modes under which an operation runs: gradients, autocast, default dtype and device, kernels.

A graph of torch.fx does not record them. So a node that runs under other modes than its forward
stores them in ``node.meta["modes"]``, and generated code enters them with ``with`` statements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchdrop.internals import any_autocast_enabled, default_device, sdpa_backends

__all__ = [
    "MODE_KINDS",
    "Modes",
    "active_modes",
    "active_modes_in_graph",
    "contexts_between",
    "current_modes",
    "kinds_of_change",
    "modes_of",
    "select_modes",
    "use_modes",
]

_AUTOCAST_KINDS = [
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
    if torch.amp.is_autocast_available(kind)
]


class Modes(NamedTuple):
    """The modes that are active.

    Attributes:
        grad: Whether gradients are recorded.
        inference: Whether inference mode is on.
        autocast: The kinds of devices for which autocast is on, each with its dtype.
        cache: Whether autocast keeps the weights that it has cast.
        dtype: The default dtype.
        device: The device on which tensors are made by default; None if none was set.
        sdpa: The kernels that attention may use.
        priority: The order in which these kernels are tried.
        cudnn: Whether cuDNN is used, whether it may measure its kernels, whether it has to be
            deterministic, whether it may use TF32.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    cache: bool
    dtype: torch.dtype
    device: str | None
    sdpa: tuple[str, ...]
    priority: tuple[int, ...]
    cudnn: tuple[bool, ...]


def _grad() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _autocast() -> tuple[tuple[tuple[str, torch.dtype], ...], bool]:
    cache = torch.is_autocast_cache_enabled()
    if not torch.compiler.is_compiling() and not any_autocast_enabled():
        return (), cache
    kinds = [kind for kind in _AUTOCAST_KINDS if torch.is_autocast_enabled(kind)]
    return tuple([(kind, torch.get_autocast_dtype(kind)) for kind in kinds]), cache


def _cudnn() -> tuple[bool, ...]:
    flags = torch.backends.cudnn
    return flags.enabled, flags.benchmark, flags.deterministic, flags.allow_tf32


# The functions that read the active modes, by kind.
_READERS: dict[str, Callable[[], Any]] = {
    "grad": _grad,
    "autocast": _autocast,
    "dtype": torch.get_default_dtype,
    "device": default_device,
    "attention": sdpa_backends,
    "cudnn": _cudnn,
}

MODE_KINDS = tuple(_READERS)

# The kinds that a compiler can trace.
_IN_GRAPHS = ("grad", "autocast", "dtype")


def active_modes(kinds: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the modes of ``kinds`` that are active now."""
    return tuple([_READERS[kind]() for kind in kinds])


def select_modes(modes: Modes, kinds: tuple[str, ...]) -> tuple[Any, ...]:
    """Return what :func:`active_modes` would return if ``modes`` were active."""
    found = {
        "grad": (modes.grad, modes.inference),
        "autocast": (modes.autocast, modes.cache),
        "dtype": modes.dtype,
        "device": modes.device,
        "attention": (modes.sdpa, modes.priority),
        "cudnn": modes.cudnn,
    }
    return tuple(found[kind] for kind in kinds)


def active_modes_in_graph(kinds: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the active modes in a compiled graph; None for kinds that a compiler cannot trace."""
    return tuple([_READERS[kind]() if kind in _IN_GRAPHS else None for kind in kinds])


def current_modes() -> Modes:
    """Return the modes that are active now."""
    autocast, cache = _autocast()
    return Modes(
        *_grad(),
        autocast,
        cache,
        torch.get_default_dtype(),
        default_device(),
        *sdpa_backends(),
        _cudnn(),
    )


def kinds_of_change(outer: Modes, inner: Modes) -> set[str]:
    """Return the kinds of modes in which ``outer`` and ``inner`` differ."""
    # one for each field of Modes, in order
    kinds = ("grad", "grad", "autocast", "autocast", "dtype", "device", "attention", "attention")
    return {kind for kind, a, b in zip((*kinds, "cudnn"), outer, inner, strict=True) if a != b}


def modes_of(node: fx.Node, outside: Modes | None) -> Modes | None:
    """Return the modes of a node, which are ``outside`` unless it was recorded under others."""
    found: Modes | None = node.meta.get("modes", outside)
    return found


# The contexts that generated code enters; `contexts_between` names them.


def gradients(enabled: bool) -> AbstractContextManager[Any]:
    """Switch the recording of gradients on or off."""
    return torch.set_grad_enabled(enabled)


def inference(enabled: bool) -> AbstractContextManager[Any]:
    """Switch inference mode on or off."""
    return torch.inference_mode(enabled)


def autocast(kind: str, dtype: torch.dtype | None, cache: bool) -> AbstractContextManager[Any]:
    """Switch autocast on with ``dtype``, or off if ``dtype`` is None."""
    if dtype is None:
        return torch.autocast(kind, enabled=False, cache_enabled=cache)
    return torch.autocast(kind, dtype=dtype, cache_enabled=cache)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of ``dtype`` by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def device(name: str) -> AbstractContextManager[Any]:
    """Make tensors on the device ``name`` by default."""
    return torch.device(name)


def attention(names: tuple[str, ...], in_order: bool) -> AbstractContextManager[Any]:
    """Let attention use the kernels ``names`` only; with ``in_order``, try them in this order."""
    kernels = [getattr(SDPBackend, name) for name in names]
    return sdpa_kernel(kernels, set_priority=in_order)


def cudnn(
    enabled: bool, benchmark: bool, deterministic: bool, allow_tf32: bool
) -> AbstractContextManager[Any]:
    """Use these settings of cuDNN."""
    return torch.backends.cudnn.flags(
        enabled=enabled, benchmark=benchmark, deterministic=deterministic, allow_tf32=allow_tf32
    )


def contexts_between(outer: Modes, inner: Modes) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the contexts that change the modes ``outer`` to ``inner``: names and arguments."""
    found: list[tuple[str, tuple[Any, ...]]] = []
    if outer.inference != inner.inference:
        found.append(("inference", (inner.inference,)))
    if outer.grad != inner.grad or outer.inference != inner.inference:
        found.append(("gradients", (inner.grad,)))
    before, after = dict(outer.autocast), dict(inner.autocast)
    kinds = [kind for kind in before | after if before.get(kind) != after.get(kind)]
    if outer.cache != inner.cache and not kinds:
        kinds = _AUTOCAST_KINDS[:1]
    found += [("autocast", (kind, after.get(kind), inner.cache)) for kind in kinds]
    if outer.dtype != inner.dtype:
        found.append(("default_dtype", (inner.dtype,)))
    if outer.device != inner.device and inner.device is not None:
        found.append(("device", (inner.device,)))
    if (outer.sdpa, outer.priority) != (inner.sdpa, inner.priority):
        numbers = {name: int(getattr(SDPBackend, name)) for name in inner.sdpa}
        in_order = outer.priority != inner.priority
        names = sorted(inner.sdpa, key=lambda name: inner.priority.index(numbers[name]))
        found.append(("attention", (tuple(names), in_order)))
    if outer.cudnn != inner.cudnn:
        found.append(("cudnn", inner.cudnn))
    return found


@contextmanager
def use_modes(modes: Modes | None) -> Iterator[None]:
    """Make ``modes`` the active modes; None changes nothing."""
    if modes is None:
        yield
        return
    with ExitStack() as stack:
        for name, arguments in contexts_between(current_modes(), modes):
            stack.enter_context(globals()[name](*arguments))
        yield
