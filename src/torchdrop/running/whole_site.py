"""The site of a block that is dropped as a whole, because its branches cannot be separated.

``out = x + b / (1 - p) * (block(x) - x)``, and ``block`` is run only on the rows with b = 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from torchdrop.error_pages import see
from torchdrop.finding.residual import WholeBlock
from torchdrop.finding.row_layout import RowLayout
from torchdrop.internals import functorch_transforms_active, tree_flatten
from torchdrop.rows.in_graph import mark_uncompiled
from torchdrop.rows.take_and_add import add_rows, skip_and_rows, take
from torchdrop.running.block_site import (
    BlockSite,
    drop_spare_row,
    modifications,
    precision_of,
    to_device_of,
)
from torchdrop.running.branch_state import BranchState, Settings
from torchdrop.running.generation import only_fills_cache
from torchdrop.running.proof import (
    Verdict,
    kind_of_call,
    prove_whole,
    warn_of_masks,
    why_impossible,
)
from torchdrop.running.stream_readings import StreamReadings
from torchdrop.running.sums_in_graph import run_whole_in_graph
from torchdrop.running.usual_call import UsualWholeCall, usual_whole_call
from torchdrop.tracing.call_arguments import flatten_arguments

if TYPE_CHECKING:
    from torchdrop.running.split_site import SplitSite

__all__ = ["WholeSite", "run_whole", "whole_site_of"]


class WholeSite(BlockSite):
    """The object in the ``forward`` slot of a block that is dropped as a whole.

    Args:
        module: The block.
        settings: The settings that all branches of the model share.
        branch: The one branch, ``block(x) - x``.
        block: Which argument and which output of the block are x and the sum.
        readings: The kinds of calls for which the block is known to return its input where its
            branches are dropped; None if its forward was not read.
    """

    # The last call in training that passed all checks. The next call is compared with it.
    _usual: UsualWholeCall | None = None

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        branch: BranchState,
        block: WholeBlock,
        readings: StreamReadings | None = None,
    ) -> None:
        super().__init__(module, settings, [branch])
        self.block = block
        self._readings = readings
        # For each kind of call, what the block returns, with None in place of tensors.
        self._returned_forms: dict[Any, Any] = {}
        # The paths of the tensors whose row layout is assumed, because it was not measured.
        self._assumed: set[str] = set()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block on the kept rows if anything is dropped or scaled, else on all rows."""
        training = self.module.training
        scaled = self.settings.scale == "eval" and not training
        if self.meter is not None:
            return self._metered(self.meter, args, kwargs)
        if not self.active or not (training or scaled):
            return self.run_own(args, kwargs)
        compiling = torch.compiler.is_compiling()
        if not compiling:  # a compiler would compile anew for each new object
            usual = self._usual
            if usual is not None and training:
                found = usual.tensors_of(args, kwargs)
                if found is not None:
                    return usual.run(found, args, kwargs)
            if only_fills_cache(self, args, kwargs, training):
                return self.run_own(args, kwargs)
        reading = None
        if self._readings is not None:
            reading = self._readings.fitting(self, args, kwargs)
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        tensors = self._tensors_of(bound)
        if compiling and training and self.settings.mode == "row":
            return run_whole_in_graph(self, bound, tensors)
        kind = self._kind_of(bound, tensors)
        if self.settings.verify and training and not compiling:
            self._prove(bound, tensors, kind)
        if self.only_proves:
            return self.run_block(bound)
        total, out = self._sum(bound, tensors, kind, scaled)
        if training and not (compiling or self.is_watched() or functorch_transforms_active()):
            proved = not self.settings.verify or kind in self.verdicts
            known = proved and not self.assumes(tensors)
            self._usual = None
            if known:
                form = self._form_of(kind)
                self._usual = usual_whole_call(self, reading, tensors, form, args, kwargs)
        return self.returned(total, out)

    def _sum(
        self, bound: inspect.BoundArguments, tensors: dict[str, Tensor], kind: Any, scaled: bool
    ) -> tuple[Tensor, Any]:
        """Return the sum, and the output of the block on the rows that were computed.

        Args:
            bound: The arguments of the call.
            tensors: The tensors in them, by path.
            kind: The kind of the call.
            scaled: Whether the block is scaled by ``1 - p``, and nothing is dropped.
        """
        x, branch = tensors[self.block.x], self.branches[0]
        rows: Any
        if scaled:
            rows, gain = branch.rate.p < 1.0, 1.0 - branch.rate.p
        else:
            rows, kept = self._draw(branch, x)
            rows = rows if isinstance(rows, bool) else rows[:kept]
            # computed before the block runs, because code in the block may set another rate
            gain = 0.0 if rows is False else branch.rate.gain
        masked = branch.action == "mask" or self.runs_on_all_ranks(branch)
        if self.assumes(tensors) and not self.settings.verify:
            branch.note(f"in calls with {', '.join(self._assumed)}: masked, use verify=True")
            masked = True
        form = self._form_of(kind)
        if rows is False and not masked and form is not _UNKNOWN:
            given = tuple(tensors.values())
            out, total = form, self.without_block(x, given, bound.args, bound.kwargs)
        else:
            if masked or isinstance(rows, bool):
                out = self._run_on_all(bound, x)
                total = self._masked(x, self.sum_in(out), rows, gain)
            else:
                out, total = self._run_on(rows, bound, x, gain)
            branch.dtypes[precision_of(x)] = total.dtype
            self._returned_forms[kind] = self._form(out)
        if self.observers:
            self._report(0, x, total, rows)
        return total, out

    def _form_of(self, kind: Any) -> Any:
        """Return the output of the block in a kind of call, with None in place of its sum.

        It is not known before the first call of that kind, because the output may contain arguments
        of the call that are not tensors.
        """
        return None if self.block.sum_item == "" else self._returned_forms.get(kind, _UNKNOWN)

    def _form(self, out: Any) -> Any:
        """Return ``out``, an output of the block, with None in place of its sum."""
        form = self.returned(None, out)
        if any(isinstance(item, Tensor) for item in tree_flatten(form)[0]):
            raise RuntimeError(
                f"{self.branches[0].facts.name} is dropped as a whole, and returns further tensors "
                f"in this call, which would be needed for all rows; use unit='branch', or leave "
                f"the block out with select=" + see("whole-blocks")
            )
        return form

    def assumes(self, tensors: dict[str, Tensor]) -> bool:
        """Whether it was not measured how some of the tensors of a call carry the rows."""
        return bool(self._assumed) and not self._assumed.isdisjoint(tensors)

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to the state in which :meth:`snapshot` was called."""
        super().restore(snapshot)
        self._usual = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_usual": None}

    def for_copy(self, module: nn.Module) -> Self:
        """Return a site for ``module``, a replica of the block, that shares all state."""
        twin = super().for_copy(module)
        twin._usual = None
        return twin

    def _metered(
        self, meter: Callable[[], int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the block's own forward, and add its FLOPs to the share of the branch."""
        branch, before = self.branches[0], meter()
        out = self.run_own(args, kwargs)
        branch.share = (branch.share or 0.0) + meter() - before
        return out

    def _prove(self, bound: inspect.BoundArguments, tensors: dict[str, Tensor], kind: Any) -> None:
        """Test the block on this call, if no call of its kind was tested before."""
        if kind in self.verdicts:
            return
        why = why_impossible(self, list(tensors.values()))
        if why:
            self.note_unproved(why)
            return
        prove_whole(self, bound)
        self.verdicts[kind] = Verdict()
        if not self.only_proves:
            warn_of_masks(self)

    def _kind_of(self, bound: inspect.BoundArguments, tensors: dict[str, Tensor]) -> Any:
        """Return a key that is the same for two calls if the test of one is valid for the other."""
        dim, group = self.branches[0].facts.dim, self.settings.rows_per_sample or 1
        kind = kind_of_call(0, list(tensors.values()), dim, group)
        if self.block.sum_item == "":
            return (*kind, torch.is_grad_enabled())
        # arguments that are not tensors may be part of the output
        constants = flatten_arguments(bound.arguments)[2].values()
        return (*kind, torch.is_grad_enabled(), *map(_key_of, constants))

    def take_form(self, block: WholeBlock) -> None:
        """Use ``block``, a description of the call that was made from the shapes of one call.

        How the tensors other than x carry the rows is then assumed, not measured.
        """
        self.block = block
        self._assumed |= block.row_layouts.keys() - {block.x}

    def _tensors_of(self, bound: inspect.BoundArguments) -> dict[str, Tensor]:
        """Return the tensors among the arguments.

        If it was not measured how a tensor carries the batch, its shape decides in each call.

        Raises:
            RuntimeError: The input of the residual is not among them.
        """
        tensors = flatten_arguments(bound.arguments)[1]
        known = self.block.row_layouts
        if self.block.x not in tensors:
            raise RuntimeError(
                f"{self.branches[0].facts.name} is dropped as a whole, its input is the tensor "
                f"{self.block.x}, and it is called with {', '.join(tensors) or 'no tensor'}; leave "
                f"the block out with select=" + see("cannot-be-skipped")
            )
        for path in tensors.keys() - known.keys():
            known[path] = RowLayout(self.block.dim, 0)
            self._assumed.add(path)
        return tensors

    def without_block(
        self, x: Tensor, given: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Return a copy of ``x`` in the dtype that the sum would have.

        Args:
            x: The input of the residual.
            given: All tensors in the arguments.
            args: The positional arguments of the call.
            kwargs: Its keyword arguments.
        """
        branch = self.branches[0]
        dtype = self.dtype_of(branch, x, given, lambda: self.sum_in(self.run_own(args, kwargs)))
        return self.dropped(branch.facts, x, given, dtype)

    def _run_on_all(self, bound: inspect.BoundArguments, x: Tensor) -> Any:
        """Return the output of the block for all rows, without changing its input."""
        if self.branches[0].writes_input:
            self.copy_input(bound)
        version = modifications(x)
        out = self.run_block(bound)
        if modifications(x) != version:
            raise self.writes_input()
        return out

    def writes_input(self) -> Exception:
        """Return the error for a block that writes into its input."""
        return RuntimeError(
            f"{self.branches[0].facts.name} is dropped as a whole, and writes into its input in "
            f"this call, which no test has shown; use verify=True, or leave the block out with "
            f"select=" + see("cannot-be-skipped")
        )

    @staticmethod
    def blended(x: Tensor, y: Tensor, gain: float) -> Tensor:
        """Return ``x + gain * (y - x)``; ``y`` itself if the gain is 1."""
        if gain == 1.0:
            return y
        return torch.lerp(x, y, gain) if x.dtype == y.dtype else x + gain * (y - x)

    def _masked(self, x: Tensor, y: Tensor, rows: Any, gain: float) -> Tensor:
        """Return ``x + gain * (y - x)`` in the kept rows and ``x`` in the others."""
        self.check_shape(x, y)
        if rows is True:
            return self.blended(x, y, gain)
        none = torch.empty(0, dtype=torch.long, device="cpu")
        dim = self.branches[0].facts.dim
        y = y if rows is False else self.blended(x, y, gain)
        return torch.where(_mask_of(none if rows is False else rows, x, dim), y, x)

    def check_shape(self, x: Tensor, y: Tensor) -> None:
        """Raise a RuntimeError if the sum of the block does not have the shape of its input."""
        if x.shape != y.shape:
            # torch.compile cannot format shapes in an error message
            compiling = torch.compiler.is_compiling()
            shapes = "" if compiling else f", but got {tuple(y.shape)} for {tuple(x.shape)}"
            raise RuntimeError(
                f"{self.branches[0].facts.name} is dropped as a whole, so its output has to have "
                f"the shape of its input{shapes}; use unit='branch', or leave the block out with "
                f"select={see('whole-blocks')}"
            )

    def _run_on(
        self, rows: Tensor, bound: inspect.BoundArguments, x: Tensor, gain: float
    ) -> tuple[Any, Tensor]:
        """Return the output of the block for ``rows``, and the sum for all rows."""
        facts = self.branches[0].facts
        computed = self.rows_to_compute(self.branches[0], rows, x)
        on_device = to_device_of(computed, x)
        taking = partial(take, rows=on_device)
        writes = self.branches[0].writes_input
        skip, mine = (x, None) if writes else skip_and_rows(x, on_device, facts.dim)
        given = self.cut_arguments(bound, taking, x.shape[facts.dim], mine)
        shortcut = given.clone() if writes else given
        version = modifications(given)
        out = self.run_block(bound)
        if not writes and modifications(given) != version:
            raise self.writes_input()
        self.check_shape(shortcut, self.sum_in(out))
        added = self.sum_in(out) - shortcut
        if computed is not rows:
            added, on_device = drop_spare_row(added, computed, rows, facts.dim)
        return out, add_rows(skip, added, on_device, gain, facts.dim)

    def copy_input(self, bound: inspect.BoundArguments) -> None:
        """Replace the input of the residual by a copy, into which the block may write."""

        def copied(path: str, value: Tensor) -> Tensor:
            return value.clone() if path == self.block.x else value

        bound.arguments.update(flatten_arguments(bound.arguments, copied)[0])

    def cut_arguments(
        self,
        bound: inspect.BoundArguments,
        taking: Callable[..., Tensor],
        batch: Any,
        mine: Tensor | None = None,
    ) -> Tensor:
        """Replace each tensor in the arguments by its selected rows.

        Args:
            bound: The arguments of the call.
            taking: ``taking(value, dim=dim)`` selects rows.
            batch: The number of rows.
            mine: The selected rows of the input of the residual, if they were taken before.

        Returns:
            The selected rows of the input of the residual.
        """
        some: dict[str, Tensor] = {}

        def cut(path: str, value: Tensor) -> Tensor:
            if mine is not None and path == self.block.x:
                some[path] = mine
            else:
                layout = self.block.row_layouts[path]
                some[path] = self.cut(self.branches[0].facts, value, taking, layout, batch)
            return some[path]

        bound.arguments.update(flatten_arguments(bound.arguments, cut)[0])
        return some[self.block.x]

    def run_block(self, bound: inspect.BoundArguments) -> Any:
        """Run the block's own forward."""
        return self.run_own(bound.args, bound.kwargs)

    def sum_in(self, out: Any) -> Tensor:
        """Return the sum from the output of the block."""
        found: Tensor = out if self.block.sum_item == "" else out[int(self.block.sum_item)]
        return found

    def returned(self, total: Tensor | None, out: Any) -> Any:
        """Return ``out``, an output of the block, with ``total`` as its sum."""
        if self.block.sum_item == "":
            return total
        place = int(self.block.sum_item)
        return type(out)([*out[:place], total, *out[place + 1 :]])


# Stands for what a block returns in a kind of call that did not happen yet.
_UNKNOWN = object()


def _key_of(value: Any) -> Any:
    """Return a key that is the same for equal constants."""
    return value if isinstance(value, bool | int | float | str | tuple | None) else id(value)


def whole_site_of(site: SplitSite, verdict: Verdict) -> WholeSite:
    """Return the site that drops the block of ``site`` as a whole.

    The first call creates it, and changes the actions that the plan prints.

    Args:
        site: The site, whose generated forward computes another result than the block's own.
        verdict: The verdict that says so, and how to drop the block as a whole.
    """
    assert verdict.whole is not None
    if site.whole is None:
        for branch in site.branches:
            branch.action, branch.reason = "layer", f"dropped as a whole: {verdict.why_unusable}"
        site.whole = WholeSite(site.module, site.settings, site.branches[0], verdict.whole)
        site.whole.active = True
    site.whole.take_form(verdict.whole)
    return site.whole


def run_whole(
    site: SplitSite, verdict: Verdict, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Drop the block of ``site`` as a whole, because its generated forward computes another result.

    Args:
        site: The site.
        verdict: The verdict on this kind of call, which says how to drop the block as a whole.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
    """
    first, whole = site.branches[0], whole_site_of(site, verdict)
    whole.observers = site.observers
    seen = first.counts.rows_seen, first.counts.rows_dropped
    out = whole(*args, **kwargs)
    for branch in site.branches[1:]:  # the decision about the block holds for all its branches
        branch.counts.rows_seen += first.counts.rows_seen - seen[0]
        branch.counts.rows_dropped += first.counts.rows_dropped - seen[1]
        branch.counts.last = first.counts.last
    return out


def _mask_of(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    """Return a mask that is True for ``rows`` on ``dim``, and broadcasts to ``like``."""
    kept = torch.zeros(like.shape[dim], dtype=torch.bool, device="cpu")
    kept[rows] = True
    shape = [1] * like.dim()
    shape[dim] = -1
    return kept.to(like.device, non_blocking=True).view(shape)


mark_uncompiled(__name__)
