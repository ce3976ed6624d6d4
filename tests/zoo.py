"""What must hold for every model: the harness that the zoo tests run each of them through."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import torchdrop

# 1 / (1 - p) rounds to 1 in every dtype, and B * (1 - p) to B: nothing is dropped or scaled.
BARELY = 1e-30


def without_randomness(model: nn.Module) -> nn.Module:
    """Switch off every other random layer: dropout, and the masks that the model brings along."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        if type(module).__name__ in ("StochasticDepth", "DropPath"):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that surgery could harm."""
    return {
        "keys": list(model.state_dict()),
        "classes": [type(m) for m in model.modules()],
        "modules": [id(m) for m in model.modules()],
        "parameters": [id(p) for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "repr": repr(model),
    }


def instance_names(model: nn.Module) -> list[list[str]]:
    return [list(m.__dict__) for m in model.modules()]


@contextmanager
def same_randomness(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def assert_same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert torch.equal(a, b), f"largest difference {(a - b).abs().max().item():.3g}"


def check_surgery(model: nn.Module, x: Tensor, *, blocks: int, branches: int) -> None:
    """Run ``model`` through every identity; it comes back as it was."""
    without_randomness(model)
    dense = copy.deepcopy(model)
    before, names = fingerprint(model), instance_names(model)

    found = torchdrop.find_residuals(model)
    assert (len(found), sum(len(r.branches) for r in found)) == (blocks, branches)
    assert all(b.action == "skip" for r in found for b in r.branches)
    assert fingerprint(model) == before
    assert instance_names(model) == names

    plan = torchdrop.add_stochastic_depth(model, p=0.5)
    assert len(plan.blocks) == blocks
    assert fingerprint(model) == before
    assert [r.module for r in plan.blocks] == [r.module for r in found]

    with torch.no_grad():
        # evaluation: the original forward
        model.eval(), dense.eval()
        assert_same(model(x), dense(x))

        # training with nothing dropped, through the generated forward
        model.train(), dense.train()
        plan.set_p([BARELY] * blocks)
        assert_same(model(x), dense(x))
        assert list(plan.observed().values()) == [0.0] * branches
        for (key, mine), theirs in zip(
            model.state_dict().items(), dense.state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs), key

        # checkpoints move both ways
        dense.load_state_dict(model.state_dict())
        model.load_state_dict(dense.state_dict())

    torchdrop.remove_stochastic_depth(model)
    assert not torchdrop.has_stochastic_depth(model)
    assert fingerprint(model) == before
    assert instance_names(model) == names


def check_training(model: nn.Module, x: Tensor) -> None:
    """A step with rows dropped: every parameter gets the gradient that a mask would leave it."""
    plan = torchdrop.add_stochastic_depth(model, p=0.5)
    model.train()
    for mode_p in (0.5, 1.0):
        plan.set_p(mode_p)
        model.zero_grad()
        model(x).square().mean().backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    rates = plan.observed()
    assert max(rates.values()) > 0.0
    torchdrop.remove_stochastic_depth(model)
