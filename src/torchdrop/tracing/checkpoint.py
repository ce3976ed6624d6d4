"""A part of a forward that runs under ``torch.utils.checkpoint``.

A node of a graph that was recorded inside of such parts has them, from the outermost to the
innermost, in ``node.meta["checkpoints"]``. Generated code runs these nodes under a checkpoint, too:
always under one with ``use_reentrant=False``, since a reentrant one computes gradients only for the
tensors that are arguments or outputs of its function themselves, not for those in a tuple.
"""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["Checkpoint", "checkpoints_of"]


class Checkpoint:
    """One call of ``torch.utils.checkpoint.checkpoint`` in a forward.

    Args:
        options: The keyword arguments of the call that are not the defaults, such as
            ``preserve_rng_state=False``; not ``use_reentrant``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options


def checkpoints_of(node: fx.Node) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that a node was recorded in, from the outermost to the innermost."""
    found: tuple[Checkpoint, ...] = node.meta.get("checkpoints", ())
    return found
