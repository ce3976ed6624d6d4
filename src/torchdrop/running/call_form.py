"""The form of a call of a block, with which the next call is compared.

A site checks much in each call: whether it is observed, compiled, transformed, tested, called with
a cache, with other constants or under other modes. A training loop calls a block in one way. After
a call with all checks, the site remembers its form; a call of the same form needs few checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import Parameter
from textwrap import indent
from typing import Any

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
from torchdrop.rows.in_graph import leave_uncompiled
from torchdrop.running.block_site import WATCHERS, BlockSite
from torchdrop.running.generation import caches_of
from torchdrop.running.program import compile_with_lines

__all__ = ["DIFFERS", "CallForm", "form_of", "with_values"]

# Returned by a check of a call that has another form.
DIFFERS: Any = object()

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
    return CallForm(tuple(kwargs), tuple(kinds), constants, found, site), found


class CallForm:
    """The properties of a call with which later calls are compared; :func:`form_of` makes it.

    Args:
        names: The names of the keyword arguments.
        kinds: What each argument is.
        constants: The values of those that are no tensors.
        tensors: The tensors in the arguments.
        site: The site of the block.

    Attributes:
        autocast: Whether autocast is enabled.
        checks: Source that compares the arguments ``td_args`` and ``td_kwargs`` of a call. It
            returns ``td_DIFFERS`` if the call has another form. Otherwise it assigns the tensors in
            the arguments to ``td_t0``, ``td_t1``, ... It has no loops and no calls that this form
            does not need, since every call of every block runs it.
        values: The values of the names in this source.
        count: The number of tensors.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        kinds: tuple[int, ...],
        constants: list[Any],
        tensors: list[Tensor],
        site: BlockSite,
    ) -> None:
        self._names = names
        self._kinds = kinds
        autocast, ranks = _autocast(), _ranks(site.module)
        self.autocast = autocast is not None
        self.count = len(tensors)
        self.checks = _checks_of(names, kinds, autocast is not None, ranks is not None)
        self.values: dict[str, Any] = {
            **_CALLED,
            "td_site": site,
            "td_autocast": autocast,
            "td_ranks": ranks,
            "td_names": names,
            **{f"td_c{i}": value for i, value in enumerate(constants)},
        }
        for i, tensor in enumerate(tensors):
            known = {"shape": tensor.shape, "dtype": tensor.dtype, "device": tensor.device}
            self.values |= {f"td_{name}{i}": value for name, value in known.items()}

    def tensors_of(self) -> Callable[..., Any]:
        """Return a function of ``args`` and ``kwargs`` that returns the tensors in them.

        It returns None for a call of another form.
        """
        found = ", ".join(f"td_t{i}" for i in range(self.count))
        text = f"def call(td_args, td_kwargs):\n{self.checks}    return [{found}]\n"
        return with_values(text, {**self.values, "td_DIFFERS": None}, "arguments")

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
def _checks_of(
    names: tuple[str, ...], kinds: tuple[int, ...], autocast: bool, in_group: bool
) -> str:
    """Return :attr:`CallForm.checks`."""
    count = len(kinds) - len(names)
    values = [f"td_args[{i}]" for i in range(count)]
    values += [f"td_kwargs[{name!r}]" for name in names]
    checks = [
        *(f"td_site.{name}" for name in WATCHERS),
        "td_transforms_active()",
        "td_count_modes()",
        "td_autocast_now() != td_autocast" if autocast else "td_any_autocast()",
        "td_ranks_now(td_site.module) != td_ranks" if in_group else "td_in_process_group()",
        f"len(td_args) != {count}",
        "tuple(td_kwargs) != td_names" if names else "td_kwargs",
    ]
    tensors: list[str] = []
    constants = 0
    for value, kind in zip(values, kinds, strict=True):
        if kind == _TENSOR:
            tensors.append(value)
        elif kind == _CONSTANT:
            known = f"td_c{constants}"
            checks.append(f"type({value}) is not type({known}) or {value} != {known}")
            constants += 1
        else:
            checks.append(f"type({value}) is not tuple or len({value}) != {kind}")
            tensors += [f"{value}[{i}]" for i in range(kind)]
    checks += [
        f"type(td_t{k} := {value}) is not td_Tensor or td_t{k}.is_nested or "
        f"td_t{k}.shape != td_shape{k} or td_t{k}.dtype is not td_dtype{k} or "
        f"td_t{k}.device != td_device{k}"
        for k, value in enumerate(tensors)
    ]
    return "".join(f"    if {check}: return td_DIFFERS\n" for check in checks)


def with_values(text: str, values: dict[str, Any], label: str) -> Callable[..., Any]:
    """Return the function ``call`` that ``text`` defines, with ``values`` for its free names.

    Blocks with the same text share its compiled code, as the blocks of a model share the code of
    their class: code that runs for the first time in a step is slow. Tracebacks show ``label``.
    """
    made: Callable[..., Any] = _maker(text, tuple(values), label)(*values.values())
    return made


@lru_cache(maxsize=256)
def _maker(text: str, names: tuple[str, ...], label: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {}
    inner = indent(text, "    ")
    source = f"def make({', '.join(names)}):\n{inner}    return call\n"
    exec(compile_with_lines(source, f"usual call, {label}"), scope)
    make: Callable[..., Any] = scope["make"]
    leave_uncompiled(make.__code__)
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


# What the source of :attr:`CallForm.checks` calls.
_CALLED = {
    "td_DIFFERS": DIFFERS,
    "td_Tensor": Tensor,
    "td_transforms_active": functorch_transforms_active,
    "td_count_modes": count_dispatch_modes,
    "td_any_autocast": any_autocast_enabled,
    "td_autocast_now": _autocast,
    "td_in_process_group": in_process_group,
    "td_ranks_now": _ranks,
}
