"""StochasticDepth where the module changes the shape: how shapes are compared, and projections."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from torchdrop.layers import StochasticDepth, stochastic_depth
from torchdrop.rows import sampling

SCALES = ["train", "eval", "none"]
MODES = ["row", "batch"]


# Shapes


STRIDED = nn.Conv2d(4, 8, 3, stride=2, padding=1)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projection", [None, nn.Conv2d(4, 8, 1)])
def test_shapes_that_do_not_agree_are_named(p, mode, scale, training, projection):
    layer = StochasticDepth(STRIDED, p, projection, mode, scale).train(training)
    name, shape = (
        ("x", r"\(2, 4, 8, 8\)") if projection is None else (r"projection\(x\)", r"\(2, 8, 8, 8\)")
    )
    if mode == "row":
        shape = shape.replace("2", "[12]", 1)
    with pytest.raises(
        ValueError, match=rf"{name} has {shape} and module\(x\) has \([12], 8, 4, 4\).*pass a proj"
    ):
        layer(torch.randn(2, 4, 8, 8))


def test_the_look_at_shapes_touches_nothing():
    class Norm(nn.Sequential):
        seen = 0

        def forward(self, x):
            Norm.seen += not x.is_meta
            return super().forward(x)

    module = Norm(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5))
    projection = Norm(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
    calls = []
    for m in (*module.modules(), *projection.modules()):
        m.register_forward_hook(lambda *args: calls.append(args))
    layer = StochasticDepth(module, 1.0, projection)
    x = torch.randn(2, 4, 8, 8)
    layer.eval()(x)  # compares projection(x), which it does not need
    state = copy.deepcopy(layer.state_dict())
    assert Norm.seen == 1
    assert len(calls) == 4
    layer = StochasticDepth(module, 1.0, projection.eval())
    layer.training = True
    torch.manual_seed(0)
    layer(x)  # compares module(x), which it drops
    rng = torch.get_rng_state()
    torch.manual_seed(0)
    sampling.keep_batch(1.0)
    assert torch.equal(rng, torch.get_rng_state())
    assert Norm.seen == 2
    assert len(calls) == 7
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key])


def test_the_look_at_shapes_happens_once_for_each_shape(monkeypatch):
    looked = []
    shape_of = stochastic_depth._output_shape_of
    monkeypatch.setattr(
        stochastic_depth, "_output_shape_of", lambda *a: looked.append(a) or shape_of(*a)
    )
    layer = StochasticDepth(nn.Conv2d(4, 8, 1), 0.5, nn.Conv2d(4, 8, 1)).eval()
    for batch in (1, 2, 3):
        layer(torch.randn(batch, 4, 8, 8))
    assert len(looked) == 1
    layer(torch.randn(1, 4, 9, 9))
    assert len(looked) == 2
    for size in range(10, 100):
        layer(torch.randn(1, 4, size, 1))
    assert len(layer._checked_shapes) <= stochastic_depth._MAX_CHECKED_SHAPES


def test_a_module_that_cannot_run_without_values_is_compared_when_it_runs():
    class Reads(nn.Module):
        def forward(self, x):
            return x[:, : 1 + int(x.sum() > 1e9)]

    layer = StochasticDepth(Reads(), 1.0)
    assert layer(torch.randn(2, 4)).shape == (2, 4)
    layer.p = 0.0
    with pytest.raises(ValueError, match=r"x has \(2, 4\) and module\(x\) has \(2, 1\)"):
        layer(torch.randn(2, 4))


def test_row_mode_needs_rows(decide):
    decide([0, 2])

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(0, keepdim=True)

    with pytest.raises(ValueError, match=r"x has \(2, 6\) and module\(x\) has \(1, 6\)"):
        StochasticDepth(Mean(), 0.5, mode="row")(torch.randn(4, 6))


# Projections


def test_copy_is_a_copy_of_the_first_convolution():
    models = pytest.importorskip("torchvision.models")
    stage = models.resnet18().layer2
    layer = StochasticDepth(stage, 0.5, "copy")
    first = stage[0].conv1
    assert isinstance(layer.projection, nn.Conv2d)
    assert layer.projection is not first
    assert torch.equal(layer.projection.weight, first.weight)
    assert layer.projection.weight is not first.weight
    assert layer.projection.stride == (2, 2)


@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer4"])
def test_copy_does_not_fit_a_bottleneck_stage(stage):
    models = pytest.importorskip("torchvision.models")
    module = getattr(models.resnet50(), stage)
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(
        ValueError,
        match=r"'copy' does not fit.*first convolution, '0.conv1', gives \(2, \d+, .*downsample",
    ):
        StochasticDepth(module, 0.5, "copy")
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


class _NotOnMeta(nn.Module):
    def forward(self, x):
        return x * float(x.sum())


@pytest.mark.parametrize(
    "stage",
    [
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2)),
        nn.Sequential(nn.Conv1d(4, 8, 3)),
        nn.Sequential(nn.Conv2d(4, 8, 1), _NotOnMeta(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)),
    ],
    ids=["pool", "later stride", "fits", "channels, read from the layers"],
)
def test_copy_compares_the_whole_stage(stage):
    if len(stage) == 1:
        assert StochasticDepth(stage, 0.5, "copy")(torch.randn(1, 4, 9)).shape == (1, 8, 7)
        return
    with pytest.raises(ValueError, match=r"'copy' does not fit: .*first convolution, '0', gives"):
        StochasticDepth(stage, 0.5, "copy")


def test_copy_needs_a_convolution():
    with pytest.raises(ValueError, match=r"'copy' needs a convolution .* Linear has none"):
        StochasticDepth(nn.Linear(2, 2), 0.5, "copy")


def shared():
    models = pytest.importorskip("torchvision.models")
    stage = models.resnet18().layer2
    return StochasticDepth(stage, 0.5, stage[0].downsample)


def test_a_shared_projection_is_one_object_with_two_names():
    layer = shared()
    assert layer.projection is layer.module[0].downsample
    keys = set(layer.state_dict())
    assert {"projection.0.weight", "module.0.downsample.0.weight"} <= keys
    assert len(list(layer.parameters())) == len({id(p) for p in layer.parameters()})
    assert len(list(layer.parameters())) == len(list(layer.module.parameters()))


def through_a_file(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file]
)
def test_a_shared_projection_stays_shared(twin_of):
    layer = shared()
    twin = twin_of(layer)
    assert twin.projection is twin.module[0].downsample
    assert twin.projection is not layer.projection
    x = torch.randn(2, 64, 8, 8)
    torch.manual_seed(0)
    expected = [layer(x) for _ in range(4)]
    torch.manual_seed(0)
    assert all(torch.equal(twin(x), y) for y in expected)


def test_a_shared_projection_loads_and_trains():
    layer, other = shared(), shared()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.projection[0].weight, layer.projection[0].weight)
    assert other.projection is other.module[0].downsample
    weight = layer.projection[0].weight
    layer.p = 1.0  # only the projection runs, and its gradient is not wiped by the zeros
    layer(torch.randn(2, 64, 8, 8)).square().sum().backward()
    assert weight.grad.abs().sum() > 0
    assert layer.module[1].conv1.weight.grad.abs().sum() == 0


# The use that people ask for


def wrap_resnet18(model, p, mode, scale):
    model.layer1 = StochasticDepth(model.layer1, p, mode=mode, scale=scale)
    new = nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False)
    model.layer2 = StochasticDepth(model.layer2, p, new, mode, scale)
    model.layer3 = StochasticDepth(model.layer3, p, model.layer3[0].downsample, mode, scale)
    model.layer4 = StochasticDepth(model.layer4, p, "copy", mode, scale)
    return model


@pytest.mark.parametrize("scale", ["train", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_fine_tuning_resnet18(mode, scale):
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(num_classes=4).eval()
    x, labels = torch.randn(6, 3, 48, 48), torch.arange(6) % 4
    with torch.no_grad():
        before = model(x)
        wrap_resnet18(model, 0.25, mode, scale)
        assert torch.equal(model(x), before)  # model.eval() need not be called again
        assert torch.equal(model.eval()(x), before)

    def undropped_loss():
        wrapped = (model.layer1, model.layer2, model.layer3, model.layer4)
        for layer in wrapped:
            layer.p = 0.0
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(x), labels).item()
        for layer in wrapped:
            layer.p = 0.25
        return loss

    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    first = undropped_loss()
    reached = set()
    for _ in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None  # in every step, whatever ran
            if p.grad.any():
                reached.add(name)
        optimizer.step()
    assert reached == {name for name, _ in model.named_parameters()}
    assert undropped_loss() < first - 0.1


def test_wrapping_renames_keys_as_the_docstring_says():
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18()
    model.layer1 = StochasticDepth(model.layer1, 0.1)
    assert "layer1.module.0.conv1.weight" in model.state_dict()
