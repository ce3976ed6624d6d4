"""Blocks that cannot be split are dropped as a whole."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop
from small_nets import Block as PlainBlock
from small_nets import net
from zoo import assert_same

models = pytest.importorskip("torchvision.models")


class Block(nn.Module):
    """Counts its calls in its own forward; returns a tensor, or a tuple."""

    def __init__(self, width=8, as_tuple=False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)
        self.as_tuple = as_tuple
        self.times = 0

    def forward(self, x, bias=None, scale=1.0):
        self.times += 1
        y = self.fc(self.norm(x))
        if bias is not None:
            y = y + bias
        out = x + scale * y.tanh()
        return (out, None) if self.as_tuple else out


class Plain(Block):
    """The same without a residual."""

    def forward(self, x):
        self.times += 1
        return self.fc(self.norm(x)).tanh()


class Weighing(Block):
    def forward(self, x):
        out = super().forward(x)
        return out, out.mean(-1)


class Stack(nn.Module):
    def __init__(self, kind=Block, depth=3, **settings):
        super().__init__()
        self.layers = nn.ModuleList(kind(**settings) for _ in range(depth))

    def forward(self, x, bias=None):
        for layer in self.layers:
            x = layer(x) if bias is None else layer(x, bias=bias)
            x = x[0] if isinstance(x, tuple) else x
        return x


def stack(p=0.5, *, add=True, kind=Block, example=None, as_tuple=False, **settings):
    torch.manual_seed(0)
    model = Stack(kind, as_tuple=as_tuple).double()
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(
        model, p, schedule="uniform", example_inputs=(x, *(example or ())), **settings
    )
    return model, x, plan


def by_hand(model, x, kept, p, bias=None, shift=0):
    for i, layer in enumerate(model.layers):
        rows = torch.zeros(x.shape[0], 1, 1, dtype=x.dtype)
        rows[kept[f"layers.{i}"]] = 1 / (1 - p)
        y = layer.fc(layer.norm(x))
        x = x + rows.roll(shift, 0) * (y if bias is None else y + bias).tanh()
    return x


@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_plan_says_so_and_only_kept_rows_are_computed(as_tuple):
    model, x, plan = stack(as_tuple=as_tuple)
    assert [b.action for block in plan.blocks for b in block.branches] == ["layer"] * 3
    assert "dropped as a whole, since it cannot be read" in plan.blocks[0].reason
    assert "self.times += 1" in plan.blocks[0].reason
    assert "layer [1]" in repr(plan)
    seen = []
    model.layers[1].fc.register_forward_hook(lambda m, a, out: seen.append(out.shape[0]))
    model(x)
    assert seen == [3]


def test_it_is_the_dense_model_with_the_same_rows_masked():
    model, x, plan = stack()
    other = torchdrop.remove_stochastic_depth(copy.deepcopy(model))
    model(x).square().sum().backward()
    kept = plan.last_kept()
    by_hand(other, x, kept, 0.5).square().sum().backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(by_hand(other, x, kept, 0.5, shift=1), by_hand(other, x, kept, 0.5))


def test_other_inputs_are_cut_where_they_carry_the_batch():
    for shape in ((6, 1, 8), (1, 5, 8)):
        bias = torch.randn(shape, dtype=torch.float64)
        model, x, plan = stack(example=(bias,))
        out = model(x, bias)
        expected = by_hand(model, x, plan.last_kept(), 0.5, bias)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_batch_mode_and_both_scales():
    model, x, plan = stack(mode="batch")
    for _ in range(5):
        out = model(x)
        expected = by_hand(model, x, plan.last_kept(), 0.5)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    model, x, plan = stack(scale="eval")
    expected = x
    for layer in model.layers:
        expected = expected + 0.5 * layer.fc(layer.norm(expected)).tanh()
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-10, atol=1e-10)
    with torchdrop.paused(model):
        dense = torchdrop.remove_stochastic_depth(copy.deepcopy(model))
        assert torch.equal(model(x), dense(x))


def test_nothing_and_everything_dropped():
    model, x, plan = stack(p=1.0)
    model(x).sum().backward()
    assert torch.equal(model(x), x)
    assert all(not p.grad.any() for p in model.parameters())
    plan.set_p(0.0)
    dense = torchdrop.remove_stochastic_depth(copy.deepcopy(model))
    assert torch.equal(model(x), dense(x))
    plan.set_p(0.5)
    assert torch.equal(model.eval()(x), dense.eval()(x))
    again = pickle.loads(pickle.dumps(model))
    assert torchdrop.get_plan(again).blocks[0].action == "layer"
    torchdrop.remove_stochastic_depth(model)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_as_a_mask():
    model, x, plan = stack(compute="mask")
    seen = []
    model.layers[1].fc.register_forward_hook(lambda m, a, out: seen.append(out.shape[0]))
    out = model(x)
    assert seen == [6]
    expected = by_hand(model, x, plan.last_kept(), 0.5)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    plan.set_p(1.0)
    assert torch.equal(model(x), x)


def test_a_tensor_that_was_not_measured_is_cut_by_its_own_shape():
    model, x, plan = stack()
    seen = []
    model.layers[1].fc.register_forward_hook(lambda m, a, out: seen.append(out.shape[0]))
    for rows in (1, 6):  # one bias for all samples; one for each
        bias = torch.randn(rows, 1, 8, dtype=torch.float64)
        model(x, bias)  # is tested
        seen.clear()
        out = model(x, bias)
        assert seen == [3]
        expected = x
        for layer, kept in zip(model.layers, plan.last_kept().values(), strict=True):
            weight = torch.zeros(6, 1, 1, dtype=x.dtype)
            weight[kept] = 2.0
            own = type(layer).forward(layer, expected, bias)
            expected = expected + weight * (own - expected)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_without_its_input_a_block_is_refused():
    model, _, _ = stack()
    with pytest.raises(RuntimeError, match=r"its input is the tensor x, and it is called with no"):
        model.layers[0](None)


@pytest.mark.parametrize("kind", [Plain, Weighing], ids=lambda kind: kind.__name__)
def test_what_is_no_residual_or_returns_more_is_not_taken(kind):
    model = Stack(kind)
    x = torch.randn(6, 5, 8)
    assert torchdrop.find_residuals(model, x) == []
    with pytest.raises(ValueError, match=r"no residual branches found|cannot be read"):
        torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x)


def test_without_an_example_the_error_says_what_to_do():
    with pytest.raises(
        ValueError, match=r"give example_in.*test_whole_site\.py:\d+ \(self\.times \+= 1"
    ):
        torchdrop.add_stochastic_depth(Stack(), 0.5)


class OnData(Block):
    def forward(self, x):
        y = self.fc(self.norm(x))
        if y.sum() > 0:
            y = y * 2
        return x + y.tanh()


class OnItem(Block):
    def forward(self, x):
        y = self.fc(self.norm(x))
        return x + y.tanh() * (2.0 if y.mean().item() > 0 else 1.0)


@pytest.mark.parametrize("kind", [OnData, OnItem], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("given", [False, True])
def test_what_branches_on_data_is_an_error_that_names_the_line(kind, given):
    example = torch.randn(6, 5, 8) if given else None
    model = Stack(kind)
    line = r"y\.sum\(\) > 0" if kind is OnData else r"y\.mean\(\)\.item\(\) > 0"
    with pytest.raises(ValueError, match=line) as error:
        torchdrop.add_stochastic_depth(model, 0.5, example_inputs=example)
    assert "test_whole_site.py:" in str(error.value)
    way_out = (
        "wrap the whole block in torchdrop.StochasticDepth" if given else "give example_inputs"
    )
    assert way_out in str(error.value)
    assert not torchdrop.has_stochastic_depth(model)


# ---------------------------------------------------------------------------------------------
# Tensors of (batch * heads, ...), beside tensors of (batch, ...)


class Heads(nn.Module):
    """Attention with a bias for each head of each sample, in one dimension."""

    def __init__(self, heads=2, batch_outermost=True):
        super().__init__()
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)
        self.heads = heads
        self.batch_outermost = batch_outermost

    def forward(self, x, bias):
        def apart(t):
            t = t.unflatten(-1, (self.heads, -1))
            t = t.permute((0, 2, 1, 3) if self.batch_outermost else (2, 0, 1, 3))
            return t.flatten(0, 1)

        q, v = apart(self.q(x)), apart(self.v(x))
        out = (q @ q.transpose(1, 2) + bias).softmax(-1) @ v
        sizes = (-1, self.heads) if self.batch_outermost else (self.heads, -1)
        out = out.unflatten(0, sizes)
        out = out.permute((0, 2, 1, 3) if self.batch_outermost else (1, 2, 0, 3))
        return x + out.flatten(2)


class HeadsStack(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.layers = nn.ModuleList(Heads(**settings) for _ in range(2))
        self.batch_outermost = self.layers[0].batch_outermost

    def forward(self, x):
        slopes = torch.tensor([1.0, 0.5], dtype=x.dtype)
        batch = x.shape[0]
        slopes = slopes.repeat(batch) if self.batch_outermost else slopes.repeat_interleave(batch)
        for layer in self.layers:
            x = layer(x, slopes.view(-1, 1, 1) * torch.arange(5, dtype=x.dtype))
        return x


@pytest.mark.parametrize("batch_outermost", [True, False])
def test_entries_of_a_row_are_cut_together_or_not_at_all(batch_outermost):
    torch.manual_seed(0)
    model = HeadsStack(batch_outermost=batch_outermost).double()
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    assert {block.action for block in plan.blocks} == {"skip" if batch_outermost else "mask"}
    out, kept = model(x), plan.last_kept()
    dense = torchdrop.remove_stochastic_depth(copy.deepcopy(model))
    expected = x
    slopes = torch.tensor([1.0, 0.5], dtype=x.dtype)
    slopes = slopes.repeat(6) if batch_outermost else slopes.repeat_interleave(6)
    for i, layer in enumerate(dense.layers):
        rows = torch.zeros(6, 1, 1, dtype=x.dtype)
        rows[kept[f"layers.{i}"]] = 2.0
        bias = slopes.view(-1, 1, 1) * torch.arange(5, dtype=x.dtype)
        expected = expected + rows * (layer(expected, bias) - expected)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------
# What training loops do with them


class Widening(Block):
    """Of a bfloat16 input under autocast it makes float32, as a block with layer scale does."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x):
        self.times += 1
        return x + self.gamma * self.fc(x).tanh()


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_the_dtype_does_not_depend_on_what_is_dropped(mode, compute):
    """Also where the first runs drop everything, and after runs in another precision."""
    model, x = Stack(Widening), torch.randn(4, 5, 8)
    plan = torchdrop.add_stochastic_depth(
        model, 1.0, schedule="uniform", mode=mode, compute=compute, example_inputs=x
    )
    block, seen = model.layers[0], set()
    for p in (1.0, 0.5, 0.5, 0.5, 1.0):
        plan.set_p([p] * 3)
        for autocast in (None, torch.bfloat16, torch.float16):
            for dtype in (torch.float32, torch.bfloat16):
                given = x.to(dtype)
                with torch.autocast("cpu", autocast or dtype, enabled=autocast is not None):
                    if autocast is None and dtype != torch.float32:
                        continue  # the layers take no other dtype than their own
                    expected = Widening.forward(block, given).dtype
                    assert block(given).dtype == expected
                    seen.add((dtype, expected))
    assert (torch.bfloat16, torch.float32) in seen  # so taking the input's own would be wrong


