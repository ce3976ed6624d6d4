"""The base classes of the layers: rates that can be set, and one node for torch.fx."""

import math

import pytest
import torch
from torch import fx, nn

from torchdrop.layers import DropPath, StochasticDepth
from torchdrop.layers.base import LayerWithCheckedProperties, fx_node_of_call


def make_drop_path(p):
    return DropPath(p)


def make_stochastic_depth(p):
    return StochasticDepth(nn.Identity(), p)


@pytest.mark.parametrize("make", [make_drop_path, make_stochastic_depth])
def test_p_can_be_set_and_is_checked(make):
    layer = make(0.0)
    layer.p = 1
    assert layer.p == 1.0
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"p has to be between 0 and 1, but got"):
            layer.p = bad
        with pytest.raises(ValueError, match=r"p has to be between 0 and 1, but got"):
            make(bad)
    for bad in (True, "0.1", None, nn.Parameter(torch.tensor(0.5)), nn.Identity()):
        with pytest.raises(TypeError, match=r"p has to be a real number between 0 and 1"):
            layer.p = bad
        with pytest.raises(TypeError, match=r"p has to be a real number between 0 and 1"):
            make(bad)
    assert layer.p == 1.0
    assert list(layer.state_dict()) == []


def test_a_property_is_set_by_its_setter_even_for_a_module_or_a_parameter():
    class Checked(LayerWithCheckedProperties):
        @property
        def width(self):
            return self._width

        @width.setter
        def width(self, value):
            if not isinstance(value, int):
                raise TypeError("width has to be an integer")
            self._width = value

    layer = Checked()
    layer.width = 3
    for bad in (nn.Identity(), nn.Parameter(torch.ones(1))):
        with pytest.raises(TypeError, match="width has to be an integer"):
            layer.width = bad
    layer.inner = nn.Identity()
    assert (layer.width, list(layer._modules), list(layer._parameters)) == (3, ["inner"], [])


def test_a_layer_is_one_node_of_its_parent_and_traced_through_by_itself():
    layer = DropPath(0.5)
    assert fx_node_of_call(layer, (torch.ones(2),), {}) is None
    parent = fx.symbolic_trace(nn.Sequential(layer))
    assert [n.op for n in parent.graph.nodes] == ["placeholder", "call_module", "output"]
    alone = fx.symbolic_trace(layer)
    assert [n.op for n in alone.graph.nodes] == ["placeholder", "call_function", "output"]
