"""Diagnostics leave a model as it was; what they run it on; and how they refuse."""

import copy
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchdrop
from torchdrop.app.models import CifarResNet
from torchdrop.diagnostics import recalibrate_batch_norm, variance_shift
from torchdrop.running.block_site import sites_of

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Shy(nn.Module):
    """Noise of all three generators, a buffer that moves, and a failure on request."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.fails = False

    def forward(self, x):
        self.seen += 1
        if self.fails and self.seen[0] > 0 and x.shape[0] == 3:
            raise RuntimeError("no more")
        return x + 1e-3 * (random.random() + np.random.rand() + torch.rand(()))


def model_with(mode="row", scale="train"):
    model = nn.Sequential(nn.Dropout(0.1), CifarResNet(8, 10, 1), Shy())
    model[1].layer2[0].bn2.eval()  # a frozen layer
    model[1].layer1[0].bn1.weight.requires_grad_(False)
    torchdrop.add_stochastic_depth(model, 0.5, mode=mode, scale=scale)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    return model


def fingerprint(model):
    """Everything that has to stay, as values and as identities."""
    prints = {}
    for name, module in model.named_modules():
        state = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
        prints[name, "attributes"] = {k: v if type(v) in (int, float, bool) else id(v)
                                      for k, v in state.items()}  # fmt: skip
        for key, hooks in module.__dict__.items():
            if key.endswith("_hooks"):
                prints[name, key] = list(hooks.items())
    for name, p in model.named_parameters():
        grad = None if p.grad is None else (id(p.grad), p.grad.tolist())
        prints[name, "parameter"] = id(p), p._version, p.tolist(), p.requires_grad, grad
    for name, b in model.named_buffers():
        prints[name, "buffer"] = id(b), b._version, b.tolist()
    for site in sites_of(model):
        prints[site.branches[0].facts.name, "site"] = [
            sorted(site.__dict__), list(site.train), list(site.evaluate),
            [(str(vars(b.counts)), dict(b.dtypes)) for b in site.branches],
        ]  # fmt: skip
    prints["random"] = (
        random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    )  # fmt: skip
    return prints


def differences(one, two):
    return [key for key in one if one[key] != two.get(key)] + [key for key in two if key not in one]


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("scale", ["train", "eval"])
@pytest.mark.parametrize("training", [True, False])
def test_variance_shift_leaves_no_trace(mode, scale, training):
    model = model_with(mode, scale).train(training)
    data = TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8))
    before = fingerprint(model)
    found = variance_shift(model, DataLoader(data, 4, shuffle=True))
    assert len(found.batch_norms) == 7
    assert len(found.residual_sums) == 3
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("function", [variance_shift, recalibrate_batch_norm])
def test_no_trace_is_left_after_an_exception(function):
    model = model_with()
    model[2].fails = True
    four, three = torch.randn(4, 1, 8, 8), torch.randn(3, 1, 8, 8)
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="no more"):
        function(model, [four, three])
    assert differences(before, fingerprint(model)) == []
    with pytest.raises(TypeError, match="but batch 1 is a str"):
        function(model, [four, "x"])
    assert differences(before, fingerprint(model)) == []


def test_recalibration_changes_statistics_and_nothing_else():
    model, x = model_with(), torch.randn(4, 1, 8, 8)
    before = fingerprint(model)
    names = recalibrate_batch_norm(model, [x, x + 1])
    assert len(names) == 7
    changed = differences(before, fingerprint(model))
    expected = {(f"{name}.{s}", "buffer") for name in names for s in STATISTICS}
    assert set(changed) == expected


def test_the_fingerprint_can_tell():
    model = model_with()
    before = fingerprint(model)
    model(torch.randn(4, 1, 8, 8))
    changed = {kind for key in differences(before, fingerprint(model)) for kind in key[-1:]}
    assert changed >= {"buffer", "site"}
    model[0].eval()
    assert ("0", "attributes") in differences(before, fingerprint(model))


@pytest.mark.parametrize("function", [variance_shift, recalibrate_batch_norm])
def test_a_pending_backward_pass_is_not_disturbed(function):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3)
    loss = model(x).square().sum()  # saved the running statistics
    twin(x).square().sum().backward()
    function(model, [x + 1])
    if function is recalibrate_batch_norm:  # which is meant to change them
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        return
    loss.backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_draws_follow_the_seed():
    model, x = model_with(), torch.randn(4, 1, 8, 8)
    figures = [layer.var_train for layer in variance_shift(model, [x])]
    assert [layer.var_train for layer in variance_shift(model, [x])] == figures
    torch.manual_seed(1)
    assert [layer.var_train for layer in variance_shift(model, [x])] != figures


def test_a_frozen_layer_stays_frozen_and_evaluation_mode_becomes_training():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    x = 3 * torch.randn(500, 2)
    model[0].eval()
    frozen = variance_shift(model, [x])[1]
    assert frozen.var_train == pytest.approx(9.0, rel=0.2)
    model.eval()  # its flags say nothing about training
    assert variance_shift(model, [x])[1].var_train == pytest.approx(1.0, rel=0.01)


def test_statistics_do_not_move_between_passes():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    x = 3 * torch.randn(100, 2)
    once = variance_shift(model, [x], repeats=1)[1]
    often = variance_shift(model, [x] * 5, repeats=5)[1]
    assert often.var_eval == pytest.approx(once.var_eval, rel=1e-9)


def test_a_model_that_writes_into_its_input():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(2))
    x = torch.randn(100, 2)
    kept = x.clone()
    variance_shift(model, [x])
    assert torch.equal(x, kept)


def test_compiled_models_are_seen():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2000, 4)
    compiled(x)
    (found,) = variance_shift(compiled, [x])
    assert found.ratio == pytest.approx(2.0, rel=0.1)
    assert recalibrate_batch_norm(compiled, [x]) == [found.name]
    assert model[1].running_var.mean() == pytest.approx(1.0, rel=0.1)
    sys.modules["torch._dynamo"].reset()


# ---------------------------------------------------------------------------------------------
# Batches


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(2)

    def forward(self, a, b=None):
        return self.bn(a if b is None else a + b)


X = torch.arange(8.0).view(4, 2)


@pytest.mark.parametrize(
    ("batches", "factor"),
    [
        ([X], 1),
        ([(X, torch.zeros(4))], 1),
        ([[X, torch.zeros(4)]], 1),
        ([{"a": X, "b": X}], 2),
        ([({"a": X, "b": X}, torch.zeros(4))], 2),
        ([((X, X), torch.zeros(4))], 2),
        ((x for x in [X]), 1),
        (DataLoader(TensorDataset(X, X), 4), 1),
    ],
)
@pytest.mark.parametrize("function", [variance_shift, recalibrate_batch_norm])
def test_batches_come_in_many_forms(function, batches, factor):
    if not isinstance(batches, list | DataLoader):
        batches = iter([X])
    model = Pair()
    result = function(model, batches)
    if function is recalibrate_batch_norm:
        assert torch.equal(model.bn.running_mean, factor * X.mean(0))
    else:
        assert result["bn"].var_eval == pytest.approx(factor**2 * float(X.var(0).mean()))


@pytest.mark.parametrize("function", [variance_shift, recalibrate_batch_norm])
@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (X, TypeError, "got a single Tensor; for one batch write"),
        ({"a": X}, TypeError, "got a single dict; for one batch write"),
        (3, TypeError, "iterable of batches, but got int"),
        ([], ValueError, "batches is empty"),
        ([3], TypeError, "but batch 0 is a int"),
        ([()], TypeError, "but batch 0 is a tuple of nothing"),
        ([(3, X)], TypeError, "but batch 0 is a tuple of int"),
        ([{"a": X, "label": X}], TypeError, "batch 0 has the keys a, label, but Pair takes"),
        ([((X, X, X), X)], TypeError, "batch 0 has 3 positional inputs, but Pair takes"),
    ],
)
def test_batches_that_are_none(function, batches, error, message):
    model = Pair()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        function(model, batches)
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("function", [variance_shift, recalibrate_batch_norm])
def test_models_that_are_none(function):
    with pytest.raises(TypeError, match=r"model has to be a torch\.nn\.Module, but got a int"):
        function(3, [X])
    with pytest.raises(ValueError, match=r"0 \(LazyBatchNorm1d\) has no sizes yet"):
        function(nn.Sequential(nn.LazyBatchNorm1d()), [X])


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="no BatchNorm and no residual sum in this Linear"):
        variance_shift(nn.Linear(2, 2), [X])
    for layer in (nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)):
        with pytest.raises(ValueError, match="no BatchNorm with running statistics in this Seq"):
            recalibrate_batch_norm(nn.Sequential(layer), [X])
    used = iter([X])
    next(used)
    with pytest.raises(ValueError, match="a generator can be used only once"):
        recalibrate_batch_norm(Pair(), used)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"repeats": 0}, ValueError, "repeats has to be at least 1, but got 0"),
        ({"repeats": 1.5}, TypeError, "repeats has to be an integer, but got 1.5"),
        ({"repeats": True}, TypeError, "repeats has to be an integer, but got True"),
        ({"channel_dim": "1"}, TypeError, "channel_dim has to be an integer, but got '1'"),
    ],
)
def test_options_of_variance_shift(options, error, message):
    with pytest.raises(error, match=message):
        variance_shift(Pair(), [X], **options)
