"""What is kept of a model's branches between calls: their rates, and what was delivered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchdrop.finding.row_layout import RowLayouts
from torchdrop.rows.in_graph import enter, set_share
from torchdrop.rows.sampling import order_rows

__all__ = ["MASK_REQUESTED", "MIN_ELEMENTS_TO_SKIP", "BranchState", "Settings"]

# The reason of a branch that is masked because that was asked for.
MASK_REQUESTED = "compute='mask'"

# A branch without matrices is masked where fewer elements than this would be left out: a mask takes
# up to a quarter less time below it, and ever more above (benchmarks/scale.py --only choice).
MIN_ELEMENTS_TO_SKIP = 2**14


@dataclass
class Settings:
    """What all branches of one model share. Holds no module, so that a part can be copied."""

    mode: str
    sampling: str
    scale: str
    schedule: str
    sync_ranks: bool | None
    zero_grad: bool
    blocks: int = 0
    warned: bool = False
    measured: bool = False  # whether an example went through the model, to count FLOPs
    meter: Callable[[], int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "meter": None}


@dataclass(eq=False)
class BranchState:
    """One attached branch: what it is, its rate, and what was delivered."""

    name: str
    block: str
    path: str | None
    index: int
    shortcut: str
    action: str
    reason: str
    children: tuple[str, ...]
    masks: tuple[str, ...]
    inherited: float
    gain: float
    writes_skip: bool
    has_batch_norm: bool
    elementwise: bool  # has no matrices, and may be masked where that is faster
    convolves: bool  # or might, going by its parameters
    inner: tuple[str, ...]
    own: tuple[str, ...]
    dim: int = 0
    order: int = 0
    branch_first: bool = False
    row_layouts: RowLayouts | None = None
    p: float = 0.0
    share: float | None = None
    rows_seen: int = 0
    rows_dropped: int = 0
    last: tuple[Any, int] | None = None  # who was kept, and how many
    dtypes: dict[Any, torch.dtype] = field(default_factory=dict)
    # What a skip that is narrower than its branch is padded to, by the number of the branch.
    sizes: dict[int, int] = field(default_factory=dict)
    sampling: str = "exact"
    scale: str = "train"
    # What a compiled graph may hold fixed: its number there, and whether rows are drawn at all.
    number: int = field(init=False)
    always: bool | None = field(init=False)

    def __post_init__(self) -> None:
        self.number = enter(self)
        self.always = _always_kept(self.p)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.number = enter(self)

    def set_rate(self, p: float) -> None:
        """Drop with probability ``p`` from now on."""
        if p != self.p:
            self.p, self.always = p, _always_kept(p)
            set_share(self.number, p, known=self.convolves)

    def draw_rows(self, batch: int) -> tuple[Tensor, int]:
        """All rows of a batch, on the host, the kept ones first, and how many are kept."""
        rows, kept = order_rows(batch, self.p, self.sampling)
        self.count(batch, rows, kept)
        return rows, kept

    def gain_in_training(self) -> float:
        """What a kept branch is multiplied by in training."""
        return self.gain / (1.0 - self.p) if self.scale == "train" else self.gain

    def count(self, batch: int, rows: Any, kept: int) -> None:
        """Book one decision: of ``batch`` rows the first ``kept`` of ``rows``, or all, or none."""
        # A checkpoint runs the block again inside the backward pass: the same decision, not a
        # new one.
        if torch._C._current_graph_task_id() == -1:
            self.rows_seen += batch
            self.rows_dropped += batch - kept
            if isinstance(rows, Tensor) and torch._C._are_functorch_transforms_active():
                rows = rows.tolist()  # a tensor of torch.func must not outlive it
            self.last = (rows, kept)


def _always_kept(p: float) -> bool | None:
    """Whether a row is always kept, or never; None where it is drawn."""
    return True if p == 0.0 else False if p == 1.0 else None
