"""What a block does while stochastic depth is attached: laws, then references, then rates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from small_nets import Block, kept_mask, net
from zoo import BARELY, assert_same, without_randomness

models = pytest.importorskip("torchvision.models")


# --- laws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("scale", ["train", "eval"])
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_p_zero_is_the_original(mode: str, scale: str, compute: str) -> None:
    model, x = net(), torch.randn(5, 6)
    expected = model(x)
    torchdrop.add_stochastic_depth(model, 0.0, mode=mode, scale=scale, compute=compute)
    assert_same(model(x), expected)
    assert_same(model.eval()(x), expected)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("sampling", ["exact", "independent", "window"])
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_p_one_cuts_the_branches_out(mode: str, sampling: str, compute: str) -> None:
    model = models.resnet18(num_classes=5)
    x = torch.randn(4, 3, 64, 64)
    torchdrop.add_stochastic_depth(
        model, 1.0, schedule="uniform", mode=mode, sampling=sampling, compute=compute
    )
    with torch.no_grad():
        stem = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                stem = torch.relu(stem if block.downsample is None else block.downsample(stem))
        assert_same(model(x), model.fc(model.avgpool(stem).flatten(1)))


def test_p_one_in_evaluation_under_the_papers_rule_has_no_branches() -> None:
    model, x = net(), torch.randn(5, 6)
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform", scale="eval")
    assert_same(model.eval()(x), x)


def test_the_papers_rule_scales_in_evaluation_and_not_in_training() -> None:
    model, x = net(1 + 1), torch.randn(5, 6)
    rates = [0.25, 0.5]
    torchdrop.add_stochastic_depth(model, rates, scale="eval", mode="batch")
    expected = x
    for block, p in zip(model, rates, strict=True):
        branch = block.b(block.act(block.a(expected)))
        expected = expected + (1 - p) * branch
    torch.testing.assert_close(model.eval()(x), expected)
    for _ in range(20):  # training: each branch is there in full, or not at all
        out = model.train()(x)
        possible = []
        for first in (True, False):
            for second in (True, False):
                y = x + (model[0].b(model[0].act(model[0].a(x))) if first else 0)
                y = y + (model[1].b(model[1].act(model[1].a(y))) if second else 0)
                possible.append(torch.allclose(y, out))
        assert any(possible)


def test_evaluation_under_the_papers_rule_switches_dropout_off() -> None:
    class Dropping(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.dropout(self.act(self.a(x)), 0.5, self.training)
            return x + self.b(y)

    model, x = net(2, block=Dropping), torch.randn(5, 6)
    torchdrop.add_stochastic_depth(model, 0.5, scale="eval")
    assert_same(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_dropped_rows_are_the_skip_and_kept_rows_the_scaled_sum(mode: str) -> None:
    model, x = net(2).double(), torch.randn(8, 6, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, 0.4, schedule="uniform", mode=mode)
    for _ in range(10):
        out = model[0](x)
        kept = kept_mask(plan, "0", 8)[:, None]
        branch = model[0].b(model[0].act(model[0].a(x)))
        torch.testing.assert_close(out, x + kept * branch / 0.6, rtol=1e-12, atol=1e-12)
        assert_same(out[kept[:, 0] == 0], x[kept[:, 0] == 0])


@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_a_dropped_row_may_hold_anything(compute: str) -> None:
    model = net(2)
    x = torch.randn(6, 6)
    x[2] = float("inf")
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", compute=compute)
    times_dropped = 0
    for seed in range(8):
        torch.manual_seed(seed)
        out = model[0](x)
        if 2 not in plan.last_kept()["0"]:
            times_dropped += 1
            assert not out.isnan().any()
    assert times_dropped > 1


def test_a_kept_row_shows_what_it_holds() -> None:
    """The twin: in a row that is kept, the same infinity is seen."""
    model = net(2)
    x = torch.randn(6, 6)
    x[2] = float("inf")
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    assert model[0](x)[2].isnan().any()


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_tiny_batches(batch: int, mode: str) -> None:
    model = net()
    torchdrop.add_stochastic_depth(model, 0.5, mode=mode)
    for _ in range(10):
        model.zero_grad()
        out = model(torch.randn(batch, 6))
        assert out.shape == (batch, 6)
        out.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


# --- references ------------------------------------------------------------------------------


def _vit() -> tuple[nn.Module, Tensor]:
    model = models.VisionTransformer(16, 8, 3, 2, 16, 32, num_classes=4)
    # torchvision starts the head at zero, which would hide everything behind it
    nn.init.normal_(model.heads[0].weight)
    return model, torch.randn(6, 3, 16, 16)


def _convnext() -> tuple[nn.Module, Tensor]:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
    return ConvNeXt(settings, layer_scale=1.0, num_classes=4), torch.randn(6, 3, 32, 32)


def _swin() -> tuple[nn.Module, Tensor]:
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer([4, 4], 8, [2, 2], [2, 4], [2, 2], num_classes=4)
    return model, torch.randn(6, 3, 32, 32)


@pytest.mark.usefixtures("way_to_fork")
@pytest.mark.parametrize("make", [_vit, _convnext, _swin])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("sampling", ["exact", "independent"])
def test_skipping_equals_masking_the_same_rows(make: Any, mode: str, sampling: str) -> None:
    """Forward and gradients, in float64; the mask is put on by hooks that know nothing of us."""
    model, x = make()
    without_randomness(model).double().train()
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, 0.5, mode=mode, sampling=sampling)
    x = x.double().requires_grad_()
    out = model(x)
    kept, rates = plan.last_kept(), {b.name: b.p for r in plan.blocks for b in r.branches}
    assert any(len(rows) < 6 for rows in kept.values())

    def masked(name: str) -> Any:
        weight = torch.zeros(6, dtype=torch.float64)
        weight[kept[name]] = 1 / (1 - rates[name])

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            first = first * weight.view(-1, *[1] * (first.dim() - 1))
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return hook

    for residual in plan.blocks:
        for branch in residual.branches:
            # the last module of the branch that has parameters and no child that comes later
            last = {"self_attention", "mlp", "block", "attn", "norm1", "norm2"}
            (path,) = [c for c in branch.children if c.rpartition(".")[2] in last - _pre(branch)]
            dense.get_submodule(path).register_forward_hook(masked(branch.name))
    x_dense = x.detach().clone().requires_grad_()
    expected = dense(x_dense)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 1e-6
    torch.testing.assert_close(x.grad, x_dense.grad, rtol=0, atol=1e-10)
    for (name, mine), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10, msg=name)


def _pre(branch: Any) -> set[str]:
    """Norms that stand in front of an attention or MLP, not behind."""
    names = {c.rpartition(".")[2] for c in branch.children}
    return {"norm1", "norm2"} if names & {"attn", "mlp"} else set()


def test_with_batch_norm_the_branch_sees_the_kept_rows_alone() -> None:
    model = models.resnet18(num_classes=5).double()
    by_hand = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    x = torch.randn(6, 64, 8, 8, dtype=torch.float64, requires_grad=True)
    out = model.layer1[0](x)
    rows = plan.last_kept()["layer1.0"]
    assert len(rows) == 3
    twin = x.detach().clone().requires_grad_()
    block = by_hand.layer1[0]
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(twin[rows])))))
    expected = torch.relu(twin.index_add(0, rows, 2 * branch))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-9)
    for mine, theirs in zip(model.layer1[0].parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-9)
    for mine, theirs in zip(model.layer1[0].buffers(), block.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_reference_can_fail() -> None:
    """The twin of the references: other rows, or no scale, and they do not agree."""
    model, x = net(2).double(), torch.randn(8, 6, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    out = model[0](x)
    kept = kept_mask(plan, "0", 8)[:, None]
    branch = model[0].b(model[0].act(model[0].a(x)))
    assert not torch.allclose(out, x + kept * branch, atol=1e-3)
    assert not torch.allclose(out, x + (1 - kept) * branch / 0.5, atol=1e-3)


def test_masking_and_skipping_are_one_law() -> None:
    model, x = net().double(), torch.randn(8, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, 0.5)
    torchdrop.add_stochastic_depth(twin, 0.5, compute="mask")
    for seed in range(5):
        torch.manual_seed(seed)
        skipped = model(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(twin(x), skipped, rtol=0, atol=1e-12)


# --- what blocks do with memory --------------------------------------------------------------


class InPlaceAdd(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.b(self.act(self.a(2 * x)))  # 2 * x: autograd must not need x itself
        return x


@pytest.mark.parametrize("p", [BARELY, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_an_addition_in_place_stays_one(p: float, mode: str) -> None:
    model = net(2, block=InPlaceAdd)
    torchdrop.add_stochastic_depth(model, [p, p], mode=mode)
    x = torch.randn(6, 6)
    with torch.no_grad():
        assert model(x) is x
    model(x * 1.0).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class PostActivation(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.act(self.a(x))) + x)


@pytest.mark.usefixtures("way_to_fork")
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_an_activation_in_place_after_the_sum_does_not_write_into_the_skip(
    mode: str, compute: str
) -> None:
    model = net(2, block=PostActivation)
    torchdrop.add_stochastic_depth(model, [1.0, 1.0], mode=mode, compute=compute)
    x = torch.randn(6, 6)
    before = x.clone()
    model(x)
    assert_same(x, before)


class PreActivation(Block):
    """relu_ changes the skip as well: the sum is relu(x) + f(relu(x))."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(nn.functional.relu_(x)))


