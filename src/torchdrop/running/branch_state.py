"""The state of an attached branch: fixed facts about it, its drop rate, and its counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchdrop.error_pages import see
from torchdrop.finding.row_layout import RowLayouts
from torchdrop.internals import functorch_transforms_active, in_backward_pass
from torchdrop.rows.in_graph import register_branch, set_keep_share
from torchdrop.rows.sampling import draw_row_order
from torchdrop.running.forward_slot import MaskRest
from torchdrop.running.lone_row import RowValues
from torchdrop.schedules import DepthRule

__all__ = [
    "MASK_REQUESTED",
    "MIN_ELEMENTS_TO_SKIP",
    "BranchCounts",
    "BranchFacts",
    "BranchRate",
    "BranchState",
    "Settings",
]

# The reason given in the plan for a branch that is masked because the user asked for masks.
MASK_REQUESTED = "compute='mask'"

# A branch without weight matrices is masked if skipping would save fewer elements than this: below
# this number a mask takes up to a quarter less time, above it increasingly more
# (benchmarks/scale.py --only choice).
MIN_ELEMENTS_TO_SKIP = 2**14


@dataclass
class Settings:
    """The settings that all branches of one model share.

    Holds no module, so that copying a part of the model does not copy the rest of it.
    """

    mode: str
    sampling: str
    scale: str
    schedule: DepthRule
    sync_ranks: bool | None
    zero_grad: bool
    unit: str = "branch"
    blocks: int = 0
    verify: bool = True
    rows_per_sample: int | None = None
    warned_of_cache: bool = False
    warned_of_generation: bool = False
    generates: bool = False  # whether the last call with room for a cache only generated
    warned_of_dependence: bool = False
    masks_all: bool = False  # compute="mask"
    warned_of_readings: bool = False
    warned_of_unreached: bool = False
    measured: bool = False  # whether the FLOPs of an example forward pass were counted
    over_time: str = ""  # the rule over time that set the rates, and where it is
    mask_rest: MaskRest | None = None  # None if no masking layer of the model is bypassed
    not_taken: tuple[tuple[str, str], ...] = ()  # names of modules with residuals; why not taken


@dataclass(frozen=True, eq=False, kw_only=True)
class BranchFacts:
    """What is known about a branch when it is attached; none of it changes afterwards.

    Attributes:
        name: The name of the branch, as in the plan.
        block: The name of its block.
        path: The path of the block from the module that holds the site; None if the block is not
            inside that module.
        above: How many levels the block is above that module; 0 if it is not above it.
        index: The number of the block in the model, from 0; the depth rules use it.
        order: The number of the branch among all branches of the model, in the order of depth.
        shortcut: ``"identity"`` or ``"projection"``.
        children: The paths, from the model, of the modules that the branch calls.
        masks: The paths, from the model, of the masking layers that torchdrop replaces.
        inherited: The drop rate of these masking layers.
        gain: A constant factor with which the block adds the branch.
        writes_skip: Whether the block adds the branch to the skip in place.
        branch_first: Whether the block computes ``branch + skip`` rather than ``skip + branch``.
        has_batch_norm: Whether a BatchNorm is in the branch.
        elementwise: Whether the branch has no weight matrices, and may be masked if that is faster.
        convolves: Whether the branch has parameters of the shape of a convolution's weight.
        inner: The paths, from the module of the site, of the modules that the branch calls.
        partly: Whether a part of the branch is computed for all rows, although it is skipped.
        own: The paths, from the module of the site, of the parameters that the branch reads itself.
        dim: The dimension of the skip that is the batch.
        row_layouts: How the tensors of the block carry the batch; None if that is not known.
        sampling: How rows are chosen, as in :class:`Settings`.
        scale: When the branch is scaled, as in :class:`Settings`; "none" if never.
        rows_per_sample: How many neighbouring rows belong to one sample; they are dropped together.
        samples_given: Whether the user gave that number. Else it was measured on the example, other
            calls may have another one, and a branch is masked if it mixes the rows of a sample.
    """

    name: str
    block: str
    path: str | None
    above: int = 0
    index: int
    order: int
    shortcut: str
    children: tuple[str, ...]
    masks: tuple[str, ...]
    inherited: float
    gain: float
    writes_skip: bool
    branch_first: bool
    has_batch_norm: bool
    elementwise: bool
    convolves: bool
    inner: tuple[str, ...]
    partly: bool = False
    own: tuple[str, ...]
    dim: int
    row_layouts: RowLayouts | None
    sampling: str
    scale: str
    rows_per_sample: int = 1
    samples_given: bool = False


@dataclass(eq=False)
class BranchCounts:
    """How many rows a branch has seen and dropped, and its last decision.

    Attributes:
        rows_seen: The rows seen in training since the counts were last read.
        rows_dropped: How many of them were dropped.
        last: The last decision: the rows of the batch and how many of them, from the first, were
            kept. The rows are True if all were kept and False if none was.
    """

    rows_seen: int = 0
    rows_dropped: int = 0
    last: tuple[Any, int] | None = None

    def add(self, batch: int, rows: Any, kept: int) -> None:
        """Count one decision.

        Args:
            batch: The number of rows.
            rows: The rows, of which the first ``kept`` are kept.
            kept: The number of kept rows.
        """
        # Activation checkpointing runs the block again inside the backward pass. That repeats the
        # decision, it is not a new one.
        if not in_backward_pass():
            self.rows_seen += batch
            self.rows_dropped += batch - kept
            if isinstance(rows, Tensor) and functorch_transforms_active():
                rows = rows.tolist()  # a tensor of a torch.func transform must not outlive it
            self.last = (rows, kept)


class BranchRate:
    """The drop rate of a branch, with which rows are drawn inside and outside compiled graphs.

    Attributes:
        p: The drop probability.
        gain: The factor by which kept rows of the branch are multiplied in training.
        fixed_decision: True if every row is kept (p = 0), False if none is (p = 1), None if rows
            are drawn. It is a constant in a compiled graph.
        convolves: As in :class:`BranchFacts`; compiled graphs read it.
        number: The number by which compiled graphs know this rate.
    """

    def __init__(self, facts: BranchFacts, counts: BranchCounts) -> None:
        self._facts = facts
        self._counts = counts
        self.convolves = facts.convolves
        self.p = 0.0
        self.gain = facts.gain
        self.fixed_decision = _fixed_decision(0.0)
        self.number = register_branch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.number = register_branch(self)  # a copy has a rate of its own

    def set(self, p: float) -> None:
        """Drop with probability ``p`` from now on."""
        if p != self.p:
            self.p, self.fixed_decision = p, _fixed_decision(p)
            scaled = self._facts.scale == "train" and p < 1.0  # with p = 1 no row is kept
            self.gain = self._facts.gain / (1.0 - p) if scaled else self._facts.gain
            set_keep_share(self.number, p, value_known=self.convolves)

    def order_rows(
        self, batch: int, draw: Callable[[int, float], tuple[Any, int]] | None = None
    ) -> tuple[Any, int]:
        """Draw rows; return all rows of a batch, the kept ones first, and how many are kept.

        Args:
            batch: The number of rows.
            draw: Draws samples, as :func:`usual_sampler` returns it. None: with all checks.

        Raises:
            ValueError: Each sample has several rows, and the batch does not hold whole samples.
        """
        facts = self._facts
        draw = draw or partial(draw_row_order, sampling=facts.sampling)
        group = facts.rows_per_sample
        if group == 1:
            return draw(batch, self.p)
        samples, rest = divmod(batch, group)
        if rest and not facts.samples_given:
            # not the number of rows per sample that was measured, so each row is drawn alone
            return draw(batch, self.p)
        if rest:
            raise ValueError(
                f"each sample has {group} rows according to rows_per_sample, but {facts.name} is "
                f"called with {batch} rows, not a multiple of {group}; remove stochastic depth "
                f"and add it with another rows_per_sample, or without one" + see("batch-dimension")
            )
        order, kept = draw(samples, self.p)
        if order is None:
            return None, kept * group
        rows = (order[:, None] * group + torch.arange(group, device="cpu")).flatten()
        return rows, kept * group

    def draw_rows(self, batch: int) -> tuple[Tensor, int]:
        """Draw rows as :meth:`order_rows` does, and count the decision."""
        rows, kept = self.order_rows(batch)
        self._counts.add(batch, rows, kept)
        return rows, kept


def _fixed_decision(p: float) -> bool | None:
    """Whether every row is kept (True) or dropped (False); None if rows are drawn."""
    return True if p == 0.0 else False if p == 1.0 else None


# The plan prints at most this many notes about kinds of calls for each branch.
_MOST_NOTES = 4

# The attributes of a branch that a forward pass may change.
_LEARNED = (
    "action", "reason", "share", "proof", "depends", "normalises", "row_values",
    "writes_input", "notes",
)  # fmt: skip


@dataclass(eq=False)
class BranchState:
    """One attached branch.

    Attributes:
        facts: What does not change after the branch is attached.
        action: ``"skip"``, ``"mask"`` or ``"layer"``, as in the plan. It changes if a call shows
            that the branch has to be masked, or is masked because that is faster.
        reason: Why the action is what it is.
        rate: The drop rate.
        counts: The rows seen and dropped.
        share: The branch's share of the FLOPs of a forward pass; None if it was not measured.
        dtypes: The dtype of the sum, by the precision of the call (``precision_of``).
        sizes: The size to which a narrower skip is padded, by the number of the branch's program.
        proof: ``"proved"`` after a call that was tested; ``"not proved: "`` and the reason after a
            call that could not be tested; empty before the first call.
        depends: Why its rows cannot be computed without the other rows, if a call has shown this;
            else empty. Such a branch is masked.
        normalises: A sentence on the modules of the user that depend on the batch in training, as
            BatchNorm does; empty if there are none.
        row_values: What a BatchNorm in the branch gets from a single row; None if no test has shown
            it.
        writes_input: Whether a block that is dropped as a whole writes into its input.
        notes: Sentences on some kinds of calls, which the plan prints.
        masked_when_attached: Whether the action was ``"mask"`` when the branch was attached.
    """

    facts: BranchFacts
    action: str
    reason: str
    rate: BranchRate = field(init=False)
    counts: BranchCounts = field(default_factory=BranchCounts)
    share: float | None = None
    dtypes: dict[Any, torch.dtype] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    proof: str = ""
    depends: str = ""
    normalises: str = ""
    row_values: RowValues | None = None
    writes_input: bool = False
    notes: tuple[str, ...] = ()
    masked_when_attached: bool = field(init=False)

    def note(self, what: str) -> None:
        """Add a sentence on some kinds of calls to what the plan prints."""
        if what not in self.notes and len(self.notes) < _MOST_NOTES:
            self.notes = (*self.notes, what)

    def mask(self, why: str) -> None:
        """Compute this branch for all rows from now on, because of ``why``."""
        self.action, self.reason, self.depends = "mask", why, why

    def full_reason(self) -> str:
        """Return the reason, and all that calls have shown about the branch."""
        found = self.proof if self.proof.startswith("not proved") else ""
        rows = self.facts.rows_per_sample
        samples = f"each sample has {rows} rows, which are dropped together" if rows > 1 else ""
        return "; ".join(filter(None, (self.reason, *self.notes, self.normalises, samples, found)))

    def proved(self) -> bool | None:
        """Whether a call has proved the branch; None if no test was tried yet."""
        if self.depends:
            return False
        return self.proof == "proved" if self.proof else None

    def __post_init__(self) -> None:
        self.rate = BranchRate(self.facts, self.counts)
        self.masked_when_attached = self.action == "mask"

    def snapshot(self) -> dict[str, Any]:
        """Return all that may change, for :meth:`restore`."""
        return {
            "p": self.rate.p,
            "counts": copy.copy(self.counts.__dict__),
            "learned": {name: getattr(self, name) for name in _LEARNED},
            "dtypes": dict(self.dtypes),
            "sizes": dict(self.sizes),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to the state in which :meth:`snapshot` was called."""
        self.rate.set(snapshot["p"])
        self.counts.__dict__.update(snapshot["counts"])
        self.__dict__.update(snapshot["learned"])
        for known, before in ((self.dtypes, snapshot["dtypes"]), (self.sizes, snapshot["sizes"])):
            known.clear()
            known.update(before)
