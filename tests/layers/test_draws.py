"""The random masks and noise of the layers: rates, independence, layout."""

import pytest
import torch
from scipy import stats

from torchdrop.layers.draws import (
    along_dim,
    can_read_on_host,
    divisor_of_kept,
    draw_noise,
    in_memory_format_of,
    keep_mask,
    random_hit_indices,
    random_integers,
    shape_of_decisions,
)

ALPHA = 1e-6


def mask_rate_is_right(draw, p):
    torch.manual_seed(0)
    mask = draw((1000, 1000), p)
    return stats.binomtest(int(mask.sum()), mask.numel(), 1 - p).pvalue > ALPHA


@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_mask_rate(p):
    assert mask_rate_is_right(keep_mask, p)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda s, p: keep_mask(s, 1 - p), id="p as keep probability"),
        pytest.param(
            lambda s, p: torch.floor(torch.rand(s, dtype=torch.bfloat16) + (1 - p)) > 0,
            id="drawn in bfloat16",
        ),
    ],
)
def test_mask_rate_can_fail(wrong):
    assert not mask_rate_is_right(wrong, 0.001)


def test_mask_laws():
    assert keep_mask((1000,), 0.0).all()
    assert not keep_mask((1000,), 1.0).any()
    assert keep_mask((0, 3), 0.5).shape == (0, 3)
    assert keep_mask((2, 3), 0.5, device=torch.device("meta")).is_meta


def test_mask_follows_its_generator_and_else_the_global_seed():
    def drawn(**kwargs):
        return keep_mask((50,), 0.5, **kwargs)

    def seeded():
        return drawn(generator=torch.Generator().manual_seed(7))

    state = torch.get_rng_state()
    assert torch.equal(seeded(), seeded())
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    first = drawn()
    assert not torch.equal(first, drawn())
    torch.manual_seed(1)
    assert torch.equal(first, drawn())


def test_random_hit_indices():
    """Each place hit with probability p, independently: counts by place and gaps."""
    for p in (0.002, 0.3, 0.9):
        torch.manual_seed(0)
        hits = random_hit_indices(10**6, p)
        assert torch.equal(hits, hits.unique())
        assert int(hits[0]) >= 0
        assert int(hits[-1]) < 10**6
        assert stats.binomtest(len(hits), 10**6, p).pvalue > ALPHA
        pairs = torch.zeros(10**6, dtype=torch.bool)
        pairs[hits] = True
        both = int((pairs[::2] & pairs[1::2]).sum())
        assert stats.binomtest(both, 10**6 // 2, p * p).pvalue > ALPHA
    assert random_hit_indices(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert random_hit_indices(5, 1e-320).tolist() == []
    ends = [random_hit_indices(10, 0.5).tolist() for _ in range(4000)]
    for place in (0, 9):
        assert stats.binomtest(sum(place in e for e in ends), 4000, 0.5).pvalue > ALPHA


def test_noise_is_float64_only_for_float64():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert draw_noise(torch.rand, torch.ones(3, dtype=dtype)).dtype == torch.float32
    assert draw_noise(torch.randn, torch.ones(3, dtype=torch.float64)).dtype == torch.float64
    assert draw_noise(torch.rand, torch.ones(3), shape=(2, 1)).shape == (2, 1)


def test_integers_are_uniform_and_below_the_end():
    torch.manual_seed(0)
    counts = torch.bincount(random_integers(7, (70_000,), None), minlength=7)
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > ALPHA


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)],
)
def test_a_mask_gets_the_memory_format_of_the_activation(shape, memory_format):
    x, mask = torch.ones(shape), torch.ones(shape, dtype=torch.bool)
    assert in_memory_format_of(x, mask) is mask
    drawn = in_memory_format_of(x.to(memory_format=memory_format), mask)
    assert drawn.is_contiguous(memory_format=memory_format)


def test_masks_broadcast_against_the_activation():
    x = torch.ones(2, 3, 4)
    assert shape_of_decisions(x) == [1, 1, 1]
    assert shape_of_decisions(x, 0) == [2, 1, 1]
    assert shape_of_decisions(x, 0, 2) == [2, 1, 4]
    assert along_dim(torch.arange(3), 1, 3).shape == (1, 3, 1)


def test_where_everything_is_dropped_zeros_are_divided_by_1():
    assert divisor_of_kept(0.25) == 0.75
    assert divisor_of_kept(1.0) == 1.0


def test_decisions_are_not_read_on_the_host_under_a_transform():
    seen = []

    def f(x):
        seen.append(can_read_on_host(x))
        return x

    x = torch.ones(2)
    f(x)
    torch.func.vmap(f)(x)
    assert seen == [True, False]
    assert not can_read_on_host(torch.ones(2, device="meta"))
