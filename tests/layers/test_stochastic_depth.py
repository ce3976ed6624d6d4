"""StochasticDepth: the table of its docstring, surgery, messages, use."""

import copy
import io
import math
import pickle

import pytest
import torch
from scipy import stats
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from torchdrop.layers import DropPath, StochasticDepth, stochastic_depth
from torchdrop.rows import sampling

ALPHA = 1e-6
SCALES = ["train", "eval", "none"]
MODES = ["row", "batch"]


class Residual(nn.Module):
    """x + branch(x), and a count of the rows that it ran on."""

    def __init__(self, features=6):
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.rows = 0
        self.calls = 0

    def forward(self, x, scale=1.0, shift=None):
        self.rows += len(x)
        self.calls += 1
        y = x + scale * torch.tanh(self.linear(x))
        return y if shift is None else y + shift


@pytest.fixture
def x():
    return torch.randn(8, 6, dtype=torch.float64)


@pytest.fixture
def block():
    return Residual().double()


@pytest.fixture
def decide(monkeypatch):
    """Fix who is kept: a bool for the batch, or a list of rows."""

    def fix(kept):
        monkeypatch.setattr(stochastic_depth, "keep_batch", lambda p, sync_ranks: kept)
        monkeypatch.setattr(
            stochastic_depth, "keep_rows", lambda batch, p: torch.tensor(kept).long()
        )

    return fix


# The table


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("projected", [False, True])
def test_dropped_is_the_skip_and_the_module_does_not_run(x, block, decide, scale, projected):
    projection = nn.Linear(6, 6).double() if projected else None
    layer = StochasticDepth(block, 0.3, projection, scale=scale)
    decide(False)
    expected = projection(x) if projected else x
    assert torch.equal(layer(x), expected)
    assert block.calls == 0


