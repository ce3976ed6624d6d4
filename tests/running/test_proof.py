"""Blocks are proved on real calls: numbers are right or rows masked, and nobody notices."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchdrop
from torchdrop.running import split_site, unseen

B, W = 8, 4


class Block(nn.Module):
    """``x + f(x)``, where ``f`` is given as a function of the block and x."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(W, W), nn.Linear(W, W)
        self.branch = Branch(self.fc1, self.fc2, f)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Branch(nn.Module):
    """A branch whose forward is a function that torch.fx does not look into."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.f = fc1, fc2, f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def stack(f: Callable[[Any, Tensor], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(f), Block(f)).double()


def by_hand(model: nn.Sequential, x: Tensor, kept: dict[str, Tensor], p: float = 0.5) -> Tensor:
    """Every branch computed for all rows of the dense model, and masked."""
    for block, rows in zip(model, kept.values(), strict=True):
        weights = torch.zeros(len(x), *[1] * (x.dim() - 1), dtype=x.dtype)
        weights[rows] = 1.0 / (1.0 - p)
        x = x + weights * block.branch(x)
    return x


def attach_and_run(model: nn.Module, *inputs: Tensor, **given: Any) -> tuple[Any, list[Tensor]]:
    """Attach, and run the model in training on each of ``inputs``."""
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", **given)
    return plan, [model(x) for x in inputs]


def hidden(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(m.fc1(x))


def neighbours(m: Any, x: Tensor) -> Tensor:
    h = hidden(m, x)
    return m.fc2(h + torch.cat([h[1:], torch.zeros_like(h[:1])]))


def contrast(m: Any, x: Tensor) -> Tensor:
    h = hidden(m, x)
    return m.fc2((h @ h.T).softmax(-1) @ h)


def one_of_two(m: Any, x: Tensor) -> Tensor:
    """Rows in pairs: the first of each pair gets a little of the second."""
    h = hidden(m, x)
    h = h.clone()
    h[0::2] = h[0::2] + 1e-4 * h[1::2]
    return m.fc2(h)


def by_place(m: Any, x: Tensor) -> Tensor:
    places = torch.arange(len(x), dtype=x.dtype)[:, None]
    return m.fc2(hidden(m, x) * (1.0 + 0.1 * places))


DEPENDENT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean over the batch": lambda m, x: m.fc2(hidden(m, x) - hidden(m, x).mean(0)),
    "neighbours": neighbours,
    "contrast": contrast,
    "sort": lambda m, x: m.fc2(hidden(m, x).sort(0).values),
    "cumsum": lambda m, x: m.fc2(hidden(m, x).cumsum(0)),
    "softmax over the batch": lambda m, x: m.fc2(hidden(m, x).softmax(0)),
    "size of the batch": lambda m, x: m.fc2(hidden(m, x) / x.shape[0]),
    "first row": lambda m, x: m.fc2(hidden(m, x) + hidden(m, x)[:1]),
    "norm without statistics": lambda m, x: m.fc2(
        functional.batch_norm(hidden(m, x), None, None, training=True)
    ),
    "a little, in pairs": one_of_two,
    "place in the batch": by_place,
    "squeeze": lambda m, x: m.fc2(hidden(m, x.unsqueeze(0)).squeeze()),
}

INDEPENDENT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: m.fc2(hidden(m, x)),
    "norm of a row": lambda m, x: m.fc2(functional.layer_norm(hidden(m, x), (W,))),
    "sort in a row": lambda m, x: m.fc2(hidden(m, x).sort(-1).values),
    "dropout": lambda m, x: m.fc2(functional.dropout(hidden(m, x), 0.5)),
    "noise": lambda m, x: m.fc2(hidden(m, x) + torch.rand_like(x)),
    "reshape over rows": lambda m, x: m.fc2(hidden(m, x).reshape(-1, 2).tanh().reshape(-1, W)),
    "infinite values": lambda m, x: m.fc2(hidden(m, x)) / torch.zeros(W, dtype=x.dtype),
}


@pytest.mark.parametrize("example", [True, False], ids=["example", "first call"])
@pytest.mark.parametrize("name", DEPENDENT)
def test_a_branch_whose_rows_depend_on_each_other_is_masked(name: str, example: bool) -> None:
    model = stack(DEPENDENT[name])
    dense, x = copy.deepcopy(model), torch.randn(B, W, dtype=torch.double)
    given = {"example_inputs": torch.randn(4, W, dtype=torch.double)} if example else {}
    with pytest.warns(UserWarning, match=r"0 is computed for all rows and masked") as caught:
        plan, (out,) = attach_and_run(model, x, **given)
    assert len(caught) == 1  # one for both blocks
    torch.testing.assert_close(out, by_hand(dense, x, plan.last_kept()))
    for size in (4, B):
        x = torch.randn(size, W, dtype=torch.double)
        torch.testing.assert_close(model(x), by_hand(dense, x, plan.last_kept()))
    assert [block.action for block in plan.blocks] == ["mask", "mask"]
    assert [block.branches[0].proved for block in plan.blocks] == [False, False]
    assert "depend on each other" in repr(plan)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("apart", [1, 4], ids=["in pairs", "across the halves"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_small_dependence_is_seen_in_float32(size: int, apart: int, first: int) -> None:
    """Smaller than what a smaller batch may round differently."""

    def little(m: Any, x: Tensor) -> Tensor:
        h = hidden(m, x)
        rows = [i for i in range(len(h)) if i // apart % 2 == first]
        partners = [(i + apart if first == 0 else i - apart) % len(h) for i in rows]
        return m.fc2(h.index_add(0, torch.tensor(rows), 1e-4 * h[partners]))

    model = stack(little).float()
    x = torch.randn(size if apart == 1 else max(size, 8), W)
    with pytest.warns(UserWarning, match="its rows depend on each other"):
        plan, _ = attach_and_run(model, x)
    assert [block.action for block in plan.blocks] == ["mask", "mask"]


@pytest.mark.parametrize(
    "name", sorted(set(DEPENDENT) - {"squeeze", "first row", "place in the batch"})
)
def test_without_the_proof_the_numbers_are_wrong(name: str) -> None:
    """The twin: the laws above can fail."""
    model = stack(DEPENDENT[name])
    dense, wrong = copy.deepcopy(model), 0.0
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", verify=False)
    for _ in range(5):
        x = torch.randn(B, W, dtype=torch.double)
        with torch.no_grad():
            off = (model(x) - by_hand(dense, x, plan.last_kept())).abs().max()
        wrong = max(wrong, off.item())
    assert wrong > 1e-6
    assert "not proved, because of verify=False" in repr(plan)


@pytest.mark.parametrize("example", [True, False], ids=["example", "first call"])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_branch_with_independent_rows_is_skipped(name: str, example: bool) -> None:
    model = stack(INDEPENDENT[name])
    given = {"example_inputs": torch.randn(2, W, dtype=torch.double)} if example else {}
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", **given)
    proved = [block.branches[0].proved for block in plan.blocks]
    assert proved == ([True, True] if example else [None, None])
    rows: list[int] = []
    for block in model:
        block.branch.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    model(torch.randn(B, W, dtype=torch.double))
    assert rows == [B // 2, B // 2]
    assert [block.action for block in plan.blocks] == ["skip", "skip"]
    assert [block.branches[0].proved for block in plan.blocks] == [True, True]
    assert "proved: 2 of 2 branches" in repr(plan)


# --- nobody notices ------------------------------------------------------------------------------


class Noticing(nn.Module):
    """A branch that keeps books of its calls."""

    class Stats:
        calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(W, W), nn.BatchNorm1d(W)
        self.calls, self.seen, self.table, self.stats = 0, [], {}, Noticing.Stats()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(tuple(x.shape))
        self.table[self.calls] = len(x)
        self.stats.calls += 1
        if not hasattr(self, "first"):
            self.first = len(x)
        random.random()
        return torch.tanh(self.fc(self.norm(x))) + 0.0 * torch.rand_like(x)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.out = Noticing(), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.child(x))


def _books(verify: bool, example: bool) -> list[Any]:
    """What a step leaves behind."""
    torch.manual_seed(0)
    random.seed(0)
    model, x = nn.Sequential(Around(), Around()), torch.randn(B, W)
    given = {"example_inputs": x[:4]} if example else {}
    hooked: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda m, args, out: hooked.append(type(m).__name__))
        module.register_full_backward_hook(lambda m, grads, out: hooked.append(type(m).__name__))
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", verify=verify, **given)
    packed: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(tuple(t.shape)) or t, lambda t: t
    ):
        out = model(x.requires_grad_())
    out.sum().backward()
    children = [block.child for block in model]
    books = [[c.calls, list(c.seen), dict(c.table), c.stats.calls, c.first] for c in children]
    buffers = [b.clone() for b in model.buffers()]
    grads = [p.grad.clone() for p in model.parameters()]
    numbers = [torch.rand(1).item(), random.random()]
    return [books, hooked, packed, numbers, buffers, grads, out.detach()]


@pytest.mark.parametrize("example", [True, False], ids=["example", "first call"])
def test_the_proof_leaves_no_trace(example: bool) -> None:
    assert str(_books(True, example)) == str(_books(False, example))


@pytest.mark.parametrize("kept", ["hooks_suspended", "plain_attributes_restored", "unchanged"])
def test_each_part_of_the_veil_is_needed(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: without it the books differ."""
    from contextlib import nullcontext

    plain = _books(False, False)
    monkeypatch.setattr(unseen, kept, lambda *args, **kwargs: nullcontext())
    assert str(_books(True, False)) != str(plain)


