"""Which additions are residual branches, in models nobody prepared; nothing is invented."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchdrop
from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.finding.split import called_modules
from torchdrop.tracing.block_graph import trace_block
from written_blocks import (
    LSTM,
    AddedInPlace,
    AddedInPlaceByMethod,
    AddedThroughAView,
    Alpha,
    AlphaOnTheSkip,
    AroundAModule,
    AroundAStack,
    Base,
    ChannelsLast,
    ConstantInside,
    Conv,
    Custom,
    Decorated,
    Gated,
    HidingItsActivation,
    InAHelper,
    InARow,
    Lambda,
    LinearAct,
    Loop,
    LoopOfPairs,
    Parallel,
    ParallelInBrackets,
    Parametrised,
    Plain,
    PostNorm,
    PreActivation,
    PreNorm,
    PythonSum,
    Quantizable,
    SeparateLists,
    ShapesAfterwards,
    SharedLayer,
    Shortcut,
    SqueezeExcite,
    Subtracted,
    W,
    conv,
    flat,
    maps,
    mlp,
    padded_by_cat,
    shared_block,
    stem,
    tokens,
    two,
)
from zoo import BARELY, assert_same, fingerprint, instance_names

Make = Callable[[], nn.Module]


# name: (model, input, blocks, branches)
FOUND: dict[str, tuple[Make, Callable[[], Tensor], int, int]] = {
    **{
        kind.__name__: (two(kind), flat, 2, 2)
        for kind in (
            Plain, AddedInPlaceByMethod, AddedInPlace, AddedThroughAView, Alpha, AlphaOnTheSkip,
            PythonSum, Quantizable, Subtracted, InAHelper, ParallelInBrackets, Gated,
            ConstantInside, ShapesAfterwards, Decorated, Parametrised,
        )
    },
    **{kind.__name__: (two(kind), flat, 2, 4) for kind in (PostNorm, PreNorm, Parallel)},
    "custom module with relu inside": (two(lambda: HidingItsActivation(Custom())), flat, 2, 2),
    "subclass of Linear with relu": (
        two(lambda: HidingItsActivation(LinearAct(W, W))), flat, 2, 2,
    ),
    "residual LSTM": (two(LSTM), tokens, 2, 2),
    "loop": (Loop, flat, 3, 3),
    "loop of pairs": (LoopOfPairs, flat, 2, 4),
    "separate lists": (SeparateLists, flat, 4, 4),
    "shared layer": (SharedLayer, flat, 1, 3),
    "shared block": (shared_block, flat, 1, 1),
    "several in a row": (InARow, flat, 1, 3),
    "global skip around a loop": (AroundAStack, flat, 3, 3),
    "global skip around a module": (AroundAModule, flat, 2, 2),
    "post-activation": (two(Conv, None, 4, 1), maps, 2, 2),
    "pre-activation": (
        lambda: nn.Sequential(PreActivation(False), PreActivation(True)), maps, 2, 2,
    ),
    "ResNet-D": (
        lambda: stem(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8))),
        maps, 2, 2,
    ),
    "option A by slice and pad": (lambda: stem(Shortcut()), maps, 2, 2),
    "option A by pool and cat": (lambda: stem(Lambda(padded_by_cat)), maps, 2, 2),
    "squeeze and excite": (two(SqueezeExcite), maps, 2, 2),
    "ConvNeXt-like": (two(ChannelsLast), maps, 2, 2),
}  # fmt: skip


def copies(model: nn.Module) -> list[nn.Module]:
    if any(nn.utils.parametrize.is_parametrized(m) for m in model.modules()):
        return [copy.deepcopy(model)]  # torch refuses to pickle these
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("name", FOUND)
def test_found_with_every_identity(name: str) -> None:
    make, given, blocks, branches = FOUND[name]
    model, x = make().double(), given().double()
    dense = copy.deepcopy(model)
    before, names = fingerprint(model), instance_names(model)
    found = torchdrop.find_residuals(model)
    assert (len(found), sum(len(r.branches) for r in found)) == (blocks, branches)
    assert [b.reason for r in found for b in r.branches if b.action != "skip"] == []

    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert fingerprint(model) == before
    with torch.no_grad():
        assert_same(model.eval()(x), dense.eval()(x))
    model.train(), dense.train()
    plan.set_p([BARELY] * blocks)
    y, y_dense = model(x), dense(x)
    assert_same(y, y_dense)
    weight = torch.randn_like(y)
    (y * weight).sum().backward(), (y_dense * weight).sum().backward()
    for (key, mine), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), key
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12, msg=key)

    # rows dropped: the same rows as a mask on everything computed in full
    masked = copy.deepcopy(dense)
    torchdrop.add_stochastic_depth(masked, 0.5, schedule="uniform", compute="mask")
    plan.set_p([0.5] * blocks)
    for twin in [model, *copies(model)]:
        twin.zero_grad(), masked.zero_grad()
        masked.load_state_dict(twin.state_dict())  # spectral_norm goes on in every forward
        torch.manual_seed(1)
        out = twin(x)
        torch.manual_seed(1)
        expected = masked(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        assert not torch.equal(out, y)
        (out * weight).sum().backward(), (expected * weight).sum().backward()
        for (key, mine), theirs in zip(twin.named_parameters(), masked.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10, msg=key)

    torchdrop.remove_stochastic_depth(model)
    assert fingerprint(model) == before
    assert instance_names(model) == names
    dense.load_state_dict(model.state_dict())
    assert_same(model(x), dense(x))


class PositionalEmbedding(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(x + self.gamma) + self.gamma


class NormGamma(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = (x - x.mean(-1, keepdim=True)) * (self.gamma + 1)
        return self.f(y) * (1 + self.g(x))


class Pyramid(nn.Module):
    """Top-down sums of laterals, given the maps of a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(3))
        self.out = nn.ModuleList(conv() for _ in range(3))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        last = self.lateral[-1](maps[-1])
        results = [self.out[-1](last)]
        for i in (1, 0):
            last = self.lateral[i](maps[i]) + F.interpolate(last, scale_factor=2.0)
            results.insert(0, self.out[i](last))
        return results


class PyramidWithItsBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(conv(4, 4, 2), nn.ReLU()) for _ in range(3))
        self.lateral = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.out = nn.ModuleList(conv() for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        c1 = self.stages[0](x)
        c2 = self.stages[1](c1)
        c3 = self.stages[2](c2)
        p3 = self.lateral[2](c3)
        p2 = self.lateral[1](c2) + F.interpolate(p3, scale_factor=2.0)
        p1 = self.lateral[0](c1) + F.interpolate(p2, scale_factor=2.0)
        return [self.out[0](p1), self.out[1](p2), self.out[2](p3)]


class Gate(Base):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.sigmoid(self.g(x))
        return z * self.f(x) + (1 - z) * x


class Loss(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return (self.g(y) - x).square().mean() + 0.1 * y.abs().mean()


class MaskedScores(Base):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.f(x) + torch.zeros(W).masked_fill(x[0] > 0, -1.0)
        return scores.softmax(-1) @ self.gamma


class RepVGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + self.b(x) + self.norm(x))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down = conv(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cat([x, F.relu(self.conv(x))], 1))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x)) + F.relu(self.b(x)) + F.relu(self.c(x))


class AddsNothing(nn.Module):
    """Pools are skips; they make no branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), conv()

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.max_pool2d(x, 3, 1, 1) + F.relu(x)
        return self.conv(x) + F.relu(x)


NOT_FOUND: dict[str, Make] = {
    kind.__name__: two(kind)
    for kind in (
        PositionalEmbedding, NormGamma, Pyramid, PyramidWithItsBackbone, Gate, Loss, MaskedScores,
        RepVGG, Dense, Inception, AddsNothing,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FOUND)
def test_nothing_is_invented(name: str) -> None:
    model = NOT_FOUND[name]()
    assert [r.name for r in torchdrop.find_residuals(model)] == []
    with pytest.raises(ValueError, match="no residual branches found"):
        torchdrop.add_stochastic_depth(model)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1) >= self.drop_prob) if self.training else x


class PartlyAdded(nn.Module):
    """Adds the skip to some of the channels that its drop path covers, and uses the others."""

    def __init__(self, width: int, rate: float | None) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width + 2)
        self.drop_path = None if rate is None else DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).relu()
        if self.drop_path is not None:
            y = self.drop_path(y)
        return torch.cat([y[:, : x.shape[1]] + x, y[:, x.shape[1] :].exp()], 1)


def test_a_drop_path_that_covers_more_than_the_branch_is_left_alone() -> None:
    dense = nn.Sequential(PartlyAdded(4, None), PartlyAdded(6, None))
    assert [r.action for r in torchdrop.find_residuals(dense)] == ["mask", "mask"]
    model = nn.Sequential(PartlyAdded(4, 0.5), PartlyAdded(6, 0.5))
    assert torchdrop.find_residuals(model) == []
    with pytest.raises(ValueError, match="its own drop path covers more than the branch"):
        torchdrop.add_stochastic_depth(model, None)


class ReturnsMore(Base):
    """An attention weight that is returned: the branch is needed by others."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.f(x)
        return x + y, y


def test_a_branch_that_is_used_elsewhere_is_masked_with_the_reason() -> None:
    model = nn.ModuleDict({"a": ReturnsMore(), "b": ReturnsMore()})
    plan = torchdrop.add_stochastic_depth(model, [1.0, 1.0])
    assert all(r.reason.endswith(".f is used outside the branch, too") for r in plan.blocks)
    x = flat()
    out, y = model["a"](x)
    assert_same(out, x)
    assert bool(y.any())


