from __future__ import annotations

import pickle
from statistics import fmean

import pytest
import torch
from torch import nn

import torchdrop
from torchdrop.app import methods
from torchdrop.app.errors import UserError
from torchdrop.app.methods import METHODS, Applied, Method, rates
from torchdrop.app.models import CifarResNet, FractalNet, Join
from torchdrop.functional import drop_block_gamma

torchvision = pytest.importorskip("torchvision")

NAMES = list(METHODS)
NOISE = ("gaussian_dropout", "uniform_dropout")
BEHIND_BLOCKS = ("drop_block", "spatial_dropout", *NOISE)


def _net(name):
    return FractalNet(10, 1) if name == "path_drop" else CifarResNet(8, 10, 1)


def _applied(name, p, model=None):
    model = _net(name) if model is None else model
    return model, METHODS[name].build(model, p)


def test_the_methods_of_the_table():
    assert NAMES[:6] == [
        "none",
        "dropout",
        "drop_path",
        "stochastic_depth_row",
        "stochastic_depth_batch",
        "subsample",
    ]
    assert NAMES[6:] == [
        "dropout_before_bn",
        "dropout_after_bn",
        "drop_block",
        "spatial_dropout",
        "gaussian_dropout",
        "uniform_dropout",
        "shake_drop",
        "cutout",
        "path_drop",
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_every_method_leaves_evaluation_and_the_weights_alone(name, p):
    torch.manual_seed(0)
    dense = _net(name).eval()
    torch.manual_seed(0)
    model, _ = _applied(name, p)
    x = torch.randn(4, 1, 8, 8)
    assert list(model.state_dict()) == list(dense.state_dict())
    # By definition the paper's scaling and ShakeDrop multiply by the expectation in evaluation.
    scales = p > 0 and name in {"stochastic_depth_batch", "shake_drop"}
    assert torch.equal(model.eval()(x), dense(x)) == (not scales)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_can_be_sent_to_a_worker(name):
    model, applied = _applied(name, 0.5)
    model, applied = pickle.loads(pickle.dumps((model, applied)))
    images, _labels = applied.batch(torch.randn(8, 1, 8, 8), torch.zeros(8).long())
    model.train()(images)
    assert name in {"none", *NOISE} or applied.observed() is not None
    assert applied.reached


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"none", *NOISE}])
def test_every_method_delivers_what_is_asked(name):
    torch.manual_seed(0)
    model, applied = _applied(name, 0.5)
    model.train()
    for _ in range(60):
        images, _ = applied.batch(torch.randn(40, 1, 8, 8), torch.zeros(40).long())
        with torch.no_grad():
            model(images)
    # 60 draws of the whole batch in 3 blocks are the coarsest: a standard error of .036.
    assert applied.observed() == pytest.approx(applied.asked, abs=0.12)
    assert applied.observed() is None or name.startswith(("drop_path", "stochastic"))


def test_asked_is_the_mean_over_the_linear_decay():
    _, applied = _applied("stochastic_depth_row", 0.6)
    assert applied.asked == pytest.approx(fmean([0.2, 0.4, 0.6]))


# --- p


def test_p_is_the_default_then_for_all_then_for_one():
    assert rates(["none", "dropout", "subsample"], []) == {
        "none": None,
        "dropout": METHODS["dropout"].p,
        "subsample": None,
    }
    names = ["none", "dropout", "drop_path", "subsample"]
    assert rates(names, ["dropout=0.1", "0.7"]) == {
        "none": None,
        "dropout": 0.1,
        "drop_path": 0.7,
        "subsample": None,
    }
    assert rates(["subsample"], ["subsample=0.25"]) == {"subsample": 0.25}
    assert rates(["dropout"], [], {"dropout": 0.9}) == {"dropout": 0.9}


def test_beta_is_no_probability_and_is_given_by_name():
    names = ["dropout", "uniform_dropout"]
    assert rates(names, ["0.7"]) == {"dropout": 0.7, "uniform_dropout": 0.1}
    assert rates(names, ["0.7", "uniform_dropout=1"]) == {"dropout": 0.7, "uniform_dropout": 1.0}


