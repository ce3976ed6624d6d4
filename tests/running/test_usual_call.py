"""Calls like the last one: the same results with fewer checks, and no check is left out."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

import torchdrop
from torchdrop.running import split_site, usual_call, whole_site
from torchdrop.running.block_site import sites_of
from torchdrop.running.split_site import SplitSite
from torchdrop.running.whole_site import WholeSite

W, B = 8, 12
SCALE = 1.0


class Block(nn.Module):
    """Two branches; reads an attribute, a global variable, a constant and a tuple of tensors."""

    def __init__(self, width: int = W) -> None:
        super().__init__()
        self.attend, self.mlp = nn.Linear(width, width), nn.Linear(width, width)
        self.sign = 1

    def forward(
        self, x: Tensor, bias: tuple[Tensor, Tensor] | None = None, *, scale: float = 1.0
    ) -> Tensor:
        shift = 0.0 if bias is None else bias[0] * bias[1]
        x = x + self.attend(x).tanh() * self.sign * SCALE * scale
        return x + self.mlp(x + shift).tanh()


class Net(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return x


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the blocks whose calls were checked in full, in order."""
    found: list[str] = []
    for kind, name in ((SplitSite, "_run"), (WholeSite, "_sum")):
        monkeypatch.setattr(kind, name, _counted(getattr(kind, name), found))
    return found


def _counted(run: Callable[..., Any], found: list[str]) -> Callable[..., Any]:
    def counted(self: SplitSite | WholeSite, *args: Any) -> Any:
        found.append(self.branches[0].facts.block)
        return run(self, *args)

    return counted


