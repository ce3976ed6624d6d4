"""What is known of one residual block and of its branches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchdrop.finding.row_layout import RowLayouts
from torchdrop.finding.split import Split
from torchdrop.tracing.block_graph import BlockGraph

__all__ = ["Branch", "BranchSource", "Residual", "WholeBlock"]


@dataclass(eq=False)
class Branch:
    """One residual branch of a block.

    Attributes:
        name: The block's name; where a block has several branches, with the largest child of the
            branch behind a colon ("encoder.layers.encoder_layer_0:mlp").
        shortcut: ``"identity"`` or ``"projection"``.
        action: ``"skip"``: only the kept rows are computed. ``"layer"``: the same, but of the
            block as a whole, ``x + keep * (block(x) - x)``, since its branches cannot be told
            apart. ``"mask"``: all rows are computed, for the reason given in ``reason``.
        reason: Why the action is what it is; empty where it is plainly ``"skip"``.
        p: The drop probability. Before anything is attached: the rate of the masking layers that
            the branch already has, 0 without any.
        children: The paths, from the model, of the modules that the branch calls.
        masks: The paths of the masking layers (DropPath, StochasticDepth) inside the branch, and of
            a module around it that leaves out whole layers itself (``layerdrop``).
        share: The branch's share of the FLOPs of a forward pass; None where it was not measured,
            which takes ``example_inputs``.
        source: Where the branch stands in the forward that was read. For torchdrop itself; it may
            change with any version.
    """

    name: str
    shortcut: str
    action: str
    reason: str
    p: float
    children: tuple[str, ...]
    masks: tuple[str, ...]
    share: float | None = None
    source: BranchSource = field(default_factory=lambda: BranchSource(""), repr=False)


@dataclass(eq=False, repr=False)
class Residual:
    """One block: a unit of depth, with one or several branches that share a drop probability.

    Attributes:
        name: The path of the block from the model.
        module: The block.
        branches: Its branches in the order in which they are added.
        default: Whether ``add_stochastic_depth`` takes the block without being asked; a lone,
            inner or linear one only if ``select`` says so.
        why_not: Why ``default`` is False.
        owner: The path of the module whose forward adds the branches: the block itself, or a module
            around it that calls the block in a loop.
    """

    name: str
    module: nn.Module
    branches: list[Branch]
    default: bool = True
    why_not: str = ""
    owner: str = field(default="", repr=False, kw_only=True)

    def __repr__(self) -> str:
        count = len(self.branches)
        text = (
            f"{self.name} ({type(self.module).__name__}): {count} branch{'es' * (count > 1)}, "
            f"{self.shortcut} shortcut, {self.action}, p={self.p:.3g}"
        )
        return f"<{text}>" if self.default else f"<{text}; left out: {self.why_not}>"

    @property
    def shortcut(self) -> str:
        """``"identity"``, or ``"projection"`` where the shortcut of any branch is one."""
        return (
            "projection" if any(b.shortcut == "projection" for b in self.branches) else "identity"
        )

    @property
    def action(self) -> str:
        """What is done with the branches; several different actions are joined by a slash."""
        return "/".join(dict.fromkeys(b.action for b in self.branches))

    @property
    def reason(self) -> str:
        """The reasons of the branches."""
        return "; ".join(dict.fromkeys(b.reason for b in self.branches if b.reason))

    @property
    def p(self) -> float:
        """The drop probability; the largest where branches were given different ones."""
        return max(b.p for b in self.branches)


@dataclass(eq=False)
class BranchSource:
    """Where a branch stands in the forward that was read.

    Attributes:
        owner: The path of the module whose forward adds the branch.
        split: The addition and how it falls into shortcut and branch; None where a block is dropped
            as a whole.
        graph: The forward that holds the addition; None where a block is dropped as a whole.
        whole_block: How the block is dropped as a whole; None where it is split.
    """

    owner: str
    split: Split | None = None
    graph: BlockGraph | None = None
    whole_block: WholeBlock | None = None


@dataclass(eq=False)
class WholeBlock:
    """A block that is dropped as a whole.

    Attributes:
        x: Which of its arguments the block adds to, as :func:`flatten_arguments` names it.
        dim: The dimension of that which carries the batch.
        row_layouts: How each of its tensors carries the batch, by that name.
        sum_item: Which item of its output is the sum: "" for a tensor, "0" for the first
            item of a tuple.
        returns: What it returns, without tensors.
    """

    x: str
    dim: int
    row_layouts: RowLayouts
    sum_item: str
    returns: Any
