"""Questions about one node of a graph."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn

from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.nodes import is_shape_node


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