def step(model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    model.zero_grad()
    out = model(x, *args, **kwargs)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def steps(model: nn.Module, plan: torchdrop.Plan, dtype: torch.dtype) -> list[list[Tensor]]:
    """What a training run computes in which calls, rates, shapes and modes change."""
    torch.manual_seed(3)
    x = torch.randn(B, W, dtype=dtype)
    found = [step(model, x) for _ in range(4)]
    found += [step(model, x, scale=2.0) for _ in range(3)]
    found += [step(model, x[:5]) for _ in range(3)]
    plan.set_p(0.9)
    found += [step(model, x[:5]) for _ in range(3)]
    plan.set_p([0.0, 1.0, 0.5])
    bias = torch.randn(B, W, dtype=dtype), torch.randn(B, W, dtype=dtype)
    found += [step(model, x, bias) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        found += [step(model, x) for _ in range(3)]
    return [*found, [torch.rand(3)]]  # the generator is in the same state, too


@pytest.mark.parametrize("unit", ["branch", "block"])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("sampling", ["exact", "independent", "window"])
@pytest.mark.usefixtures("way_to_fork")
def test_a_usual_call_gives_the_same_bits(
    unit: str, mode: str, sampling: str, monkeypatch: pytest.MonkeyPatch, checked: list[str]
) -> None:
    model = Net().double()
    twin = copy.deepcopy(model)
    options: dict[str, Any] = {"mode": mode, "sampling": sampling, "unit": unit}
    plan = torchdrop.add_stochastic_depth(model, 0.5, **options)
    found = steps(model, plan, torch.float64)
    with_usual_calls = len(checked)
    checked.clear()
    monkeypatch.setattr(split_site, "usual_call", lambda *args: None)
    monkeypatch.setattr(whole_site, "usual_whole_call", lambda *args: None)
    expected = steps(twin, torchdrop.add_stochastic_depth(twin, 0.5, **options), torch.float64)
    assert len(checked) > 2 * with_usual_calls > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine) == len(theirs)
        assert all(map(torch.equal, mine, theirs))


def trained(**options: Any) -> tuple[Net, torchdrop.Plan, Tensor]:
    """A model whose next call is a usual one."""
    model, x = Net(), torch.randn(B, W)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", **options)
    for _ in range(2):
        step(model, x)
    return model, plan, x


class Named(Tensor):
    """A tensor of another class."""


def _with_attribute(model: Net, x: Tensor) -> None:
    for block in model.blocks:
        block.sign = -1
    model(x)


def _with_global(model: Net, x: Tensor) -> None:
    globals()["SCALE"] = 3.0
    try:
        model(x)
    finally:
        globals()["SCALE"] = 1.0


def _with_autocast(model: Net, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model(x)


def _observed(model: Net, x: Tensor) -> None:
    handles = [site.observe(lambda event: None) for site in sites_of(model)]
    model(x)
    for handle in handles:
        handle.remove()


def _transformed(model: Net, x: Tensor) -> None:
    torch.func.grad(lambda y: model(y).sum())(x)


OTHER_CALLS: dict[str, Callable[[Net, Tensor], Any]] = {
    "fewer rows": lambda model, x: model(x[:5]),
    "another dtype": lambda model, x: model.double()(x.double()),
    "a keyword": lambda model, x: model(x, scale=2.0),
    "a tuple": lambda model, x: model(x, (x, x)),
    "another class": lambda model, x: model(x.as_subclass(Named)),
    "an attribute": _with_attribute,
    "a global variable": _with_global,
    "autocast": _with_autocast,
    "observed": _observed,
    "transformed": _transformed,
}


@pytest.mark.parametrize("unit", ["branch", "block"])
def test_the_same_call_again_is_a_usual_one(unit: str, checked: list[str]) -> None:
    model, _, x = trained(unit=unit)
    checked.clear()
    for _ in range(3):
        step(model, x)
        step(model, torch.randn(B, W))
    assert checked == []


# A block that is dropped as a whole runs its own forward, which reads these anew in each call.
READ_ANEW = ("an attribute", "a global variable")


@pytest.mark.parametrize("unit", ["branch", "block"])
@pytest.mark.parametrize("name", OTHER_CALLS)
def test_another_call_is_checked(name: str, unit: str, checked: list[str]) -> None:
    if unit == "block" and name in READ_ANEW:
        pytest.skip("nothing of it is remembered")
    model, _, x = trained(unit=unit)
    checked.clear()
    OTHER_CALLS[name](model, x)
    assert checked == ["blocks.0", "blocks.1", "blocks.2"]


def test_the_test_of_other_calls_can_fail(checked: list[str]) -> None:
    model, _, x = trained()
    for site in sites_of(model):
        site._usual = lambda args, kwargs: args[0]
    checked.clear()
    OTHER_CALLS["an attribute"](model, x)
    assert checked == []


class NamedLikeTheGenerated(nn.Module):
    """A block whose variables have the names that a generated function might use."""

    def __init__(self) -> None:
        super().__init__()
        self.call, self.join = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, site: Tensor, args: Tensor | None = None, **kwargs: Any) -> Tensor:
        join, rest = self.call(site), 0.0 if args is None else args
        call = site + join.tanh() + rest * 0.0
        return call + self.join(call).tanh()


@pytest.mark.parametrize("with_second", [False, True])
def test_names_of_a_block_do_not_collide_with_those_of_the_generated_code(
    with_second: bool, checked: list[str]
) -> None:
    model = nn.Sequential(NamedLikeTheGenerated(), NamedLikeTheGenerated())
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, 1e-9)
    x = torch.randn(B, W)
    for k in range(4):
        out, expected = x, x
        for block, plain in zip(model, dense, strict=True):
            given = [torch.randn(B, W)] if with_second else []
            out, expected = block(out, *given), plain(expected, *given)
        torch.testing.assert_close(out, expected)
        if k == 2:
            checked.clear()
    assert checked == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("join = site.join(0, x, x)", "join = td_join0(x, x)"),
        ("y = site.join(12, site.join(3, x, a), b)", "y = td_join12(td_join3(x, a), b)"),
        ("y = f('site.join(0, x)', site.mask(1, x, y))", None),
        ("y = other.site.joins(0, x)", None),
    ],
)
def test_sums_are_replaced_in_the_text(line: str, expected: str | None) -> None:
    text = f"def forward(self, site, x):\n    {line}\n    return x\n"
    assert usual_call.with_joins(text) == text.replace(line, expected or line)


