"""Sums that cover a part of the channels: the skip is padded, and the branch is dropped whole."""

import copy
import itertools

import pytest
import torch
from torch import nn

import torchdrop
import zoo
from torchdrop.tracing.traced_functions import add_padded, pad_like

WIDTHS = (4, 4, 6, 7)


class Partial(nn.Module):
    def __init__(self, wide_in, wide_out, mask=None):
        super().__init__()
        self.width = wide_in
        self.body = nn.Sequential(
            nn.Conv2d(wide_in, 8, 1), nn.ReLU(), nn.Conv2d(8, wide_out, 3, padding=1)
        )
        self.mask = mask or nn.Identity()
        # the branch is no module of its own
        self.weight = nn.Parameter(torch.linspace(1, 2, wide_out).view(-1, 1, 1))


class Concatenated(Partial):
    def forward(self, x):
        y = self.mask(self.body(x) * self.weight)
        return torch.cat([y[:, : self.width] + x, y[:, self.width :]], dim=1)


class SkipFirst(Partial):
    def forward(self, x):
        y = self.mask(self.weight * self.body(x))
        c = x.shape[1]
        return torch.cat((x + y[:, 0:c], y[:, x.shape[1] :]), 1)


class FromTheEnd(Partial):
    def forward(self, x):
        y = self.mask(self.body(x) * self.weight)
        return torch.cat([y[..., : self.width, :, :] + x, y[..., self.width :, :, :]], -3)


class Divided(Partial):
    def forward(self, x):
        y = self.mask(self.body(x) * self.weight)
        first, rest = y.split([self.width, y.shape[1] - self.width], 1)
        return torch.cat([first + x, rest], 1)


class Written(Partial):
    def forward(self, x):
        y = self.mask(self.body(x) * self.weight)
        y[:, 0 : self.width] += x
        return y.relu()


FORMS = [Concatenated, SkipFirst, FromTheEnd, Divided, Written]


def net(kind, mask=None):
    torch.manual_seed(0)
    return nn.Sequential(*(kind(a, b, mask) for a, b in itertools.pairwise(WIDTHS)))


def reference(model, x, kept):
    """Every block's branch times its mask, and then the model's own sum."""
    handles = [
        block.mask.register_forward_hook(
            lambda module, args, out, keep=keep: out * 2.0 * keep.view(-1, 1, 1, 1).to(out.dtype)
        )
        for block, keep in zip(model, kept, strict=True)
    ]
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


def difference(kind, mask=None, verify=True):
    """How far outputs and gradients with rows dropped are from those of masks."""
    dense = net(kind, mask).double()
    for block in dense:
        block.mask = nn.Identity()
    model = net(kind, mask).double()
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", verify=verify)
    assert [b.action for r in plan.blocks for b in r.branches] == ["skip"] * 3
    out = model.train()(x)
    out.sin().sum().backward()
    kept = []
    for rows in plan.last_kept().values():
        kept.append(torch.zeros(6, dtype=torch.bool))
        kept[-1][rows] = True
    theirs = reference(dense, x, kept)
    theirs.sin().sum().backward()
    pairs = zip(model.parameters(), dense.parameters(), strict=True)
    gradients = [(a.grad - b.grad).abs().max().item() for a, b in pairs]
    return max((out - theirs).abs().max().item(), *gradients)


@pytest.mark.parametrize("kind", FORMS)
def test_dropped_rows_are_padded_skips(kind):
    assert difference(kind) < 1e-12


def test_the_check_of_dropped_rows_can_fail(monkeypatch):
    monkeypatch.setattr(
        "torchdrop.running.split_site.pad_like", lambda *args: pad_like(*args) + 1e-6
    )
    assert difference(Concatenated, verify=False) > 1e-8
    with pytest.raises(RuntimeError, match="does not compute what its own forward computes"):
        difference(Concatenated)


