"""Dropout before BatchNorm, in the forwards of models."""

import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import torchdrop
from torchdrop.app.models import CifarResNet
from torchdrop.diagnostics import check_order
from torchdrop.layers import (
    DropBlock2d,
    DropPath,
    GaussianDropout,
    SpatialDropout,
    StochasticDepth,
    UniformDropout,
)


def pairs(model, example_inputs=None):
    return [(f.dropout, f.batch_norm) for f in check_order(model, example_inputs)]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.1),
        nn.Dropout2d(0.1),
        nn.AlphaDropout(0.1),
        nn.FeatureAlphaDropout(0.1),
        DropPath(0.1),
        GaussianDropout(0.1),
        UniformDropout(0.1),
        SpatialDropout(0.1),
        DropBlock2d(0.1, 3),
        torchvision.ops.StochasticDepth(0.1, "row"),
        torchvision.ops.DropBlock2d(0.1, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_layer_that_drops_is_one(layer):
    before = nn.Sequential(layer, nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))
    (finding,) = check_order(before)
    assert (finding.dropout, finding.batch_norm, finding.distance) == ("0", "3", 3)
    assert (finding.kind, finding.rate) == (type(layer).__name__, 0.1)
    assert not finding.assumed
    assert pairs(nn.Sequential(nn.BatchNorm2d(3), layer, nn.Conv2d(3, 3, 1))) == []


# Layers of torchdrop that do not take their rate first.
LAYERS = {
    "Cutout": lambda layer: layer(1),
    "StochasticDepth": lambda layer: layer(nn.Linear(3, 3), 0.1),
}


