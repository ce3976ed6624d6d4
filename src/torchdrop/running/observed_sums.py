"""Report the residual sums of a block to an observer, whether or not anything is dropped in it.

A site reports its sums only while it drops or scales branches. Otherwise the block's own forward
runs, which reports nothing. So while a block is observed, a generated form of its own forward runs
instead, and reports each sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.finding.split import Split
from torchdrop.rows.take_and_add import add_whole
from torchdrop.running.forward_slot import SlotOccupant, clear_slot, occupant_of, put_in_slot
from torchdrop.running.observers import Observer, ObserverHandle, SumEvent
from torchdrop.running.program import MismatchError, Program
from torchdrop.running.rewrite import rewrite
from torchdrop.running.split_site import SplitSite
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["ObservedSums"]


class ObservedSums(SlotOccupant):
    """The object in the ``forward`` slot of a block while its residual sums are observed.

    In calls in which an attached :class:`SplitSite` computes the sums, the site runs and reports
    them. In all others a generated form of the block's own forward does. The object is a context
    manager, which restores the slot at the end.

    Args:
        module: The block. Either nothing or a :class:`SplitSite` is attached to it.
        orders: The numbers of the sums to report, among all residual sums of the forward.
            ``SumEvent.index`` counts the entries of this sequence.
        observer: Called with each sum.
        on_unreadable: Called with the error if the forward cannot be traced with the arguments of
            a call. That call is not observed.
    """

    def __init__(
        self,
        module: nn.Module,
        orders: Sequence[int],
        observer: Observer,
        on_unreadable: Callable[[UntraceableError], Any],
    ) -> None:
        super().__init__(module)
        attached = occupant_of(module)
        self.site = attached if isinstance(attached, SplitSite) else None
        self.orders = list(orders)
        self.observer = observer
        self.on_unreadable = on_unreadable
        self._programs: dict[bool, list[tuple[Program, _Reporter]]] = {True: [], False: []}
        self._handle: ObserverHandle | None = None

    def __enter__(self) -> ObservedSums:
        if self.site is not None:
            self._handle = self.site.observe(self.observer)
        put_in_slot(self.module, self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handle is None:
            clear_slot(self.module)
            return
        assert self.site is not None
        self._handle.remove()
        put_in_slot(self.module, self.site)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block and report its sums."""
        module, site = self.module, self.site
        if site is not None and site.computes_sums():
            return site(*args, **kwargs)
        try:
            program, reporter, tensors = self._find(args, kwargs)
        except UntraceableError as error:
            self.on_unreadable(error)
            return self.run_own(args, kwargs)
        return program.forward.function(module, reporter, *tensors)

    def _find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, _Reporter, list[Any]]:
        """Return the program for this call and its tensors; trace the block if there is none."""
        module, signature = self.module, self.__signature__
        known = self._programs[module.training]
        for program, reporter in known:
            try:
                program.check_attributes(module)
                return program, reporter, program.bind(signature, args, kwargs)
            except MismatchError:
                continue
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        block = trace_block(module, training=module.training, arguments=bound.arguments)
        entries = read_residual_sums(block)
        if len(entries) <= max(self.orders):
            raise UntraceableError("it does not add the same branches in every call")
        splits = [entries[order].split for order in self.orders]
        program = rewrite(block, [(split, "mask") for split in splits], type(module).__name__)
        reporter = _Reporter(splits, self.observer)
        known.append((program, reporter))
        return program, reporter, program.bind(signature, args, kwargs)


class _Reporter:
    """Computes and reports the residual sums for a generated forward, in place of a site."""

    def __init__(self, splits: Sequence[Split], observer: Observer) -> None:
        self.splits = splits
        self.observer = observer

    def mask(self, k: int, skip: Tensor, branch: Tensor) -> Tensor:
        """Return sum number ``k`` as the block computes it, and report it."""
        split = self.splits[k]
        total = add_whole(skip, branch, split.branch_gain, inplace=split.writes_skip)
        batch = total.shape[split.dim or 0] if total.dim() else 0
        self.observer(SumEvent(k, skip, total, True, batch))
        return total
