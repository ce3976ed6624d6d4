"""One graph for every rate: what it computes, which rows are kept, how often it is compiled."""

from __future__ import annotations

import copy
import gc
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import torchdrop
from torchdrop.cost import flops
from torchdrop.rows import in_graph

models = pytest.importorskip("torchvision.models")


class Compiler:
    """A backend that counts its graphs, runs them unchanged, and may record the drawn rows."""

    def __init__(self, *, noting: bool = False) -> None:
        self.graphs = 0
        self.noting = noting
        self.rows: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        if not self.noting:
            return graph.forward
        compiler = self

        class Noting(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                value = super().run_node(n)
                if "keep_rows" in str(n.target):
                    compiler.rows.append(len(value[0]))
                return value

        return Noting(graph).run

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiler:
        return self


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))


def net(depth: int = 3, width: int = 6) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(depth))).double()


class _Layers(nn.Module):
    """A loop of blocks, whose graph ends at each of them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.sin(block(x))
        return x


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # dynamo reads it, and hides the warning
def test_in_batch_mode_each_branch_is_a_graph_and_what_is_dropped_does_not_run() -> None:
    depth = 12  # beyond dynamo's limit for one function
    model = _Layers(depth).double()
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode="batch")
    graphs: list[torch.fx.GraphModule] = []
    layers_run: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        layers = sum("linear" in str(node.target) for node in graph.graph.nodes)

        def run(*tensors: Any) -> Any:
            layers_run.append(layers)
            return graph.forward(*tensors)

        return run

    compiled_model = torch.compile(model, backend=backend)
    x = torch.randn(4, 6, dtype=torch.float64)
    known = []
    for seed in range(16):
        torch.manual_seed(seed)
        expected = model(x)
        torch.manual_seed(seed)
        layers_run.clear()
        torch.testing.assert_close(compiled_model(x), expected, rtol=1e-10, atol=1e-12)
        assert sum(layers_run) == 2 * sum(len(rows) > 0 for rows in plan.last_kept().values())
        known.append(len(graphs))
    assert known[-1] == known[11]  # nothing more is compiled
    assert known[-1] <= 3 * depth  # a branch each, and what is between the blocks


@pytest.mark.parametrize("first", ["add", "compile", "run"])
def test_stochastic_depth_may_come_before_or_after_the_compiler(first: str) -> None:
    model, backend, x = net(), Compiler(), torch.randn(8, 6, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, 0.5) if first == "add" else None
    graph = torch.compile(model, fullgraph=True, backend=backend)
    if first == "run":
        graph(x)
    plan = plan or torchdrop.add_stochastic_depth(model, 0.5)
    for _ in range(3):
        graph(x)
    assert backend.graphs == (2 if first == "run" else 1)
    assert plan.observed() == pytest.approx({"0": 1 / 6, "1": 1 / 3, "2": 0.5}, abs=0.05)
    torchdrop.remove_stochastic_depth(model)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-10, atol=1e-12)


def test_under_one_seed_a_graph_computes_what_is_computed_without() -> None:
    model, backend = net(), Compiler()
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    graph = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)  # 3 rows or 4
    for seed in range(5):
        results = []
        for run in (model, graph):
            torch.manual_seed(seed)
            out = run(x)
            grads = torch.autograd.grad(out.square().sum(), (x, *model.parameters()))
            results.append((out, *grads))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert backend.graphs == 1


def weights_of_rows(p: float, sampling: str, times: int, batch: int, compute: str) -> Tensor:
    """(times, batch): what the branch of a compiled block was multiplied by."""
    model = net(2, 1)
    nn.init.zeros_(model[1].b.weight), nn.init.ones_(model[1].b.bias)
    torchdrop.add_stochastic_depth(model, [0.0, p], sampling=sampling, compute=compute)
    graph = torch.compile(model, fullgraph=True, backend=Compiler())
    x = torch.zeros(batch, 1, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        before = model[0](x)
        return torch.stack([(graph(x) - before)[:, 0] for _ in range(times)])


def law_holds(weights: Tensor, p: float) -> bool:
    """Each row has weight 1/(1-p) with probability 1-p, else 0."""
    kept = weights > 0.5
    exact = torch.where(kept, torch.tensor(1 / (1 - p), dtype=torch.float64), 0.0)
    return torch.allclose(weights, exact, rtol=0, atol=1e-12) and all(
        stats.binomtest(int(row.sum()), len(row), 1 - p).pvalue > 1e-6 for row in kept.T
    )


@pytest.mark.parametrize(
    ("sampling", "compute", "p", "batch"),
    [
        ("exact", "auto", 0.3, 7),
        ("exact", "auto", 0.9, 4),
        ("exact", "mask", 0.3, 7),
        ("window", "auto", 0.3, 7),
        ("independent", "auto", 0.9, 4),
    ],
)
def test_rows_in_a_graph_are_kept_at_the_same_rate(
    sampling: str, compute: str, p: float, batch: int
) -> None:
    assert law_holds(weights_of_rows(p, sampling, 500, batch, compute), p)


def test_the_test_of_the_rate_in_a_graph_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchdrop.running.branch_state import BranchRate

    def all_that_are_computed(self: BranchRate, batch: int) -> tuple[Tensor, int]:
        return torch.randperm(batch), 2

    monkeypatch.setattr(BranchRate, "draw_rows", all_that_are_computed)
    assert not law_holds(weights_of_rows(0.9, "exact", 500, 4, "auto"), 0.9)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 100])
def test_a_graph_computes_no_more_rows_than_the_rate_can_need(p: float, batch: int) -> None:
    class Branch:
        def __init__(self) -> None:
            self.p = p
            self.convolves = False

    branch = Branch()
    number = in_graph.register_branch(branch)  # type: ignore[arg-type]
    exactly = batch * (1 - p)
    rounded_up = int(exactly) + (exactly - int(exactly) > 1e-6)
    assert in_graph.row_count_in_graph(number, batch, 1) == max(rounded_up, 1)
    assert in_graph.row_count_in_graph(number, batch, 2) == min(max(rounded_up, 2), batch)


def test_nothing_dropped_and_everything_dropped() -> None:
    model = net()
    expected = model(x := torch.randn(5, 6, dtype=torch.float64))
    plan = torchdrop.add_stochastic_depth(model, [0.0, 0.0, 1.0])
    graph = torch.compile(model, fullgraph=True, backend=Compiler())
    assert torch.equal(graph(x), model[1](model[0](x)))
    graph(x).sum().backward()
    assert not model[2].a.weight.grad.any()  # zeros, not None
    plan.set_p(0.0)
    assert torch.equal(graph(x), expected)
    plan.set_p(0.5)
    assert torch.equal(graph.eval()(x), expected)


def graphs_of_inductor(*, convolves: bool) -> int:
    """How many graphs a schedule takes that lets the rows of a layer pass inductor's threshold."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = net(2, 4).float()
    x = torch.randn(16, 512, 4)  # sums over more than 4,096 values are written in another way
    plan = torchdrop.add_stochastic_depth(model, 0.1, schedule="uniform", example_inputs=x[:2])
    rates = [site.branches[0].rate for site in plan._sites]
    assert not any(rate.convolves for rate in rates)
    for rate in rates:
        rate.convolves = convolves
    graph = torch.compile(model, fullgraph=True)
    for p in (0.25, 0.4, 0.6, 0.8):
        plan.set_p(p)
        torch.manual_seed(0)
        out = graph(x)
        out.square().sum().backward()
        torch.manual_seed(0)
        torch.testing.assert_close(out, model(x), rtol=1e-5, atol=1e-5)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++")
