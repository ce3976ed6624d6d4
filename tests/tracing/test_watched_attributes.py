"""What a graph holds fixed is noted while it is read, wherever it was kept, and nothing is set."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop
from torchdrop.running.forward_slot import occupant_of
from torchdrop.tracing.watched_attributes import same
from written_blocks import Base, Stack, W, flat
from zoo import BARELY, assert_same, instance_names


class Inner:
    gain = 1.0


@dataclass
class Config:
    scale: float = 1.0
    unused: int = 0
    sizes: list[float] = field(default_factory=lambda: [1.0, 1.0])
    inner: Inner = field(default_factory=Inner)

    @property
    def half(self) -> float:
        return self.scale / 2

    def times(self, factor: float) -> float:
        return self.inner.gain * factor

    def __call__(self, factor: float) -> float:
        return self.sizes[1] * factor


class Slots:
    __slots__ = ("shift",)

    def __init__(self) -> None:
        self.shift = 0.0


class Output(nn.Module):
    """Adds the skip for its parent, so its forward is read as part of the parent's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)
        self.scale = 1.0
        self.config = Config()

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.fc(y) * self.scale * self.config.scale + x


class Block(nn.Module):
    by_class = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)
        self.out = Output()
        self.config = Config()
        self.slots = Slots()
        self.nested = {"a": [{"b": 1.0}]}
        self.leaf = nn.Identity()
        self.leaf.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        y = self.fc(x).relu() * self.by_class * config.half * config.sizes[0] + self.slots.shift
        y = y * config.times(1.0) * config(2.0) * self.nested["a"][0]["b"] * self.leaf.scale
        return self.out(y, x)


def set_to(path: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        holder, _, name = path.rpartition(".")
        setattr(_reach(block, holder) if holder else block, name, 3.0)

    return change


def _reach(block: Any, path: str) -> Any:
    for name in path.split("."):
        block = getattr(block, name)
    return block


CHANGES: dict[str, Callable[[Any], Any]] = {
    **{
        path: set_to(path)
        for path in (
            "by_class", "config.scale", "config.inner.gain", "slots.shift", "leaf.scale",
            "out.scale", "out.config.scale",
        )
    },
    "an item of a list of an object": lambda block: block.config.sizes.__setitem__(0, 3.0),
    "read in a call of an object": lambda block: block.config.sizes.__setitem__(1, 3.0),
    "an item within items": lambda block: block.nested["a"][0].update(b=3.0),
    "another object": lambda block: setattr(block, "config", Config(scale=3.0)),
}  # fmt: skip


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_read_may_change(change: str) -> None:
    model, dense = pair()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    x = torch.randn(4, W)
    before = model(x)
    for net in (model, dense):
        CHANGES[change](net[0])
    out = model(x)
    assert_same(out, dense(x))
    assert not torch.equal(out, before)


def test_a_forward_that_notes_nothing_would_go_on_as_before() -> None:
    model, dense = pair()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY], verify=False)
    (program,) = occupant_of(model[0]).train  # type: ignore[union-attr]
    assert {"config.half", "leaf.scale", "out.config.scale"} < program.attributes.keys()
    program.attributes.clear()
    program.__post_init__()
    x = torch.randn(4, W)
    model[0].config.scale = dense[0].config.scale = 3.0
    assert not torch.allclose(model(x), dense(x))


def test_what_was_not_read_may_change_at_no_cost() -> None:
    model, dense = pair()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    for step in range(40):  # more than there are readings of a block
        model[0].config.unused = step
        x = torch.randn(4, W)
        assert_same(model(x), dense(x))
    assert len(occupant_of(model[0]).train) == 1  # type: ignore[union-attr]


def test_what_is_gone_is_noticed() -> None:
    model, _ = pair()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    del model[0].config
    with pytest.raises(RuntimeError, match=r"0 was read with an attribute that it no longer has"):
        model(torch.randn(4, W))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_looks_at_its_own(make: Callable[[nn.Module], Any]) -> None:
    model, dense = pair()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    twin = make(model)
    x = torch.randn(4, W)
    twin[0].config.scale = 3.0
    assert_same(model(x), dense(x))
    dense[0].config.scale = 3.0
    assert_same(twin(x), dense(x))


