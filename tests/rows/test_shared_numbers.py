"""Random numbers that are the same on all ranks: seeds, restored states, checkpoints."""

import pytest
import torch
from scipy import stats

from torchdrop.rows import shared_numbers


class Rank:
    """The shared numbers of one rank, simulated in this process with its own generator state."""

    def __init__(self, seed):
        self.numbers = shared_numbers.SharedNumbers()
        self.seed(seed)

    def draw(self, times=1, *, other_draws=0):
        """Draw as a process of its own would, which has drawn ``other_draws`` numbers before."""
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
    """Make ranks whose only broadcast is simulated: the first sends its seed, the others get it."""
    sent = []

    def broadcast(objects, src):
        sent.append(objects[0])
        objects[0] = sent[0]

    class Group:
        pass

    group = Group()
    monkeypatch.setattr(shared_numbers, "_group", lambda: group)
    monkeypatch.setattr(shared_numbers.dist, "broadcast_object_list", broadcast)

    def make(*seeds):
        sent.clear()
        return [Rank(seed) for seed in seeds]

    make.broadcasts = sent
    return make


def test_ranks_draw_the_same_numbers_whatever_their_seeds_after_one_broadcast(ranks):
    a, b = ranks(5, 1234)
    first = a.draw(20)
    assert len(set(first)) == 20
    assert b.draw(20, other_draws=3) == first
    assert a.draw(5, other_draws=7) == b.draw(5)
    assert len(ranks.broadcasts) == 2


def test_seeding_again_determines_the_numbers_of_all_ranks(ranks):
    a, b = ranks(5, 6)  # seed + rank, as is common
    run = a.draw(10)
    assert b.draw(10) == run
    for seed in (9, 5, 9):  # a new seed, the first one, and one that was used before
        a.seed(seed), b.seed(seed + 1)
        again = a.draw(10, other_draws=2 if seed == 9 else 0)
        assert b.draw(10, other_draws=2 if seed == 9 else 0) == again
        assert (again == run) == (seed == 5)
        (fresh,) = ranks(seed)
        assert fresh.draw(10) == again


def test_a_restored_state_gives_the_same_numbers_again(ranks):
    (a,) = ranks(1)
    a.draw(3)
    state = a.state
    drawn = a.draw(3)
    a.state = state
    assert a.draw(3) == drawn
    assert not set(a.draw(3)) & set(drawn)


def test_another_seed_in_between_does_not_start_the_count_anew(ranks):
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
    # The seeds differ as before, so each rank continues the same stream.
    assert a.draw(4) == expected
    assert b.draw(4) == expected


@pytest.mark.parametrize(
    "state", [{}, {"seed": 1}, {"seed": 1, "count": -1}, {"seed": 1.5, "count": 2}, 3]
)
def test_a_state_that_is_not_a_seed_and_a_count_is_refused(state):
    numbers = shared_numbers.SharedNumbers()
    with pytest.raises(ValueError, match="a seed and a count"):
        numbers.load_state_dict(state)
    assert numbers.state_dict() is None


def test_stored_tokens_and_seeds_are_bounded(ranks, monkeypatch):
    (a,) = ranks(0)
    monkeypatch.setattr(a.numbers, "_MAX_TOKENS", 8)
    monkeypatch.setattr(a.numbers, "_MAX_SEEDS", 4)
    for seed in range(20):
        a.seed(seed)
        a.draw(3)
    assert len(a.numbers._number_of_token) == 8
    assert len(a.numbers._streams) == 4


def shared_rate_is_right(p):
    torch.manual_seed(0)
    numbers = shared_numbers.SharedNumbers()
    times = 20_000
    kept = sum(numbers.draw() / 2**53 >= p for _ in range(times))
    return stats.binomtest(kept, times, 0.9).pvalue > 1e-6


def test_the_rate_of_shared_numbers_and_its_twin(ranks):
    assert shared_rate_is_right(0.1)
    assert not shared_rate_is_right(0.12)


def test_alone_nothing_is_shared(monkeypatch):
    numbers = shared_numbers.SharedNumbers()
    monkeypatch.setattr(shared_numbers, "has_other_ranks", lambda: True)
    assert numbers.shared()
    with numbers.alone():
        assert not numbers.shared()
    assert numbers.shared()