@pytest.mark.parametrize("legal", ["0", "1", "0.0", "1.0"])
def test_p_may_be_zero_and_one(legal):
    assert rates(["dropout"], [legal]) == {"dropout": float(legal)}


@pytest.mark.parametrize("entry", ["1.5", "-0.1", "nan", "half", "dropout=2", "dropout=", "="])
def test_p_outside_of_zero_and_one_is_refused(entry):
    with pytest.raises(UserError, match=r"--p .*(between 0 and 1, as in --p 0\.3|not among)"):
        rates(["none", "dropout"], [entry])


def test_p_of_a_method_that_is_not_compared_is_refused():
    with pytest.raises(UserError, match="'droppath' is not among the methods compared: none, drop"):
        rates(["none", "dropout"], ["droppath=0.1"])
    with pytest.raises(UserError, match="the method 'none' has no p"):
        rates(["none", "dropout"], ["none=0.1"])


# --- dropout


def test_dropout_goes_in_front_of_the_last_linear():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 50), nn.Linear(50, 3)

        def forward(self, x):
            self.hidden = self.first(x)
            return self.last(self.hidden)

    model, applied = _applied("dropout", 0.4, Net())
    seen = []
    model.last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    model.train()(torch.randn(100, 4))
    dropped = seen[0] == 0
    torch.testing.assert_close(seen[0][~dropped], (model.hidden / 0.6)[~dropped])
    assert applied.observed() == pytest.approx(float(dropped.float().mean()))
    model.eval()(torch.randn(100, 4))
    assert torch.equal(seen[1], model.hidden)


def test_dropout_does_not_count_what_was_zero_before():
    model, applied = _applied("dropout", 0.5, nn.Linear(2, 1))
    torch.manual_seed(0)
    x = torch.ones(2000, 2)
    x[:, 0] = 0
    model.train()(x)
    assert applied.observed() == pytest.approx(0.5, abs=0.05)


def test_dropout_without_a_linear_is_refused():
    with pytest.raises(UserError, match=r"last nn\.Linear .* has none; leave dropout out"):
        METHODS["dropout"].build(nn.Conv2d(1, 1, 1), 0.5)


def test_dropout_skips_the_projection_inside_attention():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    METHODS["dropout"].build(model, 0.5)
    assert model[0]._forward_pre_hooks


# --- stochastic depth


def test_a_network_without_residuals_is_refused_in_one_line():
    with pytest.raises(UserError) as error:
        METHODS["stochastic_depth_row"].build(nn.Sequential(nn.Conv2d(1, 1, 1)), 0.5)
    assert "\n" not in str(error.value)


def test_drop_path_computes_every_branch_and_rows_do_not():
    from torchdrop import cost

    x = torch.randn(20, 1, 8, 8)
    counts = {}
    for name in ("none", "drop_path", "stochastic_depth_row", "stochastic_depth_batch"):
        torch.manual_seed(0)
        model, _ = _applied(name, 0.9)
        counts[name] = cost.flops(model.train(), x)
    assert counts["drop_path"] == counts["none"]
    assert counts["stochastic_depth_row"] < 0.7 * counts["none"]
    assert counts["stochastic_depth_batch"] < counts["none"]


def test_methods_are_the_ones_of_torchdrop():
    for name in ("drop_path", "stochastic_depth_row", "stochastic_depth_batch"):
        model, applied = _applied(name, 0.5)
        assert torchdrop.has_stochastic_depth(model)
        assert len(applied.plan.blocks) == 3


# --- dropout and the last BatchNorm


def _values(module, hook):
    """What a module is given, or gives, from now on."""
    seen = []
    if hook == "in":
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    else:
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.detach()))
    return seen


