"""Rates and laws of the draws, where they are drawn. The twins show that the tests can fail."""

import itertools
import math
from collections import Counter

import pytest
import torch
from scipy import stats

from torchdrop.layers import draws
from torchdrop.rows import sampling, shared_numbers

ALPHA = 1e-6
RATES = [0.001, 0.1, 0.3, 0.5, 0.9, 0.999]


def agrees(kept, draws, p):
    """Whether ``kept`` of ``draws`` independent draws fit a keep probability of 1 - p."""
    return stats.binomtest(kept, draws, 1 - p).pvalue > ALPHA


# Masks


def mask_rate_is_right(draw, p):
    torch.manual_seed(0)
    mask = draw((1000, 1000), p)
    return agrees(int(mask.sum()), mask.numel(), p)


@pytest.mark.parametrize("p", RATES)
def test_mask_rate(p):
    assert mask_rate_is_right(draws.keep_mask, p)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda s, p: draws.keep_mask(s, 1 - p), id="p as keep probability"),
        pytest.param(
            lambda s, p: torch.floor(torch.rand(s, dtype=torch.bfloat16) + (1 - p)) > 0,
            id="drawn in bfloat16",
        ),
    ],
)
def test_mask_rate_can_fail(wrong):
    assert not mask_rate_is_right(wrong, 0.001)


def test_mask_laws():
    assert draws.keep_mask((1000,), 0.0).all()
    assert not draws.keep_mask((1000,), 1.0).any()
    assert draws.keep_mask((0, 3), 0.5).shape == (0, 3)
    assert draws.keep_mask((2, 3), 0.5, device=torch.device("meta")).is_meta


def test_mask_follows_its_generator_and_else_the_global_seed():
    def drawn(**kwargs):
        return draws.keep_mask((50,), 0.5, **kwargs)

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


# All ranks alike


class Rank:
    """One rank's shared numbers, in this process, in a generator state of its own."""

    def __init__(self, seed):
        self.numbers = shared_numbers.SharedNumbers()
        self.seed(seed)

    def draw(self, times=1, *, other_draws=0):
        """As in a process of its own, which has drawn other numbers as well."""
        with torch.random.fork_rng():
            torch.set_rng_state(self.state)
            torch.rand(other_draws)
            drawn = [self.numbers.draw() for _ in range(times)]
            self.state = torch.get_rng_state()
        return drawn

    def seed(self, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.state = torch.get_rng_state()


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks whose one broadcast is simulated: rank 0 says its seed, the other hears it."""
    said = []

    def broadcast(objects, src):
        said.append(objects[0])
        objects[0] = said[0]

    class Group:
        pass

    group = Group()
    monkeypatch.setattr(shared_numbers, "_group", lambda: group)
    monkeypatch.setattr(shared_numbers.dist, "broadcast_object_list", broadcast)

    def make(*seeds):
        said.clear()
        return [Rank(seed) for seed in seeds]

    make.said = said
    return make


def test_ranks_draw_alike_whatever_their_seeds_and_talk_once(ranks):
    a, b = ranks(5, 1234)
    first = a.draw(20)
    assert len(set(first)) == 20
    assert b.draw(20, other_draws=3) == first
    assert a.draw(5, other_draws=7) == b.draw(5)
    assert len(ranks.said) == 2


def test_a_seed_fixes_the_numbers_of_all_ranks_also_in_the_middle(ranks):
    a, b = ranks(5, 6)  # seed + rank, as many do
    run = a.draw(10)
    assert b.draw(10) == run
    for seed in (9, 5, 9):  # a new one, the first once more, and one that was used before
        a.seed(seed), b.seed(seed + 1)
        again = a.draw(10, other_draws=2 if seed == 9 else 0)
        assert b.draw(10, other_draws=2 if seed == 9 else 0) == again
        assert (again == run) == (seed == 5)
        (fresh,) = ranks(seed)
        assert fresh.draw(10) == again


def test_a_state_that_is_put_back_gives_its_numbers_again(ranks):
    (a,) = ranks(1)
    a.draw(3)
    state = a.state
    drawn = a.draw(3)
    a.state = state
    assert a.draw(3) == drawn
    assert not set(a.draw(3)) & set(drawn)


def test_another_seed_in_between_does_not_start_over(ranks):
    (a,) = ranks(1)
    drawn, state = a.draw(3), a.state
    a.seed(2)
    a.draw(3)
    a.state = state
    assert not set(a.draw(3)) & set(drawn)


def test_shared_numbers_resume(ranks):
    a, b = ranks(1, 2)
    a.draw(4), b.draw(4)
    state, rng = a.numbers.state_dict(), (a.state, b.state)
    expected = a.draw(4)
    a, b = ranks(1, 2)
    for rank, generator in zip((a, b), rng, strict=True):
        rank.numbers.load_state_dict(state)
        rank.state = generator
    # seeds are apart as they were, so each rank knows that the numbers are its own
    assert a.draw(4) == expected
    assert b.draw(4) == expected


@pytest.mark.parametrize(
    "state", [{}, {"seed": 1}, {"seed": 1, "count": -1}, {"seed": 1.5, "count": 2}, 3]
)
def test_what_is_no_state_of_shared_numbers_is_refused(state):
    numbers = shared_numbers.SharedNumbers()
    with pytest.raises(ValueError, match="a seed and a count"):
        numbers.load_state_dict(state)
    assert numbers.state_dict() is None


def test_what_is_remembered_is_bounded(ranks, monkeypatch):
    (a,) = ranks(0)
    monkeypatch.setattr(a.numbers, "_WAITING", 8)
    monkeypatch.setattr(a.numbers, "_SEEDS", 4)
    for seed in range(20):
        a.seed(seed)
        a.draw(3)
    assert len(a.numbers._filed) == 8
    assert len(a.numbers._streams) == 4


def shared_rate_is_right(p):
    torch.manual_seed(0)
    numbers = shared_numbers.SharedNumbers()
    times = 20_000
    return agrees(sum(numbers.draw() / 2**53 >= p for _ in range(times)), times, 0.1)


def test_the_rate_of_shared_numbers_and_its_twin(ranks):
    assert shared_rate_is_right(0.1)
    assert not shared_rate_is_right(0.12)


def test_alone_nothing_is_shared(monkeypatch):
    numbers = shared_numbers.SharedNumbers()
    monkeypatch.setattr(shared_numbers, "in_group", lambda: True)
    assert numbers.shared()
    with numbers.alone():
        assert not numbers.shared()
    assert numbers.shared()
