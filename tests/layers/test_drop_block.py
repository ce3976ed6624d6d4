"""DropBlock: the masks, the rates, the scales, the speed of its two ways."""

import math
import shutil

import pytest
import torch
from contracts import Layer, masked
from scipy import stats
from test_drop_block_gamma import covering
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from torchdrop.functional import drop_block1d, drop_block2d, drop_block3d, drop_block_gamma
from torchdrop.layers import DropBlock1d, DropBlock2d, DropBlock3d
from torchdrop.layers import drop_block as module

ALPHA = 1e-6
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=["few", "any"])
def either_way(request, monkeypatch):
    """Both ways of drawing: the gaps between seeds, and every place."""
    worth = 0 if request.param == "few" else 10**12
    monkeypatch.setattr(module, "_UNITS_WORTH_WRITING", worth)
    return request.param


def seeded(f, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return f(*args, **kwargs)


# The masks


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("shape", "block"),
    [((7, 9), 3), ((7, 9), 2), ((7, 9), (4, 1)), ((3, 9), 5), ((12,), 4), ((4, 5, 6), (2, 3, 2))],
    ids=str,
)
def test_what_is_dropped_is_a_union_of_whole_blocks(shape, block):
    op = {1: drop_block1d, 2: drop_block2d, 3: drop_block3d}[len(shape)]
    sizes = (block,) * len(shape) if isinstance(block, int) else block
    sizes = tuple(min(b, n) for b, n in zip(sizes, shape, strict=True))
    gone = op(torch.ones(60, 5, *shape), 0.3, block) == 0
    assert gone.any()
    assert not gone.all()
    # A place may start a block if the whole of it is gone; those blocks cover all that is gone.
    starts = gone
    for dim, b in enumerate(sizes, start=2):
        starts = starts.unfold(dim, b, 1).all(-1)
    covered = torch.zeros_like(gone)
    for start in starts.nonzero().tolist():
        box = (slice(s, s + b) for s, b in zip(start[2:], sizes, strict=True))
        covered[(*start[:2], *box)] = True
    assert torch.equal(covered, gone)


@pytest.mark.usefixtures("either_way")
def test_kept_values_are_divided_and_dropped_ones_zero():
    x = torch.randn(40, 6, 9, 9, dtype=torch.float64) + 3
    for per_channel in (True, False):
        y = drop_block2d(x, 0.3, 3, per_channel=per_channel)
        kept = y != 0
        assert 0 < kept.sum() < kept.numel()
        assert torch.equal(y[kept], x[kept] / 0.7)
        same = (kept == kept[:, :1]).all()
        assert bool(same) != per_channel


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_and_infinities(per_channel, dtype):
    x = torch.full((4, 3, 9, 9), math.inf, dtype=dtype, requires_grad=True)
    y = drop_block2d(x, 1, 3, per_channel=per_channel)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert not y.signbit().any()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert drop_block2d(x, 0, 3) is x
    assert drop_block2d(x, 0.5, 3, False) is x


@pytest.mark.usefixtures("either_way")
def test_everything_dropped_is_zero_and_never_nan():
    """Other DropBlocks divide by a count of zero."""
    x = torch.ones(4, 3, 7, 7)
    for scale in module.SCALES:
        for p in (0.999999, 1):
            assert torch.equal(drop_block2d(x, p, 7, scale=scale), torch.zeros_like(x))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kwargs", [{}, {"per_channel": False}, {"scale": "unit"}], ids=str)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch, in forward mode
def test_derivatives_of_every_kind(kwargs):
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def f(t):
        return seeded(drop_block2d, t, 0.4, 2, **kwargs).pow(3)

    assert gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (x,))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", [(40, 20, 10, 10), (40, 20, 5, 10, 2)])
def test_channels_last_is_kept_on_large_maps(shape, per_channel):
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    op = drop_block2d if len(shape) == 4 else drop_block3d
    x = torch.randn(shape)
    y = seeded(op, x.to(memory_format=memory_format), 0.2, 2, per_channel=per_channel)
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(y, seeded(op, x, 0.2, 2, per_channel=per_channel))


def test_the_two_ways_of_selecting_give_the_same_bits():
    x = torch.randn(40, 20, 10, 10)
    for dtype in DTYPES:
        a = seeded(drop_block2d, x.to(dtype), 0.2, 3, per_channel=False)
        one = seeded(drop_block2d, torch.ones(40, 20, 10, 10), 0.2, 3, per_channel=False)
        assert torch.equal(a, x.to(dtype).masked_fill(one == 0, 0).div_(0.8))


