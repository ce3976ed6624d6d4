"""Models that are trained through a method other than forward, or a part of a model."""

from __future__ import annotations

import copy
import io
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

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
