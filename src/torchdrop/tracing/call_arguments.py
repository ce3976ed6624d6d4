"""Sort the arguments of a call into tensors and constants, also inside containers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["A_TENSOR", "flatten_arguments", "is_cache"]

# Stands for an argument that is a tensor of unknown shape and dtype.
A_TENSOR = object()


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a key/value cache like those of the decoders in transformers."""
    kind = type(value)
    return callable(getattr(kind, "get_seq_length", None)) and callable(
        getattr(kind, "update", None)
    )


def flatten_arguments(
    arguments: Mapping[str, Any], tensor: Callable[[str, Any], Any] = lambda path, value: value
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Replace the tensors of a call, and list its tensors and constants, also inside containers.

    A key/value cache counts as None: its rows cannot be selected, and each call has another one.

    Args:
        arguments: The arguments by name.
        tensor: Returns the replacement of a tensor, given its path and the tensor.

    Returns:
        The arguments with their tensors replaced; the replacements by path; the constants by path.
    """
    tensors: dict[str, Any] = {}
    constants: dict[str, Any] = {}

    def replaced(path: str, value: Any) -> Any:
        if value is A_TENSOR or isinstance(value, Tensor):
            tensors[path] = tensor(path, value)
            return tensors[path]
        if type(value) in (tuple, list):
            constants[path] = (type(value).__name__, len(value))
            return type(value)([replaced(f"{path}.{i}", item) for i, item in enumerate(value)])
        if type(value) in (dict, OrderedDict):
            constants[path] = (type(value).__name__, tuple(value))
            return type(value)(
                (key, replaced(f"{path}.{key}", item)) for key, item in value.items()
            )
        value = None if is_cache(value) else value
        constants[path] = value
        return value

    return {name: replaced(name, value) for name, value in arguments.items()}, tensors, constants
