"""shake_drop: what goes forward, what goes backward, their law, messages."""

import math

import pytest
import torch
from contracts import Layer, masked
from scipy import stats
from torch import nn

from torchdrop.functional import shake_drop
from torchdrop.layers import ShakeDrop

ALPHA = 1e-6
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def seeded(f, *args, **kwargs):
    torch.manual_seed(0)
    return f(*args, **kwargs)


def factors(op, p, shape=(100_000, 2), **kwargs):
    """The factors, forward and backward, of every sample."""
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    y = seeded(op, x, p, **kwargs)
    y.sum().backward()
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert torch.equal(x.grad, x.grad[:, :1].expand_as(y))
    return y.detach()[:, 0], x.grad[:, 0]


# The law


def law_holds(op, p, alpha=(-1, 1), beta=(0, 1)):
    ahead, back = factors(op, p)
    kept = ahead == 1
    if not torch.equal(kept, back == 1):  # one b for both
        return False
    if stats.binomtest(int((~kept).sum()), len(kept), p).pvalue <= ALPHA:
        return False
    a, c = ahead[~kept].numpy(), back[~kept].numpy()
    return all(
        p > ALPHA
        for p in (
            stats.kstest(a, "uniform", args=(alpha[0], alpha[1] - alpha[0])).pvalue,
            stats.kstest(c, "uniform", args=(beta[0], beta[1] - beta[0])).pvalue,
            stats.pearsonr(a, c).pvalue,  # a and c have nothing to do with each other
        )
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_law(p):
    assert law_holds(shake_drop, p)


def test_law_can_fail():
    """The gradient of the forward; p for 1 - p; a and c drawn as one; a from [0, 1]."""

    def plain(x, p):
        return x * shake_drop(torch.ones(len(x), 1, dtype=x.dtype), p)

    assert not law_holds(plain, 0.5)
    assert not law_holds(lambda x, p: shake_drop(x, 1 - p), 0.1)
    assert not law_holds(lambda x, p: shake_drop(x, p, alpha=(0, 1)), 0.5)
    assert not law_holds(lambda x, p: shake_drop(x, p, beta=(-1, 1)), 0.5)


def test_other_ranges():
    ahead, back = factors(lambda x, p: shake_drop(x, p, alpha=(0, 0), beta=(2, 3)), 1)
    assert (ahead == 0).all()
    assert ((back >= 2) & (back <= 3)).all()


def test_batch_mode_draws_once():
    seen = set()
    for seed in range(200):
        torch.manual_seed(seed)
        y = shake_drop(torch.ones(5, 3), 0.5, mode="batch")
        assert (y == y[0, 0]).all()
        seen.add(float(y[0, 0]))
    assert len(seen) > 80
    y = shake_drop(torch.ones(7, 50, 3), 1.0, batch_dim=1)
    assert torch.equal(y, y[:1, :, :1].expand_as(y))
    assert len(y[0, :, 0].unique()) == 50


def mean_is_evaluation(op, alpha):
    x = torch.ones(10**6, 1, dtype=torch.float64)
    y = seeded(op, x, 0.4, alpha=alpha)
    expected = float(op(x[:1], 0.4, False, alpha=alpha))
    return abs(float(y.mean()) - expected) < 5 * float(y.std()) / 1000


@pytest.mark.parametrize("alpha", [(-1, 1), (0, 1), (0.5, 2)])
def test_evaluation_is_the_expectation(alpha):
    assert mean_is_evaluation(shake_drop, alpha)


def test_evaluation_can_fail():
    """Evaluation as the identity, and by 1 - p whatever alpha is."""

    def identity(x, p, training=True, **kwargs):
        return shake_drop(x, p, True, **kwargs) if training else x

    def plain(x, p, training=True, **kwargs):
        return shake_drop(x, p, True, **kwargs) if training else x * (1 - p)

    assert not mean_is_evaluation(identity, (-1, 1))
    assert not mean_is_evaluation(plain, (0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_rounded_once(dtype):
    x = torch.randn(1000, 3).to(dtype)
    y = seeded(shake_drop, x, 0.7)
    if dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(y, seeded(shake_drop, x.float(), 0.7).to(dtype))
    exact = (x.double() * 0.3).to(dtype)
    assert torch.allclose(shake_drop(x, 0.7, False), exact, rtol=2 * torch.finfo(dtype).eps)
    assert y.dtype == dtype


def test_p_0_is_the_object_in_training_and_evaluation():
    x = torch.randn(3, 4)
    assert shake_drop(x, 0) is x
    assert shake_drop(x, 0, False) is x
    assert torch.equal(shake_drop(x, 1, False), torch.zeros_like(x))


# Derivatives


def test_the_second_derivative_is_that_of_the_backward():
    x = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    y = shake_drop(x, 0.7)
    torch.manual_seed(0)
    _, back = factors(shake_drop, 0.7, (50, 3))
    (first,) = torch.autograd.grad(y, x, g, create_graph=True)
    assert torch.equal(first, g * back[:, None])
    v = torch.randn(50, 3, dtype=torch.float64)
    (second,) = torch.autograd.grad(first, g, v)
    assert torch.equal(second, v * back[:, None])


def test_a_gradient_penalty_trains():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), ShakeDrop(0.5), nn.Linear(4, 1))
    x = torch.randn(8, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net[0].parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch, in forward mode
def test_forward_mode_is_refused():
    from torch.autograd.forward_ad import dual_level, make_dual

    with dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        shake_drop(make_dual(torch.ones(3), torch.ones(3)), 0.5)


# The layer, messages


def test_the_layer_forwards_its_arguments():
    x = torch.randn(5, 7)
    layer = ShakeDrop(0.5, (0, 1), (1, 2), mode="batch", batch_dim=1)
    expected = seeded(shake_drop, x, 0.5, alpha=(0, 1), beta=(1, 2), mode="batch", batch_dim=1)
    assert torch.equal(seeded(layer, x), expected)
    assert repr(layer) == (
        "ShakeDrop(p=0.5, mode='batch', alpha=(0.0, 1.0), beta=(1.0, 2.0), batch_dim=1)"
    )
    assert repr(ShakeDrop(0.5)) == "ShakeDrop(p=0.5, mode='row')"
    assert torch.equal(ShakeDrop(0.25).eval()(x), x * 0.75)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: ShakeDrop(0.5, 1),
            TypeError,
            r"alpha has to be a pair of real numbers, but got 1",
        ),
        (lambda: ShakeDrop(0.5, (0, True)), TypeError, r"alpha has to be a pair of real numbers"),
        (lambda: ShakeDrop(0.5, (1, 0)), ValueError, r"alpha .* low to high, .*but got \(1, 0\)"),
        (lambda: ShakeDrop(0.5, beta=(0, math.nan)), ValueError, r"beta .* low to high, .*but got"),
        (lambda: ShakeDrop(0.5, mode="x"), ValueError, r"mode .* 'batch' or 'row', but got 'x'"),
        (lambda: shake_drop(torch.ones(2), 0.5, batch_dim=1), ValueError, r"batch_dim .* got 1"),
    ],
)
def test_messages(call, error, match):
    with pytest.raises(error, match=match):
        call()


# What every layer has to fulfil (tests/laws/contracts.py runs this list)


def contract(name, shape):
    return Layer(
        name=name,
        make=ShakeDrop,
        function=shake_drop,
        shape=shape,
        many=(250_000, 1),
        law=masked(lambda y: (y != 1).flatten(1).all(1)),
        eval_is_identity=False,
        zero_at_1=False,
    )


CONTRACTS = [contract("ShakeDrop", (6, 4, 3)), contract("ShakeDrop 4-d", (4, 8, 5, 6))]
