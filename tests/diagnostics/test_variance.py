"""What diagnostics measure, against closed forms and on a small network that was trained."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchdrop
from small_nets import Auxiliary
from torchdrop.app.data import open_source
from torchdrop.app.models import CifarResNet
from torchdrop.diagnostics import recalibrate_batch_norm, variance_shift
from torchdrop.layers import DropPath, GaussianDropout, UniformDropout

ERRORS = 5.0  # how many standard errors a figure may be off its closed form
APART = 10.0  # and how many at least it has to be off a wrong one


# ---------------------------------------------------------------------------------------------
# Noise in front of BatchNorm

P, BETA = 0.4, 0.9
S = P / (1 - P)

# The layer; E[m^k] of its factor, k = 2, 3, 4; its closed form; one that is wrong.
NOISES = {
    "dropout": (
        lambda: nn.Dropout(P),
        [(1 - P) ** (1 - k) for k in (2, 3, 4)],
        lambda mean, var: (mean**2 + var) / (1 - P) - mean**2,
        lambda mean, var: var / (1 - P),  # the mean left out
    ),
    "uniform": (
        lambda: UniformDropout(BETA),
        [1 + BETA**2 / 3, 1 + BETA**2, 1 + 2 * BETA**2 + BETA**4 / 5],
        lambda mean, var: var + (mean**2 + var) * BETA**2 / 3,
        lambda mean, var: var + (mean**2 + var) * BETA**2 / 12,  # the variance of U(-b/2, b/2)
    ),
    "gaussian": (
        lambda: GaussianDropout(P),
        [1 + S, 1 + 3 * S, 1 + 6 * S + 3 * S**2],
        lambda mean, var: var + (mean**2 + var) * S,
        lambda mean, var: var + (mean**2 + var) * P,
    ),
}


def noisy_input():
    """16 batches of (256, 6), whose channels have other means and variances."""
    x = torch.randn(16, 256, 6, dtype=torch.float64)
    return x * torch.linspace(0.5, 2, 6) + torch.linspace(-1, 2, 6)


def standard_error(x, moments, repeats):
    """Of the mean over channels of V_train, the noise being random and ``x`` given.

    With y = m x and mu = E[x], V is to first order the mean of g = y^2 - 2 mu y, and
    Var[g | x] = x^4 Var[m^2] - 4 mu x^3 Cov[m^2, m] + 4 mu^2 x^2 Var[m].
    """
    m2, m3, m4 = moments
    flat = x.flatten(0, 1)
    mu = flat.mean(0)
    of_one = flat**4 * (m4 - m2**2) - 4 * mu * flat**3 * (m3 - m2) + 4 * mu**2 * flat**2 * (m2 - 1)
    return float((of_one.sum() / repeats).sqrt() / flat.numel())


@pytest.mark.parametrize("name", NOISES)
def test_noise_in_front_of_batch_norm_has_its_closed_form(name):
    layer, moments, right, wrong = NOISES[name]
    x = noisy_input()
    model = nn.Sequential(layer(), nn.BatchNorm1d(6)).double()
    (found,) = variance_shift(model, list(x), repeats=4)
    mean, var = x.flatten(0, 1).mean(0), x.var(1).mean(0)
    error = standard_error(x, moments, 4)
    assert found.var_eval == pytest.approx(float(var.mean()), rel=1e-12)
    assert abs(found.var_train - float(right(mean, var).mean())) < ERRORS * error
    assert abs(found.var_train - float(wrong(mean, var).mean())) > APART * error
    # the ratio is a mean of ratios, not the ratio of the means
    assert found.ratio == pytest.approx(float((right(mean, var) / var).mean()), rel=0.02)
    assert found.ratio != pytest.approx(found.var_train / found.var_eval, rel=0.02)


def test_nothing_dropped_is_a_ratio_of_one():
    model = nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(6)).double()
    (found,) = variance_shift(model, list(noisy_input()))
    assert [found.ratio, found.total_ratio, found.shift] == pytest.approx([1.0] * 3, rel=1e-12)


def test_convolutions_are_pooled_over_samples_and_positions():
    x = torch.randn(3, 8, 2, 5, 7) * torch.tensor([1.0, 3.0]).view(2, 1, 1)
    model = nn.Sequential(nn.Identity(), nn.BatchNorm2d(2))
    (found,) = variance_shift(model, list(x))
    by_hand = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in x]).double().mean(0)
    assert found.var_train == pytest.approx(float(by_hand.mean()), rel=1e-6)
    everything = x.transpose(0, 2).flatten(1).double().var(1, correction=0).mean()
    assert found.total_train == pytest.approx(float(everything), rel=1e-6)


def test_large_means_do_not_cost_precision():
    x = torch.randn(4, 64, 1) + 3e4
    (found,) = variance_shift(nn.Sequential(nn.BatchNorm1d(1)), list(x), repeats=1)
    assert found.var_train == pytest.approx(float(x.double().var(1).mean()), rel=1e-9)


def test_a_running_variance_is_compared_with_what_evaluation_has():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    model[0].running_var.copy_(torch.tensor([2.0, 6.0]))
    x = torch.randn(1000, 2) * torch.tensor([1.0, 2.0])
    first, second = variance_shift(model, [x])
    assert first.running_var == 4.0
    assert first.running_ratio == pytest.approx(
        float((torch.tensor([2.0, 6.0]) / x.var(0)).mean()), rel=1e-5
    )
    assert second.running_ratio is second.running_var is None
    # by default the second sees inputs of variance 1 in training, and x / running_var in evaluation
    assert second.var_train == pytest.approx(1.0, rel=0.01)
    assert second.var_eval == pytest.approx(float((x.var(0) / torch.tensor([2, 6])).mean()), 1e-3)


def test_constant_channels():
    x = torch.randn(50, 3)
    x[:, 1] = 1.0
    model = nn.Sequential(nn.BatchNorm1d(3))
    (found,) = variance_shift(model, [x])
    assert found.ratio == pytest.approx(1.0, rel=1e-12)
    assert found.channel_ratios.isnan().tolist() == [False, True, False]
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    (found,) = variance_shift(model, [x])
    assert found.ratio == found.shift == float("inf")


# ---------------------------------------------------------------------------------------------
# Residual sums


class Branch(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)
        nn.init.orthogonal_(self.fc.weight, 3.0)
        nn.init.constant_(self.fc.bias, 2.0)  # a branch with a mean

    def forward(self, x):
        return torch.relu(self.fc(x))


class Block(nn.Module):
    def __init__(self, width=5, mask=None):
        super().__init__()
        self.branch = Branch(width)
        self.drop_path = nn.Identity() if mask is None else mask

    def forward(self, x):
        return x + self.drop_path(self.branch(x))


def stack(p=None, **options):
    """Two blocks, of which the first drops."""
    model = nn.Sequential(Block(), Block()).double()
    if p is not None:
        torchdrop.add_stochastic_depth(model, {"0": p, "1": 0.0}, **options)
    return model


def parts(model, x):
    """Skip and branch of the first block, without stochastic depth."""
    with torch.no_grad():
        return x, model[0].branch(x)


def rows_error(s, f, p, repeats):
    """The standard error of T_train in row mode, the rows being independent.

    T is to first order the mean of g = y^2 - 2 mu y with y = s + m f, that is of
    m^2 f^2 + 2 m f (s - mu) and a constant. Channels of a row share m.
    """
    m2, m3, m4 = ((1 - p) ** (1 - k) for k in (2, 3, 4))
    s, f = s.flatten(0, 1), f.flatten(0, 1)
    a, b = (f**2).mean(1), (f * (s - (s + f).mean(0))).mean(1)
    of_one = a**2 * (m4 - m2**2) + 4 * a * b * (m3 - m2) + 4 * b**2 * (m2 - 1)
    return float((of_one.sum() / repeats).sqrt() / len(s))


@pytest.mark.parametrize("attached", [True, False])
def test_row_mode_adds_the_second_moment_of_the_branch(attached):
    p, repeats = 0.3, 4
    x = torch.randn(20, 100, 5, dtype=torch.float64) + 0.5
    model = stack(p, sampling="independent") if attached else stack()
    if not attached:
        model[0].drop_path = DropPath(p)
    s, f = parts(model, x)
    found = variance_shift(model, list(x), repeats=repeats)
    assert [(layer.name, layer.kind) for layer in found] == [
        ("0", "residual_sum"),
        ("1", "residual_sum"),
    ]
    first = found["0"]
    evaluation = (s + f).flatten(0, 1).var(0, correction=0).mean()
    assert first.total_eval == pytest.approx(float(evaluation), rel=1e-12)
    error = rows_error(s, f, p, repeats)
    right = evaluation + p / (1 - p) * (f**2).mean()
    assert abs(first.total_train - float(right)) < ERRORS * error
    wrong = evaluation + p / (1 - p) * f.flatten(0, 1).var(0).mean()  # the variance, not E[f^2]
    assert abs(first.total_train - float(wrong)) > APART * error
    # In row mode a batch has the variance of all draws, up to 1 / batch.
    assert first.var_train == pytest.approx(first.total_train, rel=0.02)


def test_exact_sampling_has_the_same_moments():
    p, x = 0.5, torch.randn(10, 200, 5, dtype=torch.float64)
    model = stack(p)
    s, f = parts(model, x)
    first = variance_shift(model, list(x), repeats=8)["0"]
    right = first.total_eval + p / (1 - p) * float((f**2).mean())
    assert abs(first.total_train - right) < ERRORS * rows_error(s, f, p, 8)


def unbiased(a, b):
    """The covariance within batches, mean over batches, for each channel."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.shape[1] - 1)


