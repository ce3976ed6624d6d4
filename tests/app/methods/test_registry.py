from __future__ import annotations

import pickle

import pytest
import torch
from method_nets import applied_to, net_for

from torchdrop.app.errors import UserError
from torchdrop.app.methods import METHODS, Applied, Method, default_methods, rates, registry

NAMES = list(METHODS)
NOISE = ("gaussian_dropout", "uniform_dropout")


# In the order of the table. Another method needs no entry here.
DEFAULT = (
    "none",
    "dropout",
    "drop_path",
    "stochastic_depth_row",
    "stochastic_depth_batch",
    "subsample",
)
OTHERS = [
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


def test_the_methods_of_the_table():
    assert default_methods() == DEFAULT == tuple(NAMES[:6])
    assert [name for name in NAMES[6:] if name in OTHERS] == OTHERS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_every_method_leaves_evaluation_and_the_weights_alone(name, p):
    torch.manual_seed(0)
    dense = net_for(name).eval()
    torch.manual_seed(0)
    model, _ = applied_to(name, p)
    x = torch.randn(4, 1, 8, 8)
    assert list(model.state_dict()) == list(dense.state_dict())
    # By definition the paper's scaling and ShakeDrop multiply by the expectation in evaluation.
    scales = p > 0 and name in {"stochastic_depth_batch", "shake_drop"}
    assert torch.equal(model.eval()(x), dense(x)) == (not scales)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_can_be_sent_to_a_worker(name):
    model, applied = applied_to(name, 0.5)
    model, applied = pickle.loads(pickle.dumps((model, applied)))
    images, _labels = applied.batch(torch.randn(8, 1, 8, 8), torch.zeros(8).long())
    model.train()(images)
    assert name in {"none", *NOISE} or applied.observed() is not None
    assert applied.reached


@pytest.mark.parametrize("name", NAMES)
def test_every_method_delivers_what_is_asked(name):
    torch.manual_seed(0)
    model, applied = applied_to(name, 0.5)
    model.train()
    if name in {*DEFAULT, *OTHERS}:
        assert (applied.asked is None) == (name in {"none", *NOISE})
    for _ in range(60):
        images, _ = applied.batch(torch.randn(40, 1, 8, 8), torch.zeros(40).long())
        with torch.no_grad():
            model(images)
    # 60 draws of the whole batch in 3 blocks are the coarsest: a standard error of .036.
    if applied.asked is None:
        assert applied.observed() is None
        return
    assert applied.observed() == pytest.approx(applied.asked, abs=0.12)
    assert applied.observed() is None  # since the last call


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


def test_methods_can_be_added_once(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(METHODS))
    method = Method("mine", "does nothing", lambda model, p: Applied(), p=0.2)
    registry.register(method)
    assert registry.rates(["mine"], []) == {"mine": 0.2}
    assert list(registry.METHODS) == [*NAMES, "mine"]
    with pytest.raises(ValueError, match="there is a method 'mine' already"):
        registry.register(method)


def test_a_method_of_the_default_comparison_stands_before_the_others(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(METHODS))
    registry.register(Method("mine", "does nothing", lambda model, p: Applied(), default=True))
    assert list(registry.METHODS) == [*NAMES[:6], "mine", *NAMES[6:]]
    assert registry.default_methods() == (*DEFAULT, "mine")
