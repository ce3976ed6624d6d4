"""What all sites share: draw rows, select them in the inputs, drop a branch, call observers.

A site is the object in the ``forward`` slot of a block (forward_slot.py). :class:`SplitSite` drops
the branches of a block one by one, :class:`WholeSite` drops a block as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from torchdrop.error_pages import see
from torchdrop.finding.row_layout import RowLayout
from torchdrop.internals import (
    any_autocast_enabled,
    modifications_of,
    parameters_of_tree,
)
from torchdrop.rows.collectives import find_communicating_module, is_sharded
from torchdrop.rows.in_graph import mark_uncompiled
from torchdrop.rows.sampling import refuse_graph_capture, refuse_nested
from torchdrop.rows.take_and_add import take, with_zero_grads
from torchdrop.running.branch_state import BranchFacts, BranchState, Settings
from torchdrop.running.decision import decide
from torchdrop.running.forward_slot import SlotOccupant, occupant_of
from torchdrop.running.lone_row import sizes_of_row
from torchdrop.running.observers import Observer, ObserverHandle, SumEvent
from torchdrop.running.proof import SplitProof, Verdict
from torchdrop.tracing.process_state import PROCESS_LOCK
from torchdrop.tracing.unchanged import unchanged

__all__ = [
    "WATCHERS",
    "BlockSite",
    "drop_spare_row",
    "modifications",
    "precision_of",
    "sites_of",
    "to_device_of",
]


# The attributes of a site by which :meth:`BlockSite.is_watched` decides.
WATCHERS = ("meter", "only_proves", "proof", "observers", "settings.generates")
_watchers_of = attrgetter(*WATCHERS)


class BlockSite(SlotOccupant, ABC):
    """The object in the ``forward`` slot of a block, which drops rows of its branches."""

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        branches: list[BranchState],
        inlined: Sequence[str] = (),
        methods: Sequence[str] = (),
    ) -> None:
        super().__init__(module)
        self.settings = settings
        self.branches = branches
        # The children whose forward is traced as part of the block's own.
        self.inlined = list(inlined)
        # The methods, other than forward, in which the block adds branches.
        self.methods = list(methods)
        # Whether anything is dropped or scaled now. Every call of the block reads it.
        self.active = False
        # Counts FLOPs, while the shares of the branches are measured.
        self.meter: Callable[[], int] | None = None
        # What was found about each kind of call; see proof.py.
        self.verdicts: dict[Any, Verdict] = {}
        # Whether calls only test the block, on example inputs, and drop nothing.
        self.only_proves = False
        # Runs the branches while a generated forward is tested.
        self.proof: SplitProof | None = None
        self._pauses = 0
        self.observers: list[Observer] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        return self.without_masks(self.call, args, kwargs)

    def without_masks(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return ``run(args, kwargs)``; the block's own masking layers are inactive meanwhile."""
        rest = self.settings.mask_rest
        if rest is None or not self.module.training or torch.compiler.is_compiling():
            return run(args, kwargs)
        rest.depth += 1
        try:
            return run(args, kwargs)
        finally:
            rest.depth -= 1

    @abstractmethod
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block with the arguments of a call."""

    def __getstate__(self) -> dict[str, Any]:
        # A pause, a measurement or an observation is ended for the original only.
        for_once: dict[str, Any] = {
            "_pauses": 0,
            "active": self._has_rate(),
            "meter": None,
            "only_proves": False,
            "observers": [],
        }
        return {**self.__dict__, **for_once}

    def _has_rate(self) -> bool:
        return any(branch.rate.p > 0.0 for branch in self.branches)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set the drop probability of each branch."""
        for branch, p in zip(self.branches, rates, strict=True):
            branch.rate.set(p)
        self.active = not self._pauses and self._has_rate()

    def depth(self) -> tuple[int, int]:
        """Return the position of the site in the model, by which sites are sorted."""
        return self.branches[0].facts.index, self.branches[0].facts.order

    # Used by the plan and by diagnostics ----------------------------------------------------

    @property
    def paused(self) -> bool:
        """Whether nothing is dropped because of :meth:`pause`."""
        return self._pauses > 0

    def pause(self) -> None:
        """Run the block's own forward until :meth:`resume` ends every pause."""
        self._pauses += 1
        self.active = False

    def resume(self) -> None:
        """End one pause."""
        self._pauses -= 1
        self.active = not self._pauses and self._has_rate()

    def observe(self, observer: Observer) -> ObserverHandle:
        """Call ``observer`` with a :class:`SumEvent` for each residual sum that this site computes.

        The site computes sums in training while a branch has a rate, and with ``scale="eval"`` in
        evaluation, too. There are no events while the block's own forward runs (``ObservedSums``
        reports its sums), nor inside a compiled graph, which runs no Python.
        """
        return ObserverHandle(self.observers, observer)

    def _report(self, index: int, skip: Tensor, total: Tensor, rows: Tensor | bool) -> None:
        """Call the observers with the residual sum of branch ``index``."""
        batch = total.shape[self.branches[index].facts.dim]
        event = SumEvent(index, skip, total, rows, batch)
        for observer in list(self.observers):
            observer(event)

    @contextmanager
    def metering(self, meter: Callable[[], int]) -> Iterator[None]:
        """Let calls run every branch on all rows, and add the FLOPs of each to its ``share``.

        Args:
            meter: Returns the FLOPs counted so far.
        """
        active = self.active
        self.active, self.meter = True, meter
        try:
            yield
        finally:
            self.active, self.meter = active, None

    @contextmanager
    def proving(self) -> Iterator[None]:
        """Let calls test the block instead of dropping anything."""
        active = self.active
        self.only_proves = True
        try:
            yield
        finally:
            self.active, self.only_proves = active, False

    def is_watched(self) -> bool:
        """Whether calls are tested, measured or observed now, or the next one may only generate."""
        return any(_watchers_of(self))

    def note_unproved(self, why: str) -> None:
        """Record that a call could not be tested, because of ``why``."""
        for branch in self.branches:
            branch.proof = f"not proved: {why}"

    def forget_proofs(self, number: int) -> None:
        """Remove the verdicts on program ``number``, which another program replaces."""
        self.verdicts = {kind: v for kind, v in self.verdicts.items() if kind[0] != number}

    def note_proved(self) -> None:
        """Record that a call was tested."""
        for branch in self.branches:
            branch.proof = "proved"

    def snapshot(self) -> dict[str, Any]:
        """Return what a forward pass may change of this site, for :meth:`restore`."""
        return {
            "branches": [branch.snapshot() for branch in self.branches],
            "active": self.active,
            "verdicts": dict(self.verdicts),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to the state in which :meth:`snapshot` was called."""
        for branch, before in zip(self.branches, snapshot["branches"], strict=True):
            branch.restore(before)
        self.active = snapshot["active"]
        self.verdicts = snapshot["verdicts"]

    # Attributes that libraries expect of a forward -------------------------------------------

    @property
    def __name__(self) -> str:
        return "forward"

    @property
    def __globals__(self) -> dict[str, Any]:
        # Only torch.jit.script needs it; for others an AttributeError means "there is none".
        raise AttributeError(
            "torch.jit.script cannot compile a model with stochastic depth; call "
            "torchdrop.remove_stochastic_depth(model) first, or use torch.jit.trace in evaluation"
            + see("compile-and-export")
        )

    # The steps of a call --------------------------------------------------------------------

    def runs_on_all_ranks(self, branch: BranchState) -> bool:
        """Whether every rank has to run ``branch`` in every step, since other ranks wait for it."""
        if not dist.is_available() or not dist.is_initialized():
            return False
        facts = branch.facts
        for path in self.inlined:
            if is_sharded(self.module.get_submodule(path)):
                raise RuntimeError(
                    f"fully_shard was applied to {path}, but stochastic depth runs the modules in "
                    f"{path} one by one, because {facts.block} adds its branches there; apply "
                    f"fully_shard to {facts.block} as a whole" + see("ranks")
                )
        modules = [
            module  # "" is a block dropped as a whole: take its children, it may be sharded itself
            for path in facts.inner
            for module in ([self.module.get_submodule(path)] if path else self.module.children())
        ]
        alike = self.settings.mode == "batch" and self.settings.sync_ranks is not False
        waits = find_communicating_module(modules, facts.name, same_on_all_ranks=alike)
        if waits is None:
            return False
        if branch.action != "mask":
            branch.action = "mask"
            branch.reason = (
                f"{waits} in the branch: every rank has to run it, since other ranks wait for it"
            )
        return True

    def _draw(self, branch: BranchState, x: Tensor) -> tuple[Any, int]:
        """Draw the kept rows of ``x`` and count them; the result is that of :func:`decide`."""
        refuse_nested(x)
        if branch.facts.dim >= x.dim():
            raise _no_batch_dim(branch.facts, x)
        refuse_graph_capture(x)
        return decide(self.settings, branch, x.shape[branch.facts.dim])

    @staticmethod
    def rows_to_compute(branch: BranchState, rows: Tensor, skip: Tensor) -> Tensor:
        """Return ``rows``, and a second row if BatchNorm may not be able to normalise a single one.

        The output of the second row is discarded.
        """
        facts = branch.facts
        if rows.shape[0] != 1 or skip.dim() < 2:
            return rows
        if not (facts.has_batch_norm or branch.normalises):
            return rows
        batch = skip.shape[facts.dim]
        known = branch.row_values
        if (
            known is not None
            and not branch.normalises
            and known.suffice(sizes_of_row(skip, facts.dim))
        ):
            return rows
        other = (rows + 1 + torch.randint(batch - 1, (1,), device="cpu")) % batch
        return torch.cat([rows, other]).sort().values

    @staticmethod
    def cut(
        facts: BranchFacts,
        value: Any,
        taking: Callable[..., Tensor],
        layout: RowLayout | None,
        batch: int,
        known: bool = True,
    ) -> Any:
        """Return the selected rows of ``value``, an input of a branch.

        Args:
            facts: The branch.
            value: The input.
            taking: ``taking(value, dim=dim)`` selects rows.
            layout: How ``value`` carries the rows; None if it has no rows.
            batch: The number of rows.
            known: Whether ``layout`` was measured rather than assumed. A measured dimension of size
                1 broadcasts, and ``value`` is returned as it is.
        """
        if layout is None:
            return value
        dim, entries = layout
        if isinstance(value, Tensor) and known and value.dim() > dim and value.shape[dim] == 1:
            return value
        if not entries:  # the shape of the value decides, see RowLayout
            has_rows = isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == batch
            return taking(value, dim=dim) if has_rows else value
        if not isinstance(value, Tensor):
            raise RuntimeError(
                f"the branch {facts.name} gets a {type(value).__name__} as an input, and no rows "
                f"can be selected from it; use compute='mask', or leave the block out with select="
                + see("cannot-be-skipped")
            )
        if value.dim() <= dim or value.shape[dim] != batch * entries:
            raise RuntimeError(
                f"the branch {facts.name} gets a tensor of shape {tuple(value.shape)}, which "
                f"does not have the {batch} rows of its skip on dimension {dim}; "
                f"use compute='mask', or leave the block out with select=" + see("batch-dimension")
            )
        if entries == 1:
            return taking(value, dim=dim)
        apart = value.reshape(*value.shape[:dim], batch, entries, *value.shape[dim + 1 :])
        return taking(apart, dim=dim).flatten(dim, dim + 1)

    def dropped(
        self, facts: BranchFacts, skip: Tensor, inputs: tuple[Any, ...], dtype: torch.dtype
    ) -> Tensor:
        """Return the sum without its branch, which is the skip; give the branch zero gradients.

        Unless the block adds in place, this is a new tensor: an activation may write into it.
        """
        unused = self.unused(facts, skip, inputs)
        if facts.writes_skip:
            return skip.add_(with_zero_grads(skip.new_zeros(()), unused)) if unused else skip
        if dtype != skip.dtype:
            skip = skip.to(dtype)
        return with_zero_grads(skip, unused)

    def unused(self, facts: BranchFacts, skip: Tensor, inputs: Sequence[Any]) -> list[Tensor]:
        """Return the tensors that get gradients of zeros if the branch is dropped."""
        unused: list[Tensor] = []
        if self.settings.zero_grad and torch.is_grad_enabled():
            for path in facts.inner:
                unused += parameters_of_tree(attrgetter(path)(self.module) if path else self.module)
            unused.extend(attrgetter(path)(self.module) for path in facts.own)
            unused.extend(t for t in inputs if isinstance(t, Tensor) and t is not skip)
        return unused

    def dtype_of(
        self, branch: BranchState, skip: Tensor, inputs: Iterable[Any], run: Callable[[], Any]
    ) -> torch.dtype:
        """Return the dtype of the skip plus the branch, which ``run`` computes.

        The branch is run only if its dtype is not known from an earlier call and does not follow
        from the dtypes of its inputs.
        """
        facts, precision = branch.facts, precision_of(skip)
        dtype = branch.dtypes.get(precision)
        if dtype is not None:
            return dtype
        if facts.writes_skip or torch.compiler.is_compiling():
            return skip.dtype
        inner = [self.module.get_submodule(path) for path in facts.inner]
        takes = [*(p for top in inner for p in top.parameters()), *inputs]
        takes += [attrgetter(path)(self.module) for path in facts.own]
        others = {t.dtype for t in takes if isinstance(t, Tensor) and t.is_floating_point()}
        if precision[1] is None and others <= {skip.dtype}:
            return skip.dtype
        with torch.no_grad(), PROCESS_LOCK, unchanged(*inner, devices=[skip.device]):
            out = run()
        branch.dtypes[precision] = torch.promote_types(skip.dtype, out.dtype)
        return branch.dtypes[precision]


def _no_batch_dim(facts: BranchFacts, x: Tensor) -> Exception:
    """Return the error for a skip that does not have the batch dimension."""
    return ValueError(
        f"the batch is on dimension {facts.dim} according to batch_dim, but the skip of "
        f"{facts.name} has the shape {tuple(x.shape)}; remove stochastic depth and add it with "
        f"another batch_dim, or without one" + see("batch-dimension")
    )


def drop_spare_row(out: Tensor, computed: Tensor, rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the part of ``out``, computed on the rows ``computed``, that belongs to ``rows``.

    Returns:
        That part, and ``rows`` on its device.
    """
    place = (computed == rows).nonzero().flatten()
    return take(out, to_device_of(place, out), dim), to_device_of(rows, out)


def modifications(x: Any) -> int | None:
    """Return how often ``x`` was written into; None if that is not known."""
    if x is None or torch.compiler.is_compiling() or x.is_inference():
        return None
    return modifications_of(x)


def to_device_of(rows: Tensor, x: Tensor) -> Tensor:
    """Copy ``rows`` from the host to the device of ``x``, without waiting for the copy."""
    return rows if x.is_cpu else rows.to(x.device, non_blocking=True)


def precision_of(x: Tensor) -> tuple[Any, ...]:
    """Return the dtype of ``x`` and that of autocast, on which the dtype of a sum depends."""
    if not any_autocast_enabled():
        return x.dtype, None
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.dtype, torch.get_autocast_dtype(kind) if autocast else None


def sites_of(model: nn.Module) -> list[BlockSite]:
    """Return all sites in ``model``, in the order of depth."""
    found = [s for m in model.modules() if isinstance(s := occupant_of(m), BlockSite)]
    return sorted(
        found, key=lambda site: (site.branches[0].facts.index, site.branches[0].facts.order)
    )


mark_uncompiled(__name__)
