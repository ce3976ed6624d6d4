"""The usual call of a block: one like the call before, which needs few checks.

A site checks much in each call: whether it is observed, compiled, transformed, tested, called with
a cache, with other constants or under other modes. A training loop calls a block in one way. After
a call with all checks, :class:`UsualCall` remembers what was checked, and compares the next call
with it. If nothing differs, :class:`UsualSums` computes the residual sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from torchdrop.internals import any_autocast_enabled, classes_in_tree, functorch_transforms_active
from torchdrop.rows.collectives import has_other_ranks
from torchdrop.rows.take_and_add import add_whole
from torchdrop.running.block_site import precision_of
from torchdrop.running.generation import caches_of
from torchdrop.running.program import MismatchError, Program
from torchdrop.running.residual_sum import sum_on_rows, sum_without_branch

if TYPE_CHECKING:
    from torchdrop.running.split_site import SplitSite

__all__ = ["UsualCall", "UsualSums", "usual_call"]

_CONSTANTS = (type(None), bool, int, float, str)

# Stands in the list of forms for an argument that is a tensor.
_A_TENSOR = object()


def usual_call(
    site: SplitSite,
    program: Program,
    tensors: Sequence[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> UsualCall | None:
    """Return what is remembered of a call in training that passed all checks; None if nothing is.

    Args:
        site: The site of the block.
        program: The program that ran.
        tensors: What it was called with.
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
    places = {id(tensor): i for i, tensor in enumerate(found)}
    if len(places) != len(found) or not all(id(t) in places for t in tensors):
        return None  # one tensor is two arguments, or one is made of the arguments
    order = [places[id(tensor)] for tensor in tensors]
    return UsualCall(program, tuple(kwargs), forms, found, order, site.module)


class _Constant:
    """The form of an argument that is not a tensor: its value."""

    def __init__(self, value: Any) -> None:
        self.value = value


class UsualCall:
    """The properties of a call that passed all checks, with which later calls are compared.

    :func:`usual_call` makes it.

    Args:
        program: The program that ran.
        names: The names of the keyword arguments.
        forms: What each argument is: ``_A_TENSOR``, the length of a tuple of tensors, or a
            :class:`_Constant`.
        tensors: The tensors in the arguments.
        order: Which of them the program takes.
        block: The block.
    """

    def __init__(
        self,
        program: Program,
        names: tuple[str, ...],
        forms: list[Any],
        tensors: list[Tensor],
        order: list[int],
        block: nn.Module,
    ) -> None:
        self.program = program
        self._names = names
        self._forms = forms
        self._kinds = [(t.shape, t.dtype, t.device) for t in tensors]
        self._order = order if order != list(range(len(tensors))) else None
        self._autocast = _autocast()
        self._ranks = _ranks(block)
        self._sums: UsualSums | None = None

    def run(self, site: SplitSite, tensors: list[Any]) -> Any:
        """Run the program on what :meth:`tensors_of` returned."""
        sums = self._sums
        if sums is None or sums.site is not site:  # a replica of the block has a site of its own
            sums = self._sums = UsualSums(
                site, self.program, self._autocast is not None, alone=not has_other_ranks()
            )
        return self.program.forward.function(site.module, sums, *tensors)

    def tensors_of(
        self, site: SplitSite, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any] | None:
        """Return the arguments of the program; None if this call differs from that before."""
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
        tensors = found if self._order is None else [found[i] for i in self._order]
        program = self.program
        try:
            program.check_attributes(site.module)
            if program.asks:
                program.check_modes()
            program.check_decisions(tensors)
        except MismatchError:
            return None
        return tensors


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


class UsualSums:
    """Computes the residual sums of usual calls; what is rare is left to the site.

    Args:
        site: The site of the block.
        program: The program that runs.
        autocast: Whether autocast is enabled.
        alone: Whether there are no other ranks.
    """

    def __init__(self, site: SplitSite, program: Program, autocast: bool, *, alone: bool) -> None:
        self.site, self._program, self._autocast = site, program, autocast
        self._alone = alone

    def __getattr__(self, name: str) -> Any:
        return getattr(self.site, name)

    def join(self, k: int, skip: Tensor, *inputs: Any) -> Tensor:
        """Return ``skip`` plus branch ``k`` of ``inputs``, computed on the kept rows only."""
        site, program = self.site, self._program
        branch = site.branches[k % len(site.branches)]
        facts = branch.facts
        shape = skip.shape
        if (
            branch.action != "skip"
            or facts.elementwise  # the size of the call decides whether it is masked
            or not branch.dtypes  # the first sum is checked
            or skip.is_cuda  # perhaps while a graph is captured
            or len(shape) <= facts.dim
            or site.is_watched()  # since the call began
        ):
            return site.join(k, skip, *inputs)
        rows, kept = site.decide(branch, shape[facts.dim], alone=self._alone)
        if rows is False:
            return sum_without_branch(site, k, skip, inputs)
        gain = branch.rate.gain_in_training()
        if rows is not True:
            total = sum_on_rows(site, k, skip, inputs, rows[:kept], gain)
        else:
            out = program.branches[k].function(site.module, site, *inputs)
            first, written = facts.branch_first, facts.writes_skip
            total = add_whole(skip, out, gain, inplace=written, branch_first=first)
        precision = precision_of(skip) if self._autocast else (skip.dtype, None)
        branch.dtypes[precision] = total.dtype
        return total
