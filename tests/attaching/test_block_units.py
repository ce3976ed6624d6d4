"""``unit="block"``: one decision for all branches of a block."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop
from torchdrop.running import whole_site

WIDTH = 6


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    torch._dynamo.reset()  # the tests share the forward of Net, which may be compiled eight times


class Block(nn.Module):
    """Two branches, added one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def first(self, x: Tensor) -> Tensor:
        return self.attention(torch.tanh(self.norm1(x)))

    def second(self, x: Tensor) -> Tensor:
        return self.mlp(torch.tanh(self.norm2(x)))

    def forward(self, x: Tensor) -> Any:
        x = x + self.first(x)
        return x + self.second(x)


class Parallel(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.first(x) + self.second(x)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += self.attention(torch.tanh(x))  # a LayerNorm would save x, which is written into
        x += self.mlp(torch.tanh(x))
        return x


class Reshaping(Block):
    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = (x + self.first(x)).reshape(shape[0], -1, WIDTH)
        return (x + self.second(x)).view(shape)


class Tuple(Block):
    def forward(self, x: Tensor, weights: None = None) -> tuple[Tensor, None]:
        x = x + self.first(x)
        return x + self.second(x), weights


class WithMask(Block):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.first(x) * mask
        return x + self.second(x)


class SelfAdding(nn.Module):
    """The first part adds its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.tanh(self.norm(x)))


class InParts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAdding()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return x + self.second(x)


class Net(nn.Module):
    def __init__(self, kind: type[nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        for block in self.blocks:
            x = block(x.clone() if isinstance(block, InPlace) else x, **given)
            x = x[0] if isinstance(x, tuple) else x
        return x


def net(kind: type[nn.Module] = Block) -> Net:
    torch.manual_seed(0)
    return Net(kind).double()


def rows(batch: int = 8) -> Tensor:
    return torch.randn(batch, 3, WIDTH, dtype=torch.double)


def with_dropped_rows(
    dense: Net, x: Tensor, kept: dict[str, Tensor], p: float, **given: Any
) -> Tensor:
    """The dense model, with ``x + b / (1 - p) * (block(x) - x)`` for each block."""
    for i, block in enumerate(dense.blocks):
        mask = torch.zeros(len(x), 1, 1, dtype=x.dtype)
        mask[kept[f"blocks.{i}"]] = 1.0
        y = block(x.clone(), **given)
        y = y[0] if isinstance(y, tuple) else y
        x = x + mask / (1.0 - p) * (y - x) if p < 1.0 else x
    return x


def check_against_masks(model: Net, plan: Any, dense: Net, p: float, **given: Any) -> None:
    """Compare output and gradients of a training step with those of the dense model."""
    x = rows().requires_grad_()
    out = model(x, **given)
    out.square().sum().backward()
    y = x.detach().clone().requires_grad_()
    expected = with_dropped_rows(dense, y, plan.last_kept(), p, **given)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10)
    for mine, other in zip(model.parameters(), dense.parameters(), strict=True):
        # None of a parameter that nothing uses
        found, wanted = (
            torch.zeros_like(mine) if p.grad is None else p.grad for p in (mine, other)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    model.zero_grad()
    dense.zero_grad()


KINDS = [Block, Parallel, InPlace, Reshaping, Tuple, WithMask, InParts]


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_dense_model_with_whole_blocks_dropped(kind: type, example: bool) -> None:
    given = {"mask": torch.rand(8, 3, 1, dtype=torch.double)} if kind is WithMask else {}
    model, dense = net(kind), net(kind)
    inputs = {"x": rows(), **given} if example else None
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, unit="block", schedule="uniform", example_inputs=inputs
    )
    assert [block.action for block in plan.blocks] == ["layer"] * 3
    assert "unit='block': one decision for its 2 branches" in plan.blocks[0].reason
    for _ in range(3):  # the first call is tested, the second is compared with it
        check_against_masks(model, plan, dense, 0.5, **given)
    assert [block.branches[0].proved for block in plan.blocks] == [True] * 3
    torchdrop.remove_stochastic_depth(model)
    x = rows()
    assert torch.equal(model(x, **given), dense(x, **given))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sampling", ["exact", "independent", "window"])
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_every_rate_sampling_and_mode(mode: str, sampling: str, p: float) -> None:
    model, dense = net(), net()
    plan = torchdrop.add_stochastic_depth(
        model, 0.3, unit="block", schedule="uniform", sampling=sampling, mode=mode
    )
    check_against_masks(model, plan, dense, 0.3)
    plan.set_p(p)
    for _ in range(3):
        if p == 0.0:
            x = rows()
            assert torch.equal(model(x), dense(x))
        else:
            check_against_masks(model, plan, dense, p)


def test_a_comparison_with_other_rows_fails() -> None:
    model, dense = net(), net()
    plan = torchdrop.add_stochastic_depth(model, 0.5, unit="block", schedule="uniform")
    last_kept = plan.last_kept
    plan.last_kept = lambda: {k: (v + 1) % 8 for k, v in last_kept().items()}  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="not close"):
        check_against_masks(model, plan, dense, 0.5)


def test_the_bits_of_a_seeded_run_do_not_depend_on_what_is_remembered_of_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run() -> list[Tensor]:
        model = net().float()
        torchdrop.add_stochastic_depth(model, 0.4, unit="block")
        torch.manual_seed(3)
        outs = []
        for _ in range(4):
            out = model(torch.randn(8, 3, WIDTH))
            out.sum().backward()
            outs.append(out.detach())
        return outs + [p.grad for p in model.parameters()]

    first = run()
    calls: list[int] = []
    monkeypatch.setattr(whole_site, "usual_whole_call", lambda *args: calls.append(1))
    second = run()
    assert calls
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_forward_runs_once_on_the_kept_rows() -> None:
    model = net()
    torchdrop.add_stochastic_depth(model, 0.5, unit="block", schedule="uniform")
    model(rows())
    seen: list[int] = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model(rows())
    assert seen == [4, 4, 4]


def test_rates_names_and_counts_are_those_of_blocks() -> None:
    model = net()
    plan = torchdrop.add_stochastic_depth(model, {"blocks.1": 0.5}, unit="block")
    assert [branch.name for block in plan.blocks for branch in block.branches] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]
    model(rows())
    assert plan.observed() == {"blocks.0": 0.0, "blocks.1": 0.5, "blocks.2": 0.0}
    plan.set_p({"blocks.0": 1.0})
    model(rows())
    assert len(plan.last_kept()["blocks.0"]) == 0
    with pytest.raises(ValueError, match=r"'blocks.0:mlp', which is not a block"):
        plan.set_p({"blocks.0:mlp": 0.1})
    assert "one decision a block" in repr(plan)


def test_the_rate_is_exact_and_its_twin_fails() -> None:
    model = net()
    plan = torchdrop.add_stochastic_depth(
        model, 0.3, unit="block", schedule="uniform", sampling="independent"
    )
    torch.manual_seed(1)
    for _ in range(250):
        model(rows())
    for rate in plan.observed().values():  # 2,000 rows: five standard deviations are .051
        assert abs(rate - 0.3) < 0.051
        assert not abs(rate - 0.4) < 0.049


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_repeats_the_decision(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor, **given: Any) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    torch.manual_seed(0)
    model, dense = Checkpointed(Block).double(), net()
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, unit="block", schedule="uniform", example_inputs=rows()
    )
    for _ in range(2):
        check_against_masks(model, plan, dense, 0.5)
    assert set(plan.observed().values()) == {0.5}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_drops_by_itself(copied: Callable[[Net], Net]) -> None:
    model, dense = net(), net()
    torchdrop.add_stochastic_depth(model, 0.5, unit="block", schedule="uniform")
    model(rows())
    twin = copied(model)
    check_against_masks(twin, torchdrop.get_plan(twin), dense, 0.5)


@pytest.mark.parametrize("p", [0.5, 0.1, 1.0, 0.0])
def test_it_compiles_into_one_graph(p: float) -> None:
    model, dense = net(), net()
    plan = torchdrop.add_stochastic_depth(model, 0.5, unit="block", schedule="uniform")
    check_against_masks(model, plan, dense, 0.5)
    plan.set_p(p)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = rows()
    out = compiled(x)
    if p in (0.0, 1.0):
        torch.testing.assert_close(out, dense(x) if p == 0.0 else x)
    else:
        torch.testing.assert_close(out, with_dropped_rows(dense, x, plan.last_kept(), p))


def test_one_graph_serves_every_rate() -> None:
    model = net()
    plan = torchdrop.add_stochastic_depth(model, 0.5, unit="block", schedule="uniform")
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for p in (0.5, 0.4, 0.3):
        plan.set_p(p)
        compiled(rows())
    assert len(graphs) == 1


# --- what stays by branch, and what is refused ----------------------------------------------------


class OneBranch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.first(x)


class PostNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(torch.tanh(x)))
        return self.norm2(x + self.mlp(torch.tanh(x)))


class Activated(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return torch.relu(x + self.second(x))


class Projected(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x) + self.attention(torch.tanh(x))
        return x + self.second(x)


class TwoStreams(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + self.first(x)
        return y + self.second(y), y


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (OneBranch, "it has one branch"),
        (PostNorm, "the block applies norm1 and norm2 to its sums; name it in p"),
        (Activated, "the block applies relu to its sums; name it in p"),
        (Projected, "its shortcut is a projection"),
        (TwoStreams, "it returns several tensors"),
    ],
)
def test_other_blocks_stay_by_branch_and_the_plan_says_why(kind: type, why: str) -> None:
    model = net(kind)
    plan = torchdrop.add_stochastic_depth(model, 0.5, unit="block", select=lambda r: True)
    by_branch = torchdrop.add_stochastic_depth(net(kind), 0.5, select=lambda r: True)
    for block, other in zip(plan.blocks, by_branch.blocks, strict=True):
        assert [b.name for b in block.branches] == [b.name for b in other.branches]
        assert all(f"dropped by branch, not by block: {why}" in b.reason for b in block.branches)
    assert f"dropped by branch, not by block: {why}" in " ".join(repr(plan).split())


def test_a_block_that_normalises_its_sums_is_dropped_whole_if_it_is_named() -> None:
    model, dense = net(PostNorm), net(PostNorm)
    with pytest.warns(UserWarning, match="blocks.1 applies norm1 and norm2 to its sums") as caught:
        plan = torchdrop.add_stochastic_depth(
            model, {"blocks.1": 0.5}, unit="block", select=lambda r: r.name == "blocks.1"
        )
    assert caught[0].filename == __file__
    x = rows()
    out = model(x)
    for i, block in enumerate(dense.blocks):
        if i == 1:
            mask = torch.zeros(8, 1, 1, dtype=x.dtype)
            mask[plan.last_kept()["blocks.1"]] = 2.0
            x = x + mask * (block(x) - x)
        else:
            x = block(x)
    torch.testing.assert_close(out, x)


class Part(nn.Module):
    """Two layers, without a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part.one(torch.tanh(x))
            x = x + part.two(torch.tanh(x))
        return x


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.a, self.b = Part(), Part()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.a.two(torch.tanh(self.a.one(x)))
        x = x + self.b.two(torch.tanh(self.b.one(x)))
        return self.head(torch.tanh(x))


@pytest.mark.parametrize(("model", "name"), [(Loop(), "parts.0"), (Flat(), "a")])
def test_sums_without_a_module_are_refused_by_name(model: nn.Module, name: str) -> None:
    before = dict(model.__dict__)
    with pytest.raises(ValueError, match=rf"but the branches of {name}\S* are added in the"):
        torchdrop.add_stochastic_depth(model, 0.5, unit="block")
    assert not torchdrop.has_stochastic_depth(model)
    assert model.__dict__ == before
    torchdrop.add_stochastic_depth(model, 0.5)


class Masking(Block):
    rates = (0.1, 0.1)

    def __init__(self) -> None:
        super().__init__()
        self.drop1, self.drop2 = map(torchdrop.DropPath, self.rates)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop1(self.first(x))
        return x + self.drop2(self.second(x))


class UnequallyMasking(Masking):
    rates = (0.1, 0.2)


def test_inherited_rates_have_to_be_equal_in_a_block() -> None:
    model = net(Masking)
    plan = torchdrop.add_stochastic_depth(model, None, unit="block")
    assert [block.p for block in plan.blocks] == [0.1] * 3
    x = rows(10)
    model(x)
    assert set(plan.observed().values()) == {0.1}  # nothing is dropped by the layers in addition
    unequal = net(UnequallyMasking)
    with pytest.raises(ValueError, match=r"different ones .*blocks.0:attention 0.1, blocks"):
        torchdrop.add_stochastic_depth(unequal, None, unit="block")
    assert not torchdrop.has_stochastic_depth(unequal)


@pytest.mark.parametrize("unit", ["layer", None, 3])
def test_other_units_are_refused(unit: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="unit"):
        torchdrop.add_stochastic_depth(net(), 0.5, unit=unit)


def test_a_block_of_another_shape_is_refused_in_the_call() -> None:
    class Flattening(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            return (x + self.second(x)).flatten(1)

    model = nn.Sequential(Flattening(), nn.Unflatten(1, (3, WIDTH)), Flattening()).double()
    torchdrop.add_stochastic_depth(model, 0.5, unit="block", schedule="uniform")
    with pytest.raises(RuntimeError, match="has to have the shape of its input"):
        model(rows())


# --- calls that differ from what was read or tested ----------------------------------------------


class Optional(Block):
    """An argument and an attribute decide whether the sums are normalised."""

    post = False

    def forward(self, x: Tensor, post: bool = False) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(x)
        return self.norm1(x) if post or self.post else x


@pytest.mark.parametrize("warm", [0, 3])
def test_a_call_of_another_kind_is_read_again(warm: int) -> None:
    class Scaled(Block):
        scale = 1.0

        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            x = x + self.first(x) * factor
            return x + self.second(x) * self.scale

    model, dense = net(Scaled), net(Scaled)
    plan = torchdrop.add_stochastic_depth(model, 0.5, unit="block", schedule="uniform")
    for _ in range(warm):
        check_against_masks(model, plan, dense, 0.5)
    for given in ({"factor": 2.0}, {}, {"factor": 3.0}):
        for _ in range(2):
            check_against_masks(model, plan, dense, 0.5, **given)
    for block in (*model.blocks, *dense.blocks):
        block.scale = 0.5
    check_against_masks(model, plan, dense, 0.5)


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("by", ["argument", "attribute"])
def test_a_call_that_normalises_the_sums_is_refused(by: str, warm: int) -> None:
    model = net(Optional)
    torchdrop.add_stochastic_depth(model, 0.5, unit="block")
    for _ in range(warm):
        model(rows())
    if by == "attribute":
        model.blocks[0].post = True
    given = {"post": True} if by == "argument" else {}
    with pytest.raises(RuntimeError, match=r"post.*cannot be dropped together: the block applies"):
        model(rows(), **given)
    by_example = torchdrop.add_stochastic_depth(
        net(Optional), 0.5, unit="block", example_inputs={"x": rows(), "post": True}
    )
    assert "dropped by branch, not by block" in by_example.blocks[0].reason


class Memory(Block):
    """Gets a table that does not carry the batch."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attention((self.norm1(x) @ table.T).softmax(-1) @ table)
        return x + self.second(x)


# In an eager call with as many rows as the table has, the test finds dependent rows.
@pytest.mark.filterwarnings("ignore:.*its rows depend on each other")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("warm", [None, 4, 8])
def test_a_table_as_long_as_the_batch_is_not_cut_in_a_graph(warm: int | None, verify: bool) -> None:
    model, dense = net(Memory), net(Memory)
    table = torch.randn(4, WIDTH, dtype=torch.double)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, unit="block", schedule="uniform", verify=verify
    )
    if warm is not None:
        model(rows(warm), table=table)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = rows(4)
    out = compiled(x, table=table)
    kept = plan.last_kept()
    torch.testing.assert_close(out, with_dropped_rows(dense, x, kept, 0.5, table=table))


@pytest.mark.parametrize("sampling", ["exact", "independent"])
@pytest.mark.parametrize("compute", ["auto", "mask"])
@pytest.mark.parametrize("warm", [False, True])
def test_sums_in_place_in_a_graph(warm: bool, compute: str, sampling: str) -> None:
    model, dense = net(InPlace), net(InPlace)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, unit="block", schedule="uniform", compute=compute, sampling=sampling
    )
    if warm:
        check_against_masks(model, plan, dense, 0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = rows()
    out = compiled(x)
    torch.testing.assert_close(out, with_dropped_rows(dense, x, plan.last_kept(), 0.5))


class InPlaceWithoutGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            x = x + self.attention(torch.tanh(x))
            return x + self.mlp(torch.tanh(x))
        x += self.attention(torch.tanh(x))
        return x.add_(self.mlp(torch.tanh(x)))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_block_that_writes_into_its_input_only_without_gradients(mode: str) -> None:
    model, dense = net(InPlaceWithoutGradients), net(InPlaceWithoutGradients)
    plan = torchdrop.add_stochastic_depth(model, 0.5, unit="block", schedule="uniform", mode=mode)
    for grad in (True, True, False, False, False, True, True):
        with torch.set_grad_enabled(grad):
            x = rows()
            out = model(x.clone())
            torch.testing.assert_close(out, with_dropped_rows(dense, x, plan.last_kept(), 0.5))


@pytest.mark.filterwarnings("ignore:.*it writes into its argument")
def test_writes_into_other_arguments_reach_all_rows() -> None:
    class Writing(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            mask.add_(1.0)
            x = x + self.first(x)
            return x + self.second(x)

    model = net(Writing)
    plan = torchdrop.add_stochastic_depth(model, 0.5, unit="block", schedule="uniform")
    mask = torch.zeros(8, dtype=torch.double)
    for times in (3.0, 6.0):
        model(rows(), mask=mask)
        assert torch.equal(mask, torch.full_like(mask, times))
    assert "it writes into its argument mask" in plan.blocks[0].reason


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("kind", [tuple, list])
def test_constants_in_the_output_are_those_of_the_call(kind: type, example: bool) -> None:
    class Returning(Block):
        def forward(self, x: Tensor, need: bool = False) -> Any:
            x = x + self.first(x)
            return kind([x + self.second(x), need])

    block = Returning().double()
    inputs = (rows(),) if example else None
    plan = torchdrop.add_stochastic_depth(
        nn.Sequential(block), 0.5, unit="block", mode="batch", select=lambda r: True,
        example_inputs=inputs,
    )  # fmt: skip
    assert plan.blocks[0].action == "layer"
    for need in (True, False, True, False):
        for _ in range(8):
            out = block(rows(), need=need)
            assert type(out) is kind
            assert out[1] is need


def test_further_tensors_in_the_output_of_a_call_are_refused() -> None:
    class Weighing(Block):
        def forward(self, x: Tensor, weights: Tensor | None = None) -> Any:
            x = x + self.first(x)
            return x + self.second(x), weights

    block = Weighing().double()
    torchdrop.add_stochastic_depth(nn.Sequential(block), 0.5, unit="block", select=lambda r: True)
    block(rows())
    with pytest.raises(RuntimeError, match="cannot be dropped together: it returns several tens"):
        block(rows(), torch.ones(8, 3))


class Flattening(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return (x + self.second(x)).flatten(1)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_another_shape_is_refused_whatever_is_dropped(mode: str) -> None:
    for seed in range(4):
        model = nn.Sequential(Flattening(), nn.Unflatten(1, (3, WIDTH)), Flattening()).double()
        torchdrop.add_stochastic_depth(model, 0.9, unit="block", mode=mode, schedule="uniform")
        torch.manual_seed(seed)
        with pytest.raises(RuntimeError, match="has to have the shape of its input"):
            model(rows())


def test_another_shape_is_an_error_in_a_graph() -> None:
    model = nn.Sequential(Flattening(), nn.Unflatten(1, (3, WIDTH)), Flattening()).double()
    torchdrop.add_stochastic_depth(model, 0.5, unit="block", verify=False)
    with pytest.raises(Exception, match="has to have the shape of its input"):
        torch.compile(model, fullgraph=True, backend="eager")(rows())


class Casting(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x.double()
        x = x + self.first(x)
        return x + self.second(x)


class Pair(NamedTuple):
    out: Tensor


class Named(Block):
    def forward(self, x: Tensor) -> Pair:
        x = x + self.first(x)
        return Pair(x + self.second(x))


@pytest.mark.parametrize(("kind", "why"), [(Casting, "applies double"), (Named, "returns a Pair")])
def test_casts_and_other_outputs_stay_by_branch(kind: type, why: str) -> None:
    model = nn.Sequential(kind(), kind()).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5, unit="block")
    assert why in plan.blocks[0].reason
    assert len(plan.blocks[0].branches) == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_number_as_a_tensor_has_no_rows(compiled: bool) -> None:
    model, dense = net(WithMask), net(WithMask)
    plan = torchdrop.add_stochastic_depth(model, 0.5, unit="block", schedule="uniform")
    run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    number, x = torch.tensor(2.0, dtype=torch.double), rows()
    out = run(x, mask=number)
    torch.testing.assert_close(out, with_dropped_rows(dense, x, plan.last_kept(), 0.5, mask=number))
    assert plan.blocks[0].action == "layer"


def test_the_papers_scale_compiles_in_evaluation() -> None:
    model, dense = net(), net()
    torchdrop.add_stochastic_depth(model, 0.25, unit="block", schedule="uniform", scale="eval")
    x = rows()
    wanted = x
    for block in dense.blocks:
        wanted = wanted + 0.75 * (block(wanted) - wanted)
    model.eval()
    torch.testing.assert_close(model(x), wanted)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), wanted)


class Unscaled(Masking):
    def __init__(self) -> None:
        super().__init__()
        self.drop1.scale_by_keep = self.drop2.scale_by_keep = False


class HalfScaled(Masking):
    def __init__(self) -> None:
        super().__init__()
        self.drop1.scale_by_keep = False


def test_masking_layers_that_do_not_scale() -> None:
    plan = torchdrop.add_stochastic_depth(net(Unscaled), 0.5, unit="block")
    assert "kept rows are not divided by 1-p" in plan.blocks[0].reason
    with pytest.raises(ValueError, match="have scale_by_keep=False, and others do not"):
        torchdrop.add_stochastic_depth(net(HalfScaled), 0.5, unit="block")