def test_a_checkpoint_around_a_block_sees_nothing_of_the_proof() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = stack(INDEPENDENT["linear"]), torch.randn(B, W, dtype=torch.double)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    for _ in range(2):
        out = checkpoint(model[0], x.requires_grad_(), use_reentrant=False)
        out.sum().backward()


def test_a_kind_of_call_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[bool] = []
    plain = split_site.prove_split
    monkeypatch.setattr(
        split_site, "prove_split", lambda *args: (proofs.append(True), plain(*args))[1]
    )
    model = nn.Sequential(Block(INDEPENDENT["linear"]))
    torchdrop.add_stochastic_depth(model, [0.5], select=lambda r: True)
    for size in (8, 8, 4, 6):
        model(torch.randn(size, W))
    assert len(proofs) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(8, W))
        model(torch.randn(8, W))
    assert len(proofs) == 2
    model.double()(torch.randn(8, W, dtype=torch.double))
    assert len(proofs) == 3
    model(torch.randn(2, W, dtype=torch.double))  # a test on two rows may miss something
    assert len(proofs) == 4
    model(torch.randn(1, W, dtype=torch.double))  # one row: nothing is known of two then
    model(torch.randn(8, W, dtype=torch.double))
    assert len(proofs) == 5


class Outer(nn.Module):
    """A residual block that calls another one beside its own branch, as BertLayer does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.branch = inner, Block(INDEPENDENT["linear"]).branch

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x + self.branch(x)


def test_what_two_rows_do_not_show_is_found_in_a_larger_batch() -> None:
    model = stack(DEPENDENT["sort"])
    x = torch.arange(2 * W).reshape(2, W).double()
    with torch.no_grad():  # so that both rows are in order
        for block in model:
            block.fc1.weight.copy_(torch.eye(W) / 100)
            block.fc2.weight.copy_(torch.eye(W))
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x)
    assert [r.action for r in plan.blocks] == ["skip", "skip"]
    with pytest.warns(UserWarning, match="rows depend on each other"):
        model(torch.randn(8, W).double())
    assert [r.action for r in plan.blocks] == ["mask", "mask"]


def test_the_size_of_the_batch_is_found_beside_noise_that_does_not_depend_on_it() -> None:
    model = stack(lambda m, x: m.fc2(hidden(m, x) / x.shape[0] + torch.rand(W)))
    with pytest.warns(UserWarning, match="rows depend on each other"):
        plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=torch.randn(B, W).double())
    assert [r.action for r in plan.blocks] == ["mask", "mask"]


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.dropout(self.fc1(x).tanh(), 0.5, self.training)
        with torch.no_grad():  # so that it is read for each gradient mode
            scale = functional.dropout(x, 0.5, self.training).abs() * 0.0 + 1.0
        return x + self.fc2(h * scale)


def test_a_block_that_is_read_in_a_proof_keeps_its_dropout() -> None:
    model, x = nn.Sequential(FunctionalDropout(), FunctionalDropout()), torch.randn(B, W)
    with torch.no_grad():
        plan = torchdrop.add_stochastic_depth(model, [1e-9] * 2, example_inputs=x)
    assert plan.blocks[0].action == "skip"
    model(x)
    for block in model:
        site: Any = block.forward
        assert len(site.train) == 2  # one program for each gradient mode
        for program in site.train:
            texts = [part.text for part in (program.forward, *program.branches.values())]
            assert "clone" not in "".join(texts)
            assert "".join(texts).count("functional.dropout(") == 2
    assert not torch.equal(model(x), model(x))


def test_blocks_inside_blocks_are_proved_on_the_example() -> None:
    model = nn.Sequential(*(Outer(Block(INDEPENDENT["linear"])) for _ in range(2)))
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=torch.randn(B, W))
    proved = [branch.proved for block in plan.blocks for branch in block.branches]
    assert proved == [True] * 4


def test_a_dependence_inside_a_block_inside_a_block_is_found_on_the_example() -> None:
    model = nn.Sequential(Outer(Block(DEPENDENT["neighbours"])), Outer(Block(hidden)))
    with pytest.warns(UserWarning, match="rows depend on each other"):
        plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=torch.randn(B, W))
    assert [b.action for block in plan.blocks for b in block.branches].count("mask") == 1


def test_a_proof_runs_a_block_five_times_at_most() -> None:
    rows: list[int] = []

    def counting(m: Any, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            rows.append(len(x))
        return m.fc2(hidden(m, x))

    model = nn.Sequential(Block(counting))
    torchdrop.add_stochastic_depth(model, [0.5], select=lambda r: True)
    model(torch.randn(B, W))
    *proof, step = rows
    assert step == B // 2
    assert sum(proof) <= 5 * B


# --- gradients -----------------------------------------------------------------------------------


class MixesBackwards(torch.autograd.Function):
    """Returns its input; its gradient has the mean over the batch taken away."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] - grads[0].mean(0)


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2.0 * grads[0]


