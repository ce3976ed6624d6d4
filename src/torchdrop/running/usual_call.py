"""The usual call of a block: one of the form of the call before, which needs few checks.

:func:`usual_call` returns one generated function for the calls of a split block.
:class:`UsualWholeCall` runs a block that is dropped as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from io import StringIO
from textwrap import indent
from tokenize import generate_tokens
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchdrop.rows.collectives import has_other_ranks
from torchdrop.rows.sampling import refuse_graph_capture
from torchdrop.rows.take_and_add import add_rows, skip_and_rows, take
from torchdrop.running.block_site import modifications, precision_of, to_device_of
from torchdrop.running.call_form import CallForm, form_of, with_values
from torchdrop.running.decision import usual_decision
from torchdrop.running.program import MismatchError, Program
from torchdrop.running.usual_sum import usual_sum

if TYPE_CHECKING:
    from torchdrop.running.split_site import SplitSite
    from torchdrop.running.stream_readings import StreamReading
    from torchdrop.running.whole_site import WholeSite

__all__ = ["UsualWholeCall", "usual_call", "usual_whole_call"]


def usual_call(
    site: SplitSite,
    program: Program,
    tensors: Sequence[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[..., Any] | None:
    """Return a function of ``args`` and ``kwargs`` for the calls like one that passed all checks.

    It returns ``DIFFERS`` if a call is not like that one.

    Args:
        site: The site of the block.
        program: The program that ran.
        tensors: What it was called with.
        args: The positional arguments of the call.
        kwargs: Its keyword arguments.

    Returns:
        None if the call has no form to compare with.
    """
    form = form_of(site, args, kwargs)
    if form is None:
        return None
    places = {id(tensor): i for i, tensor in enumerate(form[1])}
    if not all(id(t) in places for t in tensors):
        return None  # one is made of the arguments
    if "td_" in program.forward.text:
        return None  # a name in the block may be one of the names that are added
    return _straight(site, program, form[0], [f"td_t{places[id(tensor)]}" for tensor in tensors])


def _straight(
    site: SplitSite, program: Program, form: CallForm, tensors: list[str]
) -> Callable[..., Any]:
    """Return one function of the checks of a call and of the generated forward.

    Each call of a function of Python costs about as much as an operation on a small tensor here,
    because a step runs through more code than the caches of a processor hold.

    Args:
        site: The site of the block.
        program: The program that runs.
        form: The form of the call.
        tensors: The names of the tensors that the program takes, in the source of ``form``.
    """
    alone, rest, text = not has_other_ranks(), site.settings.mask_rest, program.forward.text
    joins = {
        f"td_join{k}": usual_sum(site, program, k, autocast=form.autocast, alone=alone)
        for k in program.branches
    }
    code = program.forward.function.__code__
    names = code.co_varnames[: code.co_argcount]
    _, _, body = with_joins(text).partition("def forward(")
    body = body.partition("\n")[2].rstrip()
    source = ["def call(td_args, td_kwargs):", form.checks.rstrip()]
    source.append("    if td_site.settings.mask_rest is not td_rest: return td_DIFFERS")
    if program.asks_in_calls:
        source.append(f"    if not td_fits([{', '.join(tensors)}]): return td_DIFFERS")
    values = "".join(f"{name}, " for name in ["td_site.module", "td_site", *tensors])
    source.append(f"    {''.join(f'{name}, ' for name in names)} = {values}")
    if rest is not None:
        source.append("    td_rest.depth += 1\n    try:")
    source.append(body if rest is None else indent(body, "    "))
    if rest is not None:
        source.append("    finally:\n        td_rest.depth -= 1")
    called = {"td_rest": rest, "td_fits": partial(_fits, site, program)}
    given = {**program.forward.names, **form.values, **joins, **called}
    return with_values("\n".join(source) + "\n", given, type(site.module).__name__)


_JOIN = ("site", ".", "join", "(")


@lru_cache(maxsize=1024)
def with_joins(text: str) -> str:
    """Return ``text``, a generated forward, with ``td_joink(...)`` for ``site.join(k, ...)``."""
    # Not by the module ast, which must not be used in two threads at once (Python 3.11).
    lines = text.splitlines(keepends=True)
    tokens = list(generate_tokens(StringIO(text).readline))
    for start in reversed(range(len(tokens) - 5)):
        found = tokens[start : start + 6]
        if tuple(token.string for token in found[:4]) == _JOIN:
            (row, first), (_, last) = found[0].start, found[5].end
            line = lines[row - 1]
            name = f"td_join{found[4].string}("
            lines[row - 1] = line[:first] + name + line[last:].lstrip()
    return "".join(lines)


def _fits(site: SplitSite, program: Program, tensors: list[Any]) -> bool:
    """Whether ``program`` is valid for a call whose arguments are those of the call before."""
    try:
        program.check_attributes(site.module)
        if program.asks:
            program.check_modes()
        program.check_decisions(tensors)
    except MismatchError:
        return False
    return True


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
    return UsualWholeCall(site, form[0], dims, place, reading, returned)


class UsualWholeCall:
    """A call of a block that is dropped as a whole; later calls are compared with it.

    Args:
        site: The site of the block.
        form: The form of the call.
        dims: For each tensor in the arguments, the dimension of its rows; None if it has no rows.
        place: Which of these tensors is the input of the residual.
        reading: The reading of the block that fits the call; None if the block was not read.
        returned: What the block returns, with None in place of its sum.
    """

    def __init__(
        self,
        site: WholeSite,
        form: CallForm,
        dims: list[int | None],
        place: int,
        reading: StreamReading | None,
        returned: Any,
    ) -> None:
        self._form, self._dims, self._place = form, dims, place
        self._compared = form.tensors_of()
        self._reading, self._returned = reading, returned
        self._site, self._branch = site, site.branches[0]
        self._decide = usual_decision(site.settings, self._branch, alone=not has_other_ranks())
        self._records_gradients = torch.is_grad_enabled()

    def tensors_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """Return the tensors in the arguments; None if this call differs from that before."""
        branch, site = self._branch, self._site
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
        found: list[Any] | None = self._compared(args, kwargs)
        return found

    def run(self, tensors: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block on the kept rows of what :meth:`tensors_of` returned."""
        branch, site = self._branch, self._site
        dim, x = branch.facts.dim, tensors[self._place]
        refuse_graph_capture(x)
        rows, kept = self._decide(x.shape[dim])
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