class Keeping(nn.Module):
    """Keeps its last activation in an object that stands outside of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(W, W)
        self.state = Config()

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).relu()
        self.state.last = y  # type: ignore[attr-defined]
        return x + y


class Appending(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        self.state.sizes.append(1.0)
        return x + self.fc(x).relu()


class Deeper(Keeping):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, list[int]] = {"calls": []}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["calls"].append(1)
        return x + self.fc(x).relu()


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Keeping, r"\(self\.state\.last = y.*\): it sets self\.state\.last"),
        (Appending, r"it changes self\.state\.sizes"),
        (Deeper, r"it changes self\.kept"),
    ],
)
def test_what_a_forward_changes_is_refused_and_left_as_it_is(
    kind: type[Keeping], what: str
) -> None:
    model = nn.Sequential(kind(), kind())
    before = pickle.dumps(model)
    names = instance_names(model)
    with pytest.raises(ValueError, match=rf"test_watched_attributes\.py:\d+ .*{what}|{what}"):
        torchdrop.add_stochastic_depth(model, 0.5)
    assert instance_names(model) == names
    assert pickle.dumps(model) == before
    # with an example it is dropped as a whole, and goes on keeping
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=torch.randn(4, W))
    assert [r.action for r in plan.blocks] == ["layer", "layer"]


def test_reading_changes_nothing() -> None:
    model, _ = pair()
    before = pickle.dumps(model)
    torchdrop.find_residuals(model)
    torchdrop.find_residuals(model, torch.randn(4, W))
    assert pickle.dumps(model) == before
    assert "__getattribute__" not in nn.Module.__dict__


@pytest.mark.parametrize(
    ("known", "given", "alike"),
    [
        (2, 2, True),
        ([1, "a"], [1, "a"], True),
        (1, True, False),
        (1, 1.0, False),
        ((1,), [1], False),
    ],
)
def test_equal_values_of_different_types_are_not_the_same(
    known: object, given: object, alike: bool
) -> None:
    # a forward may ask `is True`, or divide: 1 // 2 is not 1.0 // 2
    assert same(known, given) is alike


def test_a_tensor_is_the_same_only_as_itself() -> None:
    x = torch.ones(2)
    assert same(x, x)
    assert not same(x, x.clone())


class Told(Base):
    """Its parent sets H and W before each call, as Swin for detection and PVT do."""

    H: int | None = None
    W: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.H is not None
        assert self.W is not None
        y = self.f(x).view(-1, self.H, self.W, x.shape[-1])
        return x + y.roll(1, 1).view(x.shape)


class Telling(Stack):
    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = x.view(batch, height * width, channels)
        for block in self.blocks:
            block.H, block.W = height, width
            x = block(x)
        return x


def test_attributes_that_a_parent_sets_are_read_again() -> None:
    model = Telling(Told(), Told())
    dense = copy.deepcopy(model)
    example = torch.randn(2, 2, 3, W)
    plan = torchdrop.add_stochastic_depth(model, 0.5, example_inputs=example)
    plan.set_p([BARELY, BARELY])
    for height, width in ((2, 3), (3, 2), (6, 1), (1, 1), (2, 3)):
        x = torch.randn(4, height, width, W)
        assert_same(model(x), dense(x))
    plan.set_p([0.5, 0.5])
    twin = copy.deepcopy(dense)
    torchdrop.add_stochastic_depth(twin, [0.5, 0.5], example_inputs=example, compute="mask")
    torch.manual_seed(3)
    out = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(twin(x), out)


class Warming(Base):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.scale


def test_the_reading_that_was_used_longest_ago_gives_way_to_a_new_one() -> None:
    model = Stack(Warming(), Warming())
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    sites = [occupant_of(block) for block in model.blocks]

    def call(scale: float) -> None:
        for block in model.blocks:
            block.scale = scale
        x = flat()
        assert_same(model(x), copy.deepcopy(model).eval()(x))

    for step in range(16):
        call(1.0 / (step + 1))
    call(1.0 / 2)  # the second reading is used again
    with pytest.warns(UserWarning, match=r"blocks\.0 was called in more.*self\.scale keeps chang"):
        call(100.0)
    for step in range(20):
        call(100.0 + step)  # one warning in all
    for site in sites:
        programs = site.train  # type: ignore[union-attr]
        assert len(programs) == 16
        held = [program.attributes["scale"] for program in programs]
        assert held[0] == 1.0  # the first one stays
        assert 119.0 in held
        assert [min(program.branches) for program in programs] == list(range(16))


def test_a_reading_that_is_in_use_stays() -> None:
    model = Stack(Warming(), Warming())
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    site = occupant_of(model.blocks[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(40):
            for scale in (0.5, float(step)):
                for block in model.blocks:
                    block.scale = scale
                model(flat())
    assert 0.5 in [p.attributes["scale"] for p in site.train]  # type: ignore[union-attr]


class Listed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = [1.0, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) * self.sizes[0]


def test_a_list_that_is_changed_in_place_is_noticed() -> None:
    model = Stack(Listed(), Listed())
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    x = flat()
    model(x)
    model.blocks[0].sizes[0] = 5.0
    assert_same(model.blocks[0](x), Listed.forward(model.blocks[0], x))
