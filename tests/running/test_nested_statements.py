"""Generated code runs what the forward ran under a checkpoint under one, too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import torchdrop
from torchdrop.running import rewrite
from torchdrop.running.forward_slot import occupant_of
from written_blocks import Base, Stack, W
from zoo import BARELY

MODES = pytest.mark.parametrize("mode", ["row", "batch"])


class Checkpointing(Base):
    """Checkpoints a part of its forward, or not: the same function."""

    checkpoints, options = True, {"use_reentrant": False}

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(function, *args, **self.options) if self.checkpoints else function(*args)


class Branch(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.call(self.f, self.n1(x))


class PartOfBranch(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(self.call(self.f, x)) * self.gamma


class TwoParts(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        h = self.call(self.f, self.n1(x))
        return x + self.call(lambda h: F.gelu(self.g(h)) * self.gamma, h)


class BothBranches(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.call(self.f, self.n1(x))
        return x + self.call(self.g, self.n2(x))


class Whole(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.body, x)  # type: ignore[no-any-return]

    def body(self, x: Tensor) -> Tensor:
        x = x + self.f(self.n1(x))
        return x + self.g(self.n2(x))


class SumAndMore(Checkpointing):
    """One of the sums is in the checkpoint, and the skip of the other one is computed in it."""

    def forward(self, x: Tensor) -> Tensor:
        x, h = self.call(self.body, x)
        return x + self.g(h)

    def body(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.f(self.n1(x))
        return x, self.n2(x)


class InAnother(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.body, x)  # type: ignore[no-any-return]

    def body(self, x: Tensor) -> Tensor:
        x = x + self.call(self.f, self.n1(x))
        x = self.n2(x)
        return x + self.call(self.g, x)


class Shapes(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        h = self.call(lambda x: self.f(x.reshape(-1, W)).view(x.size(0), -1, W), x)
        return x + h.reshape(x.shape[0], h.size(1), W) * self.gamma

    def extra_repr(self) -> str:
        return "asks for shapes inside and outside"


class UnderAutocast(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.call(self.f, x)
        return x + self.call(self.island, h)

    def island(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.g(h.to(self.gamma.dtype))  # type: ignore[no-any-return]


class Closure(Checkpointing):
    def forward(self, x: Tensor) -> Tensor:
        h = self.n1(x)
        return x + self.call(lambda: self.f(h))


class Dropping(Checkpointing):
    """Draws random numbers in the checkpoint, and adds a branch there."""

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.body, x)  # type: ignore[no-any-return]

    def body(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.f(self.n1(x)), 0.3, self.training)


BLOCKS = [
    Branch,
    PartOfBranch,
    TwoParts,
    BothBranches,
    Whole,
    SumAndMore,
    InAnother,
    Shapes,
    UnderAutocast,
    Closure,
    Dropping,
]
REENTRANT = [{"use_reentrant": False}, {"use_reentrant": True}]


def model_of(kind: type[Checkpointing], checkpoints: bool = True, **options: Any) -> Stack:
    torch.manual_seed(0)
    model = Stack(kind(), kind()).double().train()
    for block in model.blocks:
        block.checkpoints, block.options = checkpoints, options or kind.options
    return model


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (6, 3, W)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """One training step with a seed: the output and all gradients."""
    model.zero_grad()
    x.grad = None
    torch.manual_seed(1)
    out = model(x)
    out.square().sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return [f.clone() for f in found if f is not None]


def assert_alike(ours: list[Tensor], theirs: list[Tensor], kind: type[Base] = Base) -> None:
    assert len(ours) == len(theirs)
    tolerance = 1e-2 if kind is UnderAutocast else 1e-12
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


FORMS = [(k, r) for k in BLOCKS for r in REENTRANT]


# A reentrant one in another warns: the first run of the outer one is without gradients. One of a
# closure warns, too, and computes no gradients.
WARNS = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


@WARNS
@pytest.mark.parametrize(("kind", "options"), [f for f in FORMS if f[0] is not Dropping])
@pytest.mark.parametrize("example", [False, True], ids=["no example", "example"])
def test_with_nothing_dropped_it_is_the_block(
    kind: type[Checkpointing], options: dict[str, bool], example: bool
) -> None:
    model, dense, x = model_of(kind, **options), model_of(kind, **options), batch()
    given = x.detach() if example else None
    plan = torchdrop.add_stochastic_depth(model, [BARELY, BARELY], example_inputs=given)
    assert {b.action for block in plan.blocks for b in block.branches} == {"skip"}
    step(model, x)  # in which the block is proved
    assert_alike(step(model, x), step(dense, x), kind)


@WARNS
@MODES
@pytest.mark.parametrize(
    ("kind", "options"), [f for f in FORMS if not (f[0] is Closure and f[1]["use_reentrant"])]
)
def test_what_is_dropped_does_not_depend_on_checkpoints(
    kind: type[Checkpointing], options: dict[str, bool], mode: str
) -> None:
    found = []
    for checkpoints in (True, False):
        model, x = model_of(kind, checkpoints, **options), batch()
        torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform", mode=mode)
        step(model, x)
        found.append(step(model, x))
    assert_alike(*found, kind)


@WARNS
@pytest.mark.parametrize("kind", [Branch, PartOfBranch, Whole])
def test_a_reentrant_checkpoint_of_what_needs_no_gradients_computes_none(
    kind: type[Checkpointing],
) -> None:
    model, dense = model_of(kind, use_reentrant=True), model_of(kind, use_reentrant=True)
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    x = batch().detach()
    for m in (model, dense):
        m(x)
        torch.manual_seed(1)
        out = m(x)
        if out.requires_grad:
            out.square().sum().backward()
    ours, theirs = ([p.grad for p in m.parameters()] for m in (model, dense))
    assert any(grad is None for grad in theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None or not one.any()) if other is None else torch.allclose(one, other)


def test_a_branch_that_is_added_in_a_checkpoint_is_drawn_again() -> None:
    """``preserve_rng_state=False`` is not kept there, since other rows would be drawn."""
    found = []
    for checkpoints in (True, False):
        model = model_of(Whole, checkpoints, use_reentrant=False, preserve_rng_state=False)
        x = batch()
        torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
        step(model, x)
        found.append(step(model, x))
    assert_alike(*found)


def test_without_the_random_numbers_other_rows_would_be_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NothingDraws(rewrite.CheckpointWriter):
        def end(self, sums: Callable[[Any], bool]) -> None:
            super().end(lambda node: False)

    monkeypatch.setattr(rewrite, "CheckpointWriter", NothingDraws)
    with pytest.raises(AssertionError):
        test_a_branch_that_is_added_in_a_checkpoint_is_drawn_again()


def counted(model: Stack, x: Tensor) -> tuple[int, int]:
    """How often the first layers of the branches run, and how many bytes are saved."""
    runs: list[None] = []
    for block in model.blocks:
        block.f[0].register_forward_hook(lambda *args: runs.append(None))
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    out.sum().backward()
    return len(runs), sum(size for place, size in saved.items() if place not in kept)


@pytest.mark.parametrize("kind", [k for k in BLOCKS if k is not UnderAutocast])
def test_a_checkpoint_saves_as_much_as_it_does_in_the_block(kind: type[Checkpointing]) -> None:
    x = batch()
    model, dense, without = model_of(kind), model_of(kind), model_of(kind, checkpoints=False)
    for m in (model, without):
        torchdrop.add_stochastic_depth(m, [BARELY, BARELY])
        m(x)
    runs, saved = counted(model, x)
    assert runs == counted(dense, x)[0] > counted(without, x)[0]
    assert saved < counted(without, x)[1]


def test_without_the_checkpoints_nothing_would_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "checkpoints_of", lambda node: ())
    with pytest.raises(AssertionError):
        test_a_checkpoint_saves_as_much_as_it_does_in_the_block(Whole)


def test_checkpoints_may_be_switched_on_while_training() -> None:
    """As ``gradient_checkpointing_enable`` does."""
    model, dense, x = model_of(Whole, checkpoints=False), model_of(Whole), batch()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    for checkpoints in (False, True, False, True):
        for block in model.blocks:
            block.checkpoints = checkpoints
        step(model, x)
        assert_alike(step(model, x), step(dense, x))
        assert counted(model, x)[0] == 2 * (1 + checkpoints)
        for block in model.blocks:
            block.f[0]._forward_hooks.clear()
    assert [len(occupant_of(block).train) for block in model.blocks] == [2, 2]  # type: ignore[union-attr]


def test_the_generated_forward_can_be_copied_and_pickled() -> None:
    model, x = model_of(SumAndMore), batch()
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    step(model, x)
    wanted = step(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_alike(step(twin, x), wanted)


def policy() -> tuple[Any, Any]:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def saves(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        linear = operation == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if linear else CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(saves)
    return contexts


def test_a_selective_checkpoint_stays_one() -> None:
    selective = {"use_reentrant": False, "context_fn": policy}
    model, dense, x = model_of(Branch, **selective), model_of(Branch, **selective), batch()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    step(model, x)
    assert_alike(step(model, x), step(dense, x))
    assert "context_fn=context_fn_0" in occupant_of(model.blocks[0]).train[0].branches[0].text  # type: ignore[union-attr]


def test_an_error_in_a_checkpoint_is_the_users_own() -> None:
    model, x = model_of(Branch), batch()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY])
    model.blocks[1].f = nn.Linear(W + 1, W).double()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(x)


@pytest.mark.parametrize("kind", [Branch, Whole])
def test_it_compiles(kind: type[Checkpointing]) -> None:
    model, x = model_of(kind).float(), batch().detach().float()
    torchdrop.add_stochastic_depth(model, [BARELY, BARELY], example_inputs=x)
    model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    out.sum().backward()
    torch.testing.assert_close(out, model(x))