@pytest.mark.parametrize("scale", ["train", "eval"])
@pytest.mark.parametrize("compute", ["skip", "mask"])
def test_batch_mode_has_the_running_variance_of_its_scaling(scale, compute):
    p, repeats = 0.4, 40
    x = torch.randn(40, 50, 5, dtype=torch.float64) + 0.5
    model = stack(p, mode="batch", scale=scale, compute=compute)
    s, f = parts(model, x)
    vs, vf, cov = (unbiased(*pair).mean(1) for pair in ((s, s), (f, f), (s, f)))
    if scale == "train":
        right = vs + 2 * cov + vf / (1 - p)
        wrong = vs + 2 * cov / (1 - p) + vf / (1 - p) ** 2  # every batch as if it were kept
        evaluation, kept = vs + 2 * cov + vf, vs + 2 * cov / (1 - p) + vf / (1 - p) ** 2
    else:
        right = vs + (1 - p) * (2 * cov + vf)
        wrong = vs + 2 * (1 - p) * cov + (1 - p) ** 2 * vf  # what evaluation has
        evaluation, kept = wrong, vs + 2 * cov + vf
    first = variance_shift(model, list(x), repeats=repeats)["0"]
    # Each pass has V of s + f scaled with 1 - p, and of s with p.
    draws = len(x) * repeats
    error = float(((kept - vs) ** 2 * p * (1 - p)).mean().sqrt()) / draws**0.5
    assert first.var_eval == pytest.approx(float(evaluation.mean()), rel=1e-12)
    assert abs(first.var_train - float(right.mean())) < ERRORS * error
    assert abs(first.var_train - float(wrong.mean())) > APART * error
    # The batch means move as well, which no BatchNorm sees.
    assert first.total_train > first.var_train + ERRORS * error