@pytest.mark.parametrize("name", torchdrop.layers.__all__)
def test_every_layer_of_torchdrop_is_seen(name):
    layer = LAYERS.get(name, lambda layer: layer(0.1))(getattr(torchdrop.layers, name))
    (finding,) = check_order(nn.Sequential(layer, nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert (finding.dropout, finding.kind, finding.batch_norm) == ("0", name, "2")
    assert finding.rate == (1.0 if name == "Cutout" else 0.1)


def test_layers_that_are_off_or_nothing_of_the_kind():
    for layer in (nn.Dropout(0.0), DropPath(0.0), UniformDropout(0.0), nn.ReLU(), nn.Identity()):
        assert pairs(nn.Sequential(layer, nn.BatchNorm1d(3))) == []


class Net(nn.Module):
    """A forward of the test's own, on two linear layers, two BatchNorms and a dropout."""

    def __init__(self, forward, **more):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.bn1, self.bn2 = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        for name, module in more.items():
            setattr(self, name, module)
        self.steps = [forward]

    def forward(self, x):
        return self.steps[0](self, x)


FORWARDS = {
    "after the last": (lambda m, x: m.drop(m.bn2(m.bn1(x))), []),
    "the attribute order means nothing": (
        lambda m, x: m.bn1(m.one(m.drop(m.bn2(x)))),
        [("drop", "bn1")],
    ),
    "the nearest ends the way": (lambda m, x: m.bn2(m.bn1(m.drop(x))), [("drop", "bn1")]),
    "through an addition": (lambda m, x: m.bn1(x + m.drop(m.one(x))), [("drop", "bn1")]),
    "beside, not before": (lambda m, x: m.drop(x) + m.bn1(x), []),
    "only its shape": (lambda m, x: m.bn1(x.reshape(m.drop(x).shape)), []),
    "one item of two": (lambda m, x: m.bn1((m.drop(x), x)[1]), []),
    "a function": (
        lambda m, x: m.bn1(F.relu(F.dropout(x, 0.3, m.training))),
        [("dropout()", "bn1")],
    ),
    "a function that is off": (lambda m, x: m.bn1(F.dropout(x, 0.3, False)), []),
    "a function of rate 0": (lambda m, x: m.bn1(F.dropout(x, 0.0, m.training)), []),
    "a mask": (lambda m, x: m.bn1(x * torch.bernoulli(x * 0 + 0.5)), [("bernoulli()", "bn1")]),
    "a function of ours": (
        lambda m, x: m.bn1(torchdrop.functional.drop_path(x, 0.2, m.training)),
        [("drop_path()", "bn1")],
    ),
    "batch_norm as a function": (
        lambda m, x: F.batch_norm(m.drop(x), m.bn1.running_mean, m.bn1.running_var),
        [("drop", "batch_norm()")],
    ),
    "used twice": (lambda m, x: m.bn1(m.drop(m.bn1(x))), [("drop", "bn1")]),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_data_flow_decides(name):
    forward, expected = FORWARDS[name]
    assert pairs(Net(forward)) == expected


# Functions of torchdrop.functional that do not return an activation.
NOT_OF_ACTIVATIONS = {"cutout_boxes", "drop_block_gamma", "path_drop_column"}

# Those that are not called with an activation and a rate.
CALLS = {
    "cutout": lambda f, x: f(x, 1),
    "drop_block1d": lambda f, x: f(x, 0.2, 1),
    "drop_block2d": lambda f, x: f(x, 0.2, 1),
    "drop_block3d": lambda f, x: f(x, 0.2, 1),
    "drop_path_add": lambda f, x: f(x, x, 0.2),
    "path_drop": lambda f, x: f([x, x], 0.2),
}


@pytest.mark.parametrize("name", sorted({*torchdrop.functional.__all__} - NOT_OF_ACTIVATIONS))
def test_every_function_of_torchdrop_is_seen(name):
    function = getattr(torchdrop.functional, name)
    call = CALLS.get(name, lambda f, x: f(x, 0.2))
    assert pairs(Net(lambda m, x: m.bn1(call(function, x)))) == [(f"{name}()", "bn1")]
    assert pairs(Net(lambda m, x: call(function, m.bn1(x)))) == []


def test_where_and_how_far():
    inner = Net(lambda m, x: m.two(m.drop(m.one(x))))
    outer = Net(lambda m, x: m.bn2(m.bn1(y := F.relu(m.inner(x))) + y), inner=inner)
    model = nn.Sequential(nn.Flatten(), outer)
    (finding,) = check_order(model)
    assert finding.dropout == "1.inner.drop"
    assert finding.batch_norm == "1.bn1"
    assert finding.forward == "1"
    assert finding.distance == 3
    assert finding.further == ("1.bn2",)
    assert str(finding) == (
        "1.inner.drop (Dropout, 0.5) stands before 1.bn1: in 1, 3 operations on; and before 1 more"
    )


def test_a_stochastic_depth_layer_is_read_inside_as_well():
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model = nn.Sequential(StochasticDepth(module, 0.3), nn.BatchNorm1d(3))
    found = {f.dropout: f.batch_norm for f in check_order(model)}
    assert found == {"0.module.0": "0.module.1", "0": "1"}


def test_attached_stochastic_depth_stands_before_the_next_block():
    model = CifarResNet(14, 10, 1)
    assert pairs(model) == []
    torchdrop.add_stochastic_depth(model, [0.0, 0.2, 0.2, 0.0, 0.0, 0.2])
    # the last one is followed by no BatchNorm
    assert pairs(model) == [("layer1.1", "layer2.0.bn1"), ("layer2.0", "layer2.1.bn1")]
    assert check_order(model)[0].kind == "stochastic depth"
    torchdrop.remove_stochastic_depth(model)
    assert pairs(model) == []


class Undecided(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        if x.sum() > 0:
            return x
        for part in self.parts:
            x = part(x)
        return x


def test_what_cannot_be_read_is_said_and_assumed():
    inside = nn.Sequential(nn.Dropout(0.2), nn.BatchNorm1d(3))
    model = nn.Sequential(
        nn.Dropout(0.1), Undecided(inside, nn.Dropout(0.3)), nn.Linear(3, 3), nn.BatchNorm1d(3)
    )
    report = check_order(model)
    assert [(f.dropout, f.batch_norm, f.assumed) for f in report] == [
        ("0", "1.parts.0.1", True),
        ("1.parts.0.0", "1.parts.0.1", False),
        ("1.parts.1", "3", True),
    ]
    assert set(report.unreadable) == {"1"}
    assert "(assumed)" in repr(report)
    assert "  not read: 1: " in repr(report)
    quiet = check_order(nn.Sequential(nn.BatchNorm1d(3), Undecided(nn.Linear(3, 3))))
    assert repr(quiet).startswith("order in Sequential: no dropout before a BatchNorm was seen\n")


class Sized(nn.Module):
    """Depends on an argument, which its signature alone does not tell."""

    def __init__(self):
        super().__init__()
        self.drop, self.bn = nn.Dropout(0.5), nn.BatchNorm1d(3)

    def forward(self, x, times):
        for _ in range(times):
            x = self.drop(x)
        return self.bn(x)


def test_example_inputs_say_how_the_model_is_called():
    model = Sized().train()
    assert "" in check_order(model).unreadable
    state = torch.get_rng_state()
    report = check_order(model, (torch.ones(4, 3), 2))
    assert not report.unreadable
    assert [(f.dropout, f.distance) for f in report] == [("drop", 1)]
    assert check_order(model, {"x": torch.ones(4, 3), "times": 0}).findings == []
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert model.bn.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "options", "count", "first"),
    [
        ("resnet18", {}, 0, None),
        ("vgg11_bn", {}, 0, None),  # its dropouts come after the last BatchNorm
        (
            "efficientnet_b0",
            {},
            9,
            ("features.2.1.stochastic_depth", "features.3.0.block.0.1"),
        ),
        (
            "densenet121",
            {"drop_rate": 0.1},
            58,
            (
                "features.denseblock1.denselayer1.dropout()",
                "features.denseblock1.denselayer2.norm1",
            ),
        ),
    ],
)
def test_models_of_torchvision(name, options, count, first):
    with torch.device("meta"):  # read, not run
        model = torchvision.models.get_model(name, weights=None, **options)
    report = check_order(model)
    assert not report.unreadable
    found = pairs(model)
    assert len(found) == count
    assert found[:1] == ([] if first is None else [first])
    modules = dict(model.named_modules())
    kinds = {type(modules[f.batch_norm]) for f in report}
    assert kinds == ({nn.BatchNorm2d} if count else set())


def test_models_that_are_none():
    with pytest.raises(TypeError, match=r"model has to be a torch\.nn\.Module, but got a int"):
        check_order(3)
    with pytest.raises(ValueError, match=r"0 \(LazyBatchNorm1d\) has no sizes yet"):
        check_order(nn.Sequential(nn.LazyBatchNorm1d()))


@pytest.mark.parametrize("name", ["order", "recalibration", "variance"])
def test_the_examples_in_the_docstrings(name):
    module = importlib.import_module(f"torchdrop.diagnostics.{name}")
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0


class TwoDropouts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.a(F.dropout(x, 0.5, self.training))
        return self.b(F.dropout(x, 0.5, self.training))


def test_functions_of_one_rate_in_one_forward_are_findings_of_their_own():
    found = check_order(TwoDropouts())
    assert [(f.dropout, f.batch_norm, f.further) for f in found] == [
        ("dropout()", "a", ()),
        ("dropout()", "b", ()),
    ]
