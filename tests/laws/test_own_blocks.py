"""What users write: residuals in every form, against the same block by hand with weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
import written_blocks as written
from written_blocks import W, mlp
from zoo import assert_same

B = 8
Weigh = Callable[[int, Tensor], Tensor]


def two_norms_last(b: Any, x: Tensor, w: Weigh) -> Tensor:
    x = b.n1(x + w(0, b.f(x)))
    out: Tensor = b.n2(x + w(1, b.g(x)))
    return out


def two_norms_first(b: Any, x: Tensor, w: Weigh) -> Tensor:
    x = x + w(0, b.f(b.n1(x)))
    return x + w(1, b.g(b.n2(x)))


def three_in_a_row(b: Any, x: Tensor, w: Weigh) -> Tensor:
    x = x + w(0, b.a(x))
    x = x + w(1, b.b(x))
    return x + w(2, b.c(x))


def pre_activation(b: Any, x: Tensor, w: Weigh) -> Tensor:
    y = torch.relu(b.norm1(x))
    shortcut: Tensor = x if b.shortcut is None else b.shortcut(y)
    return shortcut + w(0, b.conv2(torch.relu(b.norm2(b.conv1(y)))))


def post_activation(b: Any, x: Tensor, w: Weigh) -> Tensor:
    return torch.relu(x + w(0, b.conv2(torch.relu(b.conv1(x)))))


class PostActivation(nn.Module):
    """An activation in place behind the sum, as in torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.conv2(self.relu(self.conv1(x))) + x)
        return y


class Directed(nn.Module):
    """Control flow on data outside the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(written.Plain() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e9:
            return x
        for block in self.blocks:
            x = block(x)
        return x if x.sum() == x.sum() else -x


def pair(kind: Callable[..., nn.Module], *args: Any) -> Callable[[], nn.Module]:
    return lambda: written.Stack(kind(*args), kind(*args))


def plain(b: Any, x: Tensor, w: Weigh) -> Tensor:
    return x + w(0, b.f(x))


# By hand: the output of a block, each branch handed to ``w``, with its number, before it is added.
FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor, Weigh], Tensor]]] = {
    "plain": (pair(written.Plain), plain),
    "x.add_(f(x))": (pair(written.AddedInPlaceByMethod), plain),
    "x += f(x)": (pair(written.AddedInPlace), plain),
    "added through a view": (pair(written.AddedThroughAView), plain),
    "torch.add, alpha": (pair(written.Alpha), lambda b, x, w: x + w(0, 0.5 * b.f(x))),
    "alpha on the skip": (pair(written.AlphaOnTheSkip), lambda b, x, w: 0.5 * x + w(0, b.f(x))),
    "sum([...])": (pair(written.PythonSum), plain),
    "FloatFunctional.add": (pair(written.Quantizable), plain),
    "subtracted": (pair(written.Subtracted), lambda b, x, w: x - w(0, b.f(x))),
    "in a helper": (
        pair(written.InAHelper), lambda b, x, w: x + w(0, b.f(b.n1(x)) * b.gamma),
    ),
    "gated": (
        pair(written.Gated),
        lambda b, x, w: x + w(0, torch.sigmoid(b.g(x)) * b.f(x) * b.gamma),
    ),
    "parallel": (
        pair(written.Parallel), lambda b, x, w: x + w(0, b.f(b.n1(x))) + w(1, b.g(b.n2(x))),
    ),
    "norm last": (pair(written.PostNorm), two_norms_last),
    "norm first": (pair(written.PreNorm), two_norms_first),
    "several in one forward": (pair(written.InARow), three_in_a_row),
    "LSTM, which returns states, too": (
        pair(written.LSTM), lambda b, x, w: x + w(0, b.lstm(x)[0]),
    ),
    "pre-activation": (pair(written.PreActivation, False), pre_activation),
    "pre-activation, strided": (
        lambda: nn.Sequential(written.PreActivation(False), written.PreActivation(True)),
        pre_activation,
    ),
    "post-activation, in place": (pair(PostActivation), post_activation),
    "a block used twice": (written.shared_block, plain),
    "control flow on data outside": (Directed, plain),
}  # fmt: skip


@pytest.mark.parametrize("sampling", ["exact", "independent"])
@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_residual(name: str, sampling: str) -> None:
    make, by_hand = FORMS[name]
    model = make().double()
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", sampling=sampling)
    assert {b.action for r in plan.blocks for b in r.branches} == {"skip"}
    kept: list[list[Tensor]] = []  # of each call of a block, in order
    for block in plan.blocks:
        own = [branch.name for branch in block.branches]
        block.module.register_forward_hook(
            lambda m, a, out, own=own: kept.append([plan.last_kept()[n] for n in own])
        )
    if "activation" in name:
        x = torch.randn(B, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    else:
        shape = (B, 5, W) if "LSTM" in name else (B, W)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    out = model(x)
    drawn = [rows for call in kept for rows in call]
    assert 0 < sum(map(len, drawn)) < B * len(drawn)

    expected, calls = twin, iter(kept)
    blocks: Any = dense.blocks if hasattr(dense, "blocks") else dense
    for block in blocks:
        rows = next(calls)

        def w(i: int, y: Tensor, rows: list[Tensor] = rows) -> Tensor:
            weight = torch.zeros(B, dtype=y.dtype)
            weight[rows[i]] = 2.0
            return y * weight.view(-1, *[1] * (y.dim() - 1))

        expected = by_hand(block, expected, w)
    assert next(calls, None) is None
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(out)
    (out * direction).sum().backward(), (expected * direction).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-10)
    for (key, mine), theirs in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        assert (mine.grad is None) == (theirs[1].grad is None), key
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs[1].grad, rtol=0, atol=1e-10, msg=key)


def test_a_lone_encoder_layer_is_a_stack_of_its_two_residuals() -> None:
    model = written.PreNorm()
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert [len(r.branches) for r in plan.blocks] == [2]
    lone = written.Plain()
    with pytest.raises(ValueError, match=r"no residual branches found in this Plain.*select="):
        torchdrop.add_stochastic_depth(lone, 0.5)
    assert len(torchdrop.add_stochastic_depth(lone, 0.5, select=lambda r: True).blocks) == 1


# --- children that cannot be read ----------------------------------------------------------------


class Overwriting(nn.Module):
    """Writes into its input, which nobody can read off its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() != 0:
            x.relu_()
        y: Tensor = self.f(x)
        return y


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Overwriting()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.child(x)


