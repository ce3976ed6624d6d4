"""The law of uniform dropout, and the twins that show that the tests can fail."""

import math

import pytest
import torch
from contracts import Layer
from scipy import stats
from torch.autograd import gradcheck, gradgradcheck

from torchdrop.functional import uniform_dropout
from torchdrop.layers import UniformDropout

ALPHA = 1e-6
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def seeded(f, *args, **kwargs):
    torch.manual_seed(0)
    return f(*args, **kwargs)


# The distribution


def is_uniform(op, beta):
    noise = (seeded(op, torch.ones(10**6), beta).double() - 1) / beta
    return stats.kstest(noise.numpy(), "uniform", args=(-1, 2)).pvalue > ALPHA


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_distribution(beta):
    assert is_uniform(uniform_dropout, beta)


def test_distribution_can_fail():
    """Half the width; noise on one side."""
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
    assert variance_is(lambda x: uniform_dropout(x, 0.8), 0.8**2 / 3)


def test_variance_can_fail():
    assert not variance_is(lambda x: uniform_dropout(x, 0.8), 0.8 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_is_rounded_once(dtype):
    """The noise of half precision is that of float32: multiplied first, rounded after."""
    x = torch.randn(1000, dtype=dtype)
    assert torch.equal(
        seeded(uniform_dropout, x, 0.3), seeded(uniform_dropout, x.float(), 0.3).to(dtype)
    )


def test_elements_are_independent():
    noise = seeded(uniform_dropout, torch.ones(1000, 100), 0.5).double() - 1
    for dim in (0, 1):
        correlation = float((noise * noise.roll(1, dim)).mean() / noise.square().mean())
        assert abs(correlation) < 5 / math.sqrt(noise.numel())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch, in forward mode
def test_derivatives():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def f(t):
        return seeded(uniform_dropout, t, 0.4).pow(3)

    assert gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_never_changes_the_sign(dtype):
    """At beta=1 the noise is in [0, 2)."""
    y = uniform_dropout(torch.ones(10**5, dtype=dtype), 1.0)
    assert (y >= 0).all()
    assert (y <= 2).all()


def test_the_layer_forwards_its_arguments():
    x = torch.randn(5, 7)
    assert torch.equal(seeded(UniformDropout(0.3), x), seeded(uniform_dropout, x, 0.3))
    assert repr(UniformDropout(1)) == "UniformDropout(beta=1.0)"


def test_messages():
    for beta in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"beta has to be between 0 and 1, but got"):
            uniform_dropout(torch.ones(2, 3), beta)
    with pytest.raises(TypeError, match=r"beta has to be a real number .* but got '0\.1' of type"):
        UniformDropout("0.1")


# What every layer has to fulfil (tests/laws/contracts.py runs this list)


def uniform_law(y, beta):
    """u**2 has mean 1/3 and variance 4/45, for u uniform in [-1, 1]."""
    square = ((y.double() - 1) / beta) ** 2
    z = (float(square.mean()) - 1 / 3) / math.sqrt(4 / 45 / y.numel())
    return 2 * stats.norm.sf(abs(z))


def contract(name, shape):
    return Layer(
        name=name,
        make=UniformDropout,
        function=uniform_dropout,
        shape=shape,
        many=(50_000, 5),
        law=uniform_law,
        zero_at_1=False,
        rate="beta",
        rates=(0.1, 0.5, 1.0),
    )


CONTRACTS = [contract("UniformDropout", (6, 4, 3)), contract("UniformDropout 4-d", (4, 8, 5, 6))]
