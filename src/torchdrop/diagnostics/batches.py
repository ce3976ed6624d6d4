"""Turn batches, as a data loader yields them, into the arguments of calls of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchdrop.internals import tree_map_only

__all__ = ["Call", "calls", "check_batches", "check_sizes_known"]

# The positional and the keyword arguments of one forward pass.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def check_sizes_known(model: nn.Module) -> None:
    """Raise if a layer of ``model`` is lazy and has no sizes yet.

    Raises:
        ValueError: A parameter or buffer will get its shape in the first forward pass.
    """
    for name, module in model.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(torch.nn.parameter.is_lazy(t) for t in tensors):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) has no sizes yet, because it "
                "is lazy; run the model on one batch first"
            )


def check_batches(batches: object) -> None:
    """Raise unless ``batches`` is an iterable of batches.

    Raises:
        TypeError: It is a single tensor, a mapping, a string, or not iterable.
    """
    if isinstance(batches, Tensor | Mapping | str | bytes):
        raise TypeError(
            f"batches has to be an iterable of batches, but got a single {type(batches).__name__}; "
            "for one batch write [batch]"
        )
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"batches has to be an iterable of batches, but got {type(batches).__name__}"
        )


def calls(model: nn.Module, batches: Iterable[Any]) -> Iterator[Call]:
    """Yield the arguments of one forward pass for each batch, on the device of ``model``.

    A batch is the input tensor, a dict of keyword arguments, or a tuple or list whose first item is
    the input (the others, such as labels, are ignored). An input that is a tuple, as in
    ``((a, b), y)``, holds several positional arguments; one that is a dict holds keyword arguments.
    ``batches`` is iterated over once, so it may be a generator.

    Raises:
        TypeError: A batch is not one of these, or the model does not accept such arguments.
        ValueError: ``batches`` is empty.
    """
    devices = {p.device for p in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None
    number = -1
    try:
        iterator = iter(batches)
    except TypeError:  # a NumPy scalar has an __iter__ that raises
        raise TypeError(
            f"batches has to be an iterable of batches, but got {type(batches).__name__}"
        ) from None
    for number, batch in enumerate(iterator):
        args, kwargs = _arguments(batch, number)
        _check_accepted(model, args, kwargs, number)
        if device is not None:
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
        yield args, kwargs
    if number < 0:
        raise ValueError(
            "batches is empty: at least one batch is needed (a generator can be used only once)"
        )


def _arguments(batch: Any, number: int) -> Call:
    """Return the arguments in ``batch``; raise if it has none of the forms of :func:`calls`."""
    given = batch
    if isinstance(batch, tuple | list) and batch:
        given = batch[0]
        if isinstance(given, tuple | list) and given:
            return tuple(given), {}
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, Tensor):
        return (given,), {}
    what = type(batch).__name__
    if isinstance(batch, tuple | list):
        what += f" of {type(given).__name__}" if batch else " of nothing"
    raise TypeError(
        "a batch has to be a tensor, a tuple (inputs, ...) or a dict of keyword arguments, "
        f"but batch {number} is a {what}"
    )


def _check_accepted(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int
) -> None:
    """Raise unless the signature of the model's forward accepts the arguments."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = f"the keys {', '.join(kwargs)}" if kwargs else f"{len(args)} positional inputs"
        raise TypeError(
            f"batch {number} has {given}, but {type(model).__name__} takes {signature}: {error}"
        ) from None
