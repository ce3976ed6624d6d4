"""The law of Gaussian dropout, and the twins that show that the tests can fail."""

import math

import pytest
import torch
from contracts import Layer
from scipy import stats
from torch.autograd import gradcheck, gradgradcheck

from torchdrop.functional import gaussian_dropout
from torchdrop.layers import GaussianDropout

ALPHA = 1e-6


def seeded(f, *args, **kwargs):
    torch.manual_seed(0)
    return f(*args, **kwargs)


# The distribution


def is_gaussian(op, p):
    noise = (seeded(op, torch.ones(10**6), p).double() - 1) / math.sqrt(p / (1 - p))
    return stats.kstest(noise.numpy(), "norm").pvalue > ALPHA


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_distribution(p):
    assert is_gaussian(gaussian_dropout, p)


def test_distribution_can_fail():
    """Variance p(1 - p), which some take; p for the standard deviation."""
    assert not is_gaussian(lambda x, p: 1 + (gaussian_dropout(x, p) - 1) * (1 - p), 0.1)
    assert not is_gaussian(lambda x, p: x + p * torch.randn_like(x), 0.1)


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
    assert variance_is(lambda x: torch.nn.functional.dropout(x, 0.3), 0.3 / 0.7)  # the same


def test_variance_can_fail():
    assert not variance_is(lambda x: gaussian_dropout(x, 0.3), 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_product_is_rounded_once(dtype):
    """The noise of half precision is that of float32: multiplied first, rounded after."""
    x = torch.randn(1000, dtype=dtype)
    assert torch.equal(
        seeded(gaussian_dropout, x, 0.3), seeded(gaussian_dropout, x.float(), 0.3).to(dtype)
    )


def test_elements_are_independent():
    noise = seeded(gaussian_dropout, torch.ones(1000, 100), 0.5).double() - 1
    for dim in (0, 1):
        correlation = float((noise * noise.roll(1, dim)).mean() / noise.square().mean())
        assert abs(correlation) < 5 / math.sqrt(noise.numel())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch, in forward mode
def test_derivatives():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def f(t):
        return seeded(gaussian_dropout, t, 0.4).pow(3)

    assert gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (x,))


def test_the_layer_forwards_its_arguments():
    x = torch.randn(5, 7)
    assert torch.equal(seeded(GaussianDropout(0.3), x), seeded(gaussian_dropout, x, 0.3))
    assert repr(GaussianDropout(0.3)) == "GaussianDropout(p=0.3)"


def test_messages():
    x = torch.ones(2, 3)
    for call in (lambda: gaussian_dropout(x, 1), lambda: GaussianDropout(1.0)):
        with pytest.raises(ValueError, match=r"p has to be below 1, .* p / \(1 - p\), but got 1"):
            call()
    layer = GaussianDropout(0.5)
    with pytest.raises(ValueError, match=r"p has to be below 1"):
        layer.p = 1
    assert layer.p == 0.5


# What every layer has to fulfil (tests/laws/contracts.py runs this list)


def gaussian_law(y, p):
    """Of noise n around 1 with variance v, the sum of n**2 / v is chi-square."""
    total = float(((y.double() - 1) ** 2).sum()) * (1 - p) / p
    return 2 * min(stats.chi2.cdf(total, y.numel()), stats.chi2.sf(total, y.numel()))


def contract(name, shape):
    return Layer(
        name=name,
        make=GaussianDropout,
        function=gaussian_dropout,
        shape=shape,
        many=(50_000, 5),
        law=gaussian_law,
        zero_at_1=False,
        ends=(0, 0.0),
        rates=(0.01, 0.3, 0.9),
    )


CONTRACTS = [contract("GaussianDropout", (6, 4, 3)), contract("GaussianDropout 4-d", (4, 8, 5, 6))]