def test_without_stochastic_depth_sums_are_found_and_agree():
    x = torch.randn(3, 20, 5, dtype=torch.float64)
    model = stack()
    s, f = parts(model, x)
    found = variance_shift(model, list(x))
    assert [layer.name for layer in found.residual_sums] == ["0", "1"]
    assert found["0"].ratio == pytest.approx(1.0, rel=1e-12)
    assert found["0"].var_eval == pytest.approx(float(unbiased(s + f, s + f).mean()), rel=1e-12)


def test_channels_of_sums():
    x = torch.randn(4, 6, 5)  # the last by default: no convolution
    assert len(variance_shift(stack().float(), [x])["0"].channel_ratios) == 5
    assert len(variance_shift(stack().float(), [x], channel_dim=1)["0"].channel_ratios) == 6
    with pytest.raises(ValueError, match="channel_dim cannot be 3"):
        variance_shift(stack().float(), [x], channel_dim=3)
    with pytest.raises(
        ValueError, match=r"channels of 0 are not on dimension 1 .*give channel_dim"
    ):
        variance_shift(stack().float(), [x, x[:, :3]], channel_dim=1)


# ---------------------------------------------------------------------------------------------
# The result


def test_the_result_is_a_sequence_with_a_table():
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)
    )
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = None
    x = torch.randn(4000, 3)
    recalibrate_batch_norm(model, [x])
    found = variance_shift(model, [x], repeats=2)
    assert [layer.name for layer in found] == ["0", "2", "4"]
    assert len(found) == 3
    assert found[1] is found["2"] is found.largest is found.steepest
    assert found[:2] == found.layers[:2]
    assert found.growth[1] == pytest.approx(2.0, rel=0.1)
    assert found.growth[2] == found[2].ratio / found[1].ratio < 0.8
    with pytest.raises(KeyError, match="bn"):
        found["bn"]
    lines = repr(found).splitlines()
    assert lines[0] == (
        "variance shift of Sequential: 3 batch norms, 0 residual sums; "
        "batches: 1, training passes each: 2"
    )
    assert lines[1].split()[:6] == ["layer", "kind", "train", "eval", "ratio", "growth"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "2", "4"]
    assert lines[-1].startswith("largest: 2 (")
    assert lines[-1].endswith("); grows most at 2")


