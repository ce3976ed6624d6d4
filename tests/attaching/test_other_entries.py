"""Models that are trained through a method other than forward, or a part of a model."""

from __future__ import annotations

import copy
import io
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchdrop

W, B = 8, 64


class Encoder(nn.Module):
    """Adds its branches in a method that trainers call; has a drop path of its own."""

    def __init__(self, drop_path: float | None = None) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.Linear(W, W), nn.GELU(), nn.Linear(W, W)) for _ in range(3)
        )
        self.drop_path = nn.Identity() if drop_path is None else torchdrop.DropPath(drop_path)
        self.head = nn.Linear(W, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = x + self.drop_path(mixer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


class InForward(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = x + self.drop_path(mixer(x))
        return self.head(x)


def share_dropped(model: Encoder, x: Tensor) -> float:
    """The share of rows of one mixer's output that differ from evaluation."""
    dense = copy.deepcopy(model).eval()
    off = model.forward_features(x) - dense.forward_features(x)
    return float(off.abs().amax(1).gt(1e-6).float().mean())


def test_its_own_drop_path_acts_in_another_method() -> None:
    torch.manual_seed(0)
    model, x = Encoder(0.5), torch.randn(B, W)
    torchdrop.add_stochastic_depth(model, p=None, example_inputs=x)
    assert share_dropped(model, x) > 0.9
    assert share_dropped(model.eval(), x) == 0.0


def test_its_own_drop_path_rests_in_forward() -> None:
    model, x = Encoder(0.5), torch.randn(B, W)
    plan = torchdrop.add_stochastic_depth(model, 0.0)
    torch.testing.assert_close(model(x), copy.deepcopy(model).eval()(x))
    plan.set_p([0.25] * 3)
    model(x)
    assert [len(rows) for rows in plan.last_kept().values()] == [48] * 3
    with torchdrop.paused(model):
        torch.testing.assert_close(model(x), copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize("pickled", [False, True])
def test_copies_rest_too(pickled: bool) -> None:
    model, x = Encoder(0.5), torch.randn(B, W)
    torchdrop.add_stochastic_depth(model, 0.0)
    if pickled:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model)
    torch.testing.assert_close(other(x), model.eval()(x))
    assert share_dropped(other, x) > 0.9


def test_a_thread_in_another_method_keeps_its_drop_path() -> None:
    model, x, shares = Encoder(0.5), torch.randn(B, W), []
    torchdrop.add_stochastic_depth(model, 0.5)
    model.mixers[0].register_forward_pre_hook(lambda m, i: inside())

    def inside() -> None:
        if threading.current_thread() is threading.main_thread() and not shares:
            shares.append(0.0)  # once
            thread = threading.Thread(target=lambda: shares.append(share_dropped(model, x)))
            thread.start()
            thread.join()

    model(x)
    assert shares[1] > 0.9


def test_drop_paths_in_training_at_test_time_act() -> None:
    """Samples at test time, as people draw them: only the drop path layers are in training."""
    model, x = Encoder(0.5), torch.randn(B, W)
    torchdrop.add_stochastic_depth(model, 0.5)
    model.eval()
    model.drop_path.train()
    assert not torch.equal(model(x), model(x))


class ChecksInside(nn.Module):
    """A branch with a checkpoint around a function that holds the drop path."""

    def __init__(self, reentrant: bool, scaled: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.reentrant = nn.Linear(W, W), nn.Linear(W, W), reentrant
        self.drop_path = torchdrop.DropPath(0.9)
        self.gamma = nn.Parameter(torch.rand(W)) if scaled else None

    def inner(self, x: Tensor) -> Tensor:
        out = self.drop_path(self.fc2(torch.tanh(self.fc1(x))))
        return out if self.gamma is None else self.gamma * out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return out


class AddsIt(nn.Module):
    def __init__(self, reentrant: bool, scaled: bool) -> None:
        super().__init__()
        self.child = ChecksInside(reentrant, scaled)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.child(x)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("example", [True, False])
def test_a_checkpoint_in_a_branch_repeats_that_its_drop_path_rests(
    reentrant: bool, scaled: bool, example: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[AddsIt(reentrant, scaled) for _ in range(2)]).double()
    dense = copy.deepcopy(model).eval()
    x = torch.randn(16, W, dtype=torch.double, requires_grad=True)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", example_inputs=x.detach() if example else None
    )
    for _ in range(2):
        out = model(x)
        wanted = x
        for block, rows in zip(dense, plan.last_kept().values(), strict=True):
            weights = torch.zeros(16, 1, dtype=x.dtype).index_fill_(0, rows, 2.0)
            wanted = wanted + weights * block.child(wanted)
        torch.testing.assert_close(out, wanted)
        grads = []
        for y, net in ((out, model), (wanted, dense)):
            net.zero_grad()
            x.grad = None
            y.square().sum().backward()
            grads.append([x.grad.clone(), *(p.grad.clone() for p in net.parameters())])
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_checkpoint_outside_of_a_site_repeats_that_its_drop_path_acts() -> None:
    """The twin: a block whose forward is not called drops as before, in both runs."""
    model = ChecksInside(False, True)
    whole = nn.Sequential(AddsIt(False, True), AddsIt(False, True))
    torchdrop.add_stochastic_depth(whole, 0.5)
    model = whole[0].child
    x = torch.randn(64, W, requires_grad=True)
    out = model(x)
    out.sum().backward()
    assert torch.equal(out.abs().sum(1) == 0, x.grad.abs().sum(1) == 0)
    assert (x.grad.abs().sum(1) == 0).float().mean() > 0.5


# --- nothing is dropped --------------------------------------------------------------------------


def test_the_first_backward_warns_if_forward_is_never_called() -> None:
    model, x = Encoder(), torch.randn(B, W)
    torchdrop.add_stochastic_depth(model, 0.5)
    with pytest.warns(UserWarning, match=r"never called in training.*forward_features\(\)"):
        model.forward_features(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        model.forward_features(x).sum().backward()


@pytest.mark.parametrize("kind", [Encoder, InForward])
@pytest.mark.parametrize("case", ["called", "removed", "p is 0", "paused"])
def test_there_is_no_warning_otherwise(kind: type[Encoder], case: str) -> None:
    model, x = kind(), torch.randn(B, W)
    plan = torchdrop.add_stochastic_depth(model, 0.5)
    if case == "removed":
        torchdrop.remove_stochastic_depth(model)
    if case == "p is 0":
        plan.set_p(0.0)
    if case == "called":
        model(x).sum().backward()
    elif case == "paused":
        with torchdrop.paused(model):
            model.forward_features(x).sum().backward()
    else:
        model.forward_features(x).sum().backward()


def test_the_hook_is_not_copied_or_saved() -> None:
    model, x = Encoder(), torch.randn(B, W)
    torchdrop.add_stochastic_depth(model, 0.5)
    file = io.BytesIO()
    torch.save(model, file)
    copy.deepcopy(model).forward_features(x).sum().backward()


def test_a_gradient_in_evaluation_is_no_sign_and_does_not_end_the_watch() -> None:
    model, x = Encoder(), torch.randn(B, W)
    torchdrop.add_stochastic_depth(model, 0.5)
    model.eval()(x).sum().backward()
    with pytest.warns(UserWarning, match="never called in training"):
        model.train().forward_features(x).sum().backward()
