"""What a training step pays beside the branches that it computes: bytes kept for backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import torchdrop
from torchdrop.cost import saved_bytes
from torchdrop.rows import sampling
from torchdrop.running import residual_sum

models = pytest.importorskip("torchvision.models")


def bytes_kept(model: nn.Module, x: Tensor, p: float, **options: Any) -> tuple[float, float]:
    """Bytes kept for backward over dense: at ``p``, and the bar (1-p) of what p=1 leaves out."""
    dense = saved_bytes(lambda: model(x).square().sum())
    plan = torchdrop.add_stochastic_depth(model, p, schedule="uniform", **options)
    kept = saved_bytes(lambda: model(x).square().sum()) / dense
    plan.set_p([1.0] * len(plan.blocks))
    least = saved_bytes(lambda: model(x).square().sum()) / dense
    return kept, least + (1 - p) * (1 - least) + 0.03


@pytest.mark.usefixtures("large_tensors")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bytes_kept_by_a_resnet(memory_format: torch.memory_format) -> None:
    model = models.resnet18().to(memory_format=memory_format)
    x = torch.randn(16, 3, 64, 64).to(memory_format=memory_format)
    kept, bar = bytes_kept(model, x, 0.5)
    assert kept <= bar


@pytest.mark.usefixtures("large_tensors")
def test_bytes_kept_by_a_vision_transformer() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64)
    kept, bar = bytes_kept(model, torch.randn(8, 3, 64, 64), 0.5)
    assert kept <= bar


@pytest.mark.usefixtures("large_tensors")
def test_the_test_of_bytes_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_sum, "saved_by_producer", lambda x: False)
    kept, bar = bytes_kept(models.resnet18(), torch.randn(16, 3, 64, 64), 0.5)
    assert kept > bar


class Rectified(nn.Module):
    """As in a ResNet: the skip is what a ReLU made, and the ReLU keeps it."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.tanh(self.a(x))))


def pair(depth: int = 3) -> tuple[nn.Sequential, nn.Sequential]:
    """A net that skips and its double that masks; under one seed they drop the same rows."""
    skipping = nn.Sequential(*(Rectified() for _ in range(depth))).double()
    masked = copy.deepcopy(skipping)
    torchdrop.add_stochastic_depth(skipping, 0.5, schedule="uniform")
    torchdrop.add_stochastic_depth(masked, 0.5, schedule="uniform", compute="mask")
    return skipping, masked


def plainly(model: nn.Sequential, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return out


def checkpointed(model: nn.Sequential, x: Tensor) -> Tensor:
    for block in model:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def checkpointed_reentrant(model: nn.Sequential, x: Tensor) -> Tensor:
    for block in model:
        x = checkpoint(block, x, use_reentrant=True)
    return x


def offloaded(model: nn.Sequential, x: Tensor) -> Tensor:
    with save_on_cpu():
        return plainly(model, x)


def without_hooks(model: nn.Sequential, x: Tensor) -> Tensor:
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        return plainly(model, x)


@pytest.mark.parametrize(
    "run", [plainly, checkpointed, checkpointed_reentrant, offloaded, without_hooks]
)
def test_rows_taken_again_give_the_same_gradients(run: Any) -> None:
    skipping, masked = pair()
    x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    grads = []
    for model, how in ((skipping, run), (masked, plainly)):
        torch.manual_seed(3)
        out = how(model, x)
        out.square().sum().backward()
        grads.append([t.grad.clone() for t in (x, *model.parameters())])
        x.grad = None
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_rows_taken_again_have_second_derivatives() -> None:
    skipping, masked = pair()
    x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    second = []
    for model in (skipping, masked):
        torch.manual_seed(3)
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), (x, *model.parameters())))
    for mine, theirs in zip(*second, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_what_is_kept_for_backward_must_not_be_written_into() -> None:
    model = nn.Sequential(Rectified(), Rectified())
    torchdrop.add_stochastic_depth(model, 0.5, schedule="uniform")
    inner = []
    model[0].register_forward_hook(lambda module, args, out: inner.append(out))
    loss = model(torch.randn(6, 6)).sum()
    inner[0].detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, model[1].a.weight)


@pytest.mark.parametrize("sampling", ["exact", "independent", "window"])
@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_no_block_waits_for_the_device(sampling: str, compute: str) -> None:
    """Tensors on the meta device have no values: what asks the device for one raises."""
    with torch.device("meta"):
        model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        x = torch.empty(8, 3, 64, 64)
    plan = torchdrop.add_stochastic_depth(
        model, 0.5, schedule="uniform", sampling=sampling, compute=compute
    )
    for _ in range(3):
        model(x).sum().backward()
    assert all(rows.device.type == "cpu" for rows in plan.last_kept().values())


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), Tensor.nonzero, Tensor.cpu])
def test_the_test_of_waiting_can_fail(wait: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)meta"):
        wait(torch.empty(3, device="meta"))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("how", ["attached", "layer"])
def test_a_cuda_graph_that_would_repeat_its_draw_is_refused(
    monkeypatch: pytest.MonkeyPatch, recorded: bool, mode: str, how: str
) -> None:
    """On fake tensors, which say that they are on a device that need not be there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recorded)
    monkeypatch.setattr(sampling, "_uniform", lambda *given: 0.7)  # a fake one has no value
    block = (
        Rectified() if how == "attached" else torchdrop.StochasticDepth(Rectified(), 0.5, mode=mode)
    )
    model = nn.Sequential(block, copy.deepcopy(block))
    if how == "attached":
        torchdrop.add_stochastic_depth(model, 0.5, mode=mode, schedule="uniform")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(6, 6, device="cuda")
        model.to("cuda")
        if recorded:
            with pytest.raises(RuntimeError, match="repeat this one draw in every replay"):
                model(x)
            model.eval()
        model(x)