@pytest.mark.parametrize("kind", FORMS)
def test_its_own_mask_is_taken_over(kind):
    mask = torchdrop.DropPath(0.2)
    model = net(kind, mask)
    plan = torchdrop.add_stochastic_depth(model, p=None)
    assert [b.p for r in plan.blocks for b in r.branches] == [0.2] * 3


@pytest.mark.parametrize("kind", FORMS)
def test_invariants(kind):
    for _, check in zoo.checks(net(kind), torch.randn(5, 4, 5, 5)):
        check()


@pytest.mark.parametrize("scale", ["train", "eval"])
def test_everything_dropped_leaves_the_padded_input(scale):
    model, x = net(Concatenated), torch.randn(5, 4, 5, 5)
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform", scale=scale)
    padded = nn.functional.pad(x, [0, 0, 0, 0, 0, 3])
    assert torch.equal(model.train()(x), padded)
    if scale == "eval":
        assert torch.equal(model.eval()(x), padded)


def test_batch_statistics_are_not_touched_to_learn_the_size():
    model = nn.Sequential(*(Concatenated(a, a + 2) for a in (4, 6)))
    for block in model:
        block.body.append(nn.BatchNorm2d(block.width + 2))
    torchdrop.add_stochastic_depth(model, 1.0, schedule="uniform")
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    model.train()(torch.randn(4, 4, 5, 5))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_masked_where_that_is_asked_for():
    model, x = net(Concatenated), torch.randn(6, 4, 5, 5)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", compute="mask")
    out = model.train()(x)
    assert out.shape == (6, 7, 5, 5)
    kept = set.intersection(*({*range(6)} - {*rows.tolist()} for rows in plan.last_kept().values()))
    for row in kept:  # dropped in every block
        assert torch.equal(out[row], nn.functional.pad(x[row], [0, 0, 0, 0, 0, 3]))


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_compiled(p):
    model, x = net(Concatenated), torch.randn(6, 4, 5, 5)
    torchdrop.add_stochastic_depth(model, p, schedule="uniform", example_inputs=x)
    torch.compiler.reset()
    compiled = torch.compile(model.train(), fullgraph=True, backend="eager")
    out = compiled(x)
    assert out.shape == (6, 7, 5, 5)
    if p == 1.0:
        assert torch.equal(out, nn.functional.pad(x, [0, 0, 0, 0, 0, 3]))


def test_a_compiled_model_has_to_know_its_sizes():
    model, x = net(Concatenated), torch.randn(6, 4, 5, 5)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    torch.compiler.reset()
    with pytest.raises(
        RuntimeError, match=r"the number of channels of 0 is .* example_inputs, or call"
    ):
        torch.compile(model.train(), fullgraph=True, backend="eager")(x)


class SkipIsWide(Partial):
    """The branch covers a part of the skip: a plain addition, and the rest is no branch."""

    def __init__(self, wide):
        super().__init__(wide, wide // 2)

    def forward(self, x):
        c = self.width // 2
        return torch.cat([x[:, :c] + self.body(x) * self.weight, x[:, c:]], 1)


class OtherRest(Partial):
    """The two parts do not meet."""

    def forward(self, x):
        y = self.body(x) * self.weight
        return torch.cat([y[:, : self.width] + x, y[:, self.width - 1 :]], 1)


class UsedBefore(Partial):
    def forward(self, x):
        y = self.body(x) * self.weight
        seen = y.flatten(1)
        y[:, 0 : self.width] += x
        return y + seen.mean()


@pytest.mark.parametrize("kind", [SkipIsWide, OtherRest, UsedBefore])
def test_what_is_no_padded_sum_is_left_as_it_is(kind):
    blocks = [kind(4) if kind is SkipIsWide else kind(4, 4) for _ in range(2)]
    graph = torchdrop.tracing.block_graph.trace_block(blocks[0]).graph
    assert not [n for n in graph.nodes if n.target is add_padded]
