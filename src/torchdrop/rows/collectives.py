"""Find the modules that communicate with the other ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence

from torch import distributed as dist
from torch import nn

from torchdrop.error_pages import see

__all__ = ["find_communicating_module", "has_other_ranks", "in_process_group", "is_sharded"]


# Whether this build of PyTorch has process groups.
_HAS_GROUPS = dist.is_available()


def in_process_group() -> bool:
    """Whether this process is in a process group, which may have one rank."""
    return _HAS_GROUPS and dist.is_initialized()


def has_other_ranks() -> bool:
    """Whether this process is one of several ranks."""
    return in_process_group() and dist.get_world_size() > 1


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) was applied to ``module`` itself."""
    # By name: importing torch.distributed.fsdp takes long, and not every build of torch has it.
    return type(module).__name__.startswith("FSDP") and hasattr(module, "unshard")


def find_communicating_module(
    modules: Sequence[nn.Module], name: str, *, same_on_all_ranks: bool
) -> str | None:
    """Return the kind of the first module in ``modules`` that communicates with the other ranks.

    Such a module waits for all ranks in each forward or backward pass. If one rank skipped it, the
    others would wait forever, or mistake the next collective of that rank for this one. So all
    ranks have to run it every time. A module whose parameters are split by tensor parallelism may
    be skipped, but only if all ranks drop the same samples.

    Call this function in each forward pass: a model may be sharded, or its BatchNorms converted to
    SyncBatchNorm, after stochastic depth was added.

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
            # By name too: apex has a SyncBatchNorm of its own.
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
            f"the parameters of {name} are split over ranks by tensor parallelism; these ranks "
            f"work on the same samples and have to drop the same ones, but each would draw its "
            f"own; use mode='batch', and do not pass sync_ranks=False" + see("ranks")
        )
    return found
