"""The checks of arguments that all functions and layers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "MODES",
    "check_choice",
    "check_dim",
    "check_flag",
    "check_generator",
    "check_input",
    "check_mode",
    "check_model",
    "check_whole",
]

MODES = ("row", "batch")


def check_choice(value: object, choices: Sequence[str], name: str) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Raises:
        ValueError: It is not one of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} has to be one of {', '.join(map(repr, choices))}, but got {value!r}"
        )


def check_model(model: object) -> None:
    """Raise unless ``model`` is an nn.Module.

    Raises:
        TypeError: It is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch.nn.Module, but got a {type(model).__name__}")


def check_flag(value: object, name: str) -> None:
    """Raise unless ``value`` is True or False.

    Raises:
        TypeError: It is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} has to be True or False, but got {value!r}")


def check_generator(generator: object) -> None:
    """Raise unless ``generator`` is a torch.Generator or None.

    Raises:
        TypeError: It is neither.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator has to be a torch.Generator or None, but got a {type(generator).__name__}"
        )


def check_whole(value: object, name: str, least: int = 0) -> int:
    """Return ``value`` if it is an integer that is ``least`` or more.

    Raises:
        TypeError: ``value`` is not an integer.
        ValueError: ``value`` is below ``least``.
    """
    # A symbolic size (SymInt) is an integer to a compiler, but not to isinstance.
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} has to be an integer, but got {value!r}")
    if value < least:
        raise ValueError(f"{name} has to be {least} or more, but got {value}")
    return value  # type: ignore[return-value]


def check_mode(mode: object) -> None:
    """Raise unless ``mode`` is "batch" or "row".

    Raises:
        ValueError: It is neither.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode!r}")


def check_input(x: object, name: str = "input") -> None:
    """Raise unless ``x`` is a floating-point tensor with at least one dimension.

    Raises:
        TypeError: ``x`` is not a tensor, or its dtype is not a floating-point one.
        ValueError: ``x`` has no dimension.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} has to be a tensor, but got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} has to be a floating-point tensor, but got dtype {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{name} has to have at least one dimension, but got a 0-d tensor")


def check_dim(dim: object, ndim: int | None = None, name: str = "batch_dim") -> int:
    """Return ``dim``, counted from the front if ``ndim`` is given.

    Raises:
        TypeError: ``dim`` is not an integer.
        ValueError: A tensor of ``ndim`` dimensions does not have this dimension.
    """
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(
            f"{name} has to be an integer, but got {dim!r} of type {type(dim).__name__}"
        )
    if ndim is None:
        return dim
    if not -ndim <= dim < ndim:
        raise ValueError(
            f"{name} has to be between {-ndim} and {ndim - 1} for an input of {ndim} dimensions, "
            f"but got {dim}"
        )
    return dim % ndim
