"""StochasticDepth: the table of its docstring, surgery, messages, use."""

import copy
import math

import pytest
import torch
from scipy import stats
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from torchdrop.layers import DropPath, StochasticDepth, stochastic_depth

ALPHA = 1e-6
SCALES = ["train", "eval", "none"]
MODES = ["row", "batch"]
STRIDED = nn.Conv2d(4, 8, 3, stride=2, padding=1)


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
    # close, not equal: some processors round a product of a slice otherwise than that of its copy
    torch.testing.assert_close(y[:, 1:2], layer.module(x[:, 1:2]))


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
        with pytest.raises(ValueError, match=r"the module takes one tensor.*mode='batch'"):
            by_row(x, 1.0, shift=extra)
    assert torch.equal(by_row.eval()(x, shift=shift), block(x, shift=shift))


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
