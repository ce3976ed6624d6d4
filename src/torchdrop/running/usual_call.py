"""The usual call of a block: one of the form of the call before, which needs few checks.

:class:`UsualCall` runs the generated forward of a split block, with :class:`UsualSums` for its
residual sums. :class:`UsualWholeCall` runs a block that is dropped as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchdrop.rows.collectives import has_other_ranks
from torchdrop.rows.sampling import refuse_graph_capture
from torchdrop.rows.take_and_add import add_rows, add_whole, skip_and_rows, take
from torchdrop.running.block_site import modifications, precision_of, to_device_of
from torchdrop.running.call_form import CallForm, form_of
from torchdrop.running.program import MismatchError, Program
from torchdrop.running.residual_sum import sum_on_rows, sum_without_branch

if TYPE_CHECKING:
    from torchdrop.running.split_site import SplitSite
    from torchdrop.running.stream_readings import StreamReading
    from torchdrop.running.whole_site import WholeSite

__all__ = ["UsualCall", "UsualSums", "UsualWholeCall", "usual_call", "usual_whole_call"]


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
    form = form_of(site, args, kwargs)
    if form is None:
        return None
    places = {id(tensor): i for i, tensor in enumerate(form[1])}
    if not all(id(t) in places for t in tensors):
        return None  # one is made of the arguments
    return UsualCall(program, form[0], [places[id(tensor)] for tensor in tensors])


class UsualCall:
    """A call that passed all checks, with which later calls are compared.

    Args:
        program: The program that ran.
        form: The form of the call.
        order: Which of the tensors in the arguments the program takes.
    """

    def __init__(self, program: Program, form: CallForm, order: list[int]) -> None:
        self.program = program
        self._form = form
        self._order = order if order != list(range(len(order))) else None
        self._sums: UsualSums | None = None

    def run(self, site: SplitSite, tensors: list[Any]) -> Any:
        """Run the program on what :meth:`tensors_of` returned."""
        sums = self._sums
        if sums is None or sums.site is not site:  # a replica of the block has a site of its own
            sums = self._sums = UsualSums(
                site, self.program, self._form.autocast, alone=not has_other_ranks()
            )
        return self.program.forward.function(site.module, sums, *tensors)

    def tensors_of(
        self, site: SplitSite, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any] | None:
        """Return the arguments of the program; None if this call differs from that before."""
        found = self._form.tensors_of(site, args, kwargs)
        if found is None:
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
        rows, kept = site.decide(branch, shape[facts.dim], usual=self._alone)
        if rows is False:
            return sum_without_branch(site, k, skip, inputs)
        gain = branch.rate.gain
        if rows is not True:
            total = sum_on_rows(site, k, skip, inputs, rows[:kept], gain)
        else:
            out = program.branches[k].function(site.module, site, *inputs)
            first, written = facts.branch_first, facts.writes_skip
            total = add_whole(skip, out, gain, inplace=written, branch_first=first)
        precision = precision_of(skip) if self._autocast else (skip.dtype, None)
        branch.dtypes[precision] = total.dtype
        return total


def usual_whole_call(
    site: WholeSite,
    reading: StreamReading | None,
    tensors: dict[str, Tensor],
    returned: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> UsualWholeCall | None:
    """Return what is remembered of a call of a block that is dropped as a whole.

    Args:
        site: The site of the block.
        reading: The reading of the block that fits the call; None if the block was not read.
        tensors: The tensors in the arguments, by path.
        returned: What the block returned, with None in place of its sum.
        args: The positional arguments of the call.
        kwargs: Its keyword arguments.

    Returns:
        None if nothing is remembered.
    """
    branch, facts = site.branches[0], site.branches[0].facts
    x = tensors[site.block.x]
    rare = (
        branch.action == "mask"
        or branch.writes_input
        or facts.has_batch_norm  # a single row may need a second one
        or branch.normalises
        or not branch.dtypes  # the first sum is checked
        or site.runs_on_all_ranks(branch)
    )
    form = None if rare else form_of(site, args, kwargs)
    if form is None:
        return None
    batch = x.shape[facts.dim]
    dims: list[int | None] = []
    paths = {id(tensor): path for path, tensor in tensors.items()}
    for tensor in form[1]:
        path = paths.get(id(tensor))
        if path is None:
            return None  # it is in a container that is not looked into
        layout = site.block.row_layouts[path]
        if layout is None or (tensor.dim() > layout.dim and tensor.shape[layout.dim] == 1 < batch):
            dims.append(None)
        elif layout.entries > 1:
            return None
        elif tensor.dim() > layout.dim and tensor.shape[layout.dim] == batch:
            dims.append(layout.dim)
        elif layout.entries:
            return None  # the call raises
        else:
            dims.append(None)
    place = next(i for i, tensor in enumerate(form[1]) if tensor is x)
    return UsualWholeCall(form[0], dims, place, reading, returned)


class UsualWholeCall:
    """A call of a block that is dropped as a whole; later calls are compared with it.

    Args:
        form: The form of the call.
        dims: For each tensor in the arguments, the dimension of its rows; None if it has no rows.
        place: Which of these tensors is the input of the residual.
        reading: The reading of the block that fits the call; None if the block was not read.
        returned: What the block returns, with None in place of its sum.
    """

    def __init__(
        self,
        form: CallForm,
        dims: list[int | None],
        place: int,
        reading: StreamReading | None,
        returned: Any,
    ) -> None:
        self._form, self._dims, self._place = form, dims, place
        self._reading, self._returned = reading, returned
        self._alone = not has_other_ranks()
        self._records_gradients = torch.is_grad_enabled()

    def tensors_of(
        self, site: WholeSite, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Any] | None:
        """Return the tensors in the arguments; None if this call differs from that before."""
        branch = site.branches[0]
        if (
            branch.action == "mask"
            or not branch.dtypes
            or torch.is_grad_enabled() is not self._records_gradients
        ):
            return None
        if self._reading is not None:
            try:
                self._reading.check_attributes(site)
            except MismatchError:
                return None
        return self._form.tensors_of(site, args, kwargs)

    def run(
        self, site: WholeSite, tensors: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the block on the kept rows of what :meth:`tensors_of` returned."""
        branch = site.branches[0]
        dim, x = branch.facts.dim, tensors[self._place]
        refuse_graph_capture(x)
        rows, kept = site.decide(branch, x.shape[dim], usual=self._alone)
        if rows is False:
            out, total = self._returned, site.without_block(x, tuple(tensors), args, kwargs)
        else:
            # read before the block runs, because code in the block may set another rate
            gain = branch.rate.gain
            if rows is True:
                version = modifications(x)
                out = site.run_own(args, kwargs)
                if modifications(x) != version:
                    raise site.writes_input()
                total = site.blended(x, site.sum_in(out), gain)
            else:
                on_device = to_device_of(rows[:kept], x)
                skip, mine = skip_and_rows(x, on_device, dim)
                some = [
                    mine
                    if i == self._place
                    else (value if d is None else take(value, on_device, d))
                    for i, (value, d) in enumerate(zip(tensors, self._dims, strict=True))
                ]
                given, named = self._form.with_tensors(some, args, kwargs)
                version = modifications(mine)
                out = site.run_own(tuple(given), named)
                if modifications(mine) != version:
                    raise site.writes_input()
                total = add_rows(skip, site.sum_in(out) - mine, on_device, gain, dim)
            precision = precision_of(x) if self._form.autocast else (x.dtype, None)
            branch.dtypes[precision] = total.dtype
        return site.returned(total, out)
