"""gaussian_dropout and uniform_dropout: laws, moments, messages."""

import math

import pytest
import torch
from scipy import stats
from torch.autograd import gradcheck, gradgradcheck

from torchdrop.functional import gaussian_dropout, uniform_dropout
from torchdrop.layers import GaussianDropout, UniformDropout

ALPHA = 1e-6
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPS = [gaussian_dropout, uniform_dropout]


def seeded(f, *args, **kwargs):
    torch.manual_seed(0)
    return f(*args, **kwargs)


# The distribution


def is_gaussian(op, p):
    noise = (seeded(op, torch.ones(10**6), p).double() - 1) / math.sqrt(p / (1 - p))
    return stats.kstest(noise.numpy(), "norm").pvalue > ALPHA


def is_uniform(op, beta):
    noise = (seeded(op, torch.ones(10**6), beta).double() - 1) / beta
    return stats.kstest(noise.numpy(), "uniform", args=(-1, 2)).pvalue > ALPHA


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_distribution(p):
    assert is_gaussian(gaussian_dropout, p)
    assert is_uniform(uniform_dropout, p)


def test_distribution_can_fail():
    """Variance p(1 - p), which some take; p for the standard deviation; half the width."""
    assert not is_gaussian(lambda x, p: 1 + (gaussian_dropout(x, p) - 1) * (1 - p), 0.1)
    assert not is_gaussian(lambda x, p: x + p * torch.randn_like(x), 0.1)
    assert not is_uniform(lambda x, beta: uniform_dropout(x, beta / 2), 0.5)
    assert not is_uniform(lambda x, beta: x + beta * torch.rand_like(x), 0.5)


def variance_is(op, added, mean=0.7, deviation=1.3):
    """Whether v grows by `added` * (v + m**2), and the mean stays."""
    x = mean + deviation * torch.randn(10**6, dtype=torch.float64)
    y = op(x)
    expected = deviation**2 + added * (deviation**2 + mean**2)
    error = float(((y - y.mean()) ** 2).std()) / 1000
    return (
        abs(float(y.var()) - expected) < 5 * error
        and abs(float(y.mean()) - mean) < 5 * float(y.std()) / 1000
    )


def test_variance_is_as_documented():
    assert variance_is(lambda x: gaussian_dropout(x, 0.3), 0.3 / 0.7)
    assert variance_is(lambda x: uniform_dropout(x, 0.8), 0.8**2 / 3)
    assert variance_is(lambda x: torch.nn.functional.dropout(x, 0.3), 0.3 / 0.7)  # the same


def test_variance_can_fail():
    assert not variance_is(lambda x: gaussian_dropout(x, 0.3), 0.3)
    assert not variance_is(lambda x: uniform_dropout(x, 0.8), 0.8 / 3)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_is_rounded_once(op, dtype):
    """The noise of half precision is that of float32: multiplied first, rounded after."""
    x = torch.randn(1000, dtype=dtype)
    assert torch.equal(seeded(op, x, 0.3), seeded(op, x.float(), 0.3).to(dtype))


@pytest.mark.parametrize("op", OPS)
def test_elements_are_independent(op):
    noise = seeded(op, torch.ones(1000, 100), 0.5).double() - 1
    for dim in (0, 1):
        correlation = float((noise * noise.roll(1, dim)).mean() / noise.square().mean())
        assert abs(correlation) < 5 / math.sqrt(noise.numel())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch, in forward mode
def test_derivatives(op):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def f(t):
        return seeded(op, t, 0.4).pow(3)

    assert gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_never_changes_the_sign(dtype):
    """At beta=1 the noise is in [0, 2)."""
    y = uniform_dropout(torch.ones(10**5, dtype=dtype), 1.0)
    assert (y >= 0).all()
    assert (y <= 2).all()


def test_layers_forward_their_arguments():
    x = torch.randn(5, 7)
    assert torch.equal(seeded(GaussianDropout(0.3), x), seeded(gaussian_dropout, x, 0.3))
    assert torch.equal(seeded(UniformDropout(0.3), x), seeded(uniform_dropout, x, 0.3))
    assert repr(GaussianDropout(0.3)) == "GaussianDropout(p=0.3)"
    assert repr(UniformDropout(1)) == "UniformDropout(beta=1.0)"


def test_messages():
    x = torch.ones(2, 3)
    for call in (lambda: gaussian_dropout(x, 1), lambda: GaussianDropout(1.0)):
        with pytest.raises(ValueError, match=r"p has to be below 1, .* p / \(1 - p\), but got 1"):
            call()
    for beta in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"beta has to be between 0 and 1, but got"):
            uniform_dropout(x, beta)
    with pytest.raises(TypeError, match=r"beta has to be a real number .* but got '0\.1' of type"):
        UniformDropout("0.1")
    layer = GaussianDropout(0.5)
    with pytest.raises(ValueError, match=r"p has to be below 1"):
        layer.p = 1
    assert layer.p == 0.5
