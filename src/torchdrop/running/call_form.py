"""The form of a call of a block, with which the next call is compared.

A site checks much in each call: whether it is observed, compiled, transformed, tested, called with
a cache, with other constants or under other modes. A training loop calls a block in one way. After
a call with all checks, the site remembers its form; a call of the same form needs few checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import Parameter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from torchdrop.internals import (
    any_autocast_enabled,
    classes_in_tree,
    count_dispatch_modes,
    functorch_transforms_active,
)
from torchdrop.rows.collectives import in_process_group
from torchdrop.running.generation import caches_of

if TYPE_CHECKING:
    from torchdrop.running.block_site import BlockSite

__all__ = ["CallForm", "form_of"]

_CONSTANTS = (type(None), bool, int, float, str)

# What an argument is: one of these, or the length of a tuple of tensors.
_TENSOR, _CONSTANT = -1, -2


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
    constants: list[Any] = []
    kinds: list[int] = []
    for value in (*args, *kwargs.values()):
        items = value if type(value) is tuple else (value,)
        if all(type(item) is Tensor for item in items):
            found += items
            kinds.append(len(items) if items is value else _TENSOR)
        elif type(value) in _CONSTANTS:
            constants.append(value)
            kinds.append(_CONSTANT)
        else:
            return None
    if len({id(tensor) for tensor in found}) != len(found):
        return None  # one tensor is two arguments
    return CallForm(tuple(kwargs), tuple(kinds), constants, found, site.module), found


class CallForm:
    """The properties of a call with which later calls are compared; :func:`form_of` makes it.

    Args:
        names: The names of the keyword arguments.
        kinds: What each argument is.
        constants: The values of those that are no tensors.
        tensors: The tensors in the arguments.
        block: The block.

    Attributes:
        autocast: Whether autocast is enabled.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        kinds: tuple[int, ...],
        constants: list[Any],
        tensors: list[Tensor],
        block: nn.Module,
    ) -> None:
        self._names = names
        self._kinds = kinds
        self._autocast = _autocast()
        self._ranks = _ranks(block)
        self.autocast = self._autocast is not None
        properties = [(t.shape, t.dtype, t.device) for t in tensors]
        self._select = _selection_of(names, kinds)(constants, properties)

    def tensors_of(
        self, site: BlockSite, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any] | None:
        """Return the tensors in the arguments; None if this call has another form."""
        if (
            site.is_watched()
            or functorch_transforms_active()
            or count_dispatch_modes()
            or _autocast() != self._autocast
            or _ranks(site.module) != self._ranks
        ):
            return None
        found: list[Any] | None = self._select(args, kwargs)
        return found

    def with_tensors(
        self, tensors: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return the arguments of a call of this form, with other tensors."""
        if not kwargs and len(tensors) == len(args):
            return tensors, kwargs
        remaining = iter(tensors)
        values: list[Any] = []
        for value, kind in zip((*args, *kwargs.values()), self._kinds, strict=True):
            if kind == _TENSOR:
                values.append(next(remaining))
            elif kind == _CONSTANT:
                values.append(value)
            else:
                values.append(tuple(next(remaining) for _ in range(kind)))
        return values[: len(args)], dict(zip(self._names, values[len(args) :], strict=True))


@lru_cache(maxsize=1024)
def _selection_of(names: tuple[str, ...], kinds: tuple[int, ...]) -> Callable[..., Any]:
    """Return a function of constants and properties of tensors: the selection that checks them.

    It is generated as source, without loops: a loop over the arguments takes twice as long, in
    every call of every block.
    """
    count = len(kinds) - len(names)
    values = [*(f"args[{i}]" for i in range(count)), *(f"kwargs[{name!r}]" for name in names)]
    found: list[str] = []
    constants = 0
    checks = [f"len(args) != {count} or {'tuple(kwargs) != names' if names else 'kwargs'}"]
    lines: list[str] = []
    for value, kind in zip(values, kinds, strict=True):
        if kind == _TENSOR:
            found.append(value)
        elif kind == _CONSTANT:
            checks.append(f"type({value}) is not type(c{constants}) or {value} != c{constants}")
            constants += 1
        else:
            checks.append(f"type({value}) is not tuple or len({value}) != {kind}")
            found += [f"{value}[{i}]" for i in range(kind)]
    for k, expression in enumerate(found):
        lines.append(f"        t{k} = {expression}")
        lines.append(
            f"        if type(t{k}) is not Tensor or t{k}.is_nested or t{k}.shape != shape{k} or "
            f"t{k}.dtype is not dtype{k} or t{k}.device != device{k}: return None"
        )
    given = "".join(f"    c{k} = constants[{k}]\n" for k in range(constants))
    for k in range(len(found)):
        given += f"    shape{k}, dtype{k}, device{k} = properties[{k}]\n"
    text = (
        f"def make(constants, properties):\n{given}    def select(args, kwargs):\n"
        + "".join(f"        if {check}: return None\n" for check in checks)
        + "\n".join(lines)
        + f"\n        return [{', '.join(f't{k}' for k in range(len(found)))}]\n    return select"
    )
    scope: dict[str, Any] = {"Tensor": Tensor, "names": names}
    exec(text, scope)
    make: Callable[..., Any] = scope["make"]
    return make


def _autocast() -> tuple[bool, bool] | None:
    """Return on which of the usual devices autocast is enabled; None if it is on no device."""
    if not any_autocast_enabled():
        return None
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _ranks(block: nn.Module) -> tuple[Any, ...] | None:
    """Return the number of ranks and the classes in ``block``; None without a process group.

    They decide which branches every rank has to run.
    """
    if not in_process_group():
        return None
    return dist.get_world_size(), classes_in_tree(block)