@pytest.mark.parametrize("projected", [False, True])
def test_kept_in_training(x, block, decide, projected):
    projection = nn.Linear(6, 6).double() if projected else None
    decide(True)
    s = projection(x) if projected else x
    out = {scale: StochasticDepth(block, 0.3, projection, scale=scale)(x) for scale in SCALES}
    assert torch.allclose(out["train"], s + (block(x) - s) / 0.7, rtol=1e-12)
    assert torch.equal(out["eval"], block(x))
    assert torch.equal(out["none"], block(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("projected", [False, True])
def test_evaluation(x, block, mode, projected):
    projection = nn.Linear(6, 6).double() if projected else None
    s = projection(x) if projected else x
    out = {
        scale: StochasticDepth(block, 0.3, projection, mode, scale).eval()(x) for scale in SCALES
    }
    assert torch.equal(out["train"], block(x))
    assert torch.equal(out["none"], block(x))
    assert torch.allclose(out["eval"], 0.7 * block(x) + 0.3 * s, rtol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("projected", [False, True])
def test_row_mode_is_the_masked_dense_layer_forward_and_backward(x, scale, projected, decide):
    kept = [0, 3, 4]
    decide(kept)
    block = Residual().double()
    projection = nn.Linear(6, 6).double() if projected else None
    layer = StochasticDepth(block, 0.3, projection, "row", scale)
    dense, skip = copy.deepcopy((block, projection))
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()

    got = layer(x)
    s = skip(y) if projected else y
    m = s + (dense(y) - s) / 0.7 if scale == "train" else dense(y)
    mask = torch.zeros(8, 1, dtype=torch.bool)
    mask[kept] = True
    expected = torch.where(mask, m, s)

    assert block.rows == 3
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    assert torch.equal(got[~mask[:, 0]], s[~mask[:, 0]])
    if scale != "train":
        assert torch.equal(got[kept], block(x[kept]))
    g = torch.randn_like(got)
    got.backward(g)
    expected.backward(g)
    assert torch.allclose(x.grad, y.grad, rtol=0, atol=1e-10)
    for a, b in zip(block.parameters(), dense.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=0, atol=1e-10)


def test_the_reference_of_row_mode_can_fail(x, block, decide):
    decide([0, 3, 4])
    got = StochasticDepth(block, 0.3, mode="row")(x)
    unscaled = x.clone()
    unscaled[[0, 3, 4]] = block(x[[0, 3, 4]])
    assert not torch.allclose(got, unscaled, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", SCALES)
def test_row_mode_at_its_ends(x, block, decide, scale):
    layer = StochasticDepth(block, 0.3, mode="row", scale=scale)
    decide([])
    assert torch.equal(layer(x), x)
    assert block.calls == 0
    decide(list(range(8)))
    batch = StochasticDepth(block, 0.3, scale=scale)
    whole = layer(x)
    assert block.rows == 8
    decide(True)
    assert torch.equal(whole, batch(x))


def test_row_mode_gathers_nothing_where_all_rows_stay(x, block, decide, monkeypatch):
    decide(list(range(8)))

    def take(*args):
        raise AssertionError("gathered")

    monkeypatch.setattr(stochastic_depth, "take", take)
    layer = StochasticDepth(block, 0.3, mode="row")
    assert torch.equal(layer(x), x + (block(x) - x) / 0.7)
    decide([0, 3])
    with pytest.raises(AssertionError, match="gathered"):
        layer(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", SCALES)
def test_p_0_and_p_1(x, block, mode, scale):
    never = StochasticDepth(block, 0, mode=mode, scale=scale)
    assert torch.equal(never(x), block(x))
    assert torch.equal(never.eval()(x), block(x))
    block.train().calls = 0
    always = StochasticDepth(block, 1, mode=mode, scale=scale)
    assert torch.equal(always(x), x)
    assert block.calls == 0
    assert torch.equal(always.eval()(x), x if scale == "eval" else block(x))


def test_p_1_of_the_papers_rule_does_not_ask_a_module_that_never_trained(x):
    class Diverged(nn.Module):
        def forward(self, x):
            return x * math.inf

    layer = StochasticDepth(Diverged(), 1.0, scale="eval").eval()
    assert torch.equal(layer(x), x)


# Statistics


def drop_rate_is_right(layer, p, times=4000):
    torch.manual_seed(0)
    x = torch.ones(1, 1)
    gone = sum(bool(layer(x) == x) for _ in range(times))
    return stats.binomtest(gone, times, p).pvalue > ALPHA


class PlusOne(nn.Module):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize("mode", MODES)
def test_rate(mode):
    assert drop_rate_is_right(StochasticDepth(PlusOne(), 0.3, mode=mode), 0.3)


@pytest.mark.parametrize("mode", MODES)
def test_rate_can_fail(mode):
    assert not drop_rate_is_right(StochasticDepth(PlusOne(), 0.7, mode=mode), 0.3)


def mean_agrees_with_evaluation(layer):
    torch.manual_seed(0)
    x = torch.zeros(4, 1)
    mean = torch.stack([layer.train()(x) for _ in range(4000)]).mean(0)
    sigma = math.sqrt(0.3 / 0.7 / 4000)
    return bool(((mean - layer.eval()(x)).abs() < 5 * sigma).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", ["train", "eval"])
def test_mean_of_training_is_evaluation(mode, scale):
    assert mean_agrees_with_evaluation(StochasticDepth(PlusOne(), 0.3, mode=mode, scale=scale))


def test_mean_can_fail():
    """LayerDrop does not keep the mean, by definition."""
    assert not mean_agrees_with_evaluation(StochasticDepth(PlusOne(), 0.3, scale="none"))


# Gradients, memory, dtypes


@pytest.mark.parametrize("mode", MODES)
def test_a_module_that_did_not_run_gets_gradients_of_zero(mode):
    block, x = Residual(), torch.randn(4, 6)
    StochasticDepth(block, 1.0, mode=mode)(x).sum().backward()
    for p in block.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))
    block = Residual()
    x.requires_grad_()
    StochasticDepth(block, 1.0, mode=mode, zero_grad=False)(x).sum().backward()
    assert all(p.grad is None for p in block.parameters())
    assert torch.equal(x.grad, torch.ones(4, 6))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_no_parameter_is_ever_left_without_gradient(scale, mode, p):
    for _ in range(6):
        layer = StochasticDepth(Residual(), p, nn.Linear(6, 6), mode, scale)
        layer(torch.randn(4, 6)).sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


def test_frozen_parameters_stay_without_gradient():
    block = Residual().requires_grad_(False)
    assert not StochasticDepth(block, 1.0)(torch.randn(4, 6)).requires_grad


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_an_in_place_activation_after_a_dropped_module_leaves_the_input_alone(mode, zero_grad):
    x = torch.randn(4, 6)
    before = x.clone()
    model = nn.Sequential(
        StochasticDepth(Residual(), 1.0, mode=mode, zero_grad=zero_grad), nn.ReLU(inplace=True)
    )
    model(x).sum().backward() if zero_grad else model(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("mode", MODES)
def test_a_module_that_overwrites_its_input_is_refused(mode, decide):
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))
    decide(True if mode == "batch" else [0, 2])
    layer = StochasticDepth(module, 0.5, mode=mode)
    with pytest.raises(RuntimeError, match=r"Sequential changed it in place.*=False"):
        layer(torch.randn(4, 6))
    unscaled = StochasticDepth(module, 0.5, scale="none").eval()  # needs no skip beside it
    unscaled(torch.randn(4, 6))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projected", [False, True])
def test_dtype_under_autocast_does_not_depend_on_the_decision(mode, scale, dtype, projected):
    module = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))  # gives float32 for bfloat16
    layer = StochasticDepth(module, 0.5, nn.Linear(6, 6) if projected else None, mode, scale)
    x = torch.randn(2, 6, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {layer(x).dtype for _ in range(30)} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_any_float_dtype(dtype, mode):
    layer = StochasticDepth(Residual(), 0.5, mode=mode).to(dtype)
    for _ in range(10):
        assert layer(torch.randn(5, 6).to(dtype)).dtype == dtype


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("projected", [False, True])
def test_channels_last_is_kept(mode, projected):
    conv = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    layer = StochasticDepth(conv, 0.5, copy.deepcopy(conv) if projected else None, mode)
    x = torch.randn(6, 8, 5, 5).to(memory_format=torch.channels_last)
    for _ in range(10):
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_batch_dim(decide):
    decide([1])
    x = torch.randn(5, 3, 6)
    layer = StochasticDepth(Residual(), 0.5, mode="row", scale="none", batch_dim=1)
    y = layer(x)
    assert torch.equal(y[:, [0, 2]], x[:, [0, 2]])
    assert torch.equal(y[:, 1:2], layer.module(x[:, 1:2]))


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(mode):
    layer = StochasticDepth(Residual(), 0.5, mode=mode)
    for _ in range(5):
        assert layer(torch.empty(0, 6)).shape == (0, 6)


def test_a_batchnorm_sees_only_rows_that_are_kept(decide):
    decide([1, 2, 5])
    norm = nn.BatchNorm1d(6)
    alone = copy.deepcopy(norm)
    x = torch.randn(8, 6)
    StochasticDepth(norm, 0.3, mode="row")(x)
    alone(x[[1, 2, 5]])
    assert torch.equal(norm.running_mean, alone.running_mean)
    assert torch.equal(norm.running_var, alone.running_var)


# Arguments


def test_more_arguments_are_passed_on(x, block, decide):
    shift = torch.randn(8, 6, dtype=torch.float64)
    layer = StochasticDepth(block, 0.5, scale="none")
    decide(True)
    assert torch.equal(layer(x, 2.0, shift=shift), block(x, 2.0, shift=shift))
    decide(False)
    assert torch.equal(layer(x, 2.0, shift=shift), x)
    by_row = StochasticDepth(block, 0.5, mode="row", scale="none")
    decide([2])
    assert torch.equal(by_row(x, 2.0)[2:3], block(x[2:3], 2.0))
    for extra in (shift, [shift], {"a": (shift,)}):
        with pytest.raises(
            ValueError, match=r"the module takes one tensor.*mode='batch'"
        ):
            by_row(x, 1.0, shift=extra)
    assert torch.equal(by_row.eval()(x, shift=shift), block(x, shift=shift))


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


# Company: fx, compile, checkpointing, meta, copies


def test_fx_sees_one_node_that_honours_eval(x, block):
    parent = nn.Sequential(nn.Identity(), StochasticDepth(block, 1.0))
    traced = fx.symbolic_trace(parent)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1"]
    assert torch.equal(traced.train()(x), x)
    assert torch.equal(traced.eval()(x), block(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of dynamo, at a break
def test_compiles_with_a_break(mode):
    torch._dynamo.reset()
    plain = StochasticDepth(nn.Linear(6, 6), 0.5, mode=mode)
    step = torch.compile(plain, backend="eager")
    x = torch.randn(4, 6)
    for seed in range(6):
        torch.manual_seed(seed)
        expected = plain(x)
        torch.manual_seed(seed)
        assert torch.allclose(step(x), expected)
    plain.eval()
    assert torch.allclose(step(x), plain(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_replays_the_decision(mode, reentrant):
    for seed in range(6):
        layer = StochasticDepth(Residual().double(), 0.5, mode=mode)
        grads = []
        for through in (False, True):
            x = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
            torch.manual_seed(seed)
            y = checkpoint(layer, x, use_reentrant=reentrant) if through else layer(x)
            torch.manual_seed(99)
            layer.zero_grad()
            y.square().sum().backward()
            grads.append((x.grad, *(p.grad for p in layer.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_meta_device(mode):
    with torch.device("meta"):
        layer = StochasticDepth(nn.Linear(6, 6), 0.5, mode=mode)
        for _ in range(5):
            assert layer(torch.empty(4, 6)).is_meta


def test_inference_mode(x, block, decide):
    expected = {False: x, True: x + (block(x) - x) / 0.5}
    layer = StochasticDepth(block, 0.5)
    for kept in (False, True):
        decide(kept)
        with torch.inference_mode():
            assert torch.equal(layer(x.clone()), expected[kept])


def test_a_frozen_part_of_the_module_stays_frozen():
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6).eval())
    assert not StochasticDepth(module, 0.5).module[1].training
    assert not StochasticDepth(module.eval(), 0.5).training


# The rate, the repr, the messages


def test_repr():
    text = repr(StochasticDepth(nn.Identity(), 0.2, zero_grad=False, batch_dim=1))
    assert "p=0.2, mode='batch', scale='train', batch_dim=1, zero_grad=False" in text


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: DropPath(0.1, "rows"), ValueError, r"mode .* 'batch' or 'row', but got 'rows'"),
        (lambda: DropPath(0.1, batch_dim=0.0), TypeError, r"batch_dim has to be an integer"),
        (lambda: StochasticDepth(abs, 0.1), TypeError, r"module has to be an nn\.Module, but got"),
        (lambda: StochasticDepth(STRIDED, 0.1, mode="x"), ValueError, r"mode .* but got 'x'"),
        (
            lambda: StochasticDepth(STRIDED, 0.1, scale="test"),
            ValueError,
            r"scale has to be one of 'train', 'eval', 'none', but got 'test'",
        ),
        (
            lambda: StochasticDepth(STRIDED, 0.1, "clone"),
            ValueError,
            r"projection has to be an nn\.Module, 'copy' or None, but got 'clone'",
        ),
        (
            lambda: StochasticDepth(STRIDED, 0.1, abs),
            TypeError,
            r"projection has to be an nn\.Module, 'copy' or None, but got builtin",
        ),
        (
            lambda: StochasticDepth(nn.LSTM(6, 6), 0.0)(torch.randn(2, 3, 6)),
            TypeError,
            r"has to return a tensor, but LSTM returned tuple",
        ),
        (
            lambda: StochasticDepth(STRIDED, 0.0)(torch.ones(2, dtype=torch.int64)),
            TypeError,
            r"input has to be a floating-point tensor",
        ),
        (
            lambda: DropPath(0.1, batch_dim=3)(torch.ones(2, 2)),
            ValueError,
            r"batch_dim has to be between -2 and 1",
        ),
    ],
)
def test_messages(make, error, match):
    with pytest.raises(error, match=match):
        make()
