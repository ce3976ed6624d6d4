"""Residuals over two modules, what children return besides, caches, layer drop in a loop."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchdrop


class SelfAttention(nn.Module):
    """Returns weights as well, if asked: None otherwise, as attention in transformers does."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.with_weights = False

    def forward(self, x, mask=None):
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return weights @ self.v(x), (weights if self.with_weights else None)


class Output(nn.Module):
    """Adds the residual for its parent and normalises: the post-norm of BERT."""

    def __init__(self, wide, width):
        super().__init__()
        self.dense = nn.Linear(wide, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, residual):
        return self.norm(self.dense(x) + residual)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.self = SelfAttention(width)
        self.output = Output(width, width)

    def forward(self, x, mask=None):
        attended, weights = self.self(x, mask)
        return self.output(attended, x), weights


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = Attention(width)
        self.intermediate = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU())
        self.output = Output(2 * width, width)

    def forward(self, x, mask=None):
        x, weights = self.attention(x, mask)
        return self.output(self.intermediate(x), x), weights


class PostNorm(nn.Module):
    def __init__(self, depth=3, width=8):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x, mask=None):
        for layer in self.layers:
            x, _ = layer(x, mask)
        return x


def by_hand(model, x, kept, p, wrong=False):
    """The dense model with the branches of the dropped rows masked, written out."""

    def masked(branch, name):
        rows = torch.zeros(x.shape[0], dtype=x.dtype)
        rows[kept[name]] = 1 / (1 - p)
        return branch * (rows.roll(1) if wrong else rows).view(-1, 1, 1)

    for i, layer in enumerate(model.layers):
        out = layer.attention.output
        branch = out.dense(layer.attention.self(x)[0])
        x = out.norm(x + masked(branch, f"layers.{i}:attention"))
        branch = layer.output.dense(layer.intermediate(x))
        x = layer.output.norm(x + masked(branch, f"layers.{i}:intermediate"))
    return x


def post_norm(p=0.5, **settings):
    torch.manual_seed(0)
    model = PostNorm().double()
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(
        model, p, schedule="uniform", example_inputs=x, **settings
    )
    return model, x, plan


def test_a_residual_over_two_modules_is_one_branch():
    _, _, plan = post_norm()
    assert [block.name for block in plan.blocks] == ["layers.0", "layers.1", "layers.2"]
    for block in plan.blocks:
        assert isinstance(block.module, Layer)
        names = [f"{block.name}:{part}" for part in ("attention", "intermediate")]
        assert [b.name for b in block.branches] == names
        assert [b.action for b in block.branches] == ["skip", "skip"]
        assert f"{block.name}.attention.self" in block.branches[0].children
        assert f"{block.name}.attention.output.dense" in block.branches[0].children


def test_only_kept_rows_are_computed():
    model, x, _ = post_norm()
    seen = []
    for name in ("self.q", "output.dense"):
        child = model.layers[1].attention.get_submodule(name)
        child.register_forward_hook(lambda m, a, out: seen.append(out.shape[0]))
    model(x)
    assert seen == [3, 3]


def test_it_is_the_dense_model_with_the_same_rows_masked():
    model, x, plan = post_norm()
    other = torchdrop.remove_stochastic_depth(copy.deepcopy(model))
    torch.manual_seed(3)
    model(x).square().sum().backward()
    kept = plan.last_kept()
    by_hand(other, x, kept, 0.5).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10, msg=name)
    assert not torch.allclose(
        by_hand(other, x, kept, 0.5, wrong=True), by_hand(other, x, kept, 0.5)
    )


def test_evaluation_removal_and_pickling():
    model, x, plan = post_norm()
    dense = torchdrop.remove_stochastic_depth(copy.deepcopy(model)).eval()
    again = pickle.loads(pickle.dumps(model))
    for each in (model, again):
        assert torch.equal(each.eval()(x), dense(x))
    plan.set_p(0.0)
    assert torch.equal(model.train()(x), dense(x))  # there is no dropout in it
    torchdrop.get_plan(again).set_p(1.0)
    expected = x
    for layer in dense.layers:
        expected = layer.output.norm(layer.attention.output.norm(expected))
    torch.testing.assert_close(again.train()(x), expected)