class WritesIntoAConstant(Base):
    """The table is made after ``n1`` and from its dtype, and is written into."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.n1(x)
        table = torch.zeros(h.shape[-1], dtype=h.dtype)
        table[0] = 1.0
        table[1:] += 0.5
        return x + self.f(h * table)


class WritesIntoAConstantUsedTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.n1(x)
        table = torch.zeros(h.shape[-1], dtype=h.dtype)
        table[0] = 1.0
        return (x + self.f(h * table)) * table


class WritesOfTheBatch(Base):
    """What is written depends on all rows, which only a proof can see."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.n1(x)
        table = torch.zeros(h.shape[-1], dtype=h.dtype)
        table[:] = h.detach().mean(0)
        return x + self.f(h * table)


class FilledPartByPart(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.n1(x)
        out = torch.empty_like(h)
        out[:, :2] = h[:, 2:4]
        out[:, 2:] = torch.tanh(h)[:, : W - 2]
        out[:, 0].mul_(0.5)
        return x + self.f(out)


class FilledAfterwards(Base):
    """A part of the tensor is returned in another way, too."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:, :2] = x[:, 2:4]
        out[:, 2:] = self.n1(x)[:, : W - 2]
        return x + self.f(out) + 0.1 * out


@pytest.mark.filterwarnings("ignore:.*its rows depend on each other")
@pytest.mark.parametrize(
    ("kind", "all_rows"),
    [
        (WritesIntoAConstant, False),
        (WritesIntoAConstantUsedTwice, True),
        (WritesOfTheBatch, True),
        (FilledPartByPart, False),
        (FilledAfterwards, True),
    ],
)
def test_a_tensor_that_is_written_into_is_made_in_the_branch_that_uses_it(
    kind: type[Base], all_rows: bool
) -> None:
    """So that what it is made after, as ``n1`` here, is computed for the kept rows only."""
    torch.manual_seed(0)
    model = two(kind)().double().train()
    dense, x = copy.deepcopy(model), torch.randn(6, W, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    rows: list[int] = []
    for block in model.blocks:
        block.n1.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    out = model.blocks[0](x)
    kept = next(iter(plan.last_kept().values()))
    assert rows == [6 if all_rows else len(kept)]
    wanted = torch.where(torch.isin(torch.arange(6), kept)[:, None], dense.blocks[0](x), x)
    if not all_rows:
        torch.testing.assert_close(out[kept], (x + 2 * (wanted - x))[kept])
        dropped = [row for row in range(6) if row not in kept]
        assert torch.equal(out[dropped], x[dropped])


class AddsAnEmbeddingAgain(nn.Module):
    """The input of the second branch was computed with ``bias``, which is no shortcut of it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.skip = mlp(), mlp(), nn.Linear(W, W)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + (self.f(x) + bias)
        x = self.skip(x) + (self.g(x) + bias)
        return x


class AddsToItsBranch(AddsAnEmbeddingAgain):
    """The branch is computed with ``bias``, and ``bias`` is added to it, too."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + (self.f(x + bias) + bias)
        return (bias + self.g(x * bias)) + x


class AddsItsBranchToBias(AddsAnEmbeddingAgain):
    """The twin: the branch is added to ``x``, and ``bias`` to their sum."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = (x + self.f(x + bias)) + bias
        return (x + self.g(x * bias)) + bias


def test_the_first_argument_is_the_stream_to_which_branches_are_added() -> None:
    for kind in (AddsToItsBranch, AddsItsBranchToBias):
        sums = read_residual_sums(trace_block(kind()))
        assert [called_modules(entry.split) for entry in sums] == [["f"], ["g"]]
        ends_with_sum = [entry.split.branch.target is operator.add for entry in sums]
        assert ends_with_sum == [kind is AddsToItsBranch] * 2


class SecondStream(nn.Module):
    """A summary of the tokens with residuals of its own, which is added to the tokens, too."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Sequential(nn.Linear(2 * W, W), nn.GELU(), nn.Linear(W, W)), mlp()

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t + self.f(torch.cat([t, x.mean(1)], -1))
        return x + self.g(t)[:, None], t


def test_a_second_stream_keeps_its_residuals() -> None:
    sums = read_residual_sums(trace_block(SecondStream()))
    assert "f" in [path for entry in sums for path in called_modules(entry.split)]
    assert sums[0].split.skip.name == "t"


def test_an_embedding_that_is_added_in_every_branch_is_no_shortcut() -> None:
    sums = read_residual_sums(trace_block(AddsAnEmbeddingAgain()))
    assert [(entry.split.skip.name, called_modules(entry.split)) for entry in sums] == [
        ("x", ["f"]),
        ("skip", ["g"]),
    ]