@pytest.mark.parametrize("first", [True, False], ids=["before the weights", "after them"])
def test_a_function_that_mixes_rows_only_backwards_is_masked(first: bool) -> None:
    def mixing(m: Any, x: Tensor) -> Tensor:
        if first:
            return m.fc2(hidden(m, MixesBackwards.apply(x)))
        return MixesBackwards.apply(m.fc2(hidden(m, x)))

    model = stack(mixing)
    dense, x = copy.deepcopy(model), torch.randn(B, W, dtype=torch.double)
    mine = x.clone().requires_grad_()
    with pytest.warns(UserWarning, match="the gradient of a row depends on other rows"):
        plan, (out,) = attach_and_run(model, mine)
    out.pow(2).sum().backward()
    theirs = x.clone().requires_grad_()
    by_hand(dense, theirs, plan.last_kept()).pow(2).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_function_with_a_plain_gradient_is_skipped() -> None:
    model = stack(lambda m, x: m.fc2(hidden(m, Doubles.apply(x))))
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    model(torch.randn(B, W, dtype=torch.double).requires_grad_())
    assert [block.action for block in plan.blocks] == ["skip", "skip"]


# --- norms of one's own --------------------------------------------------------------------------


class OwnNorm(nn.Module):
    """BatchNorm written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(W))
        self.register_buffer("var", torch.ones(W))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if len(x) < 2:
                raise ValueError("needs more than one row")
            mean, var = x.mean(0), x.var(0)
            self.mean.lerp_(mean.detach(), 0.1)
            self.var.lerp_(var.detach(), 0.1)
        else:
            mean, var = self.mean, self.var
        return (x - mean) / (var + 1e-5).sqrt()


class OwnNormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = OwnNorm(), nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


@pytest.mark.parametrize("example", [True, False], ids=["example", "first call"])
def test_a_norm_of_ones_own_counts_as_batch_norm(example: bool) -> None:
    model = nn.Sequential(OwnNormBlock(), OwnNormBlock()).double()
    given = {"example_inputs": torch.randn(4, W, dtype=torch.double)} if example else {}
    plan = torchdrop.add_stochastic_depth(model, 0.75, schedule="uniform", **given)
    rows: list[int] = []
    for block in model:
        block.fc1.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    for _ in range(4):
        model(torch.randn(4, W, dtype=torch.double))
    # one row of four is kept, and a second one is computed with it
    assert rows == [2] * 8
    assert [block.action for block in plan.blocks] == ["skip", "skip"]
    assert "OwnNorm depends on the batch in training, as BatchNorm does" in repr(plan)


# --- another function than was read --------------------------------------------------------------


def _tampered(model: nn.Sequential, **given: Any) -> Any:
    """Attach, and let the generated forward of block 0 compute something else."""
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", **given)
    site = model[0].__dict__["forward"]
    branch = site.train[0].branches[0]
    branch.function = lambda self, site, *inputs: 2.0 * self.branch(inputs[0])
    return plan


def test_a_reading_that_is_another_function_runs_the_block_by_its_own_forward() -> None:
    model, x = stack(INDEPENDENT["linear"]), torch.randn(B, W, dtype=torch.double)
    dense, plan = copy.deepcopy(model), _tampered(model)
    rows: list[int] = []
    model[0].branch.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    for _ in range(2):
        torch.testing.assert_close(model(x), by_hand(dense, x, plan.last_kept()))
    assert rows == [B // 2, B // 2]
    assert plan.blocks[0].action == "layer"
    assert "differs by" in plan.blocks[0].reason
    assert plan.observed()["0"] == 0.5


def test_a_reading_that_is_another_function_whose_rows_depend_on_each_other_is_masked() -> None:
    model, x = stack(DEPENDENT["cumsum"]), torch.randn(B, W, dtype=torch.double)
    dense, plan = copy.deepcopy(model), _tampered(model)
    with pytest.warns(UserWarning, match="masked"):
        model(x)
    torch.testing.assert_close(model(x), by_hand(dense, x, plan.last_kept()))


def test_a_block_of_another_form_is_refused_if_its_reading_is_another_function() -> None:
    class Projecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skip, self.branch = nn.Linear(W, 2 * W), nn.Sequential(nn.Linear(W, 2 * W))
            self.branch.append(nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.skip(x) + self.branch(x)

    model = nn.Sequential(Projecting())
    torchdrop.add_stochastic_depth(model, [0.5], select=lambda r: True)
    model[0].__dict__["forward"].train[0].branches[0].function = lambda s, site, x: s.skip(x)
    with pytest.raises(RuntimeError, match=r"0 does not compute what its own forward.*select="):
        model(torch.randn(B, W))


def test_a_block_that_differs_from_itself_is_masked() -> None:
    calls = iter(range(1000))

    class Moody(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(x)

    model = nn.Sequential(Moody(lambda m, x: m.fc2(hidden(m, x)) + next(calls)))
    with pytest.warns(UserWarning, match="two equal calls of the block return different values"):
        plan, _ = attach_and_run(model, torch.randn(B, W), select=lambda r: True)
    assert plan.blocks[0].action == "mask"


# --- blocks that are dropped as a whole ----------------------------------------------------------


class Whole(nn.Module):
    """Cannot be read, since it sets an attribute."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor], inplace: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(W, W), nn.Linear(W, W)
        self.branch, self.inplace = Branch(self.fc1, self.fc2, f), inplace

    def forward(self, x: Tensor) -> Tensor:
        self.width = x.shape[-1]
        if self.inplace:
            x += self.branch(x)
            return x
        return x + self.branch(x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["linear", "cumsum", "size of the batch"])
