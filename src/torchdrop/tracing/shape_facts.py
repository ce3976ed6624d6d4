"""Work out the shapes and dtypes of the values in a forward, without computing the values.

``if height == width`` or ``(*x.shape[:-1], heads, dim)`` need facts that follow from the shapes of
the arguments. They are worked out with fake tensors, which have a shape and a dtype but no data.
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
    TorchDispatchMode,
    disable_dispatch_modes,
    fake_tensor_mode,
    is_data_dependent_error,
    is_fake_tensor,
    tree_flatten,
    tree_map_only,
    writes_into_arguments,
)
from torchdrop.tracing.modes import use_modes
from torchdrop.tracing.random_states import generator_states, set_generator_states

__all__ = ["NeedsDataError", "ShapeFacts", "meta_double"]


@contextmanager
def _modes_suspended() -> Iterator[None]:
    """Suspend all function and dispatch modes: those of the tracer and those of the user."""
    with DisableTorchFunction(), disable_dispatch_modes():
        yield


def meta_double(value: Tensor) -> Tensor:
    """Return a meta tensor like ``value`` that also records its device and whether it is a leaf."""
    double = value.detach().to("meta").requires_grad_(value.requires_grad)
    double._torchdrop_is_leaf = value.is_leaf  # type: ignore[attr-defined]
    double._torchdrop_device = value.device  # type: ignore[attr-defined]
    return double


def _fake_tensor(like: Tensor, shape: list[int]) -> Tensor:
    """Return a tensor of ``shape``, fake under a fake tensor mode, on the device of ``like``.

    Args:
        like: A tensor that :func:`meta_double` returned.
        shape: The shape.
    """
    with torch.enable_grad():
        value = torch.empty(
            shape,
            dtype=like.dtype,
            device=getattr(like, "_torchdrop_device", like.device),
            requires_grad=like.requires_grad,
        )
        # A forward may write into the result of an operation, but not into a leaf.
        return value if getattr(like, "_torchdrop_is_leaf", True) else value.clone()


class _RealTensorsApart(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on real tensors for real, and protects real tensors from writes.

    An operation without fake tensors among its arguments returns a real tensor, since a cache may
    store it. If an operation writes into a real tensor, such as the counter of batches of a
    BatchNorm, a copy takes the place of that tensor from then on. An operation that draws random
    numbers leaves the generators as they were. Other threads are not affected.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        writes = writes_into_arguments(func)
        if writes or self._copies:
            args, kwargs = tree_map_only(Tensor, lambda t: self._copy(t, writes), (args, kwargs))
        if any(map(is_fake_tensor, tensors)):
            return func(*args, **kwargs)
        with disable_dispatch_modes():
            if torch.Tag.nondeterministic_seeded not in func.tags:
                return func(*args, **kwargs)
            states = generator_states(tree_flatten((args, kwargs))[0])
            try:
                return func(*args, **kwargs)
            finally:
                set_generator_states(states)

    def _copy(self, tensor: Tensor, is_written: bool) -> Tensor:
        """Return the copy of a real tensor that was or will be written into; else ``tensor``."""
        if is_written and not is_fake_tensor(tensor) and id(tensor) not in self._copies:
            with disable_dispatch_modes():
                self._copies[id(tensor)] = tensor, tensor.clone()
        return self._copies.get(id(tensor), (tensor, tensor))[1]


class NeedsDataError(LookupError):
    """The requested value depends on the data of a tensor."""


class ShapeFacts:
    """The values of nodes, as far as they follow from the shapes and dtypes of the placeholders.

    Args:
        owner: The module that has the forward.
        known: A tensor without data for each placeholder, made by :func:`meta_double`.
        doubled: The batch dimension, whose size is doubled; None leaves all sizes as in ``known``.
            A number that differs between the two depends on the batch size. The batch size is that
            of the first placeholder; a placeholder with another size on this dimension does not
            carry the batch and is not doubled.
    """

    def __init__(
        self, owner: nn.Module, known: dict[fx.Node, Tensor], doubled: int | None = None
    ) -> None:
        self._owner = owner
        self._mode = fake_tensor_mode()
        self._real = _RealTensorsApart()
        self._value_of: dict[fx.Node, Any] = {}
        batch: int | None = None
        for node, value in known.items():
            shape = list(value.shape)
            if doubled is not None and len(shape) > doubled:
                batch = shape[doubled] if batch is None else batch
                shape[doubled] *= 2 if shape[doubled] == batch else 1
            with _modes_suspended(), self._mode:
                self._value_of[node] = _fake_tensor(value, shape)

    def of(self, node: fx.Node) -> Any:
        """Return the value of ``node``: a number, a shape, or a tensor without data.

        Raises:
            NeedsDataError: The value depends on the data of a tensor.
            LookupError: The value cannot be worked out.
        """
        if node in self._value_of:
            return self._value_of[node]
        if node.op == "placeholder":
            raise LookupError(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
        try:
            with _modes_suspended(), use_modes(node.meta.get("modes")), self._mode, self._real:
                value = self._run(node, args, kwargs)
        except LookupError:
            raise
        except Exception as error:  # a model may raise anything with tensors that have no data
            asked = is_data_dependent_error(error)
            raise (NeedsDataError if asked else LookupError)(node) from error
        self._value_of[node] = value
        return value

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Run the operation of ``node`` with the given arguments."""
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self._owner)
        if node.op == "call_module":
            return self._owner.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