def test_a_layer_of_training_alone_is_listed_without_a_ratio():
    model, x = Auxiliary(), torch.randn(10, 2)
    found = variance_shift(model, [x])
    assert [layer.name for layer in found] == ["main", "extra"]
    assert found["extra"].ratio != found["extra"].ratio
    assert found.largest is found["main"]
    assert repr(found).splitlines()[3].split()[-4:] == ["-", "-", "-", "-"]
    found.layers.pop(0)
    with pytest.raises(ValueError, match="no layer was reached both in training and in evaluation"):
        found.largest  # noqa: B018


class Undecided(Block):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return super().forward(x)


def test_what_cannot_be_read_is_said():
    model = nn.Sequential(nn.BatchNorm1d(5), Undecided(), Undecided())
    found = variance_shift(model, [torch.randn(6, 5)])
    assert set(found.unreadable) == {"1", "2"}
    assert "not read: 1: " in repr(found)
    with pytest.raises(ValueError, match="no residual sum in this Sequential; 0 cannot be read"):
        variance_shift(nn.Sequential(Undecided()), [torch.randn(6, 5)])


class Counting(Block):
    """Cannot be split, so it is dropped as a whole; its sum cannot be watched, its layers can."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_a_block_that_is_dropped_as_a_whole_is_said_and_its_layers_are_measured():
    x = torch.randn(64, 5)
    model = nn.Sequential(nn.BatchNorm1d(5), Counting(), Counting(), nn.BatchNorm1d(5))
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    assert {block.action for block in plan.blocks} == {"layer"}
    found = variance_shift(model, [x])
    assert "dropped as a whole" in found.unreadable["1"]
    assert {"0", "3"} <= {layer.name for layer in found.layers}


class TwoInputs(Block):
    def forward(self, x, gate=None):
        return x + gate * self.branch(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([TwoInputs(), TwoInputs()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, gate=x.sigmoid())
        return x


def test_blocks_with_arguments_are_read_in_the_call():
    model, x = Gated(), torch.randn(6, 5)
    found = variance_shift(model, [x])
    assert [layer.name for layer in found] == ["layers.0", "layers.1"]
    out = model(x).detach().double()
    assert found[1].var_eval == pytest.approx(float(out.var(0).mean()), rel=1e-5)


class Repeated(Block):
    def forward(self, x, times):
        out = x
        for _ in range(times):  # its signature alone does not tell how often
            out = self.branch(out)
        return x + out


def test_the_first_batch_tells_what_signatures_do_not():
    class Twice(nn.Sequential):
        def forward(self, x):
            for block in self:
                x = block(x, 2)
            return x

    model, x = Twice(Repeated(), Repeated()), torch.randn(6, 5)
    found = variance_shift(model, [x])
    assert found.unreadable == {}
    assert [layer.name for layer in found] == ["0", "1"]
    out = model(x).detach().double()
    assert found[1].var_eval == pytest.approx(float(out.var(0).mean()), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# A small network that was trained


@cache
def digits():
    data = open_source("digits").draw(0, 200)
    images = data.normalised(data.train.pixels, 1)
    return images[:100], torch.as_tensor(data.train.labels[:100]).long()


def trained(mode=None, scale="train", before_norm=False):
    torch.manual_seed(0)
    images, labels = digits()
    model = CifarResNet(20, 10, 1)
    if mode:
        torchdrop.add_stochastic_depth(model, 0.5, mode=mode, scale=scale)
    if before_norm:
        for block in [*model.layer1, *model.layer2, *model.layer3]:
            block.conv2 = nn.Sequential(nn.Dropout(0.3), block.conv2)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(3):
        for start in range(0, 100, 50):
            rows = slice(start, start + 50)
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    recalibrate_batch_norm(model, images.split(50))
    return model, variance_shift(model, images.split(50))


def test_a_trained_network_shifts_as_the_closed_forms_say():
    _, plain = trained()
    assert len(plain.batch_norms) == 19
    assert len(plain.residual_sums) == 9
    assert plain.largest.shift < 1.1
    for mode in ("row", "batch"):
        _, shifted = trained(mode)
        # E[f^2] p / (1-p) on top of each sum before: it grows with depth
        first, *_, last = shifted.residual_sums
        assert last.name == "layer3.2"
        assert last.total_ratio > 1.15
        assert last.total_ratio > first.total_ratio
        # batch means move in batch mode, and BatchNorm does not see it
        assert (last.total_ratio / last.ratio > 1.02) == (mode == "batch")
    _, dropped = trained(before_norm=True)
    assert all(dropped[f"layer{i}.0.bn2"].ratio > 1.05 for i in (1, 2, 3))
