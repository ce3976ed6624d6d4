"""What torch.compile does with marked sizes and with functions left uncompiled."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from probes import Probe, Probes, check
from torch import fx

from torchdrop import internals
from torchdrop.internals import compilers

probe = Probes()


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@probe(
    "compiler_runs",
    api="torch._C._dynamo.eval_frame.get_eval_frame_callback",
    purpose="compile what is between two branches in batch mode",
)
def _() -> None:
    seen: list[bool] = []

    @torch.compiler.disable(recursive=False)
    def outside_of_graphs() -> None:
        seen.append(bool(internals.compiler_runs()))

    def f(x: torch.Tensor) -> torch.Tensor:
        outside_of_graphs()
        return x + 1

    f(torch.ones(1))
    torch.compile(f, backend="eager")(torch.ones(1))
    f(torch.ones(1))
    assert seen == [False, True, False]


@probe("dynamo_was_imported", api="torch._dynamo", purpose="know whether anything is compiled")
def _() -> None:
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    compiled(torch.ones(1))
    assert internals.dynamo_was_imported()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch._dynamo")
        assert not internals.dynamo_was_imported()


@probe(
    "mark_first_size_symbolic",
    api="the attributes that torch._dynamo.maybe_mark_dynamic and mark_unbacked set on a tensor",
    purpose="compile one graph for every drop rate",
)
def _() -> None:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    def graphs(mark: Callable[[torch.Tensor], Any] | None) -> list[bool]:
        """For each graph that is compiled for 6 sizes, whether a size is without a known value."""
        torch.compiler.reset()
        unknown: list[bool] = []

        def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            values = [node.meta.get("example_value") for node in graph.graph.nodes]
            sizes = [value for value in values if isinstance(value, torch.SymInt)]
            unknown.append(any(free_unbacked_symbols(size) for size in sizes))
            return graph.forward

        share: dict[int, torch.Tensor] = {}
        function = torch.compile(
            lambda x: x * (share[0].shape[0] // 2), backend=backend, fullgraph=True
        )
        for size in (40, 30, 20, 10, 4, 3):
            share[0] = torch.empty(size, 0)
            if mark is not None:
                mark(share[0])
            assert function(torch.ones(2)).tolist() == [size // 2] * 2
        return unknown

    def known(tensor: torch.Tensor) -> None:
        internals.mark_first_size_symbolic(tensor, value_known=True, largest=64, hint=32)

    def not_known(tensor: torch.Tensor) -> None:
        internals.mark_first_size_symbolic(tensor, value_known=False, largest=64, hint=32)

    assert graphs(known) == [False]
    assert graphs(not_known) == [True]
    assert len(graphs(None)) > 1


@probe(
    "leave_frame_uncompiled",
    api="torch._C._dynamo.eval_frame.set_code_exec_strategy",
    purpose="keep torchdrop's own functions from being compiled for each block in batch mode",
)
def _() -> None:
    def calls_compiled(skip: bool) -> list[str]:
        torch.compiler.reset()
        seen: list[str] = []

        def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            seen.extend(getattr(node.target, "__name__", node.target) for node in graph.graph.nodes)
            return graph.forward

        def inner(x: torch.Tensor) -> torch.Tensor:
            return x.sin().cos()

        def outer(x: torch.Tensor) -> torch.Tensor:
            x = torch.add(x, 1)
            torch._dynamo.graph_break()
            return inner(torch.mul(x, 2))

        if skip:
            internals.leave_frame_uncompiled(outer.__code__)
        x = torch.ones(2)
        expected = outer(x)
        assert torch.equal(torch.compile(outer, backend=backend)(x), expected)
        return seen

    assert {"add", "mul", "sin", "cos"} <= set(calls_compiled(False))
    compiled = calls_compiled(True)
    assert {"sin", "cos"} <= set(compiled)
    assert not {"add", "mul"} & set(compiled)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("found", probe, ids=lambda found: found.names[0])
def test_a_private_api_behaves_as_torchdrop_needs_it(found: Probe) -> None:
    check(found)


def test_every_name_has_a_probe() -> None:
    assert probe.names() == sorted(compilers.__all__)
