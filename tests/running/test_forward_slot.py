"""The objects in forward slots: signature, replicas, what they replace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import Block, net
from zoo import BARELY, assert_same

models = pytest.importorskip("torchvision.models")


def test_the_signature_of_forward_stays() -> None:
    import inspect

    class Named(Block):
        def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
            return hidden_states + self.b(self.act(self.a(hidden_states))) * scale

    model = net(2, block=Named)
    before = inspect.signature(model[0].forward)
    torchdrop.add_stochastic_depth(model, 0.5)
    assert inspect.signature(model[0].forward) == before
    assert model[0](hidden_states=torch.randn(2, 6)).shape == (2, 6)
    # another constant than the one that the block was read with: it is read again
    torchdrop.get_plan(model).set_p([1.0, 1.0])
    assert_same(model[0](x := torch.randn(2, 6), 2.0), x)
    torchdrop.get_plan(model).set_p([BARELY, BARELY])
    assert_same(model[0](x, 2.0), Named.forward(model[0], x, 2.0))


def test_a_compiler_binds_keywords_to_the_signature() -> None:
    class Named(Block):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x + self.b(self.act(self.a(x))) * scale

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = net(2, block=Named)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x=x)
            return x

    model = Calling()
    torchdrop.add_stochastic_depth(model, 0.5)
    assert torch.compile(model, fullgraph=True, backend="eager")(torch.randn(4, 6)).shape == (4, 6)


def test_a_replica_of_data_parallel_runs_its_own_parameters() -> None:
    model = net(2)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    replica = model[0]._replicate_for_data_parallel()
    replica._modules = {k: copy.deepcopy(m) for k, m in model[0]._modules.items()}
    nn.init.zeros_(replica.b.weight), nn.init.zeros_(replica.b.bias)
    x = torch.randn(3, 6)
    assert_same(replica(x), x)
    assert not torch.equal(model[0](x), x)


def test_the_rate_of_a_layer_that_was_taken_over_cannot_be_set() -> None:
    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(6, 6), torchdrop.DropPath(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.linear(x).relu())

    model = nn.Sequential(Layered(), Layered())
    torchdrop.add_stochastic_depth(model)
    with pytest.raises(ValueError, match="p of this layer cannot be set"):
        model[0].drop.p = 0.9
    assert model[0].drop.p == 0.1
    torchdrop.remove_stochastic_depth(model)
    model[0].drop.p = 0.9
    assert model[0].drop.p == 0.9