def test_a_child_that_overwrites_the_skip_unseen_is_an_error_not_another_result() -> None:
    model, x = written.Stack(Around(), Around()), torch.randn(B, W)
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(model, [0.5, 0.5], verify=False)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"blocks\.0 writes into.*compute='mask'"),
    ):
        model(x.clone())
    plan.set_p([0.0, 0.0])
    torchdrop.remove_stochastic_depth(model)
    # masked, it means what it meant
    plan = torchdrop.add_stochastic_depth(model, [1e-30, 1e-30], compute="mask")
    with torch.no_grad():
        assert_same(model(x.clone()), dense(x.clone()))


@pytest.mark.parametrize("example", [True, False])
def test_a_proof_masks_a_child_that_overwrites_the_skip_unseen(example: bool) -> None:
    """What the branch writes stays written in every row, as with a DropPath at its place."""
    model, x = written.Stack(Around(), Around()), torch.randn(B, W)
    given = {"example_inputs": x} if example else {}
    blocks = copy.deepcopy(model).blocks

    def attach_and_run() -> tuple[Any, Tensor]:
        plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", **given)
        return plan, model(x.clone().requires_grad_().clone())

    with pytest.warns(UserWarning, match=r"blocks\.0 is computed for all rows.*writes into"):
        plan, out = attach_and_run()
    assert [block.action for block in plan.blocks] == ["mask", "mask"]
    for block, rows in zip(blocks, plan.last_kept().values(), strict=True):
        keep = torch.zeros(B, 1)
        keep[rows] = 2.0
        x = x.clone()
        branch = block.child(x)  # which overwrites x
        x = x + keep * branch
    assert_same(out, x, 1e-6)