def test_a_branch_that_writes_into_the_skip_is_masked_and_keeps_its_meaning() -> None:
    model = net(2, block=PreActivation)
    plan = torchdrop.add_stochastic_depth(model, [BARELY, 1.0])
    assert [r.action for r in plan.blocks] == ["mask", "mask"]
    assert all("writes into its input" in r.reason for r in plan.blocks)
    x = torch.randn(6, 6)
    y = x.clone()
    with torch.no_grad():
        out = model(y)
        first = x.relu() + model[0].b(model[0].a(x.relu()))
    torch.testing.assert_close(out, first.relu())


@pytest.mark.usefixtures("way_to_fork")
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_channels_last_stays_channels_last(mode: str, p: float) -> None:
    model = models.resnet18(num_classes=5).to(memory_format=torch.channels_last)
    torchdrop.add_stochastic_depth(model, p, schedule="uniform", mode=mode)
    formats = []
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            block.register_forward_hook(
                lambda m, a, out: formats.append(
                    out.is_contiguous(memory_format=torch.channels_last)
                )
            )
    model(torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last))
    assert formats == [True] * 6


def test_batch_dim_one() -> None:
    model, x = net(2).double(), torch.randn(5, 8, 6, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", batch_dim=1)
    out = model[0](x)
    kept = kept_mask(plan, "0", 8)[None, :, None]
    branch = model[0].b(model[0].act(model[0].a(x)))
    torch.testing.assert_close(out, x + kept * branch / 0.5, rtol=0, atol=1e-12)


class ShapeReader(nn.Module):
    """Reads the batch size at the top, and uses it inside the branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, width).unbind(2)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.out(y.reshape(batch, tokens, width)).view(batch, tokens, width)


def test_shapes_are_read_again_on_the_kept_rows() -> None:
    model = net(2, block=ShapeReader)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    assert [r.action for r in plan.blocks] == ["skip", "skip"]
    assert model(torch.randn(4, 3, 6)).shape == (4, 3, 6)


# --- who else looks at a block ---------------------------------------------------------------


def test_hooks_of_children_fire_and_see_the_kept_rows() -> None:
    model = net(2)
    seen: list[int] = []
    model[0].a.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    model(torch.randn(6, 6))
    assert seen == [3]