@pytest.mark.parametrize(
    ("name", "side"), [("dropout_before_bn", "in"), ("dropout_after_bn", "out")]
)
def test_dropout_stands_next_to_the_last_batch_norm(name, side):
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1)
    last = model.layer3[-1].bn2
    before = _values(last, side)
    model, applied = _applied(name, 0.4, model)
    after = _values(last, side)
    model.train()(torch.randn(50, 1, 8, 8))
    dropped = after[0] == 0
    assert applied.observed() == pytest.approx(float(dropped.float().mean()), abs=1e-6)
    assert float(dropped.float().mean()) == pytest.approx(0.4, abs=0.02)
    torch.testing.assert_close(after[0][~dropped], before[0][~dropped] / 0.6)
    other = _values(last, "out" if side == "in" else "in")
    model(torch.randn(50, 1, 8, 8))
    assert not (other[0] == 0).any()


@pytest.mark.parametrize("name", ["dropout_before_bn", "dropout_after_bn"])
def test_dropout_without_a_batch_norm_is_refused(name):
    with pytest.raises(UserError, match=rf"last BatchNorm .* has none; leave {name} out of --meth"):
        METHODS[name].build(nn.Sequential(nn.Conv2d(1, 1, 1)), 0.5)


# --- behind residual blocks


@pytest.mark.parametrize("name", BEHIND_BLOCKS)
def test_the_deeper_half_of_the_blocks_is_changed(name):
    model = CifarResNet(20, 10, 1)
    x = torch.randn(8, 1, 8, 8)
    blocks = [*model.layer1, *model.layer2, *model.layer3]
    seen = [_values(block, "out") for block in blocks]  # before the method changes it
    _applied(name, 0.5, model)
    changed = [_values(block, "out") for block in blocks]
    model.train()(x)
    differ = [not torch.equal(a[0], b[0]) for a, b in zip(seen, changed, strict=True)]
    assert differ == [False] * 4 + [True] * 5
    model.eval()(x)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(seen, changed, strict=True))


@pytest.mark.parametrize("name", BEHIND_BLOCKS)
def test_a_network_without_residual_blocks_is_refused_by_each(name):
    with pytest.raises(UserError, match=rf"this one has none .* leave {name} out of --methods$"):
        METHODS[name].build(nn.Sequential(nn.Conv2d(1, 1, 1)), 0.5)


@pytest.mark.parametrize("side", [14, 8, 7, 4, 2, 1])
def test_blocks_are_half_a_map_and_one_at_most_seven(side, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        methods.registry.functional, "drop_block2d", lambda x, p, size, training: sizes.append(size) or x
    )
    model, _ = _applied("drop_block", 0.1)
    model.layer3[0](torch.randn(2, 32, 2 * side, 2 * side))
    assert sizes == [(min(side // 2 + 1, 7),) * 2]
    assert 0 < drop_block_gamma((side, side), sizes[0], 0.1) <= 0.1


def test_drop_block_drops_blocks():
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1)
    before = _values(model.layer3[0], "out")
    _applied("drop_block", 0.3, model)
    after = _values(model.layer3[0], "out")
    model.train()(torch.randn(50, 1, 8, 8))
    dropped = (before[0] != 0) & (after[0] == 0)
    # Maps of 2x2 and blocks of 2x2: a map is dropped whole, or not at all.
    maps = dropped.flatten(2).any(-1)
    assert float(maps.float().mean()) == pytest.approx(0.3, abs=0.05)
    assert not after[0].flatten(2)[maps].any()


def test_channels_are_where_the_blocks_have_them():
    """Dimension 1 behind convolutions; the last one of tokens, where DropBlock has no place."""
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1)
    METHODS["spatial_dropout"].build(model, 0.5)
    maps = _values(model.layer3[0], "out")
    model.train()(torch.rand(8, 1, 16, 16))
    gone = (maps[0] == 0).flatten(2).all(-1)
    assert 0.3 < float(gone.float().mean()) < 0.9

    vit = _vit()
    METHODS["spatial_dropout"].build(vit, 0.5)
    tokens = _values(vit.encoder.layers[-1], "out")
    vit.train()(torch.randn(8, 3, 32, 32))
    gone = (tokens[0] == 0).all(1)
    assert gone.shape == (8, 48)
    assert float(gone.float().mean()) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UserError, match="with a convolution, and this network has none in its"):
        METHODS["drop_block"].build(_vit(), 0.5)