class WithShortcut(nn.Module):
    """Adds what it is given, or its own input where it is given nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if shortcut is None:
            shortcut = x
        x = self.f(x) + shortcut
        return x + self.g(x)


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(W, W)
        self.one, self.two = WithShortcut(), WithShortcut()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x, self.project(x)))
        return out


@pytest.mark.parametrize("example", [True, False])
def test_what_is_added_depends_on_what_the_parent_gives(example: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Tree(), Tree()).double(), torch.randn(B, W, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", example_inputs=x if example else None
    )
    # what a block adds that was handed to it is none of its residuals
    assert {r.name: len(r.branches) for r in plan.blocks} == {
        "0.one": 1, "0.two": 2, "1.one": 1, "1.two": 2,
    }  # fmt: skip
    out = model.train()(x)
    kept = iter(plan.last_kept().values())

    def weighed(branch: Tensor) -> Tensor:
        rows = torch.zeros(B, 1, dtype=x.dtype)
        rows[next(kept)] = 2.0
        return rows * branch

    for tree in model:
        y = tree.one.f(x) + tree.project(x)
        y = y + weighed(tree.one.g(y))
        y = y + weighed(tree.two.f(y))
        x = y + weighed(tree.two.g(y))
    assert_same(out, x, 1e-12)
    assert next(kept, None) is None


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("example", [True, False])
def test_it_is_noticed_as_soon_as_the_child_runs(mode: str, example: bool) -> None:
    """For some rows, for all of them, or with ``example_inputs`` before anything is dropped."""
    model, x = written.Stack(Around(), Around()), torch.randn(B, W)
    message = r"blocks\.0 writes into.*compute='mask'"
    if example:
        with pytest.raises(RuntimeError, match=message):
            torchdrop.add_stochastic_depth(
                model, [1.0, 1.0], mode=mode, example_inputs=x, verify=False
            )
        assert not torchdrop.has_stochastic_depth(model)
        return
    plan = torchdrop.add_stochastic_depth(model, [1e-30, 1e-30], mode=mode, verify=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        model(x.clone())
    plan.set_p([1.0, 1.0])
    with torch.no_grad():  # nothing runs, so nothing is written
        assert_same(model(x.clone()), x)


# --- sums of different shapes --------------------------------------------------------------------


class Pooling(nn.Module):
    """Adds one vector to all steps of a sample."""

    def __init__(self, over: int = 1) -> None:
        super().__init__()
        self.f, self.over = mlp(), over

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.f(x.mean(self.over, keepdim=True))
        return x + y


class Querying(nn.Module):
    """Makes several steps of one: the skip is broadcast, and the sum is larger than it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.queries = mlp(), nn.Parameter(torch.randn(5, W))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f(x) * self.queries).amax(1, keepdim=True)


@pytest.mark.parametrize(("over", "compute"), [(1, "auto"), (1, "mask"), (0, "mask")])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_branch_that_is_broadcast(mode: str, over: int, compute: str) -> None:
    """One value for all steps of a row; or, where it may be masked only, one row for all."""
    model = written.Stack(Pooling(over), Pooling(over)).double()
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", mode=mode, compute=compute
    )
    x = torch.randn(B, 5, W, dtype=torch.float64)
    for _ in range(4):
        model.zero_grad(), dense.zero_grad()
        out, expected = model(x), x
        for block, rows in zip(dense.blocks, plan.last_kept().values(), strict=True):
            weight = torch.zeros(B, 1, 1, dtype=x.dtype)
            weight[rows] = 2.0
            expected = expected + weight * block.f(expected.mean(over, keepdim=True))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        out.square().sum().backward(), expected.square().sum().backward()
        for mine, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"compute": "mask"}, {"mode": "batch"}, {"example": 1}])