def test_blocks_of_one_class_share_the_code_of_their_usual_calls() -> None:
    model, _, _ = trained()
    codes = {site._usual.__code__ for site in sites_of(model)}
    assert len(codes) == 1


def test_the_layers_of_the_block_rest_in_a_usual_call() -> None:
    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop_path = nn.Linear(W, W), torchdrop.DropPath(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(self.linear(x).tanh())

    model, x = nn.Sequential(Masking(), Masking()), torch.randn(B, W)
    dense = copy.deepcopy(model).eval()
    torchdrop.add_stochastic_depth(model, 1e-9)
    for _ in range(4):
        torch.testing.assert_close(model(x), dense(x))
    rest = sites_of(model)[0].settings.mask_rest
    assert sites_of(model)[0]._usual is not None
    assert rest is not None
    assert rest.depth == 0
    model[0].linear.register_forward_hook(_raise)
    with pytest.raises(ArithmeticError):
        model(x)
    assert rest.depth == 0


def _raise(*args: Any) -> None:
    raise ArithmeticError


@pytest.mark.parametrize("count", [1, 2, 3])
def test_further_inputs_of_a_branch_are_cut_in_usual_calls(count: int, checked: list[str]) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(W, W)

        def forward(self, x: Tensor, *others: Tensor) -> Tensor:
            given = self.linear(x).tanh()
            for other in others:
                given = given * other
            return x + given

    # one row for each sample, one for all, and one without the dimension of the batch
    others = [torch.randn(B, W), torch.randn(1, W), torch.randn(W)][:count]
    model = nn.ModuleList([Mixing(), Mixing()])
    x = torch.randn(B, W)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    for _ in range(4):
        model[0](x, *others)
    checked.clear()
    out = model[0](x, *others)
    assert checked == []
    kept = sites_of(model)[0].branches[0].counts.last
    assert kept is not None
    rows = kept[0][: kept[1]]
    expected = x.clone()
    whole = model[0].linear(x).tanh()
    for other in others:
        whole = whole * other
    expected[rows] += 2.0 * whole[rows]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("unit", ["branch", "block"])
def test_nothing_is_dropped_in_evaluation_or_in_a_pause_after_usual_calls(unit: str) -> None:
    model, plan, x = trained(unit=unit)
    dense = copy.deepcopy(model)
    torchdrop.remove_stochastic_depth(dense)
    with torchdrop.paused(model):
        assert torch.equal(model(x), dense(x))
    assert torch.equal(model.eval()(x), dense.eval()(x))
    model.train()
    dense.train()
    plan.set_p([0.0] * 3)
    assert torch.equal(model(x), dense(x))


@pytest.mark.parametrize("unit", ["branch", "block"])
def test_copies_and_pickles_start_with_a_checked_call(unit: str, checked: list[str]) -> None:
    model, _, x = trained(unit=unit)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        checked.clear()
        step(twin, x)
        assert len(checked) == 3
        step(twin, x)
        assert len(checked) == 3


def test_a_branch_that_is_masked_later_is_masked_in_usual_calls() -> None:
    model, plan, x = trained()
    for site in sites_of(model):
        for branch in site.branches:
            branch.mask("for a test")
    rows: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    step(model, x)
    assert rows == [B] * 3
    assert [len(kept) for kept in plan.last_kept().values()] == [B // 2] * 6


def test_one_tensor_as_two_arguments_is_never_usual(checked: list[str]) -> None:
    model, _, x = trained()
    checked.clear()
    for _ in range(3):
        step(model, x, (x, x))
    assert len(checked) == 9


class OtherLinear(nn.Linear):
    """As a sharded layer, or a converted BatchNorm, has another class than before."""


def test_in_a_process_group_the_classes_of_the_layers_are_looked_at(checked: list[str]) -> None:
    model, _, x = trained()
    checked.clear()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        step(model, x)
        assert len(checked) == 3  # there was no group before
        step(model, x)
        assert len(checked) == 3
        model.blocks[1].mlp = OtherLinear(W, W)
        step(model, x)
        assert checked[3:] == ["blocks.1"]
    finally:
        dist.destroy_process_group()
    step(model, x)
    assert len(checked) == 7


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.fc(x) - self.fc(x).mean(0)).tanh()


def test_a_call_that_could_not_be_tested_is_not_remembered() -> None:
    model = nn.Sequential(Mixing(), Mixing())
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    x = torch.randn(B, W)
    with torch.inference_mode():  # no test is possible
        model(x)
        model(x)
    with pytest.warns(UserWarning, match="its rows depend on each other"):
        model(x)
    assert {b.action for r in plan.blocks for b in r.branches} == {"mask"}


class Attention(nn.Module):
    """Returns weights on request; the request is no argument of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)
        self.asked = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self.fc(x).tanh()
        return out, (out * 2 if self.asked else None)


class AttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = Attention(), nn.Linear(W, W)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out, weights = self.attention(x)
        return x + self.out(out), weights


def test_a_child_that_returns_something_else_in_a_usual_call() -> None:
    x = torch.randn(B, W)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([AttentionBlock(), AttentionBlock()])

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            found = []
            for block in self.blocks:
                x, weights = block(x)
                found.append(weights)
            return x, found

    stack = Stack()
    torchdrop.add_stochastic_depth(stack, 0.5, example_inputs=x)
    for _ in range(3):
        _, weights = stack(x)
        assert weights == [None, None]
    for block in stack.blocks:
        block.attention.asked = True
    for _ in range(3):
        _, weights = stack(x)
        assert all(w is not None and len(w) == B for w in weights)


def test_an_empty_tuple_is_an_argument_like_others() -> None:
    model = nn.ModuleList(WithStates() for _ in range(2))
    torchdrop.add_stochastic_depth(model, 0.5, select=lambda r: True)
    for _ in range(3):
        assert model[0](torch.randn(B, W), ()).shape == (B, W)


class WithStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x: Tensor, states: tuple[Tensor, ...] = ()) -> Tensor:
        return x + self.fc(x).tanh() * (1.0 + len(states))


class WithCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x: Tensor, layer_past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return x + self.fc(x).tanh()


def test_a_call_with_a_cache_is_checked_each_time(checked: list[str]) -> None:
    model = nn.ModuleList(WithCache() for _ in range(2))
    plan = torchdrop.add_stochastic_depth(model, [1.0, 1.0])
    x, past = torch.randn(B, W), (torch.randn(B, W), torch.randn(B, W))
    for _ in range(3):
        assert torch.equal(model[0](x, past), x)
    assert len(checked) == 3
    with torch.no_grad(), pytest.warns(UserWarning, match="without gradients"):
        assert not torch.equal(model[0](x, past), x)  # it generates, and nothing is dropped
    assert plan.blocks[0].p == 1.0


class InWeightDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x.to(self.fc.weight.dtype)).tanh()


def test_the_dtype_of_a_sum_follows_the_weights() -> None:
    model = nn.ModuleList(InWeightDtype() for _ in range(2))
    torchdrop.add_stochastic_depth(model, 0.5, mode="batch", schedule="uniform")
    x = torch.randn(B, W)
    for _ in range(10):
        assert model[0](x).dtype is torch.float32
    model.double()
    kept = [model[0](x).dtype for _ in range(10)]
    assert kept[-5:] == [torch.float64] * 5


class WithOptions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x: Tensor, options: dict[str, float] = {"s": 1.0}) -> Tensor:  # noqa: B006
        return x + self.fc(x).tanh() * options["s"]


def test_a_default_that_may_change_is_looked_at(checked: list[str]) -> None:
    model = nn.ModuleList(WithOptions() for _ in range(2))
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    for _ in range(3):
        model[0](torch.randn(B, W))
    assert len(checked) == 3


def test_an_observer_that_is_added_during_a_call_is_called() -> None:
    model, _, x = trained()
    events: list[Any] = []
    sites = sites_of(model)

    def observe(*_: Any) -> None:
        if not events:
            sites[0].observe(events.append)

    model.blocks[0].attend.register_forward_hook(observe)
    for _ in range(3):
        model(x)
    assert len(events) >= 3


class Parallel(nn.Module):
    """The input of the second branch is not its skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.first(x).tanh() + self.second(x).tanh()


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.short(x) + self.long(x).tanh()
        return out


class TwoInputs(nn.Module):
    """A branch with two inputs, of which the second may be one row for all."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        pos = torch.ones(1, W) if pos is None else pos
        return x + (self.fc(x) * pos).tanh()


@pytest.mark.parametrize("block", [Block, Parallel, Projection, TwoInputs])
@pytest.mark.parametrize("given", ["nothing", "a row for each", "one row", "a sigmoid"])
def test_a_usual_call_saves_the_tensors_of_a_call_with_all_checks(
    block: type[nn.Module], given: str, checked: list[str]
) -> None:
    """Else a checkpoint whose forward had all checks would differ from its recomputation."""
    if given != "nothing" and block is not TwoInputs:
        pytest.skip("it takes one tensor")
    model = nn.ModuleList([block(), block()])
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    pos = {
        "a row for each": torch.randn(B, W),
        "one row": torch.randn(1, W),
        "a sigmoid": torch.randn(B, W, requires_grad=True).sigmoid(),
    }.get(given)

    def saved(x: Tensor) -> list[Any]:
        found: list[Any] = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (found.append((t.shape, t.dtype)), t)[1], lambda t: t
        ):
            for module in model:
                x = module(x) if pos is None else module(x, pos)
        return found

    x = torch.randn(B, W, requires_grad=True)
    saved(x)  # the first call is tested, and its sums are checked
    for site in sites_of(model):
        assert isinstance(site, SplitSite)
        site._usual = None
    checked.clear()
    in_full = saved(x)
    assert len(checked) == 2
    assert saved(x) == in_full
    assert len(checked) == 2


@pytest.mark.parametrize("block", [Parallel, Projection])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_whose_forward_had_all_checks(
    block: type[nn.Module], use_reentrant: bool
) -> None:
    model = nn.ModuleList([block(), block()])
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    for batch in (B, B, B - 2, B):
        y = torch.randn(batch, W, requires_grad=True)
        for module in model:
            y = checkpoint(module, y, use_reentrant=use_reentrant)
        y.sum().backward()


@pytest.mark.parametrize("needs_rows", [True, False])
def test_an_input_that_was_one_row_in_the_example_is_cut_later(needs_rows: bool) -> None:
    """It is the output of a sigmoid, which saves it for the backward pass."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([TwoInputs(), TwoInputs()])
            self.p = nn.Parameter(torch.randn(1, W))

        def forward(self, x: Tensor, e: Tensor) -> Tensor:
            pos = (self.p * e).sigmoid()
            for block in self.blocks:
                x = block(x, pos)
            return x

    net, x = Net(), torch.randn(B, W)
    example = (x, torch.randn(1 if needs_rows else B, 1))
    torchdrop.add_stochastic_depth(net, 0.5, schedule="uniform", example_inputs=example)
    for _ in range(4):
        e = torch.randn(B, 1)
        out = net(x, e)
        expected = x
        for block, site in zip(net.blocks, sites_of(net), strict=True):
            last = site.branches[0].counts.last
            assert last is not None
            rows = last[0][: last[1]]
            branch = (block.fc(expected) * (net.p * e).sigmoid()).tanh()
            expected = expected.index_add(0, rows, 2.0 * branch[rows])
        torch.testing.assert_close(out, expected)


def test_a_traceback_shows_the_lines_of_a_usual_call() -> None:
    model, _, x = trained()
    model.blocks[1].attend.register_forward_hook(_raise)
    with pytest.raises(ArithmeticError) as caught:
        model(x)
    lines = [str(entry) for entry in caught.traceback]
    assert any("usual call, Block" in line and "td_join0" in line for line in lines)
    calls = [site._usual for site in sites_of(model)]  # type: ignore[attr-defined]
    assert len(set(calls)) == 3


class WithOurNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, td_site: Tensor, site: Tensor | None = None, site_: float = 1.0) -> Tensor:
        shift = 0.0 if site is None else site
        return td_site + (self.fc(td_site) + shift).tanh() * site_