def _vit():
    return torchvision.models.VisionTransformer(32, 16, 4, 4, 48, 96, num_classes=10)


def test_drop_block_behind_blocks_without_maps_says_so():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.fc(self.bn(x).relu())

    model, _ = _applied("drop_block", 0.5, nn.Sequential(Block(), Block()))
    with pytest.raises(UserError, match=r"drop_block needs maps, .* but got \(3, 4\); leave"):
        model(torch.randn(3, 4))


def test_a_block_that_returns_no_tensor_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = x + self.fc(x).relu()
            return x, None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x, _ = block(x)
            return x

    model, _ = _applied("uniform_dropout", 0.5, Net())
    with pytest.raises(
        UserError, match="what a Block gives, which has to be a tensor, but it is a"
    ):
        model(torch.randn(3, 4))


def test_noise_has_the_variance_asked_for():
    for name, variance in (("gaussian_dropout", 1.0), ("uniform_dropout", 0.25 / 3)):
        torch.manual_seed(0)
        model = CifarResNet(8, 10, 1)
        seen = _values(model.layer3[0], "out")
        model, applied = _applied(name, 0.5, model)
        noisy = _values(model.layer3[0], "out")
        with torch.no_grad():
            model.train()(torch.randn(200, 1, 8, 8))
        kept = seen[0] != 0
        factor = noisy[0][kept] / seen[0][kept]
        assert float(factor.mean()) == pytest.approx(1, abs=0.02)
        assert float(factor.var()) == pytest.approx(variance, rel=0.05)
        # Nothing is dropped, and no drop rate is made up.
        assert (applied.asked, applied.observed()) == (None, None)


def test_gaussian_noise_of_infinite_variance_is_refused():
    with pytest.raises(UserError, match="gaussian_dropout: p has to be below 1"):
        METHODS["gaussian_dropout"].build(CifarResNet(8), 1.0)


# --- shake_drop


def test_shake_drop_shakes_each_branch_with_a_rate_that_grows():
    torch.manual_seed(0)
    model, applied = _applied("shake_drop", 0.6)
    assert [hook.change.keywords["p"] for hook in applied.hooks] == pytest.approx([0.2, 0.4, 0.6])
    assert applied.asked == pytest.approx(0.4)
    with torch.no_grad():
        for _ in range(40):
            model.train()(torch.randn(50, 1, 8, 8))
    observed = [hook.observed() for hook in applied.hooks]
    assert observed == pytest.approx([0.2, 0.4, 0.6], abs=0.04)


def test_shake_drop_multiplies_the_branch_and_not_the_sum():
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1)
    block = model.layer3[-1]
    dense = _values(block.bn2, "out")  # before the method changes it
    _applied("shake_drop", 0.9, model)
    branch, skip, out = (_values(m, "out") for m in (block.bn2, block.shortcut, block))
    model.eval()(torch.randn(4, 1, 8, 8))
    torch.testing.assert_close(branch[0], 0.1 * dense[0])  # the expectation
    torch.testing.assert_close(out[0], torch.relu(branch[0] + skip[0]))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "vit"])
def test_shake_drop_finds_the_branches_of_torchvision_models(name):
    model = _vit() if name == "vit" else torchvision.models.get_model(name, weights=None)
    branches = [b for block in torchdrop.find_residuals(model) for b in block.branches]
    applied = METHODS["shake_drop"].build(model, 0.5)
    assert len(applied.hooks) == len(branches)


def test_shake_drop_on_a_branch_that_is_no_module_s_output_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + torch.relu(self.fc(x))

    with pytest.raises(UserError, match=r"that of 0 is no module's own; leave shake_drop out"):
        METHODS["shake_drop"].build(nn.Sequential(Block(), Block()), 0.5)


