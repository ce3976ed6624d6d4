"""What a call tells beforehand: numbers, lengths and decisions on shapes in a block's forward."""

import contextlib
import math

import pytest
import torch
from torch import nn

import torchdrop


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)


class Root(Base):
    """A window of int(sqrt(N)) tokens a side."""

    def forward(self, x):
        side = int(math.sqrt(x.shape[1]))
        grid = self.fc(x).relu().reshape(-1, side, side, 8).transpose(1, 2)
        return x + grid.reshape(-1, side * side, 8)


class Starred(Base):
    def forward(self, x):
        hidden = (*x.shape[:-1], 2, -1)
        return x + self.fc(x).view(hidden).relu().flatten(-2)


class Rest(Base):
    def forward(self, x):
        batch, *rest = x.shape
        return x + self.fc(x).relu().view(batch, *rest)


class Looped(Base):
    def forward(self, x):
        y = self.fc(x)
        parts = [y[:, i].relu() for i in range(y.shape[1])]
        return x + torch.stack(parts, 1)


class Computed(Base):
    """Branches on the shape and the dtype of what a child returned."""

    def forward(self, x):
        y = self.fc(x)
        if y.shape[1] > 6:
            y = y * 2
        if y.dtype == torch.float16 and not torch.isfinite(y).all():
            y = y.clamp(-1e4, 1e4)
        return x + y.relu()


class Finfo(Base):
    def forward(self, x):
        y = self.fc(x)
        return x + y.masked_fill(y < 0, torch.finfo(y.dtype).min).relu()


class OnDevice(Base):
    def forward(self, x):
        y = self.fc(x)
        if x.device.type == "cpu" and not x.is_cuda:
            y = y * 2
        return x + y.relu()


class CountsTheBatch(Base):
    def forward(self, x):
        windows = int(x.shape[0] * x.shape[1] / 4)
        return x + self.fc(x.reshape(windows, 4, 8)).relu().reshape(x.shape)


class Counted(Base):
    """Asks how many dimensions there are, of its input and of what it computes."""

    def forward(self, x):
        heads = self.fc(x).view(*x.shape[:-1], 2, 4)
        if len(heads.shape) == len(x.shape) + 1 and len(heads.size()) == 4:
            heads = heads.transpose(1, 2).relu().transpose(1, 2)
        return x + heads.flatten(-2)


READ = (Root, Starred, Rest, Looped, Computed, Finfo, OnDevice, Counted)


def two(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind()).double()


def masked(model, x, kept, p, shift=0):
    for i, block in enumerate(model):
        rows = torch.zeros(x.shape[0], 1, 1, dtype=x.dtype)
        rows[kept[str(i)]] = 1 / (1 - p)
        x = x + rows.roll(shift, 0) * (type(block).forward(block, x) - x)
    return x


def check(model, plan, x, p=0.5):
    out = model(x)
    kept = plan.last_kept()
    assert {len(rows) for rows in kept.values()} == {x.shape[0] // 2}
    torch.testing.assert_close(out, masked(model, x, kept, p), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(out, masked(model, x, kept, p, shift=1))


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.__name__)
def test_what_follows_from_shapes_is_known(kind):
    model = two(kind)
    x = torch.randn(8, 4, 8, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    assert [block.action for block in plan.blocks] == ["skip", "skip"]
    check(model, plan, x)


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.__name__)
def test_other_lengths_and_batches_are_read_as_they_are(kind):
    model = two(kind)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", example_inputs=torch.randn(8, 4, 8).double()
    )
    for batch, length in ((8, 9), (6, 4), (8, 9), (4, 16), (2, 4)):
        check(model, plan, torch.randn(batch, length, 8, dtype=torch.float64))
    programs = model[0].__dict__["forward"].train
    for batch in range(2, 12, 2):
        model(torch.randn(batch, 4, 8, dtype=torch.float64))
    assert model[0].__dict__["forward"].train == programs
    assert len(programs) <= 3


class Ranked(Base):
    def forward(self, x):
        y = self.fc(x)
        return x + (y.relu() if len(x.shape) == 3 else y.tanh())


def test_the_length_of_a_shape_holds_for_all_sizes():
    model = two(Ranked)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", example_inputs=torch.randn(8, 4, 8).double()
    )
    for length in (3, 5, 6):
        check(model, plan, torch.randn(8, length, 8, dtype=torch.float64))
    (program,) = model[0].__dict__["forward"].train
    assert program.seen is None
    x = torch.randn(8, 8, dtype=torch.float64)  # read again: it is another function
    out, kept = model(x), plan.last_kept()
    for i, block in enumerate(model):
        rows = torch.zeros(8, 1, dtype=x.dtype)
        rows[kept[str(i)]] = 2.0
        x = x + rows * block.fc(x).tanh()
    torch.testing.assert_close(out, x, rtol=1e-10, atol=1e-10)


