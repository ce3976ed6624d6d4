"""What cannot be read because it branches on data is another thing than what cannot be read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torchdrop
from torchdrop.tracing.block_graph import trace_block
from torchdrop.tracing.untraceable import DataDependentError, UntraceableError
from written_blocks import Base, flat, two


class Branching(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) if x.mean() > 0 else x


class Numbers(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * float(x.detach().mean())


class Storing(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x + self.f(x)


@pytest.mark.parametrize("kind", [Branching, Numbers])
def test_on_the_kept_rows_a_block_that_asks_for_data_may_do_something_else(
    kind: type[Base],
) -> None:
    model, x = two(kind)(), flat()
    with pytest.raises(DataDependentError, match="value"):
        trace_block(model.blocks[0], arguments={"x": x})
    with pytest.raises(ValueError, match=r"no residual branches found.*could not be read"):
        torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x)


def test_any_other_block_is_dropped_as_a_whole() -> None:
    model, x = two(Storing)(), flat()
    with pytest.raises(UntraceableError, match=r"it sets self\.last") as caught:
        trace_block(model.blocks[0], arguments={"x": x})
    assert not isinstance(caught.value, DataDependentError)
    plan = torchdrop.add_stochastic_depth(model, [1.0, 1.0], example_inputs=x)
    assert [r.action for r in plan.blocks] == ["layer", "layer"]
    assert torch.equal(model(x), x)