def test_whole_blocks(name: str, inplace: bool) -> None:
    torch.manual_seed(0)
    f = {**DEPENDENT, **INDEPENDENT}[name]
    model = nn.Sequential(Whole(f, inplace), Whole(f, inplace)).double()
    dense, x = copy.deepcopy(model), torch.randn(B, W, dtype=torch.double)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        example = torch.randn(4, W, dtype=torch.double)
        plan = torchdrop.add_stochastic_depth(
            model, 0.5, schedule="uniform", example_inputs=example
        )
        out = model(x.clone())
    torch.testing.assert_close(out, by_hand(dense, x, plan.last_kept()))
    action = "layer" if name == "linear" else "mask"
    assert [block.action for block in plan.blocks] == [action, action]
    assert bool(caught) == (action == "mask")


def test_a_whole_block_that_writes_into_its_input_is_an_error_without_the_proof() -> None:
    model = nn.Sequential(Whole(INDEPENDENT["linear"], True), Whole(INDEPENDENT["linear"], True))
    x = torch.randn(B, W)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x, verify=False)
    with pytest.raises(RuntimeError, match=r"writes into its input.*use verify=True"):
        model(x)


# --- several rows a sample -----------------------------------------------------------------------


class Frames(nn.Module):
    """Clips of frames as rows: every branch looks at the frame before."""

    T = 4

    def __init__(self) -> None:
        super().__init__()

        def shifted(m: Any, x: Tensor) -> Tensor:
            clips = x.reshape(-1, self.T, W)
            before = functional.pad(clips, (0, 0, 1, 0))[:, :-1]
            return m.fc2(torch.tanh(m.fc1(before.reshape(-1, W))))

        self.blocks = nn.Sequential(Block(shifted), Block(shifted))

    def forward(self, clips: Tensor) -> Tensor:
        return self.blocks(clips.flatten(0, 1))


