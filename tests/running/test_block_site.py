"""What all sites share: rows that BatchNorm needs, dtypes, gradients, caches, observers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import Block, net
from zoo import assert_same

models = pytest.importorskip("torchvision.models")


class Cache:
    def __init__(self, length=0):
        self.length = length

    def get_seq_length(self, layer=0):
        return self.length

    def update(self, states):
        self.length += states.shape[1]


class CachedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, cache=None):
        if cache is not None:
            cache.update(x)
        return x + self.fc(x).relu()


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(CachedLayer() for _ in range(2))

    def forward(self, x, cache=None, use_cache=True):
        if use_cache and cache is None:
            cache = [Cache() for _ in self.layers]
        for i, layer in enumerate(self.layers):
            x = layer(x, cache[i] if cache else None)
        return x


def test_an_empty_cache_is_replaced_with_one_warning():
    model, x = Cached(), torch.randn(4, 3, 4)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    with pytest.warns(UserWarning, match=r"creates a key/value cache.*use_cache=False"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        model.eval()(x)  # evaluation keeps its cache
    sites = [layer.__dict__["forward"] for layer in model.layers]
    assert [len(site.train) for site in sites] == [1, 1]


def test_a_filled_cache_is_an_error():
    model, x = Cached(), torch.randn(4, 3, 4)
    torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x)
    with pytest.raises(
        ValueError, match=r"layers\.0 is called in training.*not empty.*use_cache=False"
    ):
        model(x, [Cache(7), Cache(7)])


def test_a_cache_in_evaluation_is_an_error_where_evaluation_is_ours():
    model, x = Cached(), torch.randn(4, 3, 4)
    torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x, scale="eval")
    model.eval()
    assert model(x, use_cache=False).shape == x.shape
    with pytest.raises(
        ValueError, match=r"key/value cache, but with scale='eval'.*use_cache=False"
    ):
        model(x)


class Promoting(Block):
    """As ConvNeXt: the skip is bfloat16 under autocast, a float32 scale makes the sum float32."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width)
        self.noise = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.noise(self.b(self.act(self.norm(self.a(x))))) * self.scale


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("compute", ["auto", "mask"])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_dtype_does_not_depend_on_the_draw_nor_on_an_earlier_run(
    mode: str, compute: str, autocast: bool
) -> None:
    model = net(2, block=Promoting)
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    if not autocast:
        model.to(torch.bfloat16)
        model[0].scale.data = model[0].scale.data.float()
    torchdrop.add_stochastic_depth(model, [1.0, 1.0], mode=mode, compute=compute)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = Promoting.forward(model[0], x)
        assert expected.dtype == torch.float32
        statistics = model[0].norm.running_var.clone()
        torch.manual_seed(0)
        out = model[0](x)  # never ran before, and is dropped
        after = torch.get_rng_state()
        torch.manual_seed(0)
        assert_same(model[0](x), out)
    assert_same(out, x.float())
    if compute == "auto":  # a branch that is dropped leaves no trace
        assert_same(model[0].norm.running_var, statistics)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.usefixtures("way_to_fork")
def test_one_kept_row_and_batch_norm() -> None:
    model = models.resnet18(num_classes=5)
    plan = torchdrop.add_stochastic_depth(model, 0.9, schedule="uniform")
    assert "BatchNorm" in plan.blocks[0].reason
    for _ in range(6):
        model(torch.randn(4, 3, 32, 32)).sum().backward()
    # the second row runs along and changes nothing but the statistics
    block = model.layer4[1]
    x = torch.randn(4, 512, 1, 1)
    plan.set_p({"layer4.1": 0.75})
    out = block(x)
    rows = plan.last_kept()["layer4.1"]
    assert len(rows) == 1
    others = [i for i in range(4) if i != int(rows)]
    assert_same(out[others], x[others].relu())
    assert not torch.equal(out[rows], x[rows].relu())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@pytest.mark.parametrize(("side", "computed"), [(1, 2), (2, 1), (16, 1)])
def test_a_second_row_is_computed_only_for_a_single_value(side: int, computed: int) -> None:
    model = nn.Sequential(Normed(), Normed())
    plan = torchdrop.add_stochastic_depth(model, 0.75, schedule="uniform")
    rows: list[int] = []
    model[0].f.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model(torch.randn(4, 2, side, side))
    assert len(plan.last_kept()["0"]) == 1
    assert rows == [computed]


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_zero_grad_or_none(mode: str) -> None:
    model = net(2)
    torchdrop.add_stochastic_depth(model, [1.0, 1.0], mode=mode)
    model(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    torchdrop.remove_stochastic_depth(model)
    model.zero_grad()
    torchdrop.add_stochastic_depth(model, [1.0, 1.0], mode=mode, zero_grad=False)
    model(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


class Drops(nn.Module):
    """A block that calls the function by itself."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear, self.p = nn.Linear(6, 6), p

    def forward(self, x: Tensor) -> Tensor:
        return x + torchdrop.functional.drop_path(self.linear(x).relu(), self.p, self.training)


@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_a_batch_dim_that_is_not_there_is_named(compute: str) -> None:
    model = nn.Sequential(Drops(0.0), Drops(0.0))
    torchdrop.add_stochastic_depth(model, 0.5, batch_dim=5, compute=compute)
    with pytest.raises(ValueError, match=r"dimension 5 according to batch_dim.*\(4, 6\)"):
        model(torch.randn(4, 6))
