from __future__ import annotations

import sys
from statistics import fmean

import pytest
import torch

import torchdrop
from torchdrop.app.errors import UserError
from torchdrop.app.models import CifarResNet, FractalNet, Join, nearest_depth, open_model


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_resnet_has_as_many_layers_as_its_name_says(depth):
    model = CifarResNet(depth)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == depth  # and one linear layer


def test_resnet_20_has_the_published_size():
    # He et al. 2015, table 6: 0.27 M parameters, shortcuts without any.
    assert sum(p.numel() for p in CifarResNet(20).parameters()) == 269_722


@pytest.mark.parametrize("size", [8, 28, 32, 7])
def test_resnet_takes_images_of_any_size(size):
    assert CifarResNet(8, 4, 1)(torch.zeros(2, 1, size, size)).shape == (2, 4)


def test_shortcut_pools_and_pads_with_zeros():
    shortcut = CifarResNet(8).layer2[0].shortcut
    x = torch.randn(2, 16, 4, 4)
    out = shortcut(x)
    assert torch.allclose(out[:, :16], torch.nn.functional.avg_pool2d(x, 2))
    assert out.shape == (2, 32, 2, 2)
    assert not out[:, 16:].any()


def test_every_block_is_found_as_a_residual():
    # The shortcuts without parameters count as skips.
    assert len(torchdrop.find_residuals(CifarResNet(20, 10, 1))) == 9


def test_fractal_net_has_columns_of_one_two_and_four_convolutions():
    model = open_model("fractalnet").build(7, 2)
    assert isinstance(model, FractalNet)
    for block in model.blocks:
        lengths = [
            sum(len(step) > column for step in block.steps) for column in range(model.columns)
        ]
        assert lengths == [4, 2, 1]
        assert [join.inputs for join in block.joins] == [1, 2, 1, 3]
    assert model(torch.zeros(2, 2, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("size", [8, 28, 32, 7, 2])
def test_fractal_net_takes_images_of_any_size(size):
    assert FractalNet(4, 1)(torch.zeros(2, 1, size, size)).shape == (2, 4)


def test_a_column_of_a_fractal_net_is_a_plain_network():
    """Of a global draw: the deepest column is 12 convolutions one after the other, and a linear."""
    torch.manual_seed(0)
    model = FractalNet(10, 1).eval()
    x = torch.randn(3, 1, 8, 8)
    y = x
    for index, block in enumerate(model.blocks):
        if index:
            y = torch.nn.functional.max_pool2d(y, 2)
        for step in block.steps:
            y = step[0](y)
    expected = model.fc(y.mean((2, 3)))
    model.p = 0.5
    for join in model.modules():
        join.training = type(join).__name__ in {"Join", "PathDrop"}  # BatchNorm as in evaluation
    column = torch.zeros(3, dtype=torch.int64)
    y = x
    for index, block in enumerate(model.blocks):
        if index:
            y = torch.nn.functional.max_pool2d(y, 2)
        y = block(y, column)
    torch.testing.assert_close(model.fc(y.mean((2, 3))), expected)


def test_a_join_counts_the_inputs_that_its_path_drop_drops():
    torch.manual_seed(0)
    join = Join(3)
    join.drop.p = 0.5
    columns = [torch.full((100, 1), 3.0**i) for i in range(3)]
    out = join(columns, torch.full((100,), -1))
    means = {}
    for bits in range(1, 8):
        kept = [3.0**i for i in range(3) if bits >> i & 1]
        means[round(fmean(kept), 4)] = len(kept)
    kept = sum(means[round(value, 4)] for value in out.flatten().tolist())
    assert join.observed() == pytest.approx(1 - kept / 300)


def test_a_join_draws_no_more_numbers_to_count():
    join = Join(2)
    join.drop.p = 0.5
    columns = [torch.zeros(10, 1), torch.ones(10, 1)]
    torch.manual_seed(0)
    join(columns, torch.full((10,), -1))
    after = torch.rand(3)
    torch.manual_seed(0)
    join.drop(*columns, column=torch.full((10,), -1))
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize(
    ("depth", "near"), [(1, 8), (8, 8), (10, 8), (12, 14), (21, 20), (109, 110), (1201, 1202)]
)
def test_nearest_depth(depth, near):
    assert nearest_depth(depth) == near


def test_illegal_depth_names_the_nearest():
    with pytest.raises(UserError, match=r"resnet-21: .* 6n\+2 layers; the nearest is resnet-20$"):
        open_model("resnet-21")
    with pytest.raises(ValueError, match=r"6n\+2 layers, but got 21; the nearest is 20$"):
        CifarResNet(21)


def test_unknown_model_says_what_there_is():
    with pytest.raises(UserError, match=r"no model 'vgg'; give resnet-N .* torchvision:NAME or"):
        open_model("vgg")


def test_torchvision_model_gets_the_classes_and_three_channels():
    model = open_model("torchvision:resnet18")
    assert model.channels == 3
    assert model.build(7, 3).fc.out_features == 7


def test_unknown_torchvision_model_says_what_is_near():
    with pytest.raises(UserError, match=r"no classifier 'resnet1'; did you mean resnet18"):
        open_model("torchvision:resnet1")


def test_torchvision_detectors_are_no_classifiers():
    with pytest.raises(UserError, match="no classifier 'fasterrcnn_resnet50_fpn'"):
        open_model("torchvision:fasterrcnn_resnet50_fpn")


FACTORIES = """
import torch
def takes_both(num_classes, in_channels):
    return torch.nn.Conv2d(in_channels, num_classes, 1)
def takes_classes(num_classes=3):
    return torch.nn.Linear(1, num_classes)
def takes_any(**kwargs):
    return torch.nn.Linear(kwargs["in_channels"], kwargs["num_classes"])
def fails(num_classes):
    raise RuntimeError("no\\nweights")
def returns_nothing():
    pass
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_factories"
    sys.modules.pop("my_factories", None)


def test_factory_is_given_what_it_takes(factories):
    assert open_model(f"{factories}:takes_both").build(7, 2).weight.shape[:2] == (7, 2)
    assert open_model(f"{factories}:takes_classes").build(7, 2).out_features == 7
    assert open_model(f"{factories}:takes_any").build(7, 2).in_features == 2


def test_factory_errors_are_one_line(factories):
    with pytest.raises(UserError, match=r"fails\(num_classes=7\) failed: RuntimeError: no weights"):
        open_model(f"{factories}:fails").build(7, 2)
    with pytest.raises(UserError, match=r"has to return a torch.nn.Module, but returned NoneType"):
        open_model(f"{factories}:returns_nothing").build(7, 2)
    with pytest.raises(UserError, match="my_factories has no function 'missing'"):
        open_model(f"{factories}:missing")
    with pytest.raises(UserError, match="importing 'no_such_module_' failed: ModuleNotFoundError"):
        open_model("no_such_module_:factory")
