"""What people do around a model with stochastic depth, and get an error that says what to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdrop

W, B = 8, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(W, W), nn.Linear(W, W)

    def branch(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def stack(kind: type[nn.Module] = Block) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind())


# --- a block that is copied with its stochastic depth -------------------------------------------


def test_a_copied_block_is_named_and_refused_where_it_matters() -> None:
    model = stack()
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    model.append(copy.deepcopy(model[0]))
    assert "2 has the stochastic depth of another block 0, as a copy of it has" in repr(plan)
    for call in (lambda: plan.set_p(0.3), lambda: torchdrop.get_plan(model)):
        with pytest.raises(ValueError, match=r"'2' has the .* of another block '0'.*remove"):
            call()
    assert [block.p for block in plan.blocks] == [0.25, 0.5]
    # what the error says to do
    torchdrop.remove_stochastic_depth(model)
    assert len(torchdrop.add_stochastic_depth(model, 0.5).blocks) == 3


def test_copies_of_the_model_and_of_a_part_are_no_such_thing() -> None:
    model = stack()
    torchdrop.add_stochastic_depth(model, 0.5)
    torchdrop.get_plan(copy.deepcopy(model)).set_p(0.3)
    torchdrop.get_plan(copy.deepcopy(model[0])).set_p(0.3)
    torchdrop.get_plan(nn.Sequential(model[0], nn.ReLU(), model[1])).set_p(0.3)


def test_a_teacher_may_be_a_copy_of_its_student() -> None:
    model = nn.ModuleDict({"student": stack()})
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    model["teacher"] = copy.deepcopy(model["student"])
    plan.set_p(0.3)
    assert [block.p for block in plan.blocks] == [0.15, 0.3]
    assert "teacher.0 has the stochastic depth of another block student.0" in repr(plan)
    assert [block.p for block in torchdrop.get_plan(model["teacher"]).blocks] == [0.25, 0.5]
    with pytest.raises(ValueError, match=r"'teacher\.0' has the stochastic depth of another block"):
        torchdrop.get_plan(model)


def test_two_models_in_one_have_a_plan_each() -> None:
    parts = {"a": stack(), "b": stack()}
    for part in parts.values():
        torchdrop.add_stochastic_depth(part, 0.5)
    with pytest.raises(ValueError, match="get_plan for the part of the model that is meant"):
        torchdrop.get_plan(nn.ModuleDict(parts))
    assert len(torchdrop.get_plan(parts["b"]).blocks) == 2


def test_a_message_ends_with_the_address_of_its_page() -> None:
    model = stack()
    torchdrop.add_stochastic_depth(model, 0.5)
    address = r"\. See https://torchdrop\.readthedocs\.io/errors/already-attached/$"
    with pytest.raises(ValueError, match=address):
        torchdrop.add_stochastic_depth(model, 0.5)


# --- nested tensors -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("when", ["example", "call", "call without proof", "paused"])
def test_nested_tensors_are_refused(layout: Any, when: str) -> None:
    model = stack()
    x = torch.nested.nested_tensor([torch.randn(3, W), torch.randn(5, W)], layout=layout)
    if when == "example":
        with pytest.raises(ValueError, match="nested tensor; pad it"):
            torchdrop.add_stochastic_depth(model, 0.5, example_inputs=x)
        assert not torchdrop.has_stochastic_depth(model)
        return
    torchdrop.add_stochastic_depth(model, 0.5, verify=when == "call")
    if when == "paused":
        with torchdrop.paused(model):
            assert model(x).is_nested
        return
    with pytest.raises(ValueError, match=r"nested tensor; pad it.*torchdrop\.paused"):
        model(x)
    model(torch.nested.to_padded_tensor(x, 0.0).flatten(0, 1))  # works afterwards


# --- export in training ---------------------------------------------------------------------------


def test_strict_export_in_training_says_what_works() -> None:
    model, x = stack(), (torch.randn(B, W),)
    torchdrop.add_stochastic_depth(model, 0.5)
    with pytest.raises(Exception, match=r"strict=False, or export the model in evaluation"):
        torch.export.export(model, x, strict=True)
    torch.export.export(model, x, strict=False)
    model.eval()
    program = torch.export.export(model, x, strict=True)
    assert torch.equal(program.module()(*x), model(*x))


# --- compiled functions ---------------------------------------------------------------------------


def _plus(x: Tensor, f: Tensor) -> Tensor:
    return x + f


class Scripted(Block):
    plus: Any = None

    def forward(self, x: Tensor) -> Tensor:
        plus: Any = type(self).plus
        return plus(x, self.branch(x))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    with pytest.warns(Warning, match="deprecated"):
        monkeypatch.setattr(Scripted, "plus", staticmethod(torch.jit.script(_plus)))
    return Scripted


@pytest.mark.parametrize("example", [True, False])
def test_a_scripted_function_that_holds_the_sum_is_refused(
    scripted: type[Scripted], example: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stack(scripted)
    given = torch.randn(B, W) if example else None
    with pytest.raises(ValueError, match=r"torch\.jit\.script has compiled _plus\(\)") as caught:
        torchdrop.add_stochastic_depth(model, 0.5, example_inputs=given)
    assert "example_inputs" not in str(caught.value)  # it would not help
    assert "use the Python function" in str(caught.value)
    # each of the three ways out
    model[1] = torchdrop.StochasticDepth(model[1], 1.0)
    x = torch.randn(B, W)
    torch.testing.assert_close(model(x), scripted.forward(model[0], x))
    monkeypatch.setattr(scripted, "plus", staticmethod(_plus))
    assert len(torchdrop.add_stochastic_depth(stack(scripted), 0.5).blocks) == 2


class BranchesOnData(Block):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + self.branch(x)
        return x - self.branch(x)


def test_the_advice_to_wrap_a_block_is_not_refused_in_turn() -> None:
    model = nn.Sequential(Block(), BranchesOnData(), Block(), BranchesOnData())
    with pytest.raises(ValueError, match=r"the forward of '1'.*torchdrop\.StochasticDepth"):
        torchdrop.add_stochastic_depth(model, 0.5)
    for i in (1, 3):
        model[i] = torchdrop.StochasticDepth(model[i], 0.5)
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    assert [block.name for block in plan.blocks] == ["0", "2"]


def test_the_advice_to_select_is_not_refused_in_turn() -> None:
    model = nn.Sequential(Block(), BranchesOnData(), Block(), BranchesOnData())
    plan = torchdrop.add_stochastic_depth(model, 0.5, select=lambda r: r.default)
    assert [block.name for block in plan.blocks] == ["0", "2"]