def test_arguments_with_the_names_that_are_added() -> None:
    model = nn.ModuleList([WithOurNames(), WithOurNames()])
    dense = copy.deepcopy(model)
    torchdrop.add_stochastic_depth(model, 1e-9)
    x, other = torch.randn(B, W), torch.randn(B, W)
    for _ in range(3):
        for block, plain in zip(model, dense, strict=True):
            torch.testing.assert_close(block(x), plain(x))
            torch.testing.assert_close(block(x, other), plain(x, other))
            torch.testing.assert_close(block(x, site_=2.0), plain(x, site_=2.0))


def test_a_program_that_imports_torchdrop_in_a_fake_mode_draws_real_numbers() -> None:
    program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    import torchdrop
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
    def forward(self, x):
        return x + self.fc(x).tanh()
model = nn.Sequential(Block(), Block())
torchdrop.add_stochastic_depth(model, 0.3)
for _ in range(4):
    model(torch.randn(7, 4)).sum().backward()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


class Sometimes(nn.Module):
    """A child that begins to write into its input."""

    writes = False

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1.0) if self.writes else x + 1.0


def test_a_child_that_begins_to_write_into_its_input_is_an_error_in_a_usual_call() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child, self.fc = Sometimes(), nn.Linear(W, W)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(self.child(x)).tanh()

    model, x = nn.Sequential(Writing(), Writing()), torch.randn(B, W)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    for _ in range(3):
        model(x)
    assert all(site._usual is not None for site in sites_of(model))  # type: ignore[attr-defined]
    Sometimes.writes = True
    try:
        with pytest.raises(RuntimeError, match="writes into its input"):
            model(x)
    finally:
        Sometimes.writes = False


