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
from torchdrop.app.models import CifarResNet

NAMES = list(METHODS)


def _applied(name, p, model=None):
    model = CifarResNet(8, 10, 1) if model is None else model
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


@pytest.mark.parametrize("name", NAMES)
def test_every_method_leaves_evaluation_and_the_weights_alone(name):
    torch.manual_seed(0)
    dense = CifarResNet(8, 10, 1).eval()
    torch.manual_seed(0)
    model, _ = _applied(name, 0.0)
    x = torch.randn(4, 1, 8, 8)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert torch.equal(model.eval()(x), dense(x))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_can_be_sent_to_a_worker(name):
    model, applied = _applied(name, 0.5)
    model, applied = pickle.loads(pickle.dumps((model, applied)))
    images, _labels = applied.batch(torch.randn(8, 1, 8, 8), torch.zeros(8).long())
    model.train()(images)
    assert name == "none" or applied.observed() is not None


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
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
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))
    method = Method("mine", "does nothing", lambda model, p: Applied(), p=0.2)
    methods.register(method)
    assert methods.rates(["mine"], []) == {"mine": 0.2}
    with pytest.raises(ValueError, match="there is a method 'mine' already"):
        methods.register(method)