def test_shake_drop_on_a_module_that_is_called_twice_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.1)

        def forward(self, x):
            x = x + self.last(torch.relu(self.one(x)))
            return x + self.last(torch.relu(self.two(x)))

    with pytest.raises(UserError, match=r"that of 0:one is no module's own; leave shake_drop out"):
        METHODS["shake_drop"].build(nn.Sequential(Block(), Block()), 0.5)


# --- cutout


def test_cutout_cuts_every_sample_its_own_hole_of_half_the_side():
    torch.manual_seed(0)
    _, applied = _applied("cutout", 1.0)
    images = torch.ones(200, 1, 8, 8)
    cut, labels = applied.batch(images, torch.arange(200))
    assert torch.equal(labels, torch.arange(200))
    assert images.all()
    holes = (cut == 0).flatten(1)
    assert int(holes.sum(1).max()) == 16  # 4x4 where it fits
    assert len({tuple(hole.tolist()) for hole in holes}) > 40
    assert applied.observed() == 1.0
    assert applied.observed() is None


# --- path_drop


def test_path_drop_needs_a_fractal_net():
    with pytest.raises(UserError, match="joins of a FractalNet; give --model fractalnet, or leave"):
        METHODS["path_drop"].build(CifarResNet(8), 0.15)


@pytest.mark.parametrize("p", [0.15, 0.9])
def test_path_drop_delivers_the_rate_of_half_local_half_global(p):
    torch.manual_seed(0)
    model, applied = _applied("path_drop", p)
    # Joins of 2 and of 3 columns, as many of each.
    local = [p - p**n / n for n in (2, 3)]
    assert applied.asked == pytest.approx(fmean(local) / 2 + fmean([1 / 3, 2 / 3]) / 2)
    with torch.no_grad():
        for _ in range(10):
            model.train()(torch.randn(200, 1, 4, 4))
    assert applied.observed() == pytest.approx(applied.asked, abs=0.02)
    assert applied.observed() is None


def test_a_join_tells_what_its_path_drop_kept():
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


def test_what_a_join_counts_draws_nothing_more():
    join = Join(2)
    join.drop.p = 0.5
    columns = [torch.zeros(10, 1), torch.ones(10, 1)]
    torch.manual_seed(0)
    join(columns, torch.full((10,), -1))
    after = torch.rand(3)
    torch.manual_seed(0)
    join.drop(*columns, column=torch.full((10,), -1))
    assert torch.equal(torch.rand(3), after)


# --- subsample


@pytest.mark.parametrize(("batch", "p"), [(100, 0.303), (7, 0.5), (3, 0.9), (2, 0.5), (1, 0.3)])
def test_subsample_keeps_the_mean_exactly_and_never_a_single_row(batch, p):
    torch.manual_seed(0)
    _, applied = _applied("subsample", p)
    sizes = []
    for _ in range(4000):
        images, labels = applied.batch(torch.arange(batch), torch.arange(batch))
        assert torch.equal(images, labels)
        assert len(set(images.tolist())) == len(images)
        sizes.append(len(images))
    assert batch == 1 or 1 not in sizes
    assert max(sizes) - min(sizes) <= 2
    # A size is one of two neighbours, or 0 and 2: the standard error is below .016.
    assert fmean(sizes) == pytest.approx(batch * (1 - p), abs=0.08)
    assert applied.observed() == pytest.approx(1 - fmean(sizes) / batch)


def test_subsample_at_the_ends():
    x = torch.arange(10)
    assert len(METHODS["subsample"].build(nn.Identity(), 0.0).batch(x, x)[0]) == 10
    assert len(METHODS["subsample"].build(nn.Identity(), 1.0).batch(x, x)[0]) == 0


# --- the registry


def test_methods_can_be_added_once(monkeypatch):
    monkeypatch.setattr(methods.registry, "METHODS", dict(METHODS))
    method = Method("mine", "does nothing", lambda model, p: Applied(), p=0.2)
    methods.register(method)
    assert methods.rates(["mine"], []) == {"mine": 0.2}
    with pytest.raises(ValueError, match="there is a method 'mine' already"):
        methods.register(method)
