"""A part of a forward that runs under ``torch.utils.checkpoint``.

Each such part is a :class:`Checkpoint`. A node that was recorded inside of one or more has them,
from the outermost to the innermost, in ``node.meta["checkpoints"]``. Generated code runs these
nodes under a checkpoint, too.
"""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["Checkpoint", "checkpoints_of"]


class Checkpoint:
    """One call of ``torch.utils.checkpoint.checkpoint`` in a forward.

    Args:
        options: The keyword arguments of the call that are not the defaults, such as
            ``preserve_rng_state=False``. ``use_reentrant=False`` is taken as the default.
        takes_tensors: Whether an argument of the function is a tensor.
    """

    def __init__(self, options: dict[str, Any], takes_tensors: bool) -> None:
        self.options = options
        self.takes_tensors = takes_tensors


def checkpoints_of(node: fx.Node) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that a node was recorded in, from the outermost to the innermost."""
    found: tuple[Checkpoint, ...] = node.meta.get("checkpoints", ())
    return found