def test_a_skip_that_is_broadcast_is_refused(options: dict[str, Any]) -> None:
    model, x = written.Stack(Querying(), Querying()), torch.randn(B, 1, W)
    rates = [1e-30, 1e-30]
    if options.pop("example", 0):
        with pytest.raises(ValueError, match=r"blocks\.0 of shape .*broadcasts its skip"):
            torchdrop.add_stochastic_depth(model, rates, example_inputs=x)
        assert not torchdrop.has_stochastic_depth(model)
        return
    plan = torchdrop.add_stochastic_depth(model, rates, **options)
    message = r"blocks\.0 of shape \(8, 5, 6\) broadcasts its skip.*select="
    with pytest.raises(ValueError, match=message):
        model(x)
    if not options:
        plan.set_p([0.5, 0.5])
        with pytest.raises(ValueError, match=r"the shape of its skip: for 4 kept rows.*select="):
            model(x)


class Recurrent(nn.Module):
    """A block with an input whose batch is on dimension 1: (layers, batch, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(W, W, num_layers=2, batch_first=True)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        return x + self.lstm(x, state)[0]


class Recurrents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Recurrent() for _ in range(3))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(x, state)
        return x


@pytest.mark.parametrize("batch", [2, 5])  # as many as layers, too
@pytest.mark.parametrize("told", [True, False])
def test_a_state_with_the_batch_on_another_dimension(batch: int, told: bool) -> None:
    model = Recurrents().double().train()
    x = torch.randn(batch, 4, W, dtype=torch.float64)
    state = tuple(torch.randn(2, batch, W, dtype=torch.float64) for _ in range(2))
    example = {"x": x, "state": state} if told else None
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=example)
    # without an example nothing says which dimension of which tensor is the batch: masked
    assert {b.action for one in plan.blocks for b in one.branches} == {"skip" if told else "mask"}
    out = model(x, state)
    kept = list(plan.last_kept().values())
    for block, rows in zip(model.blocks, kept, strict=True):
        mask = torch.zeros(batch, 1, 1, dtype=torch.float64)
        mask[rows] = 2.0
        x = x + mask * block.lstm(x, state)[0]
    torch.testing.assert_close(out, x)


class Held:
    def __init__(self, scale: Any) -> None:
        self.scale = scale


class Scaled(nn.Module):
    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.first, self.second, self.hidden = nn.Linear(W, W), nn.Linear(W, W), hidden

    def forward(self, x: Tensor, by: Any) -> Tensor:
        scale = by.scale if self.hidden else float(by[0])
        return x + self.second(self.first(x).relu()) * scale


class AllScaled(nn.Module):
    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scaled(hidden) for _ in range(3))

    def forward(self, x: Tensor, by: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, by)
        return x


@pytest.mark.parametrize("example", [True, False])
def test_a_tensor_inside_an_object_is_not_left_whole(example: bool) -> None:
    """Its rows cannot be selected, so the branch is masked; each call uses the tensor it got."""
    x, by = torch.randn(B, W), Held(torch.randn(B, 1))
    model = AllScaled(True)
    dense = copy.deepcopy(model)
    given = {"example_inputs": {"x": x, "by": by}} if example else {}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with an example the proof finds it, and warns
        plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", **given)
        out = model(x, by)
    assert [block.action for block in plan.blocks] == ["mask"] * 3
    for _ in range(3):
        expected = x
        for block, rows in zip(dense.blocks, plan.last_kept().values(), strict=True):
            keep = torch.zeros(B, 1)
            keep[rows] = 2.0
            expected = expected + keep * block.second(block.first(expected).relu()) * by.scale
        torch.testing.assert_close(out, expected)
        by = Held(torch.randn(B, 1))
        out = model(x, by)


def test_an_array_among_the_arguments_is_a_constant_that_may_change() -> None:
    numpy = pytest.importorskip("numpy")
    x = torch.randn(B, W)
    model = AllScaled(False)
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(
        model, 1e-12, example_inputs={"x": x, "by": numpy.array([2.0, 1.0])}
    )
    for number in (2.0, 3.0, 2.0):
        by = numpy.array([number, 1.0])
        torch.testing.assert_close(model(x, by), dense(x, by))
