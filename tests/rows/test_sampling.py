"""The rates and laws of the draws of rows. Each law has a twin test that shows that it can fail."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from torchdrop.rows import sampling

ALPHA = 1e-6


def agrees(kept, draws, p):
    """Whether ``kept`` of ``draws`` independent draws fit a keep probability of 1 - p."""
    return stats.binomtest(kept, draws, 1 - p).pvalue > ALPHA


# Rows


@pytest.mark.parametrize("sampling_rule", sampling.ROW_SAMPLERS)
@pytest.mark.parametrize("batch", [0, 1, 2, 7, 64])
def test_rows_are_ascending_and_in_the_batch(sampling_rule, batch):
    for p in (0.0, 0.2, 0.5, 1.0):
        rows = sampling.keep_rows(batch, p, sampling_rule).tolist()
        assert rows == sorted(set(rows))
        assert set(rows) <= set(range(batch))
        if p in (0.0, 1.0):
            assert len(rows) == batch * (1 - p)


def drawn_rows(draw, batch, p, times, rule):
    torch.manual_seed(0)
    return [tuple(draw(batch, p, rule).tolist()) for _ in range(times)]


def row_rate_is_right(draw, batch, p, rule):
    """Each row by itself is a Bernoulli draw a call, whatever the rule couples within a call."""
    times = 4000
    kept = Counter(itertools.chain(*drawn_rows(draw, batch, p, times, rule)))
    return all(agrees(kept[row], times, p) for row in range(batch))


@pytest.mark.parametrize("sampling_rule", sampling.ROW_SAMPLERS)
@pytest.mark.parametrize(("batch", "p"), [(1, 0.3), (2, 0.4), (5, 0.1), (8, 0.45)])
def test_every_row_is_kept_with_the_rate_asked_for(sampling_rule, batch, p):
    assert row_rate_is_right(sampling.keep_rows, batch, p, sampling_rule)


def _subset_at_least_one(batch, p, rule):
    return torch.randperm(batch)[: max(int(batch * (1 - p)), 1)].sort().values


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(_subset_at_least_one, id="max(int(b * keep), 1)"),
        pytest.param(lambda b, p, rule: sampling.keep_rows(b, 1 - p, rule), id="p as keep"),
        pytest.param(lambda b, p, rule: sampling.keep_rows(b, p, rule)[1:], id="never the first"),
    ],
)
def test_row_rate_can_fail(wrong):
    assert not row_rate_is_right(wrong, 8, 0.45, "exact")


def count_law_holds(draw, batch, p, rule):
    """The number of rows is floor or ceil of m = batch * (1-p): mean m, variance f * (1-f)."""
    times = 4000
    mean = batch * (1 - p)
    fraction = mean - math.floor(mean)
    counts = [len(rows) for rows in drawn_rows(draw, batch, p, times, rule)]
    if not set(counts) <= {math.floor(mean), math.ceil(mean)}:
        return False
    more = sum(c > mean for c in counts)
    return stats.binomtest(more, times, fraction).pvalue > ALPHA


@pytest.mark.parametrize("sampling_rule", ["exact", "window"])
@pytest.mark.parametrize(("batch", "p"), [(3, 0.5), (5, 0.1), (8, 0.45), (64, 0.2), (64, 0.37)])
def test_exact_counts_hardly_vary(sampling_rule, batch, p):
    assert count_law_holds(sampling.keep_rows, batch, p, sampling_rule)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(_subset_at_least_one, id="always rounded down"),
        pytest.param(lambda b, p, _: sampling.keep_rows(b, p, "independent"), id="independent"),
    ],
)
def test_exact_count_law_can_fail(wrong):
    assert not count_law_holds(wrong, 8, 0.45, "exact")


def subsets_are_uniform(draw, rule):
    """At 5 rows, p = .4 there are exactly 10 subsets of 3."""
    seen = Counter(drawn_rows(draw, 5, 0.4, 4000, rule))
    return len(seen) == 10 and stats.chisquare(list(seen.values())).pvalue > ALPHA


def test_exact_is_a_uniformly_random_subset():
    assert subsets_are_uniform(sampling.keep_rows, "exact")


def test_subset_law_can_fail():
    assert not subsets_are_uniform(sampling.keep_rows, "window")


def test_window_is_a_cyclic_run():
    for rows in drawn_rows(sampling.keep_rows, 10, 0.6, 50, "window"):
        gaps = [(b - a) % 10 for a, b in zip(rows, (*rows[1:], rows[0]), strict=True)]
        assert sorted(gaps) == [1, 1, 1, 7]


def test_independent_counts_are_binomial():
    counts = [len(rows) for rows in drawn_rows(sampling.keep_rows, 16, 0.3, 4000, "independent")]
    assert agrees(sum(counts), 16 * 4000, 0.3)
    variance = torch.tensor(counts, dtype=torch.float64).var().item()
    assert variance == pytest.approx(16 * 0.3 * 0.7, rel=0.15)


# The whole batch


def batch_rate_is_right(draw, p):
    torch.manual_seed(0)
    times = 20_000
    return agrees(sum(draw(p) for _ in range(times)), times, p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_batch_rate(p):
    assert batch_rate_is_right(sampling.keep_batch, p)


def test_batch_rate_can_fail():
    assert not batch_rate_is_right(lambda p: sampling.keep_batch(1 - p), 0.1)
    assert not batch_rate_is_right(lambda p: torch.empty(()).uniform_() is not None, 0.1)


def test_batch_laws():
    assert all(sampling.keep_batch(0.0) for _ in range(100))
    assert not any(sampling.keep_batch(1.0) for _ in range(100))


def test_host_draws_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        assert sampling.keep_rows(8, 0.5).device.type == "cpu"
        assert isinstance(sampling.keep_batch(0.5), bool)


# Several ranks


@pytest.fixture
def several_ranks(monkeypatch):
    """A process group of which this process is the rank that the test sets."""
    group = SimpleNamespace(rank=0)
    monkeypatch.setattr(sampling, "has_other_ranks", lambda: True)
    monkeypatch.setattr(sampling.dist, "get_rank", lambda: group.rank)
    numbers = SimpleNamespace(shared=lambda: True, draw=lambda: int(torch.randint(2**53, ())))
    monkeypatch.setattr(sampling, "shared_numbers", numbers)
    return group


def test_ranks_that_were_seeded_alike_draw_different_rows(several_ranks):
    def drawn(rank):
        several_ranks.rank = rank
        torch.manual_seed(3)
        return sampling.keep_rows(1000, 0.5).tolist()

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(rank)) for rank in range(4)}) == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rate_on_each_of_several_ranks(several_ranks, rank):
    several_ranks.rank = rank
    assert row_rate_is_right(sampling.keep_rows, 5, 0.3, "exact")


def test_a_generator_that_is_the_same_on_all_ranks(several_ranks):
    def drawn(rank):
        several_ranks.rank = rank
        torch.manual_seed(3)
        generator = sampling.host_generator(same_on_all_ranks=True)
        return torch.rand(5, generator=generator).tolist()

    assert drawn(0) == drawn(1)


def test_one_rank_draws_from_the_global_generator():
    assert sampling.host_generator() is None
    assert sampling.host_generator(same_on_all_ranks=True) is None


@pytest.mark.parametrize("sync_ranks", [True, None])
def test_the_rate_of_decisions_that_all_ranks_share(several_ranks, sync_ranks):
    assert batch_rate_is_right(lambda p: sampling.keep_batch(p, sync_ranks), 0.1)


def test_a_rank_decides_by_itself_if_it_is_asked_to(several_ranks, monkeypatch):
    monkeypatch.setattr(sampling.shared_numbers, "draw", lambda: 0)  # which would drop
    assert not any(sampling.keep_batch(0.5, True) for _ in range(50))
    assert any(sampling.keep_batch(0.5, False) for _ in range(50))


# What cannot be drawn


def test_different_draws_in_vmap_are_refused_and_the_same_ones_are_not():
    def drop(x):
        return x[sampling.keep_rows(4, 0.5)].sum()

    for draw in (drop, lambda x: x * sampling.keep_batch(0.5)):
        with pytest.raises(RuntimeError, match="pass randomness='same' to vmap"):
            torch.func.vmap(draw, randomness="different")(torch.ones(3, 4))
        assert len(torch.func.vmap(draw, randomness="same")(torch.ones(3, 4))) == 3


def test_a_captured_cuda_graph_is_refused(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    sampling.refuse_graph_capture(on_gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    sampling.refuse_graph_capture(torch.ones(1))
    with pytest.raises(RuntimeError, match="repeat this one draw in every replay"):
        sampling.refuse_graph_capture(on_gpu)
