"""What diagnostics measure against closed forms; and that they leave the model as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import torchdrop
from torchdrop.diagnostics import recalibrate_batch_norm, variance_shift
from torchdrop.layers import DropPath, GaussianDropout, UniformDropout
from torchdrop.site import sites_of

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
    with pytest.raises(ValueError, match="channels of 0 are not on dimension 1 .*give channel_dim"):
        variance_shift(stack().float(), [x, x[:, :3]], channel_dim=1)
