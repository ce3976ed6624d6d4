"""The probability gamma of DropBlock: it solves the equation, also at its ends."""

import pytest
import torch
from scipy import optimize

from torchdrop.functional import drop_block_gamma
from torchdrop.layers import drop_block_gamma as drop_block_gamma_module

MAPS = [(n, n) for n in (5, 7, 14, 28, 56)] + [(9, 31), (17,), (1,), (5, 6, 7), (8, 8, 8)]
BLOCKS = [2, 3, 5, 7]
RATES = [0.01, 0.1, 0.5, 0.9, 0.99]


def covering(shape, block):
    """For each unit the number of blocks that cover it, counted by laying every one."""
    block = (block,) * len(shape) if isinstance(block, int) else block
    b = [min(k, n) for k, n in zip(block, shape, strict=True)]
    count = torch.zeros(shape, dtype=torch.float64)
    for start in torch.cartesian_prod(
        *(torch.arange(n - k + 1) for n, k in zip(shape, b, strict=True)), torch.arange(1)
    ).tolist():
        count[tuple(slice(s, s + k) for s, k in zip(start, b, strict=False))] += 1
    return count


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_gamma_solves_the_equation(shape, block):
    n = covering(shape, block)
    for p in RATES:
        gamma = drop_block_gamma(shape, block, p)
        assert float(1 - ((1 - gamma) ** n).mean()) == pytest.approx(p, abs=1e-9)
        brent = optimize.brentq(lambda g, p=p: float(1 - ((1 - g) ** n).mean()) - p, 0, 1)
        assert gamma == pytest.approx(brent, rel=1e-8, abs=1e-9)


def test_gamma_of_blocks_that_are_not_square_or_too_large():
    for shape, block in (((9, 31), (2, 5)), ((4, 6), (9, 3)), ((5, 5), 7)):
        gamma = drop_block_gamma(shape, block, 0.3)
        n = covering(shape, block)
        assert float(1 - ((1 - gamma) ** n).mean()) == pytest.approx(0.3, abs=1e-9)
    assert drop_block_gamma((5, 5), 7, 0.3) == pytest.approx(0.3)


@pytest.mark.parametrize("length", [5, 14, 31])
def test_gamma_of_a_block_and_of_its_complement(length):
    for b in range(1, length + 1):
        for p in (0.1, 0.7):
            assert drop_block_gamma((length, length), b, p) == pytest.approx(
                drop_block_gamma((length, length), length + 1 - b, p), rel=1e-12
            )


def test_gamma_at_the_ends_and_near_them():
    assert drop_block_gamma((14, 14), 7, 0) == 0.0
    assert drop_block_gamma((14, 14), 7, 1) == 1.0
    tiny = drop_block_gamma((14, 14), 7, 1e-12)
    assert tiny == pytest.approx(1e-12 / float(covering((14, 14), 7).mean()), rel=1e-9)
    most = drop_block_gamma((14, 14), 7, 1 - 2**-53)
    assert 0.999 < most <= 1.0
    rates = [drop_block_gamma(28, 7, i / 100) for i in range(101)]
    assert rates == sorted(rates)
    assert len(set(rates)) == 101


def test_the_papers_gamma_is_newtons_first_step():
    p, h, b = 0.1, 14, 7
    paper = drop_block_gamma((h, h), b, p, rate="paper")
    assert paper == pytest.approx(p / b**2 * h**2 / (h - b + 1) ** 2)
    assert paper < drop_block_gamma((h, h), b, p)


def test_gamma_is_cached_and_the_cache_is_bounded():
    drop_block_gamma((11, 13), 3, 0.123)
    hits = drop_block_gamma_module.seed_and_keep_probability.cache_info().hits
    drop_block_gamma((11, 13), 3, 0.123)
    assert drop_block_gamma_module.seed_and_keep_probability.cache_info().hits == hits + 1
    assert drop_block_gamma_module.seed_and_keep_probability.cache_info().maxsize is not None
    assert drop_block_gamma_module._cover_histogram.cache_info().maxsize is not None
