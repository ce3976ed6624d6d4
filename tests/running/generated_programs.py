"""What tests of generated forwards share: the program of a module, and a site that runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.running.program import Program
from torchdrop.running.rewrite import rewrite
from torchdrop.tracing.block_graph import trace_block


class Recorder:
    """Stands for a site: computes and adds every branch, and notes what it was given.

    Attributes:
        joined: For each call the number of the branch, and how many inputs it was given to compute
            the branch from; -1 if it was given the computed branch.
    """

    def __init__(self, module: nn.Module, program: Program) -> None:
        self.module, self.program = module, program
        self.joined: list[tuple[int, int]] = []

    def join(self, k: int, skip: Tensor, *inputs: Any) -> Tensor:
        self.joined.append((k, len(inputs)))
        out: Tensor = skip + self.program.branches[k].function(self.module, self, *inputs)
        return out

    def mask(self, k: int, skip: Tensor, branch: Tensor) -> Tensor:
        self.joined.append((k, -1))
        return skip + branch


def program_of(module: nn.Module, action: str = "skip", first: int = 0) -> Program:
    """Return the program of ``module``, with ``action`` for every branch.

    Args:
        module: A module with residual sums.
        action: ``"skip"`` or ``"mask"``.
        first: The number of the first branch.
    """
    block = trace_block(module)
    splits = [(entry.split, action) for entry in read_residual_sums(block)]
    return rewrite(block, splits, "block", first)
