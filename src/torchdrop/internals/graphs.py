"""Trace with torch.fx, and use tensors without data."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch import fx

__all__ = [
    "NotAParameter",
    "call_by_full_name",
    "fake_tensor_mode",
    "is_data_dependent_error",
    "is_fake_tensor",
    "reserve_name",
    "tensors_of_tracer",
    "wrap_functions_of",
]


class NotAParameter:
    """Base class of proxies for which ``isinstance(x, nn.Parameter)`` is False.

    Sets ``_is_param``, which the metaclass of nn.Parameter reads. Without it, reading the attribute
    would return another proxy, which cannot be converted to a bool, and a forward that calls
    ``isinstance`` could not be traced. If PyTorch reads another name, such a forward cannot be
    traced, and the plan says so.
    """

    _is_param = False


def reserve_name(graph: fx.Graph, name: str) -> None:
    """Reserve ``name`` in ``graph``, so that no node gets it: ``fx.Graph._graph_namespace``.

    The generated function has an argument of that name. Without the attribute the call raises an
    AttributeError while stochastic depth is added.
    """
    graph._graph_namespace.create_name(name, None)


def wrap_functions_of(tracer: fx.Tracer, module: ModuleType) -> None:
    """Make ``tracer`` record its wrapped functions also if they are called as ``module.name``.

    Appends to ``fx.Tracer._autowrap_search``. Functions such as ``torch.zeros`` take no proxy, so
    fx records them only if it replaces them in the module torch. Without the attribute the call
    raises an AttributeError while a block is traced.
    """
    search: Any = tracer._autowrap_search
    search.append(module)


def tensors_of_tracer(tracer: fx.Tracer) -> dict[Any, Any]:
    """Return the tensors that are attributes of the traced module: ``fx.Tracer.tensor_attrs``.

    If an operation takes another tensor, that tensor was created in the forward without being
    recorded, which is an error. Without the attribute the call raises an AttributeError while a
    block is traced.
    """
    found: dict[Any, Any] = tracer.tensor_attrs
    return found


def call_by_full_name(node: fx.Node) -> None:
    """Make generated code call the target of ``node`` by its full name.

    Removes ``node.meta["is_wrapped"]``, which fx sets for wrapped functions. With it, generated
    code calls them by their bare names, which are not defined there. If PyTorch uses another key,
    generated code raises a NameError on its first call.
    """
    node.meta.pop("is_wrapped", None)


def fake_tensor_mode() -> Any:
    """Return a mode in which tensors have shapes and dtypes, but no data.

    Uses ``torch._subclasses.fake_tensor.FakeTensorMode``, imported here, since its first use takes
    a second or more. Shapes of the values in a forward are worked out under it.

    Raises:
        ImportError: PyTorch does not have it.
    """
    fake_tensor: Any = importlib.import_module("torch._subclasses.fake_tensor")
    return fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)


def is_data_dependent_error(error: BaseException) -> bool:
    """Whether ``error`` was raised because a fake tensor has no data, or a shape depends on data.

    Compares the names of two classes in ``torch._subclasses.fake_tensor``. If they have other
    names, the reason in the plan is less precise.
    """
    names = ("DataDependentOutputException", "DynamicOutputShapeException")
    return type(error).__name__ in names


def is_fake_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor of the mode that :func:`fake_tensor_mode` returns.

    Compares with ``torch._subclasses.fake_tensor.FakeTensor``. Operations on real tensors alone are
    run for real, so that no fake tensor stays in a cache of the user.
    """
    fake_tensor: Any = importlib.import_module("torch._subclasses.fake_tensor")
    return isinstance(value, fake_tensor.FakeTensor)