def rate_is_right(op, p, shape, maps=4000, dtype=torch.float32):
    """The mean over maps of the share dropped, within 5 standard errors of p.

    Units of a map are not independent, maps are.
    """
    torch.manual_seed(0)
    ones = torch.ones(maps // 4, 4, *shape, dtype=dtype)
    share = (op(ones, p) == 0).flatten(2).double().mean(2).flatten()
    error = share.std() / math.sqrt(maps)
    return abs(float(share.mean()) - p) <= 5 * float(error)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("shape", "block", "p"),
    [
        ((7, 7), 7, 0.1),
        ((14, 14), 7, 0.1),
        ((14, 14), 7, 0.5),
        ((28, 28), 7, 0.1),
        ((9, 31), (2, 5), 0.3),
        ((6, 6), 9, 0.9),
    ],
    ids=str,
)
def test_rate(shape, block, p):
    assert rate_is_right(lambda x, p: drop_block2d(x, p, block), p, shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rate_does_not_depend_on_the_dtype(dtype):
    assert rate_is_right(lambda x, p: drop_block2d(x, p, 3), 0.02, (10, 10), dtype=dtype)
    one = seeded(drop_block2d, torch.ones(300, 4, 10, 10), 0.02, 3) == 0
    assert torch.equal(
        one, seeded(drop_block2d, torch.ones(300, 4, 10, 10).to(dtype), 0.02, 3) == 0
    )


@pytest.mark.usefixtures("either_way")
def test_rate_of_shared_masks_and_of_other_dimensions():
    assert rate_is_right(lambda x, p: drop_block1d(x, p, 5), 0.3, (17,))
    assert rate_is_right(lambda x, p: drop_block3d(x, p, 2), 0.3, (4, 5, 6))
    flat = rate_is_right(
        lambda x, p: drop_block2d(x.flatten(0, 1)[:, None], p, 5, per_channel=False).view_as(x),
        0.3,
        (9, 9),
    )
    assert flat


def test_rate_can_fail():
    """The paper's gamma, at a p large enough to tell; timm's and torchvision's DropBlock."""
    from timm.layers.drop import drop_block_2d as timms
    from torchvision.ops import drop_block2d as torchvisions

    paper = lambda x, p: drop_block2d(x, p, 7, rate="paper")  # noqa: E731
    assert not rate_is_right(paper, 0.5, (14, 14))
    assert not rate_is_right(
        lambda x, p: timms(x, p, 7, couple_channels=False), 0.1, (14, 14), maps=2000
    )
    assert not rate_is_right(lambda x, p: torchvisions(x, p, 7), 0.5, (14, 14), maps=2000)


def test_timm_drops_far_more_than_asked_on_small_maps():
    from timm.layers.drop import drop_block_2d as timms

    ones = torch.ones(4000, 1, 7, 7)
    assert float((timms(ones, 0.1, 7) == 0).float().mean()) > 0.8
    assert float((drop_block2d(ones, 0.1, 7) == 0).float().mean()) == pytest.approx(0.1, abs=0.03)


def test_torchvision_returns_zeros_in_float16():
    """Its count of kept units overflows; ours is an integer."""
    from torchvision.ops import drop_block2d as torchvisions

    x = torch.ones(4, 32, 32, 32, dtype=torch.float16)
    assert not torchvisions(x, 0.1, 3).any()
    for scale in module.SCALES:
        assert drop_block2d(x, 0.1, 3, scale=scale).mean(dtype=torch.float32) == pytest.approx(
            1, abs=0.02
        )


def test_every_unit_has_its_own_probability():
    torch.manual_seed(0)
    gone = (drop_block2d(torch.ones(20_000, 1, 6, 7), 0.4, 3) == 0).sum((0, 1))
    q = 1 - (1 - drop_block_gamma((6, 7), 3, 0.4)) ** covering((6, 7), 3)
    for count, share in zip(gone.flatten().tolist(), q.flatten().tolist(), strict=True):
        assert stats.binomtest(count, 20_000, share).pvalue > ALPHA


def channels_are_independent(op):
    """Two channels lose a unit together as often as two maps of different samples."""
    torch.manual_seed(0)
    gone = op(torch.ones(20_000, 2, 3, 3)) == 0
    q = 1 - (1 - drop_block_gamma((3, 3), 2, 0.3)) ** covering((3, 3), 2)[1, 1]
    both = int((gone[:, 0, 1, 1] & gone[:, 1, 1, 1]).sum())
    return stats.binomtest(both, 20_000, float(q) ** 2).pvalue > ALPHA


@pytest.mark.usefixtures("either_way")
def test_channels_are_independent_unless_shared():
    assert channels_are_independent(lambda x: drop_block2d(x, 0.3, 2))
    assert not channels_are_independent(lambda x: drop_block2d(x, 0.3, 2, per_channel=False))


# The scales


def means_of_units(scale, rate="exact", shape=(6, 6), block=3):
    torch.manual_seed(0)
    y = drop_block2d(torch.ones(40_000, 1, *shape), 0.4, block, scale=scale, rate=rate)
    return y.double().mean((0, 1)), y.double().std((0, 1)) / 200


@pytest.mark.parametrize(
    ("shape", "block"), [((6, 6), 3), ((6, 6), 5), ((7, 5), (5, 4)), ((6, 6), 6)], ids=str
)
@pytest.mark.parametrize("rate", module.RATES)
def test_scale_unit_keeps_the_mean_of_every_unit(rate, shape, block):
    """Also for blocks over half the map, which have fewer positions than units."""
    mean, error = means_of_units("unit", rate, shape, block)
    assert ((mean - 1).abs() <= 5 * error).all()


def test_scale_unit_can_fail():
    """By the expectation the map's mean is exact; corners have too much, the centre too little."""
    mean, error = means_of_units("expectation")
    assert mean[0, 0] - 1 > 5 * error[0, 0]
    assert 1 - mean[3, 3] > 5 * error[3, 3]


@pytest.mark.parametrize("rate", module.RATES)
def test_scale_expectation_keeps_the_mean_of_the_map(rate):
    torch.manual_seed(0)
    y = drop_block2d(torch.ones(40_000, 1, 9, 9), 0.5, 3, rate=rate).double().mean((1, 2, 3))
    assert abs(float(y.mean()) - 1) <= 5 * float(y.std()) / 200


def test_scale_expectation_can_fail():
    torch.manual_seed(0)
    y = 0.5 * drop_block2d(torch.ones(40_000, 1, 9, 9), 0.5, 3).double().mean((1, 2, 3)) / 0.45
    assert abs(float(y.mean()) - 1) > 5 * float(y.std()) / 200


def couples_samples(op):
    """Whether what is dropped from one sample changes the values of another."""
    torch.manual_seed(0)
    y = op(torch.ones(50, 1, 9, 9))
    torch.manual_seed(0)
    x = torch.ones(50, 1, 9, 9)
    kept = (y != 0).flatten(1)
    alone = kept.shape[1] / kept.sum(1).clamp(min=1)
    values = y.flatten(1).amax(1)
    del x
    return not torch.allclose(values, alone.where(kept.any(1), 0.0))


def test_scale_count_counts_each_sample_by_itself():
    assert not couples_samples(lambda x: drop_block2d(x, 0.3, 3, scale="count"))


def test_a_count_over_the_batch_couples_samples():
    def over_the_batch(x):
        y = (drop_block2d(x, 0.3, 3) != 0).float()
        return y * y.numel() / y.sum()

    assert couples_samples(over_the_batch)


# Layers, examples, messages


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(DropBlock1d, (3, 2, 11)), (DropBlock2d, (3, 2, 9, 9)), (DropBlock3d, (3, 2, 5, 6, 7))],
)
def test_layers_forward_their_arguments(kind, shape):
    function = {3: drop_block1d, 4: drop_block2d, 5: drop_block3d}[len(shape)]
    x = torch.randn(shape)
    for kwargs in ({}, {"per_channel": False, "rate": "paper", "scale": "unit"}):
        layer = kind(0.4, 2, **kwargs)
        assert torch.equal(seeded(layer, x), seeded(function, x, 0.4, 2, **kwargs))
    assert kind(0.1).block_size == 7