@pytest.mark.parametrize("sampling", ["exact", "independent", "window"])
def test_whole_samples_are_dropped_where_their_rows_are_known(sampling: str) -> None:
    torch.manual_seed(0)
    model, clips = Frames().double(), torch.randn(6, Frames.T, W, dtype=torch.double)
    dense = copy.deepcopy(model)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", rows_per_sample=Frames.T, sampling=sampling
    )
    dropped: list[float] = []
    for _ in range(200):
        out = model(clips)
        kept = plan.last_kept()
        for rows in kept.values():
            samples = rows.view(-1, Frames.T)
            assert torch.equal(samples, samples[:, :1] + torch.arange(Frames.T))
            assert (samples[:, 0] % Frames.T == 0).all()
            dropped.append(1.0 - len(samples) / 6)
        torch.testing.assert_close(out, by_hand(dense.blocks, clips.flatten(0, 1), kept))
    assert [block.action for block in plan.blocks] == ["skip", "skip"]
    assert sum(dropped) / len(dropped) == pytest.approx(0.5, abs=0.06)


class Independent(Frames):
    """Clips of frames as rows, and no branch looks at another frame."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(INDEPENDENT["linear"]) for _ in range(2)))


class OtherOrder(Independent):
    """The rows of a clip are not neighbours."""

    def forward(self, clips: Tensor) -> Tensor:
        return self.blocks(clips.transpose(0, 1).flatten(0, 1))


@pytest.mark.parametrize(
    ("kind", "actions", "together"),
    [(Independent, "skip", True), (Frames, "mask", True), (OtherOrder, "skip", False)],
)
def test_the_rows_of_a_sample_are_found_from_two_batch_sizes(
    kind: type[Frames], actions: str, together: bool
) -> None:
    torch.manual_seed(0)
    model, clips = kind().double(), torch.randn(6, Frames.T, W, dtype=torch.double)
    dense = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the masks
        plan, _ = attach_and_run(model, example_inputs=torch.randn(2, Frames.T, W).double())
    rows = clips.transpose(0, 1) if kind is OtherOrder else clips
    apart = 0
    for _ in range(5):
        out = model(clips)
        kept = plan.last_kept()
        torch.testing.assert_close(out, by_hand(dense.blocks, rows.flatten(0, 1), kept))
        apart += sum(len(set((k // Frames.T).tolist())) * Frames.T != len(k) for k in kept.values())
    assert [block.action for block in plan.blocks] == [actions] * 2
    assert (apart == 0) == together
    text = " ".join(repr(plan).split())
    assert ("each sample has 4 rows, which are dropped together" in text) == together
    model(torch.randn(3, 3, W).double() if kind is Independent else clips)  # another number


def test_without_it_rows_of_a_clip_are_masked_one_by_one() -> None:
    model, clips = Frames().double(), torch.randn(6, Frames.T, W, dtype=torch.double)
    dense = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="masked"):
        plan, (out,) = attach_and_run(model, clips)
    expected = by_hand(dense.blocks, clips.flatten(0, 1), plan.last_kept())
    torch.testing.assert_close(out, expected)


def test_a_batch_that_does_not_hold_whole_samples_is_refused() -> None:
    model = stack(INDEPENDENT["linear"])
    torchdrop.add_stochastic_depth(model, 0.5, rows_per_sample=3)
    with pytest.raises(ValueError, match=r"3 rows according to rows_per_sample.*8 rows"):
        model(torch.randn(8, W, dtype=torch.double))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"rows_per_sample": 0}, ValueError, "has to be 1 or more, but got 0"),
        ({"rows_per_sample": 2.0}, TypeError, r"has to be an integer or None, got 2\.0"),
        ({"rows_per_sample": True}, TypeError, "has to be an integer or None, got True"),
        ({"verify": "yes"}, TypeError, "verify"),
    ],
)
def test_settings_of_the_proof_are_checked(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = stack(INDEPENDENT["linear"])
    with pytest.raises(error, match=message):
        torchdrop.add_stochastic_depth(model, 0.5, **given)
    assert not torchdrop.has_stochastic_depth(model)


# --- what cannot be proved -----------------------------------------------------------------------


def test_a_call_under_a_transform_is_not_proved_and_the_next_one_is() -> None:
    model, x = stack(INDEPENDENT["linear"]), torch.randn(3, B, W, dtype=torch.double)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    torch.func.vmap(model, randomness="same")(x)
    assert [block.branches[0].proved for block in plan.blocks] == [False, False]
    assert "not proved: a transform of torch.func is active" in repr(plan)
    model(x[0])
    assert [block.branches[0].proved for block in plan.blocks] == [True, True]


def test_a_block_that_cannot_run_alone_is_not_called_proved() -> None:
    """It needs a hook, and hooks are not called in a test."""
    model, x = stack(INDEPENDENT["linear"]), torch.randn(B, W, dtype=torch.double)

    def needs_hook(m: Any, x: Tensor) -> Tensor:
        return m.fc2(torch.tanh(m.fc1(x))) * m.scale

    for block in model:
        block.branch.f = needs_hook
        block.branch.register_forward_pre_hook(lambda m, args: setattr(m, "scale", 2.0))
    plan, _ = attach_and_run(model, x)
    assert [block.branches[0].proved for block in plan.blocks] == [False, False]
    assert "not proved: its own forward raises AttributeError if it is tested" in repr(plan)


def test_one_row_proves_nothing_about_several() -> None:
    model = stack(DEPENDENT["cumsum"])
    dense, x = copy.deepcopy(model), torch.randn(B, W, dtype=torch.double)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x[:1])
    with pytest.warns(UserWarning, match="masked"):
        out = model(x)
    torch.testing.assert_close(out, by_hand(dense, x, plan.last_kept()))
