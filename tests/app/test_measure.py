from __future__ import annotations

import pytest
import torch
from torch import nn

from torchdrop.app import measure, timing
from torchdrop.app.data import Batches, open_source
from torchdrop.app.measure import Cost, Subject, count_step, largest_shift, time_steps
from torchdrop.app.methods import METHODS, Applied
from torchdrop.app.models import CifarResNet
from torchdrop.app.recipe import Recipe

RECIPE = Recipe(epochs=1, phases=((0, 0.1),), batch_size=20)


@pytest.fixture(scope="module")
def data():
    return open_source("digits", test_size=10).draw(0, 50)


def _subject(data, name="none", p=0.5, model=None):
    torch.manual_seed(0)
    model = CifarResNet(8, 10, 1) if model is None else model
    applied = METHODS[name].build(model, p)
    return Subject(model, applied, Batches(data, batch_size=20, seed=0, channels=1), RECIPE, "cpu")


def test_a_step_is_forward_and_backward(data):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    cost = count_step(_subject(data, model=net), steps=3, seed=0)
    forward = 2 * 20 * (64 * 32 + 32 * 10)
    # Backward: the weights of both layers, and the input of the second.
    assert cost.flops == forward + forward + 2 * 20 * 32 * 10
    # Both inputs of a linear, of which the ReLU's output is one; and the loss's log-probabilities,
    # labels and total weight.
    activations = 20 * (64 + 32) * 4
    assert activations <= cost.saved_bytes <= activations + 20 * (10 * 4 + 8) + 4


def test_counts_are_decided_by_the_seed(data):
    costs = [count_step(_subject(data, "stochastic_depth_batch"), 5, s) for s in (0, 0, 1)]
    assert costs[0] == costs[1]
    assert costs[0] != costs[2]


def test_rows_cost_what_is_kept(data):
    dense = count_step(_subject(data), 20, 0)
    rows = count_step(_subject(data, "stochastic_depth_row", 0.6), 20, 0)
    # Three blocks keep .8, .6 and .4; only the second and third differ in cost (strided).
    assert rows.flops < 0.75 * dense.flops


def test_subsampling_costs_in_proportion(data):
    dense = count_step(_subject(data), 20, 0)
    half = count_step(_subject(data, "subsample", 0.5), 20, 0)
    assert half.flops == pytest.approx(dense.flops / 2, rel=1e-6)
    assert half.saved_bytes == pytest.approx(dense.saved_bytes / 2, rel=0.02)


def test_steps_are_full_batches_as_often_as_it_takes(data):
    steps = _subject(data).steps(5)
    assert [len(labels) for _, labels in steps] == [20] * 5
    assert torch.equal(steps[0][0], steps[2][0])
    assert not torch.equal(steps[0][0], steps[1][0])


def test_a_set_smaller_than_a_batch_is_measured_on_what_there_is(data):
    subject = _subject(data)
    subject.batches.batch_size = 64
    assert [len(labels) for _, labels in subject.steps(2)] == [50, 50]


def test_methods_are_timed_in_turns_and_by_the_median(monkeypatch):
    """A clock that only runs while a step is taken: 1 ms for one, 3 ms for two, rarely 100."""
    now, turns = [0.0], []

    class Fake:
        device = torch.device("cpu")

        def __init__(self, name, seconds):
            self.name, self.seconds, self.taken = name, seconds, 0

        def steps(self, count):
            return [(None, None)] * count

        def step(self, images, labels):
            self.taken += 1
            turns.append(self.name)
            now[0] += 0.1 if self.taken % 20 == 0 else self.seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    times = time_steps({"one": Fake("one", 0.001), "two": Fake("two", 0.003)}, rounds=9, seed=0)
    assert times == pytest.approx({"one": 1.0, "two": 3.0})
    firsts = turns[:: 2 * measure.STEPS_A_ROUND]
    assert firsts[:4] == ["one", "two", "one", "two"]
    assert turns.count("one") == turns.count("two")


def test_cost_is_per_step(data):
    class Growing(Applied):
        """Gives one row more in every step."""

        rows = 0

        def batch(self, images, labels):
            self.rows += 2
            return images[: self.rows], labels[: self.rows]

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    batches = Batches(data, batch_size=20, seed=0, channels=1)
    cost = count_step(Subject(net, Growing(), batches, RECIPE, "cpu"), 3, 0)
    assert cost == Cost(4 * (2 * 2 * 64 * 10), pytest.approx(cost.saved_bytes))


# --- variance shift


class _OneNorm(nn.Module):
    """Images, a layer in front of a BatchNorm, and logits."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.bn(x.flatten(1)))


def test_dropout_in_front_of_batch_norm_shifts_by_the_closed_form(data):
    before = largest_shift(_subject(data, "dropout_before_bn", 0.5, _OneNorm()))
    after = largest_shift(_subject(data, "dropout_after_bn", 0.5, _OneNorm()))
    # Digits come normalised, so that E[x]^2 is small: (E[x]^2 + Var[x]) / (1 - p) over Var[x].
    # Pixels that are hardly ever seen, with a large E[x]^2 / Var[x], make it more.
    assert before > 1.9
    assert after == pytest.approx(1.0)


def test_without_a_method_training_is_evaluation_before_the_first_batch_norm(data):
    assert largest_shift(_subject(data, "none", 0.0, _OneNorm())) == pytest.approx(1.0)


def test_a_method_that_changes_the_batch_shifts_what_the_network_sees(data):
    assert largest_shift(_subject(data, "cutout", 1.0, _OneNorm())) != pytest.approx(1.0, abs=0.01)
    assert largest_shift(_subject(data, "cutout", 0.0, _OneNorm())) == pytest.approx(1.0)


def test_a_network_without_batch_norm_has_no_shift(data):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert largest_shift(_subject(data, model=net)) is None


def test_an_empty_subsample_has_no_shift(data):
    assert largest_shift(_subject(data, "subsample", 1.0)) is None


def test_measuring_the_shift_leaves_the_network_as_it_was(data):
    subject = _subject(data, "stochastic_depth_row")
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    assert largest_shift(subject) > 0
    assert all(torch.equal(before[key], value) for key, value in subject.model.state_dict().items())
    assert all(module.training for module in subject.model.modules())