def test_more_kinds_of_calls_than_are_remembered(monkeypatch):
    monkeypatch.setattr("torchdrop.running.read_again._KINDS_OF_CALLS", 2)
    model = two(Computed)
    x = torch.randn(8, 4, 8, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    for length in (3, 4, 5, 6, 3, 4, 5):
        check(model, plan, torch.randn(4, length, 8, dtype=torch.float64))
    (program,) = model[0].__dict__["forward"].train
    assert len(program.seen) <= 2


def test_a_plain_number_from_the_batch_size_is_no_constant():
    model, x = two(CountsTheBatch), torch.randn(8, 4, 8, dtype=torch.float64)
    found = torchdrop.find_residuals(model, x)
    assert [r.action for r in found] == ["layer", "layer"]
    assert "a Python number that depends on the batch size" in found[0].reason
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    check(model, plan, x)


def test_working_out_facts_counts_as_no_work_and_draws_nothing():
    model = two(Computed)
    x = torch.randn(8, 4, 8, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", example_inputs=x)
    with torchdrop.cost.FlopCounter() as counter:
        model(x)
    assert counter.total == 2 * 4 * 4 * 8 * 8 * 2  # two blocks, four rows of four tokens
    shares = [branch.share for block in plan.blocks for branch in block.branches]
    assert shares == [0.5, 0.5]


class DrawsByShape(Base):
    def forward(self, x):
        y = self.fc(x) + torch.rand(x.shape[0])[:, None, None]
        parts = [y[:, i].relu() for i in range(y.shape[1])]
        return x + torch.stack(parts, 1)


def states_after_calls():
    """The states of the generator after a call of a known length and after one of a new length."""
    model = two(DrawsByShape)
    example = torch.randn(4, 2, 8, dtype=torch.float64)
    # without the test of the block, which restores the generators on its own
    torchdrop.add_stochastic_depth(model, 0.5, example_inputs=example, verify=False)
    states = []
    for length in (2, 3):
        x = torch.randn(4, length, 8, dtype=torch.float64)
        torch.manual_seed(0)
        model(x)
        states.append(torch.get_rng_state())
    return states


def test_working_out_a_new_length_draws_no_random_numbers():
    assert torch.equal(*states_after_calls())


class Second(nn.Module):
    """Blocks of (tokens, batch, features)."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.Sequential(kind(), kind())

    def forward(self, x):
        return self.blocks(x.transpose(0, 1)).transpose(0, 1)


class RootOfFirst(Base):
    def forward(self, x):
        side = int(math.sqrt(x.shape[0]))
        grid = self.fc(x).relu().reshape(side, side, -1, 8).transpose(0, 1)
        return x + grid.reshape(side * side, -1, 8)


class CountsTheSecond(Base):
    """Rows of a reshape that depend on how many samples there are."""

    def forward(self, x):
        windows = int(x.shape[1] / 2)
        return x + self.fc(x).relu().reshape(-1, 2, windows, 8).flip(1).reshape(x.shape)


@pytest.mark.parametrize(("kind", "action"), [(RootOfFirst, "skip"), (CountsTheSecond, "mask")])
@pytest.mark.parametrize("scale", ["train", "eval"])
def test_a_number_is_compared_along_the_dimension_of_the_batch(kind, action, scale):
    torch.manual_seed(0)
    model = Second(kind).double()
    dense, x = [type(b)().double() for b in model.blocks], torch.randn(8, 4, 8).double()
    for twin, block in zip(dense, model.blocks, strict=True):
        twin.load_state_dict(block.state_dict())
    masked = pytest.warns(UserWarning, match="its rows depend on each other")
    with masked if action == "mask" else contextlib.nullcontext():
        plan = torchdrop.add_stochastic_depth(
            model, 0.5, schedule="uniform", example_inputs=x, scale=scale
        )
    assert [block.action for block in plan.blocks] == [action, action]
    out, gain = model(x), 2.0 if scale == "train" else 1.0
    expected = x.transpose(0, 1)
    for block, rows in zip(dense, plan.last_kept().values(), strict=True):
        weight = torch.zeros(1, 8, 1, dtype=x.dtype)
        weight[0, rows] = gain
        expected = expected + weight * (block(expected) - expected)
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=0, atol=1e-10)
    expected = x.transpose(0, 1)
    for block in dense:
        step = block(expected) - expected
        expected = expected + (step if scale == "train" else 0.5 * step)
    torch.testing.assert_close(model.eval()(x), expected.transpose(0, 1), rtol=0, atol=1e-10)


class SizedByATable(Base):
    """Takes the number of heads from a table that has nothing to do with the batch."""

    def forward(self, x, table):
        heads = int(table.new_ones(table.shape[0] * 2).numel() / 2)
        return x + self.fc(x).relu().unflatten(-1, (heads, -1)).flatten(-2)


class WithATable(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.blocks = nn.ModuleList([SizedByATable(), SizedByATable()])
        self.register_buffer("table", torch.zeros(rows, 3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, self.table)
        return x


def test_only_the_batch_is_doubled_to_learn_what_depends_on_it():
    model, x = WithATable(4), torch.randn(6, 8, dtype=torch.float64)
    plan = torchdrop.add_stochastic_depth(model.double(), 0.5, example_inputs=x)
    assert [block.action for block in plan.blocks] == ["skip", "skip"]
    # a table of as many rows as the batch might be one of its tensors
    plan = torchdrop.add_stochastic_depth(WithATable(2), 0.5, example_inputs=torch.randn(2, 8))
    assert [block.action for block in plan.blocks] != ["skip", "skip"]