def test_repr():
    assert repr(DropBlock2d(0.1)) == "DropBlock2d(p=0.1, block_size=7)"
    layer = DropBlock2d(0.1, (2, 3), rate="paper", per_channel=False, scale="unit")
    assert repr(layer) == (
        "DropBlock2d(p=0.1, block_size=(2, 3), rate='paper', per_channel=False, scale='unit')"
    )


def test_even_blocks_and_blocks_larger_than_the_map():
    """torchvision refuses an even block, also one that it clipped to an even map itself."""
    for block in (2, 4, 8, 100):
        assert drop_block2d(torch.ones(2, 2, 8, 8), 0.5, block).shape == (2, 2, 8, 8)
    gone = drop_block2d(torch.ones(200, 2, 8, 8), 0.5, 100) == 0
    assert torch.equal(gone.all((2, 3)), gone.any((2, 3)))


def test_trains_in_a_network_and_stops_in_evaluation():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), DropBlock2d(0.3, 3), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(4, 3, 10, 10)
    net(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    assert torch.equal(net(x), net(x))


def test_a_map_without_units():
    for shape in ((2, 3, 0, 5), (2, 0, 5, 5)):
        x = torch.empty(shape, requires_grad=True)
        y = drop_block2d(x, 0.5)
        assert y.shape == shape
        y.sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: drop_block2d(torch.ones(2, 3, 4), 0.1), ValueError, r"4 dimensions \(batch, ch"),
        (lambda: drop_block1d(torch.ones(2, 3), 0.1), ValueError, r"3 dimensions .*, but got 2"),
        (lambda: drop_block3d(torch.ones(2, 3), 0.1), ValueError, r"5 dimensions .*depth.* got 2"),
        (lambda: DropBlock2d(0.1, 0), ValueError, r"block_size has to be 1 or more, but got 0"),
        (lambda: DropBlock2d(0.1, (2, 3, 4)), ValueError, r"a tuple of 2, but got \(2, 3, 4\)"),
        (lambda: DropBlock2d(0.1, 2.0), TypeError, r"an integer or a tuple of 2, but got 2\.0"),
        (lambda: DropBlock2d(0.1, True), TypeError, r"an integer or a tuple of 2, but got True"),
        (lambda: DropBlock2d(0.1, rate="x"), ValueError, r"rate .* 'exact', 'paper', but got 'x'"),
        (lambda: DropBlock2d(0.1, scale="x"), ValueError, r"'count', 'unit', but got 'x'"),
        (lambda: drop_block_gamma((0, 3), 2, 0.1), ValueError, r"shape .* 1 or more, but got"),
        (lambda: drop_block_gamma((2.0, 3), 2, 0.1), TypeError, r"shape .* integers, but got"),
        (lambda: drop_block_gamma((2, 3), 2, 2), ValueError, r"between 0 and 1, but got 2"),
    ],
)
def test_messages(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs one for C++")
def test_compiles_with_torchs_own_compiler():
    """Of masks padded as booleans it makes C++ that does not compile."""
    torch._dynamo.reset()
    compiled = torch.compile(DropBlock2d(0.3, 3), fullgraph=True)
    x = torch.ones(500, 4, 8, 9)
    y = compiled(x)
    share = (y == 0).flatten(2).double().mean(2)
    assert abs(float(share.mean()) - 0.3) <= 5 * float(share.std()) / math.sqrt(share.numel())
    assert torch.equal(y[y != 0], torch.full_like(y[y != 0], 1 / 0.7))


def test_a_batch_of_one():
    for scale in module.SCALES:
        y = drop_block2d(torch.ones(1, 1, 7, 7), 0.5, 3, scale=scale)
        assert y.isfinite().all()


# What every layer has to fulfil (tests/laws/contracts.py runs this list)


def one_unit_of_each_map(y):
    """Of each map one unit, another one from map to map: its share is the mean over the map."""
    maps = y.flatten(2).flatten(0, 1)
    return maps[torch.arange(len(maps)), torch.arange(len(maps)) % maps.shape[1]] == 0


def contract(name, kind, function, shape, **kwargs):
    return Layer(
        name=name,
        make=lambda p: kind(p, 3, **kwargs),
        function=lambda x, p, **more: function(x, p, 3, **kwargs, **more),
        shape=shape,
        many=(2_000, 15, *(4 for _ in shape[2:])),
        law=masked(one_unit_of_each_map),
    )


CONTRACTS = [
    contract("DropBlock1d", DropBlock1d, drop_block1d, (6, 4, 9)),
    contract("DropBlock2d", DropBlock2d, drop_block2d, (4, 8, 5, 6)),
    contract("DropBlock2d per unit", DropBlock2d, drop_block2d, (4, 8, 5, 6), scale="unit"),
    contract("DropBlock2d by count", DropBlock2d, drop_block2d, (4, 8, 5, 6), scale="count"),
    contract("DropBlock3d", DropBlock3d, drop_block3d, (4, 8, 3, 5, 6)),
]
