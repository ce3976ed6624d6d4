"""Find the modules that communicate with the other ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence

from torch import distributed as dist
from torch import nn

__all__ = ["find_collective", "has_other_ranks", "is_sharded"]


def has_other_ranks() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) was applied to ``module`` itself."""
    return type(module).__name__.startswith("FSDP") and hasattr(module, "unshard")


def find_collective(
    modules: Sequence[nn.Module], name: str, *, same_on_all_ranks: bool
) -> str | None:
    """Return the kind of the first module in ``modules`` that communicates with the other ranks.

    Such a module waits for all ranks in each forward or backward pass. If one rank skipped it, the
    others would wait forever, or take its next collective for this one, so all ranks have to run it
    every time. The answer may change from call to call, since models are sharded, and their
    BatchNorm is replaced, after stochastic depth was added.

    Args:
        modules: The modules that may be skipped; their descendants are searched too.
        name: The name of ``modules`` in the error message.
        same_on_all_ranks: Whether all ranks skip ``modules`` in the same calls.

    Returns:
        The class name, or ``"fully_shard"``; None if no module communicates.

    Raises:
        RuntimeError: Several ranks work on the same samples (tensor parallelism), but
            ``same_on_all_ranks`` is False.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    several = has_other_ranks()
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
    # fully_shard gathers the parameters before a module runs. Parameters that are still split while
    # the module around them runs were split by tensor parallelism.
    split = several and any(type(p).__name__ == "DTensor" for m in modules for p in m.parameters())
    if found is None and split and not same_on_all_ranks:
        raise RuntimeError(
            f"the parameters of {name} are split over ranks (tensor parallelism), which work on "
            f"the same samples, so all ranks have to drop the same ones; use mode='batch' with "
            f"sync_ranks=None"
        )
    return found
