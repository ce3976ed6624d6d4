"""Where the ranks of a process group wait for each other inside a module that may be left out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import distributed as dist
from torch import nn

__all__ = ["in_group", "is_sharded", "meets_ranks"]


def in_group() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_sharded(module: nn.Module) -> bool:
    """Whether ``module`` itself went through ``fully_shard`` (FSDP2)."""
    return type(module).__name__.startswith("FSDP") and hasattr(module, "unshard")


def meets_ranks(modules: Sequence[nn.Module], name: str, *, alike: bool) -> str | None:
    """What inside ``modules`` waits for all ranks in each forward or backward pass; None: nothing.

    A rank that left it out would stop the others, or pair its next collective with theirs, so it
    has to run on every rank each time. To be asked in each call, just before they run: models are
    sharded, and their BatchNorm is replaced, after stochastic depth was added.

    Args:
        modules: What may be left out.
        name: What they are called in the error.
        alike: Whether all ranks leave them out alike.

    Raises:
        RuntimeError: Ranks work on the same samples (tensor parallelism), but not ``alike``.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    several = in_group()
    found = None
    for top in modules:
        for module in top.modules():
            kind = type(module).__name__
            if (isinstance(module, nn.SyncBatchNorm) or kind == "SyncBatchNorm") and several:
                found = found or kind
            elif is_sharded(module):
                found = found or "fully_shard"
            elif kind in ("FullyShardedDataParallel", "DistributedDataParallel"):
                found = found or kind
    # What fully_shard has split is whole while the module around it runs: the rest was split for
    # another reason.
    split = several and any(type(p).__name__ == "DTensor" for m in modules for p in m.parameters())
    if found is None and split and not alike:
        raise RuntimeError(
            f"the parameters of {name} are split over ranks (tensor parallelism), which work on "
            f"the same samples and so have to drop alike; use mode='batch' with sync_ranks=None"
        )
    return found
