"""Classes of layers, tensors, children, hooks and replicas of modules."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from probes import Probe, Probes, check
from torch import nn
from torch.nn import parallel

from torchdrop import internals
from torchdrop.internals import modules

probe = Probes()


@probe(
    "BatchNormBase",
    api="torch.nn.modules.batchnorm._BatchNorm",
    purpose="find every kind of batch normalization",
)
def _() -> None:
    layers = (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2))
    assert all(isinstance(layer, internals.BatchNormBase) for layer in layers)
    assert isinstance(nn.LazyBatchNorm2d(), internals.BatchNormBase)
    assert not isinstance(nn.GroupNorm(1, 2), internals.BatchNormBase)


@probe("ConvBase", api="torch.nn.modules.conv._ConvNd", purpose="find every kind of convolution")
def _() -> None:
    for ndim in (1, 2, 3):
        for kind in (f"Conv{ndim}d", f"ConvTranspose{ndim}d"):
            assert isinstance(getattr(nn, kind)(2, 2, 1), internals.ConvBase), kind
    assert not isinstance(nn.Linear(2, 2), internals.ConvBase)


@probe("DropoutBase", api="torch.nn.modules.dropout._DropoutNd", purpose="find every dropout")
def _() -> None:
    names = (
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Dropout3d",
        "AlphaDropout",
        "FeatureAlphaDropout",
    )
    assert all(isinstance(getattr(nn, name)(0.1), internals.DropoutBase) for name in names)
    assert not isinstance(nn.Identity(), internals.DropoutBase)


@probe(
    "AttentionOutputLinear",
    api="torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
    purpose="leave out the linear layer of attention whose forward is never called",
)
def _() -> None:
    attention = nn.MultiheadAttention(4, 2)
    called: list[nn.Module] = []
    for module in attention.modules():
        if isinstance(module, nn.Linear):
            assert type(module) is internals.AttentionOutputLinear
            module.register_forward_hook(lambda module, args, out: called.append(module))
    x = torch.randn(3, 1, 4)
    attention(x, x, x)
    assert called == []


@probe(
    "parameters_of",
    api="torch.nn.Module._parameters",
    purpose="replace parameters while a block is tested",
)
def _() -> None:
    layer = nn.Linear(2, 2)
    own, other = layer.weight, nn.Parameter(torch.ones(2, 2))
    internals.parameters_of(layer)["weight"] = other
    assert layer.weight is other
    assert layer(torch.ones(1, 2)).tolist() == (torch.full((1, 2), 2.0) + layer.bias).tolist()
    internals.parameters_of(layer)["weight"] = own
    assert layer.weight is own


@probe(
    "MODULE_DICTS",
    "buffers_of",
    "parameters_of_tree",
    api="_parameters, _buffers or _modules of nn.Module",
    purpose="reach the tensors and children of a module quickly, and replace buffers",
)
def _() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU())
    model.append(model[0])
    assert [id(p) for p in internals.parameters_of_tree(model)] == [
        id(p) for p in (*model[0].parameters(), *model[1].parameters(), *model[0].parameters())
    ]
    buffers = internals.buffers_of(model[1])
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    mean = buffers["running_mean"] = torch.full((2,), 7.0)
    assert model[1].running_mean is mean
    assert model.state_dict()["1.running_mean"].tolist() == [7.0, 7.0]
    assert set(internals.MODULE_DICTS) <= set(model.__dict__)


@probe(
    "has_backward_hooks",
    "forward_pre_hooks_of",
    "forward_hooks_of",
    "clear_forward_hooks",
    api="the dictionaries of hooks of nn.Module",
    purpose="call the hooks of a child whose own children it runs one by one",
)
def _() -> None:
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        module = nn.ReLU()
        assert not internals.has_backward_hooks(module)
        handle = getattr(module, register)(lambda *args: None)
        assert internals.has_backward_hooks(module)
        handle.remove()
        assert not internals.has_backward_hooks(module)

    def plain(*args: Any) -> None:
        calls.append("plain")

    def named(*args: Any) -> None:
        calls.append("named")

    calls: list[str] = []
    module = nn.ReLU()
    module.register_forward_pre_hook(plain)
    module.register_forward_pre_hook(named, with_kwargs=True)
    module.register_forward_hook(named, with_kwargs=True)
    module.register_forward_hook(plain)
    assert list(internals.forward_pre_hooks_of(module)) == [(plain, False), (named, True)]
    assert list(internals.forward_hooks_of(module)) == [(named, True), (plain, False)]
    module(torch.ones(1))
    assert calls == ["plain", "named", "named", "plain"]
    internals.clear_forward_hooks(module)
    module(torch.ones(1))
    assert len(calls) == 4


@probe(
    "replicate_for_data_parallel",
    "set_replicate_method",
    "unset_replicate_method",
    api="nn.Module._replicate_for_data_parallel",
    purpose="let the replicas of nn.DataParallel run their own parameters",
)
def _() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

    module = Scale()
    calls: list[nn.Module] = []

    def replica_of_module() -> nn.Module:
        replica = internals.replicate_for_data_parallel(module)
        calls.append(replica)
        return replica

    code = sys.modules["torch.nn.parallel.replicate"]
    with pytest.MonkeyPatch.context() as patch:  # as on two devices, on the host
        patch.setattr(code, "_get_device_index", lambda device, optional: device)
        patch.setattr(
            code,
            "_broadcast_coalesced_reshape",
            lambda tensors, devices, detach=False: [
                [t * (d + 2) for t in tensors] for d in devices
            ],
        )
        internals.set_replicate_method(module, replica_of_module)
        replicas = parallel.replicate(module, [0, 1])
        assert replicas == calls
        internals.unset_replicate_method(module)
        parallel.replicate(module, [0, 1])
    assert [replica.weight.item() for replica in replicas] == [2.0, 3.0]
    assert type(replicas[0]) is Scale
    assert len(calls) == 2
    assert module.weight.item() == 1.0


@probe(
    "classes_in_tree",
    api="nn.Module._parameters and nn.Module._modules",
    purpose="notice in each call that a model was sharded, or its BatchNorms converted",
)
def _() -> None:
    class Other(nn.Parameter):
        pass

    block = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), None)
    before = internals.classes_in_tree(block)
    assert before.count(nn.Parameter) == 4
    assert {nn.Sequential, nn.Linear, nn.BatchNorm1d} < set(before)
    assert internals.classes_in_tree(block) == before
    block[0].weight = Other(block[0].weight.data)
    assert internals.classes_in_tree(block) != before


@probe(
    "hooks_suspended",
    api="nn.Module._forward_hooks and its siblings, torch.nn.modules.module._global_forward_hooks",
    purpose="test a block unseen by the hooks of the user",
)
def _() -> None:
    from torch.nn.modules import module as everywhere

    called: list[str] = []
    layer = nn.Linear(2, 2)
    handles = [
        layer.register_forward_hook(lambda *args: called.append("forward")),
        layer.register_forward_pre_hook(lambda *args: called.append("before")),
        layer.register_full_backward_hook(lambda *args: called.append("backward")),
        layer.register_full_backward_pre_hook(lambda *args: called.append("before backward")),
        everywhere.register_module_forward_hook(lambda *args: called.append("any forward")),
        everywhere.register_module_forward_pre_hook(lambda *args: called.append("any before")),
        everywhere.register_module_full_backward_hook(lambda *args: called.append("any backward")),
    ]
    try:
        with internals.hooks_suspended([layer]):
            layer(torch.ones(1, 2, requires_grad=True)).sum().backward()
        assert called == []
        layer(torch.ones(1, 2, requires_grad=True)).sum().backward()
        mine = {"forward", "before", "backward", "before backward"}
        assert set(called) == mine | {"any forward", "any before", "any backward"}
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("found", probe, ids=lambda found: found.names[0])
def test_a_private_api_behaves_as_torchdrop_needs_it(found: Probe) -> None:
    check(found)


def test_every_name_has_a_probe() -> None:
    assert probe.names() == sorted(modules.__all__)