def test_nothing_dropped_is_the_dense_forward():
    model, x, plan = post_norm(mode="batch")
    plan.set_p(1e-12)
    dense = torchdrop.remove_stochastic_depth(copy.deepcopy(model))
    torch.testing.assert_close(model(x), dense(x), rtol=1e-10, atol=1e-10)


def test_hooks_of_a_child_that_was_looked_through_fire():
    model, x, _ = post_norm()
    output = model.layers[0].attention.output
    fired = []
    output.register_forward_pre_hook(lambda m, args: fired.append("before"))
    output.register_forward_hook(lambda m, args, out: fired.append(tuple(out.shape)))
    model(x)
    assert fired == ["before", tuple(x.shape)]
    handle = output.register_forward_hook(lambda m, args, out: out * 0)
    inputs = []
    model.layers[0].intermediate.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(x)
    assert not inputs[0].any()
    handle.remove()


def test_hooks_that_cannot_be_honoured_are_refused():
    model, x, _ = post_norm()
    output = model.layers[0].attention.output
    handle = output.register_forward_pre_hook(lambda m, args: args)
    with pytest.raises(RuntimeError, match=r"pre-hook changes the arguments of output.*select="):
        model(x)
    handle.remove()
    output.register_full_backward_hook(lambda m, a, b: None)
    with pytest.raises(RuntimeError, match=r"output has backward hooks.*on its children"):
        model(x)


def test_a_child_that_begins_to_return_more_is_read_again():
    model, x, plan = post_norm()
    model(x)
    model.layers[0].attention.self.with_weights = True
    out, weights = model.layers[0](x)
    dense = torchdrop.remove_stochastic_depth(copy.deepcopy(model)).layers[0]
    # of every row: nothing of it can be left out
    torch.testing.assert_close(weights, dense.attention(x)[1])
    kept = plan.last_kept()
    rows = torch.zeros(6, 1, 1, dtype=x.dtype).index_fill_(0, kept["layers.0:attention"], 2.0)
    attention = dense.attention
    x = attention.output.norm(x + rows * attention.output.dense(attention.self(x)[0]))
    rows = torch.zeros(6, 1, 1, dtype=x.dtype).index_fill_(0, kept["layers.0:intermediate"], 2.0)
    x = dense.output.norm(x + rows * dense.output.dense(dense.intermediate(x)))
    torch.testing.assert_close(out, x, rtol=1e-10, atol=1e-10)


class Handed(nn.Module):
    """Attention that makes a bias in the first layer and hands it on, as T5 does."""

    def __init__(self, width, first):
        super().__init__()
        self.v = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(1, 5, 5)) if first else None

    def forward(self, x, bias=None):
        bias = self.bias * 2 if bias is None else bias
        return bias.softmax(-1) @ self.v(x).relu(), bias


class HandingLayer(nn.Module):
    def __init__(self, width, first):
        super().__init__()
        self.attention = Handed(width, first)

    def forward(self, x, bias=None):
        attended, bias = self.attention(x, bias)
        return x + attended, bias


class Handing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(HandingLayer(8, i == 0) for i in range(3))

    def forward(self, x):
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return x


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_what_is_handed_on_is_computed_and_the_rest_is_skipped(p):
    torch.manual_seed(0)
    model, x = Handing().double(), torch.randn(6, 5, 8, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, p, schedule="uniform", example_inputs=x)
    assert [block.action for block in plan.blocks] == ["skip"] * 3
    assert "computed for every row" in plan.blocks[0].reason
    assert not plan.blocks[1].reason
    seen = []
    for layer in model.layers:
        layer.attention.v.register_forward_hook(lambda m, a, out: seen.append(out.shape[0]))
    out = model(x)
    assert seen == ([3, 3, 3] if p < 1 else [])
    kept, expected = plan.last_kept(), x
    bias = model.layers[0].attention.bias * 2
    for i, layer in enumerate(model.layers):
        rows = torch.zeros(6, 1, 1, dtype=x.dtype)
        rows[kept[f"layers.{i}"]] = 1 / (1 - p) if p < 1 else 0.0
        expected = expected + rows * (bias.softmax(-1) @ layer.attention.v(expected).relu())
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