def test_inductor_writes_one_graph_for_all_rates() -> None:
    assert graphs_of_inductor(convolves=False) == 1
    assert graphs_of_inductor(convolves=True) == 2  # it knows how many rows there are now


@pytest.mark.parametrize("case", ["resnet", "vision transformer"])
def test_a_rate_that_changes_in_every_step_is_compiled_once(case: str) -> None:
    torch.manual_seed(0)
    if case == "resnet":
        model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    else:
        model = models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
        )
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    backend = Compiler(noting=True)
    graph = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(8, 3, 32, 32)
    for step in range(15):
        plan.set_p(0.9 - step * 0.06)
        backend.rows.clear()
        graph(x).sum().backward()
        model.zero_grad()
        rates = [branch.p for block in plan.blocks for branch in block.branches]
        assert backend.rows == [max(math.ceil(8 * (1 - p) - 1e-6), 2) for p in rates]
    assert backend.graphs == 1
    # .48 is the mean of .9, .84 .. .06 at the deepest block; less before, as its rate is
    for seen, p in zip(plan.observed().values(), rates, strict=True):
        assert abs(seen - 0.48 * p / rates[-1]) < 0.08
    model.eval()
    with torch.no_grad():
        graph(x)
    assert backend.graphs == 2


def test_a_copy_is_compiled_with_rates_of_its_own() -> None:
    model = net(2)
    torchdrop.add_stochastic_depth(model, [1e-9, 1.0])
    twin = copy.deepcopy(model)
    torchdrop.get_plan(twin).set_p([0.5, 0.5])
    x = torch.randn(6, 6, dtype=torch.float64)
    torch.compile(twin, fullgraph=True, backend=Compiler())(x)
    torch.compile(model, fullgraph=True, backend=Compiler())(x)

    def kept(model: nn.Module) -> dict[str, int]:
        return {name: len(rows) for name, rows in torchdrop.get_plan(model).last_kept().items()}

    assert kept(twin) == {"0": 3, "1": 3}
    assert kept(model)["0"] == 6


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of what it cannot trace
def test_whole_batches_are_skipped_with_breaks_between_graphs() -> None:
    model = net(2)
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode="batch")
    graph = torch.compile(model, backend=Compiler())
    x = torch.randn(6, 6, dtype=torch.float64)
    costs = set()
    for seed in range(12):
        torch.manual_seed(seed)
        out = graph(x)
        torch.manual_seed(seed)
        costs.add(flops(model, x))
        torch.manual_seed(seed)
        torch.testing.assert_close(out, model(x), rtol=1e-10, atol=1e-12)
    assert 0 in costs
    assert len(costs) == 3


