"""What torchdrop changes in torch.fx, and tensors without data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from probes import Probe, Probes, check
from torch import fx, nn

from torchdrop import internals
from torchdrop.internals import graphs

probe = Probes()


@probe(
    "NotAParameter",
    api="_is_param, which isinstance(x, nn.Parameter) reads,",
    purpose="trace a forward that asks whether its input is a parameter",
)
def _() -> None:
    class Stand(internals.NotAParameter, fx.Proxy):
        @property  # type: ignore[misc]
        def __class__(self) -> type:
            return torch.Tensor

    graph = fx.Graph()
    tracer = fx.Tracer()
    tracer.graph = graph
    stand = Stand(graph.placeholder("x"), tracer)
    assert isinstance(stand, torch.Tensor)
    assert isinstance(stand, nn.Parameter) is False


@probe(
    "reserve_name",
    api="fx.Graph._graph_namespace",
    purpose="give no node the name of the first argument of generated code",
)
def _() -> None:
    graph = fx.Graph()
    internals.reserve_name(graph, "self")
    assert graph.placeholder("self").name != "self"
    assert fx.Graph().placeholder("self").name == "self"


@probe(
    "wrap_functions_of",
    "tensors_of_tracer",
    "call_by_full_name",
    api="fx.Tracer._autowrap_search, fx.Tracer.tensor_attrs or node.meta['is_wrapped']",
    purpose="record PyTorch's factories, and tell the tensors of a module from others",
)
def _() -> None:
    table = torch.ones(2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("known", torch.ones(2))
            self.constant = torch.ones(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros(x.shape[0]) + self.constant

    class Tracer(fx.Tracer):
        def create_arg(self, a: Any) -> Any:
            if isinstance(a, torch.Tensor):
                found.append(a in internals.tensors_of_tracer(self))
                found.append(table in internals.tensors_of_tracer(self))
            return super().create_arg(a)

    found: list[bool] = []
    model = Model()
    tracer = Tracer(autowrap_functions=(torch.zeros,))
    internals.wrap_functions_of(tracer, torch)
    graph = tracer.trace(model)
    assert found == [True, False]
    (zeros,) = (node for node in graph.nodes if node.target is torch.zeros)
    assert "is_wrapped" in zeros.meta  # without this the code below would need no change
    internals.call_by_full_name(zeros)
    code = graph.python_code("self")
    assert "torch.zeros" in code.src
    scope = dict(code.globals)
    exec(code.src, scope)
    assert scope["forward"](model, torch.ones(2)).tolist() == [2.0, 2.0]


@probe(
    "fake_tensor_mode",
    "is_data_dependent_error",
    api="torch._subclasses.fake_tensor",
    purpose="work out the shapes in a forward without computing it",
)
def _() -> None:
    weight = torch.ones(3, 5)
    with internals.fake_tensor_mode():
        x = torch.empty(2, 3, device="cuda")
        assert (x.cpu() @ weight).shape == (2, 5)
        assert x.device.type == "cuda"
        for ask in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x.nonzero()):
            with pytest.raises(RuntimeError, match=r"scalar|nonzero") as caught:
                ask()
            assert internals.is_data_dependent_error(caught.value)
        with pytest.raises(RuntimeError, match="same reduction dim") as caught:
            x.cpu() @ x.cpu()
        assert not internals.is_data_dependent_error(caught.value)


@probe(
    "is_fake_tensor",
    api="torch._subclasses.fake_tensor.FakeTensor",
    purpose="compute for real what needs no tensor without data",
)
def _() -> None:
    with internals.fake_tensor_mode():
        assert internals.is_fake_tensor(torch.ones(2))
    assert not internals.is_fake_tensor(torch.ones(2))


@pytest.mark.parametrize("found", probe, ids=lambda found: found.names[0])
def test_a_private_api_behaves_as_torchdrop_needs_it(found: Probe) -> None:
    check(found)


def test_every_name_has_a_probe() -> None:
    assert probe.names() == sorted(graphs.__all__)
