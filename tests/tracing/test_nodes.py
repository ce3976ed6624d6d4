"""Questions about one node of a graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.nodes import is_shape_node, reads_device, summands
from torchdrop.tracing.traced_functions import add_padded


def test_what_reads_shapes_alone_and_what_takes_values_with_them() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_method("size", (x, 0))
    shape = graph.call_function(getattr, (x, "shape"))
    last = graph.call_function(operator.getitem, (shape, -1))
    assert all(map(is_shape_node, (size, shape, last)))
    assert is_shape_node(graph.call_function(operator.mul, (size, last)))
    assert is_shape_node(graph.call_function(operator.eq, (size, 3)))
    assert not is_shape_node(graph.call_function(operator.mul, (x, size)))
    assert not is_shape_node(graph.call_function(operator.getitem, (x, size)))
    assert not is_shape_node(graph.call_function(torch.zeros, (size,)))
    assert not is_shape_node(x)


class Unused(nn.Module):
    """Unpacks what it does not use: the weights of an attention, a size."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, _length, _ = x.shape
        out, _weights = self.attn(x, x, x, need_weights=False)
        return x + out.reshape(batch, -1, 4)


@pytest.mark.parametrize("given", [None, {"x": torch.zeros(2, 3, 4)}])
def test_what_is_unpacked_and_not_used_is_not_in_the_graph(given: dict[str, Tensor] | None) -> None:
    nodes = trace_block(Unused(), arguments=given).graph.nodes
    unused = [node for node in nodes if not node.users and node.op not in ("output", "placeholder")]
    assert unused == []
    # the item of the attention that is used, and the size of the batch
    assert [node.args[1] for node in nodes if node.target is operator.getitem] == [0, 0]


class Nodes:
    """A graph with two tensors, and a shape of one of them."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x, self.y = self.graph.placeholder("x"), self.graph.placeholder("y")
        self.shape = self.graph.call_function(getattr, (self.x, "shape"))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda n: n.graph.call_method("size", (n.x, 0)), True),
        (lambda n: n.shape, True),
        (lambda n: n.graph.call_function(getattr, (n.shape, "numel")), True),
        (lambda n: n.graph.call_function(operator.getitem, (n.shape, 0)), True),
        (lambda n: n.graph.call_function(operator.mul, (n.shape, 2)), True),
        (lambda n: n.graph.call_function(math.sqrt, (n.shape,)), True),
        (lambda n: n.graph.call_function(max, (n.shape, n.shape)), True),
        (lambda n: n.graph.call_function(operator.mul, (n.x, n.shape)), False),
        (lambda n: n.graph.call_function(torch.mul, (n.shape, n.shape)), False),
        (lambda n: n.graph.call_function(getattr, (n.x, "T")), False),
        (lambda n: n.graph.call_method("sum", (n.x,)), False),
        (lambda n: n.x, False),
    ],
)
def test_nodes_that_read_only_shapes(make: Callable[[Nodes], fx.Node], expected: bool) -> None:
    assert is_shape_node(make(Nodes())) is expected


def test_a_node_that_reads_a_device() -> None:
    nodes = Nodes()
    assert reads_device(nodes.graph.call_function(getattr, (nodes.x, "is_cuda")))
    assert reads_device(nodes.graph.call_method("get_device", (nodes.x,)))
    assert not reads_device(nodes.shape)


@pytest.mark.parametrize(
    ("function", "gain", "writes"),
    [
        (operator.add, 1.0, False),
        (operator.iadd, 1.0, True),
        (torch.add, 1.0, False),
        (operator.sub, -1.0, False),
        (operator.isub, -1.0, True),
        (torch.sub, -1.0, False),
    ],
)
def test_sums_by_functions(function: Callable[..., Any], gain: float, writes: bool) -> None:
    n = Nodes()
    found = summands(n.graph.call_function(function, (n.x, n.y)))
    assert found == (n.x, n.y, gain, writes, None)


@pytest.mark.parametrize(
    ("method", "gain", "writes"),
    [("add", 1.0, False), ("add_", 1.0, True), ("sub", -1.0, False), ("sub_", -1.0, True)],
)
def test_sums_by_methods(method: str, gain: float, writes: bool) -> None:
    n = Nodes()
    found = summands(n.graph.call_method(method, (n.x, n.y), {"alpha": 0.5}))
    assert found == (n.x, n.y, 0.5 * gain, writes, None)


def test_summands_may_be_given_by_name() -> None:
    n = Nodes()
    by_name = n.graph.call_function(torch.add, (n.x,), {"other": n.y, "alpha": 2})
    assert summands(by_name) == (n.x, n.y, 2.0, False, None)
    both = n.graph.call_function(torch.sub, (), {"input": n.x, "other": n.y})
    assert summands(both) == (n.x, n.y, -1.0, False, None)


def test_a_padded_sum_says_on_which_dimension() -> None:
    n = Nodes()
    assert summands(n.graph.call_function(add_padded, (n.x, n.y, 1))) == (n.x, n.y, 1.0, False, 1)


def test_nodes_that_do_not_add_two_tensors() -> None:
    def add(left: object, right: object) -> None:
        """Not the function that the table means."""

    n = Nodes()
    call = n.graph.call_function
    others = [
        call(operator.add, (n.x, 1)),
        call(operator.add, (n.x, n.x)),
        call(operator.add, (n.x, n.shape)),
        call(operator.mul, (n.x, n.y)),
        call(torch.add, (n.x, n.y), {"out": n.x}),
        call(torch.add, (n.x, n.y), {"alpha": n.y}),
        call(torch.add, (n.x, 2, n.y)),
        call(add, (n.x, n.y)),
        n.x,
    ]
    assert [summands(node) for node in others] == [None] * len(others)
