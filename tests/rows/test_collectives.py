"""Modules that communicate with other ranks, in a process group that is simulated."""

import pytest
import torch
from torch import nn

from torchdrop.rows import collectives
from torchdrop.rows.collectives import find_communicating_module, has_other_ranks, is_sharded


@pytest.fixture
def ranks(monkeypatch):
    def of_size(size):
        monkeypatch.setattr(collectives.dist, "is_initialized", lambda: size > 0)
        monkeypatch.setattr(collectives.dist, "get_world_size", lambda: size)

    return of_size


class FSDPLinear(nn.Linear):
    """As ``fully_shard`` changes the class of a module."""

    def unshard(self):
        pass


class DTensor(nn.Parameter):
    """As tensor parallelism changes the class of parameters."""


def split_linear():
    layer = nn.Linear(2, 2)
    layer.weight = DTensor(torch.ones(2, 2))
    return layer


class DistributedDataParallel(nn.Module):
    """Of the same class name as that of PyTorch, which only works in a process group."""


def find(*modules, same_on_all_ranks=False):
    return find_communicating_module(modules, "the branch", same_on_all_ranks=same_on_all_ranks)


@pytest.mark.parametrize(("size", "others"), [(0, False), (1, False), (2, True)])
def test_other_ranks(ranks, size, others):
    ranks(size)
    assert has_other_ranks() == others


def test_sharded_is_only_the_module_itself():
    assert is_sharded(FSDPLinear(2, 2))
    assert not is_sharded(nn.Sequential(FSDPLinear(2, 2)))
    assert not is_sharded(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.SyncBatchNorm(2), "SyncBatchNorm"),
        (FSDPLinear(2, 2), "fully_shard"),
        (DistributedDataParallel(), "DistributedDataParallel"),
        (nn.BatchNorm1d(2), None),
    ],
)
def test_modules_that_communicate_are_found_at_any_depth(ranks, module, kind):
    ranks(2)
    assert find(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Sequential(module))) == kind


def test_the_first_one_is_named(ranks):
    ranks(2)
    assert find(FSDPLinear(2, 2), nn.SyncBatchNorm(2)) == "fully_shard"
    assert find(nn.SyncBatchNorm(2), FSDPLinear(2, 2)) == "SyncBatchNorm"


def test_one_rank_waits_for_nobody(ranks):
    ranks(1)
    assert find(nn.SyncBatchNorm(2)) is None
    ranks(0)
    assert find(nn.SyncBatchNorm(2), FSDPLinear(2, 2), split_linear()) is None


def test_tensor_parallelism_needs_the_same_decision_on_all_ranks(ranks):
    ranks(2)
    with pytest.raises(RuntimeError, match="parameters of the branch are split over ranks"):
        find(split_linear())
    assert find(split_linear(), same_on_all_ranks=True) is None
    assert find(split_linear(), nn.SyncBatchNorm(2)) == "SyncBatchNorm"
    ranks(1)
    assert find(split_linear()) is None
