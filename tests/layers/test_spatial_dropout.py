"""The laws of spatial dropout, and the twins that show that the tests can fail."""

import pytest
import torch
from contracts import Layer, masked
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.autograd import gradcheck, gradgradcheck

from torchdrop.functional import drop_path, spatial_dropout
from torchdrop.layers import SpatialDropout

ALPHA = 1e-6
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def seeded(f, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return f(*args, **kwargs)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    p=st.floats(0.01, 0.99),
    data=st.data(),
)
def test_output_is_0_or_x_over_keep_in_whole_channels(shape, p, data):
    dims = data.draw(st.permutations(range(len(shape))))[:2]
    x = torch.rand(shape, dtype=torch.float64) + 1
    y = spatial_dropout(x, p, batch_dim=dims[0], channel_dim=dims[1])
    kept = y != 0
    assert torch.equal(y[kept], x[kept] / (1 - p))
    channels = kept.movedim(dims, (0, 1)).reshape(shape[dims[0]], shape[dims[1]], -1)
    assert torch.equal(channels.all(2), channels.any(2))


def slices_dropped(op, dims, shape):
    """Whether the slices along `dims` are dropped, each with p and independently of the others."""
    torch.manual_seed(0)
    gone = (op(torch.ones(shape), 0.3) == 0).movedim(dims, (0, 1)).flatten(2)
    whole, any_gone = gone.all(2), gone.any(2)
    if not torch.equal(whole, any_gone):
        return False
    pairs = int((whole[:, ::2] & whole[:, 1::2]).sum())
    rows = int((whole[::2] & whole[1::2]).sum())
    n = whole.numel()
    return all(
        stats.binomtest(int(count), draws, q).pvalue > ALPHA
        for count, draws, q in ((whole.sum(), n, 0.3), (pairs, n // 2, 0.09), (rows, n // 2, 0.09))
    )


def test_rate_and_independence():
    assert slices_dropped(spatial_dropout, (0, 1), (2000, 20, 3))
    assert slices_dropped(spatial_dropout, (0, 1), (2000, 20, 2, 2))
    last = lambda x, p: spatial_dropout(x, p, channel_dim=-1)  # noqa: E731
    assert slices_dropped(last, (0, 2), (2000, 3, 20))
    batch = lambda x, p: spatial_dropout(x, p, channel_dim=2, batch_dim=1)  # noqa: E731
    assert slices_dropped(batch, (1, 2), (3, 2000, 20))


def test_rate_can_fail():
    assert not slices_dropped(spatial_dropout, (0, 2), (2000, 3, 20))
    assert not slices_dropped(drop_path, (0, 1), (2000, 20, 3))
    assert not slices_dropped(torch.nn.functional.dropout, (0, 1), (2000, 20, 3))


def test_says_what_a_3d_input_is_where_dropout2d_guesses():
    with pytest.warns(UserWarning, match="3D input"):
        torch.nn.functional.dropout2d(torch.ones(2, 3, 4), 0.5)
    spatial_dropout(torch.ones(2, 3, 4), 0.5)  # a warning would be an error


def test_derivatives():
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)

    def f(t):
        return seeded(spatial_dropout, t, 0.4).pow(3)

    assert gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_value_is_correctly_rounded(dtype):
    x = torch.randn(64, 40, 2).to(dtype)
    y = spatial_dropout(x, 0.1)
    kept = y != 0
    assert torch.equal(y[kept], (x[kept].double() / 0.9).to(dtype)) or dtype == torch.float32
    assert torch.allclose(y[kept], x[kept] / 0.9, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: spatial_dropout(x[0], 0.1), ValueError, r"at least 2 dimensions.*, but got 1"),
        (lambda x: spatial_dropout(x, 0.1, channel_dim=2), ValueError, r"channel_dim .* but got 2"),
        (
            lambda x: spatial_dropout(x, 0.1, channel_dim=-2),
            ValueError,
            r"to differ, but both .* 0",
        ),
        (lambda x: spatial_dropout(x, 0.1, channel_dim="c"), TypeError, r"channel_dim .* integer"),
    ],
)
def test_messages(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.ones(2, 3))


# What every layer has to fulfil (tests/laws/contracts.py runs this list)


def contract(name, shape):
    return Layer(
        name=name,
        make=SpatialDropout,
        function=spatial_dropout,
        shape=shape,
        many=(5_000, 50, 2),
        law=masked(lambda y: (y == 0).all(2)),
    )


CONTRACTS = [
    contract("SpatialDropout", (4, 8, 5, 6)),
    contract("SpatialDropout 5-d", (4, 8, 3, 5, 6)),
]