# Key/value caches


# Layer drop in a loop


class Sized(nn.Module):
    """Attention on a map that is handed around as a sequence and its size."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x, size):
        return self.proj(x).tanh(), [size[0], size[1]]


class SizedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Sized()

    def forward(self, x, size):
        y, size = self.attention(self.norm(x), size)
        return x + y, size


class SizedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(SizedBlock() for _ in range(2))

    def forward(self, x):
        size = [2, x.shape[1] // 2]
        for block in self.blocks:
            x, size = block(x, size)
        return x * size[1]


def test_a_size_that_a_child_returns_does_not_keep_its_branch_from_being_skipped():
    torch.manual_seed(0)
    model, x = SizedNet().double(), torch.randn(6, 4, 8, dtype=torch.double)
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    assert [block.action for block in plan.blocks] == ["skip", "skip"]
    for length in (4, 6, 4):  # another size, and the first again
        x = torch.randn(6, length, 8, dtype=torch.double)
        out = model(x)
        kept = plan.last_kept()
        expected, size = x, length // 2
        for name, block in zip(kept, dense.blocks, strict=True):
            mask = torch.zeros(6, 1, 1, dtype=torch.double)
            mask[kept[name]] = 2.0
            expected = expected + mask * block.attention(block.norm(expected), [2, size])[0]
        torch.testing.assert_close(out, expected * size, rtol=0, atol=1e-12)


class RestBlock(nn.Module):
    """Hands on what its attention returns besides, as one slice of the tuple."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), SelfAttention(8)

    def forward(self, x):
        out = self.attention(self.norm(x))
        return x + out[0], out[1:]


class RestNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(RestBlock() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(x)
        return x


def test_the_rest_of_a_tuple_is_what_it_was_or_is_read_again():
    torch.manual_seed(0)
    model, x = RestNet().double(), torch.randn(6, 5, 8, dtype=torch.double)
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    assert [block.action for block in plan.blocks] == ["skip", "skip"]
    out, rest = model.blocks[0](x)
    assert rest == (None,)
    rows = torch.zeros(6, 1, 1, dtype=x.dtype).index_fill_(0, plan.last_kept()["blocks.0"], 2.0)
    first = dense.blocks[0]
    torch.testing.assert_close(out, x + rows * first.attention(first.norm(x))[0])
    # now it is a tensor: of every row, and nothing of it can be left out
    model.blocks[0].attention.with_weights = first.attention.with_weights = True
    out, rest = model.blocks[0](x)
    torch.testing.assert_close(rest[0], first(x)[1][0])


class HandsOn(SelfAttention):
    """Hands on what it was given, besides."""

    def forward(self, x, mask=None):
        return super().forward(x, mask)[0], None, x


def test_the_rest_of_a_tuple_with_a_tensor_in_it_is_computed_for_all_rows():
    torch.manual_seed(0)
    model, x = RestNet().double(), torch.randn(6, 5, 8, dtype=torch.double)
    for block in model.blocks:
        block.attention = HandsOn(8).double()
    first = copy.deepcopy(model.blocks[0])
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    out, rest = model.blocks[0](x)
    assert rest[0] is None
    torch.testing.assert_close(rest[1], first.norm(x))
    rows = torch.zeros(6, 1, 1, dtype=x.dtype).index_fill_(0, plan.last_kept()["blocks.0"], 2.0)
    torch.testing.assert_close(out, x + rows * first.attention(first.norm(x))[0])
