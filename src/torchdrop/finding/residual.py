"""The description of a residual block and its branches, as ``find_residuals`` returns it."""

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
        name: The name of the block. If the block has several branches, followed by a colon and the
            largest child of the branch ("encoder.layers.encoder_layer_0:mlp").
        shortcut: ``"identity"`` or ``"projection"``.
        action: ``"skip"``: only the kept rows are computed. ``"layer"``: the same for the block as
            a whole, ``x + keep * (block(x) - x)``, because its branches cannot be separated.
            ``"mask"``: all rows are computed, for the reason given in ``reason``.
        reason: Why the action was chosen; empty for a plain ``"skip"``.
        p: The drop probability. Before stochastic depth is added: the rate of the masking layers
            that the branch already has, 0 without any.
        children: The paths, from the model, of the modules that the branch calls.
        masks: The paths of the masking layers (DropPath, StochasticDepth) inside the branch, and of
            a module around it that skips whole layers by itself (``layerdrop``).
        proved: True after a call in which the branch passed the test. False after a call which has
            shown that its rows depend on each other, or which could not be tested; ``reason`` says
            why. None before the first such call, and with ``verify=False``.
        share: The branch's share of the FLOPs of a forward pass; None without ``example_inputs``,
            since it is measured on them.
        partly: Whether a part of the branch is computed for every row, although its action is
            ``"skip"``, because its output is used outside the branch, too; ``reason`` says which.
        source: Where the model adds the branch. For internal use; may change in any version.
    """

    name: str
    shortcut: str
    action: str
    reason: str
    p: float
    children: tuple[str, ...]
    masks: tuple[str, ...]
    share: float | None = None
    proved: bool | None = None
    partly: bool = False
    source: BranchSource = field(default_factory=lambda: BranchSource(""), repr=False)


@dataclass(eq=False, repr=False)
class Residual:
    """One block, with one or several branches that share a drop probability.

    Attributes:
        name: The path of the block from the model.
        module: The block.
        branches: Its branches in the order in which they are added.
        default: Whether ``add_stochastic_depth`` takes the block if ``select`` is not given. It
            does not take a block that is the only one of its kind, is inside another residual
            branch, or has a linear branch.
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
        """``"projection"`` if the shortcut of any branch is a projection, else ``"identity"``."""
        return (
            "projection" if any(b.shortcut == "projection" for b in self.branches) else "identity"
        )

    @property
    def action(self) -> str:
        """The actions of the branches; different ones are joined by a slash."""
        return "/".join(dict.fromkeys(b.action for b in self.branches))

    @property
    def reason(self) -> str:
        """The reasons of the branches."""
        return "; ".join(dict.fromkeys(b.reason for b in self.branches if b.reason))

    @property
    def p(self) -> float:
        """The drop probability; the largest one if the branches have different ones."""
        return max(b.p for b in self.branches)


@dataclass(eq=False)
class BranchSource:
    """Where a model adds a branch.

    Attributes:
        owner: The path of the module whose forward adds the branch.
        split: The addition, split into shortcut and branch; None if the block is dropped as a
            whole.
        graph: The forward that contains the addition; None if the block is dropped as a whole.
        whole_block: How the block is dropped as a whole; None if it is split.
        joined: The forwards in which the branches are added that are dropped together, by the path
            from the block; empty if they are not.
        changes: What these forwards apply to the stream besides sums.
    """

    owner: str
    split: Split | None = None
    graph: BlockGraph | None = None
    whole_block: WholeBlock | None = None
    joined: dict[str, BlockGraph] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)


@dataclass(eq=False)
class WholeBlock:
    """A block that is dropped as a whole.

    Attributes:
        x: The argument that is the input of the residual, as ``flatten_arguments`` names it.
        dim: The dimension of ``x`` that carries the batch.
        row_layouts: How each argument that is a tensor carries the batch, by its name.
        sum_item: Which item of the output is the sum: "" if the output is a tensor, "0" for the
            first item of a tuple.
        returns: The output, with None in place of tensors.
    """

    x: str
    dim: int
    row_layouts: RowLayouts
    sum_item: str
    returns: Any
