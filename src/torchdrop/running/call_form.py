"""The form of a call of a block, with which the next call is compared.

A site checks much in each call: whether it is observed, compiled, transformed, tested, called with
a cache, with other constants or under other modes. A training loop calls a block in one way. After
a call with all checks, the site remembers its form; a call of the same form needs few checks.
"""

from __future__ import annotations

from inspect import Parameter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from torchdrop.internals import any_autocast_enabled, classes_in_tree, functorch_transforms_active
from torchdrop.running.generation import caches_of

if TYPE_CHECKING:
    from torchdrop.running.block_site import BlockSite

__all__ = ["CallForm", "form_of"]

_CONSTANTS = (type(None), bool, int, float, str)

# Stands in the list of forms for an argument that is a tensor.
_A_TENSOR = object()


def form_of(
    site: BlockSite, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[CallForm, list[Tensor]] | None:
    """Return the form of a call, and the tensors in its arguments; None if it has no such form.

    Args:
        site: The site of the block.
        args: The positional arguments of the call.
        kwargs: Its keyword arguments.
    """
    parameters = list(site.__signature__.parameters.values())[len(args) :]
    defaults = (p.default for p in parameters if p.name not in kwargs)
    if not all(type(value) in _CONSTANTS or value is Parameter.empty for value in defaults):
        return None  # a default that may be changed, such as a dict
    if caches_of(site, args, kwargs):
        return None  # whether such a call only generates depends on more than is compared
    found: list[Any] = []
    forms: list[Any] = []
    for value in (*args, *kwargs.values()):
        items = value if type(value) is tuple else (value,)
        if all(type(item) is Tensor for item in items):
            found += items
            forms.append(len(items) if items is value else _A_TENSOR)
        elif type(value) in _CONSTANTS:
            forms.append(_Constant(value))
        else:
            return None
    if len({id(tensor) for tensor in found}) != len(found):
        return None  # one tensor is two arguments
    return CallForm(tuple(kwargs), forms, found, site.module), found


class _Constant:
    """The form of an argument that is not a tensor: its value."""

    def __init__(self, value: Any) -> None:
        self.value = value


class CallForm:
    """The properties of a call with which later calls are compared; :func:`form_of` makes it.

    Args:
        names: The names of the keyword arguments.
        forms: What each argument is: ``_A_TENSOR``, the length of a tuple of tensors, or a
            :class:`_Constant`.
        tensors: The tensors in the arguments.
        block: The block.
    """

    def __init__(
        self, names: tuple[str, ...], forms: list[Any], tensors: list[Tensor], block: nn.Module
    ) -> None:
        self._names = names
        self._forms = forms
        self._kinds = [(t.shape, t.dtype, t.device) for t in tensors]
        self._autocast = _autocast()
        self._ranks = _ranks(block)

    @property
    def autocast(self) -> bool:
        """Whether autocast is enabled."""
        return self._autocast is not None

    def tensors_of(
        self, site: BlockSite, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any] | None:
        """Return the tensors in the arguments; None if this call has another form."""
        if (
            site.is_watched()
            or functorch_transforms_active()
            or _autocast() != self._autocast
            or _ranks(site.module) != self._ranks
            or tuple(kwargs) != self._names
            or len(args) + len(kwargs) != len(self._forms)
        ):
            return None
        found: list[Any] = []
        for value, form in zip((*args, *kwargs.values()), self._forms, strict=True):
            if form is _A_TENSOR:
                found.append(value)
            elif type(form) is int:
                if type(value) is not tuple or len(value) != form:
                    return None
                found += value
            elif type(value) is not type(form.value) or value != form.value:
                return None
        for value, (shape, dtype, device) in zip(found, self._kinds, strict=True):
            if (
                type(value) is not Tensor
                or value.is_nested
                or value.shape != shape
                or value.dtype is not dtype
                or value.device != device
            ):
                return None
        return found

    def with_tensors(
        self, tensors: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of a call of this form, with other tensors."""
        remaining = iter(tensors)
        values: list[Any] = []
        for value, form in zip((*args, *kwargs.values()), self._forms, strict=True):
            if form is _A_TENSOR:
                values.append(next(remaining))
            elif type(form) is int:
                values.append(tuple(next(remaining) for _ in range(form)))
            else:
                values.append(value)
        return values[: len(args)], dict(zip(self._names, values[len(args) :], strict=True))


def _autocast() -> tuple[bool, bool] | None:
    """Return on which of the usual devices autocast is enabled; None if it is on no device."""
    if not any_autocast_enabled():
        return None
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _ranks(block: nn.Module) -> tuple[Any, ...] | None:
    """Return the number of ranks and the classes in ``block``; None without a process group.

    They decide which branches every rank has to run.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.get_world_size(), classes_in_tree(block)
