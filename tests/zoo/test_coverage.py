"""Small models of timm and transformers through the whole harness; benchmarks/zoo.py has the rest.

And that the harness can fail: each check against an implementation with one thing wrong.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from zoo_transformers import FAMILIES

import torchdrop
import zoo
from torchdrop.rows import take_and_add
from torchdrop.running import forward_slot, residual_sum, split_site, usual_sum
from torchdrop.running.split_site import SplitSite

BATCH = 5

# name: (blocks, branches, those of an identity that autograd records)
TIMM = {
    "test_vit": (6, 12, 12),
    "test_mambaout": (6, 6, 6),
    "test_resnet": (4, 4, 1),  # of two classes
}

TRANSFORMERS = ["bert", "llama", "t5", "swin"]


def _through_all(model: nn.Module, inputs: Any, blocks: int, branches: int) -> None:
    zoo.without_randomness(model)
    for name, check in zoo.checks(model, inputs):
        if name == "attached":
            plan = torchdrop.get_plan(model)
            attached = [b for block in plan.blocks for b in block.branches]
            assert (len(plan.blocks), len(attached)) == (blocks, branches)
            assert {b.action for b in attached} <= {"skip", "layer"}, plan
        check()
    zoo.check_masked_gradients(model, inputs, example_inputs=inputs)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    blocks, branches, additions = TIMM[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    x = torch.randn(BATCH, 3, *model.default_cfg["input_size"][1:])
    assert zoo.identity_additions(model, x) == additions
    _through_all(model, x, blocks, branches)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model, inputs = family.build(BATCH)
    _through_all(model, inputs, family.blocks, family.branches)


# ---------------------------------------------------------------------------------------------
# The harness can fail


class _Net(nn.Module):
    """Two blocks; every branch is half of the work."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.outer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.outer(self.inner(x).tanh())

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x))
        return out


def _run(name: str) -> None:
    torch.manual_seed(0)
    model, x = _Net(), torch.randn(BATCH, 8)
    if name == "masked gradients":
        zoo.check_masked_gradients(model, x)
        return
    for found, check in zoo.checks(model, x):
        if found == name:
            check()


NAMES = [
    "attached", "evaluation", "nothing dropped", "FLOPs", "all gradients", "copies",
    "masked gradients", "removed",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_harness_passes_what_is_right(name: str) -> None:
    _run(name)


def _wrong(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Break one thing."""
    call, join, add_rows = SplitSite.__call__, SplitSite.join, take_and_add.add_rows
    if name == "attached":
        attach = forward_slot.put_in_slot

        def leave_a_hook(module: nn.Module, what: Any) -> None:
            attach(module, what)
            module.register_forward_hook(lambda *_: None)

        monkeypatch.setattr("torchdrop.attaching.attach.put_in_slot", leave_a_hook)
    elif name == "evaluation":
        monkeypatch.setattr(
            SplitSite, "__call__", lambda self, *a, **k: call(self, *a, **k) * (1 + 1e-6)
        )
    elif name == "nothing dropped":
        # the branch is computed twice: the same sum, but its hooks fire twice
        monkeypatch.setattr(SplitSite, "join", lambda self, *a: (join(self, *a), join(self, *a))[1])
    elif name == "FLOPs":

        def compute_all(site: SplitSite, k: int, skip: Tensor, inputs: Any, *_: Any) -> Tensor:
            return site.mask(k, skip, site.compute(site.train, k, inputs))

        for module in (split_site, usual_sum):
            monkeypatch.setattr(module, "sum_on_rows", compute_all)
        monkeypatch.setattr(usual_sum, "MIN_ELEMENTS_FOR_OWN_FUNCTION", 0)
    elif name == "all gradients":
        for module in (split_site, usual_sum):
            monkeypatch.setattr(
                module, "sum_without_branch", lambda site, k, skip, *_: skip.clone()
            )
    elif name == "copies":
        monkeypatch.setattr(SplitSite, "__deepcopy__", lambda self, memo: self, raising=False)
    elif name == "masked gradients":

        def unscaled(
            skip: Tensor, out: Tensor, kept: Tensor, gain: float, *a: Any, **k: Any
        ) -> Any:
            return add_rows(skip, out, kept, gain * (1 + 1e-8), *a, **k)

        monkeypatch.setattr(residual_sum, "add_rows", unscaled)
    else:

        def leave_an_attribute(module: nn.Module) -> None:
            forward_slot.clear_slot(module)
            module.__dict__["left"] = None

        monkeypatch.setattr("torchdrop.attaching.attach.clear_slot", leave_an_attribute)


@pytest.mark.parametrize("name", NAMES)
def test_the_harness_catches_what_is_wrong(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _wrong(monkeypatch, name)
    with pytest.raises(AssertionError):
        _run(name)


class _Blended(nn.Module):
    """Residuals whose branches no module ends: blended, subtracted, the first operand, shared."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.last = nn.Identity()
            self.gate = nn.Parameter(torch.rand(8))
            self.bias = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.last(self.gate * (self.b(self.a(x + self.bias).relu()) - x))
            x = self.last(self.gate + self.b(x).sigmoid()) + x
            return x - self.a(x).relu() * self.gate

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


def test_the_reference_masks_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = _Blended(), torch.randn(BATCH, 8)
    assert len(torchdrop.find_residuals(model)[0].branches) == 3
    assert zoo.check_masked_gradients(model, x) < 1e-10
    _wrong(monkeypatch, "masked gradients")
    with pytest.raises(AssertionError):
        zoo.check_masked_gradients(model, x)


@pytest.mark.parametrize("size", [1, 16])
def test_the_second_row_of_batch_norm_is_work(size: int) -> None:
    """Of two rows one is kept; if it has a single value, BatchNorm needs the other row, too."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.body(x)
            return out

    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 4, size, size)
    dense = zoo.record(model, x)
    with zoo.attached(model, example_inputs=x):
        found = zoo.check_work(model, x, dense)
    assert found == ((1.0, 1.0) if size == 1 else (0.5, 1.0))


def test_the_count_of_additions_follows_autograd() -> None:
    assert zoo.identity_additions(_Net(), torch.randn(2, 8)) == 2

    class Linear(nn.Module):
        """A branch without a curve, and a sum of two branches, are none."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            return self.a(x).relu() + self.b(x).relu()

    assert zoo.identity_additions(Linear(), torch.randn(2, 8)) == 0