def test_a_generator_in_a_graph_is_an_error_and_works_outside_of_it() -> None:
    """torch.compile takes no generator: an error with fullgraph, the same numbers without."""
    x = torch.ones(8, 3)

    def drop(generator: torch.Generator) -> Tensor:
        return torchdrop.functional.drop_path(x, 0.5, generator=generator)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="Failed to convert"):
        torch.compile(drop, fullgraph=True, backend="eager")(torch.Generator())
    torch._dynamo.reset()
    out = torch.compile(drop, backend="eager")(torch.Generator().manual_seed(3))
    assert torch.equal(out, drop(torch.Generator().manual_seed(3)))


def test_a_model_may_be_freed_while_a_compiler_iterates_over_the_shares() -> None:
    def branches(model: nn.Module) -> list[int]:
        plan = torchdrop.add_stochastic_depth(model, 0.5)
        return [state.rate.number for site in plan._sites for state in site.branches]

    model = nn.Sequential(*(Block(4) for _ in range(2)))
    numbers = branches(model)
    shares = iter(in_graph._shares)
    next(shares)
    del model
    gc.collect()
    assert len(list(shares)) > 0  # a dictionary that has shrunk would raise
    assert set(numbers) <= set(in_graph._freed)
    branches(nn.Sequential(*(Block(4) for _ in range(2))))
    assert not set(numbers) & {*in_graph._shares, *in_graph._freed}


# Dynamo looks at the .grad of a tensor that is not a leaf, where it begins anew after a draw.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("trained_before", [False, True])
def test_in_batch_mode_what_is_between_the_branches_is_compiled(trained_before: bool) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x).tanh()
            x = x.sin().cos() * 2.0
            return x + self.second(x).tanh()

    torch.compiler.reset()
    model = nn.Sequential(Between(), Between())
    torchdrop.add_stochastic_depth(model, 0.3, mode="batch", schedule="uniform")
    for _ in range(3 if trained_before else 0):
        model(torch.randn(4, 6))
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=backend)
    for _ in range(10):
        compiled(torch.randn(4, 6))
    assert "sin" in seen