def test_what_finds_the_dtype_changes_nothing():
    class Normed(Block):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x):
            self.times += 1
            return x + self.fc(self.bn(x)).tanh()

    model, x = nn.Sequential(Normed(), Normed()), torch.randn(4, 5, 8)
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform", mode="batch", example_inputs=x)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert [int(block.bn.num_batches_tracked) for block in model] == [0, 0]
    torch.manual_seed(3)
    torch.rand(2, dtype=torch.float64)  # a decision each
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_other_inputs_of_a_dropped_block_get_zeros_as_gradient():
    """Else DDP waits for the network that made them."""
    bias = torch.zeros(6, 1, 8, dtype=torch.float64)
    model, x, _ = stack(p=1.0, example=(bias,))
    conditions = nn.Linear(3, 8).double()
    model(x, conditions(torch.ones(6, 1, 3, dtype=torch.float64))).sum().backward()
    assert conditions.weight.grad is not None
    assert not conditions.weight.grad.any()


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_higher_derivatives(mode, compute):
    model, x, plan = stack(mode=mode, compute=compute)
    x = x[:3, :1].requires_grad_()

    def run(given):
        torch.manual_seed(2)
        return model(given)

    torch.autograd.gradcheck(run, (x,), check_forward_ad=True)
    torch.autograd.gradgradcheck(run, (x,))
    kept = plan.last_kept()
    assert 0 < sum(map(len, kept.values())) < 9
    dense = torchdrop.remove_stochastic_depth(copy.deepcopy(model))
    x, v = x.detach(), torch.randn_like(x)
    found = torch.func.jvp(run, (x,), (v,))
    expected = torch.func.jvp(lambda given: by_hand(dense, given, kept, 0.5), (x,), (v,))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    other = torch.func.jvp(lambda given: by_hand(dense, given, kept, 0.4), (x,), (v,))
    assert not torch.allclose(found[1], other[1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_activation_checkpoints(mode, reentrant):
    model, x, _ = stack(mode=mode)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        model.zero_grad()
        out = x.clone().requires_grad_()
        for layer in model.layers:
            out = checkpoint(layer, out, use_reentrant=reentrant) if checkpointed else layer(out)
        out.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert any(g.any() for g in found[0])


def test_evaluation_at_p_one_under_the_papers_rule_has_no_branches():
    model, x, _ = stack(p=1.0, scale="eval")
    nn.init.constant_(model.layers[0].fc.bias, float("inf"))
    assert torch.equal(model.eval()(x), x)


class Setting(PlainBlock):
    def forward(self, x: Tensor) -> Tensor:
        self.times = 1  # an attribute of its own: it cannot be split
        return x + self.b(self.act(self.a(x)))


def test_a_block_that_is_dropped_whole_trains_pauses_and_is_removed() -> None:
    model, x = net(2, block=Setting), torch.randn(4, 6)
    plan = torchdrop.add_stochastic_depth(model, [0.5, 1.0], example_inputs=x)
    assert [r.action for r in plan.blocks] == ["layer", "layer"]
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in model[1].parameters() if p.grad is not None)
    with torchdrop.paused(model):
        assert_same(model(x), Setting.forward(model[1], Setting.forward(model[0], x)))
    assert len(plan.last_kept()["0"]) == 2
    torchdrop.remove_stochastic_depth(model)


def test_a_block_that_cannot_be_read_compiles_into_one_graph() -> None:
    model, x, plan = stack()
    dense = torchdrop.remove_stochastic_depth(copy.deepcopy(model))
    for layer in (*model.layers, *dense.layers):
        layer.times = 0
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, by_hand(dense, x, plan.last_kept(), 0.5))
