"""KNOW: what a call tells beforehand about the values that a forward computes: shapes, dtypes.

``if height == width`` or ``(*x.shape[:-1], heads, dim)`` ask for facts that follow from the inputs
of a call without computing anything. They are found on fake tensors, which have all of a tensor
but its data; what depends on the data stays unknown.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchdrop.internals import (
    DisableTorchFunction,
    disable_dispatch_modes,
    fake_tensor_mode,
    is_data_dependent_error,
)

__all__ = ["NeedsDataError", "ShapeFacts", "meta_double"]


@contextmanager
def _unobserved() -> Iterator[None]:
    """Past the modes that record factories and draws while a forward is read, and the user's."""
    with DisableTorchFunction(), disable_dispatch_modes():
        yield


def meta_double(value: Tensor) -> Tensor:
    """A tensor without data that stands for ``value``; it remembers where that lay."""
    double = value.detach().to("meta").requires_grad_(value.requires_grad)
    double._torchdrop_device = value.device  # type: ignore[attr-defined]
    return double


class NeedsDataError(LookupError):
    """What is asked for depends on the data of a tensor."""


class ShapeFacts:
    """The values of nodes, as far as they follow from the shapes and dtypes of the placeholders.

    Args:
        owner: The module whose forward the nodes are of.
        known: What stands for each placeholder, made by :func:`meta_double`.
        larger: Take a batch twice as large on this dimension; None: as it was given. What is
            another number then depends on the size of the batch.
    """

    def __init__(
        self, owner: nn.Module, known: dict[fx.Node, Tensor], larger: int | None = None
    ) -> None:
        self._owner = owner
        self._mode = fake_tensor_mode()
        self._values: dict[fx.Node, Any] = {}
        batch: int | None = None
        for node, value in known.items():
            shape = list(value.shape)
            if larger is not None and len(shape) > larger:
                batch = shape[larger] if batch is None else batch
                shape[larger] *= 2 if shape[larger] == batch else 1
            with _unobserved(), self._mode:
                self._values[node] = torch.empty(
                    shape,
                    dtype=value.dtype,
                    device=getattr(value, "_torchdrop_device", value.device),
                    requires_grad=value.requires_grad,
                )

    def of(self, node: fx.Node) -> Any:
        """The value of ``node``: a number, a shape, or a tensor without data.

        Raises:
            LookupError: It depends on data, or cannot be found out.
        """
        if node in self._values:
            return self._values[node]
        if node.op == "placeholder":
            raise LookupError(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
        try:
            with _unobserved(), self._mode:
                value = self._run(node, args, kwargs)
        except LookupError:
            raise
        except Exception as error:  # what a model does with tensors that have no data
            asked = is_data_dependent_error(error)
            raise (NeedsDataError if asked else LookupError)(node) from error
        self._values[node] = value
        return value

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self._owner)
        if node.op == "call_module":
            return self._owner.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