def test_the_first_input_of_a_branch_may_have_no_rows(checked: list[str]) -> None:
    class TableFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(W, W)

        def forward(self, table: Tensor, x: Tensor) -> Tensor:
            return x + (self.fc(x) * table).tanh()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([TableFirst(), TableFirst()])

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(table, x)
            return x

    net, x, table = Net(), torch.randn(B, W), torch.randn(W)
    torchdrop.add_stochastic_depth(net, 0.5, schedule="uniform", example_inputs=(x, table))
    for _ in range(3):
        net(x, table)
    checked.clear()
    out, expected = net(x, table), x
    assert checked == []
    for block, site in zip(net.blocks, sites_of(net), strict=True):
        last = site.branches[0].counts.last
        assert last is not None
        rows = last[0][: last[1]]
        branch = (block.fc(expected) * table).tanh()  # type: ignore[operator]
        expected = expected.index_add(0, rows, 2.0 * branch[rows])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("block", [Parallel, Projection])
def test_a_branch_whose_input_is_not_its_skip(
    block: type[nn.Module], checked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(block(), block())
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    x = torch.randn(B, W)
    for _ in range(3):
        model(x)
    checked.clear()
    torch.manual_seed(1)
    usual = model(x)
    assert checked == []
    monkeypatch.setattr(split_site, "usual_call", lambda *args: None)
    for site in sites_of(model):
        site._usual = None  # type: ignore[attr-defined]
    torch.manual_seed(1)
    assert torch.equal(usual, model(x))
    assert checked == ["0", "1"]
